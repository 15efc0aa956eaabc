"""Periodic schedules of a repeated body: modulo scheduling (Rau 1994), with a choice of SM counts.

Every op of the body starts at `start + k x period` in iteration k. At any phase of the period the ops of all
iterations in flight fit the SMs and every soft resource, so no op is ever slowed. Edges carry a distance: an edge of
distance 1 is from one iteration to the next.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from taskgraph.graph.graph import Graph
from taskgraph.jit import njit
from taskgraph.schedule.evaluate import Assignment, Layout
from taskgraph.schedule.problem import Problem

ISLANDS = 2
_ROUNDS = 12
_TRIAL_OP_S = 2.5e-7
"""Seconds that one op costs in one trial, on the slow side; as in search.py it turns a budget into trials."""
_SHRINK = 0.997
_HOT = 0.01


@dataclass(frozen=True, slots=True)
class Body:
    """m ops of a repeated body, in topological order within an iteration.

    seconds (m, modes) with launch, inf where illegal; use (m, modes, 5) as shares of the device's capacities; edges
    (e, 3): before, after, distance; kin (m,) numbers groups of ops that are alike.
    """

    seconds: np.ndarray
    use: np.ndarray
    edges: np.ndarray
    kin: np.ndarray

    @property
    def m(self) -> int:
        return len(self.seconds)


@dataclass(frozen=True, slots=True)
class Periodic:
    """start (m,) of iteration 0 in seconds, mode (m,), and the period; `bound_s` no schedule's period is below."""

    start: np.ndarray
    mode: np.ndarray
    period_s: float
    bound_s: float


