"""List scheduling onto lanes: upward rank and earliest finish (HEFT, Topcuoglu, Hariri and Wu 2002), made
aware of shared resources by the area that earlier choices have already claimed."""

from typing import NamedTuple

import numpy as np

from taskgraph.graph.device import Device, Geometry
from taskgraph.jit import ZERO, kernel, plain
from taskgraph.schedule import heap
from taskgraph.schedule.bounds import longest_tail
from taskgraph.schedule.clock import Clock, Lanes
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Layout, clock_of, lanes_of
from taskgraph.schedule.problem import Problem


def layouts(device: Device) -> list[Layout]:
    """What a list schedule is tried on: two and three lanes that share the device, each of its splits, and on a CPU
    each in turns with the whole device: threads of two ops on the same cores would wait for each other."""
    parts = [g for g in device.splits() if len(g.partitions) > 1]
    turns = [Layout.isolated(g, Geometry.of(device.sm_count)) for g in parts] if device.kind == "cpu" else []
    return [*(Layout.shared(device.sm_count, lanes) for lanes in (2, 3)), *map(Layout.isolated, parts), *turns]


def pack(problem: Problem, layout: Layout) -> Assignment | None:
    """List-schedule onto the lanes of a layout, each op on all SMs of its lane's partition; lanes of overlapping
    geometries take turns. None when an op fits no partition.
    """
    clock, lanes, n = clock_of(problem), lanes_of(layout), problem.n
    lane_mode = np.searchsorted(problem.sizes, layout.table[layout.lane_partition, 2])
    where = Where(plain(problem.legal, np.bool_), plain(lane_mode, np.int64), lanes)
    claims = Claims(np.zeros(len(lane_mode)), np.zeros(len(lanes.table)), np.zeros(4))
    order, lane, ready = np.zeros((3, n), np.int64)
    rank = plain(upward_rank(problem), np.float64)
    queue = Queue(order, lane, np.zeros(n), ready, np.arange(n), clock.missing.copy())
    if _earliest_finish(clock, where, rank, claims, queue) < n:
        return None
    return Assignment(layout, order, lane, lane_mode[lane], NO_HOLDS)


def label(layout: Layout) -> str:
    """The layout for people: "84 + 48 SMs, 2 lanes"."""
    sizes = " | ".join(" + ".join(map(str, g.sizes)) for g in layout.geometries)
    return f"{sizes} SMs, {len(layout.lane_partition)} lanes"


def upward_rank(problem: Problem) -> np.ndarray:
    """Seconds from the start of each op to the end of the graph along its longest chain of best times."""
    return longest_tail(problem.best_seconds(), problem.succ_ptr, problem.succ)


class Where(NamedTuple):
    """Where ops may run: legal (n, m), the mode that each lane launches ops in (lanes,), and the lanes."""

    legal: np.ndarray
    mode: np.ndarray
    lanes: Lanes


class Claims(NamedTuple):
    """Until when lanes (lanes,), the SMs of partitions (p,) and soft resources (4,) are claimed, in seconds."""

    lane: np.ndarray
    sms: np.ndarray
    soft: np.ndarray


class Queue(NamedTuple):
    """The order, and by op its lane and the end of what it waits for (n,); a heap of the ready ops (n,), the ops by
    number, and how many each waits for."""

    order: np.ndarray
    lane: np.ndarray
    earliest: np.ndarray
    heap: np.ndarray
    number: np.ndarray
    missing: np.ndarray


@kernel
def _earliest_finish(clock: Clock, where: Where, rank: np.ndarray, claims: Claims, queue: Queue) -> int:
    """Take ready ops by rank, each to where it should end first; the number of ops, fewer than all if one fits none."""
    seconds, use, capacity, succ_ptr, succ = clock.seconds, clock.use, clock.capacity, clock.succ_ptr, clock.succ
    legal, lane_mode, partition, rows = where.legal, where.mode, where.lanes.partition, where.lanes.table
    free, sms, soft, launch_s = claims.lane, claims.sms, claims.soft, clock.launch_s
    conflicts = where.lanes.conflicts
    order, lane, earliest, ready, number = queue.order, queue.lane, queue.earliest, queue.heap, queue.number
    missing = queue.missing
    size, count = ZERO, 0
    for i in range(len(rank)):
        if missing[i] == 0:
            size = heap.push(ready, size, i, rank, number)
    while size > 0:
        op = heap.pop(ready, size, rank, number)
        size -= 1
        best, best_end, best_start = -1, np.inf, 0.0
        for i in range(len(lane_mode)):
            mode, part = lane_mode[i], partition[i]
            if not legal[op, mode]:
                continue
            begin = max(earliest[op], free[i])
            for j in range(len(lane_mode)):
                if conflicts[i, j]:
                    begin = max(begin, free[j])
            took = seconds[op, mode]
            area = took * use[op, mode, 0] / rows[part, 2]
            finish = max(begin + launch_s + took, max(sms[part], begin) + launch_s + area)
            for r in range(4):
                if use[op, mode, r + 1] > 0.0:
                    finish = max(finish, max(soft[r], begin) + took * use[op, mode, r + 1] / capacity[r])
            if finish < best_end * (1.0 - 1e-12):
                best, best_end, best_start = i, finish, begin
        if best < 0:
            break
        mode, part = lane_mode[best], partition[best]
        took = seconds[op, mode]
        sms[part] = max(sms[part], best_start) + took * use[op, mode, 0] / rows[part, 2]
        for r in range(4):
            if use[op, mode, r + 1] > 0.0:
                soft[r] = max(soft[r], best_start) + took * use[op, mode, r + 1] / capacity[r]
        free[best] = best_end
        order[count], lane[op] = op, best
        count += 1
        for k in range(succ_ptr[op], succ_ptr[op + 1]):
            after = succ[k]
            earliest[after] = max(earliest[after], best_end)
            missing[after] -= 1
            if missing[after] == 0:
                size = heap.push(ready, size, after, rank, number)
    return count
