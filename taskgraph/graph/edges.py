"""The edges of a list of ops: tensors, control edges and hazards on states; and a topological order by them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from taskgraph.errors import GraphError
from taskgraph.graph.op import Op, Rows


def predecessors(ops: Sequence[Op], loop_results: Mapping[str, str]) -> list[tuple[int, ...]]:
    """Edges by tensors, control edges and state hazards (read after write, write after read or write).

    `loop_results` are the tensors that leave a repeat, each with the tensor of the body that it is.
    """
    index = {op.name: i for i, op in enumerate(ops)}
    producer = {name: i for i, op in enumerate(ops) for name in op.outputs}
    producer |= {result: producer[inner] for result, inner in loop_results.items() if inner in producer}
    states = {name: _State() for op in ops for name in op.writes}
    result: list[tuple[int, ...]] = []
    for i, op in enumerate(ops):
        preds = {producer[name] for name in op.inputs if name in producer}
        for name in op.after:
            if name not in index:
                raise GraphError(f"op {op.name!r} is declared after the unknown op {name!r}.")
            preds.add(index[name])
        if states:
            preds |= _hazards(i, op, states)
        late = next((p for p in preds if p >= i), None)
        if late is not None:
            raise GraphError(f"cycle: op {op.name!r} needs {ops[late].name!r}, which stands at or after it.")
        result.append(tuple(sorted(preds)))
    return result


Access = tuple[Rows | None, int]
"""The rows of a state that an op touches (None: all of them), and the number of the op."""


@dataclass(slots=True)
class _State:
    """Who last wrote, and who has since read, each part of a state."""

    writes: list[Access] = field(default_factory=list)
    reads: list[Access] = field(default_factory=list)


def _hazards(i: int, op: Op, states: Mapping[str, _State]) -> set[int]:
    """The ops that must end before op `i` touches its states; records what it touches."""
    touched = [(n, name) for n, name in enumerate(op.inputs) if name in states]
    if not touched:
        return set()
    parts = {n: _part(op, n) for n, _ in touched}
    preds = {j for n, name in touched for j in _touching(states[name].writes, parts[n])}
    for n, name in touched:
        state, part = states[name], parts[n]
        if name in op.writes:
            preds.update(_touching(state.reads, part))
            state.reads = _outside(state.reads, part)
            state.writes = [*_outside(state.writes, part), (part, i)]
    for n, name in touched:
        if name not in op.writes:
            states[name].reads.append((parts[n], i))
    return preds - {i}


_BATCH = -1
"""The axis of a part that is rows of a batch and not of the tensor."""


def _part(op: Op, n: int) -> Rows | None:
    """What the op touches of its input `n`, a state; None for all of it."""
    view, span = op.views.get(n), op.batch_rows
    if view is not None or span is None:
        return view
    return Rows(_BATCH, span[0] if op.inputs[n] in op.writes else 0, span[1])


def _touching(accesses: Sequence[Access], part: Rows | None) -> list[int]:
    """The ops among `accesses` that share an element with `part`."""
    return [i for other, i in accesses if part is None or other is None or part.overlaps(other)]


def _outside(accesses: Sequence[Access], part: Rows | None) -> list[Access]:
    """`accesses` less those that lie within `part`: whoever comes later is ordered after them by the writer of it."""
    return [] if part is None else [a for a in accesses if a[0] is None or not part.covers(a[0])]


def toposorted(ops: Sequence[Op]) -> list[Op]:
    """Ops in topological order, in order of declaration where that is free (Kahn 1962)."""
    index = {op.name: i for i, op in enumerate(ops)}
    if len(index) < len(ops) or all(index.get(a, 0) < i for i, op in enumerate(ops) for a in op.after):
        return list(ops)
    unknown = next(((op.name, a) for op in ops for a in op.after if a not in index), None)
    if unknown is not None:
        raise GraphError(f"op {unknown[0]!r} is declared after the unknown op {unknown[1]!r}.")
    import networkx  # few graphs come to this

    bare = predecessors([replace(op, after=()) for op in ops], {})
    preds = [{*p, *(index[a] for a in op.after)} for p, op in zip(bare, ops, strict=True)]
    dag: networkx.DiGraph[int] = networkx.DiGraph()
    dag.add_nodes_from(range(len(ops)))
    dag.add_edges_from((before, i) for i, needed in enumerate(preds) for before in needed)
    try:
        return [ops[i] for i in networkx.lexicographical_topological_sort(dag)]
    except networkx.NetworkXUnfeasible:
        stuck = [ops[i].name for i, _ in networkx.find_cycle(dag)]
        raise GraphError(
            f"cycle among ops {', '.join(map(repr, stuck[:8]))}; remove one of their control edges."
        ) from None
