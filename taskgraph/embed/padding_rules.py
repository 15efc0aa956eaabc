"""What operators do with rows: a rule each, which says where the rows of the result are if they stay apart.

A rule is given the arguments by name, the rows of the tensors among them, and the layout of a result. It answers the
rows that the result must have, or None where it may mix rows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from taskgraph.embed.calls import Strided
from taskgraph.embed.flow import Flow, Use


class Unpadded(Exception):  # noqa: N818 - an answer, which the caller expects
    """Padding may change results; the message says where."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The axis of a tensor that has the size, and how many of its entries belong to one row."""

    axis: int
    unit: int


Given = Mapping[tuple[int, int], Rows | None]
"""The rows of the tensors that a call is given, by leaf and version."""
Rule = Callable[[Flow, Mapping[str, Any], Given, Strided], Rows | None]


def _rows(given: Given, use: Any) -> Rows | None:
    return given[use.leaf, use.version] if isinstance(use, Use) else None


def _rank(flow: Flow, use: Use) -> int:
    return len(flow.layout(use).size)


def _only(found: list[Rows | None]) -> Rows | None:
    """What all say that say something; None if they say different things."""
    told = {one for one in found if one is not None}
    return told.pop() if len(told) == 1 else None


def pointwise(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """Element by element; operands are aligned at their last axes."""
    found = [
        Rows(rows.axis - _rank(flow, use) + len(out.size), rows.unit)
        for use in args.values()
        if (rows := _rows(given, use)) is not None
    ]
    return _only([*found])


def _along(flow: Flow, args: Mapping[str, Any], given: Given, key: str, axes: set[int], keep: bool) -> Rows | None:
    """An operator over `axes` of the argument `key`, which vanish unless they are kept; no other has rows."""
    rows = _rows(given, args[key])
    if rows is None or rows.axis in axes or sum(r is not None for r in given.values()) > 1:
        return None
    return rows if keep else Rows(rows.axis - sum(axis < rows.axis for axis in axes), rows.unit)


def _axes(flow: Flow, args: Mapping[str, Any], key: str) -> set[int]:
    rank, dim = _rank(flow, args[key]), args.get("dim")
    if dim is None or dim == []:
        return set(range(rank))
    return {axis % rank for axis in ([dim] if isinstance(dim, int) else dim)}


def normal(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """Softmax, a cumulative sum: along an axis, which stays."""
    return _along(flow, args, given, "self", _axes(flow, args, "self"), True)


def reduction(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """Sums, means and extremes of axes."""
    return _along(flow, args, given, "self", _axes(flow, args, "self"), bool(args.get("keepdim")))


def top(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """The largest along an axis, the last unless it says another."""
    return _along(flow, args, given, "self", {args.get("dim", -1) % _rank(flow, args["self"])}, True)


def last_norm(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """A norm over the last axes."""
    rank = _rank(flow, args["input"])
    return _along(flow, args, given, "input", set(range(rank - len(args["normalized_shape"]), rank)), True)


def product(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """A matrix product: the axis that is summed over has no rows."""
    first, second = ("self", "other") if "other" in args else ("self", "mat2")
    if "mat1" in args or "batch1" in args:
        first, second = ("mat1", "mat2") if "mat1" in args else ("batch1", "batch2")
    a, b = args[first], args[second]
    if min(_rank(flow, a), _rank(flow, b)) < 2:
        return None
    found: list[Rows | None] = []
    for use, summed in ((a, 1), (b, 2)):
        rows = _rows(given, use)
        if rows is not None:
            behind = _rank(flow, use) - rows.axis
            if behind == summed:
                return None
            found.append(Rows(len(out.size) - behind, rows.unit))
    if first != "self" and (rows := _rows(given, args["self"])) is not None:
        found.append(Rows(rows.axis - _rank(flow, args["self"]) + len(out.size), rows.unit))
    return _only(found)


def linear(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """x W^T + bias."""
    return _along(flow, args, given, "input", {_rank(flow, args["input"]) - 1}, True)


def look_up(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """Rows of a table by indices."""
    return _along(flow, args, given, "indices", set(), True)


def index(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """A table at one tensor of indices, along its first axis."""
    (where, *more) = args["indices"]
    if more or _rows(given, args["self"]) is not None or not isinstance(where, Use):
        return None
    return _rows(given, where)


def join(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """torch.cat along an axis that has no rows."""
    rows = _only([_rows(given, use) for use in args["tensors"]])
    axis = args.get("dim", 0) % len(out.size)
    return None if rows is None or rows.axis == axis else rows


def stack(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """torch.stack."""
    rows = _only([_rows(given, use) for use in args["tensors"]])
    axis = args.get("dim", 0) % len(out.size)
    return None if rows is None else Rows(rows.axis + (axis <= rows.axis), rows.unit)


def attention(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """Sequences apart from each other, queries apart from each other, and all tokens of causal attention, where none
    sees what comes after it."""
    q, k, v, mask = (args.get(name) for name in ("query", "key", "value", "attn_mask"))
    if q is None or not all(isinstance(use, Use) and _rank(flow, use) == 4 for use in (q, k, v)):
        return None
    rows = [_rows(given, use) for use in (q, k, v)]
    seen = _rows(given, mask)
    if isinstance(mask, Use) and seen is not None:
        seen = Rows(seen.axis + 4 - _rank(flow, mask), seen.unit)
    if rows == [Rows(0, 1)] * 3:
        return Rows(0, 1) if seen in (None, Rows(0, 1)) else None
    if rows == [Rows(2, 1), None, None] and not args.get("is_causal"):
        return Rows(2, 1) if seen in (None, Rows(2, 1)) else None
    if rows == [Rows(2, 1)] * 3 and args.get("is_causal") and mask is None:
        return Rows(2, 1)
    return None


def samples(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """A convolution, pooling or norm of images: samples apart from each other."""
    if args.get("training"):
        return None
    key = "input" if "input" in args else "self"
    rank = _rank(flow, args[key])
    return _along(flow, args, given, key, set(range(1, rank)), True) if len(out.size) == rank else None


def copy(flow: Flow, args: Mapping[str, Any], given: Given, out: Strided) -> Rows | None:
    """All elements in order, in another shape."""
    (use,) = (u for u in args.values() if isinstance(u, Use))
    rows, size = _rows(given, use), flow.layout(use).size
    if rows is None:
        return None
    ahead, inner = math.prod(size[: rows.axis]), rows.unit * math.prod(size[rows.axis + 1 :])
    for axis in range(len(out.size)):
        unit, rest = divmod(inner, math.prod(out.size[axis + 1 :]) or 1)
        if math.prod(out.size[:axis]) == ahead and not rest and out.size[axis] > 1 and unit:
            return Rows(axis, unit)
    return None


_POINTWISE: Final = (
    "add", "sub", "mul", "div", "rsub", "pow", "maximum", "minimum", "where", "masked_fill", "lerp", "addcmul",
    "addcdiv", "neg", "abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan",
    "tanh", "sigmoid", "erf", "relu", "relu6", "gelu", "silu", "mish", "elu", "leaky_relu", "hardtanh", "hardswish",
    "hardsigmoid", "softplus", "log_sigmoid", "floor", "ceil", "round", "trunc", "sign", "reciprocal", "square",
    "clamp", "clamp_min", "clamp_max", "remainder", "fmod", "floor_divide", "isnan", "isinf", "isfinite", "eq", "ne",
    "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and", "bitwise_or",
    "bitwise_not", "bitwise_xor", "__and__", "__or__", "to", "_to_copy", "clone", "contiguous", "zeros_like",
    "ones_like", "full_like", "empty_like", "threshold", "atan2", "type_as",
)  # fmt: skip
RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod"), normal),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax", "argmin", "any", "all", "prod", "logsumexp"), reduction),
    "topk": top, "sort": top, "argsort": top,
    **dict.fromkeys(("layer_norm", "rms_norm"), last_norm),
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), product),
    "linear": linear, "embedding": look_up, "index": index, "cat": join, "stack": stack,
    "scaled_dot_product_attention": attention, "attention": attention,
    **dict.fromkeys((
        "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "batch_norm",
        "_batch_norm_no_training", "group_norm", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    ), samples),
    **dict.fromkeys(("reshape", "flatten", "_unsafe_view", "view_copy"), copy),
}  # fmt: skip
"""By the name of an operator of aten's, or of ours."""
SHAPE_ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
    ("reshape", "_unsafe_view", "view_copy"), ("shape", "size")
)
"""Arguments that say the result's shape, which may be another for another size."""
CREATORS: Final[Mapping[str, tuple[str, ...]]] = {
    "arange": ("end",),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), ("size",)),
}
"""Operators that make rows of none, and which argument says how many: row i of what they make is always the same."""
