"""What the rewrites share: ops put in place of others, and what follows for the repeat, the shapes and the work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor, seen_inputs
from taskgraph.ops import KINDS, Attrs


def rebuilt(
    graph: Graph,
    ops: Iterable[tuple[int, Op]],
    tensors: Iterable[Tensor],
    dropped: Iterable[str] = (),
    outputs: Sequence[str] = (),
) -> Graph:
    """`graph` with `ops`, each with the index of the old op that it stands in place of, and these tensors on top."""
    placed = list(ops)
    repeat = graph.repeat
    if repeat is not None:
        first = sum(i < repeat.first for i, _ in placed)
        last = sum(i < repeat.last for i, _ in placed)
        repeat = replace(repeat, first=first, last=last)
    gone = set(dropped)
    merged = {t.name: t for t in graph.tensors if t.name not in gone} | {t.name: t for t in tensors}
    new_ops = tuple(op for _, op in placed)
    return Graph(graph.name, tuple(merged.values()), new_ops, (*graph.outputs, *outputs), repeat)


def section(graph: Graph, op: int) -> int:
    """Where op number `op` stands: 0 before the repeat, 1 inside, 2 after it."""
    return 0 if graph.repeat is None else int(op >= graph.repeat.first) + int(op >= graph.repeat.last)


def derived(op: Op, tensors: Mapping[str, Tensor]) -> tuple[Op, Tensor]:
    """A standard op with one output, which gets its shape and the op its work from the rules of the kind."""
    kind, inputs, attrs = KINDS[op.kind], seen_inputs(op, tensors), Attrs(op.attrs)
    out = Tensor(op.outputs[0], *kind.shape(inputs, attrs))
    return replace(op, work=kind.work(inputs, [out], attrs)), out
