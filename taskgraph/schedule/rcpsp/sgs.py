"""Schedule generation for projects, in numba: the serial scheme (Kolisch 1996) and justification.

Time is counted in whole ticks and all resources of an instant are packed into 64-bit words, so that one subtraction
compares them all: each resource has a field with a guard bit above it, which a too large demand clears (SIMD within a
register; Lamport 1975). A profile is either a grid, one row a tick, or a list of events, one row a change.
"""

import math
from typing import NamedTuple

import numpy as np

from taskgraph.jit import njit
from taskgraph.schedule.rcpsp.project import FRACTION_SLACK, Project, Schedule, with_bound

GRID_TICKS = 1 << 14
"""Above this horizon a profile is kept as events."""
ACTIVITY_S = {True: 1.4e-7, False: 7e-7}
"""Seconds to place one activity, with its share of search around it, on a grid and in events; see `schedules_for`."""
GUARD_S = 0.005
"""How often a search looks at the clock."""
FRACTION_BITS = 30
"""Capacity of a resource that is not used in whole units, in packed units."""


class Tables(NamedTuple):
    """What the kernels read. took (n, m) ticks, -1 where a mode is not allowed; need (n * m * w,) packed;
    free (w,) the packed capacities under set guards; horizon is 0 for profiles of events."""

    took: np.ndarray
    need: np.ndarray
    free: np.ndarray
    guard: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    horizon: int


class Scratch(NamedTuple):
    """Memory of one thread: the profile, its times when it is a list of events, and how many rows are in use."""

    rows: np.ndarray
    times: np.ndarray
    used: np.ndarray
    list: np.ndarray
    missing: np.ndarray
    start: np.ndarray
    end: np.ndarray


def make_tables(project: Project) -> tuple[Tables, float]:
    """Tables and the seconds of a tick: 1 for whole durations, else a power of two far below any duration.

    Times that are not whole are rounded up by less than a tick, and a power of two keeps tick * count exact; so a
    schedule in ticks is valid in seconds without a tolerance.
    """
    allowed = np.isfinite(project.seconds)
    longest = np.where(allowed, project.seconds, 0.0).max(axis=1).sum()
    tick = 1.0 if project.whole else 2.0 ** (math.frexp(longest)[1] - 48)
    took = np.where(allowed, np.ceil(np.where(allowed, project.seconds, 0.0) / tick), -1).astype(np.int64)
    horizon = int(took.max(axis=1).sum()) + int(took.max()) + 1
    need, free, guard = _packed(project)
    graph = (project.pred_ptr, project.pred, project.succ_ptr, project.succ)
    return Tables(took, need, free, guard, *graph, horizon if horizon <= GRID_TICKS else 0), tick


def make_scratch(tables: Tables) -> Scratch:
    n = len(tables.took)
    depth = max(tables.horizon, 2 * n + 2)
    return Scratch(
        np.tile(tables.free, depth),
        np.zeros(1 if tables.horizon else depth, np.int64),
        np.ones(1, np.int64),
        *(np.zeros(n, np.int64) for _ in range(4)),
    )


def seconds_of(
    project: Project, tick: float, start: np.ndarray, mode: np.ndarray, bound: int, made_by: str, schedules: int
) -> Schedule:
    """The Schedule of starts in ticks. `bound` is one in ticks; times that were rounded up weaken it by a tick each."""
    begin = start * tick
    makespan = float((begin + project.seconds[np.arange(project.n), mode]).max())
    found = Schedule(begin, mode.copy(), makespan, 0.0, False, made_by, schedules)
    return with_bound(project, found, bound * tick - (0.0 if project.whole else project.n * tick))


