"""How ops that move elements between axes run on a CPU: by torch's strided copies."""

from functools import partial

import torch

from taskgraph.errors import ExecutionError
from taskgraph.graph.op import Op
from taskgraph.ops.axes import numbers_of
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.cpu.kinds import TORCH, CpuSite, Entry, Tensors, register


def bind_reshape(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return partial(outs[0].view(ins[0].shape).copy_, ins[0])


def bind_permute(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    turned = ins[0].permute(numbers_of(Attrs(op.attrs), "axes"))
    return partial(outs[0].view(turned.shape).copy_, turned)


def bind_expand(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return partial(outs[0].copy_, ins[0].expand(outs[0].shape))


def bind_concat(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return partial(torch.cat, list(ins), op.integer("axis"), out=outs[0])


def bind_slice_axis(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    part = slice(op.integer("start"), op.integer("stop"), op.integer("step"))
    return partial(outs[0].copy_, ins[0][(slice(None),) * op.integer("axis") + (part,)])


def bind_index_select(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return _known(op, ins, partial(torch.index_select, ins[0], op.integer("axis"), ins[1], out=outs[0]))


def bind_take_along(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, index = ins
    axis, out = op.integer("axis"), outs[0]
    if index.dtype == torch.int64:
        return _known(op, ins, partial(torch.gather, x, axis, index, out=out))
    return _known(op, ins, lambda: torch.gather(x, axis, index.long(), out=out))


def _known(op: Op, ins: Tensors, take: Entry) -> Entry:
    """`take`, with an error that names the op and the index that does not exist."""
    x, index = ins
    size = x.shape[op.integer("axis")]

    def run() -> None:
        try:
            take()
        except (IndexError, RuntimeError):
            odd = index[(index < 0) | (index >= size)]
            if not odd.numel():
                raise
            text = f"the index {int(odd[0])}, which its axis of {size} has not"
            raise ExecutionError(f"op {op.name!r} was given {text}.", op=op.name) from None

    return run


register("reshape", bind_reshape, TORCH)
register("permute", bind_permute, TORCH)
register("expand", bind_expand, TORCH)
register("concat", bind_concat, TORCH)
register("slice_axis", bind_slice_axis, TORCH)
register("index_select", bind_index_select, TORCH)
register("take_along", bind_take_along, TORCH)
