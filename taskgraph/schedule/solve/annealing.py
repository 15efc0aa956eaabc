"""Search: simulated annealing over priorities, SM counts, partitions and their sizes, with the one clock as its judge.

A state says for every decision (an op, or an op of a repeated body for all its iterations) its SMs, its partition and
its delay; `dispatch` turns that into a schedule. A repeated body is judged on a window of a few iterations: the
window's time, scaled to all iterations.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from taskgraph.graph.device import Device, Geometry, Partition
from taskgraph.jit import inner, kernel, plain
from taskgraph.schedule.clock import Clock, Front, Lanes, Wishes, Workspace, front_of, run_dispatch, workspace_of
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, clock_of, dispatch, lanes_of
from taskgraph.schedule.problem import Problem
from taskgraph.schedule.solve.lists import upward_rank

ISLANDS = 2
"""Annealing runs side by side, a thread each; a fixed number, so that a seed means the same on every machine."""
ROUNDS = 6
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
    """One point of the space: mode, row of the layout and delay in seconds (d,) by decision; table (p, 4) as in
    `Layout.table`; the policies of `dispatch`; and the seconds that it is judged at."""

    mode: np.ndarray
    row: np.ndarray
    delay: np.ndarray
    table: np.ndarray
    policy: np.ndarray
    seconds: float = np.inf


def bordered(origin: Layout, table: np.ndarray) -> Layout:
    """`origin` with the partition sizes of `table` (p, 4)."""
    return Layout(
        tuple(
            Geometry(tuple(Partition(int(r[1]), int(r[2])) for r in table if r[0] == g))
            for g in range(len(origin.geometries))
        ),
        origin.lanes_each,
    )


def starts(space: Space, layout: Layout) -> list[State]:
    """States to begin from: every op where its seconds x SMs^thrift are least, from the fastest mode (thrift 0, the one
    of fewest SMs) to that of the least area (1, the one of most SMs)."""
    problem, lowest = space.problem, space.lowest_mode()
    zeros, row = np.zeros(len(lowest)), np.zeros(len(lowest), np.int64)
    found, own = list[State](), launch_of(space).own_grid
    for thrift in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        product = np.where(problem.legal, problem.seconds * problem.use[:, :, 0] ** thrift, np.inf)
        good = product <= product.min(axis=1, keepdims=True) * (1 + 1e-9)
        wanted = np.argmax(good, axis=1) if thrift == 0 else good.shape[1] - 1 - np.argmax(good[:, ::-1], axis=1)
        mode = lowest.copy()
        np.maximum.at(mode, space.decision, wanted)
        mode = np.where(own, mode, len(problem.sizes) - 1)
        if any((mode == each.mode).all() for each in found):
            continue
        found += [State(mode, row, zeros, layout.table, np.array([1, sm, 4])) for sm in range(len(_OVERSUBSCRIBE))]
    return found


def search_layouts(device: Device) -> list[Layout]:
    """Lanes that share the device, each op on the SMs that the search gives it (GPUs: a kernel's grid limits it; the
    threads of a CPU lane are pinned), and a geometry of two partitions whose border the search moves, in turns with
    the whole device."""
    halves = [g for g in device.splits() if len(g.partitions) == 2]
    turns = [Layout.isolated(Geometry.of(device.sm_count), halves[-1])] if halves else []
    if device.kind != "gpu":
        return turns
    split = [Layout((halves[-1],), ((3, 3),)), Layout((Geometry.of(device.sm_count), halves[-1]), ((2,), (2, 2)))]
    return [Layout.shared(device.sm_count, 6), *(split if halves else [])]


def anneal(space: Space, layout: Layout, begin: Sequence[State], budget_s: float, seed: int) -> State:
    """The best state found from `begin`, as `Annealer.best` finds it."""
    return STATES.best(space, layout, begin, (budget_s, seed), Cooling(0.02, 1e-5, 10.0))


class _Judged(Protocol):
    @property
    def seconds(self) -> float: ...


J = TypeVar("J", bound=_Judged)


@dataclass(frozen=True, slots=True)
class Cooling:
    """Relative losses that are accepted: about `start` at first, falling with every round to `end`; within a round to
    the `span`-th part."""

    start: float
    end: float
    span: float


@dataclass(frozen=True, slots=True)
class Annealer(Generic[J]):
    """How points of one kind are annealed: what moves and judge read of a space and a layout (`field`), of which each
    thread has its own `scratch`; a run of the loop from a point (`walk`); and the seconds that one op costs in one
    trial, on the slow side: they turn a budget into a number of trials, so that equal seeds and budgets give equal
    plans on any machine that keeps up. The wall clock only guards."""

    field: Callable[[Space, Layout], Any]
    scratch: tuple[str, ...]
    walk: "Callable[[Any, J, Heat], J]"
    op_s: float

    def trials_in(self, space: Space, budget_s: float) -> int:
        """How many trials a budget stands for."""
        return int(budget_s / (self.op_s * space.problem.n))

    def judged(self, space: Space, layout: Layout, points: Sequence[J]) -> list[J]:
        """The points with their seconds, the shortest first."""
        field = self.field(space, layout)
        return sorted((self.walk(field, each, JUDGE) for each in points), key=lambda each: each.seconds)

    def best(self, space: Space, layout: Layout, begin: Sequence[J], spent: tuple[float, int], cooling: Cooling) -> J:
        """The best of ISLANDS runs side by side, from the best of `begin`: ROUNDS of as many trials as `spent`, seconds
        and a seed, stands for. The leader is copied to one island after each round, and to all in the second half."""
        (budget_s, seed), field = spent, self.field(space, layout)
        trials = max(8, self.trials_in(space, budget_s / ROUNDS))
        pool = [self.walk(own(field, self.scratch), each, JUDGE) for each in begin]  # compiles, before the clock starts
        deadline = time.monotonic() + 2 * budget_s + 0.5
        best = sorted(pool, key=lambda each: each.seconds)[:ISLANDS]
        best = [best[i % len(best)] for i in range(ISLANDS)]
        with ThreadPoolExecutor(ISLANDS) as threads:
            for turn in range(ROUNDS):
                hot = cooling.start * (1 - turn / ROUNDS) ** 2 + cooling.end
                heats = [
                    Heat(trials, (seed * ROUNDS + turn) * ISLANDS + i, hot, hot / cooling.span) for i in range(ISLANDS)
                ]
                fields = [own(field, self.scratch) for _ in best]
                found = list(threads.map(self.walk, fields, best, heats))
                leader = min([*found, *best], key=lambda each: each.seconds)
                best = [leader, *found[1:]] if turn < ROUNDS // 2 else [leader] * ISLANDS
                if time.monotonic() > deadline:
                    break
        return min(best, key=lambda each: each.seconds)


def realise(space: Space, layout: Layout, state: State) -> tuple[Assignment, Evaluation]:
    """The schedule of `state` on the space's problem."""
    problem, d = space.problem, space.decision
    mode = fitted(space, state.mode, state.row, state.table)[d]
    priority = upward_rank(problem) - state.delay[d]
    limits = (float(_OVERSUBSCRIBE[state.policy[_SM]]), float(_OVERSUBSCRIBE[state.policy[_SOFT]]))
    backfill = bool(state.policy[_BACKFILL])
    return dispatch(problem, bordered(layout, state.table), priority, mode, state.row[d], limits, backfill)


