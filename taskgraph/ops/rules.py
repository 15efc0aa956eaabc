"""The tables of the standard ops, one a stage, keyed by op kind, and what appends an op to a graph by them."""

from collections.abc import Callable, Sequence

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import Attr, Demand, Op, Tensor, TensorSpec, Work, seen_inputs

Shapes = Sequence[Tensor]
Attrs = dict[str, Attr]
Outputs = list[tuple[tuple[int, ...], str]]
Rule = Callable[[Shapes, Attrs], Outputs]
WorkRule = Callable[[Shapes, Shapes, Attrs], Work]

SHAPE_RULES: dict[str, Rule] = {}
"""kind -> the (shape, dtype) of each output; raises GraphError when the inputs do not fit together."""

WORK_RULES: dict[str, WorkRule] = {}
"""kind -> the Work of inputs, outputs and attributes."""

SPLIT_RULES: dict[str, tuple[int | None, ...]] = {}
"""kind -> for each input the axis that carries the batch, None where a slice needs the whole operand.

Every output carries the batch on its first axis. `batch_axes` reads the table.
"""

IN_TURN: set[str] = set()
"""Kinds whose places in states are data: a row writes where no other row does, and reads what its own row and rows
before it wrote, so that slices of the batch need not wait for those behind them (`Op.turn`)."""

COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter")

YARN = ("factor", "low", "high", "attention")
"""The attributes of a YaRN scaling, each after "yarn_": see `rope_kv`."""


def shape_rule(kind: str) -> Callable[[Rule], Rule]:
    """Register the shape rule of `kind`."""

    def register(rule: Rule) -> Rule:
        SHAPE_RULES[kind] = rule
        return rule

    return register


def work_rule(kind: str) -> Callable[[WorkRule], WorkRule]:
    """Register the work rule of `kind`."""

    def register(rule: WorkRule) -> WorkRule:
        WORK_RULES[kind] = rule
        return rule

    return register


def need(condition: bool, kind: str, inputs: Shapes, text: str) -> None:
    """GraphError with the shapes of `inputs` and `text` unless `condition`."""
    if not condition:
        shapes = ", ".join(f"{t.name}: {t.dtype}{list(t.shape)}" for t in inputs)
        raise GraphError(f"{kind}({shapes}): {text}.")


FLOATS = ("f64", "f32", "f16", "bf16", "f8")
INTEGERS = ("i32", "i64")


def need_floats(kind: str, inputs: Shapes, *operands: Tensor) -> None:
    """GraphError unless all `operands` are of one float dtype."""
    kinds = {t.dtype for t in operands}
    need(len(kinds) == 1 and kinds <= set(FLOATS), kind, inputs, "these must be floats of one dtype")


def need_integers(kind: str, inputs: Shapes, places: Tensor, axes: int = 1) -> None:
    """GraphError unless `places` are i32 or i64, with so many axes."""
    fits = places.dtype in INTEGERS and len(places.shape) == axes
    need(fits, kind, inputs, f"{places.name!r} must be i32 or i64 with {axes} axis" + ("es" if axes > 1 else ""))


def made_dtype(kind: str, inputs: Shapes, attrs: Attrs, default: str) -> str:
    """The dtype of the output: `out_dtype` where the op has one; GraphError unless it is a float."""
    made = str(attrs.get("out_dtype", default))
    need(made in FLOATS, kind, inputs, f"out_dtype is one of {', '.join(FLOATS)}; got {made!r}")
    return made


def moved(tensors: Shapes) -> float:
    """Bytes of all `tensors`, each moved once."""
    return float(sum(t.nbytes for t in tensors))


def integer(attrs: Attrs, key: str) -> int:
    """The attribute `key`, which a rule needs as a number of something."""
    return int(attrs[key])  # type: ignore[arg-type]


def exactly(kind: str, inputs: Shapes, fewest: int, most: int | None = None) -> None:
    """GraphError unless there are as many inputs as the kind takes."""
    top = fewest if most is None else most
    need(fewest <= len(inputs) <= top, kind, inputs, f"it takes {fewest}{f' to {top}' if top > fewest else ''} inputs")


def batch_axes(op: Op, inputs: Shapes) -> tuple[int | None, ...] | None:
    """For each input of `op` the axis that carries the batch, None where a slice needs the whole; None if it has none.

    A custom op declares it in the attribute `split_axes` (-1 for None).
    """
    declared = op.attr("split_axes", ())
    if isinstance(declared, tuple) and len(declared) == len(inputs) > 0:
        return tuple(None if axis < 0 else axis for axis in declared)
    rule = SPLIT_RULES.get(op.kind)
    if rule is None or (op.kind in COLLECTIVES and op.integer("axis") == 0):
        return None
    axes = rule * len(inputs) if op.kind == "concat_rows" else rule[: len(inputs)]
    if op.kind == "gemm":  # a bias is a row for all, a residual a matrix
        axes = (*axes[:2], *(0 if len(t.shape) == 2 else None for t in inputs[2:]))
    if op.kind == "route":  # a correction is for all, slots are one a token
        axes = (axes[0], *(0 if t.dtype == "i32" else None for t in inputs[1:]))
    return axes if all(a is None or a < len(t.shape) for a, t in zip(axes, inputs, strict=True)) else None


def apply(
    kind: str,
    inputs: Sequence[Value],
    attrs: Attrs | None = None,
    *,
    name: str | None = None,
    demand: Demand | None = None,
    after: Sequence[str] = (),
    writes: Sequence[Value] = (),
) -> Value:
    """Append an op of a standard kind with derived output and work; GraphError when the inputs do not fit."""
    if kind not in SHAPE_RULES:
        raise GraphError(f"unknown op kind {kind!r}; use one of {', '.join(SHAPE_RULES)}, or GraphBuilder.call.")
    attrs = attrs or {}
    if not inputs:
        raise GraphError(f"{kind} needs at least one input.")
    builder = inputs[0].builder
    ins = [v.tensor for v in inputs]
    stem = name or builder._free_name(kind)
    ((shape, dtype),) = derived(kind, ins, attrs)
    out = TensorSpec(f"{stem}.out", shape, dtype)
    work = WORK_RULES[kind](ins, [Tensor(out.name, shape, dtype)], attrs)
    return builder.op(kind, inputs, [out], work, stem, demand, after, writes, attrs)[0]


def derived(kind: str, inputs: Shapes, attrs: Attrs) -> Outputs:
    """What the shape rule of a standard kind gives; GraphError for inputs or attributes of any other form too."""
    try:
        return SHAPE_RULES[kind](inputs, attrs)
    except GraphError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        shapes = ", ".join(f"{t.dtype}{list(t.shape)}" for t in inputs)
        raise GraphError(f"{kind} does not take ({shapes}) with attributes {attrs}: {error}.") from error


def check_op(op: Op, tensors: dict[str, Tensor]) -> None:
    """GraphError unless the outputs of a standard op are what its shape rule says (for graphs read from files)."""
    if op.kind not in SHAPE_RULES:
        return
    made = [(tensors[name].shape, tensors[name].dtype) for name in op.outputs]
    wanted = derived(op.kind, seen_inputs(op, tensors), dict(op.attrs))
    if made != wanted:
        raise GraphError(f"op {op.name!r} of kind {op.kind!r} makes {made}, but its inputs give {wanted}.")
