"""What schedulers hand to each other: schedules with their times. And the sequential schedule."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from taskgraph.ops import COLLECTIVES
from taskgraph.schedule.band import gain_band
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, evaluate
from taskgraph.schedule.problem import Budget, Problem

_CLEARLY = 1.01
"""By so much a predicted time must be shorter to count for more than that the gain is surer."""


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule of `problem`, and the times that the one clock gives it."""

    problem: Problem
    assignment: Assignment
    times: Evaluation

    @property
    def makespan_s(self) -> float:
        return self.times.makespan_s

    def gain_band(self) -> float:
        """The relative error of its gain over the sequential order."""
        return gain_band(self.problem, self.assignment, self.times)

    def chosen(self) -> Assignment:
        """The assignment, which says of which problem it is."""
        return replace(self.assignment, problem=self.problem)


def sequential(problem: Problem, budget: Budget | None = None) -> Assignment:
    """The scheduler "sequential": every op in graph order on one lane of the whole device."""
    mode, lane = np.full(problem.n, len(problem.sizes) - 1), np.zeros(problem.n, np.int64)
    layout = Layout.shared(problem.sm_count, 1)
    return Assignment(layout, np.arange(problem.n), lane, mode, made_by="sequential")


def in_sequence(problem: Problem) -> Found:
    """The sequential schedule with its times."""
    made = sequential(problem)
    return Found(problem, made, evaluate(problem, made))


def is_sequential(problem: Problem, made: Assignment) -> bool:
    """Whether this runs op after op, in graph order, on the whole device."""
    one_lane = len(made.layout.lane_partition) == 1 and made.layout.table[0, 2] == problem.sm_count
    whole = (problem.sizes[made.mode] == problem.sm_count).all()
    return bool(one_lane and whole and (made.order == np.arange(problem.n)).all())


def shortest(found: Iterable[Found], otherwise: Found) -> Found:
    """The first of the shortest; `otherwise` where nothing was found."""
    return min(found, key=lambda each: each.makespan_s, default=otherwise)


def best_of(found: Iterable[Found], baseline: Found, budget: Budget) -> Found:
    """The shortest. On a GPU, where a prediction alone decides, that with the largest gain at the lower edge of its
    band, unless another that gains there too is shorter by _CLEARLY."""
    tried = list(found)
    best = shortest(tried, baseline)
    if best.problem.device.kind != "gpu" or not budget.sure:
        return best
    at_edge = [(each.makespan_s * (1.0 + each.gain_band()), each) for each in tried]
    gains = [pair for pair in at_edge if pair[1].makespan_s < baseline.makespan_s]
    surest = min(gains, key=lambda pair: pair[0], default=(0.0, best))[1]
    fastest = shortest((each for seconds, each in at_edge if seconds < baseline.makespan_s), surest)
    return fastest if fastest.makespan_s * _CLEARLY < surest.makespan_s else surest


def or_sequential(found: Found, baseline: Found) -> Assignment:
    """What was found, to be taken only where it is enough faster than the sequential schedule of the same ops."""
    return replace(found.chosen(), against=baseline.chosen())


def collectives_ordered(found: Found) -> Found:
    """The schedule with its collectives one after another, as they start: ranks that issued them in different orders
    would wait for each other (`verify.collectives_in_order`)."""
    chosen, graph = found.assignment, found.problem.graph
    if not any(op.kind in COLLECTIVES and op.integer("ranks") > 1 for op in graph.ops):
        return found
    shared = np.array([op.kind in COLLECTIVES and op.integer("ranks") > 1 for op in graph.flat().ops])
    if {*_unordered(chosen, chosen.order, shared)} <= {(a, b) for a, b in chosen.holds.tolist()}:
        return found
    order = chosen.order[np.argsort(found.times.start_s[chosen.order], kind="stable")]
    pairs = np.array(_unordered(chosen, order, shared), np.int64).reshape(-1, 2)
    held = replace(chosen, order=order, holds=np.concatenate([chosen.holds, pairs]))
    return replace(found, assignment=held, times=evaluate(found.problem, held))


def _unordered(chosen: Assignment, order: np.ndarray, shared: np.ndarray) -> list[tuple[int, int]]:
    """Neighbours among the shared ops in this order that no lane keeps in it."""
    issued = [i for i in order.tolist() if shared[i]]
    return [(a, b) for a, b in pairwise(issued) if chosen.lane[a] != chosen.lane[b]]
