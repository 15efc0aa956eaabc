"""The scheduler "auto": list schedules, and a search where the bounds leave room for a better one."""

from dataclasses import replace

from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.evaluate import Assignment
from taskgraph.schedule.problem import Budget, Problem
from taskgraph.schedule.solve import rules
from taskgraph.schedule.solve.found import best_of, in_sequence, or_sequential
from taskgraph.schedule.solve.packing import packings

AUTO_OP_S, ENOUGH = 0.02, 1.01
"""What it searches at most, in seconds for every op of the graph, and the gap at which it stops."""


def auto(problem: Problem, budget: Budget) -> Assignment:
    """The shortest list schedule, or for a GPU what the search finds where that could be much better."""
    baseline, found = in_sequence(problem), [*packings(problem)]
    best_s = min(each.makespan_s for each in (baseline, *found))
    if _room(problem, best_s, budget.nano_batches):
        from taskgraph.schedule.solve.explore import search

        seconds = min(budget.seconds, AUTO_OP_S * len(problem.graph.ops))
        found += search(problem, replace(budget, seconds=seconds), best_s)
    return or_sequential(best_of(found, baseline, budget), baseline)


def _room(problem: Problem, best_s: float, nano_batches: bool) -> bool:
    """Whether a search could do much better than `best_s` on a GPU: chains bind unless slices may overlap each other.
    A large graph is left to the lists."""
    if problem.device.kind != "gpu" or (problem.graph.repeat is None and problem.n >= rules.FROM):
        return False
    bounds = lower_bounds(problem)
    return max(replace(bounds, chain_s=0.0).best_s if nano_batches else bounds.best_s, 1e-12) * ENOUGH < best_s
