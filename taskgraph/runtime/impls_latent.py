"""Multi-head latent attention on a CPU, over a static cache or pages: the cheaper of its two forms for the shapes."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops import latent_flops
from taskgraph.runtime import kernels_latent as kernels
from taskgraph.runtime.binders import Entry, Site, Tensors, binder, bits, packed, rope_table

Ints = npt.NDArray[np.int32]


def _check(op: Op, *tensors: torch.Tensor) -> None:
    first, *others = tensors
    if first.dtype not in (torch.float32, torch.bfloat16) or any(t.dtype != first.dtype for t in others):
        raise BackendUnavailable(f"op {op.name!r}: the cpu backend takes f32 or bf16, the same for all.")
    if first.dtype == torch.bfloat16 and any(t.shape[-1] % 2 for t in tensors):
        raise BackendUnavailable(f"op {op.name!r}: a bf16 latent needs even sizes on the cpu backend; use f32.")


def _rows(latents: torch.Tensor) -> npt.NDArray[Any]:
    """The cache as a matrix with a row a slot."""
    return bits(latents).reshape(-1, latents.shape[2])


# -- rotating and writing -----------------------------------------------------------------------------------------


@binder("latent_rope")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    """A static cache is one whose sequence b has the slots from b * length on."""
    *given, positions, latents = ins
    batch, length, _ = latents.shape
    steps = np.arange(outs[0].shape[0] // batch)
    places, slots = np.empty((2, batch, len(steps)), np.int32)
    write = _rope(op, (*given, latents), places.reshape(-1), slots.reshape(-1), length, outs[0], site)
    first, base = positions.numpy()[:, None], length * np.arange(batch)[:, None]

    def run() -> None:
        np.add(first, steps, out=places, casting="unsafe")
        np.add(places, base, out=slots, casting="unsafe")
        write()

    return run


@binder("paged_latent_rope")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    *given, positions, slots, latents = ins
    return _rope(op, (*given, latents), positions.numpy(), slots.numpy(), op.integer("context"), outs[0], site)


def _rope(op: Op, tensors: Tensors, places: Ints, slots: Ints, length: int, out: torch.Tensor, site: Site) -> Entry:
    q, kv, norm, latents = tensors
    _check(op, q, kv, norm, latents, out)
    table = rope_table(op, length, op.integer("rotary"))
    numbers = (op.number("eps"), bool(op.attr("interleaved")))
    ready = (bits(q), bits(kv), norm.float().numpy(), places, slots, _rows(latents), *table, *numbers)
    return partial(kernels.latent_rope, *ready, bits(out), site.threads_for(len(q)))


# -- attention ----------------------------------------------------------------------------------------------------


@binder("latent_attention")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    """A static cache is one page a sequence."""
    q, positions, latents, up = ins
    batch = len(latents)
    each, lengths = len(q) // batch, np.empty(batch, np.int32)
    starts, blocks = np.arange(0, len(q) + 1, each, dtype=np.int32), np.arange(batch, dtype=np.int32)[:, None]
    attend = _attention(op, (q, latents, up), (starts, lengths, blocks), outs[0], site)
    first = positions.numpy()

    def run() -> None:
        np.add(first, each, out=lengths, casting="unsafe")
        attend()

    return run


@binder("paged_latent_decode")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    q, lengths, blocks, latents, up = ins
    tables = (np.arange(len(q) + 1, dtype=np.int32), lengths.numpy(), blocks.numpy())
    return _attention(op, (q, latents, up), tables, outs[0], site)


@binder("paged_latent_prefill")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    q, starts, lengths, blocks, latents, up = ins
    return _attention(op, (q, latents, up), (starts.numpy(), lengths.numpy(), blocks.numpy()), outs[0], site)


def _attention(op: Op, tensors: Tensors, tables: tuple[Ints, Ints, Ints], out: torch.Tensor, site: Site) -> Entry:
    q, latents, up = tensors
    (tokens, heads, dim), rank, rotary = q.shape, up.shape[1], op.integer("rotary")
    _check(op, q, latents, up)
    shape = (heads, dim, rotary, tuple(up.shape))
    absorbed, expanded = latent_flops(tokens / len(tables[1]), op.integer("context"), *shape)
    expand = expanded <= absorbed
    by_head = up.view(heads, -1, rank)
    halves = ((by_head[:, : dim - rotary], _out_of if expand else _into), (by_head[:, dim - rotary :], _out_of))
    none = 0 if expand else tokens
    scratch = [np.empty((none, heads, n), bits(q).dtype) for n in (rank + rotary, rank)]
    places = (*tables, latents.shape[1], _rows(latents))
    last = (expand, np.float32(op.number("scale")), *scratch, bits(out).reshape(tokens, heads, -1), site.threads)
    if op.inputs[-1] in site.constants:
        ready = [packed(half, pack) for half, pack in halves]
        entry = partial(kernels.latent_attention, bits(q), *places, *(r.panels for r in ready), *last)
        entry.__dict__["packed"] = ready  # as long as someone runs on them, others may share them
        return entry
    return lambda: kernels.latent_attention(bits(q), *places, *(pack(half) for half, pack in halves), *last)


def _out_of(half: torch.Tensor) -> npt.NDArray[Any]:
    """Each head's (n, rank), to make n channels of a latent."""
    return kernels.pack_heads(list(bits(half)))


def _into(half: torch.Tensor) -> npt.NDArray[Any]:
    """Each head's (n, rank), to make a query of rank channels of n."""
    return kernels.pack_heads(list(bits(half).transpose(0, 2, 1)))
