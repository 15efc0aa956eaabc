"""Whether the parts of a graph fit together: what a Graph checks once, when it is made."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from taskgraph.errors import GraphError
from taskgraph.graph.op import Op, Tensor, check_work

if TYPE_CHECKING:
    from taskgraph.graph.graph import Carry, Graph, Repeat

MOST_OPS = 10_000_000
"""Ops of a graph with its repeat written out."""


def check(graph: "Graph") -> None:
    """GraphError, naming the part, unless the parts of `graph` fit together."""
    if not graph.ops:
        raise GraphError(f"graph {graph.name!r} has no ops; add some before build().")
    known = _unique("tensor", (t.name for t in graph.tensors))
    _unique("op", (op.name for op in graph.ops))
    role = {t.name: t.role for t in graph.tensors}
    made = {name for name in known if role[name] != "activation"}
    produced: set[str] = set()
    for op in graph.ops:
        check_work(op.name, op.work)
        _check_edges(op, known, role)
        _check_views(op, graph.tensor)
        for name in op.outputs:
            if name in produced:
                raise GraphError(f"tensor {name!r} is made by two ops, the second is {op.name!r}.")
            produced.add(name)
    carried = graph.repeat.carries if graph.repeat else ()
    made |= produced | {c.inside for c in carried} | {c.result for c in carried}
    for name in graph.outputs:
        if name not in known:
            raise GraphError(f"output {name!r} is no tensor of graph {graph.name!r}.")
        if name not in made:
            raise GraphError(f"output {name!r} is an activation that no op makes.")
    missing = next((t for op in graph.ops for t in op.inputs if t not in made), None)
    if missing is not None:
        raise GraphError(f"tensor {missing!r} is an activation that no op makes; declare it with input() or weight().")
    if graph.repeat is not None:
        _check_repeat(graph, graph.repeat)
    graph.predecessors()


def _unique(what: str, names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GraphError(f"duplicate {what} name {name!r}; names are unique within a graph.")
        seen.add(name)
    return seen


def _check_edges(op: Op, known: set[str], role: Mapping[str, str]) -> None:
    for name in (*op.inputs, *op.outputs):
        if name not in known:
            raise GraphError(f"op {op.name!r} names the unknown tensor {name!r}.")
    for name in op.outputs:
        if role[name] != "activation":
            raise GraphError(f"op {op.name!r} outputs {name!r}, which is a {role[name]}; outputs are activations.")
    for name in op.writes:
        if name not in op.inputs or role[name] != "state":
            raise GraphError(f"op {op.name!r} writes {name!r}, which must be a state among its inputs.")


def _check_views(op: Op, tensors: Mapping[str, Tensor]) -> None:
    for i, part in op.views.items():
        if i >= len(op.inputs):
            raise GraphError(f"op {op.name!r} takes rows of input {i}, but it has {len(op.inputs)} inputs.")
        try:
            part.of(tensors[op.inputs[i]])
        except GraphError as error:
            raise GraphError(f"op {op.name!r}: {error}") from error


def _check_carry(graph: "Graph", prefix: str, carry: "Carry") -> None:
    for name in (carry.init, carry.inside, carry.next, carry.result):
        if name not in graph.tensor:
            raise GraphError(f"carry {carry.inside!r} names the unknown tensor {name!r}.")
    if not carry.inside.startswith(prefix) or carry.init.startswith(prefix) or carry.result.startswith(prefix):
        raise GraphError(f"carry {carry.inside!r} must begin with {prefix!r}, and what enters and leaves must not.")


def _check_repeat(graph: "Graph", repeat: "Repeat") -> None:
    if repeat.count < 1 or not 0 <= repeat.first < repeat.last <= len(graph.ops):
        raise GraphError(f"repeat {repeat.name!r} has count {repeat.count} over ops [{repeat.first}, {repeat.last}).")
    if (written := repeat.count * (repeat.last - repeat.first)) > MOST_OPS:
        raise GraphError(f"repeat {repeat.name!r} has {written} ops written out; a graph has {MOST_OPS} at most.")
    prefix = repeat.name + "/"
    for index, op in enumerate(graph.ops):
        inside = repeat.first <= index < repeat.last
        if op.name.startswith(prefix) != inside:
            raise GraphError(f"op {op.name!r} must begin with {prefix!r} exactly when it is in the repeated body.")
        if not inside and any(name.startswith(prefix) for name in (*op.inputs, *op.after)):
            raise GraphError(f"op {op.name!r} reaches into repeat {repeat.name!r}; carry the tensor out with next().")
    if inner := [name for name in graph.outputs if name.startswith(prefix)]:
        raise GraphError(f"output {inner[0]!r} is inside repeat {repeat.name!r}; carry the tensor out with next().")
    _unique("carry", (carry.inside for carry in repeat.carries))
    _unique("carry", (carry.result for carry in repeat.carries))
    for carry in repeat.carries:
        _check_carry(graph, prefix, carry)
        shapes = {(graph.tensor[n].shape, graph.tensor[n].dtype) for n in (carry.init, carry.inside, carry.next)}
        if len(shapes) != 1:
            raise GraphError(f"carry {carry.inside!r} changes shape or dtype between iterations: {sorted(shapes)}.")
