"""How far the gain of a schedule over the sequential order may be from its prediction."""

import numpy as np

from taskgraph.schedule.evaluate import Assignment, Evaluation
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
    kind = "shared_sum" if bool((made.layout.rows[:, 3] > 1).any()) else "partition"
    on_sms = problem.use[:, -1, 0] > 0
    beside = _beside_s(times.start_s[on_sms], times.end_s[on_sms]) / times.makespan_s if times.makespan_s else 0.0
    return float(np.hypot(ops_band / 2.0, beside * problem.together.band(kind)))


def _beside_s(start: np.ndarray, end: np.ndarray) -> float:
    """Seconds in which two or more spans run."""
    at = np.concatenate([start, end])
    change = np.concatenate([np.ones(len(start)), -np.ones(len(end))])
    order = np.lexsort((change, at))
    running = np.cumsum(change[order])
    return float(np.diff(at[order])[running[:-1] > 1.5].sum())
