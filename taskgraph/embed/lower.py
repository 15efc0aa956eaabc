"""From a flow of aten calls to a graph: storages become tensors, calls become ops.

What a pattern recognises becomes an op of a kind of `taskgraph.ops` or of this room; every other call becomes an `aten`
op, which runs the call itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import taskgraph as tg
from taskgraph.embed import work
from taskgraph.embed.calls import Strided, encoded, leaves, mapped, name_of, our_dtype, text_of
from taskgraph.embed.flow import Call, Flow, Unsupported, Use
from taskgraph.embed.kinds import ATEN
from taskgraph.errors import GraphError
from taskgraph.graph.op import Attr

Buffer = tuple[int, int]
"""A storage and how often it was changed."""


@dataclass(frozen=True, slots=True)
class Residence:
    """Where a result is: the tensor of the graph, how it lies there, and the views to take of it, the first first."""

    tensor: str
    layout: Strided
    shape: tuple[int, ...]
    views: tuple[tuple[Any, ...], ...] = ()

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The result within the memory of the graph's tensor."""
        value = self.layout.on(buffer)
        for target, args, kwargs, item in self.views:
            made = target(value, *args, **kwargs)
            value = made if item is None else made[item]
        return value


@dataclass(frozen=True, slots=True)
class Recognised:
    """What an op of the graph was: the calls of torch that it stands for, by their names, and its kind."""

    op: str
    kind: str
    calls: tuple[str, ...]


@dataclass(slots=True)
class Lowered:
    """A graph and what of torch its tensors are."""

    graph: tg.Graph
    tensors: dict[str, torch.Tensor]
    """Weights, states and constants by name, as the graph's tensors have them."""
    sources: list[Residence | None]
    outputs: Any
    """As the module returns it: Places, and values that are no tensors."""
    recognised: tuple[Recognised, ...] = ()


@dataclass(slots=True)
class Site:
    """What a pattern emits into: the builder, and where the tensors of the flow are in it."""

    flow: Flow
    builder: tg.GraphBuilder
    values: dict[Buffer, tg.Value] = field(default_factory=dict)
    recognised: list[Recognised] = field(default_factory=list)

    def buffer(self, use: Use) -> Buffer:
        """The buffer that a use lies in."""
        number = self.flow.leaves[use.leaf].storage
        storage = self.flow.storages[number]
        return number, 0 if storage.role == "state" else use.version

    def value(self, use: Use) -> tg.Value:
        """The graph's tensor that a use lies in."""
        return self.values[self.buffer(use)]

    def root(self, use: Use) -> Strided:
        """How the whole of a use's storage lies in the graph's tensor."""
        return self.flow.leaves[self.flow.storage(use).whole].layout

    def make(self, leaf: int, value: tg.Value, version: int = 0) -> None:
        """Say that the graph's tensor `value` is the storage of a leaf."""
        self.values[self.flow.leaves[leaf].storage, version] = value

    def wanted(self, leaf: int) -> tuple[int, ...] | None:
        """The shape that ops want of a leaf's storage, if any does."""
        return self.flow.wanted.get(self.flow.leaves[leaf].storage)

    def free_name(self, stem: str) -> str:
        """A name for an op or a tensor that no other has."""
        name, number = stem, 1
        while name in self.builder._names or name in self.builder._tensors:
            number += 1
            name = f"{stem}_{number}"
        return name


def lower(name: str, flow: Flow, matches: Sequence["Match"] = ()) -> Lowered:
    """The graph of a flow; each of `matches` replaces its calls by an op where the last of them stands."""
    site = Site(flow, tg.GraphBuilder(name))
    tensors, sources = _declare(site)
    at = {match.calls[-1]: match for match in matches}
    covered = {i for match in matches for i in match.calls}
    for i in _alive(flow, covered, at):
        if i in at:
            emit_match(site, at[i])
        elif i not in covered:
            emit_call(site, flow.calls[i])
    outputs = _outputs(site)
    graph = site.builder.build()
    used = {n for op in graph.ops for n in op.inputs} | {p.tensor for p in leaves(outputs) if isinstance(p, Residence)}
    kept = tuple(t for t in graph.tensors if t.role == "activation" or t.name in used or t.name in graph.outputs)
    graph = tg.Graph(graph.name, kept, graph.ops, graph.outputs)
    sources = [p if p is not None and p.tensor in graph.tensor else None for p in sources]
    tensors = {n: t for n, t in tensors.items() if n in graph.tensor}
    return Lowered(graph, tensors, sources, outputs, tuple(site.recognised))


