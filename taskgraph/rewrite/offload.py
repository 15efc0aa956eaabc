"""Tensors that live on the host: copies over PCIe as ordinary ops, ahead of the ops that take them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Rows, Tensor, Work, with_rows
from taskgraph.rewrite.rebuild import derived, rebuilt, section


def offload(
    graph: Graph, tensors: Iterable[str], *, distance: int | None = None, after: Mapping[str, str] | None = None
) -> Graph:
    """The graph with `tensors` on the host: a host-to-device copy of each ahead of the ops that take it.

    Weights, inputs and states that no op writes (KV pages) are copied in, only the rows that an op takes. Activations
    are copied out after the op that makes them, and in again for the ops that stand more than `distance` ops behind
    it. A copy in may run beside the `distance` ops ahead of its first user and no earlier, or as soon as the op has
    ended that `after` names for its tensor; at any time when neither says so. In a repeat every iteration copies.
    """
    hints, reach = dict(after or {}), distance or 0
    _check_hints(graph, hints, reach)
    made: dict[str, Tensor] = {}
    ahead: dict[int, list[Op]] = {}
    behind: dict[int, list[Op]] = {}
    replaced: dict[tuple[int, int], str] = {}
    for name in dict.fromkeys([*tensors, *hints]):
        maker, source = _maker(graph, name), name
        if maker is not None:
            out = _copy(name, None, "d2h", f"{name}.d2h", ())
            source = out.outputs[0]
            out, made[source] = derived(out, graph.tensor)
            behind.setdefault(maker, []).append(out)
        for label, uses in _groups(graph, name, maker, reach).items():
            place, wait = _start(graph, uses[0].op, maker, distance, hints.get(name))
            op = _copy(source, uses[0].view, "h2d", label, (wait,) if wait else ())
            op, made[op.outputs[0]] = derived(op, {**graph.tensor, **made})
            ahead.setdefault(place, []).append(op)
            replaced |= {(use.op, use.slot): op.outputs[0] for use in uses}
    ops = [
        (i, new)
        for i, op in enumerate(graph.ops)
        for new in (*ahead.get(i, ()), _taking(i, op, replaced), *behind.get(i, ()))
    ]
    return rebuilt(graph, ops, made.values())


def save_to_host(graph: Graph, tensors: Iterable[str]) -> Graph:
    """The graph with a device-to-host copy of each of these activations after the op that makes it.

    The copies are outputs, named "tensor.d2h.out". A tensor of a repeat leaves it by `next` first.
    """
    made: dict[str, Tensor] = {}
    behind: dict[int, list[Op]] = {}
    for name in dict.fromkeys(tensors):
        maker = _maker(graph, name)
        if maker is None or section(graph, maker) == 1:
            raise GraphError(f"tensor {name!r} is not made outside a repeat; save the activations that leave it.")
        op, made[f"{name}.d2h.out"] = derived(_copy(name, None, "d2h", f"{name}.d2h", ()), graph.tensor)
        behind.setdefault(maker, []).append(op)
    ops = [(i, new) for i, op in enumerate(graph.ops) for new in (op, *behind.get(i, ()))]
    return rebuilt(graph, ops, made.values(), outputs=tuple(made))


@dataclass(frozen=True, slots=True)
class _Use:
    """Op number `op` takes a tensor as its input number `slot`, or the rows `view` of it."""

    op: int
    slot: int
    view: Rows | None


def _check_hints(graph: Graph, after: Mapping[str, str], distance: int) -> None:
    if distance < 0:
        raise GraphError(f"the prefetch distance is {distance} ops; it must be 0 or more.")
    names = {op.name for op in graph.ops}
    unknown = next((name for name in after.values() if name not in names), None)
    if unknown is not None:
        raise GraphError(f"graph {graph.name!r} has no op {unknown!r} that a copy could follow.")


def _maker(graph: Graph, name: str) -> int | None:
    """The op that makes an activation, None for a tensor that is given; GraphError if it cannot be offloaded."""
    if name not in graph.tensor:
        raise GraphError(f"graph {graph.name!r} has no tensor {name!r} to offload.")
    if graph.tensor[name].role == "activation":
        maker = next((i for i, op in enumerate(graph.ops) if name in op.outputs), None)
        if maker is None:
            raise GraphError(f"tensor {name!r} is carried around a repeat; offload what the ops in it make or take.")
        return maker
    writer = next((op.name for op in graph.ops if name in op.writes), None)
    if writer is not None:
        raise GraphError(
            f"op {writer!r} writes state {name!r}, so it must stay on the device; offload states that ops only read."
        )
    return None


def _uses(graph: Graph, name: str, maker: int | None, distance: int) -> Iterator[_Use]:
    for i, op in enumerate(graph.ops):
        if maker is None or i > maker + distance:
            yield from (_Use(i, slot, op.views.get(slot)) for slot, n in enumerate(op.inputs) if n == name)


def _groups(graph: Graph, name: str, maker: int | None, distance: int) -> dict[str, list[_Use]]:
    """The uses that one copy serves, by the name of that copy: those of the same rows in the same section."""
    result: dict[str, list[_Use]] = {}
    for use in _uses(graph, name, maker, distance):
        where = section(graph, use.op)
        inside = graph.repeat.name + "/" if graph.repeat is not None and where == 1 else ""
        rows = f".{use.view.start}.{use.view.stop}" if use.view else ""
        label = (name if name.startswith(inside) else inside + name) + ".h2d" + ("_after" if where == 2 else "") + rows
        result.setdefault(label, []).append(use)
    if not result:
        raise GraphError(f"no op takes tensor {name!r} from the host; offload tensors that are used later.")
    return result


def _start(
    graph: Graph, user: int, maker: int | None, distance: int | None, hint: str | None
) -> tuple[int, str | None]:
    """Where a copy for op number `user` stands, and the op that it waits for (None: no other)."""
    low = [0, graph.repeat.first, graph.repeat.last][section(graph, user)] if graph.repeat else 0
    if maker is not None:
        low = max(low, maker + 1)
    if hint is not None:
        ready = next(i for i, op in enumerate(graph.ops) if op.name == hint) + 1
        if ready > user:
            raise GraphError(
                f"a copy for op {graph.ops[user].name!r} cannot follow {hint!r}, which does not stand before it."
            )
        return max(low, ready), hint
    place = max(low, user - (distance or 0))
    return place, graph.ops[place - 1].name if distance is not None and place > low else None


def _copy(source: str, view: Rows | None, direction: str, name: str, after: tuple[str, ...]) -> Op:
    attrs = with_rows({"direction": direction}, {0: view} if view else {})
    return Op(name, "copy", (source,), (f"{name}.out",), Work(), after=after, attrs=attrs)


def _taking(i: int, op: Op, replaced: Mapping[tuple[int, int], str]) -> Op:
    """Op number i with the copies in place of the tensors that it took from the host."""
    slots = {slot: name for (user, slot), name in replaced.items() if user == i}
    if not slots:
        return op
    views = {slot: view for slot, view in op.views.items() if slot not in slots}
    inputs = tuple(slots.get(slot, name) for slot, name in enumerate(op.inputs))
    return replace(op, inputs=inputs, attrs=with_rows(dict(op.attrs), views))
