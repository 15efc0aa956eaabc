"""Graph (a frozen, checked value) and GraphBuilder (the only thing that changes while a graph is made)."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from operator import attrgetter
from struct import pack
from typing import TYPE_CHECKING, Any, Unpack

from taskgraph.errors import GraphError
from taskgraph.graph.check import check
from taskgraph.graph.earlier import EarlierCall, EarlierOp, only, written
from taskgraph.graph.edges import predecessors, toposorted
from taskgraph.graph.functions import Splittable, check_arity, register_function
from taskgraph.graph.op import PLAIN, ROWS, Attr, Demand, Op, Rows, Tensor, TensorSpec, Work, check_work, rows_attr
from taskgraph.record import Typed, decode, from_columns, instance, integer, sequence, shown, text
from taskgraph.record import function as callable_of

if TYPE_CHECKING:
    import networkx

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Carry(Typed, error=GraphError):
    """A loop-carried tensor: `init` enters iteration 0 as `inside`, `next` enters the following one,
    and the last `next` leaves the loop as `result`."""

    init: str
    inside: str
    next: str
    result: str


@dataclass(frozen=True, slots=True)
class Repeat(Typed, error=GraphError):
    """ops[first:last] stand for `count` iterations. Names that begin with "name/" exist once an iteration."""

    name: str
    count: int
    first: int
    last: int
    carries: tuple[Carry, ...]


@dataclass(frozen=True, slots=True)
class Graph(Typed, error=GraphError):
    """A frozen DAG: tensors, ops in topological order, output names, and at most one repeated body.

    Raises GraphError when it is made from parts that do not fit together.
    """

    name: str
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    repeat: Repeat | None = None
    _memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _check(self) -> None:
        check(self)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Graph, (self.name, self.tensors, self.ops, self.outputs, self.repeat))

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the graph says; equal graphs have equal fingerprints."""
        if "fingerprint" not in self._memo:
            digest = hashlib.blake2b(digest_size=16)
            tensors, ops = self.tensors, self.ops
            digest.update(repr((SCHEMA, self.name, self.outputs, self.repeat)).encode())
            for column in ("name", "shape", "dtype", "role"):
                digest.update(repr(list(map(attrgetter(column), tensors))).encode())
            for column in ("name", "kind", "inputs", "outputs", "after", "writes", "attrs"):
                digest.update(repr(list(map(attrgetter(column), ops))).encode())
            pinned = [None if op.demand is PLAIN or op.demand == PLAIN else op.demand for op in ops]
            digest.update(repr(pinned).encode())
            digest.update(pack(f"<{5 * len(ops)}d", *chain.from_iterable(op.work.vector for op in ops)))
            self._memo["fingerprint"] = digest.hexdigest()
        return str(self._memo["fingerprint"])

    @property
    def tensor(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        if "tensor" not in self._memo:
            self._memo["tensor"] = {t.name: t for t in self.tensors}
        result: Mapping[str, Tensor] = self._memo["tensor"]
        return result

    def with_role(self, *roles: str) -> tuple[Tensor, ...]:
        """The tensors of the given roles, in order of declaration."""
        return tuple(t for t in self.tensors if t.role in roles)

    def predecessors(self) -> list[tuple[int, ...]]:
        """For every op the sorted indices of the ops that must end before it: data, control and state hazards."""
        if "predecessors" not in self._memo:
            self._memo["predecessors"] = predecessors(self.ops, _loop_results(self.repeat))
        result: list[tuple[int, ...]] = self._memo["predecessors"]
        return result

    def flat(self) -> "Graph":
        """The graph with its repeat written out, iteration i's names beginning with "name.i/"."""
        if self.repeat is None:
            return self
        if "flat" not in self._memo:
            self._memo["flat"] = _unroll(self, self.repeat)
        result: Graph = self._memo["flat"]
        return result

    def to_networkx(self) -> "networkx.DiGraph[str]":
        """A networkx DiGraph of op names with the Op under "op"; a repeat is one body, not written out."""
        import networkx

        dag: networkx.DiGraph[str] = networkx.DiGraph(name=self.name)
        dag.add_nodes_from((op.name, {"op": op}) for op in self.ops)
        for op, preds in zip(self.ops, self.predecessors(), strict=True):
            dag.add_edges_from((self.ops[p].name, op.name) for p in preds)
        return dag

    def to_json(self) -> str:
        """Text that `Graph.from_json` reads back into an equal graph."""
        body = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        return json.dumps({"schema": SCHEMA, **body}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Graph":
        """The graph that `to_json` wrote; GraphError, with the place in the document, if the text is not one."""
        return decode(Graph, text, GraphError, "graph file", "Write it with Graph.to_json().", SCHEMA)


# --------------------------------------------------------------------------------------- written out


def _loop_results(repeat: Repeat | None) -> Mapping[str, str]:
    """The tensors that leave the repeat -> what makes them inside it."""
    return {} if repeat is None else {c.result: c.next for c in repeat.carries}


def _unroll(graph: Graph, repeat: Repeat) -> Graph:
    prefix = repeat.name + "/"
    carried = {c.inside for c in repeat.carries}
    results = {c.result for c in repeat.carries}
    inside = [t for t in graph.tensors if t.name.startswith(prefix) and t.name not in carried]
    tensors = [t for t in graph.tensors if not t.name.startswith(prefix) and t.name not in results]
    ops = list(graph.ops[: repeat.first])
    value = {c.inside: c.init for c in repeat.carries}
    for i in range(repeat.count):
        stem = f"{repeat.name}.{i}/"

        def rename(name: str, stem: str = stem, value: Mapping[str, str] = value) -> str:
            return value.get(name) or (stem + name[len(prefix) :] if name.startswith(prefix) else name)

        names = [rename(t.name) for t in inside]
        tensors += from_columns(
            Tensor, len(inside), names, *(map(attrgetter(c), inside) for c in ("shape", "dtype", "role"))
        )
        ops += _renamed(graph.ops[repeat.first : repeat.last], rename)
        value = {c.inside: rename(c.next) for c in repeat.carries}
    last = {c.result: value[c.inside] for c in repeat.carries}
    ops += _renamed(graph.ops[repeat.last :], lambda name: last.get(name, name))
    outputs = tuple(last.get(name, name) for name in graph.outputs)
    return Graph(graph.name, tuple(tensors), tuple(ops), outputs)


def _renamed(ops: Sequence[Op], rename: Callable[[str], str]) -> tuple[Op, ...]:
    """Checked ops under other names: made a column at a time, for a graph written out may have millions."""

    def names(column: str) -> list[tuple[str, ...]]:
        return [tuple(map(rename, getattr(op, column))) for op in ops]

    def same(column: str) -> Iterable[Any]:
        return map(attrgetter(column), ops)

    name, edges = [rename(op.name) for op in ops], (names("inputs"), names("outputs"))
    hints = (same("work"), same("demand"), names("after"), names("writes"), same("attrs"))
    return from_columns(Op, len(ops), name, same("kind"), *edges, *hints)


# ------------------------------------------------------------------------------------------ builder


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of a graph under construction, or some rows of one; what `taskgraph.ops` takes and returns.

    `changes`: it stands for a state that the op which takes it changes in place; see `written`."""

    builder: "GraphBuilder"
    tensor: Tensor
    view: Rows | None = None
    changes: bool = False

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> "Value":
        """Rows start to stop along the first axis, in place: an op that takes them reads that part of the tensor."""
        start, stop = integer("rows' start", start, GraphError), integer("rows' stop", stop, GraphError)
        narrow = Rows(0, start, stop).of(self.tensor)
        first = start if self.view is None else self.view.start + start
        return Value(self.builder, narrow, Rows(0, first, first + stop - start), self.changes)

    def written(self) -> "Value":
        """This state, as an input that the op changes in place: ops that read it later wait for that op, which waits
        for those that read it before."""
        return replace(self, changes=True)

    def whole(self, purpose: str) -> "Value":
        """This value; GraphError if it is only some rows of a tensor, which cannot be what `purpose` says."""
        if self.view is not None:
            raise GraphError(f"some rows of {self.name!r} cannot be {purpose}; copy them with ops.slice_rows first.")
        return self


class Loop:
    """The body of a repeat under construction."""

    def __init__(self, builder: "GraphBuilder", name: str, count: int) -> None:
        self._builder, self.name, self.count = builder, name, count
        self.first = len(builder._ops)
        self._carries: dict[str, Carry] = {}

    def carry(self, init: Value, name: str | None = None) -> Value:
        """The tensor that iteration 0 takes from `init` and the others from `next`."""
        self._builder._own(init, "carry()").whole("carried")
        if name is not None:
            text("the name of a carry", name, GraphError)
        inside = self._builder._tensor(
            name or f"{init.name.rsplit('/', 1)[-1]}_in", init.shape, init.dtype, "activation"
        )
        self._carries[inside.name] = Carry(init.name, inside.name, "", "")
        return inside

    def next(self, inside: Value, value: Value) -> Value:
        """Feed `value` into the following iteration; returns the tensor that leaves the last one."""
        self._builder._own(value, "next()").whole("carried")
        self._builder._own(inside, "next()")
        if inside.name not in self._carries:
            raise GraphError(f"{inside.name!r} was not made by carry() of repeat {self.name!r}.")
        result = Tensor(f"{self.name}:{value.name.rsplit('/', 1)[-1]}", value.shape, value.dtype)
        self._builder._add_tensor(result)
        carry = self._carries[inside.name]
        self._carries[inside.name] = replace(carry, next=value.name, result=result.name)
        return Value(self._builder, result)

    def finish(self) -> Repeat:
        """The Repeat value; GraphError if a carry has no next()."""
        open_carry = next((c.inside for c in self._carries.values() if not c.next), None)
        if open_carry is not None:
            raise GraphError(f"repeat {self.name!r} carries {open_carry!r} but never says its next().")
        return Repeat(self.name, self.count, self.first, len(self._builder._ops), tuple(self._carries.values()))


class GraphBuilder:
    """Collects tensors and ops; `build()` checks them once and returns the frozen Graph."""

    def __init__(self, name: str) -> None:
        self.name = text("the name of a graph", name, GraphError)
        self._tensors: dict[str, Tensor] = {}
        self._ops: list[Op] = []
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}
        self._outputs: dict[str, None] = {}
        """In order of declaration."""
        self._loop: Loop | None = None
        self._repeat: Repeat | None = None
        self._prefix = ""

    def input(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """A tensor that the caller gives at every call."""
        return self._tensor(name, shape, dtype, "input")

    def weight(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """A constant, bound once."""
        return self._tensor(name, shape, dtype, "weight")

    def state(self, name: str, shape: Sequence[int], dtype: str) -> Value:
        """A tensor that lives across calls and that ops may change in place (a KV cache)."""
        return self._tensor(name, shape, dtype, "state")

    def op(
        self,
        kind: str | tuple[str, Mapping[str, Attr]],
        inputs: Sequence[Value],
        outputs: Sequence[TensorSpec],
        work: Work,
        name: str | None = None,
        demand: Demand | None = None,
        after: Sequence[str] = (),
        **earlier: Unpack[EarlierOp],
    ) -> tuple[Value, ...]:
        """Append a node of any kind; the functions of `taskgraph.ops` derive outputs and work for you.

        `kind` is its name, or its name with the static parameters of the op. A state that the op changes in place is
        given as `state.written()`. `after` names ops that must end first though no tensor connects them. `earlier` are
        the arguments of version 0.1."""
        only("op", earlier, EarlierOp)
        inputs = written(inputs, earlier.get("writes", ()))
        kind, attrs = kind if isinstance(kind, tuple) and len(kind) == 2 else (kind, earlier.get("attrs") or {})
        text("the kind of an op", kind, GraphError)
        name = self._prefix + (text("the name of an op", name, GraphError) if name else self._free_name(kind))
        if name in self._names:
            raise GraphError(f"duplicate op name {name!r}; names are unique within a graph.")
        check_work(name, instance(f"the work of op {name!r}", work, Work, GraphError))
        if demand is not None:
            instance(f"the demand of op {name!r}", demand, Demand, GraphError, "Make one with taskgraph.demand(...).")
        self._check_parts(f"op {name!r}", inputs, outputs, after, attrs)
        made = tuple(self._tensor(o.name, o.shape, o.dtype, "activation") for o in outputs)
        views = {i: v.view for i, v in enumerate(inputs) if v.view is not None}
        parts: dict[str, Attr] = {ROWS: rows_attr(views)} if views else {}
        self._ops.append(
            Op(
                name=name,
                kind=kind,
                inputs=tuple(v.name for v in inputs),
                outputs=tuple(v.name for v in made),
                work=work,
                demand=demand or PLAIN,
                after=tuple(self._known_op(a) for a in after),
                writes=tuple(dict.fromkeys(v.name for v in inputs if v.changes)),
                attrs=tuple(sorted({**attrs, **parts}.items())),
            )
        )
        self._names.add(name)
        return made

    def call(
        self,
        function: Callable[..., Any] | Splittable,
        inputs: Sequence[Value],
        outputs: Sequence[TensorSpec],
        *,
        work: Work,
        name: str | None = None,
        demand: Demand | None = None,
        after: Sequence[str] = (),
        **earlier: Unpack[EarlierCall],
    ) -> Any:
        """A custom Python op: at run time `function(*inputs, *outputs)` fills the outputs in place.

        Returns one Value, or a tuple when there are several outputs. The graph holds the function's name only.
        A state that the function changes in place is given as `state.written()`; a function that may run on slices of
        its batch as a `Splittable`. `after` names ops that must end first though no tensor connects them. `earlier` are
        the arguments of version 0.1.
        """
        only("call", earlier, EarlierCall)
        for what, given in (("inputs", inputs), ("outputs", outputs)):
            sequence(f"{what} of a custom op", given, GraphError)
        axes = earlier.get("split_axes")
        if axes is not None and not isinstance(function, Splittable):
            function = Splittable(function, axes, earlier.get("split_multiple", 1))
        inputs = written(inputs, earlier.get("writes", ()))
        split = function.attrs(len(inputs)) if isinstance(function, Splittable) else {}
        plain = function.function if isinstance(function, Splittable) else function
        key = register_function(callable_of("the function of a custom op", plain, GraphError))
        name = name or self._free_name(key.rsplit(":", 1)[-1].partition("#")[0].rsplit(".", 1)[-1].strip("<>"))
        check_arity(name, plain, len(inputs) + len(outputs))
        made = self.op(("call", {"function": key, **split}), inputs, outputs, work, name, demand, after)
        return made[0] if len(made) == 1 else made

    @contextmanager
    def repeat(self, count: int, name: str = "layer") -> Iterator[Loop]:
        """The ops made inside stand for `count` iterations; weights and states made inside exist once an iteration."""
        if self._loop is not None or self._repeat is not None:
            raise GraphError("a graph has at most one repeat, and repeats do not nest.")
        text("the name of a repeat", name, GraphError)
        if integer("the count of a repeat", count, GraphError) < 1:
            raise GraphError(f"repeat {name!r} needs a count of at least 1; got {count}.")
        self._loop, self._prefix = Loop(self, name, count), name + "/"
        try:
            yield self._loop
            self._repeat = self._loop.finish()
        finally:
            self._loop, self._prefix = None, ""

    def output(self, *values: Value) -> None:
        """Declare results of the graph."""
        for value in values:
            if not isinstance(value, Value):
                raise GraphError(f"output() takes the values that ops return; got {shown(value)}.")
            self._outputs[self._own(value, "output()").whole("an output").name] = None

    def build(self) -> Graph:
        """The frozen graph, ops in topological order; GraphError if anything is wrong."""
        if not self._outputs:
            raise GraphError(f"graph {self.name!r} has no outputs; call output(...) before build().")
        ops = self._ops if self._repeat is not None else toposorted(self._ops)
        return Graph(self.name, tuple(self._tensors.values()), tuple(ops), tuple(self._outputs), self._repeat)

    # -- helpers ---------------------------------------------------------------------------------

    def _tensor(self, name: str, shape: Sequence[int], dtype: str, role: str) -> Value:
        called = self._prefix + text(f"the name of a tensor ({role})", name, GraphError)
        tensor = Tensor(called, shape, dtype, role)  # type: ignore[arg-type]  # a list becomes a tuple there
        self._add_tensor(tensor)
        return Value(self, tensor)

    def _check_parts(self, whose: str, inputs: object, outputs: object, after: object, attrs: object) -> None:
        """GraphError unless these are lists of values of this builder, of specs and of names, and named attributes."""
        for value in sequence(f"inputs of {whose}", inputs, GraphError):
            self._own(value, whose)
        for made in sequence(f"outputs of {whose}", outputs, GraphError):
            if not isinstance(made, TensorSpec):
                raise GraphError(f"an output of {whose} is {shown(made)}; make one with taskgraph.spec(...).")
        for name in sequence(f"after= of {whose}", after, GraphError):
            text(f"after= of {whose}", name, GraphError)
        if not isinstance(attrs, Mapping):
            raise GraphError(f"the attributes of {whose} are {shown(attrs)}; they must be a mapping.")
        for key in attrs:
            text(f"an attribute of {whose}", key, GraphError)

    def _own(self, value: Value, taker: str) -> Value:
        """`value` if it is one of this builder; GraphError names who would take it."""
        if not isinstance(value, Value):
            raise GraphError(f"{taker} takes the values that ops return; got {shown(value)}.")
        if value.builder is not self:
            raise GraphError(f"{taker} takes {value.name!r}, which belongs to another builder.")
        return value

    def _add_tensor(self, tensor: Tensor) -> None:
        if tensor.name in self._tensors:
            raise GraphError(f"duplicate tensor name {tensor.name!r}; names are unique within a graph.")
        self._tensors[tensor.name] = tensor

    def _known_op(self, name: str) -> str:
        """`name` as seen from inside a repeat: the body's own op first, else an op outside."""
        inner = self._prefix + name
        return inner if inner in self._names else name

    def _free_name(self, stem: str) -> str:
        count = self._counts.get(self._prefix + stem, 0)
        while True:
            name = stem if count == 0 else f"{stem}_{count}"
            count += 1
            if self._prefix + name not in self._names:
                self._counts[self._prefix + stem] = count
                return name