# ------------------------------------------------------------------------------------------- the loop


class Heat(NamedTuple):
    """A run of the loop: its trials with the first state, a seed, and the heat at the begin and at the end."""

    trials: int
    seed: int
    hot: float
    cold: float


JUDGE = Heat(1, 0, 1e-3, 1e-4)
"""A run that only judges."""
P = TypeVar("P")
F = TypeVar("F")


def metropolis(
    move: Callable[[F, P, int], bool], judge: Callable[[F, P], float], copy: Callable[[P, P], None], first: int
) -> Callable[[F, P, P, P, Heat], float]:
    """The loop of simulated annealing (Metropolis et al. 1953; Kirkpatrick, Gelatt and Vecchi 1983), compiled for three
    compiled functions: `move` changes a point and says whether that is one, `judge` gives its seconds, `copy` writes
    the second of two points over the first. Trials are counted from `first`.

    The loop takes what `move` and `judge` read, the point it begins from, room for two more, and the heat; it leaves
    the best point in the third and returns its seconds. A loss is accepted with the probability exp(-loss / heat),
    where the heat cools from `hot` to `cold` times the seconds of the point.
    """

    def anneal(field: F, point: P, old: P, best: P, heat: Heat) -> float:
        np.random.seed(heat.seed)
        now = least = judge(field, point)
        copy(best, point)
        copy(old, point)
        for trial in range(first, first + heat.trials - 1):
            if move(field, point, trial):
                then = judge(field, point)
                warm = now * heat.hot * (heat.cold / heat.hot) ** (trial / heat.trials)
                if then <= now or np.random.random() < np.exp((now - then) / warm):
                    now = then
                    copy(old, point)
                    if now < least:
                        least = now
                        copy(best, point)
                    continue
            copy(point, old)
        return least

    return kernel(anneal)


