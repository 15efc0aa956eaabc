"""Fixed orders, annealed: every lane has a queue, and in a repeated body the same queue in every iteration.

A cycle gives every decision (an op of the body, for all iterations) its lane, its SMs and its place in time, counted in
periods; places may reach over several iterations, so that iterations overlap (modulo scheduling, Lam 1988). The
iterations of a body written out in that order run in step, and the one clock says what a period takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskgraph.jit import inner, kernel, plain
from taskgraph.schedule.clock import Clock, Lanes, Queues, Workspace, simulate, workspace_of
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Evaluation, Layout, clock_of, lanes_of
from taskgraph.schedule.solve.annealing import (
    Annealer,
    Cooling,
    Heat,
    Launch,
    Space,
    State,
    bordered,
    fit,
    fitted,
    launch_of,
    metropolis,
    realise,
    shift_border,
)

_STEP = 1e-7
"""The least distance in periods between the places of two ops of which one needs the other."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """place (d,) in periods, lane (d,) and mode (d,) by decision, table (p, 4) as in `Layout.table`, and the seconds of
    the whole graph."""

    place: np.ndarray
    lane: np.ndarray
    mode: np.ndarray
    table: np.ndarray
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
    lane, order = np.zeros(len(middle), np.int64), np.argsort(begin, kind="stable")
    spans = Spans(plain(begin, np.float64), plain(length, np.float64), plain(state.row, np.int64), order)
    _colour(spans, plain(layout.lane_partition, np.int64), 4 if space.window > 1 else 0, lane)
    return Cycle(begin, on_one_lane(space, layout, lane), state.mode, state.table)


def plain_cycle(space: Space, layout: Layout, state: State) -> Cycle:
    """A cycle that is never a deadlock: the ops in their order, one iteration after another, on the state's SMs."""
    place = np.empty(len(space.kin))
    once = np.flatnonzero((space.iteration == 0) | ~space.inside)
    place[space.decision[once]] = np.arange(len(once)) / len(once)
    lane = np.searchsorted(layout.lane_partition, state.row)
    return Cycle(place, on_one_lane(space, layout, lane), state.mode, state.table)


def on_one_lane(space: Space, layout: Layout, lane: np.ndarray) -> np.ndarray:
    """`lane` with all tied decisions on the last lane of the largest partition: there they run one after another."""
    rooms = layout.table[layout.lane_partition, 2]
    last = len(rooms) - 1 - int(np.argmax(rooms[::-1]))
    return np.where(space.tied, last, lane)


def period(space: Space, times: Evaluation) -> float:
    """Seconds from one iteration to the next, in the middle; of a flat graph its makespan."""
    body = _body(space)
    return float(_period(body, plain(times.end_s, np.float64), np.zeros(len(space.kin))))


def polish(
    space: Space, layout: Layout, begin: Sequence[Cycle], budget_s: float, seed: int, heat: float = 0.01
) -> Cycle:
    """The best cycle found from `begin`, at first with losses of about `heat` of the time accepted."""
    return CYCLES.best(space, layout, begin, (budget_s, seed), Cooling(heat, 2e-4, 20.0))


def written_out(space: Space, layout: Layout, cycle: Cycle) -> Assignment:
    """The cycle's queues for every iteration of the space's problem."""
    d = space.decision
    order = np.argsort(space.iteration + cycle.place[d], kind="stable")
    mode = fitted(space, cycle.mode, layout.lane_partition[cycle.lane], cycle.table)
    return Assignment(bordered(layout, cycle.table), order, cycle.lane[d], mode[d], NO_HOLDS)


class CyclePoint(NamedTuple):
    """A cycle for the kernels, as in `Cycle`."""

    place: np.ndarray
    lane: np.ndarray
    mode: np.ndarray
    table: np.ndarray


def _point(cycle: Cycle) -> CyclePoint:
    """A copy of the cycle's arrays."""
    lane, mode = np.array([cycle.lane, cycle.mode], np.int64)
    return CyclePoint(np.array(cycle.place, np.float64), lane, mode, np.array(cycle.table, np.int64, order="C"))


