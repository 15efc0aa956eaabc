"""The clock against a second one, written as its description reads, and against paper.

The second clock keeps its state in dictionaries and shares a resource by sorting the needs; that both give the same
times on random problems says what no example can.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, dataclass, field, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.errors import PlanError
from taskgraph.graph.device import Geometry, Partition
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Layout, dispatch, evaluate
from taskgraph.schedule.problem import Problem
from tests.schedule.problems_by_hand import problem, sms

LAYOUTS = (
    Layout.shared(8, 3),
    Layout.isolated(Geometry.of(4, 4)),
    Layout.isolated(Geometry.of(8), Geometry.of(4, 4)),
    Layout((Geometry.of(8), Geometry.of(2, 6)), ((2,), (1, 2))),
    Layout((Geometry.of(2, 6), Geometry.of(6, 2)), ((1, 1), (2, 1))),
)
SIZES = (2, 4, 8)


# ------------------------------------------------------------------------------------ the second clock


def shares(needs: dict[int, float], capacity: float) -> dict[int, float]:
    """Max-min fair: from the smallest need up, each gets what it needs, or an equal part of what is left."""
    given: dict[int, float] = {}
    left, count = capacity, len(needs)
    for lane in sorted(needs, key=lambda lane: needs[lane]):
        given[lane] = min(needs[lane], left / count)
        left, count = left - given[lane], count - 1
    return given


@dataclass
class Running:
    op: int
    wait_s: float
    left: float = 1.0


@dataclass
class Clock:
    """Starts what `pick` says at every event: pairs of lane and op, told what runs and what has ended."""

    made: Problem
    layout: Layout
    mode: np.ndarray
    now: float = 0.0
    running: dict[int, Running] = field(default_factory=dict)
    start: dict[int, float] = field(default_factory=dict)
    end: dict[int, float] = field(default_factory=dict)
    ready_s: dict[int, float] = field(default_factory=dict)
    trace: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.partition = [p for p, row in enumerate(self.layout.table.tolist()) for _ in range(row[3])]

    def rivals(self, lane: int) -> list[int]:
        rows = self.layout.table.tolist()
        geometry, first, size, _ = rows[self.partition[lane]]
        return [
            other
            for other, p in enumerate(self.partition)
            if rows[p][0] != geometry and rows[p][1] < first + size and first < rows[p][1] + rows[p][2]
        ]

    def begin(self, lane: int, op: int) -> None:
        here = self.partition[lane]
        ready = self.ready_s.get(here, 0.0)
        if ready == math.inf:
            ready = self.ready_s[here] = self.now + self.made.switch_s
        for other in self.rivals(lane):
            self.ready_s[self.partition[other]] = math.inf
        self.running[lane] = Running(op, self.made.launch_s + max(0.0, ready - self.now))
        self.start[op] = self.now

    def use(self, op: int, resource: int) -> float:
        return float(self.made.use[op, self.mode[op], resource])

    def speeds(self) -> tuple[dict[int, float], list[float]]:
        speed = {lane: 1.0 for lane, r in self.running.items() if r.wait_s <= 0}

        def throttle(lanes: list[int], resource: int, capacity: float) -> float:
            needs = {i: self.use(self.running[i].op, resource) * speed[i] for i in lanes}
            needs = {i: need for i, need in needs.items() if need > 0}
            if sum(needs.values()) > capacity * (1 + 1e-12):
                for i, share in shares(needs, capacity).items():
                    speed[i] *= share / needs[i]
                return capacity
            return sum(needs.values())

        for p, row in enumerate(self.layout.table.tolist()):
            inside = [i for i in speed if self.partition[i] == p]
            throttle(inside, 0, row[2])
            throttle(inside, 1, row[2] * self.made.sm_bytes_per_s)
        soft = [throttle(list(speed), r, float(self.made.capacity[r - 1])) for r in range(1, 5)]
        hard = sum(self.use(self.running[i].op, 0) * v for i, v in speed.items())
        parts = [u / c if c else 0.0 for u, c in zip(soft, self.made.capacity.tolist(), strict=True)]
        return speed, [hard / self.made.sm_count, *parts]

    def run(self, pick: Callable[["Clock"], Iterator[tuple[int, int]]]) -> "Clock":
        while len(self.end) < self.made.n:
            for lane, op in pick(self):
                self.begin(lane, op)
            if not self.running:
                return self
            speed, used = self.speeds()
            self.trace.append([self.now, *used])
            until = {
                i: r.wait_s if i not in speed else r.left * self.seconds(r.op) / speed[i]
                for i, r in self.running.items()
            }
            step = min(until.values())
            self.now += step
            for i in sorted(self.running):
                r = self.running[i]
                if i not in speed:
                    r.wait_s = 0.0 if until[i] <= step * (1 + 1e-12) else r.wait_s - step
                    continue
                r.left -= step * speed[i] / self.seconds(r.op)
                if r.left <= 1e-12:
                    self.end[r.op] = self.now
                    del self.running[i]
        return self

    def seconds(self, op: int) -> float:
        return float(self.made.seconds[op, self.mode[op]])

    def may_start(self, op: int) -> bool:
        return op not in self.start and all(p in self.end for p in self.before(op))

    def before(self, op: int) -> list[int]:
        found: list[int] = self.made.pred[self.made.pred_ptr[op] : self.made.pred_ptr[op + 1]].tolist()
        return found


def queued(chosen: Assignment) -> Callable[[Clock], Iterator[tuple[int, int]]]:
    """Every lane starts its next op when that may start, and no rival runs or has an earlier one next."""
    order = chosen.order.tolist()
    lane = chosen.lane.tolist()
    holds = [(int(a), int(b)) for a, b in chosen.holds]

    def pick(clock: Clock) -> Iterator[tuple[int, int]]:
        def head(of: int) -> int | None:
            return next((op for op in order if lane[op] == of and op not in clock.start), None)

        for i in range(len(clock.partition)):
            op = head(i)
            if i in clock.running or op is None or not clock.may_start(op):
                continue
            if any(a not in clock.end for a, b in holds if b == op):
                continue
            heads = [head(j) for j in clock.rivals(i)]
            busy = any(j in clock.running for j in clock.rivals(i))
            if not busy and not any(h is not None and order.index(h) < order.index(op) for h in heads):
                yield i, op

    return pick


def by_priority(
    priority: np.ndarray, partition: np.ndarray, most: tuple[float, float], backfill: bool
) -> Callable[[Clock], Iterator[tuple[int, int]]]:
    """Every ready op, of higher priority first, starts where a lane is free and its resources are not spoken for."""
    since: dict[int, int] = {}

    def pick(clock: Clock) -> Iterator[tuple[int, int]]:
        ended = list(clock.end)
        fresh = [op for op in range(clock.made.n) if clock.may_start(op) and op not in since]
        last = {op: max((ended.index(p) for p in clock.before(op)), default=-1) for op in fresh}
        for op in sorted(fresh, key=lambda op: (last[op], op)):
            since[op] = len(since)
        for op in sorted((o for o in since if o not in clock.start), key=lambda o: (-priority[o], since[o])):
            where = int(partition[op])
            lanes = [i for i, p in enumerate(clock.partition) if p == where]
            if len(clock.running) == len(clock.partition):
                return
            if any(r in clock.running for r in clock.rivals(lanes[0])):
                return
            free = [i for i in lanes if i not in clock.running]
            fits = bool(free)
            for r in range(5):
                inside = [x.op for i, x in clock.running.items() if r > 0 or i in lanes]
                others = sum(clock.use(o, r) for o in inside)
                room = float(clock.layout.table[where, 2] if r == 0 else clock.made.capacity[r - 1]) * most[r > 0]
                mine = clock.use(op, r)
                fits = fits and not (others > 0 and mine > 0 and others + mine > room * (1 + 1e-9))
            if fits:
                yield free[0], op
            elif not backfill:
                return

    return pick


# ------------------------------------------------------------------------------------ random problems


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to nine ops with random uses, some of them none, and random edges."""
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    use = rng.integers(1, 9, (n, 3, 5)) * rng.integers(0, 2, (n, 3, 5))
    use[:, :, 0] = np.minimum(rng.integers(1, 9, (n, 3)), SIZES)
    edges = [(a, b) for b in range(n) for a in range(b) if rng.random() < 0.2]
    return problem(
        rng.integers(1, 9, (n, 3)), use, edges, sizes=SIZES, capacity=rng.choice([5.0, 9.0, 100.0], 4),
        sm_bytes_per_s=float(rng.choice([1.0, 100.0])), launch_s=draw(st.sampled_from([0.0, 0.25])),
        switch_s=draw(st.sampled_from([0.0, 1.5])),
    )  # fmt: skip


