"""Patterns of single calls over whole axes: softmax, batched products, reductions, joins, picks and copies."""

import math
from functools import partial
from typing import Any, Final

import torch

import taskgraph as tg
from taskgraph.embed.flow import Use
from taskgraph.embed.lower import Match, NoFit, Operand, Site, named, shaped
from taskgraph.embed.match import Matcher

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def softmax(m: Matcher, i: int) -> Match | None:
    """torch's softmax and its logarithm, of one dtype: `softmax`."""
    if not m.is_op(i, "softmax", "_softmax", "log_softmax", "_log_softmax"):
        return None
    x = m.arg(i, "self")
    if not _alike(m, x, m.out(i)) or not m.layout(x).size:
        return None
    size, name = m.layout(x).size, m.call(i).target._opname
    axis, shape = _lined(size, m.arg(i, "dim"))
    if len(shape) > 2:
        m.want(x, shape)
        m.want(m.out(i), shape)

    def emit(site: Site) -> str:
        lies = site.value(x).shape
        last = len(shape) == 2 and lies[-1:] == shape[-1:]  # in whatever shape the rows lie
        make = partial(tg.ops.softmax, axis=-1 if last else axis, log="log" in name)
        return shaped(site, "softmax", [(x, lies if last else shape)], m.out(i).leaf, make)

    return m.match([], i, "softmax", emit)


def product(m: Matcher, i: int) -> Match | None:
    """A product of two tensors that change, the second as it lies or transposed: `matmul`."""
    if not m.is_op(i, "matmul", "bmm", "mm"):
        return None
    a, b = m.arg(i, "self"), m.arg(i, "mat2" if m.is_op(i, "bmm", "mm") else "other")
    if min(len(m.layout(a).size), len(m.layout(b).size)) < 2 or not _alike(m, a, m.out(i)):
        return None
    turned = _before_transpose(m, b)
    right = b if turned is None else turned
    if not _alike(m, a, right):
        return None
    make = partial(tg.ops.matmul, transpose_b=turned is not None)
    operands = [(a, m.layout(a).size), (right, m.layout(right).size)]
    return _single(m, i, "matmul", operands, m.layout(m.out(i)).size, make)


def _before_transpose(m: Matcher, use: Use) -> Use | None:
    """What the tensor is with its last two axes exchanged, where that lies row by row; None if it lies so itself."""
    leaf = m.flow.leaves[use.leaf]
    if leaf.layout.plain or leaf.view is None:
        return None
    base = Use(leaf.view.base, use.version)
    size, stride = leaf.layout.size, leaf.layout.stride
    layout = m.layout(base)
    turned = (*size[:-2], size[-1], size[-2]), (*stride[:-2], stride[-1], stride[-2])
    same = (layout.size, layout.stride) == turned and m.flow.leaves[base.leaf].offset == leaf.offset
    return base if same and layout.plain else None


def reduction(m: Matcher, i: int) -> Match | None:
    """Sums, means and extremes along neighbouring axes, of one dtype: `reduce`."""
    names = {"sum": "sum", "mean": "mean", "amax": "max", "amin": "min"}
    if not m.is_op(i, *names):
        return None
    x = m.arg(i, "self")
    size = m.layout(x).size
    given = m.arg(i, "dim")
    axes = sorted({axis % len(size) for axis in ([given] if isinstance(given, int) else given or range(len(size)))})
    if not size or not _alike(m, x, m.out(i)) or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    outer, count, inner = _parts(size, axes[0], axes[-1] + 1)
    shape = (outer, count) if inner == 1 else (outer, count, inner)
    keep = inner == 1 and bool(m.arg(i, "keepdim"))
    made = (outer, 1) if keep else (outer,) if inner == 1 else (outer, inner)
    make = partial(tg.ops.reduce, names[m.call(i).target._opname], axes=1, keep_axes=keep)
    return _single(m, i, "reduce", [(x, shape)], made, make)


