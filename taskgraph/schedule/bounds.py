"""Lower bounds on the makespan of any plan of a problem: its longest chain and the area of each resource."""

import numpy as np

from taskgraph.graph.device import Device
from taskgraph.jit import njit
from taskgraph.schedule.plan import Bounds
from taskgraph.schedule.problem import Problem


def lower_bounds(problem: Problem, device: Device) -> Bounds:
    """The chain of best isolated times, and work over capacity for arithmetic and every soft resource, in seconds."""
    best = np.where(problem.legal, problem.seconds, np.inf).min(axis=1) + problem.launch_s
    packed = max(device.compute_share(s) * device.sm_count / s for s in range(1, device.sm_count + 1))
    total = problem.work[:, 1:].sum(axis=0)
    area = [float(w / c) if w else 0.0 for w, c in zip(total, problem.capacity, strict=True)]
    chain = float(_longest_path(best, problem.pred_ptr, problem.pred).max())
    return Bounds(chain, float(problem.arithmetic_s.sum() / packed), *area)


@njit
def _longest_path(seconds: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Earliest end of every op when nothing but the chains binds."""
    end = np.zeros(len(seconds))
    for i in range(len(seconds)):
        ready = 0.0
        for k in range(pred_ptr[i], pred_ptr[i + 1]):
            ready = max(ready, end[pred[k]])
        end[i] = ready + seconds[i]
    return end
