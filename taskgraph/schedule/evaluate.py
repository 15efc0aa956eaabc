"""The one clock: an event-driven fluid simulation of ops on lanes.

A running op first pays its launch, and then progresses at the rate that its resources allow. Ops in one partition
share its SMs and the bandwidth that these can draw; all ops share hbm, the copy paths and the link. Each is divided
by max-min fair share (Bertsekas and Gallager 1992, section 6.5.2). Ties are resolved by lane number, so that equal
inputs give equal times.

Two doors lead to the clock. `evaluate` times a finished assignment: every lane has its queue. `dispatch` also makes
one: whenever an op ends, the ready ops of highest priority start where their SMs fit (the parallel schedule
generation scheme, Kelley 1963, in fluid time). Its result, evaluated, gives the same times.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.graph.device import Geometry
from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.jit import plain
from taskgraph.schedule.clock import Clock, Lanes, Queues, Wishes, front_of, run_dispatch, simulate, workspace_of
from taskgraph.schedule.problem import Problem


@dataclass(frozen=True)
class Layout:
    """The lanes that a schedule may use: geometries, and the number of lanes in each of their partitions."""

    geometries: tuple[Geometry, ...]
    lanes_each: tuple[tuple[int, ...], ...]

    @staticmethod
    def shared(sm_count: int, lanes: int) -> "Layout":
        """`lanes` lanes that share the whole device."""
        return Layout((Geometry.of(sm_count),), ((lanes,),))

    @staticmethod
    def isolated(*geometries: Geometry) -> "Layout":
        """One lane in each partition of each geometry."""
        return Layout(geometries, tuple((1,) * len(g.partitions) for g in geometries))

    @cached_property
    def table(self) -> np.ndarray:
        """(partitions, 4): geometry, first SM, SMs, number of lanes; geometry by geometry."""
        return np.array(
            [
                (g, part.first_sm, part.sm_count, lanes)
                for g, (geometry, each) in enumerate(zip(self.geometries, self.lanes_each, strict=True))
                for part, lanes in zip(geometry.partitions, each, strict=True)
            ],
            np.int64,
        )

    @cached_property
    def lane_partition(self) -> np.ndarray:
        """(lanes,): the row of `table` that each lane belongs to."""
        return np.repeat(np.arange(len(self.table)), self.table[:, 3])

    @cached_property
    def conflicts(self) -> np.ndarray:
        """(lanes, lanes): lanes of different geometries whose partitions overlap; they never run together."""
        geometry, first, size = self.table[self.lane_partition, :3].T
        apart = (first[:, None] + size[:, None] <= first[None, :]) | (first[None, :] + size[None, :] <= first[:, None])
        result: np.ndarray = (geometry[:, None] != geometry[None, :]) & ~apart
        return result


NO_HOLDS = np.empty((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a scheduler returns: which lane runs which op, in which order, on how many SMs.

    order (n,) op numbers; lane (n,) and mode (n,) by op; holds (k, 2): pairs (before, after) of ops beyond the
    problem's edges: the second starts only when the first has ended, because its SMs were not free earlier.
    `made_by` says for people who made it, and how. `proved_s` is what all plans of the graph take at least, as far as
    the scheduler has proved it. `problem` is the one whose ops and modes these are, where it is not the one that the
    scheduler was given: on other SM counts, or of the graph as `split` slices it. With `against` the plan is this one
    only if it is enough faster (planner.MIN_GAIN) than that one, which is the sequential one as a rule.
    """

    layout: Layout
    order: np.ndarray
    lane: np.ndarray
    mode: np.ndarray
    holds: np.ndarray = field(default_factory=lambda: NO_HOLDS)
    made_by: str = ""
    proved_s: float = 0.0
    problem: Problem | None = None
    split: Split = UNSPLIT
    against: "Assignment | None" = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """start_s and end_s (n,) by op; trace (events, 6): time, then the used shares of sm, hbm, h2d, d2h, link."""

    start_s: np.ndarray
    end_s: np.ndarray
    trace: np.ndarray

    @property
    def makespan_s(self) -> float:
        return float(self.end_s.max())


def evaluate(problem: Problem, chosen: Assignment, record: bool = False) -> Evaluation:
    """Times of every op under `chosen`; PlanError when its order makes lanes wait for each other for ever."""
    n, layout = problem.n, chosen.layout
    lanes = lanes_of(layout)
    lane_in_order = chosen.lane[chosen.order]
    pointer = np.zeros(len(lanes.partition) + 1, np.int64)
    np.cumsum(np.bincount(lane_in_order, minlength=len(lanes.partition)), out=pointer[1:])
    place = np.empty(n, np.int64)
    place[chosen.order] = np.arange(n)
    queue = plain(chosen.order[np.argsort(lane_in_order, kind="stable")], np.int64)
    mode = problem.launched(chosen.mode, layout.table[layout.lane_partition[chosen.lane], 2])
    queues = Queues(queue, pointer, place, plain(mode, np.int64))
    start, end, trace = np.zeros(n), np.zeros(n), np.zeros((2 * n + 2 if record else 0, 6))
    clock = clock_of(problem, *_with_holds(problem, chosen.holds))
    ended, events, _ = simulate(clock, lanes, queues, workspace_of(clock, lanes), start, end, trace)
    if ended < n:
        raise PlanError(f"{n - ended} of {n} ops never start: the order of the lanes contradicts the dependencies.")
    trace = trace[:events]
    trace[:, 1:] /= [problem.sm_count, *np.where(problem.capacity > 0.0, problem.capacity, np.inf)]
    return _settled(problem, layout, start, end, trace)


