"""The one clock: an event-driven fluid simulation of ops on lanes.

A running op first pays its launch, and then progresses at the rate that its resources allow. Ops in one partition
share its SMs and the bandwidth that these can draw; all ops share hbm, the copy paths and the link. Each is divided
by max-min fair share (Bertsekas and Gallager 1992, section 6.5.2). Ties are resolved by lane number, so that equal
inputs give equal times.

Two doors lead to the clock. `evaluate` times a finished assignment: every lane has its queue. `dispatch` also makes
one: whenever an op ends, the ready ops of highest priority start where their SMs fit (the parallel schedule
generation scheme, Kelley 1963, in fluid time). Its result, evaluated, gives the same times.
"""

import heapq
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.graph.device import Geometry
from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.jit import njit
from taskgraph.schedule.problem import Problem

_DONE = 1e-12
_FITS = 1.0 + 1e-9


@dataclass(frozen=True)
class Layout:
    """The lanes that a schedule may use: geometries, and the number of lanes in each of their partitions."""

    geometries: tuple[Geometry, ...]
    lanes_each: tuple[tuple[int, ...], ...]

    @staticmethod
    def shared(sm_count: int, lanes: int) -> "Layout":
        """`lanes` lanes that share the whole device."""
        return Layout((Geometry.of(sm_count),), ((lanes,),))

    @staticmethod
    def isolated(*geometries: Geometry) -> "Layout":
        """One lane in each partition of each geometry."""
        return Layout(geometries, tuple((1,) * len(g.partitions) for g in geometries))

    @cached_property
    def rows(self) -> np.ndarray:
        """(partitions, 4): geometry, first SM, SMs, number of lanes; geometry by geometry."""
        return np.array(
            [
                (g, part.first_sm, part.sm_count, lanes)
                for g, (geometry, each) in enumerate(zip(self.geometries, self.lanes_each, strict=True))
                for part, lanes in zip(geometry.partitions, each, strict=True)
            ],
            np.int64,
        )

    @cached_property
    def lane_partition(self) -> np.ndarray:
        """(lanes,): the row of `rows` that each lane belongs to."""
        return np.repeat(np.arange(len(self.rows)), self.rows[:, 3])

    @cached_property
    def conflicts(self) -> np.ndarray:
        """(lanes, lanes): lanes of different geometries whose partitions overlap; they never run together."""
        geometry, first, size = self.rows[self.lane_partition, :3].T
        apart = (first[:, None] + size[:, None] <= first[None, :]) | (first[None, :] + size[None, :] <= first[:, None])
        result: np.ndarray = (geometry[:, None] != geometry[None, :]) & ~apart
        return result


