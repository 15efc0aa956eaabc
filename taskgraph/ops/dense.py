"""The ops of a dense transformer that work row by row: products, norms, activations, embeddings, samples."""

import math
from collections.abc import Sequence

from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Demand, Work
from taskgraph.ops.formula import number
from taskgraph.ops.kinds import Axes, Kind, Output, apply, index_of, is_value, register, row_work
from taskgraph.ops.pointwise import Operand, broadcast
from taskgraph.ops.signatures import (
    FLAG,
    OUT_DTYPE,
    SMALL,
    Attrs,
    Shapes,
    Signature,
    made_dtype,
    moved,
    need,
    need_floats,
)

# -------------------------------------------------------------------------------------- embedding


def embedding(tokens: Value, table: Value, *, out_dtype: str | None = None, name: str | None = None) -> Value:
    """Rows of `table` (vocabulary, hidden) at `tokens` (n,) -> (n, hidden)."""
    return apply("embedding", [tokens, table], {"out_dtype": out_dtype} if out_dtype is not None else None, name=name)


def embedding_shape(ins: Shapes, attrs: Attrs) -> Output:
    tokens, table = ins
    integers = tokens.dtype in ("i32", "i64") and len(tokens.shape) == 1
    need(integers, "embedding", ins, "tokens must be a vector of ints")
    need(len(table.shape) == 2, "embedding", ins, "the table must be (vocabulary, hidden)")
    need_floats("embedding", ins, table)
    return (tokens.shape[0], table.shape[1]), made_dtype("embedding", ins, attrs, table.dtype)


def embedding_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    gathered = math.prod(outs[0].shape) * ITEMSIZE[ins[1].dtype]
    return Work(hbm_bytes=moved(ins[:1]) + gathered + moved(outs))


register(
    Kind(
        "embedding", Signature("12", may=OUT_DTYPE), embedding_shape, embedding_work, split=(0, None),
        index_ranges={0: index_of(1)},
    )
)  # fmt: skip


# ------------------------------------------------------------------------------------------- gemm


def gemm(
    x: Value,
    w: Value,
    bias: Value | None = None,
    residual: Value | None = None,
    *,
    transpose_w: bool = False,
    out_dtype: str | None = None,
    name: str | None = None,
    demand: Demand | None = None,
) -> Value:
    """x (m, k) times w (k, n), or (n, k) with `transpose_w`; plus bias (n,) and residual (m, n)."""
    inputs = [x, w, *(v for v in (bias, residual) if v is not None)]
    attrs = Attrs(transpose_w=transpose_w, bias=bias is not None, residual=residual is not None)
    if out_dtype is not None:
        attrs["out_dtype"] = out_dtype
    return apply("gemm", inputs, attrs, name=name, demand=demand)


def gemm_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, w, *extra = ins
    flags = {key: attrs.flag(key) for key in ("bias", "residual")}
    need(len(extra) == sum(flags.values()), "gemm", ins, "its flags bias and residual are not as its inputs")
    k, n = reversed(w.shape) if attrs.flag("transpose_w") else w.shape
    need(x.shape[1] == k, "gemm", ins, f"x has {x.shape[1]} columns but w takes {k}")
    shapes = {"bias": (n,), "residual": (x.shape[0], n)}
    made = made_dtype("gemm", ins, attrs, x.dtype)
    for t, key in zip(extra, (key for key, given in flags.items() if given), strict=True):
        need(t.shape == shapes[key], "gemm", ins, f"the {key} must be {shapes[key]}")
        need(t.dtype in (x.dtype, made), "gemm", ins, f"the {key} must be {x.dtype}, like x")
    need_floats("gemm", ins, x)
    need(x.dtype == w.dtype or (x.dtype, w.dtype) == ("f32", "bf16"), "gemm", ins, "dtypes of x and w differ")
    return (x.shape[0], n), made


def gemm_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    (m, k), n = ins[0].shape, outs[0].shape[1]
    return Work(flops=2.0 * m * n * k, hbm_bytes=moved(ins) + moved(outs))


def gemm_split(ins: Shapes, attrs: Attrs) -> Axes:
    """A bias is a row for all, a residual a matrix."""
    return 0, None, *(0 if len(t.shape) == 2 else None for t in ins[2:])


GEMM_FLAGS = {"transpose_w": FLAG, "bias": FLAG, "residual": FLAG}
register(Kind("gemm", Signature("22++", GEMM_FLAGS, OUT_DTYPE, spare=2), gemm_shape, gemm_work, gemm_split))


# ----------------------------------------------------------------------------------- element-wise


def rmsnorm(x: Value, weight: Value, *, eps: float = 1e-5, name: str | None = None) -> Value:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""
    return apply("rmsnorm", [x, weight], {"eps": eps}, name=name)


def rmsnorm_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, weight = ins
    need_floats("rmsnorm", ins, x, weight)
    need(weight.shape == (x.shape[-1],), "rmsnorm", ins, "the weight must have one entry a column")
    return x.shape, x.dtype


register(Kind("rmsnorm", Signature("+1", {"eps": SMALL}), rmsnorm_shape, row_work(4.0), split=(0, None)))


def swiglu(gate_up: Value, *, name: str | None = None) -> Value:
    """silu(gate) * up of gate_up (m, 2f), gate first (Shazeer 2020)."""
    return apply("swiglu", [gate_up], name=name)


def swiglu_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    need_floats("swiglu", ins, x)
    need(len(x.shape) == 2 and x.shape[1] % 2 == 0, "swiglu", ins, "x must be (tokens, 2 * features): gate, then up")
    return (x.shape[0], x.shape[1] // 2), x.dtype


register(Kind("swiglu", Signature("2"), swiglu_shape, row_work(4.0), split=(0,)))


def add(a: Operand, b: Operand, *, name: str | None = None, after: Sequence[str] = ()) -> Value:
    """a + b. Shapes of one dtype broadcast, and one operand may be a number: that is an `elementwise`."""
    values = [v for v in (a, b) if isinstance(v, Value)]
    alike = len(values) == 2 and values[0].dtype == values[1].dtype
    if alike and values[0].shape != values[1].shape and broadcast([v.shape for v in values]) is not None:
        return apply("elementwise", values, {"formula": "add x0 x1"}, name=name, after=after)
    if len(values) == 1:
        words = ("x0" if isinstance(v, Value) else repr(number("an operand of add", v)) for v in (a, b))
        return apply("elementwise", values, {"formula": " ".join(("add", *words))}, name=name, after=after)
    return apply("add", values if len(values) == 2 else [is_value("add", "a", a)], name=name, after=after)


def add_shape(ins: Shapes, attrs: Attrs) -> Output:
    a, b = ins
    need((a.shape, a.dtype) == (b.shape, b.dtype), "add", ins, "shapes and dtypes must be equal")
    need(a.dtype != "bool", "add", ins, "it adds numbers")
    return a.shape, a.dtype


register(Kind("add", Signature("**"), add_shape, row_work(1.0), split=(0, 0)))


def argmax(x: Value, *, name: str | None = None) -> Value:
    """Index of the largest entry of every row of x (m, n) -> i64 (m,): greedy sampling.

    Of equal entries the first wins, and a NaN is larger than any number, so of several the first: torch's rule.
    """
    return apply("argmax", [x], name=name)


def argmax_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    need_floats("argmax", ins, x)
    need(len(x.shape) == 2, "argmax", ins, "x must be (rows, classes)")
    return (x.shape[0],), "i64"


register(Kind("argmax", Signature("2"), argmax_shape, row_work(1.0), split=(0,)))
