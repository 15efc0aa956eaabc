"""Plans that are there already: from files, and the remembered winners of autotune; the planner makes the others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import taskgraph as tg
from taskgraph.tune.autotune import remembered
from taskgraph.units import format_seconds

Planner = Callable[[tg.Graph, "str | tg.Device", str], tg.Plan]
"""(graph, device, scheduler) -> its plan; `tg.plan` is one."""


class KnownPlans:
    """A `Planner` that looks among plan files first, then at what autotune remembers, and plans what neither has.

    A file is for the step whose graph is that of its plan, whatever the graphs are called. `backend` and `run_on` say
    where steps run, `use_remembered` whether winners are looked up, and `say` is told which plan each step has, in a
    line. A scheduler that is asked for by name is run: only "auto" may be answered by a plan that is known.
    """

    def __init__(
        self,
        files: Sequence[Path] = (),
        *,
        backend: str = "cpu",
        run_on: str | None = None,
        use_remembered: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._plans = {path: tg.Plan.load(path) for path in files}
        self._unused = dict.fromkeys(files)
        self._backend, self._run_on, self._use_remembered, self._say = backend, run_on, use_remembered, say
        self._steps: list[str] = []

    @property
    def files(self) -> tuple[Path, ...]:
        """The plan files."""
        return tuple(self._plans)

    def __call__(self, graph: tg.Graph, device: "str | tg.Device", scheduler: str = "auto") -> tg.Plan:
        """The plan of `graph`. PlanError for a file that is of this graph and of another device."""
        if scheduler != "auto":
            return tg.plan(graph, device, scheduler)
        target = tg.devices.get(device)
        self._steps.append(graph.name)
        for path, plan in self._plans.items():
            if replace(graph, name=plan.graph_name).fingerprint == plan.graph:
                self._unused.pop(path, None)
                return self._from_file(path, plan, graph, target)
        if self._use_remembered:
            found = remembered(graph, self._backend, self._run_on or target)
            if found is not None:
                took = found.verdict.packed_s if found.verdict.choice == "packed" else found.verdict.sequential_s
                self._say(
                    f"{graph.name}: the plan that autotune remembers of {found.at or 'an earlier day'}: "
                    f"{found.verdict.choice}, {format_seconds(took)} ({found.kind})"
                )
                return found.plan
        return tg.plan(graph, target)

    def _from_file(self, path: Path, plan: tg.Plan, graph: tg.Graph, device: tg.Device) -> tg.Plan:
        if (plan.device.kind, plan.device.sm_count) != (device.kind, device.sm_count):
            raise tg.PlanError(
                f"{path} is a plan for {_described(plan.device)}; {graph.name} runs on {_described(device)}. "
                "Plan for this device, or leave the file out."
            )
        named = replace(plan, graph=graph.fingerprint, graph_name=graph.name).sealed()
        tg.verify(named, graph)
        self._say(f"{graph.name}: the plan of {path} ({plan.made_by})")
        return named

    def check_used(self) -> None:
        """PlanError naming a file whose graph none of the steps has that were planned so far."""
        for path in self._unused:
            plan = self._plans[path]
            raise tg.PlanError(
                f"{path} is the plan of {plan.graph_name!r} on {plan.device.name}; no step here has that graph. "
                f"The steps are {', '.join(dict.fromkeys(self._steps))}. Plan for the same model, dtype and sizes."
            )


def _described(device: tg.Device) -> str:
    return f"{device.name} ({device.sm_count} {'cores' if device.kind == 'cpu' else 'SMs'})"