def body_of(window: Graph, problem: Problem, first: int, m: int, iterations: int, kin: np.ndarray) -> Body:
    """The body out of the problem of a flat window of at least 3 iterations, whose ops begin at `first`."""
    middle = iterations - 1
    at = first + middle * m
    edges = []
    for j in range(m):
        for p in problem.pred[problem.pred_ptr[at + j] : problem.pred_ptr[at + j + 1]].tolist():
            if first <= p < at + m:
                edges.append(((p - first) % m, j, middle - (p - first) // m))
    capacity = np.concatenate([[problem.sm_count], problem.capacity])
    rows = slice(at, at + m)
    seconds = np.where(problem.legal[rows], problem.seconds[rows] + problem.launch_s, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(problem.use[rows] > 0, problem.use[rows] / capacity, 0.0)
    return Body(seconds, share, np.array(edges, np.int64).reshape(-1, 3), kin)


def period_bound(body: Body) -> float:
    """The largest of: each resource's least work in a period, and the longest cycle of best times over its distance."""
    area = (body.seconds[:, :, None] * body.use).min(
        axis=1, where=np.isfinite(body.seconds)[:, :, None], initial=np.inf
    )
    best = body.seconds.min(axis=1)
    low, high = float(area.sum(axis=0).max()), float(best.sum())
    if not _has_long_cycle(best, body.edges, low):
        return low
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _has_long_cycle(best, body.edges, middle) else (low, middle)
    return low


@njit
def _has_long_cycle(seconds: np.ndarray, edges: np.ndarray, period: float) -> bool:
    """Whether some cycle needs more than `period` an iteration (Bellman-Ford on start times)."""
    start = np.zeros(len(seconds))
    for _ in range(len(seconds) + 1):
        moved = False
        for e in range(len(edges)):
            ready = start[edges[e, 0]] + seconds[edges[e, 0]] - edges[e, 2] * period
            if ready > start[edges[e, 1]] + 1e-15:
                start[edges[e, 1]] = ready
                moved = True
        if not moved:
            return False
    return True


def find_period(body: Body, budget_s: float, seed: int, bound_s: float | None = None) -> Periodic:
    """The shortest period found by annealing priorities, SM counts and delays at a shrinking period.

    Deterministic for a seed and a budget, as `search.anneal` is."""
    bound = period_bound(body) if bound_s is None else bound_s
    pred_ptr, pred, distance = _incoming(body)
    trials = max(16, int(budget_s / (_TRIAL_OP_S * body.m * _ROUNDS)))
    deadline = time.monotonic() + budget_s
    fastest = np.argmin(body.seconds, axis=1)
    thrifty = np.argmin(np.where(np.isfinite(body.seconds), body.seconds * body.use[:, :, 0], np.inf), axis=1)
    in_turn = float(body.seconds.min(axis=1).sum())
    islands = [
        (m.copy(), np.arange(body.m) * 1.0, np.zeros(body.m), np.zeros(body.m), in_turn) for m in (fastest, thrifty)
    ]
    best = Periodic(np.zeros(body.m), fastest, np.inf, bound)
    with ThreadPoolExecutor(ISLANDS) as threads:
        for turn in range(_ROUNDS):
            jobs = [
                threads.submit(
                    _shrink, *island, bound, trials, (seed * _ROUNDS + turn) * ISLANDS + i, body.seconds, body.use,
                    body.kin, pred_ptr, pred, distance, _HOT,
                )
                for i, island in enumerate(islands)
            ]  # fmt: skip
            periods = [job.result() for job in jobs]
            for island, period in zip(islands, periods, strict=True):
                if period < best.period_s:
                    best = Periodic(island[3].copy(), island[0].copy(), period, bound)
            leader = min(range(ISLANDS), key=lambda i: periods[i])
            islands = [
                (
                    *(a.copy() for a in islands[leader if turn % 3 == 2 else i][:4]),
                    min(periods[i], best.period_s * 1.01),
                )
                for i in range(ISLANDS)
            ]  # type: ignore[misc]
            if best.period_s <= bound * 1.001 or time.monotonic() > deadline:
                break
    return best


def _incoming(body: Body) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges in compressed rows by the op they lead to."""
    by_after = body.edges[np.argsort(body.edges[:, 1], kind="stable")]
    pointer = np.zeros(body.m + 1, np.int64)
    np.cumsum(np.bincount(body.edges[:, 1], minlength=body.m), out=pointer[1:])
    return pointer, by_after[:, 0].copy(), by_after[:, 2].copy()


@njit
def _shrink(
    mode: np.ndarray, key: np.ndarray, delay: np.ndarray, start: np.ndarray, period: float, bound: float, trials: int,
    seed: int, seconds: np.ndarray, use: np.ndarray, kin: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray,
    distance: np.ndarray, hot: float,
) -> float:  # fmt: skip
    """Shrink the period whenever a schedule without violation is found; the best is left in mode and start."""
    np.random.seed(seed % 2**32)
    m, modes = seconds.shape
    found = np.inf
    best_mode, best_start, here = mode.copy(), start.copy(), np.zeros(m)
    best_key, best_delay = key.copy(), delay.copy()
    old_mode, old_key, old_delay = mode.copy(), key.copy(), delay.copy()
    now = _place(mode, key, delay, period, seconds, use, pred_ptr, pred, distance, here)
    for trial in range(trials):
        if now <= 1e-12 * period:
            found = period
            best_mode[:], best_start[:], best_key[:], best_delay[:] = mode, here, key, delay
            if period <= bound * 1.0005:
                break
            period = max(period * (_SHRINK if np.random.random() < 0.7 else 0.98), bound)
            now = _place(mode, key, delay, period, seconds, use, pred_ptr, pred, distance, here)
            continue
        old_mode[:], old_key[:], old_delay[:] = mode, key, delay
        _change(mode, key, delay, kin, seconds, period)
        then = _place(mode, key, delay, period, seconds, use, pred_ptr, pred, distance, here)
        heat = hot * period * (1.0 - trial / trials) + 1e-4 * period
        if then <= now or np.random.random() < np.exp((now - then) / heat):
            now = then
        else:
            mode[:], key[:], delay[:] = old_mode, old_key, old_delay
    if np.isfinite(found):
        mode[:], start[:], key[:], delay[:] = best_mode, best_start, best_key, best_delay
    return found


@njit
def _change(
    mode: np.ndarray, key: np.ndarray, delay: np.ndarray, kin: np.ndarray, seconds: np.ndarray, period: float
) -> None:
    """One op, or all of its kin, on other SMs; one op earlier or later in the order, or delayed."""
    m, modes = seconds.shape
    at, what = np.random.randint(m), np.random.random()
    if what < 0.5:
        step = np.random.randint(1, 3) if np.random.random() < 0.7 else np.random.randint(1, modes + 1)
        step = step if np.random.random() < 0.5 else -step
        alike = np.random.random() < 0.2
        for i in range(m):
            if i == at or (alike and kin[i] == kin[at]):
                to = min(max(mode[i] + step, 0), modes - 1)
                if np.isfinite(seconds[i, to]):
                    mode[i] = to
    elif what < 0.85:
        other = np.random.randint(m)
        if np.random.random() < 0.5:
            key[at], key[other] = key[other], key[at]
        else:
            key[at] = key[other] + (np.random.random() - 0.5)
    elif np.random.random() < 0.5:
        delay[at] = 0.0
    else:
        delay[at] = period * np.random.random() ** 3


@njit
def _place(
    mode: np.ndarray, key: np.ndarray, delay: np.ndarray, period: float, seconds: np.ndarray, use: np.ndarray,
    pred_ptr: np.ndarray, pred: np.ndarray, distance: np.ndarray, start: np.ndarray,
) -> float:  # fmt: skip
    """Serial generation on a cyclic profile: ops by key (smallest first) as early as they fit; fills start.

    Returns the seconds by which the schedule breaks the period: late edges between iterations, and the part of an op
    that found no room."""
    m = len(mode)
    border, level = np.zeros(2 * m + 2), np.zeros((2 * m + 2, 5))
    count = 1
    missing, done = np.zeros(m, np.int64), np.zeros(m, np.bool_)
    for j in range(m):
        for e in range(pred_ptr[j], pred_ptr[j + 1]):
            missing[j] += distance[e] == 0
    broken = 0.0
    for _ in range(m):
        op = -1
        for j in range(m):
            if not done[j] and missing[j] == 0 and (op < 0 or key[j] < key[op]):
                op = j
        took = seconds[op, mode[op]]
        ready = 0.0
        for e in range(pred_ptr[op], pred_ptr[op + 1]):
            if done[pred[e]]:
                ready = max(ready, start[pred[e]] + seconds[pred[e], mode[pred[e]]] - distance[e] * period)
        if took > period:
            broken += took - period
            took = period
        at = _earliest(ready + delay[op], took, period, use[op, mode[op]], border, level, count)
        if at < 0.0:
            broken += took
            start[op] = ready + delay[op]
        else:
            start[op] = at
            count = _claim(at % period, took, period, use[op, mode[op]], border, level, count)
        done[op] = True
        for j in range(m):
            for e in range(pred_ptr[j], pred_ptr[j + 1]):
                if pred[e] == op and distance[e] == 0:
                    missing[j] -= 1
    for j in range(m):
        for e in range(pred_ptr[j], pred_ptr[j + 1]):
            if distance[e] > 0:
                late = start[pred[e]] + seconds[pred[e], mode[pred[e]]] - distance[e] * period - start[j]
                broken += max(0.0, late)
    return broken


@njit
def _earliest(
    ready: float, took: float, period: float, use: np.ndarray, border: np.ndarray, level: np.ndarray, count: int
) -> float:
    """The first time from `ready` on at which `use` fits for `took` seconds, within one period; -1 if there is none."""
    at = ready
    phase = at % period
    k = 0
    while k + 1 < count and border[k + 1] <= phase:
        k += 1
    turn = at - phase
    reached = at
    while at < ready + period:
        fits = True
        for r in range(5):
            fits = fits and (use[r] == 0.0 or level[k, r] + use[r] <= 1.0 + 1e-9)
        ends = turn + (border[k + 1] if k + 1 < count else period)
        if not fits:
            at = ends
        reached = ends
        if fits and reached >= at + took - 1e-15:
            return at
        k += 1
        if k == count:
            k = 0
            turn += period
    return -1.0


@njit
def _claim(
    phase: float, took: float, period: float, use: np.ndarray, border: np.ndarray, level: np.ndarray, count: int
) -> int:
    """Add `use` to the cyclic profile over [phase, phase + took); returns the new number of its segments."""
    last = phase + took
    count = _cut(phase, border, level, count)
    if last < period:
        count = _cut(last, border, level, count)
    elif last > period:
        count = _cut(last - period, border, level, count)
    for k in range(count):
        inside = phase <= border[k] < last or border[k] < last - period
        if inside:
            for r in range(5):
                level[k, r] += use[r]
    return count


@njit
def _cut(phase: float, border: np.ndarray, level: np.ndarray, count: int) -> int:
    """Make `phase` the border of a segment."""
    k = count
    while border[k - 1] > phase:
        k -= 1
    if border[k - 1] == phase:
        return count
    for j in range(count, k, -1):
        border[j] = border[j - 1]
        level[j] = level[j - 1]
    border[k] = phase
    level[k] = level[k - 1]
    return count + 1


# ------------------------------------------------------------------------------------- from starts to lanes


def lanes_of(problem: Problem, start: np.ndarray, mode: np.ndarray, lanes: int) -> Assignment | None:
    """An assignment to lanes that share the device from planned start times: each op on the lane that has been free
    longest, held back by the op that frees its SMs. None when more than `lanes` ops run at once."""
    end = start + problem.seconds[np.arange(problem.n), mode] + problem.launch_s
    order = np.argsort(start, kind="stable")
    lane, hold, most = _colour(start, end, order, problem.pred_ptr, problem.pred, lanes)
    if most > lanes:
        return None
    held = np.flatnonzero(hold >= 0)
    layout = Layout.shared(problem.sm_count, max(int(most), 1))
    return Assignment(layout, order, lane, mode, np.stack([hold[held], held], axis=1))


@njit
def _colour(
    start: np.ndarray, end: np.ndarray, order: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(lane, hold, lanes needed) by op."""
    n = len(start)
    lane, hold = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    free, last = np.full(lanes, -1.0), np.full(lanes, -1, np.int64)
    slack = 1e-9 * end.max()
    most = 0
    for op in order:
        at, latest = -1, -1
        for i in range(lanes):
            if free[i] <= start[op] + slack:
                if at < 0 and last[i] >= 0 and free[i] >= start[op] - slack:
                    at = i
                if last[i] >= 0 and (latest < 0 or end[last[i]] > end[latest]):
                    latest = last[i]
        if at < 0:
            for i in range(lanes):
                if free[i] <= start[op] + slack:
                    at = i
                    break
        if at < 0:
            return lane, hold, lanes + 1
        ready = 0.0
        for e in range(pred_ptr[op], pred_ptr[op + 1]):
            ready = max(ready, end[pred[e]])
        if latest >= 0 and end[latest] > ready + slack:
            hold[op] = latest
        lane[op], free[at], last[at] = at, end[op], op
        most = max(most, at + 1)
    return lane, hold, most