class NoFit(Exception):  # noqa: N818 - handled by whoever tries a match
    """The tensors of a match turned out to lie so that its kind does not take them."""


@dataclass(frozen=True, slots=True)
class Match:
    """Calls of a flow, in order, that one op of a kind stands for; nothing else needs what the inner ones make.

    `emit` appends the op, or raises NoFit before it appends anything: then the calls are emitted as they are."""

    calls: tuple[int, ...]
    kind: str
    emit: Callable[[Site], str]
    """Returns the name of the op."""


def emit_match(site: Site, match: Match) -> None:
    """Append the op of a match."""
    calls = [site.flow.calls[i] for i in match.calls]
    try:
        op = match.emit(site)
    except NoFit:
        for call in calls:
            emit_call(site, call)
        return
    site.recognised.append(Recognised(op, match.kind, tuple(name_of(c.target) for c in calls)))


def _alive(flow: Flow, covered: set[int], at: dict[int, "Match"]) -> list[int]:
    """The calls that somebody needs, in order."""
    needed = {(flow.leaves[u.leaf].storage) for u in leaves(flow.outputs) if isinstance(u, Use)}
    keep: list[int] = []
    for i in range(len(flow.calls) - 1, -1, -1):
        call = flow.calls[i]
        makes = {flow.leaves[leaf].storage for leaf in call.results if leaf is not None}
        changes = {s for s, _ in call.changes}
        lives = bool(makes & needed) or any(flow.storages[s].role == "state" or s in needed for s in changes)
        acts = not call.results and not changes  # it asserts, prints or sends something
        if lives or acts or i in covered:
            keep.append(i)
            needed |= {flow.leaves[u.leaf].storage for u in call.uses()}
    return keep[::-1]


# -------------------------------------------------------------------------------------------- declaring


def _declare(site: Site) -> tuple[dict[str, torch.Tensor], list[Residence | None]]:
    """Inputs, weights, states and constants."""
    flow, builder = site.flow, site.builder
    tensors: dict[str, torch.Tensor] = {}
    given = {leaf for leaf in flow.sources if leaf is not None}
    for number, storage in enumerate(flow.storages):
        if storage.role == "activation":
            continue
        layout = flow.leaves[storage.whole].layout
        kept = layout.size if storage.role != "input" and layout.plain else flow.wanted.get(number)
        shape, dtype = layout.spec(kept)
        name = site.free_name(storage.name)
        make = (
            builder.input if storage.role == "input" else builder.state if storage.role == "state" else builder.weight
        )
        site.values[number, 0] = make(name, shape, dtype)
        if storage.value is not None:
            tensors[name] = memory_of(storage.value, layout, shape)
        elif storage.whole not in given:
            raise Unsupported(f"the constant {name!r} has no value.")
    sources = [None if leaf is None else _place(site, Use(leaf, 0)) for leaf in flow.sources]
    return tensors, sources


def memory_of(tensor: torch.Tensor, layout: Strided, shape: tuple[int, ...]) -> torch.Tensor:
    """The memory of a tensor as the graph's tensor of `layout` and `shape` has it: a view, or a copy where it is not
    dense."""
    if not layout.elements:
        return torch.zeros(shape, dtype=torch.uint8, device=tensor.device)
    here = Strided.of(tensor)
    if here != layout:
        made = torch.empty_strided(layout.size, layout.stride, dtype=tensor.dtype, device=tensor.device)
        tensor = made.copy_(tensor.detach())
    if layout.plain:
        return tensor.detach().view(shape)
    flat = tensor.detach().as_strided((max(layout.extent, 1),), (1,))
    return flat.view(shape) if layout.dense and our_dtype(layout.dtype) else flat.view(torch.uint8)


