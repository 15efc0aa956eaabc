"""Search over activity lists and mode lists: a steady-state genetic algorithm whose children are justified.

The parts are those of the field's best: lists as the code (Hartmann 1998), forward-backward improvement of every child
and coding by the improved schedule (Valls, Ballestin and Quintanilla 2008), a child that replaces its worse parent and
no two equal schedules, which keeps many valleys alive (crowding; Mahfoud 1995). Two populations evolve on two threads
and trade their best at fixed counts, so that a seed and a budget decide the result.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.jit import njit
from taskgraph.schedule.rcpsp import exact
from taskgraph.schedule.rcpsp.passes import (
    CALL_S,
    chains,
    draw,
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
    by_start,
    justify,
    make_scratch,
    make_tables,
    schedules_for,
    seconds_of,
    serial,
)

EPOCHS = 16
"""How often the populations trade."""
LEAST, MOST = 16, 1024
"""Individuals in a population."""
SWAPS = 50
"""Chance in a thousand that two neighbours of a child's list trade places."""
EXACT_ACTIVITIES = 64
"""Up to so many activities `solve_auto` leaves CP-SAT a share of the budget."""
SEARCH_SHARE = 0.4
"""The search's share of that budget."""
UNSET = np.iinfo(np.int64).max


class Island(NamedTuple):
    """One population of p individuals. A row: list, modes, starts, which activities are critical, makespan, mark.

    best_start and best_mode (n,) are the best schedule ever found; tally holds its makespan, the schedules made, the
    rows in use (fewer than p where a project has few schedules) and the random individuals tried for them.
    """

    order: np.ndarray
    mode: np.ndarray
    critical: np.ndarray
    makespan: np.ndarray
    mark: np.ndarray
    salt: np.ndarray
    rng: np.ndarray
    best_start: np.ndarray
    best_mode: np.ndarray
    tally: np.ndarray


def _island(n: int, size: int, seed: int, stream: int) -> Island:
    wide = np.zeros((size, n), np.int64)
    salt = np.random.default_rng(seed).integers(1, 1 << 40, n) | 1
    one = np.zeros(n, np.int64)
    return Island(
        wide, wide.copy(), np.zeros((size, n), np.bool_), np.full(size, UNSET), np.zeros(size, np.int64),
        salt, seeded(seed, stream), one, one.copy(), np.array([UNSET, 0, 0, 0]),
    )  # fmt: skip


@njit
def _evolve(
    t: Tables, keys: np.ndarray, extremes: np.ndarray, island: Island, until: int, target: int, s: Scratch
) -> None:
    """Make children until `until` schedules are made or `target` is reached."""
    n, size = len(t.took), len(island.makespan)
    rng, count = island.rng, island.tally
    child, mode = np.zeros(n, np.int64), np.zeros(n, np.int64)
    start, end, taken = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    while count[1] < until and count[0] > target:
        a = b = count[2]
        if count[3] < size:
            count[3] += 1
            sample(t, keys[draw(rng, len(keys))], rng, child, s.list, s.missing)
            mix_modes(extremes, rng, mode)
        else:
            a, b = _parent(island), _parent(island)
            _cross(island, a, b, child, mode, taken)
            _swap_some(t, child, rng)
            if t.took.shape[1] > 1:
                _change_modes(t, island.critical[a], mode, rng)
        makespan = serial(t, False, child, mode, start, end, s)
        makespan, passes = justify(t, child, mode, start, end, s, makespan)
        count[1] += 1 + passes
        if makespan < count[0]:
            count[0] = makespan
            island.best_start[:] = start
            island.best_mode[:] = mode
        worse = a if a == b or island.makespan[a] > island.makespan[b] else b
        if makespan <= island.makespan[worse]:
            by_start(child, start)
            _settle(island, worse, child, mode, start, end, makespan, s)


@njit
def _parent(island: Island) -> int:
    """The better of two individuals drawn at random."""
    a, b = draw(island.rng, island.tally[2]), draw(island.rng, island.tally[2])
    return a if island.makespan[a] <= island.makespan[b] else b


@njit
def _cross(island: Island, a: int, b: int, child: np.ndarray, mode: np.ndarray, taken: np.ndarray) -> None:
    """Two-point crossover: a's list up to x, then what b has first up to y, then the rest as a has it (Hartmann 1998).
    An activity takes its mode from the parent that gives its place."""
    n = len(child)
    first, second = island.order[a], island.order[b]
    x = draw(island.rng, n)
    y = x + 1 + draw(island.rng, n - x)
    taken[:] = False
    for k in range(x):
        child[k] = first[k]
        taken[first[k]] = True
    k, j = x, 0
    mode[:] = island.mode[a]
    while k < y:
        i = second[j]
        j += 1
        if not taken[i]:
            child[k], taken[i], mode[i] = i, True, island.mode[b, i]
            k += 1
    j = x
    while k < n:
        i = first[j]
        j += 1
        if not taken[i]:
            child[k] = i
            k += 1


@njit
def _swap_some(t: Tables, order: np.ndarray, rng: np.ndarray) -> None:
    for k in range(len(order) - 1):
        if draw(rng, 1000) < SWAPS:
            i, j = order[k], order[k + 1]
            free = True
            for e in range(t.pred_ptr[j], t.pred_ptr[j + 1]):
                free &= t.pred[e] != i
            if free:
                order[k], order[k + 1] = j, i


