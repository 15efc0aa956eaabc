"""What every backend's Executable is: called by one thread at a time, open until it is closed, closed by `with`.

A backend is a class that derives from `Executable`, or from `runtime.tensors.TensorExecutable` where it holds tensors,
and a line in the registry (`runtime.backend`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from taskgraph.errors import ExecutionError, GraphError
from taskgraph.graph.graph import Graph
from taskgraph.record import instance
from taskgraph.runtime.cpu.ways import Ways
from taskgraph.runtime.turns import Turns
from taskgraph.schedule.plan import Plan, Span, Timeline

if TYPE_CHECKING:
    from taskgraph.runtime.distributed import Group

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What `compile` was given beside the graph, the plan and the backend: see there."""

    functions: Mapping[str, Function] = field(default_factory=dict)
    device: str | None = None
    group: "Group | None" = None
    ways: Ways | None = None
    check: bool = False


class Executable(ABC):
    """A captured plan on a backend. `close()` frees its threads and memory; a `with` block does it for you.

    Several threads may call it: a call waits for those before it, so that its answers belong to its inputs.
    ExecutionError where it is called after `close`, from one of its own ops, or in a forked child.
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    """Which of the options "device", "group" and "ways" the backend has a use for; `compile` refuses the others."""

    def __init__(self, graph: Graph, plan: Plan, options: Options | None = None) -> None:
        self._graph, self._plan, self._options = graph, plan, options or Options()
        self._turns, self._closed = Turns(graph.name), False

    # -- what callers use ------------------------------------------------------------------------

    @property
    @abstractmethod
    def outputs(self) -> Mapping[str, Any]:
        """The output buffers by tensor name; each replay overwrites them."""

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """The input buffers by tensor name: write into them before `launch()`, or `bind` your own."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes that it holds itself: arena, inputs and outputs, not what is bound."""

    def bind(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Use these tensors in place, without a copy, from the next replay on.

        GraphError, and nothing is bound, when a name is unknown, a shape or dtype differs, or the memory cannot be used
        so; at the next replay, when what it writes to shares memory with anything else."""
        with self._turns.next():
            self._begin()
            self._bind(_by_name(tensors, named))

    def __call__(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> dict[str, Any]:
        """Copy the given inputs into their buffers, bind weights and states, replay, return copies of the outputs."""
        with self._turns.next():
            self._begin()
            self._give(_by_name(tensors, named))
            self._replay(None)
            return self._results()

    def launch(self, stream: object = None) -> None:
        """Replay once with what is bound. ExecutionError names the op that raised."""
        with self._turns.next():
            if self._closed or self._options.check:
                self._begin()
                self._replay(stream)
            else:  # the same, by the shortest way
                self._launch(stream)

    def timeline(self) -> Timeline:
        """Replay once with a clock around every op; it begins with the start of the first."""
        with self._turns.next():
            self._begin()
            return self._timeline()

    def check(self, kinds: Collection[str] | None = None) -> None:
        """Replay once, op by op, and look at what each op does (of these kinds; None: all).

        ExecutionError, which names the op, for one that changes anything but its outputs and the states that it names
        in `writes`, leaves a part of an output unwritten, or makes NaN out of inputs without any. Ops run twice.
        """
        with self._turns.next():
            self._begin()
            self._check(kinds)

    @property
    def closed(self) -> bool:
        """Whether its memory is gone."""
        return self._closed

    def close(self) -> None:
        """Free everything; a second call does nothing.

        It waits for a call that another thread is in. A forked child only drops its copies."""
        if self._turns.forked:
            self._closed = True
            self._drop()
            return
        with self._turns.next():
            if not self._closed:
                self._closed = True
                self._free()
                self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what a backend says: each runs inside the turn of a call --------------------------------

    def _begin(self) -> None:
        """At the start of a call: ExecutionError when it is closed."""
        if self._closed:
            raise ExecutionError("the executable is closed; compile the plan again.", op="")

    @abstractmethod
    def _bind(self, values: Mapping[str, Any]) -> None:
        """Use these from the next replay on; all of them or, with an error, none."""

    def _give(self, values: Mapping[str, Any]) -> None:
        """What a call was given: as `_bind`, but inputs belong to this call."""
        self._bind(values)

    def _replay(self, stream: object) -> None:
        if self._options.check:
            self._check(None)
        else:
            self._launch(stream)

    @abstractmethod
    def _launch(self, stream: object) -> None:
        """Replay once."""

    @abstractmethod
    def _results(self) -> dict[str, Any]:
        """Copies of the outputs."""

    @abstractmethod
    def _timeline(self) -> Timeline:
        """Replay once and say when each op ran."""

    @abstractmethod
    def _check(self, kinds: Collection[str] | None) -> None:
        """What `check` does."""

    def _free(self) -> None:  # noqa: B027 - not every backend has any
        """End threads and give memory back, in the reverse order of their making."""

    def _drop(self) -> None:  # noqa: B027 - not every backend has any
        """Forget what held memory; after `_free`, and in a forked child in place of it."""


def _by_name(tensors: Mapping[str, Any] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """Both in one; GraphError for what is no mapping."""
    if tensors is None:
        return dict(named)
    return {**instance("tensors", tensors, Mapping, GraphError, "It holds tensors by name."), **named}


def from_first(kind: Literal["measured", "simulated"], origin: str, spans: Iterable[Span]) -> Timeline:
    """A timeline of these spans that begins when the first of them does."""
    every = tuple(spans)
    zero = min(span.start_s for span in every)
    return Timeline(kind, origin, tuple(Span(s.op, s.lane, s.start_s - zero, s.end_s - zero) for s in every))
