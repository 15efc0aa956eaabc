"""The flow of a torch graph: calls of aten operators over leaves, with every alias and every change in place known.

A graph of aten calls, as torch.export or make_fx gives it, is run once on fake tensors. What shares memory with what,
and which call changes it, is read off their storages and the operators' schemas, so that later stages never guess:

- a *leaf* is a tensor of the graph: the whole of a storage, or a view of one by a chain of view calls;
- a *storage* that a call changes in place becomes another version of it, unless it belongs to the caller, whose memory
  is then changed in place as eager torch does (a state);
- what depends on nothing but literals is computed at once (a constant).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from taskgraph.embed.calls import OpOverload, Strided, leaves, mapped, written_arguments
from taskgraph.errors import GraphError

MOST_CONSTANT_BYTES: Final = 64 << 20
"""Larger constants are computed by the graph."""
_NOTHING: Final = frozenset({
    "_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size",
})  # fmt: skip
"""Operators that say something of shapes and types, which are fixed here."""
_BY_DATA: Final = frozenset({"cond", "while_loop", "scan", "associative_scan"})
_SAME: Final = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
"""Operators that give back their first argument where they draw nothing; under inference_mode they are calls too."""


class Unsupported(GraphError):  # noqa: N818 - the name says what it means
    """Something in a torch module that a graph cannot hold; the message says what and which way out there is."""


@dataclass(frozen=True, slots=True)
class Use:
    """A leaf as a call sees it: with the changes that the storage had by then."""

    leaf: int
    version: int


@dataclass(frozen=True, slots=True)
class View:
    """How a leaf comes of another of the same storage: a view operator, its arguments after the first, and which of
    several results it is."""

    base: int
    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None


@dataclass(slots=True)
class Leaf:
    """A tensor of the flow: its storage, its layout, its first element's place, and the view that it is (None: all of
    the storage)."""

    storage: int
    layout: Strided
    view: View | None = None
    offset: int = 0


@dataclass(slots=True)
class Storage:
    """Memory: `role` is that of a graph's tensors, or "constant"; `whole` is the leaf that is all of it."""

    name: str
    role: str
    whole: int
    value: torch.Tensor | None = None
    version: int = 0


@dataclass(slots=True)
class Call:
    """A call that computes: arguments hold `Use`s for tensors. `results` are the leaves of the tensors that it returns
    (None for what is not new memory); `changes` are the storages that it changes, as (storage, version before)."""

    name: str
    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int | None]
    changes: list[tuple[int, int]] = field(default_factory=list)
    single: bool = True
    """Whether it returns one tensor, not a list."""

    def uses(self) -> list[Use]:
        """All tensors that it is given, in order."""
        return [v for v in leaves((self.args, self.kwargs)) if isinstance(v, Use)]


@dataclass(slots=True)
class Source:
    """A placeholder of the graph: its name, role ("input" or "weight") and an example or the tensor itself."""

    name: str
    role: str
    value: Any


class Flow:
    """What `flow_of` found: the calls in order, their leaves and storages, and what the graph returns."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.leaves: list[Leaf] = []
        self.storages: list[Storage] = []
        self.outputs: Any = None
        """As the graph returns it: Uses, and values that are no tensors."""
        self.wanted: dict[int, tuple[int, ...]] = {}
        """By storage the shape that an op wants of it in the graph."""
        self.sources: list[int | None] = []
        """The leaf of each placeholder; None for one that is no tensor."""

    def layout(self, use: Use) -> Strided:
        """The layout of a leaf."""
        return self.leaves[use.leaf].layout

    def storage(self, use: Use) -> Storage:
        """The storage of a leaf."""
        return self.storages[self.leaves[use.leaf].storage]

    def is_whole(self, use: Use) -> bool:
        """Whether it is all of its storage, as it lies."""
        return self.leaves[use.leaf].view is None

    def fresh(self, name: str, layout: Strided, role: str = "activation") -> int:
        """The leaf of new memory."""
        self.leaves.append(Leaf(len(self.storages), layout))
        self.storages.append(Storage(name, role, len(self.leaves) - 1))
        return len(self.leaves) - 1


# ------------------------------------------------------------------------------------------------ tracing


def flow_of(graph: fx.GraphModule, sources: Sequence[Source], *, fold: bool = True) -> Flow:
    """The flow of a graph of aten calls whose placeholders are `sources`; unless `fold`, constants are calls too.

    Unsupported names what a graph cannot hold: random numbers, shapes that depend on data, calls that are no operators.
    """
    return _Tracer(sources, fold).run(graph)


def faked(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake of the tensor over memory of its own, from its first byte on; row by row if it is not dense."""
    layout = Strided.of(value)
    stride = layout.stride if layout.dense and not layout.lazy else torch.empty(layout.size, device="meta").stride()
    with mode:
        return torch.empty_strided(layout.size, stride, dtype=value.dtype, device=value.device)


