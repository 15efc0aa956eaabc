"""Plans that are there already: from files, and the remembered winners of autotune; the planner makes the others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from taskgraph.errors import PlanError
from taskgraph.graph.device import Device, get
from taskgraph.graph.graph import Graph
from taskgraph.record import function, instance, sequence, text
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan
from taskgraph.schedule.sliced import verify
from taskgraph.tune.autotune import remembered
from taskgraph.units import format_seconds


class KnownPlans:
    """Looks for a graph's plan among files first, then at what autotune remembers, and plans what neither has.

    A file is for the step whose graph is that of its plan, whatever the graphs are called. `backend` and `device` say
    where steps run, as for `tg.compile`; `use_remembered` whether winners are looked up; `say` is told which plan each
    step has, in a line. PlanError for a file that holds no plan.
    """

    def __init__(
        self,
        files: Sequence[str | Path] = (),
        *,
        backend: str = "cpu",
        device: str | None = None,
        use_remembered: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        text("backend", backend, PlanError)
        instance("device", device, (str, type(None)), PlanError, "It is as for tg.compile.")
        instance("use_remembered", use_remembered, bool, PlanError)
        self._plans = {path: Plan.load(path) for path in sequence("files", files, PlanError)}
        self._unused = dict.fromkeys(self._plans)
        self._backend, self._device, self._use_remembered = backend, device, use_remembered
        self._say = function("say", say, PlanError)
        self._steps: list[str] = []

    @property
    def files(self) -> tuple[str | Path, ...]:
        """The plan files."""
        return tuple(self._plans)

    def __call__(self, graph: Graph, device: str | Device) -> Plan:
        """The plan of `graph`. PlanError for a file that is of this graph and of another device."""
        target = get(device)
        self._steps.append(graph.name)
        for path, known in self._plans.items():
            if replace(graph, name=known.graph_name).fingerprint == known.graph:
                self._unused.pop(path, None)
                return self._from_file(path, known, graph, target)
        if self._use_remembered:
            found = remembered(graph, self._backend, self._device or target)
            if found is not None:
                took = found.verdict.packed_s if found.verdict.choice == "packed" else found.verdict.sequential_s
                self._say(
                    f"{graph.name}: the plan that autotune remembers of {found.at or 'an earlier day'}: "
                    f"{found.verdict.choice}, {format_seconds(took)} ({found.kind})"
                )
                return found.plan
        return plan(graph, target)

    def _from_file(self, path: str | Path, known: Plan, graph: Graph, device: Device) -> Plan:
        if (known.device.kind, known.device.sm_count) != (device.kind, device.sm_count):
            raise PlanError(
                f"{path} is a plan for {_described(known.device)}; {graph.name} runs on {_described(device)}. "
                "Plan for this device, or leave the file out."
            )
        named = replace(known, graph=graph.fingerprint, graph_name=graph.name).sealed()
        verify(named, graph)
        self._say(f"{graph.name}: the plan of {path} ({known.made_by})")
        return named

    def check_used(self) -> None:
        """PlanError naming a file whose graph none of the steps has that were planned so far."""
        for path in self._unused:
            known = self._plans[path]
            raise PlanError(
                f"{path} is the plan of {known.graph_name!r} on {known.device.name}; no step here has that graph. "
                f"The steps are {', '.join(dict.fromkeys(self._steps))}. Plan for the same model, dtype and sizes."
            )


def _described(device: Device) -> str:
    return f"{device.name} ({device.sm_count} {'cores' if device.kind == 'cpu' else 'SMs'})"
