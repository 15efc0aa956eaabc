"""The tables of the standard ops, one a stage, keyed by op kind, and what appends an op to a graph by them."""

from collections.abc import Callable, Sequence

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import Demand, Op, Tensor, TensorSpec, Work, seen_inputs
from taskgraph.ops.signatures import COLLECTIVES, Attrs, Shapes, check_signature
from taskgraph.record import instance, number, sequence, shown, text

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


def moved(tensors: Shapes) -> float:
    """Bytes of all `tensors`, each moved once."""
    return float(sum(t.nbytes for t in tensors))


def integer(attrs: Attrs, key: str) -> int:
    """The attribute `key`, which a rule needs as a number of something."""
    return int(attrs[key])  # type: ignore[arg-type]


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


def shapes_of(kind: str, ins: Shapes, attrs: Attrs) -> Outputs:
    """The (shape, dtype) of each output of a standard kind; GraphError when inputs or attributes do not fit."""
    check_signature(kind, ins, attrs)
    return SHAPE_RULES[kind](ins, attrs)


def typed_attrs(name: str, kind: str, attrs: Attrs) -> Attrs:
    """The attributes as an Op keeps them; GraphError for what cannot be one."""
    return dict(Op(name, kind, (), (), Work(), attrs=tuple(attrs.items())).attrs)


def is_value(kind: str, name: str, value: object) -> Value:
    """`value` if it is one that a GraphBuilder gave; GraphError names the op's kind and the argument."""
    return instance(f"{name} of {kind}", value, Value, GraphError, "Take what GraphBuilder.input or an op returned.")


def axis_of(kind: str, name: str, value: object, axis: int) -> int:
    """The length of `value` along `axis`; GraphError when it is no value or has no such axis."""
    shape = is_value(kind, name, value).shape
    if not -len(shape) <= axis < len(shape):
        raise GraphError(f"{name} of {kind} has shape {list(shape)}, without axis {axis}.")
    return shape[axis]


def numbered(kind: str, prefix: str, names: Sequence[str], given: Sequence[float]) -> Attrs:
    """The attributes prefix + name of numbers that are given all or not at all; GraphError for some of them."""
    if len(sequence(f"{prefix} of {kind}", given, GraphError)) not in (0, len(names)):
        raise GraphError(f"{prefix} of {kind} has {len(given)} numbers; it is empty or ({', '.join(names)}).")
    made = zip(names, given, strict=False)
    return {f"{prefix}_{name}": number(f"{prefix} of {kind}, {name},", value, GraphError) for name, value in made}


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
    if not isinstance(kind, str) or kind not in SHAPE_RULES:
        raise GraphError(f"unknown op kind {shown(kind)}; use one of {', '.join(SHAPE_RULES)}, or GraphBuilder.call.")
    if not sequence(f"the inputs of {kind}", inputs, GraphError):
        raise GraphError(f"{kind} needs at least one input.")
    for i, value in enumerate(inputs):
        is_value(kind, f"input {i}", value)
    given = instance(f"the attributes of {kind}", attrs or {}, dict, GraphError)
    builder = inputs[0].builder
    ins = [v.tensor for v in inputs]
    stem = text(f"the name of a {kind}", name, GraphError) if name else builder._free_name(kind)
    attrs = typed_attrs(stem, kind, given)
    ((shape, dtype),) = shapes_of(kind, ins, attrs)
    out = TensorSpec(f"{stem}.out", shape, dtype)
    work = WORK_RULES[kind](ins, [Tensor(out.name, shape, dtype)], attrs)
    return builder.op(kind, inputs, [out], work, stem, demand, after, writes, attrs)[0]


def check_op(op: Op, tensors: dict[str, Tensor]) -> None:
    """GraphError unless the outputs of a standard op are what its shape rule says (for graphs read from files)."""
    if op.kind not in SHAPE_RULES:
        return
    made = [(tensors[name].shape, tensors[name].dtype) for name in op.outputs]
    wanted = shapes_of(op.kind, seen_inputs(op, tensors), dict(op.attrs))
    if made != wanted:
        raise GraphError(f"op {op.name!r} of kind {op.kind!r} makes {made}, but its inputs give {wanted}.")
