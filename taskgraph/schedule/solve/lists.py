"""List scheduling onto lanes: upward rank and earliest finish (HEFT, Topcuoglu, Hariri and Wu 2002), made
aware of shared resources by the area that earlier choices have already claimed."""

import heapq

import numpy as np

from taskgraph.graph.device import Device
from taskgraph.jit import njit
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Layout
from taskgraph.schedule.problem import Problem


def layouts(device: Device) -> list[Layout]:
    """What a list schedule is tried on: two and three lanes that share the device, and each of its splits."""
    splits = [Layout.isolated(g) for g in device.splits() if len(g.partitions) > 1]
    return [*(Layout.shared(device.sm_count, lanes) for lanes in (2, 3)), *splits]


def pack(problem: Problem, layout: Layout) -> Assignment | None:
    """List-schedule onto the lanes of a layout of one geometry, each op on all SMs of its lane's partition.

    None when an op fits no partition.
    """
    lane_mode = np.searchsorted(problem.sizes, layout.rows[layout.lane_partition, 2])
    order, lane = _earliest_finish(
        problem.seconds, problem.use, problem.legal, problem.pred_ptr, problem.pred, problem.succ_ptr, problem.succ,
        problem.capacity, problem.launch_s, upward_rank(problem), lane_mode, layout.lane_partition,
        layout.rows[:, 2].astype(np.float64),
    )  # fmt: skip
    if len(order) < problem.n:
        return None
    return Assignment(layout, order, lane, lane_mode[lane], NO_HOLDS)


def label(layout: Layout) -> str:
    """The layout for people: "84 + 48 SMs, 2 lanes"."""
    sizes = " | ".join(" + ".join(map(str, g.sizes)) for g in layout.geometries)
    return f"{sizes} SMs, {len(layout.lane_partition)} lanes"


def upward_rank(problem: Problem) -> np.ndarray:
    """Seconds from the start of each op to the end of the graph along its longest chain of best times."""
    return longest_tail(problem.best_seconds(), problem.succ_ptr, problem.succ)


@njit
def longest_tail(seconds: np.ndarray, succ_ptr: np.ndarray, succ: np.ndarray) -> np.ndarray:
    """Seconds from the start of every op to the end when nothing but the chains binds."""
    rank = np.zeros(len(seconds))
    for i in range(len(seconds) - 1, -1, -1):
        below = 0.0
        for k in range(succ_ptr[i], succ_ptr[i + 1]):
            below = max(below, rank[succ[k]])
        rank[i] = below + seconds[i]
    return rank


@njit
def _earliest_finish(
    seconds: np.ndarray, use: np.ndarray, legal: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray,
    succ_ptr: np.ndarray, succ: np.ndarray, capacity: np.ndarray, launch_s: float, rank: np.ndarray,
    lane_mode: np.ndarray, lane_partition: np.ndarray, partition_sms: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(order, lane): ready ops by rank, each where it should end first; both empty if an op fits none."""
    n, lanes = len(rank), len(lane_mode)
    order, lane, end = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n)
    free = np.zeros(lanes)
    claimed = np.zeros(len(partition_sms))
    claimed_soft = np.zeros(4)
    missing = pred_ptr[1:] - pred_ptr[:-1]
    ready = [(0.0, 0)]
    ready.pop()
    for i in range(n):
        if missing[i] == 0:
            heapq.heappush(ready, (-rank[i], i))
    count = 0
    while len(ready) > 0:
        _, op = heapq.heappop(ready)
        earliest = 0.0
        for k in range(pred_ptr[op], pred_ptr[op + 1]):
            earliest = max(earliest, end[pred[k]])
        best, best_end, best_start = -1, np.inf, 0.0
        for i in range(lanes):
            mode, where = lane_mode[i], lane_partition[i]
            if not legal[op, mode]:
                continue
            begin = max(earliest, free[i])
            took = seconds[op, mode]
            finish = begin + launch_s + took
            finish = max(finish, max(claimed[where], begin) + launch_s + took * use[op, mode, 0] / partition_sms[where])
            for r in range(4):
                if use[op, mode, r + 1] > 0.0:
                    finish = max(finish, max(claimed_soft[r], begin) + took * use[op, mode, r + 1] / capacity[r])
            if finish < best_end * (1.0 - 1e-12):
                best, best_end, best_start = i, finish, begin
        if best < 0:
            return order[:0], lane[:0]
        mode, where = lane_mode[best], lane_partition[best]
        took = seconds[op, mode]
        claimed[where] = max(claimed[where], best_start) + took * use[op, mode, 0] / partition_sms[where]
        for r in range(4):
            if use[op, mode, r + 1] > 0.0:
                claimed_soft[r] = max(claimed_soft[r], best_start) + took * use[op, mode, r + 1] / capacity[r]
        free[best] = end[op] = best_end
        order[count], lane[op] = op, best
        count += 1
        for k in range(succ_ptr[op], succ_ptr[op + 1]):
            missing[succ[k]] -= 1
            if missing[succ[k]] == 0:
                heapq.heappush(ready, (-rank[succ[k]], succ[k]))
    return order, lane
