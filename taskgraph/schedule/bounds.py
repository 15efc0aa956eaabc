"""Lower bounds on the makespan of any plan of a problem: its longest chain and the area of each resource."""

import numpy as np

from taskgraph.jit import njit
from taskgraph.schedule.plan import Bounds
from taskgraph.schedule.problem import Problem


def lower_bounds(problem: Problem) -> Bounds:
    """The chain of best isolated times, and work over capacity for the SMs and every soft resource, in seconds.

    An op at part of its full speed takes the same part of its SMs, so seconds x SMs of its thriftiest mode is the
    least area that it can have on the SMs.
    """
    total = problem.work.sum(axis=0)
    area = [float(w / c) if w else 0.0 for w, c in zip(total, problem.capacity, strict=True)]
    chain = float(longest_path(problem.best_seconds(), problem.pred_ptr, problem.pred).max())
    return Bounds(chain, float(sm_seconds(problem).sum() / problem.sm_count), *area)


def sm_seconds(problem: Problem) -> np.ndarray:
    """(n,) the least SM-seconds of each op over its legal modes."""
    area: np.ndarray = np.where(problem.legal, problem.seconds * problem.use[:, :, 0], np.inf).min(axis=1)
    return area


@njit
def longest_path(seconds: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Earliest end of every op when nothing but the chains binds."""
    end = np.zeros(len(seconds))
    for i in range(len(seconds)):
        ready = 0.0
        for k in range(pred_ptr[i], pred_ptr[i + 1]):
            ready = max(ready, end[pred[k]])
        end[i] = ready + seconds[i]
    return end