class Body(NamedTuple):
    """What repeats, as in `Space`: decision, iteration and inside (n,) by op, iterations in the window and in all."""

    decision: np.ndarray
    iteration: np.ndarray
    inside: np.ndarray
    window: int
    total: int


class Edges(NamedTuple):
    """Edges between decisions: those of decision u are other[pointer[u] : pointer[u + 1]], rows of (decision,
    iterations), forwards and with minus signs backwards; `stack` is scratch.

    An edge (u, v, k): v of iteration i + k needs u of iteration i, so place[v] + k must not be before place[u]."""

    pointer: np.ndarray
    other: np.ndarray
    stack: np.ndarray


class _Field(NamedTuple):
    """What moves and judge read: by decision (d,) its kin, whether it is tied and its lowest mode; the SM counts (m,);
    start and end (n,) as the clock saw them last. Scratch: modes and rows and `begun` (d,), by op (n,) its key and the
    ops by key. `trace` has no rows."""

    kin: np.ndarray
    tied: np.ndarray
    lowest: np.ndarray
    launch: Launch
    granularity: int
    start: np.ndarray
    end: np.ndarray
    modes: np.ndarray
    rows: np.ndarray
    begun: np.ndarray
    key: np.ndarray
    order: np.ndarray
    trace: np.ndarray
    body: Body
    edges: Edges
    clock: Clock
    lanes: Lanes
    queues: Queues
    workspace: Workspace


def _body(space: Space) -> Body:
    return Body(
        plain(space.decision, np.int64), plain(space.iteration, np.int64), plain(space.inside, np.bool_),
        space.window, space.total,
    )  # fmt: skip


def _field(space: Space, layout: Layout) -> _Field:
    clock, lanes = clock_of(space.problem), lanes_of(layout)
    n, d = space.problem.n, len(space.kin)
    modes, rows = np.zeros((2, d), np.int64)
    start, end, key = np.zeros((3, n))
    op, place, mode = np.zeros((3, n), np.int64)
    return _Field(
        plain(space.kin, np.int64),
        plain(space.tied, np.bool_),
        plain(space.lowest_mode(), np.int64),
        launch_of(space),
        space.problem.device.sm_granularity,
        start,
        end,
        modes,
        rows,
        np.zeros(d),
        key,
        np.arange(n),
        np.zeros((0, 6)),
        _body(space),
        _edges(space),
        clock,
        lanes,
        Queues(op, np.zeros(len(lanes.partition) + 1, np.int64), place, mode),
        workspace_of(clock, lanes),
    )


def _edges(space: Space) -> Edges:
    problem, d = space.problem, len(space.kin)
    before = np.repeat(np.arange(problem.n), np.diff(problem.succ_ptr))
    u, v = space.decision[before], space.decision[problem.succ]
    later = space.iteration[problem.succ] - space.iteration[before]
    edges = np.unique(np.stack([u, v, later], axis=1), axis=0)
    both = np.concatenate([edges, np.stack([edges[:, 1], edges[:, 0], -edges[:, 2] - 1], axis=1)])
    both = both[np.argsort(both[:, 0], kind="stable")]
    pointer = np.zeros(d + 1, np.int64)
    np.cumsum(np.bincount(both[:, 0], minlength=d), out=pointer[1:])
    return Edges(pointer, plain(both[:, 1:], np.int64), np.zeros(4 * d + 8, np.int64))


def _walk(field: _Field, cycle: Cycle, heat: Heat) -> Cycle:
    point, old, best = _point(cycle), _point(cycle), _point(cycle)
    _push_all(field.edges, point.place)
    field.order[:] = np.argsort(field.body.iteration + point.place[field.body.decision], kind="stable")
    seconds = _polish(field, point, old, best, heat._replace(seed=heat.seed % 2**32))
    return Cycle(best.place, best.lane, best.mode, best.table, seconds)


