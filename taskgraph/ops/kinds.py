"""One record an op kind, the registry of them, and what appends, checks and slices ops by it.

A kind is added by one line, in this package or in another: `register(Kind("scale", ...))`. Backends say beside it how
they run the kind: `taskgraph.runtime.cpu.kinds.register` and `taskgraph.runtime.gpu.kinds.register`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import Attr, Demand, Op, Tensor, TensorSpec, Work, seen_inputs
from taskgraph.ops.signatures import Attrs, Shapes, Signature, moved
from taskgraph.record import function, instance, integer, sequence, shown, text

Output = tuple[tuple[int, ...], str]
"""The shape and the dtype of an op's output."""
Axes = tuple[int | None, ...]
"""For each input the axis that carries the batch, None where a slice needs the whole operand."""
Range = tuple[int, int]

ShapeRule = Callable[[Shapes, Attrs], Output]
WorkRule = Callable[[Shapes, Shapes, Attrs], Work]
SplitRule = Callable[[Shapes, Attrs], Axes | None]
RangeRule = Callable[[Shapes, Attrs], Range]


@dataclass(frozen=True, slots=True)
class Kind:
    """All that this package knows of a kind of op. Rules are functions of the inputs' tensors and the attributes.

    - `takes`: how many axes each input has, and what attributes there are; checked before any rule is called.
    - `shape`: (inputs, attributes) -> shape and dtype of the one output; GraphError when inputs do not fit together.
    - `work`: (inputs, outputs, attributes) -> the Work: the flops of the formula, and every operand moved once.
    - `split`: for each input the axis that carries the batch, or a function that says so of given inputs; None: such an
      op cannot be sliced. The output carries the batch on its first axis.
    - `ordered`: places in states are data; a row writes where no other row does, and reads what its own row and rows
      before it wrote, so that slices of the batch need not wait for those behind them (`Op.batch_rows`).
    - `index_ranges`: input number -> (inputs, attributes) -> the range [low, high) of an input that is an index.
    - `stated`: ops of the kind state their outputs, one or more, and their work; `shape` and `work` are never asked.
    """

    name: str
    takes: Signature
    shape: ShapeRule
    work: WorkRule
    split: Axes | SplitRule | None = None
    ordered: bool = False
    index_ranges: Mapping[int, RangeRule] = field(default_factory=dict)
    stated: bool = False

    def __post_init__(self) -> None:
        text("the name of an op kind", self.name, GraphError)
        instance(f"takes of {self.name}", self.takes, Signature, GraphError)
        instance(f"stated of {self.name}", self.stated, bool, GraphError)
        ranges = instance(f"index_ranges of {self.name}", self.index_ranges, Mapping, GraphError)
        rules = [self.shape, self.work, *ranges.values(), *([self.split] if callable(self.split) else [])]
        for rule in rules:
            function(f"a rule of {self.name}", rule, GraphError)
        if not callable(self.split) and self.split is not None:
            for axis in instance(f"split of {self.name}", self.split, tuple, GraphError):
                if axis is not None and (not isinstance(axis, int) or axis < 0):
                    raise GraphError(f"split of {self.name} has {shown(axis)}; it has an axis or None for each input.")

    def output(self, ins: Shapes, attrs: Attrs) -> Output:
        """Shape and dtype of the output; GraphError when inputs or attributes do not fit."""
        self.takes.check(self.name, ins, attrs)
        return self.shape(ins, attrs)

    def axes(self, ins: Shapes, attrs: Attrs) -> Axes | None:
        """For each of these inputs the axis that carries the batch; None if the op carries none."""
        axes = self.split(ins, attrs) if callable(self.split) else self.split and self.split[: len(ins)]
        if axes is None:
            return None
        if len(axes) != len(ins):
            raise GraphError(f"split of {self.name} says {len(axes)} axes; the op has {len(ins)} inputs.")
        return axes if all(a is None or a < len(t.shape) for a, t in zip(axes, ins, strict=True)) else None


def row_work(flops: float) -> WorkRule:
    """The work of `flops` an element of the first input, every operand moved once."""

    def work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
        return Work(flops=flops * math.prod(ins[0].shape), hbm_bytes=moved(ins) + moved(outs))

    return work


def index_of(place: int, axis: int = 0) -> RangeRule:
    """The range of an input that is an index along `axis` of input number `place`."""

    def index_range(ins: Shapes, attrs: Attrs) -> Range:
        return 0, ins[place].shape[axis]

    return index_range