class _Tracer:
    def __init__(self, sources: Sequence[Source], fold: bool) -> None:
        self.flow, self.mode = Flow(), FakeTensorMode(allow_non_fake_inputs=True)
        self._folds = fold
        self._given = sources
        self._known: dict[int, int] = {}
        """Leaf by the identity of its fake."""
        self._storage: dict[int, int] = {}
        self._alive: list[Any] = []
        self._alive_of: dict[int, torch.Tensor] = {}
        self._constants: dict[int, torch.Tensor] = {}
        """Values of constant leaves."""
        devices = {s.value.device for s in sources if isinstance(s.value, torch.Tensor)}
        if len(devices) > 1:
            named = ", ".join(sorted(map(str, devices)))
            raise Unsupported(f"the tensors are on several devices, {named}; move module and inputs to one.")

    def run(self, graph: fx.GraphModule) -> Flow:
        fakes: list[Any] = []
        for source in self._given:
            if not isinstance(source.value, torch.Tensor):
                self.flow.sources.append(None)
                fakes.append(source.value)
                continue
            if source.value.layout != torch.strided or source.value.is_quantized:
                raise Unsupported(f"{source.name!r} is sparse or quantised; give dense tensors.")
            fake = faked(self.mode, source.value)
            leaf = self._enter(source.name, fake, source.role)
            if source.role != "input":
                self.flow.storages[-1].value = source.value.detach()
            self.flow.sources.append(leaf)
            fakes.append(fake)
        with torch.no_grad():
            made = self._graph(graph, fakes)
        self.flow.outputs = mapped(made, self._use)
        return self.flow

    # -- nodes -----------------------------------------------------------------------------------

    def _graph(self, graph: fx.GraphModule, given: Sequence[Any]) -> Any:
        env: dict[fx.Node, Any] = {}
        arguments = iter(given)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(arguments)
            elif node.op == "get_attr":
                env[node] = self._attribute(graph, str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                args = fx.node.map_arg(node.args, env.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                env[node] = self._node(node, tuple(args), dict(kwargs))
        raise Unsupported("the graph returns nothing.")

    def _attribute(self, graph: fx.GraphModule, path: str) -> Any:
        value: Any = graph
        for part in path.split("."):
            value = getattr(value, part)
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise Unsupported(
                f"{path!r} is a tensor of a transform of functions (torch.vmap, torch.func), without value"
            )
        fake = faked(self.mode, value)
        leaf = self._enter(path.replace(".", "_"), fake, "constant")
        self.flow.storages[-1].value = self._constants[leaf] = value.detach()
        return fake

    def _node(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if isinstance(target, OpOverload):
            if target._opname in _NOTHING:
                return None
            return self._call(node.name, target, args, kwargs)
        name = getattr(target, "__name__", str(target))
        if name == "wrap_with_set_grad_enabled":
            return self._graph(args[1], args[2:])
        if name == "wrap_with_autocast" and args[2] is False:
            return self._graph(args[4], args[5:])
        if name == "_enter_autocast" and not (kwargs.get("enabled", args[2] if len(args) > 2 else True)):
            return None
        if name in ("_set_grad_enabled", "_exit_autocast"):
            return None
        if target in (operator.getitem, getattr) or not any(
            isinstance(v, (torch.Tensor, fx.GraphModule)) for v in leaves((args, kwargs))
        ):
            return target(*args, **kwargs)
        if isinstance(target, HigherOrderOperator) and name in _BY_DATA:
            raise Unsupported(
                f"{node.name} is torch.{name}, which chooses by data what runs, and a plan has one order of ops; write "
                "it with torch.where, or as a Python `if` or loop, at which torch.compile breaks the graph."
            )
        what = "autocast" if "autocast" in name else f"{name!r}, which is no operator of torch"
        raise Unsupported(
            f"{node.name} calls {what}; run that part outside, or let torch.compile break the graph there."
        )

    # -- calls -----------------------------------------------------------------------------------

    def _enter(self, name: str, fake: torch.Tensor, role: str = "activation") -> int:
        leaf = self.flow.fresh(name, Strided.of(fake), role)
        self._know(fake, leaf)
        self._storage[_memory(fake)] = self.flow.leaves[leaf].storage
        return leaf

    def _know(self, fake: torch.Tensor, leaf: int) -> None:
        self._known[id(fake)] = leaf
        self._alive_of.setdefault(leaf, fake)
        self._alive.append(fake)

    def _use(self, value: Any) -> Any:
        """What a call is given, with leaves in place of tensors."""
        if not isinstance(value, torch.Tensor):
            return value
        leaf = self._known.get(id(value))
        if leaf is None:
            raise Unsupported(f"a tensor of {list(value.shape)} came from outside the graph.")
        return Use(leaf, self.flow.storages[self.flow.leaves[leaf].storage].version)

    def _call(self, name: str, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, args = _plain_view(target, args)
        refuse_random(name, target, args, kwargs)
        if target.namespace == "aten" and target._opname in _SAME:
            return args[0]
        given = (mapped(args, self._use), mapped(kwargs, self._use))
        try:
            with self.mode:
                made = target(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Unsupported(
                f"the shape or value of {name} ({target}) depends on data; let torch.compile break the graph there."
            ) from error
        written = _written(target, args, kwargs)
        results = [v for v in leaves(made) if isinstance(v, torch.Tensor)]
        if any(not isinstance(v, (torch.Tensor, type(None))) for v in leaves(made)):
            raise Unsupported(f"{name} ({target}) returns a number that depends on data.")
        single = isinstance(made, torch.Tensor)
        if not written and results and all(_memory(r) in self._storage for r in results):
            self._views(target, given, results, single)
            return made
        changes = self._changes(written)
        new: list[int | None] = []
        for i, fake in enumerate(results):
            if id(fake) in self._known:
                new.append(None)
            elif _memory(fake) in self._storage and written:
                self._views(torch.ops.aten.alias.default, ((self._use(written[0]),), {}), [fake], True)
                new.append(None)
            else:
                new.append(self._enter(name if single else f"{name}_{i}", fake))
        call = Call(name, target, given[0], given[1], new, changes, single)
        if not self._folds or not self._fold(call, new):
            self.flow.calls.append(call)
        return made

    def _views(self, target: OpOverload, given: Any, results: list[torch.Tensor], single: bool) -> None:
        args, kwargs = given
        base: Use = args[0]
        here = self._alive_of[base.leaf]
        for i, fake in enumerate(results):
            if id(fake) in self._known:
                continue
            if Strided.of(fake) == Strided.of(here) and fake.storage_offset() == here.storage_offset():
                self._know(fake, base.leaf)  # the same tensor by another name
                continue
            self.flow.leaves.append(
                Leaf(
                    self.flow.leaves[base.leaf].storage,
                    Strided.of(fake),
                    View(base.leaf, target, tuple(args[1:]), kwargs, None if single else i),
                    int(fake.storage_offset()),
                )
            )
            self._know(fake, len(self.flow.leaves) - 1)

    def _changes(self, written: list[torch.Tensor]) -> list[tuple[int, int]]:
        found = {}
        for fake in written:
            number = self._storage[_memory(fake)]
            storage = self.flow.storages[number]
            found[number] = storage.version
        for number in found:
            storage = self.flow.storages[number]
            if storage.role in ("input", "weight", "state"):
                storage.role = "state"
            else:
                storage.version += 1
        return list(found.items())

    def _fold(self, call: Call, new: list[int | None]) -> bool:
        """Compute a call of constants at once."""
        uses = call.uses()
        if call.changes or any(self._value_of(u.leaf) is None or u.version for u in uses):
            return False
        layouts = [self.flow.leaves[leaf].layout for leaf in new if leaf is not None]
        if sum(layout.nbytes for layout in layouts) > MOST_CONSTANT_BYTES or None in new:
            return False
        args, kwargs = mapped((call.args, call.kwargs), lambda v: self._value_of(v.leaf) if isinstance(v, Use) else v)
        with torch.no_grad(), torch.inference_mode(False):
            made = [v for v in leaves(call.target(*args, **kwargs)) if isinstance(v, torch.Tensor)]
        for leaf, value in zip(new, made, strict=True):
            assert leaf is not None
            storage = self.flow.storages[self.flow.leaves[leaf].storage]
            layout = self.flow.leaves[leaf].layout
            if value.device.type != "meta":
                laid = torch.empty_strided(layout.size, layout.stride, dtype=value.dtype, device=value.device)
                value = laid.copy_(value)
            storage.role, storage.value = "constant", value
            self._constants[leaf] = value
        return True

    def _value_of(self, leaf: int) -> torch.Tensor | None:
        """The value of a constant leaf or a view of one."""
        if leaf not in self._constants:
            view = self.flow.leaves[leaf].view
            base = None if view is None else self._value_of(view.base)
            if view is None or base is None:
                return None
            made = view.target(base, *view.args, **view.kwargs)
            self._constants[leaf] = made if view.item is None else made[view.item]
        return self._constants[leaf]


def _memory(fake: torch.Tensor) -> int:
    return int(fake.untyped_storage()._cdata)


def _written(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    names = written_arguments(target)
    if not names:
        return []
    given = {a.name: v for a, v in zip(target._schema.arguments, args, strict=False)} | kwargs
    return [v for n in names for v in leaves(given.get(n)) if isinstance(v, torch.Tensor)]


_LIKE: Mapping[str, Callable[[], OpOverload]] = {
    "expand_as": lambda: torch.ops.aten.expand.default,
    "view_as": lambda: torch.ops.aten.view.default,
    "reshape_as": lambda: torch.ops.aten.reshape.default,
}


def _plain_view(target: OpOverload, args: tuple[Any, ...]) -> tuple[OpOverload, tuple[Any, ...]]:
    """The same view with sizes in place of a tensor that has them."""
    if target.namespace == "aten" and target._opname in _LIKE:
        return _LIKE[target._opname](), (args[0], list(args[1].shape))
    return target, args


# ------------------------------------------------------------------------------------------------- chance

_SILENT: Final = {"train": False, "training": False, "dropout_p": 0.0, "p": 0.0, "dropout": 0.0}
"""Arguments with which an operator that can be random is not."""


def refuse_random(name: str, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Unsupported where a call draws random numbers: a replay would draw others than eager torch does."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return
    given = {a.name: v for a, v in zip(target._schema.arguments, args, strict=False)} | kwargs
    for argument in target._schema.arguments:
        if argument.name in _SILENT:
            value = given.get(argument.name, argument.default_value if argument.has_default_value() else None)
            if value == _SILENT[argument.name]:
                return
    raise Unsupported(f"{name} ({target}) draws random numbers; call module.eval(), or draw them outside.")