class Spans(NamedTuple):
    """Decisions (d,) in periods: begin and length, the row of the layout, and the decisions by begin."""

    begin: np.ndarray
    length: np.ndarray
    row: np.ndarray
    order: np.ndarray


@kernel
def _colour(spans: Spans, lane_partition: np.ndarray, shifts: int, lane: np.ndarray) -> None:
    """Give every decision the lane of its partition on which it overlaps least with those given before, up to `shifts`
    periods away."""
    begin, length, row, order = spans.begin, spans.length, spans.row, spans.order
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
                    for shift in range(-shifts, shifts + 1):
                        low = max(begin[j] + shift, begin[i])
                        high = min(begin[j] + length[j] + shift, begin[i] + length[i])
                        overlap += max(0.0, high - low)
            if overlap < least - 1e-12:
                least = overlap
                lane[i] = at


@kernel
def _period(body: Body, end: np.ndarray, begun: np.ndarray) -> float:
    """The longest that any op takes from its end in one iteration to its end in the next: not the time between the
    ends of whole iterations, which is short for a while when one slice runs ahead of another. `begun` (d,) is scratch.
    """
    window, decision, iteration, inside = body.window, body.decision, body.iteration, body.inside
    slowest = 0.0
    if window < 4:
        for op in range(len(end)):
            if end[op] > slowest:
                slowest = end[op]
        return slowest / window
    low, high = window // 3, window - 2
    for op in range(len(end)):
        if inside[op] and iteration[op] == low:
            begun[decision[op]] = end[op]
    for op in range(len(end)):
        if inside[op] and iteration[op] == high and end[op] - begun[decision[op]] > slowest:
            slowest = end[op] - begun[decision[op]]
    return slowest / (high - low)


@inner
def _judge(f: _Field, point: CyclePoint) -> float:
    """Fill start and end; seconds of the whole graph: the window's, and a period for every iteration beyond it; inf
    for a deadlock, and for places so far apart that a window does not show what the whole would do."""
    body, queues, order, key, modes, rows = f.body, f.queues, f.order, f.key, f.modes, f.rows
    place, lane = point.place, point.lane
    decision, iteration, partition, n = body.decision, body.iteration, f.lanes.partition, len(body.decision)
    first = last = place[0]
    for d in range(len(place)):
        if place[d] < first:
            first = place[d]
        if place[d] > last:
            last = place[d]
        rows[d] = partition[lane[d]]
    if body.total > body.window and last - first > body.window / 2 - 1:
        return np.inf
    lanes = Lanes(partition, point.table, f.lanes.conflicts, f.lanes.turns)
    fit(f.launch, point.mode, rows, point.table, modes)
    for op in range(n):
        key[op] = iteration[op] + place[decision[op]]
    _sort(order, key)
    pointer, head, queue, rank, mode = queues.pointer, f.workspace.head, queues.op, queues.place, queues.mode
    for i in range(len(pointer)):
        pointer[i] = 0
    for op in range(n):
        pointer[lane[decision[op]] + 1] += 1
    for i in range(len(head)):
        head[i] = pointer[i]
        pointer[i + 1] += pointer[i]
    for x in range(n):
        op = order[x]
        d = decision[op]
        queue[head[lane[d]]] = op
        head[lane[d]] += 1
        rank[op], mode[op] = x, modes[d]
    ended, _, total_s = simulate(f.clock, lanes, queues, f.workspace, f.start, f.end, f.trace)
    if ended < n:
        return np.inf
    if body.total > body.window:
        total_s += (body.total - body.window) * _period(body, f.end, f.begun)
    return total_s


@inner
def _sort(order: np.ndarray, key: np.ndarray) -> None:
    """Ops by key, equal ones by number. By insertion: the order of the last trial is nearly this one's."""
    for x in range(1, len(order)):
        op, at = order[x], x
        while at > 0:
            before = order[at - 1]
            if key[before] < key[op] or (key[before] == key[op] and before < op):
                break
            order[at] = before
            at -= 1
        order[at] = op


