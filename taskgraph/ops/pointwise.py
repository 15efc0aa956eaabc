"""Pointwise ops: arithmetic and activations of single elements, as one kind whose attribute is a formula.

A chain of pointwise ops is one op with a longer formula (`rewrite.fuse_pointwise`): its operands move once.
"""

import math
from collections.abc import Sequence

from taskgraph.graph.graph import Value
from taskgraph.graph.op import Work
from taskgraph.ops.formula import Formula, formula, number
from taskgraph.ops.kinds import Axes, Kind, Output, apply, register
from taskgraph.ops.signatures import DTYPE, FLOATS, WORD, Attrs, Shapes, Signature, moved, need

Operand = Value | float
"""What a pointwise function takes: a value or a number, at least one of them a value."""


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape that all `shapes` are stretched to, by the rule of NumPy and torch: aligned at the last axis, an axis
    of 1 is repeated. None if they do not fit."""
    rank = max(map(len, shapes))
    made = []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        size = max(sizes)
        if any(n not in (1, size) for n in sizes):
            return None
        made.append(size)
    return tuple(made)


# --------------------------------------------------------------------------------------- elementwise


def elementwise(
    formula: str, inputs: Sequence[Value], *, out_dtype: str | None = None, name: str | None = None
) -> Value:
    """The formula of every element of `inputs`, whose shapes broadcast as in NumPy: `elementwise("mul x0 x1; relu s0",
    [x, y])`. See `taskgraph.ops.formula` for what a formula may be; up to 8 inputs and 64 steps.

    Computed in f32 (f64 where an input is f64; integers where all are integers and the formula needs no fractions) and
    rounded once, at the end. The dtype is `out_dtype`, else bool for a truth, else that of the inputs: the widest
    float, and f32 for bf16 with f16; without floats the widest integer, or f32 where the formula needs fractions.
    """
    attrs = Attrs(formula=formula)
    if out_dtype is not None:
        attrs["out_dtype"] = out_dtype
    return apply("elementwise", inputs, attrs, name=name)


def formula_of(attrs: Attrs) -> Formula:
    """The formula of an op."""
    return formula(str(attrs.get("formula")))


def computes_in(ins: Shapes, made: Formula) -> str:
    """The dtype that the formula is computed in: f32, f64 or i64."""
    found = {t.dtype for t in ins}
    if found & set(FLOATS) or not made.whole:
        return "f64" if "f64" in found else "f32"
    return "i64"


def promoted(ins: Shapes, made: Formula) -> str:
    """The dtype of the output unless the op says another."""
    if made.truth([t.dtype == "bool" for t in ins]):
        return "bool"
    found = [t.dtype for t in ins]
    floats = sorted({kind for kind in found if kind in FLOATS})
    if floats:
        return "f64" if "f64" in floats else floats[0] if len(floats) == 1 else "f32"
    if not made.whole:
        return "f32"
    if {"u8", "i8"} <= set(found):
        return "i32"
    return next((kind for kind in ("i64", "i32", "i8", "u8") if kind in found), "i64")


def elementwise_shape(ins: Shapes, attrs: Attrs) -> Output:
    made, shape = formula_of(attrs), broadcast([t.shape for t in ins])
    need(made.inputs == len(ins), "elementwise", ins, f"the formula {made.text!r} takes {made.inputs} inputs")
    need(all(t.dtype != "f8" for t in ins), "elementwise", ins, "there is no arithmetic of f8; convert it first")
    if shape is None:
        need(False, "elementwise", ins, "the shapes do not broadcast")
        raise AssertionError
    return shape, str(attrs.get("out_dtype", promoted(ins, made)))


def elementwise_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """The flops of the formula an element; each operand moved once, however often it is repeated."""
    return Work(flops=formula_of(attrs).flops * math.prod(outs[0].shape), hbm_bytes=moved(ins) + moved(outs))


def elementwise_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    """The first axis of the output, where an input has it and does not repeat along it."""
    shape = broadcast([t.shape for t in ins])
    if not shape:
        return None
    return tuple(0 if len(t.shape) == len(shape) and t.shape[0] == shape[0] else None for t in ins)


register(
    Kind(
        "elementwise", Signature("*", {"formula": WORD}, {"out_dtype": DTYPE}, many=True), elementwise_shape,
        elementwise_work, elementwise_split,
    )
)  # fmt: skip


# ---------------------------------------------------------------------------- functions of one formula


def _of(operation: str, *operands: Operand, name: str | None) -> Value:
    """One operation; operands that are numbers become part of the formula."""
    inputs: list[Value] = []
    words: list[str] = []
    for place, operand in enumerate(operands):
        if isinstance(operand, Value):
            if not any(operand is value for value in inputs):
                inputs.append(operand)
            words.append(f"x{next(i for i, value in enumerate(inputs) if value is operand)}")
        else:
            words.append(repr(number(f"operand {place} of {operation}", operand)))
    return apply("elementwise", inputs, {"formula": " ".join((operation, *words))}, name=name)


def sub(a: Operand, b: Operand, *, name: str | None = None) -> Value:
    """a - b; shapes broadcast, and one of them may be a number."""
    return _of("sub", a, b, name=name)


def mul(a: Operand, b: Operand, *, name: str | None = None) -> Value:
    """a * b; shapes broadcast, and one of them may be a number."""
    return _of("mul", a, b, name=name)


def div(a: Operand, b: Operand, *, name: str | None = None) -> Value:
    """a / b, of integers too a float; shapes broadcast, and one of them may be a number."""
    return _of("div", a, b, name=name)


def maximum(a: Operand, b: Operand, *, name: str | None = None) -> Value:
    """The larger of a and b, a NaN if one of them is one; shapes broadcast, and one of them may be a number."""
    return _of("maximum", a, b, name=name)


def minimum(a: Operand, b: Operand, *, name: str | None = None) -> Value:
    """The smaller of a and b, a NaN if one of them is one; shapes broadcast, and one of them may be a number."""
    return _of("minimum", a, b, name=name)


def where(condition: Value, a: Operand, b: Operand, *, name: str | None = None) -> Value:
    """a where `condition` (bool, or not 0) holds, else b; shapes broadcast, a and b may be numbers."""
    return _of("where", condition, a, b, name=name)


def cast(x: Value, dtype: str, *, name: str | None = None) -> Value:
    """x in another dtype; floats are rounded to nearest even, and cut towards 0 for integers."""
    return apply("elementwise", [x], {"formula": "copy x0", "out_dtype": dtype}, name=name)


def relu(x: Value, *, name: str | None = None) -> Value:
    """max(x, 0); a NaN stays one (Nair and Hinton 2010)."""
    return _of("relu", x, name=name)


def gelu(x: Value, *, approximate: str = "none", name: str | None = None) -> Value:
    """x times the normal distribution's share below x, by erf, or with `approximate="tanh"` by the approximation of the
    same paper (Hendrycks and Gimpel 2016)."""
    forms = {"none": "gelu", "tanh": "gelu_tanh"}
    found = forms.get(approximate) if isinstance(approximate, str) else None
    need(found is not None, "gelu", [], f"approximate is 'none' or 'tanh'; got {approximate!r:.40}")
    return _of(str(found), x, name=name)


def silu(x: Value, *, name: str | None = None) -> Value:
    """x / (1 + exp(-x)) (Elfwing et al. 2018)."""
    return _of("silu", x, name=name)


def tanh(x: Value, *, name: str | None = None) -> Value:
    """The hyperbolic tangent of x."""
    return _of("tanh", x, name=name)


def sigmoid(x: Value, *, name: str | None = None) -> Value:
    """1 / (1 + exp(-x))."""
    return _of("sigmoid", x, name=name)


def exp(x: Value, *, name: str | None = None) -> Value:
    """e to the x."""
    return _of("exp", x, name=name)


def log(x: Value, *, name: str | None = None) -> Value:
    """The natural logarithm of x."""
    return _of("log", x, name=name)


def sqrt(x: Value, *, name: str | None = None) -> Value:
    """The square root of x."""
    return _of("sqrt", x, name=name)


def rsqrt(x: Value, *, name: str | None = None) -> Value:
    """1 / sqrt(x)."""
    return _of("rsqrt", x, name=name)


def neg(x: Value, *, name: str | None = None) -> Value:
    """-x."""
    return _of("neg", x, name=name)
