"""explore(): layouts and nano-batches tried side by side; the better half gets the next share of the budget."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.graph import Graph
from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.ops import COLLECTIVES
from taskgraph.rewrite.nanobatch import apply, splittable
from taskgraph.schedule.bounds import lower_bounds, sm_seconds
from taskgraph.schedule.evaluate import Assignment, Layout, evaluate
from taskgraph.schedule.problem import Budget, Problem, legal_sizes, make_problem
from taskgraph.schedule.solve import lists, rules, seeds
from taskgraph.schedule.solve.annealing import STATES, Space, State, anneal, realise, search_layouts, starts
from taskgraph.schedule.solve.cycles import CYCLES, Cycle, cycle_of, plain_cycle, polish, written_out
from taskgraph.schedule.solve.found import Found, best_of, collectives_ordered, in_sequence, or_sequential
from taskgraph.schedule.solve.packing import packings

WINDOW = 8
"""Iterations of a repeated body that the search looks at; the decisions then hold for all of them."""
SPLIT_GAIN = 1.01
_FIRST, _RESLICE, _LAST, _DISPATCHED = 0.4, 0.3, 0.3, 0.3
"""Shares of the budget: of the rounds together, of single ops' slices, of the last arm; of each of these for
dispatched schedules."""
_RESLICED_FROM_S = 5.0
_KEPT, _SEEDED, _LEAST_SEEDS = 5, 0.2, 8
"""How many arms are searched, by the best of their seeds, and what these may take: a share of the budget, and a number
of seeds that every arm has."""
T = TypeVar("T")
_TRIES, _WORTH, _WARM = 24, 1e-3, 2e-3
"""Other slices for single ops: how many are tried at most, what share of the whole area is worth it, and the heat."""


@dataclass(frozen=True, slots=True)
class _Arm:
    """One split on one layout, and how far it has come. The space is a window of the repeat."""

    split: Split
    graph: Graph
    layout: Layout
    space: Space
    state: State | None = None
    cycle: Cycle | None = None

    @property
    def seconds(self) -> float:
        """Those of its best schedule, as the search counts them: at full clocks."""
        tied = self.space.tied.any()  # which `dispatch` does not see
        found = (self.cycle,) if tied else (self.state, self.cycle)
        return min((s.seconds for s in found if s is not None), default=np.inf)

    def judged(self) -> float:
        """The seconds of its best schedule; slices, which cost memory and launches, must win by SPLIT_GAIN."""
        seconds = self.seconds
        seconds *= self._slower(seconds * self.space.window / self.space.total) if np.isfinite(seconds) else 1.0
        return seconds * SPLIT_GAIN if self.split.parts else seconds

    def _slower(self, window_s: float) -> float:
        """How many times as long a window of these seconds takes at the clocks that its power leaves."""
        problem, table = self.space.problem, self.layout.table
        return problem.settled(window_s, bool(table[:, 2].max() < problem.sm_count)) / window_s


def searched(problem: Problem, budget: Budget) -> Assignment:
    """The scheduler "search": the best of the list schedules and of what about `budget.seconds` of search find."""
    wide = problem.on(legal_sizes(problem.n, problem.device))
    baseline = in_sequence(wide)
    return or_sequential(best_of(packed_or_found(wide, budget, baseline), baseline, budget), baseline)


def packed_or_found(wide: Problem, budget: Budget, baseline: Found) -> list[Found]:
    """The list schedules of a problem on all SM counts, and what a search finds that is shorter than they may be."""
    made = [*packings(wide)]
    return made + search(wide, budget, min(each.makespan_s for each in (baseline, *made)))


def search(problem: Problem, budget: Budget, limit_s: float) -> list[Found]:
    """What `explore` finds; of a large graph without a repeat the schedule of the best rule."""
    if problem.graph.repeat is None and problem.n >= rules.FROM and problem.device.kind == "gpu":
        rule, made, times = rules.best_rule(problem, budget.seconds, budget.seed)
        label = f"search over rules, {rule.label()}, seed {budget.seed}"
        found = [Found(problem, replace(made, made_by=label), times)]
    else:
        found = explore(problem, budget, limit_s)
    return [*map(collectives_ordered, found)]


def explore(problem: Problem, budget: Budget, limit_s: float) -> list[Found]:
    """The best schedule found in about the budget, and the best without slices as far as that came; none where no arm
    can be better than `limit_s` by its bounds.

    Arms are the layouts of `search_layouts`, and on the first of them the slicings of the batch. All arms run for a
    while, the better half goes on, until one is left: successive halving (Karnin, Koren and Somekh 2013).
    """
    arms, seconds, seed = list(_arms(problem, limit_s, budget.nano_batches)), budget.seconds, budget.seed
    if not arms:
        return []
    if len(arms) == 1:
        return [_realised(problem, _advanced(arms[0], seconds, seed), seed)]
    if problem.device.kind == "gpu":
        arms = _promising(_seeded(arm, _SEEDED * seconds / len(arms)) for arm in arms)
    rounds, second = (len(arms) - 1).bit_length(), list[_Arm]()
    for number in range(rounds):
        share = _FIRST * seconds / rounds / len(arms)
        arms = sorted((_advanced(arm, share, seed + number) for arm in arms), key=_Arm.judged)
        second, arms = [arm for arm in arms[1:] if not arm.split.parts][:1], arms[: (len(arms) + 1) // 2]
    best = arms[0]
    if best.split.parts and seconds >= _RESLICED_FROM_S:
        best = _resliced(problem, best, _RESLICE * seconds, seed + rounds)
    best = _advanced(best, _LAST * seconds, seed + rounds)
    return [_realised(problem, arm, seed) for arm in (best, *second)]


def _resliced(problem: Problem, best: _Arm, budget_s: float, seed: int) -> _Arm:
    """The arm with other slices for single ops, one after another, where that helps: first those that save area."""
    graph = problem.graph
    names = {op.name for op in graph.ops}
    mine = _areas(best.graph, problem)
    worth, base = _WORTH * sum(mine.values()), best.split.parts[0][1]
    halves = Split.of([part for size in base for part in (size // 2, size - size // 2) if part])
    options = []
    for made in [UNSPLIT, halves, *slicings(graph)]:
        for name, area in _areas(apply(graph, made), problem).items():
            large = name in names and mine.get(name, 0.0) > 10 * worth
            if large and area < mine[name] + (10 * worth if made == halves else -worth):
                options.append((area - mine[name], name, made))
    options = sorted(options, key=lambda o: o[0])[:_TRIES]
    for number, (_, name, made) in enumerate(options):
        with suppress(GraphError):  # an op takes no cut within one of its units
            arm = _with_slices(problem, best, name, made)
            assert arm.cycle is not None
            cycle = polish(arm.space, arm.layout, [arm.cycle], budget_s / len(options), seed + number, _WARM)
            best = replace(arm, cycle=cycle) if cycle.seconds < best.seconds else best
    return best


def _with_slices(problem: Problem, arm: _Arm, name: str, made: Split) -> _Arm:
    """The arm with the op `name` in the slices of `made`; every decision that it had stays with its slice."""
    sizes = made.parts[0][1] if made.parts else (sum(arm.split.parts[0][1]),)
    split = Split((*(part for part in arm.split.parts if name not in part[0]), ((name,), sizes)))
    sliced = apply(problem.graph, split)
    space = _space(sliced, problem, WINDOW)
    assert arm.state is not None and arm.cycle is not None
    old = _like(arm.graph, sliced)
    lowest = space.lowest_mode()
    state = replace(
        arm.state, mode=np.maximum(arm.state.mode[old], lowest), row=arm.state.row[old], delay=arm.state.delay[old]
    )
    mode, nudge = np.maximum(arm.cycle.mode[old], lowest), np.arange(len(old)) * 1e-6
    cycle = Cycle(arm.cycle.place[old] + nudge, arm.cycle.lane[old], mode, arm.cycle.table)
    return _Arm(split, sliced, arm.layout, space, state, cycle)


def _like(before: Graph, after: Graph) -> np.ndarray:
    """For every op of `after` the op of `before` that it is most like: the same slice, or the one at its place."""
    slices: dict[str, list[int]] = {}
    for i, op in enumerate(before.ops):
        slices.setdefault(op.name.partition("#")[0], []).append(i)
    count = Counter(op.name.partition("#")[0] for op in after.ops)
    seen: Counter[str] = Counter()
    found, last = [], 0
    for op in after.ops:
        stem = op.name.partition("#")[0]
        if stem in slices:
            last = slices[stem][seen[stem] * len(slices[stem]) // count[stem]]
            seen[stem] += 1
        found.append(last)
    return np.array(found)


def _areas(graph: Graph, problem: Problem) -> dict[str, float]:
    """The least SM-seconds of the slices of every op together, by the op's name; of a repeat one iteration."""
    once = graph if graph.repeat is None else replace(graph, repeat=replace(graph.repeat, count=1))
    device = problem.device
    single = make_problem(once, device, device.partition_sizes(), problem.costs)
    areas: dict[str, float] = {}
    for op, area in zip(graph.ops, sm_seconds(single).tolist(), strict=True):
        stem = op.name.partition("#")[0]
        areas[stem] = areas.get(stem, 0.0) + area
    return areas


