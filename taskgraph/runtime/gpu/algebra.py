"""How layer norms, softmax, batched products and reductions run on a GPU through our own kernels."""

import math
from collections.abc import Sequence

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops.algebra import REDUCTIONS, reduced_axes
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.gpu.kinds import (
    KERNELS,
    THREADS,
    Buffer,
    GpuSite,
    Launches,
    blocks,
    dense_strides,
    float_type,
    register,
)
from taskgraph.runtime.program import MOST_AXES, axes_of

_TILE, _BLOCK = 32, 256
_SM_BLOCKS, _PART = 16, 1024
"""Few long reductions are cut into parts: so many blocks for each SM, and no part of fewer entries."""


def layer_norm_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, *extra = ins
    weight = extra[0].address if op.attr("weight") else 0
    bias = extra[-1].address if op.attr("bias") else 0
    columns = x.shape[-1]
    args = (x.address, weight, bias, outs[0].address, np.int32(columns), np.float32(op.number("eps")))
    name = f"layer_norm_{float_type(op, *ins, outs[0])}"
    return [blocks(name, (math.prod(x.shape[:-1]),), THREADS, args, site)]


def softmax_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, axis = ins[0], op.integer("axis")
    length, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    args = (x.address, outs[0].address, np.int32(length), np.int32(inner), np.int32(bool(op.attr("log"))))
    lines = math.prod(x.shape) // length
    return [blocks(f"softmax_{float_type(op, x, outs[0])}", (lines,), THREADS, args, site)]


def reduce_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, attrs = ins[0], Attrs(op.attrs)
    over, strides = reduced_axes(attrs), dense_strides(x.shape)
    table: list[int] = []
    for axes in ([i for i in range(len(x.shape)) if i not in over], [*over]):
        shape = tuple(x.shape[i] for i in axes)
        found = axes_of(shape, shape, [strides[i] for i in axes])
        if found is None:
            raise BackendUnavailable(f"op {op.name!r}: the reduce kernels take up to {MOST_AXES} axes apart.")
        sizes, steps = found
        rest = [0] * (MOST_AXES - len(sizes))
        table += [len(sizes), *sizes[::-1], *rest, *steps[::-1], *rest]
    length = math.prod(x.shape[i] for i in over)
    count = math.prod(x.shape) // length
    parts = max(1, min(-(-site.sm_count * _SM_BLOCKS // count), length // _PART))
    ends = (np.int64(length), np.int32(parts), np.int32(REDUCTIONS.index(str(attrs["operation"]))))
    kept, found_table = site.scratch(4 * count * parts) if parts > 1 else 0, site.constant(np.array(table, np.int64))
    kind, out = float_type(op, x, outs[0]), outs[0].address
    first = blocks(f"reduce_{kind}", (count * parts,), THREADS, (x.address, out, kept, found_table, *ends), site)
    if parts == 1:
        return [first]
    return [first, blocks(f"reduce_parts_{kind}", (count,), THREADS, (kept, out, *ends), site)]


def matmul_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    a, b, out = *ins, outs[0]
    kinds = (a.dtype, b.dtype, out.dtype)
    if kinds not in (("f32",) * 3, ("bf16",) * 3, ("bf16", "bf16", "f32")):
        raise BackendUnavailable(f"op {op.name!r}: no product of {kinds[0]} and {kinds[1]} into {kinds[2]}.")
    lead, (m, k), n = out.shape[:-2], a.shape[-2:], out.shape[-1]
    starts = np.stack([_starts(lead, t.shape) for t in (a, b)], axis=-1)
    numbers = (np.int32(m), np.int32(n), np.int32(k), np.int32(bool(op.attr("transpose_b"))))
    args = (a.address, b.address, out.address, site.constant(starts), *numbers)
    grid = (-(-n // _TILE), -(-m // _TILE), math.prod(lead))
    return [blocks(f"matmul_{a.dtype}_{out.dtype}", grid, _BLOCK, args, site)]


def _starts(lead: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Where the operand of each product of a batch of shape `lead` begins, in elements."""
    own = shape[:-2]
    each = np.arange(math.prod(own), dtype=np.int64).reshape(own) * (shape[-2] * shape[-1])
    return np.ascontiguousarray(np.broadcast_to(each, lead)).reshape(-1)


register("layer_norm", layer_norm_launches, KERNELS / "algebra.cu")
register("softmax", softmax_launches, KERNELS / "algebra.cu")
register("reduce", reduce_launches, KERNELS / "algebra.cu")
register("matmul", matmul_launches, KERNELS / "algebra.cu")
