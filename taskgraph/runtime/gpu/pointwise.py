"""How pointwise formulas run on a GPU: one kernel interprets them all."""

import math
from collections.abc import Sequence

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op, Tensor
from taskgraph.ops.formula import MOST_INPUTS
from taskgraph.ops.pointwise import computes_in, formula_of
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.gpu.kinds import (
    KERNELS,
    Buffer,
    GpuSite,
    Launch,
    Launches,
    dense_strides,
    register,
    spread,
)
from taskgraph.runtime.program import axes_of, rows_of, single, steps_of

_TYPES = ("f32", "bf16", "bool", "i32", "i64")
_EACH = 4
"""Elements of a thread at a time; `pointwise.cu` has the same number."""


def elementwise_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    made, out = formula_of(Attrs(op.attrs)), outs[0]
    strange = sorted({b.dtype for b in (*ins, out)} - {*_TYPES})
    if strange:
        raise BackendUnavailable(f"op {op.name!r}: the pointwise kernels have no {strange[0]}; convert it first.")
    whole = computes_in([Tensor(f"x{i}", b.shape, b.dtype) for i, b in enumerate(ins)], made) == "i64"
    operands = []
    for buffer in (*ins, out):
        axes = axes_of(out.shape, buffer.shape, buffer.strides or dense_strides(buffer.shape))
        if axes is None:
            raise BackendUnavailable(f"op {op.name!r}: an input is repeated along too many axes; reshape it first.")
        operands.append((buffer.dtype, axes))
    steps, numbers = steps_of(made)
    kept = numbers.astype(np.int64) if whole else single(numbers)
    table = (site.constant(rows_of(operands)), site.constant(steps), site.constant(kept) if len(kept) else 0)
    addresses = [*(b.address for b in ins), *[0] * (MOST_INPUTS - len(ins))]
    total = math.prod(out.shape)
    counts = (np.int32(len(steps)), np.int32(len(ins)), np.int64(total))
    name = "pointwise_i64" if whole else "pointwise_f32"
    return [Launch(name, spread(-(-total // _EACH), site), 256, (*addresses, *table, out.address, *counts))]


register("elementwise", elementwise_launches, KERNELS / "pointwise.cu", strided=True)
