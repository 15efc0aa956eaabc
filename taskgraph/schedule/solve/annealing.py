"""Search: simulated annealing over priorities, SM counts, partitions and their sizes, with the one clock as its judge.

A state says for every decision (an op, or an op of a repeated body for all its iterations) its SMs, its partition and
its delay; `dispatch` turns that into a schedule. A repeated body is judged on a window of a few iterations: the
window's time, scaled to all iterations.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from taskgraph.graph.device import Device, Geometry, Partition
from taskgraph.jit import njit
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, _dispatch, dispatch
from taskgraph.schedule.problem import Problem
from taskgraph.schedule.solve.lists import upward_rank

ISLANDS = 2
"""Annealing runs side by side, a thread each; a fixed number, so that a seed means the same on every machine."""
ROUNDS = 6
_OP_S = 4e-6
"""Seconds that one op costs in one trial, on the slow side: it turns a budget into a number of trials, so that equal
seeds and budgets give equal plans on any machine that keeps up. The wall clock only guards."""
_OVERSUBSCRIBE = np.array([1.0, 1.25, 1.5, 2.0, np.inf])
_BACKFILL, _SM, _SOFT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Space:
    """What is decided, on which problem.

    decision (n,) by op; kin (d,) numbers groups of decisions that are alike, as the slices of one op are; `window`
    iterations of a repeated body are in the problem and `total` in the graph. iteration (n,) by op: ops before the
    body belong to the first, those after it to the last; inside (n,) says which are of the body; tied (d,) which
    decisions must run one after another, as collectives between ranks do.
    """

    problem: Problem
    decision: np.ndarray
    kin: np.ndarray
    iteration: np.ndarray
    inside: np.ndarray
    tied: np.ndarray
    window: int = 1
    total: int = 1

    @staticmethod
    def flat(problem: Problem) -> "Space":
        """Every op decides for itself."""
        everyone = np.arange(problem.n)
        no, yes = np.zeros(problem.n, np.bool_), np.ones(problem.n, np.bool_)
        return Space(problem, everyone, everyone, np.zeros(problem.n, np.int64), yes, no)

    def lowest_mode(self) -> np.ndarray:
        """(d,) the least mode that is legal for every op of a decision."""
        first = np.argmax(self.problem.legal, axis=1)
        lowest = np.zeros(len(self.kin), np.int64)
        np.maximum.at(lowest, self.decision, first)
        return lowest


@dataclass(frozen=True, slots=True)
class State:
    """One point of the space: mode, row of the layout and delay in seconds (d,) by decision; rows (p, 4) as in
    `Layout.rows`; the policies of `dispatch`; and the seconds that it is judged at."""

    mode: np.ndarray
    row: np.ndarray
    delay: np.ndarray
    rows: np.ndarray
    policy: np.ndarray
    seconds: float = np.inf

    def layout(self, origin: Layout) -> Layout:
        """`origin` with the partition sizes of this state."""
        return Layout(
            tuple(
                Geometry(tuple(Partition(int(r[1]), int(r[2])) for r in self.rows if r[0] == g))
                for g in range(len(origin.geometries))
            ),
            origin.lanes_each,
        )


def starts(space: Space, layout: Layout) -> list[State]:
    """States to begin from: every op where its seconds x SMs^thrift are least, from the fastest mode (thrift 0, the one
    of fewest SMs) to that of the least area (1, the one of most SMs)."""
    problem, lowest = space.problem, space.lowest_mode()
    zeros, row = np.zeros(len(lowest)), np.zeros(len(lowest), np.int64)
    found = []
    for thrift in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        product = np.where(problem.legal, problem.seconds * problem.use[:, :, 0] ** thrift, np.inf)
        good = product <= product.min(axis=1, keepdims=True) * (1 + 1e-9)
        wanted = np.argmax(good, axis=1) if thrift == 0 else good.shape[1] - 1 - np.argmax(good[:, ::-1], axis=1)
        mode = lowest.copy()
        np.maximum.at(mode, space.decision, wanted)
        found += [State(mode, row, zeros, layout.rows, np.array([1, sm, 4])) for sm in range(len(_OVERSUBSCRIBE))]
    return found


def search_layouts(device: Device) -> list[Layout]:
    """Lanes that share the device, each op on the SMs that the search gives it (GPUs: a kernel's grid limits it; the
    threads of a CPU lane are pinned), and a geometry of two partitions whose border the search moves, in turns with
    the whole device."""
    halves = [g for g in device.splits() if len(g.partitions) == 2]
    turns = [Layout.isolated(Geometry.of(device.sm_count), halves[-1])] if halves else []
    return [Layout.shared(device.sm_count, 6), *turns] if device.kind == "gpu" else turns


def anneal(space: Space, layout: Layout, begin: Sequence[State], budget_s: float, seed: int) -> State:
    """The best state found from `begin`; equal arguments give equal results unless the machine is too slow for the
    number of trials that `budget_s` stands for, and the clock ends the search."""
    kernel = _kernel_arguments(space, layout)

    def walk(state: State, trials: int, seed: int, hot: float, cold: float) -> State:
        return _walk(kernel, state, trials, seed, hot, cold)

    trials = int(budget_s / (_OP_S * space.problem.n * ROUNDS))
    return islands(walk, begin, trials, budget_s, seed, Cooling(0.02, 1e-5, 10.0))


class _Judged(Protocol):
    @property
    def seconds(self) -> float: ...


J = TypeVar("J", bound=_Judged)
Walk = Callable[[J, int, int, float, float], J]
"""(from where, trials, seed, hot, cold) -> the best of an annealing run."""


@dataclass(frozen=True, slots=True)
class Cooling:
    """Relative losses that are accepted: about `start` at first, falling with every round to `end`; within a round to
    the `span`-th part."""

    start: float
    end: float
    span: float


def islands(walk: Walk[J], begin: Sequence[J], trials: int, budget_s: float, seed: int, cooling: Cooling) -> J:
    """The best of ISLANDS runs side by side, from the best of `begin`: ROUNDS of `trials` each. The leader is copied to
    one island after each round, and to all in the second half; the clock only guards."""
    pool = [walk(each, 1, 0, 1e-3, 1e-4) for each in begin]  # compiles and judges, before the clock starts
    deadline = time.monotonic() + 2 * budget_s + 0.5
    best = sorted(pool, key=lambda each: each.seconds)[:ISLANDS]
    best = [best[i % len(best)] for i in range(ISLANDS)]
    with ThreadPoolExecutor(ISLANDS) as threads:
        for turn in range(ROUNDS):
            hot = cooling.start * (1 - turn / ROUNDS) ** 2 + cooling.end
            jobs = [
                threads.submit(
                    walk, each, max(8, trials), (seed * ROUNDS + turn) * ISLANDS + i, hot, hot / cooling.span
                )
                for i, each in enumerate(best)
            ]
            found = [job.result() for job in jobs]
            leader = min([*found, *best], key=lambda each: each.seconds)
            best = [leader, *found[1:]] if turn < ROUNDS // 2 else [leader] * ISLANDS
            if time.monotonic() > deadline:
                break
    return min(best, key=lambda each: each.seconds)


def realise(space: Space, layout: Layout, state: State) -> tuple[Assignment, Evaluation]:
    """The schedule of `state` on the space's problem."""
    problem, d = space.problem, space.decision
    mode = fitted(state.mode[d], state.row[d], state.rows, problem.sizes, np.array(layout.rows[:, 3]))
    priority = upward_rank(problem) - state.delay[d]
    limits = (float(_OVERSUBSCRIBE[state.policy[_SM]]), float(_OVERSUBSCRIBE[state.policy[_SOFT]]))
    backfill = bool(state.policy[_BACKFILL])
    return dispatch(problem, state.layout(layout), priority, mode, state.row[d], limits, backfill)