def whole_units(project: Project) -> tuple[np.ndarray, np.ndarray]:
    """(use (n, m, r), capacity (r,)) in whole units: the given ones where all are whole, else 2**30 to the capacity.

    A rounded use is off by half a unit at most, and the capacity is widened by as much for each activity, up to half
    of what `check` allows.
    """
    use = np.where(np.isfinite(project.seconds)[:, :, None], project.use, 0.0)
    whole = (use == np.floor(use)).all(axis=(0, 1)) & (project.capacity < 2.0**FRACTION_BITS)
    unit = np.where(whole, 1.0, project.capacity / 2.0**FRACTION_BITS)
    slack = min(project.n // 2, int(FRACTION_SLACK / 2 * 2.0**FRACTION_BITS))
    limit = np.floor(np.where(whole, project.capacity, 2.0**FRACTION_BITS)) + np.where(whole, 0, slack)
    return np.round(use / unit).astype(np.int64), limit.astype(np.int64)


def _packed(project: Project) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(need, free, guard): resources in fields of 64-bit words, as many in a word as fit."""
    amount, limit = whole_units(project)
    need, free, guard = [], [], []
    room = 0
    for r, capacity in enumerate(limit.tolist()):
        bits = capacity.bit_length() + 1
        if bits > room:
            need.append(np.zeros(project.seconds.shape, np.uint64))
            free.append(0)
            guard.append(0)
            room = 64
        shift = 64 - room
        need[-1] |= amount[:, :, r].astype(np.uint64) << np.uint64(shift)
        guard[-1] |= 1 << (shift + bits - 1)
        free[-1] |= (capacity << shift) | (1 << (shift + bits - 1))
        room -= bits
    return np.stack(need, axis=2).ravel(), np.array(free, np.uint64), np.array(guard, np.uint64)


def schedules_for(tables: Tables, seconds: float) -> int:
    """How many schedules a budget buys: a fixed rate, so that equal budgets give equal searches on every machine."""
    return max(1, int(seconds / (ACTIVITY_S[tables.horizon > 0] * (len(tables.took) + 5))))


@njit
def serial(
    t: Tables, back: bool, order: np.ndarray, mode: np.ndarray, start: np.ndarray, end: np.ndarray, s: Scratch
) -> int:
    """Place activities in list order, each as early as it fits; returns the makespan. `back` reverses time."""
    ptr, before = (t.succ_ptr, t.succ) if back else (t.pred_ptr, t.pred)
    modes, words = t.took.shape[1], len(t.free)
    clear(t, s)
    makespan = 0
    for k in range(len(order)):
        i = order[k]
        at = 0
        for e in range(ptr[i], ptr[i + 1]):
            at = max(at, end[before[e]])
        row = i * modes + mode[i]
        took = t.took[i, mode[i]]
        if took > 0:
            if t.horizon == 0:
                at = _place_in_events(t, s, at, took, row)
            elif words == 1:
                at = _place_in_grid(s.rows, at, took, t.need[row], t.guard[0])
            else:
                at = _place_in_wide_grid(t, s.rows, at, took, row)
        start[i], end[i] = at, at + took
        makespan = max(makespan, at + took)
    if t.horizon:
        s.used[0] = makespan
    return makespan


@njit
def clear(t: Tables, s: Scratch) -> None:
    """An empty profile. `used` counts the rows that may differ from an empty one."""
    words = len(t.free)
    for k in range(s.used[0]):
        for w in range(words):
            s.rows[k * words + w] = t.free[w]
    s.used[0] = 0 if t.horizon else 1
    s.times[0] = 0


@njit
def _place_in_grid(rows: np.ndarray, at: int, took: int, need: int, guard: int) -> int:
    """Take `need` for `took` ticks at the first instant from `at` on where it fits; returns the instant."""
    low, high = at, at + took
    while True:
        k = high - 1
        while k >= low and (rows[k] - need) & guard == guard:
            k -= 1
        if k < low:
            break
        at, low, high = k + 1, high, k + 1 + took
    for k in range(at, at + took):
        rows[k] -= need
    return at


@njit
def _place_in_wide_grid(t: Tables, rows: np.ndarray, at: int, took: int, row: int) -> int:
    """As `_place_in_grid`, for resources that need several words."""
    words = len(t.free)
    low, high = at, at + took
    while True:
        k = high - 1
        while k >= low and has_room(t, rows, k, row):
            k -= 1
        if k < low:
            break
        at, low, high = k + 1, high, k + 1 + took
    for k in range(at, at + took):
        for w in range(words):
            rows[k * words + w] -= t.need[row * words + w]
    return at


@njit
def has_room(t: Tables, rows: np.ndarray, k: int, row: int) -> bool:
    words = len(t.free)
    fits = True
    for w in range(words):
        fits &= (rows[k * words + w] - t.need[row * words + w]) & t.guard[w] == t.guard[w]
    return fits


@njit
def _place_in_events(t: Tables, s: Scratch, at: int, took: int, row: int) -> int:
    """As `_place_in_grid`, over rows that hold from times[k] until times[k + 1], the last one for ever."""
    rows, times, count, words = s.rows, s.times, s.used[0], len(t.free)
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) >> 1
        if times[middle] <= at:
            low = middle
        else:
            high = middle
    first, last = low, low
    while last < count and (times[last] < at + took or last == first):
        fits = has_room(t, rows, last, row)
        last += 1
        if not fits:
            first, at = last, times[last]
    if times[first] < at:
        _split(s, words, first, at)
        first, last = first + 1, last + 1
    if last == s.used[0] or times[last] > at + took:
        _split(s, words, last - 1, at + took)
    for k in range(first, last):
        for w in range(words):
            rows[k * words + w] -= t.need[row * words + w]
    return at


@njit
def _split(s: Scratch, words: int, k: int, at: int) -> None:
    """Divide row k at instant `at`, which lies inside it."""
    for i in range(s.used[0], k + 1, -1):
        s.times[i] = s.times[i - 1]
    for i in range((s.used[0] + 1) * words - 1, (k + 1) * words - 1, -1):
        s.rows[i] = s.rows[i - words]
    s.times[k + 1] = at
    s.used[0] += 1


@njit
def by_end(order: np.ndarray, end: np.ndarray, back: bool) -> None:
    """Sort a list in place by decreasing end, for a pass the other way; ties as a topological order has them."""
    n = len(order)
    for k in range(n // 2):
        order[k], order[n - 1 - k] = order[n - 1 - k], order[k]
    for k in range(1, n):
        i = order[k]
        at = k
        while at > 0:
            j = order[at - 1]
            if end[j] > end[i] or (end[j] == end[i] and (j < i) == back):
                break
            order[at] = j
            at -= 1
        order[at] = i


@njit
def by_start(order: np.ndarray, start: np.ndarray) -> None:
    """Sort a list in place by start; ties as a topological order has them."""
    for k in range(1, len(order)):
        i = order[k]
        at = k
        while at > 0:
            j = order[at - 1]
            if start[j] < start[i] or (start[j] == start[i] and j < i):
                break
            order[at] = j
            at -= 1
        order[at] = i


@njit
def justify(
    t: Tables, order: np.ndarray, mode: np.ndarray, start: np.ndarray, end: np.ndarray, s: Scratch, makespan: int
) -> tuple[int, int]:
    """Shift everything right, then left, while that shortens the schedule; returns (makespan, schedules generated).

    Forward-backward improvement (Tormos and Lova 2001; Valls, Ballestin and Quintanilla 2005). On return start and
    end are the last left-justified schedule and `order` is the list that makes it.
    """
    passes = 0
    while True:
        by_end(order, end, False)
        serial(t, True, order, mode, s.start, s.end, s)
        by_end(order, s.end, True)
        shorter = serial(t, False, order, mode, start, end, s)
        passes += 2
        if shorter >= makespan:
            return shorter, passes
        makespan = shorter
