"""Two graphs that run again and again beside each other, each in one partition of a split of the device, op after op:
what their runs take then, by the one clock, and the plan of one of them there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from taskgraph.cost.model import Costs, op_table
from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.device import Device, Geometry, get
from taskgraph.graph.graph import Graph
from taskgraph.record import instance, integer, sequence, shown
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, evaluate
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan_from
from taskgraph.schedule.problem import Problem, make_problem

_MOST_RUNS = 12
"""Runs of the shorter graph beside one of the longer that are looked at, at most; then only a part of that one is."""


def halves(device: str | Device) -> tuple[tuple[int, int], ...]:
    """The splits of a device into two legal partitions that leave no SMs which either could have, in rising order of
    the first; none for a device that cannot be split."""
    spec = get(device)
    sizes = spec.partition_sizes()[:-1]
    found = ((size, max((s for s in sizes if size + s <= spec.sm_count), default=0)) for size in sizes)
    return tuple((first, second) for first, second in found if second)


@dataclass(frozen=True, slots=True)
class Side:
    """A graph on a device, priced for every partition: one of two that run beside each other."""

    problem: Problem

    @staticmethod
    def of(graph: Graph, device: str | Device, costs: Costs = op_table) -> "Side":
        """Price the ops. DemandError as of `plan`."""
        spec = get(device)
        instance("the graph", graph, Graph, GraphError, "Take what GraphBuilder.build returned.")
        return Side(make_problem(graph, spec, spec.partition_sizes(), costs))

    def alone_s(self, sms: int | None = None) -> float:
        """Seconds of a run alone, op after op on so many SMs (default: all). PlanError for no partition's size."""
        p = self.problem
        sms = p.sm_count if sms is None else integer("the SMs", sms, PlanError, 1)
        if sms not in p.sizes:
            raise PlanError(f"{sms} SMs are no partition of {p.device.name}; it has {shown([*map(int, p.sizes)])}.")
        return self._alone(sms).makespan_s

    def _alone(self, sms: int) -> Evaluation:
        p = self.problem
        made = Assignment(
            Layout.isolated(Geometry.of(sms)), np.arange(p.n), np.zeros(p.n, np.int64), np.full(p.n, p.mode_of(sms))
        )
        return evaluate(p, made)

    def extents_s(self, sms: int) -> np.ndarray:
        """Of each op of a run alone on so many SMs, the seconds from its start to that of the next (n,)."""
        times = self._alone(sms)
        return _extents(times.start_s, times.end_s)


def beside(first: Side, second: Side, sizes: tuple[int, int]) -> tuple[float, float]:
    """Seconds of a run of each while the other never stops, the first on sizes[0] SMs and the second on sizes[1]: each
    op at the speed that its SMs, what both draw of the shared bandwidths, and the power of both allow.

    PlanError for sides of two devices, and sizes that are no split of theirs."""
    for side in (first, second):
        instance("a side", side, Side, PlanError, "Take what Side.of returns.")
    device = first.problem.device
    if second.problem.device != device:
        raise PlanError(f"one side is for {device.name}, the other for {second.problem.device.name}; price them alike.")
    sizes = _split(device, sizes)
    alone = first.alone_s(sizes[0]), second.alone_s(sizes[1])
    runs = [min(max(math.ceil(max(alone) / seconds), 1), _MOST_RUNS) for seconds in alone]
    both, lane, mode = _together((first.problem, second.problem), runs, sizes)
    clocks = replace(both.together, power_exponent=0.0)  # the end, where only one runs, draws less power
    made = Assignment(Layout.isolated(Geometry.of(*sizes)), np.arange(both.n), lane, mode)
    times = evaluate(replace(both, together=clocks), made)
    until = min(float(times.end_s[lane == side].max()) for side in (0, 1))
    extents = first.extents_s(sizes[0]), second.extents_s(sizes[1])
    done = [_runs_done(times.start_s[lane == s], times.end_s[lane == s], until, extents[s]) for s in (0, 1)]
    drawn = sum(runs * float(each.problem.energy.sum()) for runs, each in zip(done, (first, second), strict=True))
    until = both.together.settled(until, drawn)
    return until / done[0], until / done[1]


def _split(device: Device, sizes: object) -> tuple[int, int]:
    """`sizes` as two partitions that the device can have at once. PlanError if they are not."""
    two = [integer("SMs of a side", size, PlanError) for size in sequence("sizes", sizes, PlanError)]
    if len(two) != 2 or sum(two) > device.sm_count or not {*two} <= {*device.partition_sizes()}:
        raise PlanError(f"{' + '.join(map(str, two))} SMs are no split of {device.name}; take one of `halves`.")
    return two[0], two[1]


def _together(
    sides: Sequence[Problem], runs: Sequence[int], sizes: Sequence[int]
) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The ops of both, written out so many times, as one problem without edges (a lane runs its ops in order), with
    the lane and the mode of each."""
    each = [np.tile(np.arange(p.n), times) for p, times in zip(sides, runs, strict=True)]
    n, m = sum(map(len, each)), len(sides[0].sizes)
    lane = np.repeat([0, 1], [len(ops) for ops in each])
    mode = np.array([p.mode_of(size) for p, size in zip(sides, sizes, strict=True)])[lane]
    none, pointer = np.empty(0, np.int64), np.zeros(n + 1, np.int64)

    def of(name: str) -> np.ndarray:
        made: np.ndarray = np.concatenate([getattr(p, name)[ops] for p, ops in zip(sides, each, strict=True)])
        return made

    both = replace(
        sides[0], legal=np.ones((n, m), np.bool_), seconds=of("seconds"), use=of("use"), work=of("work"),
        pred_ptr=pointer, pred=none, succ_ptr=pointer, succ=none, band=of("band"), own_grid=of("own_grid"),
        energy=of("energy"),
    )  # fmt: skip
    return both, lane, mode


def _extents(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of the ops of a lane, in their order: seconds from the start of each to that of the next, the last to its end."""
    return np.diff(start, append=end[-1])


def _runs_done(start: np.ndarray, end: np.ndarray, until: float, alone: np.ndarray) -> float:
    """How many runs are done by `until`, a part of a run by what its ops take `alone`: (n,) seconds each."""
    done = np.clip((until - start) / np.maximum(_extents(start, end), 1e-15), 0.0, 1.0)
    return float(done.reshape(-1, len(alone)).sum(axis=0) @ alone / alone.sum())


def plan_beside(graph: Graph, device: str | Device, sizes: tuple[int, int], side: int, costs: Costs = op_table) -> Plan:
    """The plan of a graph, op after op, in partition `side` (0 or 1) of a split of the device into `sizes` SMs: to be
    replayed while another graph's plan runs in the other one. Its times are those that it has alone there.

    PlanError for sizes that are no split of the device."""
    spec, side = get(device), integer("the side", side, PlanError, 0, 1)
    instance("the graph", graph, Graph, GraphError, "Take what GraphBuilder.build returned.")
    sizes = _split(spec, sizes)
    problem = make_problem(graph, spec, sorted({*sizes, spec.sm_count}), costs)
    n = problem.n
    mode = np.full(n, problem.mode_of(sizes[side]))
    layout = Layout.isolated(Geometry.of(*sizes))
    made_by = f"beside: op after op on {sizes[side]} SMs of {sizes[0]} + {sizes[1]}"
    return plan_from(problem, Assignment(layout, np.arange(n), np.full(n, side), mode, made_by=made_by))
