"""Ops over whole axes that torch users expect: layer norms, softmax, batched products, sums and means."""

import math
from collections.abc import Sequence

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import Demand, Work
from taskgraph.ops.axes import place_of
from taskgraph.ops.kinds import Axes, Kind, Output, apply, register
from taskgraph.ops.pointwise import broadcast
from taskgraph.ops.signatures import (
    AXES,
    FLAG,
    FLOATS,
    OUT_DTYPE,
    PLACE,
    SMALL,
    WORD,
    Attrs,
    Shapes,
    Signature,
    made_dtype,
    moved,
    need,
    need_floats,
)
from taskgraph.record import one_of, sequence

# ---------------------------------------------------------------------------------------- layer norm


def layer_norm(
    x: Value, weight: Value | None = None, bias: Value | None = None, *, eps: float = 1e-5, name: str | None = None
) -> Value:
    """(x - mean) / sqrt(variance + eps) over the last axis, times weight (n,) plus bias (n,) where they are given
    (Ba et al. 2016)."""
    inputs = [x, *(v for v in (weight, bias) if v is not None)]
    return apply("layer_norm", inputs, Attrs(eps=eps, weight=weight is not None, bias=bias is not None), name=name)


def layer_norm_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, *extra = ins
    given = sum(attrs.flag(key) for key in ("weight", "bias"))
    need(len(extra) == given, "layer_norm", ins, "its flags weight and bias are not as its inputs")
    need_floats("layer_norm", ins, *ins)
    need(all(t.shape == x.shape[-1:] for t in extra), "layer_norm", ins, "weight and bias have one entry a column")
    return x.shape, x.dtype


def layer_norm_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """Two flops for the mean, three for the variance, two for the quotient, one each for weight and bias."""
    return Work(flops=(7.0 + len(ins) - 1) * math.prod(ins[0].shape), hbm_bytes=moved(ins) + moved(outs))


def layer_norm_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    """Rows, unless there is but one."""
    return (0, *(None for _ in ins[1:])) if len(ins[0].shape) > 1 else None


register(
    Kind(
        "layer_norm", Signature("+11", {"eps": SMALL, "weight": FLAG, "bias": FLAG}, spare=2), layer_norm_shape,
        layer_norm_work, layer_norm_split,
    )
)  # fmt: skip


# ------------------------------------------------------------------------------------------- softmax


def softmax(x: Value, axis: int = -1, *, log: bool = False, name: str | None = None) -> Value:
    """exp(x) along `axis`, divided by its sum; with `log` the logarithm of that."""
    return apply("softmax", [x], {"axis": place_of("softmax", x, axis), "log": log}, name=name)


def softmax_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    need_floats("softmax", ins, x)
    need(attrs.integer("axis") < len(x.shape), "softmax", ins, f"there is no axis {attrs['axis']}")
    return x.shape, x.dtype


def softmax_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """The maximum, the difference, e to it, the sum and the quotient."""
    return Work(flops=5.0 * math.prod(ins[0].shape), hbm_bytes=moved(ins) + moved(outs))


def softmax_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    return (0,) if attrs.integer("axis") > 0 else None


register(Kind("softmax", Signature("+", {"axis": PLACE, "log": FLAG}), softmax_shape, softmax_work, softmax_split))


# -------------------------------------------------------------------------------------------- matmul


def matmul(
    a: Value,
    b: Value,
    *,
    transpose_b: bool = False,
    out_dtype: str | None = None,
    name: str | None = None,
    demand: Demand | None = None,
) -> Value:
    """a (..., m, k) times b (..., k, n), or (..., n, k) with `transpose_b` -> (..., m, n), summed in f32.

    The axes ahead of the last two broadcast as in NumPy. A product with a weight that all rows share is `gemm`."""
    attrs = Attrs(transpose_b=transpose_b)
    if out_dtype is not None:
        attrs["out_dtype"] = out_dtype
    return apply("matmul", [a, b], attrs, name=name, demand=demand)


