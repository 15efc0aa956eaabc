"""The kernels of the one clock (see `evaluate`), compiled, and what they take: plain arrays under documented names."""

from typing import NamedTuple

import numpy as np

from taskgraph.jit import ZERO, inner, kernel
from taskgraph.schedule import heap

_DONE = 1e-12
_FITS = 1.0 + 1e-9
_DEPTH = 64
"""So many ready ops of highest priority may start; the others wait in a heap. It bounds the time of an event."""


class Clock(NamedTuple):
    """What the clock reads of a problem, as in `Problem`; missing (n,) counts what every op waits for. crowd_knee and
    crowd_slope are hbm_knee and hbm_slope of `CoRunning`."""

    seconds: np.ndarray
    use: np.ndarray
    missing: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    capacity: np.ndarray
    sm_bytes_per_s: float
    launch_s: float
    switch_s: float
    crowd_knee: float
    crowd_slope: float


class Lanes(NamedTuple):
    """A layout's lanes: the row of each (lanes,), table (p, 4) and conflicts (lanes, lanes) as in `Layout`, and whether
    there are any conflicts."""

    partition: np.ndarray
    table: np.ndarray
    conflicts: np.ndarray
    turns: bool


class Queues(NamedTuple):
    """An assignment by lane: op (n,) lane by lane, lane l from pointer[l] on; place (n,) of every op in the whole order
    and its mode (n,)."""

    op: np.ndarray
    pointer: np.ndarray
    place: np.ndarray
    mode: np.ndarray


class Wishes(NamedTuple):
    """What `dispatch` is asked for: by op its priority, mode and row of the layout (n,); limits (2,); backfill."""

    priority: np.ndarray
    mode: np.ndarray
    partition: np.ndarray
    oversubscribe: np.ndarray
    backfill: bool


class Workspace(NamedTuple):
    """Scratch of one clock, by lane: the op that runs or -1, those that just ended, the place in the queue, seconds of
    latency left, the share of the op that is left, its speed, its seconds alone, what it draws at full speed
    (lanes, 5), what it wants now (5, lanes), which shares are settled. used (5,) by resource, ready_at (p,) by row of
    the layout, missing (n,) by op."""

    running: np.ndarray
    ended: np.ndarray
    head: np.ndarray
    latency: np.ndarray
    left: np.ndarray
    speed: np.ndarray
    took: np.ndarray
    full: np.ndarray
    wanted: np.ndarray
    settled: np.ndarray
    used: np.ndarray
    ready_at: np.ndarray
    missing: np.ndarray


class Front(NamedTuple):
    """The schedule that a dispatch makes, by op (n,): start, end, lane, hold (the op before it, or -1), and the order.
    Its scratch: the ready ops of highest priority (DEPTH,), the heap of the others, `turn` which came first among
    equals, and since when each is ready."""

    start: np.ndarray
    end: np.ndarray
    lane: np.ndarray
    hold: np.ndarray
    order: np.ndarray
    ready: np.ndarray
    rest: np.ndarray
    turn: np.ndarray
    since: np.ndarray


def workspace_of(clock: Clock, lanes: Lanes) -> Workspace:
    """Scratch for one thread."""
    n, count = len(clock.missing), len(lanes.partition)
    running, ended, head = np.zeros((3, count), np.int64)
    latency, left, speed, took = np.zeros((4, count))
    full, wanted, settled = np.zeros((count, 5)), np.zeros((5, count)), np.zeros(count, np.bool_)
    ready_at, missing = np.zeros(len(lanes.table)), np.zeros(n, np.int64)
    return Workspace(
        running, ended, head, latency, left, speed, took, full, wanted, settled, np.zeros(5), ready_at, missing
    )  # fmt: skip


def front_of(clock: Clock) -> Front:
    """Room for a schedule of all ops."""
    n = len(clock.missing)
    start, end, since = np.zeros((3, n))
    lane, hold, order, rest, turn = np.zeros((5, n), np.int64)
    return Front(start, end, lane, hold, order, np.zeros(_DEPTH, np.int64), rest, turn, since)