def _kernel_arguments(space: Space, layout: Layout) -> tuple[object, ...]:
    problem = space.problem
    granularity = int(np.diff(problem.sizes).min()) if len(problem.sizes) > 1 else 0
    return (
        space.decision, space.kin, space.total / space.window, space.lowest_mode(),
        upward_rank(problem), granularity, layout.lane_partition, layout.conflicts, problem.sizes,
        problem.seconds, problem.use, problem.pred_ptr, problem.succ_ptr, problem.succ, problem.capacity,
        problem.sm_bytes_per_s, problem.launch_s, problem.switch_s, problem.best_seconds().mean(),
    )  # fmt: skip


def _walk(kernel: tuple[object, ...], state: State, trials: int, seed: int, hot: float, cold: float) -> State:
    mode, row, delay, rows, policy = (a.copy() for a in (state.mode, state.row, state.delay, state.rows, state.policy))
    seconds = _anneal(mode, row, delay, rows, policy, trials, seed % 2**32, hot, cold, *kernel)  # type: ignore[arg-type]
    return replace(state, mode=mode, row=row, delay=delay, rows=rows, policy=policy, seconds=seconds)


@njit
def fitted(
    mode: np.ndarray, row: np.ndarray, rows: np.ndarray, sizes: np.ndarray, lanes_each: np.ndarray
) -> np.ndarray:
    """Modes that fit the partitions: all SMs of a partition with one lane, at most them in one with several."""
    whole = np.searchsorted(sizes, rows[:, 2])
    fitted = np.empty_like(mode)
    for i in range(len(mode)):
        fitted[i] = whole[row[i]] if lanes_each[row[i]] == 1 else min(mode[i], whole[row[i]])
    return fitted


