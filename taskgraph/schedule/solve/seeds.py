"""Where a search begins: who shares SMs with whom, and in which order.

Kernels that fill what they are given take turns wherever they share SMs. So a schedule gains by what runs beside them:
copies, collectives and small grids on other lanes of the same partition; kernels that keep most of their speed on few
SMs, in a partition of their own, all the time or in turns with the whole device; and slices of the batch that are
shifted in time, so that one computes while another communicates. Each such choice is a point to begin from, and the
clock judges them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.schedule.evaluate import Layout
from taskgraph.schedule.solve.annealing import Space, State
from taskgraph.schedule.solve.cycles import Cycle, on_one_lane

FILLS, FEW, IN, OUT = range(4)
"""What an op does to the SMs of its partition: it fills them, it needs few, or it copies in or out and needs none."""
_SMALL = 0.5
"""An op that fills less than this share of the device needs few SMs."""
_MEMORY_BOUND = 0.5
"""Share of the memory's bandwidth from which an op is called bound by it."""
_HEAVY = 5
"""Kinds of ops that are tried in a partition of their own: those that take longest."""
_COARSE = 4
"""Of the sizes of partitions that ops keep, every so many-th is tried; the search moves borders on from there."""
_PAIRS_UP_TO = 100
"""Decisions up to which pairs that could run at once are looked for."""
_WORTH = 0.02
"""A pair must save this share of the longest op."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What is known of each decision (d,) before anything is scheduled: seconds (d, m) by mode, what it `does` (FILLS,
    FEW, IN or OUT), whether memory binds it, the slice that it is of, and when it could start at the earliest, as a
    share of its iteration. beside (d, d): neither of two needs the other within an iteration."""

    seconds: np.ndarray
    does: np.ndarray
    memory: np.ndarray
    part: np.ndarray
    early: np.ndarray
    beside: np.ndarray

    @property
    def parts(self) -> int:
        """How many slices there are."""
        return int(self.part.max()) + 1


def traits_of(space: Space, names: Sequence[str]) -> Traits:
    """The traits of the decisions, whose ops are called `names`."""
    problem, d = space.problem, len(space.kin)
    first = np.zeros(d, np.int64)
    first[space.decision[::-1]] = np.arange(problem.n)[::-1]
    seconds, use, work = problem.seconds[first], problem.use[first, -1], problem.work[first]
    few = problem.own_grid[first] | (use[:, 0] < _SMALL * problem.sm_count)
    does = np.where(few, FEW, FILLS)
    does = np.where(use[:, 0] == 0.0, np.where(work[:, 2] > work[:, 1], OUT, IN), does)
    edges = _edges(space)
    early, length = _early(edges, seconds[:, -1] + problem.launch_s)
    beside = _beside(edges, d) if d <= _PAIRS_UP_TO else np.zeros((d, d), np.bool_)
    return Traits(
        seconds, does, use[:, 1] > _MEMORY_BOUND * problem.capacity[0], _parts(names, edges), early / length, beside
    )  # fmt: skip


Edges = list[tuple[int, int]]


def _edges(space: Space) -> Edges:
    """The edges (before, after) between decisions of the same iteration, by the first."""
    problem = space.problem
    before = np.repeat(np.arange(problem.n), np.diff(problem.succ_ptr))
    same = space.iteration[before] == space.iteration[problem.succ]
    one, other = space.decision[before[same]], space.decision[problem.succ[same]]
    return sorted({*zip(one.tolist(), other.tolist(), strict=True)})


def _parts(names: Sequence[str], edges: Edges) -> np.ndarray:
    """The slice that each decision is of: by its name, "up#1", else that of an op that it needs or serves."""
    marks = [name.rpartition("#")[2] if "#" in name else "" for name in names]
    part = [int(mark) if mark.isdigit() else -1 for mark in marks]
    for one, other in [*edges, *((after, before) for before, after in reversed(edges))]:
        if part[other] < 0:
            part[other] = part[one]
    return np.maximum(part, 0)


