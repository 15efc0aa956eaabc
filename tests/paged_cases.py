"""The ops over pages against plain torch: graphs, places that fit them, and references that read pages as they lie."""

import math
from collections.abc import Callable

import torch

from taskgraph import ops
from taskgraph.graph.graph import GraphBuilder, Value

PAGES, KV, SIZE, WIDE, DIM = 6, 2, 32, 32, 16
Tensors = dict[str, torch.Tensor]
PLACES = {
    "positions_i32": [40, 3, 0, 41, 42, 43, 0],
    "slots": [5 * SIZE + 8, 3, -1, 5 * SIZE + 9, 5 * SIZE + 10, 5 * SIZE + 11, -1],
    "lengths": [70, 0, 1, 32, 33],
    "blocks": [[4, 0, 2], [0, 0, 0], [1, 0, 0], [3, 0, 0], [5, 1, 0]],
    "starts": [0, 14, 14, 15, 20],
    "chunk_lengths": [70, 0, 1, 37],
    "chunk_blocks": [[4, 0, 2], [0, 0, 0], [1, 0, 0], [5, 3, 0]],
    "pairs": [[4, 1], [-1, 2], [0, 5], [3, -1]],
    "top_k": [0, 3, 0, 40, 1],
    "sources": [-1, 2, 0, -1, 6],
}
"""Values of the i32 inputs of the cases below, by name."""


def keys_of(stored: torch.Tensor) -> torch.Tensor:
    """(pages, kv, size, wide) keys from the panels of q k^T that the cpu backend keeps them in."""
    pages, kv, size, wide = stored.shape
    pack = 4 // stored.itemsize
    panels = stored.view(pages, kv, size // 32, wide // pack, 32, pack)
    return panels.permute(0, 1, 2, 4, 3, 5).reshape(stored.shape)


def values_of(stored: torch.Tensor) -> torch.Tensor:
    """(pages, kv, size, wide) values from the panels of p v."""
    pages, kv, size, wide = stored.shape
    pack = 4 // stored.itemsize
    panels = stored.view(pages, kv, wide // 32, size // pack, 32, pack)
    return panels.permute(0, 1, 3, 5, 2, 4).reshape(stored.shape)


def pages(b: GraphBuilder, d: str) -> list[Value]:
    return [b.state(name, (PAGES, KV, SIZE, WIDE), d) for name in ("pages_k", "pages_v")]


def _attended(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
    """q (t, heads, dim) over keys (kv, len, dim), query i seeing `first` + i of them."""
    group = q.shape[1] // keys.shape[0]
    keys, values = (t.repeat_interleave(group, 0) for t in (keys, values))
    scores = torch.einsum("thd,hld->thl", q, keys) / math.sqrt(q.shape[2])
    hidden = torch.arange(keys.shape[1])[None, :] >= (first + torch.arange(len(q)))[:, None]
    return torch.einsum("thl,hld->thd", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), values)


def _gathered(t: Tensors, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (kv, length, dim) of the first `length` tokens of a sequence."""
    count = -(-length // SIZE)
    read = ((keys_of, "pages_k"), (values_of, "pages_v"))
    k, v = (f(t[f"{name}_stored"])[blocks[:count].long()].float() for f, name in read)
    return tuple(x.transpose(0, 1).flatten(1, 2)[:, :length, :DIM] for x in (k, v))  # type: ignore[return-value]


def _rope(normed: bool) -> Callable[[GraphBuilder, str], Value]:
    def make(b: GraphBuilder, d: str) -> Value:
        norms = [b.weight(n, (DIM,), d) for n in ("q_norm", "k_norm")] if normed else []
        places = [b.input(n, (7,), "i32") for n in ("positions_i32", "slots")]
        return ops.paged_rope(
            b.input("qkv", (7, 8 * DIM), d), ops.TokenPlaces(*places, 64), *pages(b, d), norms, spec=ops.RopeSpec(4)
        )

    return make


def _rope_reference(t: Tensors) -> torch.Tensor:
    q, k, v = t["qkv"].view(-1, 8, DIM).split((4, 2, 2), dim=1)
    if "q_norm" in t:
        q, k = (torch.nn.functional.rms_norm(y, (DIM,), t[n], 1e-6) for y, n in ((q, "q_norm"), (k, "k_norm")))
    angle = t["positions_i32"].float()[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2).float() / DIM)
    cos, sin = (x.repeat(1, 2)[:, None, :] for x in (angle.cos(), angle.sin()))

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1) * sin

    for row, slot in enumerate(t["slots"].tolist()):
        if slot >= 0:
            t["pages_k"][slot // SIZE, :, slot % SIZE, :DIM] = turned(k)[row]
            t["pages_v"][slot // SIZE, :, slot % SIZE, :DIM] = v[row]
    return turned(q)


def _decode(b: GraphBuilder, d: str) -> Value:
    tables = b.input("lengths", (5,), "i32"), b.input("blocks", (5, 3), "i32")
    return ops.paged_decode(b.input("q", (5, 4, DIM), d), *tables, *pages(b, d), context=40)


def _decode_reference(t: Tensors) -> torch.Tensor:
    rows = []
    for i, length in enumerate(t["lengths"].tolist()):
        k, v = _gathered(t, t["blocks"][i], length)
        rows.append(_attended(t["q"][i : i + 1], k, v, length) if length else torch.zeros(1, 4, DIM))
    return torch.cat(rows).flatten(1)


def _prefill(b: GraphBuilder, d: str) -> Value:
    tables = [
        b.input("starts", (5,), "i32"),
        b.input("chunk_lengths", (4,), "i32"),
        b.input("chunk_blocks", (4, 3), "i32"),
    ]
    return ops.paged_prefill(b.input("q", (23, 4, DIM), d), *tables, *pages(b, d), context=40)


def _prefill_reference(t: Tensors) -> torch.Tensor:
    out, starts = torch.zeros(23, 4, DIM), t["starts"].tolist()
    for i, length in enumerate(t["chunk_lengths"].tolist()):
        rows = slice(starts[i], starts[i + 1])
        if length:
            k, v = _gathered(t, t["chunk_blocks"][i], length)
            out[rows] = _attended(t["q"][rows], k, v, length - (rows.stop - rows.start) + 1)
    return out.flatten(1)


def _copy(b: GraphBuilder, d: str) -> Value:
    return ops.copy_pages(*pages(b, d), b.input("pairs", (4, 2), "i32"), direction="d2h")


def _copy_reference(t: Tensors) -> torch.Tensor:
    whole = t["pages_v_stored"].clone()
    whole[1], whole[5] = t["pages_k_stored"][4], t["pages_k_stored"][0]
    t["pages_v"] = values_of(whole).float()
    return torch.tensor([2])


CASES: dict[str, tuple[Callable[[GraphBuilder, str], Value], Callable[[Tensors], torch.Tensor]]] = {
    "paged_rope": (_rope(False), _rope_reference),
    "paged_rope norms": (_rope(True), _rope_reference),
    "paged_decode": (_decode, _decode_reference),
    "paged_prefill": (_prefill, _prefill_reference),
    "copy_pages": (_copy, _copy_reference),
}
"""Name -> (graph, reference); a reference finds pages both as stored ("pages_k_stored") and in plain order, in float32,
and writes to the latter what the op must write."""