@inner
def _copy(to: CyclePoint, of: CyclePoint) -> None:
    place, lane, mode, table = to.place, to.lane, to.mode, to.table
    place_of, lane_of, mode_of, table_of = of.place, of.lane, of.mode, of.table
    for d in range(len(place)):
        place[d], lane[d], mode[d] = place_of[d], lane_of[d], mode_of[d]
    for p in range(len(table)):
        for k in range(4):
            table[p, k] = table_of[p, k]


@inner
def _retime(f: _Field, place: np.ndarray) -> None:
    """Places as the clock saw them last, if it saw a period: then a distance in places is one in time."""
    period_s = _period(f.body, f.end, f.begun)
    if period_s <= 0.0:
        return
    inside, iteration, decision, start = f.body.inside, f.body.iteration, f.body.decision, f.start
    middle = f.body.window // 2
    for op in range(len(start)):
        if not inside[op] or iteration[op] == middle:
            place[decision[op]] = start[op] / period_s - iteration[op]


@kernel
def _push(edges: Edges, place: np.ndarray, at: int) -> bool:
    """Restore the order of all edges after decision `at` has moved, by moving its neighbours on; False if they chase
    each other round the loop."""
    stack, other, pointer = edges.stack, edges.other, edges.pointer
    stack[0], height, steps = at, 1, 0
    while height > 0:
        height -= 1
        u = stack[height]
        steps += 1
        if steps > 4 * len(place):
            return False
        for k in range(pointer[u], pointer[u + 1]):
            v, later = other[k, 0], other[k, 1]
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


@kernel
def _push_all(edges: Edges, place: np.ndarray) -> None:
    """Restore the order of all edges."""
    for at in range(len(place)):
        _push(edges, place, at)


@inner
def _move(f: _Field, point: CyclePoint, trial: int) -> bool:
    """Change the SMs of a decision or all its kin, or its lane, or its place; False if there is no such place. Now and
    then put all places where the clock saw them."""
    place, mode, kin, sizes, lowest, table = point.place, point.mode, f.kin, f.launch.sizes, f.lowest, point.table
    partition, d = f.lanes.partition, len(kin)
    if trial % (4 * d) == 0:
        _retime(f, place)
        return True
    at = np.random.randint(0, d)
    what = np.random.random()
    if what < 0.35 and f.launch.own_grid[at]:
        step = np.random.randint(1, 4 if np.random.random() < 0.9 else len(sizes) + 1)
        step = step if np.random.random() < 0.5 else -step
        alike = np.random.random() < 0.3
        for i in range(d):
            if i == at or (alike and kin[i] == kin[at]):
                mode[i] = min(max(mode[i] + step, lowest[i]), len(sizes) - 1)
        return True
    what = np.random.random()
    if what < 0.05 and len(table) > 1:
        shift_border(table, sizes, f.granularity)
        fits = True
        for i in range(d):
            fits = fits and table[partition[point.lane[i]], 2] >= sizes[lowest[i]]
        return fits
    if what < 0.3:
        to = np.random.randint(0, len(partition))
        alike = np.random.random() < 0.2
        for i in range(d):
            fits = table[partition[to], 2] >= sizes[lowest[i]] and not f.tied[i]
            if fits and (i == at or (alike and kin[i] == kin[at])):
                point.lane[i] = to
        return True
    if what < 0.85:
        place[at] += np.random.normal(0.0, 1.0) * (4.0 / max(d, 8)) * (1.0 if np.random.random() < 0.7 else 4.0)
    else:
        other = np.random.randint(0, d)
        whole = np.floor(place[at] - place[other] + 0.5)
        place[at] = place[other] + whole + (_STEP if np.random.random() < 0.5 else -_STEP)
    return _push(f.edges, place, at)


_polish = metropolis(_move, _judge, _copy, 1)
CYCLES = Annealer(
    _field, ("start", "end", "modes", "rows", "begun", "key", "order", "edges", "queues", "workspace"), _walk, 5e-7
)