_KINDS: dict[str, Kind] = {}
KINDS: Final[Mapping[str, Kind]] = MappingProxyType(_KINDS)
"""Every registered kind by name."""
CALL: Final = "call"
"""The kind of an op whose code is a function of the user's (`GraphBuilder.call`): it has no rules."""


def register(kind: Kind) -> Kind:
    """Make `kind` known by its name, and return it. GraphError for a name that another record has."""
    instance("what register takes", kind, Kind, GraphError)
    if kind.name == CALL or _KINDS.setdefault(kind.name, kind) != kind:
        raise GraphError(f"op kind {kind.name!r} is registered already, as another record; give yours another name.")
    return kind


def known(name: object) -> Kind:
    """The kind of that name; GraphError if nobody registered it."""
    found = KINDS.get(name) if isinstance(name, str) else None
    if found is None:
        raise GraphError(f"unknown op kind {shown(name)}; use one of {', '.join(KINDS)}, or GraphBuilder.call.")
    return found


def batch_axes(op: Op, inputs: Shapes) -> Axes | None:
    """For each input of `op` the axis that carries the batch, None where a slice needs the whole; None if it has none.

    A custom op declares it in the attribute `split_axes` (-1 for None).
    """
    declared = op.attr("split_axes", ())
    if isinstance(declared, tuple) and len(declared) == len(inputs) > 0:
        return tuple(None if axis < 0 else axis for axis in declared)
    kind = KINDS.get(op.kind)
    return None if kind is None else kind.axes(inputs, Attrs(op.attrs))


def apply(
    kind: str,
    inputs: Sequence[Value],
    attrs: Mapping[str, Attr] | None = None,
    *,
    name: str | None = None,
    demand: Demand | None = None,
    after: Sequence[str] = (),
    writes: Sequence[int] = (),
) -> Value:
    """Append an op of a registered kind with derived output and work; GraphError when the inputs do not fit.

    `after` names ops that must end first though no tensor connects them; `writes` has the numbers of those inputs that
    are states which the op changes in place."""
    rules = known(kind)
    if not sequence(f"the inputs of {kind}", inputs, GraphError):
        raise GraphError(f"{kind} needs at least one input.")
    for i, value in enumerate(inputs):
        is_value(kind, f"input {i}", value)
    given = instance(f"the attributes of {kind}", attrs or {}, dict, GraphError)
    builder = inputs[0].builder
    ins = [v.tensor for v in inputs]
    stem = text(f"the name of a {kind}", name, GraphError) if name else builder._free_name(kind)
    typed = Attrs(Op(stem, kind, (), (), Work(), attrs=tuple(given.items())).attrs)
    shape, dtype = rules.output(ins, typed)
    out = TensorSpec(f"{stem}.out", shape, dtype)
    work = rules.work(ins, [Tensor(out.name, shape, dtype)], typed)
    changed = [
        integer(f"writes of {kind}", i, GraphError, 0) for i in sequence(f"writes of {kind}", writes, GraphError)
    ]
    given_as = [value.written() if i in changed else value for i, value in enumerate(inputs)]
    return builder.op((kind, typed), given_as, [out], work, stem, demand, after)[0]


def work_of(op: Op, tensors: Mapping[str, Tensor]) -> Work | None:
    """The work of an op by the rule of its kind; None for a kind without one."""
    kind, outputs = KINDS.get(op.kind), [tensors[name] for name in op.outputs]
    return None if kind is None else kind.work(seen_inputs(op, tensors), outputs, Attrs(op.attrs))


def check_op(op: Op, tensors: Mapping[str, Tensor]) -> None:
    """GraphError unless the outputs of an op of a registered kind are what its shape rule says (graphs read from
    files)."""
    kind = KINDS.get(op.kind)
    if kind is None or kind.stated:
        return
    made = [(tensors[name].shape, tensors[name].dtype) for name in op.outputs]
    wanted = [kind.output(seen_inputs(op, tensors), Attrs(op.attrs))]
    if made != wanted:
        raise GraphError(f"op {op.name!r} of kind {op.kind!r} makes {made}, but its inputs give {wanted}.")


def is_value(kind: str, name: str, value: object) -> Value:
    """`value` if it is one that a GraphBuilder gave; GraphError names the op's kind and the argument."""
    return instance(f"{name} of {kind}", value, Value, GraphError, "Take what GraphBuilder.input or an op returned.")


def axis_of(kind: str, name: str, value: object, axis: int) -> int:
    """The length of `value` along `axis`; GraphError when it is no value or has no such axis."""
    shape = is_value(kind, name, value).shape
    if not -len(shape) <= axis < len(shape):
        raise GraphError(f"{name} of {kind} has shape {list(shape)}, without axis {axis}.")
    return shape[axis]