@njit
def _judge(
    mode: np.ndarray, row: np.ndarray, delay: np.ndarray, rows: np.ndarray, policy: np.ndarray, decision: np.ndarray,
    scale: float, rank: np.ndarray, lane_partition: np.ndarray,
    conflicts: np.ndarray, sizes: np.ndarray, seconds: np.ndarray, use: np.ndarray, pred_ptr: np.ndarray,
    succ_ptr: np.ndarray, succ: np.ndarray, capacity: np.ndarray, sm_bytes_per_s: float, launch_s: float,
    switch_s: float,
) -> float:  # fmt: skip
    """Seconds of the whole graph under a state: the window's, scaled to all iterations.

    Not the time between two iterations in the window: that rewards a schedule that runs one slice far ahead."""
    n = len(decision)
    start, end, lane, hold = np.zeros(n), np.zeros(n), np.zeros(n, np.int64), np.full(n, -1, np.int64)
    mode_of_op = fitted(mode[decision], row[decision], rows, sizes, rows[:, 3])
    _dispatch(
        rank - delay[decision], mode_of_op, row[decision], _OVERSUBSCRIBE[policy[_SM:]], policy[_BACKFILL] == 1,
        lane_partition, rows, conflicts, seconds, use, pred_ptr, succ_ptr, succ, capacity, sm_bytes_per_s, launch_s,
        switch_s, start, end, lane, hold,
    )  # fmt: skip
    total_s: float = end.max() * scale
    return total_s


