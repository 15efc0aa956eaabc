"""Ops that move elements between axes: other shapes, orders and parts of a tensor, and rows picked by an index."""

import math
from collections.abc import Sequence

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Work
from taskgraph.ops.kinds import Axes, Kind, Output, apply, axis_of, is_value, register
from taskgraph.ops.moves import SLICE_ROWS, concat_rows, rows_work, slice_rows
from taskgraph.ops.signatures import AXES, PLACE, Attrs, Shapes, Signature, moved, need, need_integers
from taskgraph.record import integer, sequence


def place_of(kind: str, x: Value, axis: object) -> int:
    """The axis of `x`, counted from the first; GraphError if it has none such."""
    is_value(kind, "x", x)
    place = integer(f"an axis of {kind}", axis, GraphError)
    axis_of(kind, "x", x, place)
    return place % len(x.shape)


def sizes_of(kind: str, shape: object) -> list[int]:
    """The sizes that a shape asks for, -1 among them; GraphError for what is no shape."""
    return [
        integer(f"a size of {kind}", n, GraphError, -1) for n in sequence(f"the shape of {kind}", shape, GraphError)
    ]


def numbers_of(attrs: Attrs, key: str) -> tuple[int, ...]:
    """The attribute `key`, integers."""
    value = attrs.get(key)
    return value if isinstance(value, tuple) else ()


# ------------------------------------------------------------------------------------------ reshape


def reshape(x: Value, shape: Sequence[int], *, name: str | None = None) -> Value:
    """The elements of x in the same order, copied, in another shape of one axis or more; one size may be -1."""
    return apply("reshape", [x], {"row": tuple(filled("reshape", x, shape)[1:])}, name=name)


def filled(kind: str, x: Value, shape: object) -> list[int]:
    """The sizes of a shape that x can have, with what -1 stands for; GraphError for another."""
    is_value(kind, "x", x)
    wanted = sizes_of(kind, shape)
    sizes, count, known = [*wanted], math.prod(x.shape), math.prod(n for n in wanted if n >= 0)
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = count // known
    if not sizes or math.prod(sizes) != count or min(sizes) < 1:
        raise GraphError(f"{kind} cannot give {x.tensor.name!r} of shape {list(x.shape)} the shape {wanted}.")
    return sizes


def reshape_shape(ins: Shapes, attrs: Attrs) -> Output:
    return regrouped("reshape", ins, numbers_of(attrs, "row")), ins[0].dtype


