"""How copies, moves of rows and pages, and collectives run on a CPU."""

from collections.abc import Sequence
from functools import partial

import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops import COLLECTIVES
from taskgraph.runtime.cpu import kernels_paged
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.kinds import COMPILED, TORCH, CpuSite, Entry, Tensors, register


def bind_copy(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return partial(outs[0].copy_, ins[0])


def bind_slice_rows(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    rows = slice(op.integer("start"), op.integer("stop"), op.integer("step"))
    return partial(outs[0].copy_, ins[0][rows])


def bind_concat_rows(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return partial(torch.cat, list(ins), out=outs[0])


def bind_copy_pages(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    source, target, pairs = ins
    flat = [t.view(torch.uint8).view(t.shape[0], -1).numpy() for t in (source, target)]
    return ready(kernels_paged.copy_pages, *flat, pairs.numpy(), outs[0].numpy())


# -- collectives -------------------------------------------------------------------------------------------------------

_HALF = (torch.bfloat16, torch.float16)


def bind_collective(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """Through the group of the executable (gloo); a collective of one rank is a copy."""
    x, out = ins[0], outs[0]
    if op.integer("ranks") == 1:
        return partial(out.copy_, x)
    if site.group is None:
        raise BackendUnavailable(f"op {op.name!r}: {op.kind} over {op.attr('ranks')} ranks needs a group of them.")
    wide = torch.float32 if x.dtype in _HALF and op.kind != "all_gather" else x.dtype
    if op.kind == "all_reduce":
        total = _staged(out, wide)
        return _in_turn([partial(total.copy_, x), partial(site.group.all_reduce, total), *_back(out, total)])
    run = site.group.all_gather if op.kind == "all_gather" else site.group.reduce_scatter
    axis = op.integer("axis")
    source, target = x.movedim(axis, 0), out.movedim(axis, 0)  # torch joins and shares along the first axis
    sent, got = _staged(source, wide), _staged(target, wide)
    return _in_turn([*_back(sent, source), partial(run, got, sent), *_back(target, got)])


def _staged(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The view itself where it is contiguous and of that dtype, else a buffer; sums of halves are made in float32."""
    if view.is_contiguous() and view.dtype == dtype:
        return view
    return torch.empty(view.shape, dtype=dtype)


def _back(target: torch.Tensor, source: torch.Tensor) -> list[Entry]:
    """The copy from source to target, if they are two."""
    return [] if target is source else [partial(target.copy_, source)]


def _in_turn(entries: Sequence[Entry]) -> Entry:
    if len(entries) == 1:
        return entries[0]

    def run() -> None:
        for entry in entries:
            entry()

    return run


register("copy", bind_copy, TORCH)
register("slice_rows", bind_slice_rows, TORCH)
register("concat_rows", bind_concat_rows, TORCH)
register("copy_pages", bind_copy_pages, COMPILED)
for _kind in COLLECTIVES:
    register(_kind, bind_collective, TORCH)
