"""How latent attention runs on a GPU: a kernel for reference, without tensor cores, over a static cache or pages.

It always folds the up-projection into queries and results; the work rules count the cheaper form.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from taskgraph.graph.op import Op
from taskgraph.runtime import rotary
from taskgraph.runtime.gpu.kinds import (
    KERNELS,
    THREADS,
    Buffer,
    GpuSite,
    Launch,
    Launches,
    at_most,
    float_type,
    need_i64,
    register,
)

_MAX_RANK, _MAX_DIM = 1024, 512
"""The arrays in shared memory of `latent.cu`."""


def latent_rope_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    _, _, _, positions, latents = ins
    need_i64(op, positions)
    batch, length, _ = latents.shape
    return _rope(op, ins, outs[0], (np.int32(outs[0].shape[0] // batch), np.int64(length)), site)


def paged_latent_rope_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    pages, rows, _ = ins[-1].shape
    return _rope(op, ins, outs[0], (np.int64(pages * rows), np.int32(op.integer("context"))), site)


def _rope(op: Op, ins: Sequence[Buffer], out: Buffer, places: tuple[np.integer[Any], ...], site: GpuSite) -> Launches:
    q, kv, norm, *_, latents = ins
    (tokens, heads, dim), turned = out.shape, op.integer("rotary")
    inverse = site.constant(rotary.inverse_frequencies(op, turned))
    sizes = map(np.int32, (heads, dim, latents.shape[2] - turned, turned))
    last = (np.float32(op.number("eps")), np.int32(bool(op.attr("interleaved"))), np.float32(rotary.size(op)))
    name = f"{op.kind}_{float_type(op, q, kv, norm, latents, out)}"
    args = (*(t.address for t in ins), inverse, out.address, *sizes, *places, *last, site.fault())
    return [Launch(name, (tokens, heads + 1), THREADS, args)]


def latent_attention_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, positions, latents, _ = ins
    need_i64(op, positions)
    batch, length, _ = latents.shape
    pointers = [t.address for t in ins]
    return _attention(op, ins, outs[0], pointers, (np.int32(q.shape[0] // batch), np.int64(length)), site)


def paged_latent_decode_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, *others = ins
    return _attention(op, ins, outs[0], [q.address, 0, *(t.address for t in others)], _pages(*ins[1:4]), site)


def paged_latent_prefill_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    return _attention(op, ins, outs[0], [t.address for t in ins], _pages(*ins[2:5]), site)


def _pages(lengths: Buffer, tables: Buffer, latents: Buffer) -> tuple[np.integer[Any], ...]:
    return tuple(map(np.int32, (lengths.shape[0], latents.shape[1], tables.shape[1], latents.shape[0])))


def _attention(
    op: Op,
    ins: Sequence[Buffer],
    out: Buffer,
    pointers: Sequence[int],
    places: tuple[np.integer[Any], ...],
    site: GpuSite,
) -> Launches:
    q, *_, latents, up = ins
    (tokens, heads, dim), turned = q.shape, op.integer("rotary")
    rank = latents.shape[2] - turned
    at_most(op, "channels of a latent", rank, _MAX_RANK)
    at_most(op, "rotary channels", turned, _MAX_DIM)
    sizes = map(np.int32, (heads, dim, rank, turned, out.shape[1] // heads))
    args = (*pointers, out.address, *sizes, *places, np.float32(op.number("scale")), site.fault())
    kernel = "paged_latent_attention" if op.kind.startswith("paged") else "latent_attention"
    return [Launch(f"{kernel}_{float_type(op, q, latents, up, out)}", (tokens, heads), THREADS, args)]


register("latent_rope", latent_rope_launches, KERNELS / "latent.cu")
register("paged_latent_rope", paged_latent_rope_launches, KERNELS / "latent.cu")
register("latent_attention", latent_attention_launches, KERNELS / "latent.cu")
register("paged_latent_decode", paged_latent_decode_launches, KERNELS / "latent.cu")
register("paged_latent_prefill", paged_latent_prefill_launches, KERNELS / "latent.cu")
