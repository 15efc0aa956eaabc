"""How ops that move elements between axes run on a GPU: by strided copies in the widest units that fit."""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import ITEMSIZE, Op
from taskgraph.ops.axes import numbers_of
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.gpu.kinds import KERNELS, Buffer, GpuSite, Launch, Launches, dense_strides, register, spread
from taskgraph.runtime.program import MOST_AXES, axes_of

_UNITS = (16, 8, 4, 2, 1)


def _moved(op: Op, source: Buffer, steps: Sequence[int], target: Buffer, into: Sequence[int], site: GpuSite) -> Launch:
    """Element by element of `target`'s shape, which are `steps` apart in the source and `into` in the target; both
    buffers are at their first elements. Units are as wide as shapes and strides allow, and elements where an address
    does not: there are tables for both, since a buffer that is bound again may have another address."""
    item, shape = ITEMSIZE[target.dtype], target.shape
    wide = _unit(item, shape, steps, into)
    tables = {unit: site.constant(_table(op, unit // item, shape, steps, into)) for unit in dict.fromkeys((wide, item))}
    unit = wide if (source.address | target.address) % wide == 0 else item
    total = math.prod(shape) * item // unit
    args = (source.address, target.address, tables[unit], np.int64(total))
    return Launch(f"move_b{unit}", spread(total, site), 256, args)


def _unit(item: int, shape: Sequence[int], steps: Sequence[int], into: Sequence[int]) -> int:
    """Bytes of the widest unit that rows along the last axis consist of."""
    if not shape or not steps[-1] == into[-1] == 1:
        return item
    apart = [item * s for side in (steps, into) for s, n in zip(side[:-1], shape[:-1], strict=True) if n > 1]
    return next(u for u in _UNITS if u == item or (u > item and all(n % u == 0 for n in (item * shape[-1], *apart))))


def _table(op: Op, each: int, shape: Sequence[int], steps: Sequence[int], into: Sequence[int]) -> np.ndarray:
    """The axes of both sides in units of `each` elements, as `axes.cu` reads them."""
    table: list[int] = []
    sizes = [*shape[:-1], shape[-1] // each] if shape else []
    for side in (steps, into):
        apart = [*(s // each for s in side[:-1]), side[-1]] if shape else []
        found = axes_of(tuple(sizes), tuple(sizes), apart)
        if found is None:
            raise BackendUnavailable(f"op {op.name!r}: the {op.kind} kernels take up to {MOST_AXES} axes; reshape it.")
        rest = [0] * (MOST_AXES - len(found[0]))
        table += [len(found[0]), *found[0][::-1], *rest, *found[1][::-1], *rest]
    return np.array(table, np.int64)


def _steps(x: Buffer) -> tuple[int, ...]:
    return x.strides or dense_strides(x.shape)


def _from(x: Buffer, elements: int) -> Buffer:
    """The buffer from that element on."""
    return Buffer(x.address + elements * ITEMSIZE[x.dtype], x.shape, x.dtype)


def reshape_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    flat = Buffer(outs[0].address, (math.prod(outs[0].shape),), outs[0].dtype)
    return [_moved(op, ins[0], (1,), flat, (1,), site)]


def permute_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    axes, steps = numbers_of(Attrs(op.attrs), "axes"), _steps(ins[0])
    turned = Buffer(outs[0].address, tuple(ins[0].shape[axis] for axis in axes), outs[0].dtype)
    return [_moved(op, ins[0], [steps[axis] for axis in axes], turned, dense_strides(turned.shape), site)]


def expand_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, out = ins[0], outs[0]
    lead = len(out.shape) - len(x.shape)
    own = [0] * lead + [s if n > 1 else 0 for s, n in zip(_steps(x), x.shape, strict=True)]
    return [_moved(op, x, own, out, dense_strides(out.shape), site)]


def concat_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """A launch a part: they follow each other on the lane."""
    axis, into = op.integer("axis"), dense_strides(outs[0].shape)
    starts = accumulate((b.shape[axis] for b in ins[:-1]), initial=0)
    return [
        _moved(op, b, _steps(b), Buffer(_from(outs[0], at * into[axis]).address, b.shape, b.dtype), into, site)
        for b, at in zip(ins, starts, strict=True)
    ]


def slice_axis_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    axis, steps = op.integer("axis"), [*_steps(ins[0])]
    part = _from(ins[0], op.integer("start") * steps[axis])
    steps[axis] *= op.integer("step")
    return [_moved(op, part, steps, outs[0], dense_strides(outs[0].shape), site)]


def gather_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    (x, index), out, axis = ins, outs[0], op.integer("axis")
    along, item = op.kind == "take_along", ITEMSIZE[x.dtype]
    inner, unit = math.prod(out.shape[axis + 1 :]), item
    if not along:
        numbers = (inner * item, x.address, out.address)
        unit = next(u for u in _UNITS if (u >= item and all(n % u == 0 for n in numbers)) or u == item)
        inner = inner * item // unit
    total = math.prod(out.shape[: axis + 1]) * inner
    sizes = (np.int64(out.shape[axis]), np.int64(x.shape[axis]), np.int64(inner), np.int32(along), np.int64(total))
    args = (x.address, index.address, out.address, *sizes, site.fault())
    return [Launch(f"gather_b{unit}_{index.dtype}", spread(total, site), 256, args)]


register("reshape", reshape_launches, KERNELS / "axes.cu")
register("permute", permute_launches, KERNELS / "axes.cu", strided=True)
register("expand", expand_launches, KERNELS / "axes.cu", strided=True)
register("concat", concat_launches, KERNELS / "axes.cu", strided=True)
register("slice_axis", slice_axis_launches, KERNELS / "axes.cu", strided=True)
register("index_select", gather_launches, KERNELS / "axes.cu")
register("take_along", gather_launches, KERNELS / "axes.cu")