def fitting(rng: np.random.Generator, layout: Layout, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A random partition for every op, and a random mode that fits it."""
    partition = rng.integers(len(layout.table), size=n)
    room = np.searchsorted(SIZES, layout.table[partition, 2], side="right")
    return partition, rng.integers(room)


def close(found: np.ndarray, wanted: dict[int, float]) -> None:
    np.testing.assert_allclose(found, [wanted[op] for op in range(len(found))], rtol=1e-9, atol=1e-12)


@settings(max_examples=120)
@given(problems(), st.sampled_from(LAYOUTS), st.integers(0, 2**32 - 1))
def test_an_assignment_takes_the_times_of_the_second_clock(made: Problem, layout: Layout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    partition, mode = fitting(rng, layout, made.n)
    lanes = [np.flatnonzero(layout.lane_partition == p) for p in partition]
    lane = np.array([rng.choice(of) for of in lanes])
    pairs = [(a, b) for b in range(made.n) for a in range(b) if rng.random() < 0.1]
    holds = np.array(pairs, np.int64) if pairs else NO_HOLDS
    chosen = Assignment(layout, np.arange(made.n), lane, mode, holds)
    found = evaluate(made, chosen, record=True)
    wanted = Clock(made, layout, mode).run(queued(chosen))
    close(found.start_s, wanted.start)
    close(found.end_s, wanted.end)
    assert found.makespan_s == max(found.end_s)
    np.testing.assert_allclose(found.trace, wanted.trace, rtol=1e-9, atol=1e-9)
    assert len(evaluate(made, chosen).trace) == 0


@settings(max_examples=120)
@given(problems(), st.sampled_from(LAYOUTS), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1.0, 1.5, 3.0]))
def test_dispatch_starts_what_the_second_clock_starts(
    made: Problem, layout: Layout, seed: int, backfill: bool, most: float
) -> None:
    rng = np.random.default_rng(seed)
    partition, mode = fitting(rng, layout, made.n)
    priority = rng.integers(0, 4, made.n).astype(float)
    chosen, found = dispatch(made, layout, priority, mode, partition, (most, 4 - most), backfill)
    wanted = Clock(made, layout, mode).run(by_priority(priority, partition, (most, 4 - most), backfill))
    close(found.start_s, wanted.start)
    close(found.end_s, wanted.end)
    assert [float(found.start_s[op]) for op in chosen.order] == sorted(found.start_s.tolist())
    assert (layout.lane_partition[chosen.lane] == partition).all()
    ready = [max((wanted.end[p] for p in wanted.before(op)), default=0.0) for op in range(made.n)]
    late = [op for op in range(made.n) if found.start_s[op] > ready[op] + 1e-12]
    assert chosen.holds[:, 1].tolist() == late
    np.testing.assert_array_equal(found.end_s[chosen.holds[:, 0]], found.start_s[late])


# ----------------------------------------------------------------------------------------- on paper


def alone(layout: Layout, lane: list[int], mode: list[int] | None = None) -> Assignment:
    n = len(lane)
    return Assignment(layout, np.arange(n), np.array(lane), np.array(mode or [0] * n), NO_HOLDS)


def test_layouts_know_their_table_lanes_and_conflicts() -> None:
    shared = Layout.shared(8, 2)
    assert (shared.table.tolist(), shared.lane_partition.tolist()) == ([[0, 0, 8, 2]], [0, 0])
    assert not shared.conflicts.any()
    two = Layout((Geometry.of(4, 4), Geometry((Partition(2, 2), Partition(4, 3)))), ((1, 2), (1, 1)))
    assert two.table.tolist() == [[0, 0, 4, 1], [0, 4, 4, 2], [1, 2, 2, 1], [1, 4, 3, 1]]
    assert two.lane_partition.tolist() == [0, 1, 1, 2, 3]
    wanted = {(0, 3), (1, 4), (2, 4)}
    assert {(i, j) for i, j in zip(*np.nonzero(two.conflicts), strict=True)} == wanted | {(j, i) for i, j in wanted}
    assert Layout.isolated(Geometry.of(4, 4), Geometry.of(8)).lanes_each == ((1, 1), (1,))


@pytest.mark.parametrize("lanes_each", [((1,),), ((1, 1), (1,)), ((1, 1, 1),)])
def test_a_layout_says_lanes_for_every_partition_of_every_geometry(lanes_each: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        _ = Layout((Geometry.of(4, 4),), lanes_each).table


def test_three_ops_share_the_sms_fairly() -> None:
    """8 SMs for needs of 2, 4 and 8: shares 2, 3, 3. Launches of 1 s come first."""
    made = problem([3.0, 4.0, 8.0], sms(2, 4, 8), launch_s=1.0)
    times = evaluate(made, alone(Layout.shared(8, 3), [0, 1, 2]), record=True)
    # After 3 s of work: 3/4 of 3 s done of op 1, 3/8 of 3 s of op 2. Then 4 and 4: op 1 needs 1.75 s more,
    # and op 2 has 8 - 9/8 - 7/8 = 6 s left, alone at full speed.
    assert times.start_s.tolist() == [0.0, 0.0, 0.0]
    assert times.end_s == pytest.approx([4.0, 5.75, 11.75])
    assert times.trace == pytest.approx(
        np.array([[0.0, 0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0, 0], [4.0, 1, 0, 0, 0, 0], [5.75, 1, 0, 0, 0, 0]])
    )


def test_dispatch_lets_others_overtake_one_that_waits_for_sms_unless_told() -> None:
    """Needs of 6, 6 and 2 of 8 SMs: the third starts beside the first, ahead of the second."""
    made, none = problem([2.0, 2.0, 1.0], sms(6, 6, 2)), np.zeros(3, int)
    priority, layout = np.array([3.0, 2.0, 1.0]), Layout.shared(8, 3)
    chosen, times = dispatch(made, layout, priority, none, none)
    assert times.start_s.tolist() == [0.0, 2.0, 0.0] and times.trace.shape == (0, 6)
    _, strict = dispatch(made, layout, priority, none, none, backfill=False)
    assert strict.start_s.tolist() == [0.0, 2.0, 2.0]
    for value in (chosen, times):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)
        assert not hasattr(value, "__dict__")


def test_lanes_that_contradict_the_edges_are_counted() -> None:
    made = problem([1.0] * 3, sms(1, 1, 1), [(0, 1), (1, 2)])
    backwards = Assignment(Layout.shared(8, 1), np.array([0, 2, 1]), np.zeros(3, int), np.zeros(3, int), NO_HOLDS)
    with pytest.raises(PlanError, match="2 of 3 ops never start"):
        evaluate(made, backwards)


@pytest.mark.parametrize("lanes", [1, 3])
def test_more_ready_ops_than_are_looked_at_start_by_priority_and_then_as_they_came(lanes: int) -> None:
    """200 ops are ready at once, three that end let in others; of equals the first that was ready is first."""
    rng = np.random.default_rng(lanes)
    n = 220
    priority = rng.integers(0, 5, n).astype(float)
    priority[:3] = 9.0
    edges = [(i % 3, i) for i in range(200, n)]
    made = problem([1.0] * n, sms(*[1] * n), edges)
    chosen, times = dispatch(made, Layout.shared(8, lanes), priority, np.zeros(n, int), np.zeros(n, int))
    ready = {op: (0.0 if op < 200 else times.end_s[op % 3]) for op in range(n)}
    rest = set(range(n))
    for op in chosen.order.tolist():
        at = times.start_s[op]
        able = [o for o in rest if ready[o] <= at]
        turn = {o: (ready[o], o % 3 if o >= 200 else 0, o) for o in able}
        assert op == min(able, key=lambda o: (-priority[o], turn[o]))
        rest.remove(op)
    assert times.makespan_s == math.ceil(n / lanes)