# ----------------------------------------------------------------------------------- what it does here


class Launch(NamedTuple):
    """How decisions are launched: the SM counts (m,), and which have a grid of their own (d,)."""

    sizes: np.ndarray
    own_grid: np.ndarray


def launch_of(space: Space) -> Launch:
    """The space for `fit`."""
    own = np.ones(len(space.kin), np.bool_)
    own[space.decision[~space.problem.own_grid]] = False
    return Launch(plain(space.problem.sizes, np.int64), own)


class StatePoint(NamedTuple):
    """A state for the kernels, as in `State`."""

    mode: np.ndarray
    row: np.ndarray
    delay: np.ndarray
    table: np.ndarray
    policy: np.ndarray


def _point(state: State) -> StatePoint:
    """A copy of the state's arrays."""
    mode, row = np.array([state.mode, state.row], np.int64)
    table, policy = (np.array(a, np.int64, order="C") for a in (state.table, state.policy))
    return StatePoint(mode, row, np.array(state.delay, np.float64), table, policy)


class _Field(NamedTuple):
    """What moves and judge read: decision (n,) and upward rank (n,) by op; kin, lowest mode (d,) by decision; how
    they are launched; the seconds of all iterations over those of the window, the least shift of a border, the mean
    seconds of an op; and what `dispatch` takes. modes (d,) is scratch."""

    decision: np.ndarray
    rank: np.ndarray
    kin: np.ndarray
    lowest: np.ndarray
    modes: np.ndarray
    launch: Launch
    scale: float
    granularity: int
    op_s: float
    clock: Clock
    lanes: Lanes
    wishes: Wishes
    workspace: Workspace
    front: Front


def _field(space: Space, layout: Layout) -> _Field:
    problem, clock, lanes = space.problem, clock_of(space.problem), lanes_of(layout)
    n, d = problem.n, len(space.kin)
    mode, partition = np.zeros((2, n), np.int64)
    return _Field(
        plain(space.decision, np.int64),
        plain(upward_rank(problem), np.float64),
        plain(space.kin, np.int64),
        plain(space.lowest_mode(), np.int64),
        np.zeros(d, np.int64),
        launch_of(space),
        space.total / space.window,
        problem.device.sm_granularity,
        float(problem.best_seconds().mean()),
        clock,
        lanes,
        Wishes(np.zeros(n), mode, partition, np.zeros(2), True),
        workspace_of(clock, lanes),
        front_of(clock),
    )


def own(field: F, scratch: Sequence[str]) -> F:
    """The field, a named tuple, with copies of those of its parts that are scratch, for one thread."""
    made: Any = field
    result: F = made._replace(**{name: _copied(getattr(field, name)) for name in scratch})
    return result


def _copied(part: Any) -> Any:
    if isinstance(part, tuple):
        return type(part)(*map(_copied, part))
    return part.copy() if isinstance(part, np.ndarray) else part


def _walk(field: _Field, state: State, heat: Heat) -> State:
    point, old, best = _point(state), _point(state), _point(state)
    seconds = _anneal(field, point, old, best, heat._replace(seed=heat.seed % 2**32))
    return State(best.mode, best.row, best.delay, best.table, best.policy, seconds)


