"""The sim backend: any plan on any device spec, no tensors; its clock is the evaluator's."""

from collections.abc import Collection, Mapping
from typing import Any

from taskgraph.graph.graph import Graph
from taskgraph.runtime.executable import Executable, Options
from taskgraph.schedule.plan import Plan, Timeline
from taskgraph.schedule.planner import replay_times


class SimExecutable(Executable):
    """Advances a simulated clock; `elapsed_s` adds up the replays so far. It has no tensors: what is bound or given is
    not looked at, the outputs are empty, and there is nothing to check."""

    def __init__(self, graph: Graph, plan: Plan, options: Options | None = None) -> None:
        super().__init__(graph, plan, options)
        simulated = plan.timeline.kind == "simulated"  # with the prices that it was planned with, measured ones too
        self._times = plan.timeline if simulated else replay_times(graph, plan)
        self.elapsed_s = 0.0

    @property
    def outputs(self) -> Mapping[str, Any]:
        return {}

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {}

    @property
    def memory_bytes(self) -> int:
        return 0

    def _bind(self, values: Mapping[str, Any]) -> None:
        pass

    def _launch(self, stream: object) -> None:
        self.elapsed_s += self._times.makespan_s

    def _results(self) -> dict[str, Any]:
        return {}

    def _timeline(self) -> Timeline:
        return self._times

    def _check(self, kinds: Collection[str] | None) -> None:
        pass