@njit
def _anneal(
    mode: np.ndarray, row: np.ndarray, delay: np.ndarray, rows: np.ndarray, policy: np.ndarray, trials: int,
    seed: int, hot: float, cold: float, decision: np.ndarray, kin: np.ndarray, scale: float,
    lowest: np.ndarray, rank: np.ndarray, granularity: int, lane_partition: np.ndarray,
    conflicts: np.ndarray, sizes: np.ndarray, seconds: np.ndarray, use: np.ndarray, pred_ptr: np.ndarray,
    succ_ptr: np.ndarray, succ: np.ndarray, capacity: np.ndarray, sm_bytes_per_s: float, launch_s: float,
    switch_s: float, op_s: float,
) -> float:  # fmt: skip
    """Metropolis over `trials` moves, cooling from `hot` to `cold` (relative to the time); leaves the best state in the
    first five arguments and returns its seconds."""
    np.random.seed(seed)
    d = len(kin)
    now = best = _judge(
        mode, row, delay, rows, policy, decision, scale, rank, lane_partition, conflicts, sizes,
        seconds, use, pred_ptr, succ_ptr, succ, capacity, sm_bytes_per_s, launch_s, switch_s,
    )  # fmt: skip
    best_mode, best_row, best_delay = mode.copy(), row.copy(), delay.copy()
    best_rows, best_policy = rows.copy(), policy.copy()
    old_mode, old_row, old_delay = mode.copy(), row.copy(), delay.copy()
    old_rows, old_policy = rows.copy(), policy.copy()
    for trial in range(trials - 1):
        old_mode[:], old_row[:], old_delay[:], old_rows[:], old_policy[:] = mode, row, delay, rows, policy
        _move(mode, row, delay, rows, policy, kin, lowest, granularity, sizes, op_s)
        for i in range(d):
            if sizes[lowest[i]] > rows[row[i], 2]:
                row[i] = np.argmax(rows[:, 2])
        then = _judge(
            mode, row, delay, rows, policy, decision, scale, rank, lane_partition, conflicts,
            sizes, seconds, use, pred_ptr, succ_ptr, succ, capacity, sm_bytes_per_s, launch_s, switch_s,
        )  # fmt: skip
        heat = now * hot * (cold / hot) ** (trial / trials)
        if then <= now or np.random.random() < np.exp((now - then) / heat):
            now = then
            if now < best:
                best = now
                best_mode[:], best_row[:], best_delay[:] = mode, row, delay
                best_rows[:], best_policy[:] = rows, policy
        else:
            mode[:], row[:], delay[:], rows[:], policy[:] = old_mode, old_row, old_delay, old_rows, old_policy
    mode[:], row[:], delay[:], rows[:], policy[:] = best_mode, best_row, best_delay, best_rows, best_policy
    return best


@njit
def _move(
    mode: np.ndarray, row: np.ndarray, delay: np.ndarray, rows: np.ndarray, policy: np.ndarray, kin: np.ndarray,
    lowest: np.ndarray, granularity: int, sizes: np.ndarray, op_s: float,
) -> None:  # fmt: skip
    """Change one decision, or all of its kin, or a policy, or the border between two partitions."""
    at, what = np.random.randint(len(kin)), np.random.random()
    alike = np.random.random() < 0.25
    if what < 0.45:
        step = np.random.randint(1, 4) if np.random.random() < 0.8 else np.random.randint(1, len(sizes) + 1)
        step = step if np.random.random() < 0.5 else -step
        for i in range(len(kin)):
            if i == at or (alike and kin[i] == kin[at]):
                mode[i] = min(max(mode[i] + step, lowest[i]), len(sizes) - 1)
    elif what < 0.8:
        shift = np.random.normal() * op_s * (4.0 if np.random.random() < 0.3 else 1.0)
        for i in range(len(kin)):
            if i == at or (alike and kin[i] == kin[at]):
                delay[i] += shift
    elif what < 0.95 and len(rows) > 1:
        target = np.random.randint(len(rows))
        for i in range(len(kin)):
            if i == at or (alike and kin[i] == kin[at]):
                row[i] = target
    elif what < 0.98 and len(rows) > 1:
        p = np.random.randint(len(rows) - 1)
        shift = granularity if np.random.random() < 0.5 else -granularity
        neighbours = rows[p, 0] == rows[p + 1, 0]
        if neighbours and _legal(rows[p, 2] + shift, sizes) and _legal(rows[p + 1, 2] - shift, sizes):
            rows[p, 2] += shift
            rows[p + 1, 1] += shift
            rows[p + 1, 2] -= shift
    elif np.random.random() < 0.3:
        policy[_BACKFILL] = 1 - policy[_BACKFILL]
    else:
        policy[np.random.randint(_SM, _SOFT + 1)] = np.random.randint(len(_OVERSUBSCRIBE))


@njit
def _legal(size: int, sizes: np.ndarray) -> bool:
    found = False
    for s in sizes:
        found = found or s == size
    return found
