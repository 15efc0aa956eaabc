"""List scheduling of projects: many quick passes by priority rules and biased random sampling (Kolisch 1996), by the
serial and the parallel generation scheme, each justified. `benchmarks.rcpsp --scheduler list` runs it."""

import heapq
import time
from typing import NamedTuple

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.jit import njit
from taskgraph.schedule.rcpsp.passes import (
    CALL_S,
    chains,
    extreme_modes,
    mix_modes,
    priorities,
    sample,
    seeded,
    ticks_bound,
)
from taskgraph.schedule.rcpsp.project import Project, Schedule
from taskgraph.schedule.rcpsp.sgs import (
    GUARD_S,
    Scratch,
    Tables,
    clear,
    has_room,
    justify,
    make_scratch,
    make_tables,
    schedules_for,
    seconds_of,
    serial,
)  # fmt: skip

NEVER = 1 << 62


class Own(NamedTuple):
    """Scratch of the parallel scheme (n,): the place of each activity in the list, and those that run."""

    place: np.ndarray
    running: np.ndarray


@njit
def parallel(
    t: Tables, order: np.ndarray, mode: np.ndarray, start: np.ndarray, end: np.ndarray, s: Scratch, own: Own
) -> int:
    """Step through the ends of activities; at each, start what is ready and fits, in list order. No instant is
    revisited, so nothing waits while all that it needs is idle (a non-delay schedule)."""
    ptr, succ_ptr, succ = t.pred_ptr, t.succ_ptr, t.succ
    n, modes, words = len(order), t.took.shape[1], len(t.free)
    free, place, ready, missing, running = s.rows, own.place, s.list, s.missing, own.running
    clear(t, s)
    s.used[0] = 1
    waiting = busy = now = makespan = 0
    for k in range(n):
        place[order[k]] = k
    for k in range(n):
        i = order[k]
        missing[i] = ptr[i + 1] - ptr[i]
        if missing[i] == 0:
            ready[waiting] = i
            waiting += 1
    while waiting > 0 or busy > 0:
        k = 0
        while k < waiting:
            i = ready[k]
            row, took = i * modes + mode[i], t.took[i, mode[i]]
            if took > 0 and not has_room(t, free, 0, row):
                k += 1
                continue
            for c in range(k + 1, waiting):
                ready[c - 1] = ready[c]
            waiting -= 1
            start[i], end[i] = now, now + took
            makespan = max(makespan, now + took)
            if took > 0:
                running[busy] = i
                busy += 1
                for w in range(words):
                    free[w] -= t.need[row * words + w]
            else:
                waiting = _release(succ_ptr, succ, i, place, ready, waiting, missing)
                k = 0
        following = NEVER
        for c in range(busy):
            following = min(following, end[running[c]])
        now = following if busy > 0 else now
        kept = 0
        for c in range(busy):
            i = running[c]
            if end[i] > now:
                running[kept] = i
                kept += 1
                continue
            for w in range(words):
                free[w] += t.need[(i * modes + mode[i]) * words + w]
            waiting = _release(succ_ptr, succ, i, place, ready, waiting, missing)
        busy = kept
    return makespan


@njit
def _release(
    succ_ptr: np.ndarray, succ: np.ndarray, i: int, place: np.ndarray, ready: np.ndarray, waiting: int,
    missing: np.ndarray,
) -> int:  # fmt: skip
    """Activity i is done: put what waited for it alone among the ready ones, in list order; returns their count."""
    for e in range(succ_ptr[i], succ_ptr[i + 1]):
        j = succ[e]
        missing[j] -= 1
        if missing[j] == 0:
            k = waiting
            while k > 0 and place[ready[k - 1]] > place[j]:
                ready[k] = ready[k - 1]
                k -= 1
            ready[k] = j
            waiting += 1
    return waiting


