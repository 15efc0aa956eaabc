"""The ops of a dense transformer, and copies and collectives: shape, work and split rules, and public functions."""

import math
from collections.abc import Callable, Sequence

from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Demand, Work
from taskgraph.ops.rules import SPLIT_RULES, apply, axis_of, numbered, shape_rule, work_rule
from taskgraph.ops.rules import moved as _moved
from taskgraph.ops.signatures import SCALING, YARN, Attrs, Shapes, made_dtype, need_floats, need_integers
from taskgraph.ops.signatures import need as _need

SPLIT_RULES |= {
    "embedding": (0, None),
    "gemm": (0, None, 0, 0),
    "rmsnorm": (0, None),
    "rope": (0, 0),
    "rope_kv": (0, 0, 0, 0, None, None),
    "attention": (0, 0, 0, 0),
    "decode_attention": (0, 1),
    "swiglu": (0,),
    "add": (0, 0),
    "argmax": (0,),
    "copy": (0,),
    "slice_rows": (0,),
    "concat_rows": (0,),
    "all_gather": (0,),
    "all_reduce": (0,),
    "reduce_scatter": (0,),
}


# ------------------------------------------------------------------------------------- shape rules


@shape_rule("embedding")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    tokens, table = ins
    _need(
        tokens.dtype in ("i32", "i64") and len(tokens.shape) == 1, "embedding", ins, "tokens must be a vector of ints"
    )
    _need(len(table.shape) == 2, "embedding", ins, "the table must be (vocabulary, hidden)")
    need_floats("embedding", ins, table)
    return [((tokens.shape[0], table.shape[1]), made_dtype("embedding", ins, attrs, table.dtype))]


@shape_rule("gemm")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    x, w, *extra = ins
    _need(len(x.shape) == 2 and len(w.shape) == 2, "gemm", ins, "x and w must be matrices")
    k, n = reversed(w.shape) if attrs["transpose_w"] else w.shape
    _need(x.shape[1] == k, "gemm", ins, f"x has {x.shape[1]} columns but w takes {k}")
    added = [(key, shape) for key, shape in (("bias", (n,)), ("residual", (x.shape[0], n))) if attrs[key]]
    made = made_dtype("gemm", ins, attrs, x.dtype)
    for t, (key, shape) in zip(extra, added, strict=True):
        _need(t.shape == shape, "gemm", ins, f"the {key} must be {shape}")
        _need(t.dtype in (x.dtype, made), "gemm", ins, f"the {key} must be {x.dtype}, like x")
    need_floats("gemm", ins, x)
    _need(x.dtype == w.dtype or (x.dtype, w.dtype) == ("f32", "bf16"), "gemm", ins, "dtypes of x and w differ")
    return [((x.shape[0], n), made)]


@shape_rule("rmsnorm")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    x, weight = ins
    need_floats("rmsnorm", ins, x, weight)
    _need(weight.shape == (x.shape[-1],), "rmsnorm", ins, "the weight must have one entry a column")
    return [(x.shape, x.dtype)]


@shape_rule("rope")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    x, positions = ins
    _need(len(x.shape) == 3 and x.shape[2] % 2 == 0, "rope", ins, "x must be (tokens, heads, even head_dim)")
    need_floats("rope", ins, x)
    need_integers("rope", ins, positions)
    _need(positions.shape == x.shape[:1], "rope", ins, "positions must have one entry a token")
    return [(x.shape, x.dtype)]


@shape_rule("rope_kv")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    qkv, positions, keys, values, *norms = ins
    need_floats("rope_kv", ins, qkv, keys, values, *norms)
    need_integers("rope_kv", ins, positions)
    _need(len(norms) != 1, "rope_kv", ins, "q and k are normalised both or neither")
    heads, head_dim = int(attrs["heads"]), keys.shape[-1]  # type: ignore[arg-type]
    _need(heads >= 1 and head_dim % 2 == 0, "rope_kv", ins, "it takes at least one head, of an even dim")
    _need(len(keys.shape) == 4 and keys.shape == values.shape, "rope_kv", ins, "caches are (batch, kv heads, len, dim)")
    width = (heads + 2 * keys.shape[1]) * head_dim
    _need(qkv.shape[1:] == (width,), "rope_kv", ins, f"qkv must be (tokens, {width})")
    _need(positions.shape == (keys.shape[0],), "rope_kv", ins, "positions hold the first position of every sequence")
    _need(qkv.shape[0] % keys.shape[0] == 0, "rope_kv", ins, "every sequence must have the same number of tokens")
    _need(all(t.shape == (head_dim,) for t in norms), "rope_kv", ins, f"q and k norms must be ({head_dim},)")
    return [((qkv.shape[0], heads, head_dim), qkv.dtype)]