def _place(site: Site, use: Use) -> Residence:
    views = []
    flow, leaf = site.flow, use.leaf
    while (view := flow.leaves[leaf].view) is not None:
        views.append((view.target, view.args, view.kwargs, view.item))
        leaf = view.base
    value = site.value(use)
    return Residence(value.name, flow.leaves[leaf].layout, value.shape, tuple(views[::-1]))


def _outputs(site: Site) -> Any:
    made = False

    def placed(value: Any) -> Any:
        nonlocal made
        if not isinstance(value, Use):
            return value
        buffer = site.values[site.buffer(value)]
        if buffer.tensor.role == "activation":
            site.builder.output(buffer)
            made = True
        return _place(site, value)

    outputs = mapped(site.flow.outputs, placed)
    if not made:
        states = [v for v in site.values.values() if v.tensor.role == "state"]
        if not site.builder._ops or not states:
            raise Unsupported("the module computes nothing from its inputs, so that there is nothing to plan.")
        site.builder.output(states[0])
    return outputs


# --------------------------------------------------------------------------------------- what patterns emit


Operand = tuple[Use, tuple[int, ...]]
"""A tensor and the shape that a kind wants of it, row by row."""


def named(site: Site, leaf: int, make: Callable[[str], tg.Value], stem: str) -> str:
    """Append an op by `make` (given a free name) whose result is the storage of `leaf`; NoFit where it refuses."""
    name = site.free_name(stem)
    try:
        value = make(name)
    except GraphError:
        raise NoFit from None
    site.make(leaf, value)
    return name


def shaped(site: Site, stem: str, operands: Sequence[Operand], leaf: int, make: Callable[..., tg.Value]) -> str:
    """Append the op that `make` makes of the operands (and `name=`), whose result is the storage of `leaf`.

    Where a tensor of the graph has another shape, or is more than the operand, or an operand does not lie row by row,
    the op is one of the kind "aten.KIND" instead: the same with views that are taken at capture. NoFit where `make`
    refuses the operands.
    """
    values = [site.value(use) for use, _ in operands]
    layouts = [site.flow.layout(use) for use, _ in operands]
    whole = [lies.plain and lies.elements == math.prod(v.shape) for lies, v in zip(layouts, values, strict=True)]
    if all(whole) and all(v.shape == shape for v, (_, shape) in zip(values, operands, strict=True)):
        return named(site, leaf, lambda name: make(*values, name=name), stem)
    scratch = tg.GraphBuilder("scratch")
    stand_ins = [scratch.input(f"x{i}", shape, site.flow.layout(use).name) for i, (use, shape) in enumerate(operands)]
    try:
        made = make(*stand_ins, name="op")
    except GraphError:
        raise NoFit from None
    (op,) = scratch._ops
    attrs = {**dict(op.attrs), "out_shape": made.shape}
    shapes = [shape for _, shape in operands]
    return viewed(site, f"{ATEN}.{op.kind}", stem, [use for use, _ in operands], leaf, attrs, op.work, shapes)


def viewed(
    site: Site,
    kind: str,
    stem: str,
    uses: Sequence[Use],
    leaf: int,
    attrs: Mapping[str, Attr],
    work: tg.Work,
    shapes: Sequence[tuple[int, ...]] = (),
) -> str:
    """Append an op of a kind of this room: its operands are views of its inputs, which its text says, in these shapes
    if any are given."""
    flow, values = site.flow, list[tg.Value]()
    layouts, operands = list[Strided](), list[Any]()
    for use in uses:
        value = site.value(use)
        if value not in values:
            values.append(value)
            layouts.append(site.root(use))
        operands.append({"i": values.index(value), "v": _views(flow, use.leaf)})
    layout, name = flow.leaves[leaf].layout, site.free_name(stem)
    for operand, shape in zip(operands, shapes, strict=False):
        operand["as"] = list(shape)
    body = {"in": [one.to_json() for one in layouts], "out": [layout.to_json()], "operands": operands}
    spec = tg.spec(f"{name}.out", *layout.spec(site.wanted(leaf)))
    (made,) = site.builder.op((kind, {**attrs, "program": text_of(body)}), values, [spec], work, name)
    site.make(leaf, made)
    return name