def _early(edges: Edges, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """(earliest start (d,), the length of the longest chain) of one iteration."""
    start = np.zeros(len(seconds))
    for before, after in edges:
        start[after] = max(start[after], start[before] + seconds[before])
    return start, max(float((start + seconds).max()), 1e-12)


def _beside(edges: Edges, d: int) -> np.ndarray:
    reach = np.eye(d, dtype=np.bool_)
    for before, after in reversed(edges):
        reach[before] |= reach[after]
    made: np.ndarray = ~(reach | reach.T)
    return made


# ------------------------------------------------------------------------------------------- who runs where


def placements(space: Space, layout: Layout, traits: Traits) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(table (p, 4) as in `Layout.table`, row of each decision (d,)): sizes of the partitions, and who runs in which.

    A layout is the whole device, two partitions, or both in turns, the whole first."""
    table, d = layout.table, len(space.kin)
    if len(table) == 1:
        yield table, np.zeros(d, np.int64)
        return
    turns = len(table) == 3
    first = int(turns)
    least = space.problem.sizes[space.lowest_mode()]
    for split in _splits(space, int(table[first:, 2].sum()), 1 if turns else _COARSE):
        made = table.copy()
        made[first:, 2] = split
        made[first + 1, 1] = split[0]
        largest = int(np.argmax(made[:, 2]))
        for row in [_in_turns(space, traits, split)] if turns else _apart(space, traits):
            if row.min() < row.max():
                yield made, np.where(made[row, 2] < least, largest, row)


def _splits(space: Space, total: int, step: int) -> list[tuple[int, int]]:
    """Sizes of two partitions that have `total` SMs, every `step`-th of those that are legal, from either end."""
    sizes = space.problem.device.partition_sizes()[:-1]
    legal = [(size, total - size) for size in sizes if total - size in sizes]
    return sorted({*legal[::step], *legal[::-step]})


def _apart(space: Space, t: Traits) -> Iterator[np.ndarray]:
    """Partitions that ops keep: slices apart; what memory binds, or few SMs do, apart from the rest; or one kind."""
    weight = np.bincount(space.kin, t.seconds[:, -1] * (t.does < IN))
    heavy = np.argsort(-weight, kind="stable")[:_HEAVY]
    kinds = [space.kin == each for each in heavy]
    for mine in (*(t.part < k for k in range(1, t.parts)), t.memory, t.does != FEW, *kinds):
        yield np.where(mine, 0, 1)


def _in_turns(space: Space, t: Traits, split: tuple[int, int]) -> np.ndarray:
    """The whole device for all but pairs of ops that gain by running at once in partitions of these sizes, each op in
    one pair at most, the best pairs first."""
    problem, row = space.problem, np.zeros(len(space.kin), np.int64)
    one, other = (t.seconds[:, problem.mode_of(size)] for size in split)
    alone = t.seconds[:, -1]
    gain = alone[:, None] + alone[None, :] - np.maximum(one[:, None], other[None, :]) - 2.0 * problem.switch_s
    fills = t.does == FILLS
    gain[~(t.beside & fills[:, None] & fills[None, :])] = 0.0
    while (best := int(gain.argmax())) >= 0 and gain.flat[best] > _WORTH * alone.max():
        i, j = divmod(best, len(gain))
        row[i], row[j] = 1, 2
        gain[[i, j], :] = gain[:, [i, j]] = 0.0
    return row


# ------------------------------------------------------------------------------------------- points to begin from


def states(space: Space, layout: Layout, traits: Traits, like: State) -> list[State]:
    """For `dispatch`: the ops of `like` where the placements put them."""
    placed = placements(space, layout, traits)
    return [State(like.mode, row, like.delay, table, like.policy) for table, row in placed]


def cycles(space: Space, layout: Layout, traits: Traits, like: State) -> list[Cycle]:
    """Fixed orders: the placements, with slices more or less shifted in time, on lanes by what ops do or by slices."""
    parts, made = traits.parts, list[Cycle]()
    shifts = [k / parts / 2 for k in range(2 * parts - 1)]
    for table, row in placements(space, layout, traits):
        for by_slice in (False, True) if parts > 1 and len(table) == 1 else (False,):
            lane = on_one_lane(space, layout, _lanes(layout, traits, row, by_slice))
            made += [Cycle(traits.early + shift * traits.part, lane, like.mode, table) for shift in shifts]
    return made


def _lanes(layout: Layout, t: Traits, row: np.ndarray, by_slice: bool) -> np.ndarray:
    """The lane of every decision in its partition: one for all that fills it, or one for each slice, and others for
    what does not, as far as there are lanes."""
    count = layout.table[row, 3]
    place = np.where(t.does == FILLS, t.part, t.does + t.parts - 1) if by_slice else t.does
    folded = np.where(place < count, place, 1 + (place - 1) % np.maximum(count - 1, 1))
    made: np.ndarray = np.searchsorted(layout.lane_partition, row) + folded % count
    return made
