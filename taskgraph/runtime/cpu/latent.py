"""Multi-head latent attention on a CPU, over a static cache or pages: by torch, in the cheaper of its two forms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops import latent_flops
from taskgraph.runtime.cpu import kernels_latent as kernels
from taskgraph.runtime.cpu.arguments import LatentRope, Places, ready
from taskgraph.runtime.cpu.kernels_attention import check_positions
from taskgraph.runtime.cpu.kernels_paged import check_tables
from taskgraph.runtime.cpu.kinds import CHANGING, COMPILED, CpuSite, Entry, Tensors, bits, register, rope_table
from taskgraph.runtime.cpu.products import widened

Ints = npt.NDArray[np.int32]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _check(op: Op, *tensors: torch.Tensor) -> None:
    first, *others = tensors
    if first.dtype not in (torch.float32, torch.bfloat16) or any(t.dtype != first.dtype for t in others):
        raise BackendUnavailable(f"op {op.name!r}: the cpu backend takes f32 or bf16, the same for all.")


def _rows(latents: torch.Tensor) -> npt.NDArray[Any]:
    """The cache as a matrix with a row a slot."""
    return bits(latents).reshape(-1, latents.shape[2])


# -- rotating and writing -----------------------------------------------------------------------------------------


def bind_latent_rope(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """A static cache is one whose sequence b has the slots from b * length on."""
    *given, positions, latents = ins
    batch, length, _ = latents.shape
    steps = np.arange(outs[0].shape[0] // batch)
    places, slots = np.empty((2, batch, len(steps)), np.int32)
    write = _rope(op, (*given, latents), places.reshape(-1), slots.reshape(-1), length, outs[0], site)
    first, base = positions.numpy()[:, None], length * np.arange(batch)[:, None]

    def run() -> None:
        check_positions(positions.numpy(), len(steps), length)
        np.add(first, steps, out=places, casting="unsafe")
        np.add(places, base, out=slots, casting="unsafe")
        write()

    return run


def bind_paged_latent_rope(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    *given, positions, slots, latents = ins
    return _rope(op, (*given, latents), positions.numpy(), slots.numpy(), op.integer("context"), outs[0], site)


def _rope(op: Op, tensors: Tensors, places: Ints, slots: Ints, length: int, out: torch.Tensor, site: CpuSite) -> Entry:
    q, kv, norm, latents = tensors
    _check(op, q, kv, norm, latents, out)
    table = rope_table(op, length, op.integer("rotary"))
    rope = LatentRope(*table, norm.float().numpy(), op.number("eps"), bool(op.attr("interleaved")))
    given = (bits(q), bits(kv), Places(places, slots), _rows(latents), rope)
    return ready(kernels.latent_rope, *given, bits(out), site.threads_for(len(q)))


# -- attention ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """What the two forms share: `up` (heads, keys then values, rank), `rotary` channels, and the scores' scale.

    Both take q (t, heads, dim) over cached (n, rank + rotary) to (t, heads, values); `mask` is (t, n).
    """

    up: torch.Tensor
    keys: int
    rotary: int
    scale: float

    def absorbed(self, q: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Heads attend over the latents, with the up-projection folded into queries and results."""
        up = self.up.to(q.dtype)
        latent = torch.einsum("thk,hkr->htr", q[..., : self.keys], up[:, : self.keys])
        query = torch.cat([latent, q[..., self.keys :].transpose(0, 1)], dim=-1)
        scores = (query @ cached.t()).float() * self.scale
        shares = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
        mixed = shares @ cached[:, : -self.rotary]
        return torch.einsum("htr,hvr->thv", mixed, up[:, self.keys :])

    def expanded(self, q: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Keys and values of all heads are made first."""
        made = torch.einsum("nr,hkr->hnk", cached[:, : -self.rotary], self.up.to(q.dtype))
        shared = cached[:, -self.rotary :].expand(len(made), -1, -1)
        keys = torch.cat([made[..., : self.keys], shared], dim=-1)
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1), keys, made[..., self.keys :], mask, scale=self.scale)
        return mixed.transpose(0, 1)


def bind_latent_attention(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, positions, latents, up = ins
    batch, each = len(latents), len(q) // len(latents)
    attend, out = _cheaper(op, q, up, batch, site), _by_token(outs[0], q)

    def run() -> None:
        check_positions(positions.numpy(), each, latents.shape[1])
        for b, start in enumerate(positions.tolist()):
            rows = slice(b * each, (b + 1) * each)
            out[rows] = attend(q[rows], latents[b, : start + each], _causal(each, start + each))

    return run


def bind_paged_latent_decode(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, lengths, blocks, latents, up = ins
    attend = _cheaper(op, q, up, len(q), site)
    return _over_pages(attend, q, (torch.arange(len(q) + 1), lengths, blocks), latents, _by_token(outs[0], q))


def bind_paged_latent_prefill(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, starts, lengths, blocks, latents, up = ins
    attend = _cheaper(op, q, up, len(lengths), site)
    return _over_pages(attend, q, (starts, lengths, blocks), latents, _by_token(outs[0], q))


def _over_pages(attend: Attend, q: torch.Tensor, tables: Tensors, latents: torch.Tensor, out: torch.Tensor) -> Entry:
    """Rows starts[i] to starts[i + 1] are the last of the lengths[i] tokens that the pages blocks[i] hold. Rows of no
    sequence, and those of a sequence of length 0, are zeroed."""
    starts, lengths, blocks = tables
    pages, size, _ = latents.shape

    def run() -> None:
        check_tables(lengths.numpy(), blocks.numpy(), pages, size)
        borders = starts.tolist()
        if borders != sorted(borders) or borders[0] < 0 or borders[-1] > len(q):
            raise ValueError("the chunks have more rows than there are: they end at", borders[-1])
        out[borders[-1] :] = 0
        for i, seen in enumerate(lengths.tolist()):
            rows = slice(borders[i], borders[i + 1])
            each = rows.stop - rows.start
            if not seen or not each:
                out[rows] = 0
                continue
            if each > seen:
                raise ValueError("a chunk has more rows than its sequence has tokens: it ends at", rows.stop)
            cached = latents[blocks[i, : -(-seen // size)]].flatten(0, 1)[:seen]
            out[rows] = attend(q[rows], cached, _causal(each, seen))

    return run


def _cheaper(op: Op, q: torch.Tensor, up: torch.Tensor, sequences: int, site: CpuSite) -> Attend:
    """The form of fewer operations, in float32 where that is the faster way to multiply."""
    (tokens, heads, dim), rotary = q.shape, op.integer("rotary")
    wide = widened(q.dtype, max(tokens // sequences, 1), site.ways)
    up = up.float() if wide and op.inputs[-1] in site.constants else up
    form = _Form(up.view(heads, -1, up.shape[1]), dim - rotary, rotary, op.number("scale"))
    shape = (heads, dim, rotary, tuple(up.shape))
    absorbed, expanded = latent_flops(tokens / sequences, op.integer("context"), *shape)
    attend = form.absorbed if absorbed < expanded else form.expanded
    return (lambda q, cached, mask: attend(q.float(), cached.float(), mask)) if wide else attend


def _causal(rows: int, seen: int) -> torch.Tensor:
    """(rows, seen): the rows are the last of the tokens."""
    return torch.ones(rows, seen, dtype=torch.bool).tril(seen - rows)


def _by_token(out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return out.view(len(q), q.shape[1], -1)


register("latent_rope", bind_latent_rope, COMPILED)
register("paged_latent_rope", bind_paged_latent_rope, COMPILED)
register("latent_attention", bind_latent_attention, CHANGING)
register("paged_latent_decode", bind_paged_latent_decode, CHANGING)
register("paged_latent_prefill", bind_paged_latent_prefill, CHANGING)
