"""The sim backend: any plan on any device spec, no tensors; its clock is the evaluator's."""

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Self

from taskgraph.errors import ExecutionError
from taskgraph.graph.graph import Graph
from taskgraph.runtime.turns import Turns
from taskgraph.schedule.plan import Plan, Timeline
from taskgraph.schedule.planner import replay_times


class SimExecutable:
    """Advances a simulated clock; `elapsed_s` adds up the replays so far."""

    def __init__(
        self, graph: Graph, plan: Plan, functions: Mapping[str, Callable[..., Any]], check: bool = False
    ) -> None:
        simulated = plan.timeline.kind == "simulated"  # with the prices that it was planned with, measured ones too
        self._timeline = plan.timeline if simulated else replay_times(graph, plan)
        self._turns, self._closed = Turns(graph.name), False
        self.elapsed_s = 0.0

    @property
    def outputs(self) -> Mapping[str, Any]:
        """Always empty: the sim backend has no tensors."""
        return {}

    @property
    def memory_bytes(self) -> int:
        """Always 0: the sim backend has no tensors."""
        return 0

    def bind(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Accepts anything and keeps nothing."""

    def __call__(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> dict[str, Any]:
        """One simulated replay."""
        self.launch()
        return {}

    def launch(self, stream: object = None) -> None:
        """Advance the clock by one replay."""
        with self._turns.next():
            if self._closed:
                raise ExecutionError("the executable is closed; compile the plan again.", op="")
            self.elapsed_s += self._timeline.makespan_s

    def timeline(self) -> Timeline:
        """The simulated timeline of one replay."""
        return self._timeline

    def check(self, kinds: Collection[str] | None = None) -> None:
        """Nothing to look at: the sim backend has no tensors."""

    def close(self) -> None:
        """Nothing to free; later launches raise."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
