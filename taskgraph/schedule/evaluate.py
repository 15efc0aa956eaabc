"""The one clock: an event-driven fluid simulation of ops on lanes.

A lane starts its next op when the op's predecessors have ended, pays the launch, and then progresses at the
rate that its resources allow. Lanes of one partition share its arithmetic and the bandwidth that its SMs can
draw; all lanes share hbm, the copy paths and the link. Each is divided by max-min fair share (Bertsekas and
Gallager 1992, section 6.5.2). Ties are resolved by lane number, so that equal inputs give equal times.
"""

from dataclasses import dataclass

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.jit import njit
from taskgraph.schedule.problem import Problem

_DONE = 1e-12


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which lane runs which op, in which order: order (n,) op numbers, lane (n,) by op, mode and partition by lane."""

    order: np.ndarray
    lane: np.ndarray
    lane_mode: np.ndarray
    lane_partition: np.ndarray


@dataclass(frozen=True, slots=True)
class Evaluation:
    """start_s and end_s (n,) by op; trace (events, 6): time, then the used shares of sm, hbm, h2d, d2h, link."""

    start_s: np.ndarray
    end_s: np.ndarray
    trace: np.ndarray

    @property
    def makespan_s(self) -> float:
        return float(self.end_s.max())


def evaluate(problem: Problem, chosen: Assignment, record: bool = False) -> Evaluation:
    """Times of every op under `chosen`; PlanError when its order makes lanes wait for each other for ever."""
    n, lanes = problem.n, len(chosen.lane_mode)
    start, end = np.zeros(n), np.zeros(n)
    trace = np.zeros((2 * n + 2 if record else 1, 6))
    lane_in_order = chosen.lane[chosen.order]
    queue = chosen.order[np.argsort(lane_in_order, kind="stable")]
    queue_ptr = np.zeros(lanes + 1, np.int64)
    np.cumsum(np.bincount(lane_in_order, minlength=lanes), out=queue_ptr[1:])
    ended, events = _simulate(
        queue, queue_ptr, chosen.lane_mode, chosen.lane_partition, problem.sizes, problem.seconds, problem.use,
        problem.pred_ptr, problem.succ_ptr, problem.succ, problem.capacity, problem.sm_count,
        problem.sm_bytes_per_s, problem.launch_s, start, end, trace, record,
    )  # fmt: skip
    if ended < n:
        raise PlanError(f"{n - ended} of {n} ops never start: the order of the lanes contradicts the dependencies.")
    return Evaluation(start, end, trace[:events])


@njit
def _throttle(speed: np.ndarray, wanted: np.ndarray, group: np.ndarray, member: int, capacity: float) -> float:
    """Scale down `speed` of the lanes with group == member so that their max-min shares of `capacity` fit it.

    `wanted` is each lane's use at full speed. Returns the use after scaling."""
    lanes = len(speed)
    total = 0.0
    for i in range(lanes):
        if group[i] == member:
            total += wanted[i] * speed[i]
    if total <= capacity * (1.0 + 1e-12):
        return total
    left, open_lanes, level = capacity, 0, 0.0
    for i in range(lanes):
        if group[i] == member and wanted[i] * speed[i] > 0.0:
            open_lanes += 1
    settled = np.zeros(lanes, np.bool_)
    while open_lanes > 0:
        level = left / open_lanes
        changed = False
        for i in range(lanes):
            if group[i] == member and not settled[i]:
                need = wanted[i] * speed[i]
                if 0.0 < need <= level:
                    settled[i] = True
                    left -= need
                    open_lanes -= 1
                    changed = True
        if not changed:
            break
    for i in range(lanes):
        if group[i] == member and not settled[i] and wanted[i] * speed[i] > 0.0:
            speed[i] = level / wanted[i]
    return capacity


@njit
def _simulate(
    queue: np.ndarray, queue_ptr: np.ndarray, lane_mode: np.ndarray, lane_partition: np.ndarray, sizes: np.ndarray,
    seconds: np.ndarray, use: np.ndarray, pred_ptr: np.ndarray, succ_ptr: np.ndarray, succ: np.ndarray,
    capacity: np.ndarray, sm_count: int, sm_bytes_per_s: float, launch_s: float,
    start: np.ndarray, end: np.ndarray, trace: np.ndarray, record: bool,
) -> tuple[int, int]:  # fmt: skip
    """Fill start and end; returns (ops that ended, rows of trace)."""
    lanes, n = len(lane_mode), len(start)
    missing = pred_ptr[1:] - pred_ptr[:-1]
    head = queue_ptr[:-1].copy()
    running = np.full(lanes, -1, np.int64)
    latency, left, speed = np.zeros(lanes), np.zeros(lanes), np.zeros(lanes)
    wanted = np.zeros((5, lanes))
    everywhere = np.zeros(lanes, np.int64)
    used = np.zeros(5)
    now, ended, events = 0.0, 0, 0
    while ended < n:
        busy = 0
        for i in range(lanes):
            if running[i] < 0 and head[i] < queue_ptr[i + 1] and missing[queue[head[i]]] == 0:
                running[i] = queue[head[i]]
                head[i] += 1
                start[running[i]] = now
                latency[i], left[i] = launch_s, 1.0
            busy += running[i] >= 0
        if busy == 0:
            break
        for i in range(lanes):
            fluid = running[i] >= 0 and latency[i] <= 0.0
            speed[i] = 1.0 if fluid else 0.0
            for r in range(5):
                wanted[r, i] = use[running[i], lane_mode[i], r] if fluid else 0.0
        used[:] = 0.0
        for i in range(lanes):
            first = True
            for j in range(i):
                first = first and lane_partition[j] != lane_partition[i]
            if first:
                size = sizes[lane_mode[i]]
                _throttle(speed, wanted[0], lane_partition, lane_partition[i], 1.0)
                _throttle(speed, wanted[1], lane_partition, lane_partition[i], size * sm_bytes_per_s)
        for r in range(4):
            used[r + 1] = _throttle(speed, wanted[r + 1], everywhere, 0, capacity[r])
        step = np.inf
        for i in range(lanes):
            if running[i] >= 0:
                if latency[i] > 0.0:
                    step = min(step, latency[i])
                else:
                    step = min(step, left[i] * seconds[running[i], lane_mode[i]] / speed[i])
        if record:
            trace[events, 0] = now
            for i in range(lanes):
                trace[events, 1] += wanted[0, i] * speed[i] * sizes[lane_mode[i]] / sm_count
            for r in range(4):
                trace[events, r + 2] = used[r + 1] / capacity[r] if capacity[r] > 0.0 else 0.0
        events += record
        now += step
        for i in range(lanes):
            op = running[i]
            if op < 0:
                continue
            if latency[i] > 0.0:
                latency[i] -= step
                if latency[i] <= launch_s * _DONE:
                    latency[i] = 0.0
                continue
            left[i] -= step * speed[i] / seconds[op, lane_mode[i]]
            if left[i] <= _DONE:
                end[op] = now
                running[i] = -1
                ended += 1
                for k in range(succ_ptr[op], succ_ptr[op + 1]):
                    missing[succ[k]] -= 1
    return ended, events