@njit
def _change_modes(t: Tables, critical: np.ndarray, mode: np.ndarray, rng: np.ndarray) -> None:
    """Change two modes or so, towards balance: a critical activity likelier to a faster mode, one with slack to a
    slower one, which uses less."""
    n, modes = t.took.shape
    for i in range(n):
        if draw(rng, n) >= 2:
            continue
        other = draw(rng, modes)
        if t.took[i, other] < 0:
            continue
        faster = t.took[i, other] < t.took[i, mode[i]]
        if faster == critical[i] or draw(rng, 4) == 0:
            mode[i] = other


@njit
def _settle(
    island: Island, row: int, order: np.ndarray, mode: np.ndarray, start: np.ndarray, end: np.ndarray, makespan: int,
    s: Scratch,
) -> None:  # fmt: skip
    """Put an individual into a row, unless its schedule is in the population already."""
    mark = np.int64(0)
    for i in range(len(order)):
        mark += island.salt[i] * (start[i] + 1) * (1 + 2 * mode[i])
    for other in range(island.tally[2]):
        if island.mark[other] == mark:
            return
    island.tally[2] = max(island.tally[2], row + 1)
    island.order[row] = order
    island.mode[row] = mode
    island.makespan[row] = makespan
    island.mark[row] = mark
    if island.mode.max() > 0:
        length = s.end.max()
        for i in range(len(order)):
            island.critical[row, i] = length - s.end[i] <= start[i]


def _trade(islands: list[Island]) -> None:
    """Each population's best takes the place of the worst in the next one."""
    best = [[part[island.makespan.argmin()].copy() for part in island[:5]] for island in islands]
    for k, island in enumerate(islands):
        *_, makespan, mark = best[k - 1]
        worst = int(island.makespan[: island.tally[2]].argmax())
        if not (island.mark == mark).any() and makespan < island.makespan[worst]:
            for part, value in zip(island[:5], best[k - 1], strict=True):
                part[worst] = value


def solve(project: Project, budget_s: float, seed: int = 0, workers: int = 2) -> Schedule:
    """The best schedule of `workers` populations on as many threads; stops early at a proven bound.

    The budget buys a fixed number of schedules, so equal seeds, budgets and workers give equal results; on the machine
    that the rates were measured on they take about 70 % of it. The clock is only a guard: a machine that is much
    slower stops early. At least one schedule is made.
    """
    if budget_s <= 0 or workers < 1:
        raise PlanError(f"A budget of {budget_s} s and {workers} workers plan nothing; give more than 0 of both.")
    tables, tick = make_tables(project)
    chain = chains(tables)
    stop = ticks_bound(tables, chain)
    keys, extremes = priorities(project, tables, chain), extreme_modes(project)
    each = schedules_for(tables, budget_s - CALL_S)
    size = int(min(max(LEAST, 0.75 * each**0.5), MOST))
    islands = [_island(project.n, size, seed, k) for k in range(workers)]
    scratches = [make_scratch(tables) for _ in islands]
    _evolve(tables, keys, extremes, islands[0], 1, stop, scratches[0])  # before the clock starts: it compiles, and
    # there is a schedule then, however late the threads come to run
    begin = time.perf_counter()

    def run(island: Island, scratch: Scratch, until: int) -> None:
        step = schedules_for(tables, 2 * GUARD_S)
        while island.tally[1] < until and island.tally[0] > stop and time.perf_counter() - begin < budget_s:
            _evolve(tables, keys, extremes, island, min(until, int(island.tally[1]) + step), stop, scratch)

    _in_epochs(islands, scratches, each, run, lambda: time.perf_counter() - begin < budget_s, stop)
    best = min(islands, key=lambda island: int(island.tally[0]))
    made = sum(int(island.tally[1]) for island in islands)
    return seconds_of(project, tick, best.best_start, best.best_mode, stop, "search", made)


def _in_epochs(
    islands: list[Island], scratches: list[Scratch], each: int, run: Callable[[Island, Scratch, int], None],
    in_time: Callable[[], bool], stop: int,
) -> None:  # fmt: skip
    """All populations side by side, with a trade after each epoch. Which one meets the target first decides nothing:
    the others end their epoch."""
    with ThreadPoolExecutor(len(islands)) as pool:
        for epoch in range(1, EPOCHS + 1):
            until = max(1, each * epoch // EPOCHS)
            list(pool.map(run, islands, scratches, [until] * len(islands)))
            if min(int(island.tally[0]) for island in islands) <= stop or not in_time():
                return
            _trade(islands)


def solve_auto(project: Project, budget_s: float, seed: int = 0, workers: int = 2) -> Schedule:
    """Search, then CP-SAT from its result on for what is left of the budget where the project is small and the gap is
    open; search alone where it is large or OR-Tools is not installed."""
    begin = time.perf_counter()
    small = project.n <= EXACT_ACTIVITIES and exact.available()
    found = solve(project, budget_s * (SEARCH_SHARE if small else 1.0), seed, workers)
    left = budget_s - (time.perf_counter() - begin) - exact.MODEL_S
    if found.proven or not small or left <= 0:
        return found
    return exact.solve(project, left, found, workers, seed)