# ------------------------------------------------------------------------------------------- the clock


@inner
def _throttle(b: Workspace, resource: int, group: np.ndarray, member: int, capacity: float) -> float:
    """Scale down the speed of the lanes with group == member (all lanes for -1) so that their max-min shares of
    `capacity` fit it. Returns the use after scaling."""
    speed, settled = b.speed, b.settled
    wanted = b.wanted[resource]
    lanes = len(speed)
    total = 0.0
    for i in range(lanes):
        if member < 0 or group[i] == member:
            total += wanted[i] * speed[i]
    if total <= capacity * (1.0 + 1e-12):
        return total
    left, open_lanes, level = capacity, 0, 0.0
    for i in range(lanes):
        settled[i] = (member >= 0 and group[i] != member) or not wanted[i] * speed[i] > 0.0
        if not settled[i]:
            open_lanes += 1
    while open_lanes > 0:
        level = left / open_lanes
        changed = False
        for i in range(lanes):
            if not settled[i]:
                need = wanted[i] * speed[i]
                if need <= level:
                    settled[i] = True
                    left -= need
                    open_lanes -= 1
                    changed = True
        if not changed:
            break
    for i in range(lanes):
        if not settled[i]:
            speed[i] = level / wanted[i]
    return capacity


@inner
def _crowd(clock: Clock, b: Workspace, partition: np.ndarray, parts: int) -> None:
    """Slow the lanes that use SMs by what other partitions draw from the device's memory: see corunning.py."""
    speed, busy, drawn = b.speed, b.wanted[0], b.wanted[1]
    knee, slope, capacity = clock.crowd_knee, clock.crowd_slope, clock.capacity[0]
    total = 0.0
    for i in range(len(speed)):
        total += drawn[i] * speed[i]
    waiting = 1.0 + slope * max(0.0, total / capacity - knee)
    if waiting > 1.0:
        for p in range(parts):
            own = 0.0
            for i in range(len(speed)):
                if partition[i] == p:
                    own += drawn[i] * speed[i]
            alone = 1.0 + slope * max(0.0, own / capacity - knee)
            for i in range(len(speed)):
                if partition[i] == p and busy[i] > 0.0:
                    speed[i] *= alone / waiting


@inner
def _begin(clock: Clock, b: Workspace, lane: int, op: int, mode: int) -> None:
    """Put `op` on a lane: all of it is left."""
    full, use = b.full, clock.use
    b.running[lane], b.left[lane], b.took[lane] = op, 1.0, clock.seconds[op, mode]
    for r in range(5):
        full[lane, r] = use[op, mode, r]


@inner
def _advance(clock: Clock, lanes: Lanes, b: Workspace) -> float:
    """Fill the speed of every lane and the use of every resource; returns the seconds until the next event."""
    running, latency, left, speed, took = b.running, b.latency, b.left, b.speed, b.took
    full, wanted, used = b.full, b.wanted, b.used
    partition, rows, capacity = lanes.partition, lanes.table, clock.capacity
    for i in range(len(running)):
        fluid = running[i] >= 0 and latency[i] <= 0.0
        speed[i] = 1.0 if fluid else 0.0
        for r in range(5):
            wanted[r, i] = full[i, r] if fluid else 0.0
    everyone = ZERO - 1
    for p in range(len(rows)):
        for r in range(2):
            sms = float(rows[p, 2])
            _throttle(b, r, partition, p, sms * clock.sm_bytes_per_s if r else sms)
    if clock.crowd_slope > 0.0 and len(rows) > 1:
        _crowd(clock, b, partition, len(rows))
    for r in range(4):
        used[r + 1] = _throttle(b, r + 1, partition, everyone, capacity[r])
    step = np.inf
    used[0] = 0.0
    for i in range(len(running)):
        if running[i] >= 0:
            used[0] += wanted[0, i] * speed[i]
            end = latency[i] if latency[i] > 0.0 else left[i] * took[i] / speed[i]
            if end < step:
                step = end
    return step


