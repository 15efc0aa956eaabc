"""Ops of mixtures of experts and of latent attention, and what torch eager says of each: cases of test_runtime."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from taskgraph import ops
from taskgraph.graph.graph import GraphBuilder, Value
from tests.paged_cases import PAGES, SIZE

Tensors = dict[str, torch.Tensor]
Make = Callable[[GraphBuilder, str], Value]

HEADS, PLAIN, ROTARY, RANK, VALUES, BATCH, LENGTH = 3, 8, 4, 16, 6, 2, 16


def _experts(b: GraphBuilder, d: str) -> Value:
    """In f32: the values of this table are not scaled, and their cubes lose too much in bf16 (see test_experts)."""
    routing = ops.route(b.input("l", (5, 4), "f32"), spec=ops.RouteSpec(2, normalize=False))
    weights = b.weight("g", (4, 12, 8), "f32"), b.weight("d", (4, 8, 6), "f32")
    return ops.experts(b.input("x", (5, 8), "f32"), routing, *weights, top_k=2)


def _experts_reference(t: Tensors) -> torch.Tensor:
    gate, up = torch.einsum("th,efh->tef", t["x"], t["g"]).chunk(2, -1)
    return torch.einsum("te,tef,ehf->th", _route_reference(t), F.silu(gate) * up, t["d"])


def _latent_rope(each: int, interleaved: bool) -> Make:
    def make(b: GraphBuilder, d: str) -> Value:
        return ops.latent_rope(
            b.input("q", (BATCH * each, HEADS * (PLAIN + ROTARY)), d),
            b.input("kv", (BATCH * each, RANK + ROTARY), d), b.weight("norm", (RANK,), d),
            b.input("at", (BATCH,), "i64"), b.state("keys", (BATCH, LENGTH, RANK + ROTARY), d),
            spec=ops.LatentRopeSpec(HEADS, ROTARY, theta=500.0, eps=1e-3, interleaved=interleaved),
        )  # fmt: skip

    return make


def _turned(x: torch.Tensor, place: int, interleaved: bool) -> torch.Tensor:
    """The last axis as complex numbers, each turned by its frequency."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    angle = place * 500.0 ** (-torch.arange(0, ROTARY, 2) / ROTARY)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(ROTARY // 2), angle)
    return torch.cat([turned.real, turned.imag], -1)


def _latent_rope_reference(interleaved: bool) -> Callable[[Tensors], torch.Tensor]:
    def reference(t: Tensors) -> torch.Tensor:
        each = len(t["q"]) // BATCH
        out = t["q"].view(-1, HEADS, PLAIN + ROTARY).clone()
        for token, kv in enumerate(t["kv"]):
            b, place = token // each, int(t["at"][token // each]) + token % each
            out[token, :, PLAIN:] = _turned(out[token, :, PLAIN:], place, interleaved)
            t["keys"][b, place, :RANK] = F.rms_norm(kv[:RANK], (RANK,), t["norm"], 1e-3)
            t["keys"][b, place, RANK:] = _turned(kv[RANK:], place, interleaved)
        return out

    return reference


def _latent_attention(each: int) -> Make:
    def make(b: GraphBuilder, d: str) -> Value:
        return ops.latent_attention(
            b.input("q", (BATCH * each, HEADS, PLAIN + ROTARY), d), b.input("at", (BATCH,), "i64"),
            b.state("keys", (BATCH, LENGTH, RANK + ROTARY), d), b.weight("up", (HEADS * (PLAIN + VALUES), RANK), d),
            spec=ops.LatentSpec(ROTARY, 0.1),
        )  # fmt: skip

    return make


def latent_attention_reference(t: Tensors, scale: float = 0.1) -> torch.Tensor:
    """Token by token, with keys and values of every head made first."""
    each = len(t["q"]) // len(t["keys"])
    up, rows = t["up"].view(HEADS, PLAIN + VALUES, RANK), []
    for token, q in enumerate(t["q"]):
        b = token // each
        cached = t["keys"][b, : int(t["at"][b]) + token % each + 1]
        made = torch.einsum("nr,hkr->hnk", cached[:, :RANK], up)
        keys = torch.cat([made[..., :PLAIN], cached[:, RANK:].expand(HEADS, -1, -1)], -1)
        shares = (torch.einsum("hk,hnk->hn", q, keys) * scale).softmax(-1)
        rows.append(torch.einsum("hn,hnv->hv", shares, made[..., PLAIN:]).flatten())
    return torch.stack(rows)


def _pages(b: GraphBuilder, d: str) -> Value:
    return b.state("pages_l", (PAGES, SIZE, RANK + ROTARY), d)