def matmul_shape(ins: Shapes, attrs: Attrs) -> Output:
    a, b = ins
    need(min(len(a.shape), len(b.shape)) >= 2, "matmul", ins, "both have two axes or more")
    need_floats("matmul", ins, a, b)
    k, n = reversed(b.shape[-2:]) if attrs.flag("transpose_b") else b.shape[-2:]
    need(a.shape[-1] == k, "matmul", ins, f"a has {a.shape[-1]} columns but b takes {k}")
    lead = broadcast([a.shape[:-2], b.shape[:-2]])
    if lead is None:
        need(False, "matmul", ins, "the axes ahead of the last two do not broadcast")
        raise AssertionError
    return (*lead, a.shape[-2], n), made_dtype("matmul", ins, attrs, a.dtype)


def matmul_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(flops=2.0 * math.prod(outs[0].shape) * ins[0].shape[-1], hbm_bytes=moved(ins) + moved(outs))


def matmul_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    """Rows of a where the output has no other axes ahead of its columns; else its first axis, where an operand has it
    and does not repeat along it."""
    lead = broadcast([t.shape[:-2] for t in ins])
    if not lead:
        return 0, None
    return tuple(0 if len(t.shape) == len(lead) + 2 and t.shape[0] == lead[0] else None for t in ins)


register(Kind("matmul", Signature("++", {"transpose_b": FLAG}, OUT_DTYPE), matmul_shape, matmul_work, matmul_split))


# ------------------------------------------------------------------------------------------- reduce

REDUCTIONS = ("sum", "mean", "max", "min")


def reduce(
    operation: str, x: Value, axes: int | Sequence[int], *, keep_axes: bool = False, name: str | None = None
) -> Value:
    """The "sum", "mean", "max" or "min" of x along `axes`, summed in f32; `keep_axes` keeps them with length 1.

    Axes below 0 count from the last. A NaN among what is compared is the result."""
    one_of("operation of reduce", operation, REDUCTIONS, GraphError)
    given = [axes] if isinstance(axes, int) else sequence("axes of reduce", axes, GraphError)
    over = tuple(sorted(place_of("reduce", x, axis) for axis in given))
    return apply("reduce", [x], Attrs(operation=operation, axes=over, keep_axes=keep_axes), name=name)


def reduce_sum(x: Value, axes: int | Sequence[int], *, keep_axes: bool = False, name: str | None = None) -> Value:
    """The sum of x along `axes`: see `reduce`."""
    return reduce("sum", x, axes, keep_axes=keep_axes, name=name)


def reduce_mean(x: Value, axes: int | Sequence[int], *, keep_axes: bool = False, name: str | None = None) -> Value:
    """The mean of x along `axes`: see `reduce`."""
    return reduce("mean", x, axes, keep_axes=keep_axes, name=name)


def reduce_max(x: Value, axes: int | Sequence[int], *, keep_axes: bool = False, name: str | None = None) -> Value:
    """The largest of x along `axes`: see `reduce`."""
    return reduce("max", x, axes, keep_axes=keep_axes, name=name)


def reduced_axes(attrs: Attrs) -> tuple[int, ...]:
    """The axes that an op reduces."""
    axes = attrs.get("axes")
    return axes if isinstance(axes, tuple) else ()


def reduce_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    axes, operation = reduced_axes(attrs), attrs["operation"]
    need(operation in REDUCTIONS, "reduce", ins, f"operation is one of {', '.join(REDUCTIONS)}")
    need(len({*axes}) == len(axes) > 0, "reduce", ins, f"axes are {axes}; name one or more, each once")
    need(all(0 <= axis < len(x.shape) for axis in axes), "reduce", ins, f"there are no axes {axes}")
    need(x.dtype in FLOATS, "reduce", ins, "it reduces floats")
    keep = attrs.flag("keep_axes")
    shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
    return tuple(shape), x.dtype


def reduce_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(flops=float(math.prod(ins[0].shape)), hbm_bytes=moved(ins) + moved(outs))


def reduce_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    """The first axis, unless it is reduced."""
    return None if 0 in reduced_axes(attrs) else (0,)


register(
    Kind("reduce", Signature("+", {"operation": WORD, "axes": AXES, "keep_axes": FLAG}), reduce_shape, reduce_work,
         reduce_split)
)  # fmt: skip
