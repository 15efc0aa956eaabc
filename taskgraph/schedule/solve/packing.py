"""The scheduler "list": list schedules on every layout and by every rule, of which the shortest counts."""

from collections.abc import Iterator
from dataclasses import replace

from taskgraph.schedule.evaluate import Assignment, evaluate
from taskgraph.schedule.problem import Budget, Problem
from taskgraph.schedule.solve import lists, rules
from taskgraph.schedule.solve.found import Found, collectives_ordered, in_sequence, shortest

LARGE = 20_000
"""From so many ops on, fewer list schedules are made."""


def packed(problem: Problem, budget: Budget) -> Assignment:
    """The shortest list schedule, also where the sequential one is shorter; that one where no op fits a lane."""
    return shortest(packings(problem), in_sequence(problem)).chosen()


def packings(problem: Problem) -> Iterator[Found]:
    """List schedules: serial ones on every layout, and parallel ones on lanes that share the device, where ops may be
    launched on some of its SMs. A large graph for a GPU gets the parallel ones alone, which fit it better."""
    gpu = problem.device.kind == "gpu"
    layouts = [] if gpu and problem.n >= LARGE else lists.layouts(problem.device)
    if problem.device.kind == "cpu" and any(op.demand.sm is not None for op in problem.graph.ops):
        layouts = [each for each in layouts if each.table[:, 3].max() == 1]  # a thread of one core stays on its core
    for layout in layouts:
        made = lists.pack(problem, layout)
        if made is not None:
            named = replace(made, made_by=f"list on {lists.label(layout)}")
            yield collectives_ordered(Found(problem, named, evaluate(problem, named)))
    if gpu:
        for rule, made, times in rules.by_rules(problem, rules.FEW if problem.n >= rules.FROM else rules.MANY):
            yield collectives_ordered(Found(problem, replace(made, made_by=f"list with {rule.label()}"), times))