@shape_rule("attention")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    q, positions, keys, values = ins
    _need(len(q.shape) == 3 and len(keys.shape) == 4, "attention", ins, "q is (tokens, heads, dim), caches have 4 axes")
    need_floats("attention", ins, q, keys, values)
    need_integers("attention", ins, positions)
    _need(keys.shape == values.shape and q.shape[2] == keys.shape[3], "attention", ins, "head dims differ")
    _need(int(attrs["context"]) >= 1, "attention", ins, "context must be at least 1")  # type: ignore[arg-type]
    _need(q.shape[1] % keys.shape[1] == 0, "attention", ins, "query heads must be a multiple of kv heads")
    _need(q.shape[0] % keys.shape[0] == 0, "attention", ins, "every sequence must have the same number of tokens")
    _need(positions.shape == (keys.shape[0],), "attention", ins, "positions hold the first position of every sequence")
    return [((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)]


@shape_rule("decode_attention")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    q, kv = ins
    _need(
        len(q.shape) == 3 and len(kv.shape) == 5,
        "decode_attention",
        ins,
        "q has 3 axes, kv (2, batch, len, heads, dim)",
    )
    need_floats("decode_attention", ins, q, kv)
    _need(kv.shape[:2] == (2, q.shape[0]), "decode_attention", ins, "q and kv must have the same batch")
    _need(q.shape[2] == kv.shape[4] and q.shape[1] % kv.shape[3] == 0, "decode_attention", ins, "heads do not fit")
    return [(q.shape, q.dtype)]


@shape_rule("swiglu")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    (x,) = ins
    need_floats("swiglu", ins, x)
    _need(len(x.shape) == 2 and x.shape[1] % 2 == 0, "swiglu", ins, "x must be (tokens, 2 * features): gate, then up")
    return [((x.shape[0], x.shape[1] // 2), x.dtype)]


@shape_rule("add")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    a, b = ins
    _need((a.shape, a.dtype) == (b.shape, b.dtype), "add", ins, "shapes and dtypes must be equal")
    _need(a.dtype != "bool", "add", ins, "it adds numbers")
    return [(a.shape, a.dtype)]


@shape_rule("argmax")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    (x,) = ins
    need_floats("argmax", ins, x)
    _need(len(x.shape) == 2, "argmax", ins, "x must be (rows, classes)")
    return [((x.shape[0],), "i64")]


@shape_rule("copy")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    (x,) = ins
    _need(attrs["direction"] in ("h2d", "d2h", "d2d"), "copy", ins, "direction is h2d, d2h or d2d")
    return [(x.shape, x.dtype)]


@shape_rule("concat_rows")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    kinds = {(t.shape[1:], t.dtype) for t in ins}
    _need(len(kinds) == 1 and len(ins[0].shape) >= 1, "concat_rows", ins, "all must have one dtype and equal rows")
    return [((sum(t.shape[0] for t in ins), *ins[0].shape[1:]), ins[0].dtype)]


def _collective_shape(kind: str, resized: Callable[[int, int], int]) -> None:
    @shape_rule(kind)
    def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
        (x,) = ins
        _need(x.dtype != "bool", kind, ins, "sums and joins are of numbers")
        ranks, axis = int(attrs["ranks"]), int(attrs["axis"])  # type: ignore[arg-type]
        _need(ranks >= 1 and 0 <= axis < len(x.shape), kind, ins, f"no {ranks} ranks on axis {axis}")
        _need(
            kind != "reduce_scatter" or x.shape[axis] % ranks == 0, kind, ins, f"{ranks} ranks cannot share axis {axis}"
        )
        return [((*x.shape[:axis], resized(x.shape[axis], ranks), *x.shape[axis + 1 :]), x.dtype)]


_collective_shape("all_gather", lambda rows, ranks: rows * ranks)
_collective_shape("all_reduce", lambda rows, ranks: rows)
_collective_shape("reduce_scatter", lambda rows, ranks: rows // ranks)


@shape_rule("slice_rows")
def _(ins: Shapes, attrs: Attrs) -> list[tuple[tuple[int, ...], str]]:
    (x,) = ins
    start, stop, step = (int(attrs[key]) for key in ("start", "stop", "step"))  # type: ignore[arg-type]
    _need(0 <= start < stop <= x.shape[0] and step >= 1, "slice_rows", ins, f"rows {start}:{stop}:{step} do not exist")
    return [((len(range(start, stop, step)), *x.shape[1:]), x.dtype)]


# -------------------------------------------------------------------------------------- work rules


def _elementwise(kind: str, flops_an_element: float) -> None:
    @work_rule(kind)
    def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
        return Work(flops=flops_an_element * math.prod(ins[0].shape), hbm_bytes=_moved(ins) + _moved(outs))


_elementwise("rmsnorm", 4.0)
_elementwise("rope", 3.0)
_elementwise("swiglu", 4.0)
_elementwise("add", 1.0)
_elementwise("argmax", 1.0)


@work_rule("gemm")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    (m, k), n = ins[0].shape, outs[0].shape[1]
    return Work(flops=2.0 * m * n * k, hbm_bytes=_moved(ins) + _moved(outs))


@work_rule("embedding")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    gathered = math.prod(outs[0].shape) * ITEMSIZE[ins[1].dtype]
    return Work(hbm_bytes=_moved(ins[:1]) + gathered + _moved(outs))


@work_rule("rope_kv")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(flops=3.0 * math.prod(ins[0].shape), hbm_bytes=2 * _moved(ins[:1]) + _moved(ins[1:2]))


@work_rule("attention")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """Scores and mixing, 4 flops a query, key and channel; each sequence's cached keys and values read once."""
    q, _, keys, _ = ins
    tokens, heads, dim = q.shape
    batch, kv_heads = keys.shape[:2]
    each, context = tokens // batch, int(attrs["context"])  # type: ignore[arg-type]
    seen = each * (context + 1) - each * (each - 1) / 2 - each  # keys that the causal mask leaves, a sequence
    kv_bytes = 2.0 * batch * kv_heads * context * dim * ITEMSIZE[keys.dtype]
    return Work(flops=4.0 * batch * max(seen, each) * heads * dim, hbm_bytes=_moved(ins[:2]) + kv_bytes + _moved(outs))


@work_rule("decode_attention")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    q, kv = ins
    return Work(flops=4.0 * q.shape[0] * kv.shape[2] * q.shape[1] * q.shape[2], hbm_bytes=_moved(ins) + _moved(outs))


@work_rule("copy")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    nbytes = _moved(ins)
    if attrs["direction"] == "d2d":
        return Work(hbm_bytes=2 * nbytes)
    return Work(hbm_bytes=nbytes, **{f"{attrs['direction']}_bytes": nbytes})


@work_rule("slice_rows")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(hbm_bytes=2 * _moved(outs))


@work_rule("concat_rows")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(hbm_bytes=2 * _moved(outs))


def _collective_work(kind: str, passes: int, reduces: bool) -> None:
    """Ring algorithms (Patarasuk and Yuan 2009): in each pass a rank sends (ranks - 1) / ranks of the whole tensor."""

    @work_rule(kind)
    def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
        ranks = int(attrs["ranks"])  # type: ignore[arg-type]
        whole = max(ins[0], outs[0], key=lambda t: t.nbytes)
        sent = (ranks - 1) / ranks
        return Work(
            flops=sent * math.prod(whole.shape) if reduces else 0.0,
            hbm_bytes=_moved(ins) + _moved(outs),
            link_bytes=passes * sent * whole.nbytes,
        )


_collective_work("all_gather", 1, False)
_collective_work("all_reduce", 2, True)
_collective_work("reduce_scatter", 1, True)


# ---------------------------------------------------------------------------------- public functions


def embedding(tokens: Value, table: Value, *, out_dtype: str | None = None, name: str | None = None) -> Value:
    """Rows of `table` (vocabulary, hidden) at `tokens` (n,) -> (n, hidden)."""
    return apply("embedding", [tokens, table], {"out_dtype": out_dtype} if out_dtype is not None else None, name=name)


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
    after: Sequence[str] = (),
) -> Value:
    """x (m, k) times w (k, n), or (n, k) with `transpose_w`; plus bias (n,) and residual (m, n)."""
    inputs = [x, w, *(v for v in (bias, residual) if v is not None)]
    attrs: Attrs = {"transpose_w": transpose_w, "bias": bias is not None, "residual": residual is not None}
    attrs |= {"out_dtype": out_dtype} if out_dtype is not None else {}
    return apply("gemm", inputs, attrs, name=name, demand=demand, after=after)


def rmsnorm(x: Value, weight: Value, *, eps: float = 1e-5, name: str | None = None) -> Value:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""
    return apply("rmsnorm", [x, weight], {"eps": eps}, name=name)


def rope(x: Value, positions: Value, *, theta: float = 10000.0, name: str | None = None) -> Value:
    """Rotary embedding of x (tokens, heads, dim), halves rotated (Su et al. 2021; Hugging Face layout)."""
    return apply("rope", [x, positions], {"theta": theta}, name=name)


def rope_kv(
    qkv: Value,
    positions: Value,
    keys: Value,
    values: Value,
    q_norm: Value | None = None,
    k_norm: Value | None = None,
    *,
    heads: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
    scaling: tuple[float, ...] = (),
    yarn: tuple[float, ...] = (),
    name: str | None = None,
) -> Value:
    """Split fused qkv (batch*t, (heads + 2 kv) * dim), normalise q and k where weights are given, rotate them, and
    write keys and values into the caches (batch, kv, len, dim) from `positions` (batch,) on -> q (batch*t, heads, dim).

    `scaling` is Llama 3's (factor, low_freq_factor, high_freq_factor, original_context) or empty. `yarn` is YaRN's
    (Peng et al. 2023): (factor, low, high, attention), where frequency number i is divided by `factor` from `high` on,
    not up to `low`, and in part between, and cosines and sines are multiplied by `attention`.
    """
    norms = [v for v in (q_norm, k_norm) if v is not None]
    attrs: Attrs = {"heads": heads, "theta": theta, "eps": eps}
    attrs |= numbered("rope_kv", "scaling", SCALING, scaling) | numbered("rope_kv", "yarn", YARN, yarn)
    return apply("rope_kv", [qkv, positions, keys, values, *norms], attrs, name=name, writes=[keys, values])


def attention(
    q: Value, positions: Value, keys: Value, values: Value, *, context: int | None = None, name: str | None = None
) -> Value:
    """Causal attention of q (batch*t, heads, dim) over caches (batch, kv, len, dim) -> (batch*t, heads*dim).

    Token j of sequence b stands at positions[b] + j. `context` is the length that the cost counts (the whole cache
    unless given).
    """
    length = axis_of("attention", "keys", keys, 2) if context is None else context
    return apply("attention", [q, positions, keys, values], {"context": length}, name=name)


def decode_attention(q: Value, kv: Value, *, name: str | None = None) -> Value:
    """One query token a sequence, q (batch, heads, dim), over the whole of kv (2, batch, len, kv heads, dim)."""
    return apply("decode_attention", [q, kv], name=name)


def swiglu(gate_up: Value, *, name: str | None = None) -> Value:
    """silu(gate) * up of gate_up (m, 2f), gate first (Shazeer 2020)."""
    return apply("swiglu", [gate_up], name=name)


def add(a: Value, b: Value, *, name: str | None = None, after: Sequence[str] = ()) -> Value:
    """a + b, equal shapes."""
    return apply("add", [a, b], name=name, after=after)


def argmax(x: Value, *, name: str | None = None) -> Value:
    """Index of the largest entry of every row of x (m, n) -> i64 (m,): greedy sampling.

    Of equal entries the first wins, and a NaN is larger than any number, so of several the first: torch's rule.
    """
    return apply("argmax", [x], name=name)


def copy(x: Value, *, direction: str = "d2d", name: str | None = None, demand: Demand | None = None) -> Value:
    """Copy x between host and device ("h2d", "d2h") or within the device ("d2d")."""
    return apply("copy", [x], {"direction": direction}, name=name, demand=demand)


def concat_rows(parts: Sequence[Value], *, name: str | None = None) -> Value:
    """The rows of all `parts`, one after another, copied into one tensor."""
    return apply("concat_rows", parts, name=name)


NCCL_CHANNELS = 32
NCCL_SMS = Demand(sm=(1, NCCL_CHANNELS))
"""What a collective asks for unless told: NCCL drives a link with one block a channel, and uses 1 to 32 of them by
default (minCTAs and maxCTAs of its ncclConfig_t)."""


def all_gather(x: Value, *, ranks: int, axis: int = 0, name: str | None = None, demand: Demand | None = None) -> Value:
    """The x of all `ranks`, in their order, joined along `axis`."""
    return _collective("all_gather", x, ranks, axis, name, demand)


def all_reduce(x: Value, *, ranks: int, axis: int = 1, name: str | None = None, demand: Demand | None = None) -> Value:
    """The sum of x over all `ranks`; `axis` is where a ring cuts it into chunks."""
    return _collective("all_reduce", x, ranks, axis, name, demand)


def reduce_scatter(
    x: Value, *, ranks: int, axis: int = 0, name: str | None = None, demand: Demand | None = None
) -> Value:
    """This rank's share, cut along `axis`, of the sum of x over all `ranks`."""
    return _collective("reduce_scatter", x, ranks, axis, name, demand)


def _collective(kind: str, x: Value, ranks: int, axis: int, name: str | None, demand: Demand | None) -> Value:
    wanted = demand if demand is not None else NCCL_SMS if ranks != 1 else None
    return apply(kind, [x], {"ranks": ranks, "axis": axis}, name=name, demand=wanted)


def slice_rows(x: Value, start: int, stop: int, step: int = 1, *, name: str | None = None) -> Value:
    """x[start:stop:step] along the first axis, copied (the last token of every sequence, say)."""
    return apply("slice_rows", [x], {"start": start, "stop": stop, "step": step}, name=name)