def _settled(problem: Problem, layout: Layout, start: np.ndarray, end: np.ndarray, trace: np.ndarray) -> Evaluation:
    """The times of a schedule at the clocks that its power leaves, all of it alike."""
    makespan = float(end.max())
    parts = bool(layout.table[:, 2].max() < problem.sm_count)
    slower = problem.settled(makespan, True) / makespan if makespan else 1.0
    if slower > 1.0 and not parts:
        slower = problem.settled(makespan, False, beside_share(problem, start, end)) / makespan
    if slower > 1.0:
        start, end = start * slower, end * slower
        trace[:, 0] *= slower
        trace[:, 2:] /= slower
    return Evaluation(start, end, trace)


def beside_share(problem: Problem, start: np.ndarray, end: np.ndarray) -> float:
    """The share of the makespan in which two or more ops run that use SMs; spans by op."""
    makespan, on_sms = float(end.max()), problem.use[:, -1, 0] > 0
    at = np.concatenate([start[on_sms], end[on_sms]])
    change = np.repeat((1.0, -1.0), len(at) // 2)
    order = np.lexsort((change, at))
    running = np.cumsum(change[order])
    return float(np.diff(at[order])[running[:-1] > 1.5].sum()) / makespan if makespan else 0.0


def dispatch(
    problem: Problem, layout: Layout, priority: np.ndarray, mode: np.ndarray, partition: np.ndarray,
    oversubscribe: tuple[float, float] = (1.0, 1.0), backfill: bool = True,
) -> tuple[Assignment, Evaluation]:  # fmt: skip
    """Start ready ops by `priority` (n,), op i on mode[i] SMs in row partition[i] of `layout.table`.

    An op starts when its partition has a free lane and would not be asked for more than oversubscribe[0] times its
    SMs, and no soft resource for more than oversubscribe[1] times its capacity. Without `backfill` no op overtakes
    one of higher priority that waits for SMs.
    """
    clock, lanes = clock_of(problem), lanes_of(layout)
    chosen, limits = plain(problem.launched(mode, layout.table[partition, 2]), np.int64), np.array(oversubscribe)
    wishes = Wishes(plain(priority, np.float64), chosen, plain(partition, np.int64), limits, bool(backfill))
    front = front_of(clock)
    if run_dispatch(clock, lanes, wishes, workspace_of(clock, lanes), front) == np.inf:
        raise PlanError("some ops never start: their partition has no lane, or the device no such resource.")
    held = np.flatnonzero(front.hold >= 0)
    holds = np.stack([front.hold[held], held], axis=1)
    made = Assignment(layout, front.order, front.lane, chosen, holds)
    return made, _settled(problem, layout, front.start, front.end, np.zeros((0, 6)))


def _with_holds(problem: Problem, holds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(missing predecessors, succ_ptr, succ) of the problem's edges and the holds."""
    missing = np.diff(problem.pred_ptr)
    if not len(holds):
        return missing, problem.succ_ptr, problem.succ
    before = np.concatenate([np.repeat(np.arange(problem.n), np.diff(problem.succ_ptr)), holds[:, 0]])
    after = np.concatenate([problem.succ, holds[:, 1]])
    pointer = np.zeros(problem.n + 1, np.int64)
    np.cumsum(np.bincount(before, minlength=problem.n), out=pointer[1:])
    missing = missing + np.bincount(holds[:, 1], minlength=problem.n)
    return missing, pointer, after[np.argsort(before, kind="stable")]


def clock_of(
    problem: Problem, missing: np.ndarray | None = None, succ_ptr: np.ndarray | None = None,
    succ: np.ndarray | None = None,
) -> Clock:  # fmt: skip
    """The problem for the clock, by its own edges or by those given."""
    return Clock(
        plain(problem.seconds, np.float64),
        plain(problem.use, np.float64),
        plain(np.diff(problem.pred_ptr) if missing is None else missing, np.int64),
        plain(problem.succ_ptr if succ_ptr is None else succ_ptr, np.int64),
        plain(problem.succ if succ is None else succ, np.int64),
        plain(problem.capacity, np.float64),
        float(problem.sm_bytes_per_s),
        float(problem.launch_s),
        float(problem.switch_s),
        float(problem.together.hbm_knee),
        float(problem.together.hbm_slope),
    )


def lanes_of(layout: Layout) -> Lanes:
    """The layout for the clock."""
    conflicts = layout.conflicts
    return Lanes(
        plain(layout.lane_partition, np.int64), plain(layout.table, np.int64), plain(conflicts, np.bool_),
        bool(conflicts.any()),
    )  # fmt: skip