def slicings(graph: Graph) -> list[Split]:
    """Splits of the batch of most of the work into two to four slices, of multiples of 128 where it is large."""
    info = splittable(graph)
    weight: Counter[int] = Counter()
    for i, op in enumerate(graph.ops):
        if op.name in info:
            times = graph.repeat.count if graph.repeat and graph.repeat.first <= i < graph.repeat.last else 1
            weight[info[op.name].batch] += times * (int(op.work.flops + op.work.hbm_bytes) + 1)
    if not weight:
        return []
    batch = weight.most_common(1)[0][0]
    unit = 128 if batch >= 512 else max(1, batch // 8)
    pairs = [(first, batch - first) for first in range(unit, batch // 2 + 1, unit) if first >= batch / 8]
    more = [_even(batch, count, unit) for count in (3, 4) if batch >= count * unit]
    return [Split.of(sizes) for sizes in dict.fromkeys([*pairs, *more])]


def _even(batch: int, count: int, unit: int) -> tuple[int, ...]:
    """`batch` in `count` slices of about the same multiple of `unit`, the smaller ones first."""
    cuts = [round(batch * i / count / unit) * unit for i in range(count)] + [batch]
    return tuple(sorted(b - a for a, b in pairwise(cuts)))


def _arms(problem: Problem, limit_s: float, nano_batches: bool) -> Iterator[_Arm]:
    graph, device = problem.graph, problem.device
    layouts, measured = search_layouts(device), False
    for at, made in enumerate([UNSPLIT, *(slicings(graph) if nano_batches and device.kind == "gpu" else ())]):
        sliced = apply(graph, made)
        if at and sliced is graph:
            continue
        space = _space(sliced, problem, WINDOW)
        measured = measured or (at == 0 and not _guessed(space))
        if _bound(space) >= limit_s or (measured and _guessed(space)):
            continue
        for layout in layouts if not at or len(made.parts[0][1]) == 2 else layouts[:1]:
            if int(space.problem.sizes[space.lowest_mode()].max()) <= layout.table[:, 2].max():
                yield _Arm(made, sliced, layout, space)


def _guessed(space: Space) -> bool:
    """Whether some op has a price that is not measured; slices are not compared with what was, unless all are."""
    return any("measured" not in source.split(" ")[0] for source in space.problem.sources)


def _bound(space: Space) -> float:
    """A bound on the whole graph's time from a window's: the area on the SMs grows with the iterations."""
    problem = space.problem
    weight = np.where(space.inside, space.total / space.window, 1.0)
    return max(lower_bounds(problem).chain_s, float((sm_seconds(problem) * weight).sum() / problem.sm_count))


def _advanced(arm: _Arm, budget_s: float, seed: int) -> _Arm:
    """The arm after another `budget_s`."""
    space, layout = arm.space, arm.layout
    begin = starts(space, layout) if arm.state is None else [arm.state]
    state = anneal(space, layout, begin, _DISPATCHED * budget_s, seed)
    begun = [cycle_of(space, layout, state), plain_cycle(space, layout, state)]
    if arm.cycle is not None:
        begun.append(arm.cycle)
    cycle = polish(space, layout, begun, (1 - _DISPATCHED) * budget_s, seed)
    return replace(arm, state=state, cycle=cycle)


def _promising(arms: Iterable[_Arm]) -> list[_Arm]:
    """The _KEPT best by their seeds; partitions only where they begin better than the whole device does."""
    least: dict[Split, float] = {}
    kept = []
    for arm in arms:
        seconds = least.setdefault(arm.split, arm.judged())
        if len(arm.layout.table) == 1 or arm.judged() < seconds:
            kept.append(arm)
    return sorted(kept, key=_Arm.judged)[:_KEPT]


def _seeded(arm: _Arm, budget_s: float) -> _Arm:
    """The arm with the best state and the best cycle of those that a search may begin from, as many as about
    `budget_s` allows."""
    space, layout = arm.space, arm.layout
    traits, like = seeds.traits_of(space, [op.name for op in arm.graph.ops]), starts(space, layout)
    placed = seeds.states(space, layout, traits, like[1]) if len(layout.table) > 1 else []
    state = STATES.judged(space, layout, [*like, *_few(placed, STATES.trials_in(space, budget_s))])[0]
    begun = [cycle_of(space, layout, state), plain_cycle(space, layout, state)]
    tried = _few(seeds.cycles(space, layout, traits, like[0]), CYCLES.trials_in(space, budget_s))
    return replace(arm, state=state, cycle=CYCLES.judged(space, layout, [*begun, *tried])[0])


def _few(made: list[T], most: int) -> list[T]:
    """At most so many (and _LEAST_SEEDS), from all over the list."""
    count = min(len(made), max(most, _LEAST_SEEDS))
    return [made[i] for i in np.linspace(0, len(made) - 1, count).astype(int)] if made else made


def _realised(problem: Problem, arm: _Arm, seed: int) -> Found:
    """The better one of the arm's two schedules on the whole graph."""
    assert arm.state is not None and arm.cycle is not None
    whole = _space(arm.graph, problem, None)
    best, times = realise(whole, arm.layout, arm.state)
    if np.isfinite(arm.cycle.seconds):
        fixed = written_out(whole, arm.layout, arm.cycle)
        # A deadlock that spans more iterations than the window has is possible, if only just: then the other one it is.
        with suppress(PlanError):
            fixed_times = evaluate(whole.problem, fixed)
            if fixed_times.makespan_s < times.makespan_s or whole.tied.any():
                by_start = np.lexsort((np.arange(whole.problem.n), fixed_times.end_s, fixed_times.start_s))
                best, times = replace(fixed, order=by_start), fixed_times
    if (trimmed := _trimmed(best)) is not best:
        best, times = trimmed, evaluate(whole.problem, trimmed)
    label = f"search on {lists.label(best.layout)}{_sliced(arm.split)}, seed {seed}"
    return Found(whole.problem, replace(best, made_by=label, split=arm.split), times)


def _trimmed(made: Assignment) -> Assignment:
    """The assignment without lanes that run nothing, and geometries that no lane is left of."""
    layout = made.layout
    used = np.bincount(made.lane, minlength=len(layout.lane_partition)) > 0
    if used.all():
        return made
    count = np.bincount(layout.lane_partition[used], minlength=len(layout.table)).tolist()
    each = {g: tuple(count[p] for p in np.flatnonzero(layout.table[:, 0] == g)) for g in range(len(layout.geometries))}
    kept = [g for g, lanes in each.items() if any(lanes)]
    left = Layout(tuple(layout.geometries[g] for g in kept), tuple(each[g] for g in kept))
    return replace(made, layout=left, lane=(np.cumsum(used) - 1)[made.lane])


def _sliced(split: Split) -> str:
    return "".join(f", slices of {' + '.join(map(str, sizes))}" for _, sizes in split.parts)


# ---------------------------------------------------------------------------------------- what the search sees


def _space(graph: Graph, like: Problem, window: int | None) -> Space:
    """The space of a graph, or of `window` iterations of its repeat: one decision for each op of the body. Device and
    prices are those of `like`."""
    repeat, device = graph.repeat, like.device
    tied = np.array([op.kind in COLLECTIVES and op.integer("ranks") > 1 for op in graph.ops])
    if repeat is None:
        problem = make_problem(graph, device, legal_sizes(len(graph.ops), device), like.costs)
        return replace(Space.flat(problem), tied=tied)
    count = min(window or repeat.count, repeat.count)
    seen = graph if count == repeat.count else replace(graph, repeat=replace(repeat, count=count))
    whole = len(graph.ops) + (repeat.last - repeat.first) * (repeat.count - 1)
    problem = make_problem(seen, device, legal_sizes(whole, device), like.costs)
    first, last, n = repeat.first, repeat.last, len(graph.ops)
    decision = np.concatenate([np.arange(first), np.tile(np.arange(first, last), count), np.arange(last, n)])
    body = np.repeat(np.arange(count), last - first)
    iteration = np.concatenate([np.zeros(first, np.int64), body, np.full(n - last, count - 1)])
    inside = (decision >= first) & (decision < last)
    return Space(problem, decision, _kin(graph), iteration, inside, tied, count, repeat.count)


def _kin(graph: Graph) -> np.ndarray:
    """Slices of one op, "up#0" and "up#1", have one number."""
    stems = [op.name.partition("#")[0] for op in graph.ops]
    number = {stem: i for i, stem in enumerate(dict.fromkeys(stems))}
    return np.array([number[stem] for stem in stems])