def operand_texts(
    site: Site, uses: Sequence[Use], shapes: Sequence[tuple[int, ...]] = ()
) -> tuple[list[tg.Value], dict[str, Any]]:
    """The inputs of an op whose operands are views of them, and what its text says of both."""
    values, layouts, operands = list[tg.Value](), list[Strided](), list[Any]()
    for use in uses:
        value = site.value(use)
        if value not in values:
            values.append(value)
            layouts.append(site.root(use))
        operands.append({"i": values.index(value), "v": _views(site.flow, use.leaf)})
    for operand, shape in zip(operands, shapes, strict=False):
        operand["as"] = list(shape)
    return values, {"in": [one.to_json() for one in layouts], "operands": operands}


# --------------------------------------------------------------------------------------- the call itself


def emit_call(site: Site, call: Call) -> None:
    """Append the call as it is."""
    flow, order = site.flow, list[tg.Value]()
    changed = dict(call.changes)
    inputs: list[tuple[tg.Value, Strided, bool]] = []
    index: dict[str, int] = {}
    outs: list[tuple[str, Strided, int, int]] = []
    versions: dict[int, int] = {}
    copies: list[list[int]] = []

    def given(use: Use) -> int:
        value, state = site.value(use), flow.leaves[use.leaf].storage in changed
        if value.name not in index:
            index[value.name] = len(inputs)
            inputs.append((value, site.root(use), state and flow.storage(use).role == "state"))
        return index[value.name]

    stem = site.free_name(call.name)
    for number, before in call.changes:
        storage = flow.storages[number]
        if storage.role == "state":
            continue
        versions[number] = len(outs)
        copies.append([given(Use(storage.whole, before)), len(outs)])
        outs.append((f"{stem}.{storage.name}", flow.leaves[storage.whole].layout, storage.whole, before + 1))
    results: list[int | None] = []
    for leaf in call.results:
        if leaf is None:
            results.append(None)
            continue
        results.append(len(outs))
        outs.append((f"{stem}.out{len(outs) or ''}", flow.leaves[leaf].layout, leaf, 0))

    def tensor(value: Any) -> Any:
        if not isinstance(value, Use):
            return None
        number = flow.leaves[value.leaf].storage
        where = {"o": versions[number]} if number in versions else {"i": given(value)}
        views = _views(flow, value.leaf)
        return {**where, "v": views}

    body = {
        "call": name_of(call.target),
        "args": encoded(list(call.args), tensor),
        "kwargs": {k: encoded(v, tensor) for k, v in call.kwargs.items()},
        "copies": copies,
        "results": results,
    }
    body["in"] = [layout.to_json() for _, layout, _ in inputs]
    body["out"] = [layout.to_json() for _, layout, _, _ in outs]
    order = [value.written() if state else value for value, _, state in inputs]
    specs = [tg.spec(name, *layout.spec(site.wanted(leaf))) for name, layout, leaf, _ in outs]
    made = site.builder.op((ATEN, {"program": text_of(body)}), order, specs, work.of_call(flow, call), stem)
    for value, (_, _, leaf, version) in zip(made, outs, strict=True):
        site.make(leaf, value, version)
    site.recognised.append(Recognised(stem, ATEN, (name_of(call.target),)))


def _views(flow: Flow, leaf: int) -> list[Any]:
    """The text of the views that a leaf is of its storage."""
    chain: list[Any] = []
    while (view := flow.leaves[leaf].view) is not None:
        args, kwargs = ([encoded(v, _no_tensor) for v in view.args], dict(view.kwargs))
        chain.append([name_of(view.target), args, {k: encoded(v, _no_tensor) for k, v in kwargs.items()}, view.item])
        leaf = view.base
    return chain[::-1]


def _no_tensor(value: Any) -> Any:
    if isinstance(value, Use):
        raise GraphError("a view takes another tensor as an argument.")
    return None
