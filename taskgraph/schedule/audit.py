"""audit(): whether a plan's times are those of the cost model. `verify` needs no prices; this does, and shares the
planner's clock: it finds what was changed or made by another version, not what the model has wrong."""

import math
from dataclasses import replace

from taskgraph.cost.model import Costs, op_table
from taskgraph.errors import PlanError
from taskgraph.graph.graph import Graph
from taskgraph.schedule.band import error_band
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import replay_times
from taskgraph.schedule.problem import legal_sizes, make_problem
from taskgraph.schedule.sliced import sliced, verify
from taskgraph.schedule.solve.found import in_sequence

TOLERANCE = 1e-6
"""Relative difference of times that is no difference: sums in another order."""


def audit(plan: Plan, graph: Graph, costs: Costs = op_table) -> None:
    """PlanError, with both numbers, where `plan` says another time, bound, error band or sequential time than `costs`
    give; after `verify`, without its rule on memory.

    `costs` are the prices that the plan was made with; a plan by measured op times needs `taskgraph.costs_known`. A
    verdict of measured or replayed runs (autotune's) is not recomputed: those times are not the model's.
    """
    verify(plan, graph, memory=False)
    again = replay_times(graph, plan, costs)
    for said, found in zip(plan.timeline.spans, again.spans, strict=True):
        for what, here, there in (("starts", said.start_s, found.start_s), ("ends", said.end_s, found.end_s)):
            if plan.timeline.kind == "simulated" and not _same(here, there, again.makespan_s):
                raise PlanError(f"op {said.op!r} {what} at {here} s in the plan; by these prices at {there} s.")
    _audit_bounds(plan, graph, costs)
    if not plan.ran:
        problem = make_problem(graph, plan.device, None, costs)
        alone_s = in_sequence(problem).makespan_s
        if not _same(plan.verdict.sequential_s, alone_s, alone_s):
            raise PlanError(
                f"the verdict says {plan.verdict.sequential_s} s for the sequential graph; by these prices it takes "
                f"{alone_s} s."
            )


def _audit_bounds(plan: Plan, graph: Graph, costs: Costs) -> None:
    """Bounds and band are those of the SM counts that planning or searching looks at."""
    cut = sliced(plan, graph)
    used = sorted({plan.sms(i) for i in range(len(plan.steps))})
    found = []
    for sizes in (None, legal_sizes(len(cut.flat().ops), plan.device), used):
        problem = make_problem(cut, plan.device, sizes, costs)
        bounds = replace(lower_bounds(problem), proved_s=plan.bounds.proved_s)
        found.append((bounds, error_band(problem)))
        same = all(_same(getattr(plan.bounds, name), getattr(bounds, name), bounds.best_s) for name in bounds.__slots__)
        if same and (plan.ran or _same(plan.verdict.error_band, found[-1][1], found[-1][1])):
            return
    raise PlanError(
        f"the plan says {plan.bounds} and an error band of {plan.verdict.error_band}; by these prices it has "
        f"{found[0][0]} and {found[0][1]}."
    )


def _same(said: float, found: float, scale: float) -> bool:
    return math.isclose(said, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE * scale)