@njit
def greedy(t: Tables, key: np.ndarray, order: np.ndarray, missing: np.ndarray) -> None:
    """The topological order that always takes the smallest key that is ready."""
    heap = [(key[0], 0)]
    heap.pop()
    for i in range(len(key)):
        missing[i] = t.pred_ptr[i + 1] - t.pred_ptr[i]
        if missing[i] == 0:
            heapq.heappush(heap, (key[i], i))
    for k in range(len(key)):
        _, i = heapq.heappop(heap)
        order[k] = i
        for e in range(t.succ_ptr[i], t.succ_ptr[i + 1]):
            j = t.succ[e]
            missing[j] -= 1
            if missing[j] == 0:
                heapq.heappush(heap, (key[j], j))


class Sampling(NamedTuple):
    """What passes draw from: a key for every rule and activity (rules, n), the modes of `extreme_modes` (2, n), and the
    state of `draw` (1,)."""

    keys: np.ndarray
    extremes: np.ndarray
    rng: np.ndarray


class Found(NamedTuple):
    """The best schedule of some passes: start and mode (n,); tally (3,) is its makespan, and the schedules and passes
    that were made."""

    start: np.ndarray
    mode: np.ndarray
    tally: np.ndarray


@njit
def _passes(t: Tables, among: Sampling, best: Found, until: int, target: int, s: Scratch, own: Own) -> None:
    """Passes until `until` schedules are made or `target` is reached."""
    keys, extremes, rng, state = among.keys, among.extremes, among.rng, best.tally
    n, rules = len(t.took), len(keys)
    order, mode = np.zeros(n, np.int64), extremes[0].copy()
    start, end = np.zeros(n, np.int64), np.zeros(n, np.int64)
    while state[1] < until and state[0] > target:
        number = state[2]
        state[2] += 1
        rule, first = number % rules, number < 4 * rules
        if first:
            greedy(t, keys[rule], order, s.list)
            mode[:] = extremes[number // (2 * rules)]
        else:
            sample(t, keys[rule], rng, order, s.list, s.start)
            mix_modes(extremes, rng, mode)
        if number // rules % 2 == 0:
            makespan = serial(t, False, order, mode, start, end, s)
        else:
            makespan = parallel(t, order, mode, start, end, s, own)
        made = 1
        if makespan > target:
            makespan, made = justify(t, order, mode, start, end, s, makespan)
            made += 1
        state[1] += made
        if makespan < state[0]:
            state[0] = makespan
            best.start[:] = start
            best.mode[:] = mode


def solve_list(project: Project, budget_s: float = 0.01, seed: int = 0) -> Schedule:
    """The best of many passes of list scheduling, on one core.

    The budget buys a fixed number of schedules, so equal seeds and budgets give equal results; on the machine that
    the constants were measured on they take about 70 % of it. The clock is only a guard: a machine that is much
    slower stops early. At least one pass of every rule is made.
    """
    if budget_s <= 0:
        raise PlanError(f"A budget of {budget_s} s plans nothing; give more than 0.")
    tables, tick = make_tables(project)
    chain = chains(tables)
    target = ticks_bound(tables, chain)
    among = Sampling(priorities(project, tables, chain), extreme_modes(project), seeded(seed, 0))
    start, mode = np.zeros((2, project.n), np.int64)
    best, scratch = Found(start, mode, np.array([np.iinfo(np.int64).max, 0, 0])), make_scratch(tables)
    own = Own(*np.zeros((2, project.n), np.int64))
    count = schedules_for(tables, budget_s - CALL_S)
    _passes(tables, among, best, 0, target, scratch, own)  # compiled before the clock starts
    begin = time.perf_counter()
    step = max(1, min(count, schedules_for(tables, GUARD_S)))
    for until in range(step, count + step, step):
        _passes(tables, among, best, min(until, count), target, scratch, own)
        if best.tally[0] <= target or time.perf_counter() - begin > budget_s:
            break
    return seconds_of(project, tick, start, mode, target, "list", int(best.tally[1]))