NO_HOLDS = np.empty((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a scheduler returns: which lane runs which op, in which order, on how many SMs.

    order (n,) op numbers; lane (n,) and mode (n,) by op; holds (k, 2): pairs (before, after) of ops beyond the
    problem's edges: the second starts only when the first has ended, because its SMs were not free earlier.
    `made_by` says for people who made it, and how. `proved_s` is what all plans of the graph take at least, as far as
    the scheduler has proved it. `problem` is the one whose ops and modes these are, where it is not the one that the
    scheduler was given: on other SM counts, or of the graph as `split` slices it. With `against` the plan is this one
    only if it is enough faster (planner.MIN_GAIN) than that one, which is the sequential one as a rule.
    """

    layout: Layout
    order: np.ndarray
    lane: np.ndarray
    mode: np.ndarray
    holds: np.ndarray = field(default_factory=lambda: NO_HOLDS)
    made_by: str = ""
    proved_s: float = 0.0
    problem: Problem | None = None
    split: Split = UNSPLIT
    against: "Assignment | None" = None


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
    n, layout = problem.n, chosen.layout
    lanes = len(layout.lane_partition)
    start, end = np.zeros(n), np.zeros(n)
    trace = np.zeros((2 * n + 2 if record else 1, 6))
    lane_in_order = chosen.lane[chosen.order]
    queue = chosen.order[np.argsort(lane_in_order, kind="stable")]
    queue_ptr = np.zeros(lanes + 1, np.int64)
    np.cumsum(np.bincount(lane_in_order, minlength=lanes), out=queue_ptr[1:])
    place = np.empty(n, np.int64)
    place[chosen.order] = np.arange(n)
    missing, succ_ptr, succ = _with_holds(problem, chosen.holds)
    ended, events = _simulate(
        queue, queue_ptr, place, chosen.mode, layout.lane_partition, layout.rows, layout.conflicts,
        problem.seconds, problem.use, missing, succ_ptr, succ, problem.capacity, problem.sm_count,
        problem.sm_bytes_per_s, problem.launch_s, problem.switch_s, start, end, trace, record,
    )  # fmt: skip
    if ended < n:
        raise PlanError(f"{n - ended} of {n} ops never start: the order of the lanes contradicts the dependencies.")
    return Evaluation(start, end, trace[:events])


def dispatch(
    problem: Problem, layout: Layout, priority: np.ndarray, mode: np.ndarray, partition: np.ndarray,
    oversubscribe: tuple[float, float] = (1.0, 1.0), backfill: bool = True,
) -> tuple[Assignment, Evaluation]:  # fmt: skip
    """Start ready ops by `priority` (n,), op i on mode[i] SMs in row partition[i] of `layout.rows`.

    An op starts when its partition has a free lane and would not be asked for more than oversubscribe[0] times its
    SMs, and no soft resource for more than oversubscribe[1] times its capacity. Without `backfill` no op overtakes
    one of higher priority that waits for SMs.
    """
    n = problem.n
    start, end, lane, hold = np.zeros(n), np.zeros(n), np.zeros(n, np.int64), np.full(n, -1, np.int64)
    order = _dispatch(
        priority, mode, partition, np.array(oversubscribe), backfill, layout.lane_partition, layout.rows,
        layout.conflicts, problem.seconds, problem.use, problem.pred_ptr, problem.succ_ptr, problem.succ,
        problem.capacity, problem.sm_bytes_per_s, problem.launch_s, problem.switch_s, start, end, lane, hold,
    )  # fmt: skip
    held = np.flatnonzero(hold >= 0)
    holds = np.stack([hold[held], held], axis=1)
    return Assignment(layout, order, lane, mode, holds), Evaluation(start, end, np.zeros((0, 6)))


def _with_holds(problem: Problem, holds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(missing predecessors, succ_ptr, succ) of the problem's edges and the holds."""
    missing = np.diff(problem.pred_ptr)
    if not len(holds):
        return missing, problem.succ_ptr, problem.succ
    before = np.concatenate([np.repeat(np.arange(problem.n), np.diff(problem.succ_ptr)), holds[:, 0]])
    after = np.concatenate([problem.succ, holds[:, 1]])
    pointer = np.zeros(problem.n + 1, np.int64)
    np.cumsum(np.bincount(before, minlength=problem.n), out=pointer[1:])
    missing = missing + np.bincount(holds[:, 1], minlength=problem.n)
    return missing, pointer, after[np.argsort(before, kind="stable")]


@njit
def _throttle(
    speed: np.ndarray, wanted: np.ndarray, group: np.ndarray, member: int, capacity: float, settled: np.ndarray
) -> float:
    """Scale down `speed` of the lanes with group == member so that their max-min shares of `capacity` fit it.

    `wanted` is each lane's use at full speed, `settled` is scratch. Returns the use after scaling."""
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
    settled[:] = False
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
def _begin(
    lane: int, op: int, mode: int, use: np.ndarray, seconds: np.ndarray, running: np.ndarray, left: np.ndarray,
    full: np.ndarray, took: np.ndarray,
) -> None:  # fmt: skip
    """Put `op` on a lane: all of it is left; `full` (lanes, 5) is what it draws at full speed, `took` its seconds."""
    running[lane], left[lane], took[lane] = op, 1.0, seconds[op, mode]
    for r in range(5):
        full[lane, r] = use[op, mode, r]


@njit
def _advance(
    running: np.ndarray, latency: np.ndarray, left: np.ndarray, full: np.ndarray, took: np.ndarray,
    lane_partition: np.ndarray, rows: np.ndarray, capacity: np.ndarray, sm_bytes_per_s: float, speed: np.ndarray,
    wanted: np.ndarray, everywhere: np.ndarray, settled: np.ndarray, used: np.ndarray,
) -> float:  # fmt: skip
    """Fill `speed` of every lane and `used` of every resource; returns the seconds until the next event."""
    lanes = len(running)
    for i in range(lanes):
        fluid = running[i] >= 0 and latency[i] <= 0.0
        speed[i] = 1.0 if fluid else 0.0
        for r in range(5):
            wanted[r, i] = full[i, r] if fluid else 0.0
    for p in range(len(rows)):
        _throttle(speed, wanted[0], lane_partition, p, rows[p, 2], settled)
        _throttle(speed, wanted[1], lane_partition, p, rows[p, 2] * sm_bytes_per_s, settled)
    for r in range(4):
        used[r + 1] = _throttle(speed, wanted[r + 1], everywhere, 0, capacity[r], settled)
    step = np.inf
    used[0] = 0.0
    for i in range(lanes):
        if running[i] >= 0:
            used[0] += wanted[0, i] * speed[i]
            if latency[i] > 0.0:
                step = min(step, latency[i])
            else:
                step = min(step, left[i] * took[i] / speed[i])
    return step


@njit
def _progress(
    step: float, running: np.ndarray, latency: np.ndarray, left: np.ndarray, speed: np.ndarray, took: np.ndarray,
    launch_s: float, ended: np.ndarray,
) -> int:  # fmt: skip
    """Move every lane on by `step` seconds; free the lanes whose op is done and list these ops in `ended`."""
    count = 0
    for i in range(len(running)):
        op = running[i]
        if op < 0:
            continue
        if latency[i] > 0.0:
            latency[i] -= step
            if latency[i] <= launch_s * _DONE:
                latency[i] = 0.0
            continue
        left[i] -= step * speed[i] / took[i]
        if left[i] <= _DONE:
            ended[count] = op
            running[i] = -1
            count += 1
    return count


@njit
def _turn(
    lane: int, now: float, switch_s: float, lane_partition: np.ndarray, conflicts: np.ndarray, ready_at: np.ndarray
) -> float:
    """Seconds until the SMs of `lane` have changed to its geometry; those that overlap them must change again later."""
    here = lane_partition[lane]
    if np.isinf(ready_at[here]):
        ready_at[here] = now + switch_s
    for j in range(len(lane_partition)):
        if conflicts[lane, j]:
            ready_at[lane_partition[j]] = np.inf
    left_s: float = max(0.0, ready_at[here] - now)
    return left_s


@njit
def _simulate(
    queue: np.ndarray, queue_ptr: np.ndarray, place: np.ndarray, mode: np.ndarray, lane_partition: np.ndarray,
    rows: np.ndarray, conflicts: np.ndarray, seconds: np.ndarray, use: np.ndarray, missing: np.ndarray,
    succ_ptr: np.ndarray, succ: np.ndarray, capacity: np.ndarray, sm_count: int, sm_bytes_per_s: float,
    launch_s: float, switch_s: float, start: np.ndarray, end: np.ndarray, trace: np.ndarray, record: bool,
) -> tuple[int, int]:  # fmt: skip
    """Fill start and end; returns (ops that ended, rows of trace)."""
    lanes, n = len(lane_partition), len(start)
    missing, head = missing.copy(), queue_ptr[:-1].copy()
    running, done_ops = np.full(lanes, -1, np.int64), np.empty(lanes, np.int64)
    latency, left, speed = np.zeros(lanes), np.zeros(lanes), np.zeros(lanes)
    wanted, everywhere, used = np.zeros((5, lanes)), np.zeros(lanes, np.int64), np.zeros(5)
    full, took, settled = np.zeros((lanes, 5)), np.zeros(lanes), np.zeros(lanes, np.bool_)
    turns = conflicts.any()
    ready_at = np.zeros(len(rows))
    now, ended, events = 0.0, 0, 0
    while ended < n:
        busy = 0
        for i in range(lanes):
            if running[i] < 0 and head[i] < queue_ptr[i + 1] and missing[queue[head[i]]] == 0:
                op = queue[head[i]]
                free = True
                if turns:
                    for j in range(lanes):
                        if conflicts[i, j]:
                            waiting = head[j] < queue_ptr[j + 1] and place[queue[head[j]]] < place[op]
                            free = free and running[j] < 0 and not waiting
                if free:
                    _begin(i, op, mode[op], use, seconds, running, left, full, took)
                    head[i] += 1
                    start[op] = now
                    latency[i] = launch_s + _turn(i, now, switch_s, lane_partition, conflicts, ready_at)
            busy += running[i] >= 0
        if busy == 0:
            break
        step = _advance(
            running, latency, left, full, took, lane_partition, rows, capacity, sm_bytes_per_s, speed, wanted,
            everywhere, settled, used,
        )  # fmt: skip
        if record:
            trace[events, 0] = now
            trace[events, 1] = used[0] / sm_count
            for r in range(4):
                trace[events, r + 2] = used[r + 1] / capacity[r] if capacity[r] > 0.0 else 0.0
        events += record
        now += step
        count = _progress(step, running, latency, left, speed, took, launch_s, done_ops)
        for c in range(count):
            op = done_ops[c]
            end[op] = now
            for k in range(succ_ptr[op], succ_ptr[op + 1]):
                missing[succ[k]] -= 1
        ended += count
    return ended, events


_NO_ROOM, _CONFLICT, _FULL = -1, -2, -3


@njit
def _room(
    op: int, partition: np.ndarray, mode: np.ndarray, oversubscribe: np.ndarray, running: np.ndarray,
    lane_partition: np.ndarray, rows: np.ndarray, conflicts: np.ndarray, use: np.ndarray, capacity: np.ndarray,
) -> int:  # fmt: skip
    """The lane on which `op` can start now; _FULL if all lanes are busy, _CONFLICT if another geometry has the SMs,
    _NO_ROOM if its partition has no free lane, too few SMs left, or a soft resource is spoken for."""
    where, lanes, at, idle = partition[op], len(running), -1, False
    for i in range(lanes):
        if running[i] < 0:
            idle = True
            if at < 0 and lane_partition[i] == where:
                at = i
    if not idle:
        return _FULL
    for i in range(lanes):
        for j in range(lanes):
            if running[i] >= 0 and lane_partition[j] == where and conflicts[i, j]:
                return _CONFLICT
    if at < 0:
        return _NO_ROOM
    for r in range(5):
        mine, others = use[op, mode[op], r], 0.0
        for i in range(lanes):
            other = running[i]
            if other >= 0 and (r > 0 or lane_partition[i] == where):
                others += use[other, mode[other], r]
        limit = (rows[where, 2] if r == 0 else capacity[r - 1]) * oversubscribe[min(r, 1)]
        if others > 0.0 and mine > 0.0 and others + mine > limit * _FITS:
            return _NO_ROOM
    return at


_DEPTH = 64
"""So many ready ops of highest priority may start; the others wait in a heap. It bounds the time of an event."""


@njit
def _insert(
    ready: np.ndarray, count: int, op: int, priority: np.ndarray, rest: list[tuple[float, int, int]], turn: int
) -> int:
    """Insert `op` into ready[:count], which is ordered by falling priority, or into the heap `rest` of those of lower
    priority, equal ones by `turn`; returns the new count."""
    if count == _DEPTH:
        last = ready[count - 1]
        if priority[last] >= priority[op]:
            heapq.heappush(rest, (-priority[op], turn, op))
            return count
        heapq.heappush(rest, (-priority[last], -turn, last))  # ahead of its equals, which came later
        count -= 1
    k = count
    while k > 0 and priority[ready[k - 1]] < priority[op]:
        ready[k] = ready[k - 1]
        k -= 1
    ready[k] = op
    return count + 1


@njit
def _dispatch(
    priority: np.ndarray, mode: np.ndarray, partition: np.ndarray, oversubscribe: np.ndarray, backfill: bool,
    lane_partition: np.ndarray, rows: np.ndarray, conflicts: np.ndarray, seconds: np.ndarray, use: np.ndarray,
    pred_ptr: np.ndarray, succ_ptr: np.ndarray, succ: np.ndarray, capacity: np.ndarray, sm_bytes_per_s: float,
    launch_s: float, switch_s: float, start: np.ndarray, end: np.ndarray, lane: np.ndarray, hold: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Fill start, end, lane and hold; returns the ops in the order in which they started."""
    lanes, n = len(lane_partition), len(start)
    missing = pred_ptr[1:] - pred_ptr[:-1]
    order, ready, since = np.empty(n, np.int64), np.empty(_DEPTH, np.int64), np.zeros(n)
    rest = [(0.0, 0, 0)]
    rest.pop()
    running, done_ops = np.full(lanes, -1, np.int64), np.empty(lanes, np.int64)
    latency, left, speed = np.zeros(lanes), np.zeros(lanes), np.zeros(lanes)
    wanted, everywhere, used = np.zeros((5, lanes)), np.zeros(lanes, np.int64), np.zeros(5)
    full, took, settled = np.zeros((lanes, 5)), np.zeros(lanes), np.zeros(lanes, np.bool_)
    ready_at = np.zeros(len(rows))
    waiting, started, ended, last, now, turn = 0, 0, 0, -1, 0.0, 0
    for op in range(n):
        if missing[op] == 0:
            turn += 1
            waiting = _insert(ready, waiting, op, priority, rest, turn)
    while ended < n:
        kept, blocked = 0, False
        for w in range(waiting):
            op = ready[w]
            at = -1
            if not blocked:
                at = _room(op, partition, mode, oversubscribe, running, lane_partition, rows, conflicts, use, capacity)
                blocked = at in (_CONFLICT, _FULL) or (at == _NO_ROOM and not backfill)
            if at < 0:
                ready[kept] = op
                kept += 1
                continue
            _begin(at, op, mode[op], use, seconds, running, left, full, took)
            lane[op], start[op] = at, now
            latency[at] = launch_s + _turn(at, now, switch_s, lane_partition, conflicts, ready_at)
            if now > since[op]:
                hold[op] = last
            order[started] = op
            started += 1
        waiting = kept
        while waiting < _DEPTH and len(rest) > 0:
            ready[waiting] = heapq.heappop(rest)[2]
            waiting += 1
        step = _advance(
            running, latency, left, full, took, lane_partition, rows, capacity, sm_bytes_per_s, speed, wanted,
            everywhere, settled, used,
        )  # fmt: skip
        now += step
        count = _progress(step, running, latency, left, speed, took, launch_s, done_ops)
        for c in range(count):
            last = done_ops[c]
            end[last] = now
            for k in range(succ_ptr[last], succ_ptr[last + 1]):
                missing[succ[k]] -= 1
                if missing[succ[k]] == 0:
                    since[succ[k]] = now
                    turn += 1
                    waiting = _insert(ready, waiting, succ[k], priority, rest, turn)
        ended += count
    return order
