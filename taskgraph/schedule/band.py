"""How far the gain of a schedule over the sequential order may be from its prediction."""

import numpy as np

from taskgraph.schedule.evaluate import Assignment, Evaluation, beside_share
from taskgraph.schedule.problem import Problem


def error_band(problem: Problem) -> float:
    """The bands of the ops, weighted by their times: errors of one model lean the same way, so they do not cancel."""
    weight = problem.best_seconds()
    return float(np.average(problem.band, weights=weight))


def gain_band(problem: Problem, made: Assignment, times: Evaluation) -> float:
    """The relative error of the gain over the sequential order.

    Errors of single ops lean the same way in both, so half of their band is left. While ops run side by side the error
    of the co-running model on pairs that it has not seen comes on top; copies, which are free, aside. On a CPU, whose
    lanes share nothing that is not counted, the band of the ops.
    """
    ops_band = error_band(problem)
    if problem.device.kind != "gpu":
        return ops_band
    kind = "shared_sum" if bool((made.layout.table[:, 3] > 1).any()) else "partition"
    beside = beside_share(problem, times.start_s, times.end_s)
    return float(np.hypot(ops_band / 2.0, beside * problem.together.band(kind)))
