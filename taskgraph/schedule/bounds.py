"""Lower bounds on the makespan of any plan of a problem: its longest chain and the area of each resource."""

from dataclasses import replace

import numpy as np

from taskgraph.jit import kernel, plain
from taskgraph.schedule.plan import Bounds
from taskgraph.schedule.problem import Problem


def lower_bounds(problem: Problem) -> Bounds:
    """The chain of best isolated times, and work over capacity for the SMs and every soft resource, in seconds.

    An op at part of its full speed takes the same part of its SMs, so seconds x SMs of its thriftiest mode is the
    least area that it can have on the SMs. What draws more power for so long than the device holds takes longer.
    """
    total = problem.work.sum(axis=0)
    area = [float(w / c) if w else 0.0 for w, c in zip(total, problem.capacity, strict=True)]
    chain = float(longest_path(problem.best_seconds(), problem.pred_ptr, problem.pred).max())
    made = Bounds(chain, float(sm_seconds(problem).sum() / problem.sm_count), *area)
    least_s = problem.settled(made.best_s, parts=False)
    return replace(made, power_s=least_s) if least_s > made.best_s else made


def sm_seconds(problem: Problem) -> np.ndarray:
    """(n,) the least SM-seconds of each op over its legal modes."""
    area: np.ndarray = np.where(problem.legal, problem.seconds * problem.use[:, :, 0], np.inf).min(axis=1)
    return area


def longest_path(seconds: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Earliest end of every op when nothing but the chains binds."""
    return _chains(seconds, pred_ptr, pred, False)


def longest_tail(seconds: np.ndarray, succ_ptr: np.ndarray, succ: np.ndarray) -> np.ndarray:
    """Seconds from the start of every op to the end when nothing but the chains binds."""
    return _chains(seconds, succ_ptr, succ, True)


def _chains(seconds: np.ndarray, pointer: np.ndarray, index: np.ndarray, backwards: bool) -> np.ndarray:
    made = np.zeros(len(seconds))
    _add_chains(
        plain(seconds, np.float64), plain(pointer, np.int64), plain(index, np.int64), backwards, made
    )  # fmt: skip
    return made


@kernel
def _add_chains(seconds: np.ndarray, pointer: np.ndarray, index: np.ndarray, backwards: bool, made: np.ndarray) -> None:
    n = len(seconds)
    for k in range(n):
        op = n - 1 - k if backwards else k
        longest = 0.0
        for e in range(pointer[op], pointer[op + 1]):
            if made[index[e]] > longest:
                longest = made[index[e]]
        made[op] = longest + seconds[op]
