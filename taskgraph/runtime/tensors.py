"""Executables that hold tensors: what the caller gave, what is their own, and whether the capture still fits them."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor
from taskgraph.runtime.buffers import Region, changed_names, check_apart, written_names
from taskgraph.runtime.check import Extent, Watch
from taskgraph.runtime.executable import Executable, Options
from taskgraph.schedule.plan import Plan

T = TypeVar("T")


class TensorExecutable(Executable, Generic[T]):
    """The base of backends with tensors; T is how the backend holds one. The graph is a flat one.

    `_own` are the buffers of the executable by tensor name, `_given` those of the caller, which come first. `_stale`
    says that the next replay must capture, for an address has changed.
    """

    def __init__(self, graph: Graph, plan: Plan, options: Options | None = None) -> None:
        super().__init__(graph.flat(), plan, options)
        self._ops = {op.name: op for op in self._graph.ops}
        self._written = written_names(self._graph)
        self._inputs = {t.name for t in self._graph.with_role("input")}
        self._own: dict[str, T] = {}
        self._given: dict[str, T] = {}
        self._set: set[str] = set()
        """What was given at least once, by `bind` or in a call."""
        self._stale = True

    # -- what callers use ------------------------------------------------------------------------

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The output buffers by tensor name; each replay overwrites them."""
        with self._turns.next():
            self._begin()
            if any(name not in self._given and name not in self._own for name in self._graph.outputs):
                self._check_given()
            return {name: self._shown(name) for name in self._graph.outputs}

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The input buffers by tensor name: write into them before `launch()`, or `bind` your own."""
        with self._turns.next():
            self._begin()
            return {t.name: self._shown(t.name) for t in self._graph.with_role("input")}

    # -- tensors ---------------------------------------------------------------------------------

    def _tensor(self, name: str) -> T:
        found = self._given.get(name)
        return self._own[name] if found is None else found

    def _declared(self, name: str) -> Tensor:
        """What the graph says of a tensor that a caller may give."""
        declared = self._graph.tensor.get(name)
        if declared is None or (declared.role == "activation" and name not in self._graph.outputs):
            raise GraphError(f"graph {self._graph.name!r} has no input, weight, state or output {name!r}.")
        return declared

    def _bind(self, values: Mapping[str, Any]) -> None:
        checked = [(self._declared(name), value) for name, value in values.items()]
        ready = [(declared, value, self._checked(declared, value)) for declared, value in checked]
        for declared, value, given in ready:
            self._use(declared, value, given)
            self._set.add(declared.name)

    @abstractmethod
    def _checked(self, declared: Tensor, value: Any) -> Any:
        """What to keep of a value that is bound, in whatever form `_use` takes; GraphError when it cannot be used."""

    @abstractmethod
    def _use(self, declared: Tensor, value: Any, checked: Any) -> None:
        """Bind what `_checked` made of `value`; sets `_stale` when an address changes."""

    def _give(self, values: Mapping[str, Any]) -> None:
        self._bind(values)
        self._check_inputs()

    def _check_inputs(self) -> None:
        """GraphError when an input was never given."""
        missing = sorted(self._inputs - self._set)
        if missing:
            raise GraphError(f"input {missing[0]!r} of graph {self._graph.name!r} was never given; pass or bind() it.")

    def _check_given(self) -> None:
        """GraphError when a weight or a state is not bound, or what a replay writes to shares memory with others."""
        missing = [t.name for t in self._graph.with_role("weight", "state") if t.name not in self._given]
        if missing:
            raise GraphError(
                f"{len(missing)} weights or states are not bound, the first is {missing[0]!r}; bind() them."
            )
        changed = changed_names(self._graph)
        places = {name: self._place(self._tensor(name)) for name in self._outside()}
        check_apart(Region(address, nbytes, name, name in changed) for name, (address, nbytes) in places.items())

    def _outside(self) -> set[str]:
        """The tensors that lie outside the arena."""
        return {*self._given, *self._inputs, *self._graph.outputs}

    # -- what a backend says of its tensors ------------------------------------------------------

    @abstractmethod
    def _shown(self, name: str) -> Any:
        """A tensor as callers get it, in place."""

    @abstractmethod
    def _place(self, tensor: T) -> tuple[int, int]:
        """Its address and its bytes."""

    @abstractmethod
    def _extent(self, tensor: T | None) -> Extent:
        """The memory of a tensor, or of the arena (None), for `check`."""

    @abstractmethod
    def _one_by_one(self, each: Callable[[Op, Callable[[], Any]], Any]) -> None:
        """`each` with every op in the plan's order and what runs it once."""

    def _check(self, kinds: Collection[str] | None) -> None:
        own = {name: self._extent(self._tensor(name)) for name in self._outside()}
        watch = Watch(self._graph, self._plan, self._extent(None), own)
        self._one_by_one(lambda op, run: watch.run(op, run, kinds is None or op.kind in kinds))