@inner
def _progress(b: Workspace, step: float, launch_s: float) -> int:
    """Move every lane on by `step` seconds; free the lanes whose op is done, and list and count these ops."""
    running, latency, left, speed, took, ended = b.running, b.latency, b.left, b.speed, b.took, b.ended
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


@inner
def _switch(lanes: Lanes, ready_at: np.ndarray, lane: int, now: float, switch_s: float) -> float:
    """Seconds until the SMs of `lane` have changed to its geometry; those that overlap them must change again later."""
    partition, conflicts = lanes.partition, lanes.conflicts
    here = partition[lane]
    if ready_at[here] == np.inf:
        ready_at[here] = now + switch_s
    for j in range(len(partition)):
        if conflicts[lane, j]:
            ready_at[partition[j]] = np.inf
    left_s: float = ready_at[here] - now
    return left_s if left_s > 0.0 else 0.0


@inner
def _reset(clock: Clock, b: Workspace) -> None:
    """Nothing runs, and nothing has ended."""
    running, ready_at, missing, before = b.running, b.ready_at, b.missing, clock.missing
    for i in range(len(running)):
        running[i] = -1
    for p in range(len(ready_at)):
        ready_at[p] = 0.0
    for op in range(len(missing)):
        missing[op] = before[op]


@kernel
def simulate(
    clock: Clock, lanes: Lanes, queues: Queues, b: Workspace, start: np.ndarray, end: np.ndarray, trace: np.ndarray
) -> tuple[int, int, float]:
    """Fill start and end (n,), and of `trace` (rows, 6) the time and the use of every resource at each event as far as
    it has rows; returns (ops that ended, events, the time of the last)."""
    count, n = len(lanes.partition), len(start)
    running, head, missing, latency, done_ops, used = b.running, b.head, b.missing, b.latency, b.ended, b.used
    queue, pointer, place, mode = queues.op, queues.pointer, queues.place, queues.mode
    conflicts, succ_ptr, succ = lanes.conflicts, clock.succ_ptr, clock.succ
    _reset(clock, b)
    for i in range(count):
        head[i] = pointer[i]
    now, ended, events = 0.0, 0, 0
    while ended < n:
        busy = 0
        for i in range(count):
            if running[i] < 0 and head[i] < pointer[i + 1] and missing[queue[head[i]]] == 0:
                op = queue[head[i]]
                free = True
                if lanes.turns:
                    for j in range(count):
                        if conflicts[i, j]:
                            waiting = head[j] < pointer[j + 1] and place[queue[head[j]]] < place[op]
                            free = free and running[j] < 0 and not waiting
                if free:
                    _begin(clock, b, i, op, mode[op])
                    head[i] += 1
                    start[op] = now
                    latency[i] = clock.launch_s + _switch(lanes, b.ready_at, i, now, clock.switch_s)
            busy += running[i] >= 0
        if busy == 0:
            break
        step = _advance(clock, lanes, b)
        if not step < np.inf:
            break
        if events < len(trace):
            trace[events, 0] = now
            for r in range(5):
                trace[events, r + 1] = used[r]
        events += 1
        now += step
        done = _progress(b, step, clock.launch_s)
        for c in range(done):
            op = done_ops[c]
            end[op] = now
            for k in range(succ_ptr[op], succ_ptr[op + 1]):
                missing[succ[k]] -= 1
        ended += done
    return ended, events, now


# ---------------------------------------------------------------------------------------- dispatching

_NO_ROOM, _CONFLICT, _FULL = -1, -2, -3