def join(m: Matcher, i: int) -> Match | None:
    """torch.cat and torch.stack: `concat`, of all that lies row by row as two axes."""
    if not m.is_op(i, "cat", "stack"):
        return None
    parts: list[Use] = m.arg(i, "tensors")
    size = m.layout(m.out(i)).size
    axis = m.arg(i, "dim") % len(size)
    shapes = [m.layout(u).size for u in parts]
    if m.is_op(i, "stack"):
        shapes = [(*shape[:axis], 1, *shape[axis:]) for shape in shapes]
    alike = all(len(shape) == len(size) and math.prod(shape) for shape in shapes)
    if not alike or len({m.layout(u).dtype for u in (*parts, m.out(i))}) > 1 or not m.layout(m.out(i)).plain:
        return None
    outer, last, made = math.prod(size[:axis]), size[-1], size
    if all(m.layout(u).plain for u in parts) and len(size) > 1:
        shapes = [(n // last, last) if axis == 0 else (outer, n // outer) for n in map(math.prod, shapes)]
        made = (math.prod(size) // last, last) if axis == 0 else (outer, math.prod(size) // outer)
        axis = min(axis, 1)

    def make(*values: tg.Value, name: str) -> tg.Value:
        return tg.ops.concat(values, axis, name=name)

    return _single(m, i, "concat", [*zip(parts, shapes, strict=True)], made, make)


def pick(m: Matcher, i: int) -> Match | None:
    """Entries along an axis by an index: `index_select`, and `take_along` for torch.gather."""
    if not m.is_op(i, "index_select", "gather"):
        return None
    x, index, axis = m.arg(i, "self"), m.arg(i, "index"), m.arg(i, "dim")
    size, places = m.layout(x).size, m.layout(index).size
    if not size or not _plain(m, x, m.out(i)) or not m.layout(index).plain:
        return None
    axis %= len(size)
    if m.is_op(i, "index_select"):
        if len(places) != 1:
            return None
        make: Any = partial(tg.ops.index_select, axis=axis)
    else:
        if len(places) != len(size) or any(
            n != k for j, (n, k) in enumerate(zip(size, places, strict=True)) if j != axis
        ):
            return None
        make = partial(tg.ops.take_along, axis=axis)
    made = m.layout(m.out(i)).size
    return _single(m, i, m.call(i).target._opname, [(x, size), (index, places)], made, make)


def look_up(m: Matcher, i: int) -> Match | None:
    """Rows at one index that is known, and has nothing below 0: `index_select`."""
    if not m.is_op(i, "index"):
        return None
    x, given = m.arg(i, "self"), m.arg(i, "indices")
    if len(given) != 1 or not isinstance(given[0], Use) or not _plain(m, x, m.out(i)) or not m.layout(x).size:
        return None
    index: Use = given[0]
    value = m.flow.storage(index).value if m.flow.is_whole(index) else None
    whole = value is not None and value.dtype in (torch.int64, torch.int32) and value.device.type == "cpu"
    if value is None or not whole or not m.layout(index).plain or int(value.min()) < 0:
        return None
    rows, *rest = m.layout(x).size
    width, count = math.prod(rest), value.numel()
    shape, made = ((rows, width), (count, width)) if rest else ((rows,), (count,))
    return _single(m, i, "look_up", [(x, shape), (index, (count,))], made, tg.ops.index_select)


def repetition(m: Matcher, i: int) -> Match | None:
    """Every entry along an axis several times in a row: `expand`."""
    if not m.is_op(i, "repeat_interleave") or not isinstance(m.arg(i, "repeats"), int):
        return None
    x, axis, times = m.arg(i, "self"), m.arg(i, "dim"), m.arg(i, "repeats")
    size = m.layout(x).size
    if axis is None or not size or not _plain(m, x, m.out(i)):
        return None
    outer, _, inner = _parts(size, axis % len(size) + 1, axis % len(size) + 1)
    made = (outer, times, inner)
    return _single(m, i, "repetition", [(x, (outer, 1, inner))], made, partial(tg.ops.expand, shape=made))


def transposing_copy(m: Matcher, i: int) -> Match | None:
    """A copy, row by row, of all of a tensor with its axes in another order: `permute`."""
    if not m.is_op(i, "clone", "contiguous", "reshape", "_unsafe_view"):
        return None
    x = m.arg(i, "self")
    leaf, out = m.flow.leaves[x.leaf], m.layout(m.out(i))
    root = m.flow.leaves[m.flow.storage(x).whole].layout
    if leaf.layout.plain or not out.plain or leaf.offset or not leaf.layout.dense or not root.plain:
        return None
    if leaf.layout.elements != root.elements or leaf.layout.dtype != out.dtype:
        return None
    shape, axes = _turned(leaf.layout.size, leaf.layout.stride)
    m.flow.wanted.setdefault(m.storage(x), shape)

    def emit(site: Site) -> str:
        value = site.value(x)
        if value.shape != shape:
            raise NoFit
        leaf = m.out(i).leaf
        wanted = out.spec(site.wanted(leaf))[0]
        return named(site, leaf, lambda name: tg.ops.permute(value, axes, wanted, name=name), m.call(i).name)

    return m.match([], i, "permute", emit)


def _turned(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
    """The shape as it lies in memory of a dense tensor of these strides, and for each of its axes, in order, where
    it is there; axes that follow each other in both are one."""
    kept = [axis for axis, n in enumerate(size) if n > 1]
    order = sorted(kept, key=lambda axis: stride[axis], reverse=True)
    place = [order.index(axis) for axis in kept]
    groups: list[list[int]] = []
    for at in place:
        if groups and groups[-1][-1] + 1 == at:
            groups[-1].append(at)
        else:
            groups.append([at])
    lying = sorted(groups)
    shape = tuple(math.prod(size[order[at]] for at in group) for group in lying)
    return shape, [lying.index(group) for group in groups]


# ------------------------------------------------------------------------------------------- shared


def _single(m: Matcher, i: int, stem: str, operands: list[Operand], made: tuple[int, ...], make: Any) -> Match | None:
    """The match of one call whose operands have these shapes, and whose result has the shape `made`."""
    for use, shape in operands:
        m.want(use, shape)
    m.want(m.out(i), made)

    def emit(site: Site) -> str:
        return shaped(site, stem, operands, m.out(i).leaf, make)

    return m.match([], i, stem, emit)


def _plain(m: Matcher, *uses: Use) -> bool:
    """Whether all lie row by row and have one dtype."""
    layouts = [m.layout(u) for u in uses]
    return all(one.plain for one in layouts) and len({one.dtype for one in layouts}) == 1


def _alike(m: Matcher, *uses: Any) -> bool:
    """Whether all are tensors of one float dtype that lie row by row."""
    return all(isinstance(u, Use) for u in uses) and _plain(m, *uses) and m.layout(uses[0]).dtype in _FLOATS


def _without(size: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return size[:axis] + size[axis + 1 :]


def _parts(size: tuple[int, ...], first: int, end: int) -> tuple[int, int, int]:
    """Elements ahead of the axes from `first` to `end`, along them, and behind."""
    return math.prod(size[:first]), math.prod(size[first:end]), math.prod(size[end:])


def _lined(size: tuple[int, ...], axis: int) -> tuple[int, tuple[int, ...]]:
    """The axis and the shape, with the axes ahead of it as one, and those behind."""
    place = axis % len(size)
    outer, count, inner = _parts(size, place, place + 1)
    return 1, (outer, count) if inner == 1 else (outer, count, inner)