def fitted(space: Space, mode: np.ndarray, row: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Modes that fit the partitions: all SMs of a partition with one lane or for an op without a grid of its own, at
    most them for others."""
    made = np.zeros(len(mode), np.int64)
    launch = launch_of(space)
    fit(launch, plain(mode, np.int64), plain(row, np.int64), plain(table, np.int64), made)
    return made


@kernel
def fit(launch: Launch, mode: np.ndarray, row: np.ndarray, table: np.ndarray, made: np.ndarray) -> None:
    """`fitted` into an array."""
    sizes, own = launch.sizes, launch.own_grid
    for p in range(len(table)):
        whole = 0
        while whole < len(sizes) and sizes[whole] < table[p, 2]:
            whole += 1
        for i in range(len(mode)):
            if row[i] == p:
                made[i] = whole if table[p, 3] == 1 or not own[i] or mode[i] > whole else mode[i]


@inner
def _judge(f: _Field, point: StatePoint) -> float:
    """Seconds of the whole graph under a state: the window's, scaled to all iterations.

    Not the time between two iterations in the window: that rewards a schedule that runs one slice far ahead."""
    fit(f.launch, point.mode, point.row, point.table, f.modes)
    decision, rank, delay, row, modes, policy = f.decision, f.rank, point.delay, point.row, f.modes, point.policy
    wishes = f.wishes
    priority, mode, partition, limits = wishes.priority, wishes.mode, wishes.partition, wishes.oversubscribe
    for op in range(len(decision)):
        d = decision[op]
        priority[op], mode[op], partition[op] = rank[op] - delay[d], modes[d], row[d]
    for r in range(2):
        limits[r] = _OVERSUBSCRIBE[policy[_SM + r]]
    asked = Wishes(priority, mode, partition, limits, policy[_BACKFILL] == 1)
    lanes = Lanes(f.lanes.partition, point.table, f.lanes.conflicts, f.lanes.turns)
    return run_dispatch(f.clock, lanes, asked, f.workspace, f.front) * f.scale


@inner
def _copy(to: StatePoint, of: StatePoint) -> None:
    mode, row, delay, table, policy = to.mode, to.row, to.delay, to.table, to.policy
    mode_of, row_of, delay_of, table_of, policy_of = of.mode, of.row, of.delay, of.table, of.policy
    for i in range(len(mode)):
        mode[i], row[i], delay[i] = mode_of[i], row_of[i], delay_of[i]
    for p in range(len(table)):
        for k in range(4):
            table[p, k] = table_of[p, k]
    for k in range(len(policy)):
        policy[k] = policy_of[k]


@inner
def _move(f: _Field, point: StatePoint, trial: int) -> bool:
    """Change one decision, or all of its kin, or a policy, or the border between two partitions; ops whose partition
    has become too small go to the largest."""
    mode, row, delay, table, policy = point.mode, point.row, point.delay, point.table, point.policy
    kin, sizes, lowest = f.kin, f.launch.sizes, f.lowest
    at, what = np.random.randint(0, len(kin)), np.random.random()
    alike = np.random.random() < 0.25
    if what < 0.45 and not f.launch.own_grid[at]:  # it takes all SMs of its partition, whatever its mode says
        what = 0.45 + 0.55 * np.random.random()
    if what < 0.45:
        step = np.random.randint(1, 4 if np.random.random() < 0.8 else len(sizes) + 1)
        step = step if np.random.random() < 0.5 else -step
        for i in range(len(kin)):
            if i == at or (alike and kin[i] == kin[at]):
                mode[i] = min(max(mode[i] + step, lowest[i]), len(sizes) - 1)
    elif what < 0.8:
        shift = np.random.normal(0.0, 1.0) * f.op_s * (4.0 if np.random.random() < 0.3 else 1.0)
        for i in range(len(kin)):
            if i == at or (alike and kin[i] == kin[at]):
                delay[i] += shift
    elif what < 0.95 and len(table) > 1:
        target = np.random.randint(0, len(table))
        for i in range(len(kin)):
            if i == at or (alike and kin[i] == kin[at]):
                row[i] = target
    elif what < 0.98 and len(table) > 1:
        shift_border(table, sizes, f.granularity)
    elif np.random.random() < 0.3:
        policy[_BACKFILL] = 1 - policy[_BACKFILL]
    else:
        policy[np.random.randint(_SM, _SOFT + 1)] = np.random.randint(0, len(_OVERSUBSCRIBE))
    largest = 0
    for p in range(len(table)):
        if table[p, 2] > table[largest, 2]:
            largest = p
    for i in range(len(kin)):
        if sizes[lowest[i]] > table[row[i], 2]:
            row[i] = largest
    return True


@inner
def shift_border(table: np.ndarray, sizes: np.ndarray, granularity: int) -> None:
    """Move the border between two neighbours of one geometry by a step, where both may have the size then."""
    p = np.random.randint(0, len(table) - 1)
    shift_sms = granularity if np.random.random() < 0.5 else -granularity
    neighbours = table[p, 0] == table[p + 1, 0]
    if neighbours and _legal(table[p, 2] + shift_sms, sizes) and _legal(table[p + 1, 2] - shift_sms, sizes):
        table[p, 2] += shift_sms
        table[p + 1, 1] += shift_sms
        table[p + 1, 2] -= shift_sms


@inner
def _legal(size: int, sizes: np.ndarray) -> bool:
    found = False
    for s in sizes:
        found = found or s == size
    return found


_anneal = metropolis(_move, _judge, _copy, 0)
STATES = Annealer(_field, ("modes", "wishes", "workspace", "front"), _walk, 4e-6)