@inner
def _room(clock: Clock, lanes: Lanes, wishes: Wishes, running: np.ndarray, op: int) -> int:
    """The lane on which `op` can start now; _FULL if all lanes are busy, _CONFLICT if another geometry has the SMs,
    _NO_ROOM if its partition has no free lane, too few SMs left, or a soft resource is spoken for."""
    partition, use, mode = lanes.partition, clock.use, wishes.mode
    where, count, at, idle = wishes.partition[op], len(running), -1, False
    for i in range(count):
        if running[i] < 0:
            idle = True
            if at < 0 and partition[i] == where:
                at = i
    if not idle:
        return _FULL
    if lanes.turns:
        for i in range(count):
            for j in range(count):
                if running[i] >= 0 and partition[j] == where and lanes.conflicts[i, j]:
                    return _CONFLICT
    if at < 0:
        return _NO_ROOM
    for r in range(5):
        mine, others = use[op, mode[op], r], 0.0
        for i in range(count):
            other = running[i]
            if other >= 0 and (r > 0 or partition[i] == where):
                others += use[other, mode[other], r]
        limit = (
            clock.capacity[r - 1] * wishes.oversubscribe[1] if r else lanes.table[where, 2] * wishes.oversubscribe[0]
        )
        if others > 0.0 and mine > 0.0 and others + mine > limit * _FITS:
            return _NO_ROOM
    return at


@inner
def _insert(front: Front, priority: np.ndarray, count: int, size: int, op: int, turn: int) -> tuple[int, int]:
    """Put `op` among the first `count` of the ready ops, which fall in priority, or into the heap of `size` ops of
    lower priority, equal ones by `turn`; returns the new count and size."""
    ready = front.ready
    if count == _DEPTH:
        last = ready[count - 1]
        if priority[last] >= priority[op]:
            front.turn[op] = turn
            return count, heap.push(front.rest, size, op, priority, front.turn)
        front.turn[last] = -turn  # ahead of its equals, which came later
        size = heap.push(front.rest, size, last, priority, front.turn)
        count -= 1
    k = count
    while k > 0 and priority[ready[k - 1]] < priority[op]:
        ready[k] = ready[k - 1]
        k -= 1
    ready[k] = op
    return count + 1, size


@kernel
def run_dispatch(clock: Clock, lanes: Lanes, wishes: Wishes, b: Workspace, front: Front) -> float:
    """Fill the schedule of `front`; returns its makespan, inf if nothing runs and nothing can start."""
    running, missing, latency, done_ops = b.running, b.missing, b.latency, b.ended
    priority, mode, succ_ptr, succ = wishes.priority, wishes.mode, clock.succ_ptr, clock.succ
    start, end, lane, hold, since, order = front.start, front.end, front.lane, front.hold, front.since, front.order
    ready, rest, ties, n = front.ready, front.rest, front.turn, len(missing)
    _reset(clock, b)
    waiting, size, started, ended, last, now, turn = ZERO, ZERO, 0, 0, -1, 0.0, 0
    for op in range(n):
        hold[op], since[op] = -1, 0.0
        if missing[op] == 0:
            turn += 1
            waiting, size = _insert(front, priority, waiting, size, op, turn)
    while ended < n:
        kept, blocked = 0, False
        for w in range(waiting):
            op = ready[w]
            at = -1
            if not blocked:
                at = _room(clock, lanes, wishes, running, op)
                blocked = at <= _CONFLICT or (at == _NO_ROOM and not wishes.backfill)
            if at < 0:
                ready[kept] = op
                kept += 1
                continue
            _begin(clock, b, at, op, mode[op])
            lane[op], start[op] = at, now
            latency[at] = clock.launch_s + _switch(lanes, b.ready_at, at, now, clock.switch_s)
            if now > since[op]:
                hold[op] = last
            order[started] = op
            started += 1
        waiting = kept
        while waiting < _DEPTH and size > 0:
            ready[waiting] = heap.pop(rest, size, priority, ties)
            waiting, size = waiting + 1, size - 1
        step = _advance(clock, lanes, b)
        if not step < np.inf:
            return np.inf
        now += step
        done = _progress(b, step, clock.launch_s)
        for c in range(done):
            last = done_ops[c]
            end[last] = now
            for k in range(succ_ptr[last], succ_ptr[last + 1]):
                op = succ[k]
                missing[op] -= 1
                if missing[op] == 0:
                    since[op] = now
                    turn += 1
                    waiting, size = _insert(front, priority, waiting, size, op, turn)
        ended += done
    return now