def regrouped(kind: str, ins: Shapes, row: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the elements of the input as rows of this shape."""
    count, each = math.prod(ins[0].shape), math.prod(row)
    need(each > 0 and count % each == 0, kind, ins, f"its elements are no whole number of rows {list(row)}")
    return (count // each, *row)


register(Kind("reshape", Signature("*", {"row": AXES}), reshape_shape, rows_work, split=(0,)))
"""`row` is the shape of a row of the output, so that slices, which have fewer rows, have the same attribute. Both
tensors are cut alike, for their elements are in one order."""


# ------------------------------------------------------------------------------------------ permute


def permute(x: Value, axes: Sequence[int], shape: Sequence[int] | None = None, *, name: str | None = None) -> Value:
    """x with its axes in another order, copied: axis i of the result is axis axes[i] of x. With `shape` the result is
    that, reshaped (see `reshape`), by the same copy."""
    places = tuple(place_of("permute", x, axis) for axis in sequence("axes of permute", axes, GraphError))
    attrs = Attrs(axes=places)
    if shape is not None:
        attrs["row"] = tuple(filled("permute", x, shape)[1:])
    return apply("permute", [x], attrs, name=name)


def transpose(x: Value, a: int = -2, b: int = -1, *, name: str | None = None) -> Value:
    """x with axes a and b exchanged, copied."""
    one, other = place_of("transpose", x, a), place_of("transpose", x, b)
    order = [*range(len(x.shape))]
    order[one], order[other] = other, one
    return apply("permute", [x], {"axes": tuple(order)}, name=name)


def permute_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,), axes = ins, numbers_of(attrs, "axes")
    need(sorted(axes) == [*range(len(x.shape))], "permute", ins, f"axes {axes} are not all of them, each once")
    if "row" in attrs:
        return regrouped("permute", ins, numbers_of(attrs, "row")), x.dtype
    return tuple(x.shape[axis] for axis in axes), x.dtype


def permute_split(ins: Shapes, attrs: Attrs) -> Axes:
    """The axis that becomes the first."""
    return (numbers_of(attrs, "axes")[0],)


register(Kind("permute", Signature("+", {"axes": AXES}, {"row": AXES}), permute_shape, rows_work, permute_split))


# ------------------------------------------------------------------------------------------- expand


def expand(x: Value, shape: Sequence[int], *, name: str | None = None) -> Value:
    """x repeated, copied, to `shape`, aligned at the last axis: axes of 1 are repeated, -1 keeps a size."""
    is_value("expand", "x", x)
    wanted = [
        integer("a size of expand", n, GraphError, -1) for n in sequence("the shape of expand", shape, GraphError)
    ]
    own = [1] * (len(wanted) - len(x.shape)) + [*x.shape]
    sizes = [n if m == -1 else m for n, m in zip(own, wanted, strict=False)]
    if len(own) != len(wanted) or any(m < 1 or n not in (1, m) for n, m in zip(own, sizes, strict=True)):
        raise GraphError(f"expand cannot give {x.tensor.name!r} of shape {list(x.shape)} the shape {list(wanted)}.")
    return apply("expand", [x], {"repeats": tuple(m // n for n, m in zip(own, sizes, strict=True))}, name=name)


def expand_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,), repeats = ins, numbers_of(attrs, "repeats")
    need(len(repeats) >= len(x.shape) and bool(repeats), "expand", ins, "there are repeats for all axes")
    own = (1,) * (len(repeats) - len(x.shape)) + x.shape
    fits = all(times >= 1 and 1 in (n, times) for n, times in zip(own, repeats, strict=True))
    need(fits, "expand", ins, f"repeats {repeats} are of axes of 1")
    return tuple(n * times for n, times in zip(own, repeats, strict=True)), x.dtype


def expand_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    repeats = numbers_of(attrs, "repeats")
    return (0,) if len(repeats) == len(ins[0].shape) and repeats[0] == 1 else None


def expand_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(hbm_bytes=moved(ins) + moved(outs))


register(Kind("expand", Signature("*", {"repeats": AXES}), expand_shape, expand_work, expand_split))


# ------------------------------------------------------------------------------------- concat, slice


def concat(parts: Sequence[Value], axis: int = 0, *, name: str | None = None) -> Value:
    """All `parts`, one after another along `axis`, copied into one tensor; along the first, `concat_rows`."""
    given = sequence("the parts of concat", parts, GraphError)
    if not given:
        raise GraphError("concat needs at least one part.")
    place = place_of("concat", given[0], axis)
    return apply("concat", given, {"axis": place}, name=name) if place else concat_rows(given, name=name)


def concat_shape(ins: Shapes, attrs: Attrs) -> Output:
    axis, first = attrs.integer("axis"), ins[0]
    need(all(len(t.shape) == len(first.shape) > axis for t in ins), "concat", ins, f"all must have axis {axis}")
    rest = {(*t.shape[:axis], *t.shape[axis + 1 :], t.dtype) for t in ins}
    need(len(rest) == 1, "concat", ins, f"all must have one dtype, and equal sizes but along axis {axis}")
    return (*first.shape[:axis], sum(t.shape[axis] for t in ins), *first.shape[axis + 1 :]), first.dtype


def concat_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    return (0,) * len(ins) if attrs.integer("axis") > 0 else None


register(Kind("concat", Signature("+", {"axis": PLACE}, many=True), concat_shape, rows_work, concat_split))


def slice_axis(x: Value, axis: int, start: int, stop: int, step: int = 1, *, name: str | None = None) -> Value:
    """x[start:stop:step] along `axis`, copied; along the first, `slice_rows`."""
    place = place_of("slice_axis", x, axis)
    if place == 0:
        return slice_rows(x, start, stop, step, name=name)
    return apply("slice_axis", [x], {"axis": place, "start": start, "stop": stop, "step": step}, name=name)


def slice_axis_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    axis, start, stop, step = (attrs.integer(key) for key in ("axis", "start", "stop", "step"))
    need(axis < len(x.shape), "slice_axis", ins, f"there is no axis {axis}")
    need(0 <= start < stop <= x.shape[axis] and step >= 1, "slice_axis", ins, f"{start}:{stop}:{step} do not exist")
    return (*x.shape[:axis], len(range(start, stop, step)), *x.shape[axis + 1 :]), x.dtype


def slice_axis_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    return (0,) if attrs.integer("axis") > 0 else None


register(
    Kind("slice_axis", Signature("+", {"axis": PLACE, **SLICE_ROWS}), slice_axis_shape, rows_work, slice_axis_split)
)


# ------------------------------------------------------------------------------------------- gather


def index_select(x: Value, index: Value, axis: int = 0, *, name: str | None = None) -> Value:
    """The entries of x along `axis` at `index` (n,), i32 or i64, none below 0 -> x's shape with n there."""
    return apply("index_select", [x, index], {"axis": place_of("index_select", x, axis)}, name=name)


def index_select_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, index = ins
    axis = attrs.integer("axis")
    need_integers("index_select", ins, index)
    need(axis < len(x.shape), "index_select", ins, f"there is no axis {axis}")
    return (*x.shape[:axis], index.shape[0], *x.shape[axis + 1 :]), x.dtype


def index_select_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(hbm_bytes=moved(ins[1:]) + 2 * moved(outs))


def index_select_split(ins: Shapes, attrs: Attrs) -> Axes:
    return (0, None) if attrs.integer("axis") > 0 else (None, 0)


def index_range(ins: Shapes, attrs: Attrs) -> tuple[int, int]:
    """The places along the axis."""
    return 0, ins[0].shape[attrs.integer("axis")]


register(
    Kind(
        "index_select", Signature("+1", {"axis": PLACE}), index_select_shape, index_select_work, index_select_split,
        index_ranges={1: index_range},
    )
)  # fmt: skip


def take_along(x: Value, index: Value, axis: int = -1, *, name: str | None = None) -> Value:
    """For every place of `index`, i32 or i64, the entry of x at the same place but at index[place] along `axis`
    (`torch.take_along_dim`). `index` has x's shape but along `axis`, and nothing below 0."""
    return apply("take_along", [x, index], {"axis": place_of("take_along", x, axis)}, name=name)


def take_along_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, index = ins
    axis = attrs.integer("axis")
    need_integers("take_along", ins, index)
    need(axis < len(x.shape) == len(index.shape), "take_along", ins, f"both must have axis {axis}, and as many axes")
    alike = all(n == m for i, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)) if i != axis)
    need(alike, "take_along", ins, f"the index has x's shape but along axis {axis}")
    return index.shape, x.dtype


def take_along_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    x, index = ins
    return Work(hbm_bytes=moved([index]) + math.prod(index.shape) * ITEMSIZE[x.dtype] + moved(outs))


def take_along_split(ins: Shapes, attrs: Attrs) -> Axes:
    return (0, 0) if attrs.integer("axis") > 0 else (None, 0)


register(
    Kind(
        "take_along", Signature("++", {"axis": PLACE}), take_along_shape, take_along_work, take_along_split,
        index_ranges={1: index_range},
    )
)  # fmt: skip