def _paged_rope(b: GraphBuilder, d: str) -> Value:
    return ops.paged_latent_rope(
        b.input("q", (7, HEADS * (PLAIN + ROTARY)), d), b.input("kv", (7, RANK + ROTARY), d),
        b.weight("norm", (RANK,), d),
        ops.TokenPlaces(b.input("positions_i32", (7,), "i32"), b.input("slots", (7,), "i32"), 64), _pages(b, d),
        spec=ops.LatentRopeSpec(HEADS, ROTARY, theta=500.0, eps=1e-3),
    )  # fmt: skip


def _paged_rope_reference(t: Tensors) -> torch.Tensor:
    out = t["q"].view(-1, HEADS, PLAIN + ROTARY).clone()
    rows = t["pages_l"].flatten(0, 1)
    for token, (place, slot) in enumerate(zip(t["positions_i32"].tolist(), t["slots"].tolist(), strict=True)):
        out[token, :, PLAIN:] = _turned(out[token, :, PLAIN:], place, True)
        if slot >= 0:
            rows[slot, :RANK] = F.rms_norm(t["kv"][token, :RANK], (RANK,), t["norm"], 1e-3)
            rows[slot, RANK:] = _turned(t["kv"][token, RANK:], place, True)
    return out


def _paged(prefill: bool) -> Make:
    def make(b: GraphBuilder, d: str) -> Value:
        chunks = [b.input("starts", (5,), "i32"), b.input("chunk_lengths", (4,), "i32")]
        tables = [*chunks, b.input("chunk_blocks", (4, 3), "i32")]
        up = b.weight("up", (HEADS * (PLAIN + VALUES), RANK), d)
        q = b.input("q", (23, HEADS, PLAIN + ROTARY), d)
        return ops.paged_latent_prefill(q, *tables, _pages(b, d), up, spec=ops.LatentSpec(ROTARY, 0.1, context=40))

    def decode(b: GraphBuilder, d: str) -> Value:
        tables = b.input("lengths", (5,), "i32"), b.input("blocks", (5, 3), "i32")
        up = b.weight("up", (HEADS * (PLAIN + VALUES), RANK), d)
        q = b.input("q", (5, HEADS, PLAIN + ROTARY), d)
        return ops.paged_latent_decode(q, *tables, _pages(b, d), up, spec=ops.LatentSpec(ROTARY, 0.1, context=40))

    return make if prefill else decode


def _paged_reference(t: Tensors) -> torch.Tensor:
    """Sequence by sequence, as a static cache of what its pages hold."""
    blocks, lengths = (t.get(f"chunk_{n}", t.get(n)) for n in ("blocks", "lengths"))
    assert blocks is not None
    assert lengths is not None
    starts = t["starts"].tolist() if "starts" in t else range(len(lengths) + 1)
    out = torch.zeros(len(t["q"]), HEADS * VALUES)
    for i, length in enumerate(lengths.tolist()):
        rows = slice(starts[i], starts[i + 1])
        each = rows.stop - rows.start
        if length and each:
            cached = t["pages_l"][blocks[i].long()].flatten(0, 1)[None]
            given = {"q": t["q"][rows], "keys": cached, "up": t["up"], "at": torch.tensor([length - each])}
            out[rows] = latent_attention_reference(given)
    return out


def _route_slots(b: GraphBuilder, d: str) -> Value:
    return ops.route(
        b.input("l", (7, 9), d), spec=ops.RouteSpec(2, normalize=False), slots=b.input("slots", (7,), "i32")
    )


def _route_reference(t: Tensors) -> torch.Tensor:
    scores = t["l"].softmax(-1)
    kept = scores >= scores.topk(2, -1).values[:, 1:]
    return torch.where(kept, scores, 0.0)


CASES: dict[str, tuple[Make, Callable[[Tensors], torch.Tensor]]] = {
    "route": (
        lambda b, d: ops.route(b.input("l", (5, 9), d), spec=ops.RouteSpec(2, normalize=False)), _route_reference,
    ),
    "route slots": (_route_slots, lambda t: torch.where(t["slots"][:, None] < 0, 0.0, _route_reference(t))),
    "experts": (_experts, _experts_reference),
    "gated_add": (
        lambda b, d: ops.gated_add(b.input("x", (5, 7), d), b.input("g", (5, 1), d), b.input("y", (5, 7), d)),
        lambda t: t["y"] + t["g"].sigmoid() * t["x"],
    ),
    "latent_rope": (_latent_rope(3, True), _latent_rope_reference(True)),
    "latent_rope decode": (_latent_rope(1, False), _latent_rope_reference(False)),
    "latent_attention": (_latent_attention(1), latent_attention_reference),
    "latent_attention prefill": (_latent_attention(4), latent_attention_reference),
    "paged_latent_rope": (_paged_rope, _paged_rope_reference),
    "paged_latent_decode": (_paged(False), _paged_reference),
    "paged_latent_prefill": (_paged(True), _paged_reference),
    "gemm wide": (
        lambda b, d: ops.gemm(b.input("x", (5, 16), d), b.weight("w", (16, 12), d), out_dtype="f32"),
        lambda t: t["x"] @ t["w"],
    ),
}  # fmt: skip
