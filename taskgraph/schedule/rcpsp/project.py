"""Project: scheduling with renewable resources and modes (MRCPSP; Pritsker, Watters and Wolfe 1969, Talbot 1982).

The resource-constrained core of planning: what an op occupies is hard, how long it takes is known. The checker below
shares nothing with the solvers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from taskgraph.errors import DemandError, GraphError, PlanError
from taskgraph.schedule.problem import _transposed, compressed

FRACTION_SLACK = 1e-6
"""A resource that is used in whole units is checked exactly; any other to this share of its capacity."""


@dataclass(frozen=True, slots=True)
class Project:
    """n activities in topological order, m modes, r renewable resources.

    seconds (n, m), inf where a mode is not allowed; use (n, m, r); capacity (r,). Edges in compressed rows: the
    predecessors of activity i are pred[pred_ptr[i]:pred_ptr[i + 1]], its successors succ[succ_ptr[i]:succ_ptr[i + 1]].
    """

    seconds: np.ndarray
    use: np.ndarray
    capacity: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def whole(self) -> bool:
        """Are all times whole numbers? Then makespans and bounds are, too."""
        finite = self.seconds[np.isfinite(self.seconds)]
        return bool((finite == np.floor(finite)).all())


@dataclass(frozen=True, slots=True)
class Schedule:
    """When each activity starts and in which mode. `lower_bound` is the best one proven; `schedules` counts how many
    schedules were generated to find this one."""

    start: np.ndarray
    mode: np.ndarray
    makespan: float
    lower_bound: float
    proven: bool
    made_by: str
    schedules: int

    @property
    def gap(self) -> float:
        """Makespan over the best bound."""
        return self.makespan / self.lower_bound if self.lower_bound else 1.0


def make_project(
    seconds: np.ndarray, use: np.ndarray, capacity: np.ndarray, predecessors: Sequence[Sequence[int]]
) -> Project:
    """A checked Project. A mode that asks for more than a capacity is not allowed; each activity needs one that is."""
    seconds = np.array(seconds, np.float64)
    use = np.array(use, np.float64).reshape(*seconds.shape, -1)
    capacity = np.array(capacity, np.float64)
    if np.isnan(seconds).any() or (seconds < 0).any() or not (np.isfinite(use).all() and (use >= 0).all()):
        raise DemandError("A mode has a negative or undefined time or use; times and uses are 0 or more.")
    if use.shape[2] != len(capacity) or not (np.isfinite(capacity).all() and (capacity > 0).all()):
        raise DemandError(f"{use.shape[2]} uses and capacities {capacity.tolist()}; give each resource one above 0.")
    seconds[(use > capacity).any(axis=2)] = np.inf
    for i in np.flatnonzero(~np.isfinite(seconds).any(axis=1)).tolist():
        least = use[i].min(axis=0).tolist()
        raise DemandError(f"Activity {i} has no mode that fits: it uses at least {least} of {capacity.tolist()}.")
    for i, before in enumerate(predecessors):
        if any(not 0 <= p < i for p in before):
            raise GraphError(f"Activity {i} follows {list(before)}; number activities in topological order.")
    pred_ptr, pred = compressed([tuple(sorted(set(before))) for before in predecessors])
    if len(pred_ptr) != len(seconds) + 1 or len(seconds) == 0:
        raise GraphError(f"{len(pred_ptr) - 1} rows of predecessors for {len(seconds)} activities; give one for each.")
    return Project(seconds, use, capacity, pred_ptr, pred, *_transposed(pred_ptr, pred))


def with_bound(project: Project, schedule: Schedule, bound: float) -> Schedule:
    """The schedule with a lower bound that was proven for the project, and whether that proves it best: exactly for
    whole times, to one millionth for others."""
    lower = min(math.ceil(bound - 1e-6) if project.whole else bound, schedule.makespan)
    proven = lower >= schedule.makespan * (1.0 if project.whole else 1.0 - FRACTION_SLACK)
    return replace(schedule, lower_bound=float(lower), proven=proven)


def check(project: Project, schedule: Schedule) -> None:
    """Raise PlanError at the first broken rule: modes, precedence, capacity at every instant, makespan, bound."""
    start, mode, rows = schedule.start, schedule.mode, np.arange(project.n)
    if start.shape != (project.n,) or mode.shape != (project.n,):
        raise PlanError(f"The schedule has {len(start)} activities and the project {project.n}.")
    if not np.isin(mode, np.arange(project.seconds.shape[1])).all():
        raise PlanError(f"A mode is not one of 0 to {project.seconds.shape[1] - 1}.")
    end = start + project.seconds[rows, mode]
    for i in np.flatnonzero(~(np.isfinite(end) & (start >= 0))).tolist():
        raise PlanError(f"Activity {i} starts at {start[i]} in mode {mode[i]} and ends at {end[i]}.")
    _check_precedence(project, start, end)
    _check_capacity(project, start, end, project.use[rows, mode])
    if schedule.makespan != end.max():
        raise PlanError(f"The makespan is {end.max()}; the schedule says {schedule.makespan}.")
    if schedule.lower_bound > schedule.makespan * (1 + 1e-9):
        raise PlanError(f"The lower bound {schedule.lower_bound} is above the makespan {schedule.makespan}.")


def _check_precedence(project: Project, start: np.ndarray, end: np.ndarray) -> None:
    after = np.repeat(np.arange(project.n), np.diff(project.pred_ptr))
    for k in np.flatnonzero(start[after] < end[project.pred]):
        i, j = project.pred[k], after[k]
        raise PlanError(f"Activity {j} starts at {start[j]}, before its predecessor {i} ends at {end[i]}.")


def _check_capacity(project: Project, start: np.ndarray, end: np.ndarray, use: np.ndarray) -> None:
    """Sweep the starts and ends in time; what ends at an instant has left before what starts then."""
    busy = end > start
    times = np.concatenate([end[busy], start[busy]])
    by_time = np.argsort(times, kind="stable")
    level = np.concatenate([-use[busy], use[busy]])[by_time].cumsum(axis=0)
    whole = (use == np.floor(use)).all(axis=0)
    over = level > project.capacity * np.where(whole, 1.0, 1.0 + FRACTION_SLACK)
    for k, r in np.argwhere(over & _last_of_instant(times[by_time])[:, None]):
        at = times[by_time][k]
        raise PlanError(f"At {at} resource {r} is used {level[k, r]} times of {project.capacity[r]}.")


def _last_of_instant(times: np.ndarray) -> np.ndarray:
    return np.append(times[1:] > times[:-1], True)[: len(times)]
