"""Fixed orders, annealed: every lane has a queue, and in a repeated body the same queue in every iteration.

A cycle gives every decision (an op of the body, for all iterations) its lane, its SMs and its place in time, counted in
periods; places may reach over several iterations, so that iterations overlap (modulo scheduling, Lam 1988). The
iterations of a body written out in that order run in step, and the one clock says what a period takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from taskgraph.jit import njit
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Evaluation, Layout, _simulate
from taskgraph.schedule.solve.annealing import ROUNDS, Cooling, Space, State, fitted, islands, realise

_STEP = 1e-7
"""The least distance in periods between the places of two ops of which one needs the other."""
_OP_S = 5e-7
"""Seconds that one op costs in one trial; it turns a budget into a number of trials, as in `search`."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """place (d,) in periods, lane (d,) and mode (d,) by decision, and the seconds of the whole graph."""

    place: np.ndarray
    lane: np.ndarray
    mode: np.ndarray
    seconds: float = np.inf


def cycle_of(space: Space, layout: Layout, state: State) -> Cycle:
    """The cycle that the schedule of a search's state suggests: what its middle iteration does, on lanes of its own."""
    _, times = realise(space, layout, state)
    period_s = period(space, times)
    middle = np.full(len(space.kin), -1)
    wanted = (space.iteration == space.window // 2) | ~space.inside
    middle[space.decision[wanted]] = np.flatnonzero(wanted)
    begin = times.start_s[middle] / period_s - space.iteration[middle]
    length = (times.end_s - times.start_s)[middle] / period_s
    lane = np.empty(len(middle), np.int64)
    _colour(begin, length, state.row, layout.lane_partition, space.window > 1, lane)
    return Cycle(begin, _on_one_lane(space, layout, lane), state.mode)


def plain_cycle(space: Space, layout: Layout, state: State) -> Cycle:
    """A cycle that is never a deadlock: the ops in their order, one iteration after another, on the state's SMs."""
    place = np.empty(len(space.kin))
    once = np.flatnonzero((space.iteration == 0) | ~space.inside)
    place[space.decision[once]] = np.arange(len(once)) / len(once)
    lane = np.searchsorted(layout.lane_partition, state.row)
    return Cycle(place, _on_one_lane(space, layout, lane), state.mode)


def _on_one_lane(space: Space, layout: Layout, lane: np.ndarray) -> np.ndarray:
    """`lane` with all tied decisions on the last lane of the largest partition: there they run one after another."""
    rooms = layout.rows[layout.lane_partition, 2]
    last = len(rooms) - 1 - int(np.argmax(rooms[::-1]))
    return np.where(space.tied, last, lane)


def period(space: Space, times: Evaluation) -> float:
    """Seconds from one iteration to the next, in the middle; of a flat graph its makespan."""
    seconds: float = _period(times.end_s, space.decision, space.iteration, space.inside, space.window)
    return seconds


def polish(
    space: Space, layout: Layout, begin: Sequence[Cycle], budget_s: float, seed: int, heat: float = 0.01
) -> Cycle:
    """The best cycle found from `begin`, at first with losses of about `heat` of the time accepted; equal arguments
    give equal results, as for `search.anneal`."""
    kernel = _kernel_arguments(space, layout)

    def walk(cycle: Cycle, trials: int, seed: int, hot: float, cold: float) -> Cycle:
        return _walk(kernel, cycle, trials, seed, hot, cold)

    trials = int(budget_s / (_OP_S * space.problem.n * ROUNDS))
    return islands(walk, begin, trials, budget_s, seed, Cooling(heat, 2e-4, 20.0))


def written_out(space: Space, layout: Layout, cycle: Cycle) -> Assignment:
    """The cycle's queues for every iteration of the space's problem."""
    d = space.decision
    order = np.argsort(space.iteration + cycle.place[d], kind="stable")
    mode = fitted(
        cycle.mode, layout.lane_partition[cycle.lane], layout.rows, space.problem.sizes, np.array(layout.rows[:, 3])
    )
    return Assignment(layout, order, cycle.lane[d], mode[d], NO_HOLDS)


def _kernel_arguments(space: Space, layout: Layout) -> tuple[object, ...]:
    problem = space.problem
    return (
        space.decision, space.iteration, space.inside, space.kin, space.tied, space.window, space.total,
        space.lowest_mode(), *_edges(space), layout.lane_partition, layout.rows, layout.conflicts, problem.sizes,
        problem.seconds, problem.use, np.diff(problem.pred_ptr), problem.succ_ptr, problem.succ, problem.capacity,
        problem.sm_count, problem.sm_bytes_per_s, problem.launch_s, problem.switch_s,
    )  # fmt: skip


def _edges(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Edges between decisions as (pointer, rows of (other, iterations)), forwards and with minus signs backwards.

    An edge (u, v, k): v of iteration i + k needs u of iteration i, so place[v] + k must not be before place[u]."""
    problem, d = space.problem, len(space.kin)
    before = np.repeat(np.arange(problem.n), np.diff(problem.succ_ptr))
    u, v = space.decision[before], space.decision[problem.succ]
    later = space.iteration[problem.succ] - space.iteration[before]
    edges = np.unique(np.stack([u, v, later], axis=1), axis=0)
    both = np.concatenate([edges, np.stack([edges[:, 1], edges[:, 0], -edges[:, 2] - 1], axis=1)])
    both = both[np.argsort(both[:, 0], kind="stable")]
    pointer = np.zeros(d + 1, np.int64)
    np.cumsum(np.bincount(both[:, 0], minlength=d), out=pointer[1:])
    return pointer, both[:, 1:]


def _walk(kernel: tuple[object, ...], cycle: Cycle, trials: int, seed: int, hot: float, cold: float) -> Cycle:
    place, lane, mode = (a.copy() for a in (cycle.place, cycle.lane, cycle.mode))
    seconds = _polish(place, lane, mode, trials, seed % 2**32, hot, cold, *kernel)  # type: ignore[arg-type]
    return replace(cycle, place=place, lane=lane, mode=mode, seconds=seconds)


@njit
def _colour(
    begin: np.ndarray, length: np.ndarray, row: np.ndarray, lane_partition: np.ndarray, cyclic: bool, lane: np.ndarray
) -> None:
    """Give every decision the lane of its partition on which it overlaps least with those given before."""
    order = np.argsort(begin, kind="mergesort")
    for x in range(len(order)):
        i = order[x]
        least = np.inf
        for at in range(len(lane_partition)):
            if lane_partition[at] != row[i]:
                continue
            overlap = 0.0
            for y in range(x):
                j = order[y]
                if lane[j] == at:
                    shifts = 4 if cyclic else 0
                    for shift in range(-shifts, shifts + 1):
                        low, high = (
                            max(begin[j] + shift, begin[i]),
                            min(begin[j] + length[j] + shift, begin[i] + length[i]),
                        )
                        overlap += max(0.0, high - low)
            if overlap < least - 1e-12:
                least = overlap
                lane[i] = at


@njit
def _period(end: np.ndarray, decision: np.ndarray, iteration: np.ndarray, inside: np.ndarray, window: int) -> float:
    """The longest that any op takes from its end in one iteration to its end in the next: not the time between the
    ends of whole iterations, which is short for a while when one slice runs ahead of another."""
    if window < 4:
        whole: float = end.max()
        return whole / window
    low, high = window // 3, window - 2
    slowest, begun, n = 0.0, np.zeros(decision.max() + 1), len(end)
    for op in range(n):
        if inside[op] and iteration[op] == low:
            begun[decision[op]] = end[op]
    for op in range(n):
        if inside[op] and iteration[op] == high:
            slowest = max(slowest, end[op] - begun[decision[op]])
    return slowest / (high - low)


@njit
def _judge(
    place: np.ndarray, lane: np.ndarray, mode: np.ndarray, decision: np.ndarray, iteration: np.ndarray,
    inside: np.ndarray, window: int, total: int, lane_partition: np.ndarray, rows: np.ndarray, conflicts: np.ndarray,
    sizes: np.ndarray, seconds: np.ndarray, use: np.ndarray, missing: np.ndarray, succ_ptr: np.ndarray,
    succ: np.ndarray, capacity: np.ndarray, sm_count: int, sm_bytes_per_s: float, launch_s: float, switch_s: float,
    start: np.ndarray, end: np.ndarray,
) -> float:  # fmt: skip
    """Fill start and end; seconds of the whole graph: the window's, and a period for every iteration beyond it; inf
    for a deadlock, and for places so far apart that a window does not show what the whole would do."""
    n, lanes = len(decision), len(lane_partition)
    if total > window and place.max() - place.min() > window / 2 - 1:
        return np.inf
    order = np.argsort(iteration + place[decision], kind="mergesort")
    queue, queue_ptr = np.empty(n, np.int64), np.zeros(lanes + 1, np.int64)
    for op in range(n):
        queue_ptr[lane[decision[op]] + 1] += 1
    queue_ptr = np.cumsum(queue_ptr)
    at, rank = queue_ptr[:-1].copy(), np.empty(n, np.int64)
    for x in range(n):
        here = lane[decision[order[x]]]
        queue[at[here]] = order[x]
        at[here] += 1
        rank[order[x]] = x
    modes = fitted(mode, lane_partition[lane], rows, sizes, rows[:, 3])[decision]
    trace = np.zeros((1, 6))
    ended, _ = _simulate(
        queue, queue_ptr, rank, modes, lane_partition, rows, conflicts, seconds, use, missing, succ_ptr, succ,
        capacity, sm_count, sm_bytes_per_s, launch_s, switch_s, start, end, trace, False,
    )  # fmt: skip
    if ended < n:
        return np.inf
    total_s: float = end.max()
    if total > window:
        total_s += (total - window) * _period(end, decision, iteration, inside, window)
    return total_s


@njit
def _polish(
    place: np.ndarray, lane: np.ndarray, mode: np.ndarray, trials: int, seed: int, hot: float, cold: float,
    decision: np.ndarray, iteration: np.ndarray, inside: np.ndarray, kin: np.ndarray, tied: np.ndarray, window: int,
    total: int, lowest: np.ndarray, edge_ptr: np.ndarray, edge: np.ndarray, lane_partition: np.ndarray,
    rows: np.ndarray, conflicts: np.ndarray, sizes: np.ndarray, seconds: np.ndarray, use: np.ndarray,
    missing: np.ndarray, succ_ptr: np.ndarray, succ: np.ndarray, capacity: np.ndarray, sm_count: int,
    sm_bytes_per_s: float, launch_s: float, switch_s: float,
) -> float:  # fmt: skip
    """Metropolis over `trials` moves, cooling from `hot` to `cold` (relative to the time); leaves the best cycle in the
    first three arguments and returns its seconds."""
    np.random.seed(seed)
    n = len(decision)
    start, end = np.zeros(n), np.zeros(n)
    for at in range(len(place)):
        _push(place, at, edge_ptr, edge)
    now = best = _judge(
        place, lane, mode, decision, iteration, inside, window, total, lane_partition, rows, conflicts, sizes, seconds,
        use, missing, succ_ptr, succ, capacity, sm_count, sm_bytes_per_s, launch_s, switch_s, start, end,
    )  # fmt: skip
    best_place, best_lane, best_mode = place.copy(), lane.copy(), mode.copy()
    old_place, old_lane, old_mode = place.copy(), lane.copy(), mode.copy()
    for trial in range(1, trials):
        old_place[:], old_lane[:], old_mode[:] = place, lane, mode
        if trial % (4 * len(place)) == 0:
            _retime(
                place, decision, iteration, inside, window, start, _period(end, decision, iteration, inside, window)
            )
        elif not _move(place, lane, mode, kin, tied, lowest, edge_ptr, edge, lane_partition, rows, sizes):
            place[:] = old_place
            continue
        then = _judge(
            place, lane, mode, decision, iteration, inside, window, total, lane_partition, rows, conflicts, sizes,
            seconds, use, missing, succ_ptr, succ, capacity, sm_count, sm_bytes_per_s, launch_s, switch_s, start, end,
        )  # fmt: skip
        heat = now * hot * (cold / hot) ** (trial / trials)
        if then <= now or np.random.random() < np.exp((now - then) / heat):
            now = then
            if now < best:
                best = now
                best_place[:], best_lane[:], best_mode[:] = place, lane, mode
        else:
            place[:], lane[:], mode[:] = old_place, old_lane, old_mode
    place[:], lane[:], mode[:] = best_place, best_lane, best_mode
    return best


@njit
def _retime(
    place: np.ndarray, decision: np.ndarray, iteration: np.ndarray, inside: np.ndarray, window: int, start: np.ndarray,
    period_s: float,
) -> None:  # fmt: skip
    """Places as the clock saw them last, if it saw a period: then a distance in places is one in time."""
    if period_s <= 0.0:
        return
    for op in range(len(start)):
        if not inside[op] or iteration[op] == window // 2:
            place[decision[op]] = start[op] / period_s - iteration[op]


@njit
def _push(place: np.ndarray, at: int, edge_ptr: np.ndarray, edge: np.ndarray) -> bool:
    """Restore the order of all edges after decision `at` has moved, by moving its neighbours on; False if they chase
    each other round the loop."""
    stack = np.empty(4 * len(place) + 8, np.int64)
    stack[0], height, steps = at, 1, 0
    while height > 0:
        height -= 1
        u = stack[height]
        steps += 1
        if steps > 4 * len(place):
            return False
        for k in range(edge_ptr[u], edge_ptr[u + 1]):
            v, later = edge[k]
            if later >= 0:
                least = place[u] - later + _STEP
                wrong = place[v] < least
            else:
                least = place[u] - later - 1 - _STEP
                wrong = place[v] > least
            if wrong:
                if height >= len(stack):
                    return False
                place[v] = least
                stack[height] = v
                height += 1
    return True


@njit
def _move(
    place: np.ndarray, lane: np.ndarray, mode: np.ndarray, kin: np.ndarray, tied: np.ndarray, lowest: np.ndarray,
    edge_ptr: np.ndarray, edge: np.ndarray, lane_partition: np.ndarray, rows: np.ndarray, sizes: np.ndarray,
) -> bool:  # fmt: skip
    """Change the SMs of a decision or all its kin, or its lane, or its place; False if there is no such place."""
    d, what = len(kin), np.random.random()
    at = np.random.randint(d)
    if what < 0.35:
        step = np.random.randint(1, 4) if np.random.random() < 0.9 else np.random.randint(1, len(sizes) + 1)
        step = step if np.random.random() < 0.5 else -step
        alike = np.random.random() < 0.3
        for i in range(d):
            if i == at or (alike and kin[i] == kin[at]):
                mode[i] = min(max(mode[i] + step, lowest[i]), len(sizes) - 1)
        return True
    if what < 0.5:
        to = np.random.randint(len(lane_partition))
        if rows[lane_partition[to], 2] >= sizes[lowest[at]] and not tied[at]:
            lane[at] = to
        return True
    if what < 0.85:
        place[at] += np.random.normal() * (4.0 / max(d, 8)) * (1.0 if np.random.random() < 0.7 else 4.0)
    else:
        other = np.random.randint(d)
        whole = np.floor(place[at] - place[other] + 0.5)
        place[at] = place[other] + whole + (_STEP if np.random.random() < 0.5 else -_STEP)
    return _push(place, at, edge_ptr, edge)
