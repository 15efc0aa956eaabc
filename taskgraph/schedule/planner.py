"""plan(): what a scheduler assigns, timed by the one evaluator, compared with the sequential order, and written."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from taskgraph.cost.families import kernel_of
from taskgraph.cost.links import algorithm_on
from taskgraph.cost.model import Costs, op_table
from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.device import Device, get
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import RESOURCES
from taskgraph.jit import kernel, plain
from taskgraph.ops import COLLECTIVES, check_op
from taskgraph.record import from_columns, instance, integer, number
from taskgraph.record import function as called
from taskgraph.schedule.arena import assign
from taskgraph.schedule.band import error_band
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, evaluate
from taskgraph.schedule.plan import Collective, Lane, Period, Plan, Span, Step, Timeline, Verdict, uncollected
from taskgraph.schedule.problem import Budget, Problem, make_problem
from taskgraph.schedule.sliced import sliced
from taskgraph.schedule.solve import SCHEDULERS
from taskgraph.schedule.solve.checked import checked
from taskgraph.schedule.solve.found import Found, collectives_ordered, in_sequence, is_sequential

MIN_GAIN = 1.02
"""A packed plan must be predicted this much faster than the sequential one; less is not worth its events."""
_SLACK = 1e-9
"""Relative difference of times that is rounding."""


def plan(
    graph: Graph,
    device: str | Device = "cpu",
    scheduler: str = "auto",
    *,
    budget_s: float = 1.0,
    seed: int = 0,
    nano_batches: bool = True,
    costs: Costs = op_table,
) -> Plan:
    """The best plan that `scheduler` finds for `graph` on `device`, with bounds and a verdict.

    "sequential" runs op after op on the whole device. "list" packs by list scheduling and keeps the result even
    where it loses. "search" anneals for about `budget_s` seconds, deterministically for a `seed`, and keeps the
    better of its result and the list's. "exact" (extra `exact`, small graphs) goes on from the search with OR-Tools,
    and puts into the bounds what it proves about all plans. "auto" packs by list scheduling, and for a GPU it goes on
    with the search where the bounds leave room, for at most AUTO_OP_S seconds an op; graphs of very many ops are left
    to the lists. All but "list" and "exact" fall back to the sequential plan unless packing wins by MIN_GAIN, on a GPU
    also at the lower edge of `Verdict.gain_band`: nothing there is measured, and `autotune` decides by measuring.
    Other packages may bring more (entry points of the group "taskgraph.schedulers"). `costs` prices the ops. With
    `nano_batches` a search also splits the batch of a graph for a GPU where that pays: `Plan.split` says how, and
    everything that takes the plan with its graph splits the graph alike.
    DemandError if an op asks for more than the device has; PlanError for an unknown scheduler, a budget of 0, or an
    assignment of a scheduler from elsewhere that is none.
    """
    return _planned(graph, device, scheduler, _budget(budget_s, seed, nano_batches), costs)


def candidate(graph: Graph, device: Device, scheduler: str, budget: Budget, costs: Costs = op_table) -> Plan:
    """The shortest that `scheduler` finds, whether or not it beats the sequential plan: for whoever measures both."""
    return _planned(graph, device, scheduler, replace(budget, sure=False), costs)


def _planned(graph: Graph, device: str | Device, scheduler: str, budget: Budget, costs: Costs) -> Plan:
    instance("the graph", graph, Graph, GraphError, "Take what GraphBuilder.build returned.")
    assigned_by = SCHEDULERS[scheduler]
    called("costs", costs, PlanError)
    with uncollected():
        problem = _problem(graph, get(device), costs)
    made = assigned_by(problem, budget)
    found = timed(problem, checked(scheduler, problem, made))
    baseline = timed(problem, made.against) if made.against is not None else in_sequence(problem)
    band = found.gain_band()
    least = max(MIN_GAIN, 1.0 + band) if found.problem.device.kind == "gpu" else MIN_GAIN
    wins = made.against is None or not budget.sure or found.makespan_s * least < baseline.makespan_s
    chosen = found if wins else baseline
    if found.assignment.proved_s > found.makespan_s * (1 + _SLACK):
        raise PlanError(
            f"scheduler {scheduler!r} says that every plan takes {found.assignment.proved_s} s or more; its own takes "
            f"{found.makespan_s} s."
        )
    verdict = Verdict(
        choice="sequential" if is_sequential(chosen.problem, chosen.assignment) else "packed",
        packed_s=found.makespan_s,
        sequential_s=baseline.makespan_s,
        error_band=error_band(chosen.problem),
        gain_band=band,
    )
    with uncollected():
        return _plan_of(graph, chosen, verdict, f"{scheduler}: {chosen.assignment.made_by}")


def _budget(budget_s: float, seed: int, nano_batches: bool) -> Budget:
    """PlanError for what cannot be spent."""
    seconds = number("budget_s", budget_s, PlanError)
    if not seconds > 0:
        raise PlanError(f"budget_s is {seconds}; give the search some seconds, or use scheduler='list'.")
    instance("nano_batches", nano_batches, bool, PlanError)
    return Budget(seconds, integer("seed", seed, PlanError, 0), nano_batches, sure=True)


def _problem(graph: Graph, device: Device, costs: Costs) -> Problem:
    """What schedulers are given; GraphError where an op does not fit its tensors."""
    flat = graph.flat()
    tensors = dict(flat.tensor)
    for op in flat.ops:
        check_op(op, tensors)
    return make_problem(graph, device, None, costs)


def timed(problem: Problem, made: Assignment) -> Found:
    """The assignment by the one clock, with what the clock alone would not keep: lanes of overlapping geometries that
    run in the assignment's order, and collectives one after another."""
    problem = made.problem or problem
    room = made.layout.table[made.layout.lane_partition[made.lane], 2]
    made = replace(made, mode=problem.launched(made.mode, room))
    times = evaluate(problem, made)
    pairs = _geometry_order(made)
    if len(pairs) and (times.start_s[pairs[:, 1]] < times.end_s[pairs[:, 0]]).any():
        made = replace(made, holds=np.concatenate([made.holds, pairs]))
        times = evaluate(problem, made)
    return collectives_ordered(Found(problem, made, times))


# ------------------------------------------------------------------------------------------- replay


def replay_times(graph: Graph, plan: Plan, costs: Costs = op_table) -> Timeline:
    """The simulated timeline of `plan` as it stands: its lanes, its order, the evaluator's clock."""
    found = replayed(graph, plan, costs)
    return _timeline(found.problem, found.assignment.order, [s.lane for s in plan.steps], found.times)


def utilisation(graph: Graph, plan: Plan, costs: Costs = op_table) -> dict[str, list[tuple[float, float]]]:
    """For each resource of the device the steps (time in seconds, used share of its capacity) of a simulated replay."""
    times = replayed(graph, plan, costs, record=True).times
    moments = [*times.trace[:, 0].tolist(), times.makespan_s]
    return {
        name: list(zip(moments, [*times.trace[:, 1 + i].tolist(), 0.0], strict=True))
        for i, name in enumerate(RESOURCES)
    }


def replayed(graph: Graph, plan: Plan, costs: Costs = op_table, record: bool = False) -> Found:
    """The plan's schedule as it stands, with the times of a simulated replay; `record` keeps the trace of its use."""
    graph = sliced(plan, graph)
    flat = graph.flat()
    index = {op.name: i for i, op in enumerate(flat.ops)}
    order = np.array([index[step.op] for step in plan.steps])
    sms = np.array([plan.sms(i) for i in range(len(plan.steps))])
    rooms = [part.sm_count for geometry in plan.geometries for part in geometry.partitions]
    sizes = np.unique([*sms.tolist(), *rooms, plan.device.sm_count])
    problem = make_problem(graph, plan.device, sizes.tolist(), costs)
    place = Counter((here.geometry, here.partition) for here in plan.lanes)
    layout = Layout(
        plan.geometries,
        tuple(tuple(place[g, p] for p in range(len(geo.partitions))) for g, geo in enumerate(plan.geometries)),
    )
    by_place = sorted(range(len(plan.lanes)), key=lambda i: (plan.lanes[i].geometry, plan.lanes[i].partition))
    lane_of = {lane: i for i, lane in enumerate(by_place)}
    lane, mode = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    lane[order] = [lane_of[step.lane] for step in plan.steps]
    mode[order] = np.searchsorted(problem.sizes, sms)
    holds = [(order[w], order[i]) for i, step in enumerate(plan.steps) for w in step.waits]
    chosen = Assignment(layout, order, lane, mode, np.array(holds, np.int64).reshape(-1, 2))
    return Found(problem, chosen, evaluate(problem, chosen, record))


def _timeline(problem: Problem, order: np.ndarray, lanes: list[int], times: Evaluation) -> Timeline:
    ops = problem.graph.flat().ops
    names = [ops[i].name for i in order.tolist()]
    spans = from_columns(Span, len(names), names, lanes, times.start_s[order].tolist(), times.end_s[order].tolist())
    return Timeline("simulated", f"{problem.device.name}, {' + '.join(sorted(set(problem.sources)))}", spans)


# ----------------------------------------------------------------------------------- from assignment to plan


def plan_from(problem: Problem, made: Assignment) -> Plan:
    """The plan of an assignment that came from elsewhere, as it stands: no search, no fall back.

    The verdict compares with the sequential order on the problem's SM counts.
    """
    found = timed(problem, checked(made.made_by, problem, made))
    alone_s, bands = in_sequence(problem).makespan_s, (error_band(found.problem), found.gain_band())
    verdict = Verdict("packed", found.makespan_s, alone_s, bands[0], gain_band=bands[1])
    return _plan_of(problem.graph, found, verdict, made.made_by)


def _plan_of(graph: Graph, found: Found, verdict: Verdict, made_by: str) -> Plan:
    problem, assignment, times = found.problem, found.assignment, found.times
    flat = problem.graph.flat()
    order, layout = assignment.order, assignment.layout
    used, lane_of_op = np.unique(assignment.lane, return_inverse=True)
    kept, geometry_of = np.unique(layout.table[layout.lane_partition[used], 0], return_inverse=True)
    first_row = np.searchsorted(layout.table[:, 0], kept)
    step_lane = lane_of_op[order].tolist()
    waits = _waits(assignment, lane_of_op, problem)
    slots, arena_bytes = assign(flat, step_lane, waits, order.tolist())
    room = layout.table[layout.lane_partition[assignment.lane], 2]
    sms = np.where(problem.sizes[assignment.mode] < room, problem.sizes[assignment.mode], 0)[order].tolist()
    return Plan(
        graph=graph.fingerprint,
        graph_name=graph.name,
        device=problem.device,
        geometries=tuple(layout.geometries[g] for g in kept),
        lanes=tuple(
            Lane(int(g), int(layout.lane_partition[i] - first_row[g])) for i, g in zip(used, geometry_of, strict=True)
        ),
        steps=from_columns(Step, problem.n, [flat.ops[i].name for i in order.tolist()], step_lane, waits, sms),
        arena=slots,
        arena_bytes=arena_bytes,
        timeline=_timeline(problem, order, step_lane, times),
        bounds=replace(lower_bounds(problem), proved_s=assignment.proved_s),
        verdict=verdict,
        made_by=made_by,
        split=assignment.split,
        period=_period(problem.graph, times.start_s, times.end_s),
        collectives=_collectives(problem, order.tolist()),
    ).sealed()


def _collectives(problem: Problem, order: list[int]) -> tuple[Collective, ...]:
    """By which algorithm each collective between ranks goes over the device's network: that of its seconds."""
    network, flat = problem.device.network, problem.graph.flat()
    if network is None:
        return ()
    shared = [op for op in map(flat.ops.__getitem__, order) if op.kind in COLLECTIVES and op.integer("ranks") > 1]
    return tuple(Collective(op.name, algorithm_on(kernel_of(op, flat.tensor), network)) for op in shared)


def _period(graph: Graph, start_s: np.ndarray, end_s: np.ndarray) -> Period | None:
    """How the iterations of a repeat follow each other in time; starts and ends by flat op."""
    repeat = graph.repeat
    if repeat is None or repeat.count < 2:
        return None
    inside = slice(repeat.first, repeat.first + repeat.count * (repeat.last - repeat.first))
    start, end = (a[inside].reshape(repeat.count, -1) for a in (start_s, end_s))
    ends, length = np.maximum.accumulate(end.max(axis=1)), end.max(axis=1) - start.min(axis=1)
    seconds = float((ends[-1] - ends[0]) / (repeat.count - 1))
    overlap = float(length[repeat.count // 2]) / seconds if seconds else float(repeat.count)
    return Period(repeat.count, seconds, float(ends[0]), float(end_s.max() - ends[-1]), overlap)


def retimed(plan: Plan, graph: Graph, costs: Costs = op_table) -> Plan:
    """The plan as it stands with the times that `costs` give it: timeline, period, and the time of its choice."""
    timeline, cut = replay_times(graph, plan, costs), sliced(plan, graph)
    at = {span.op: i for i, span in enumerate(timeline.spans)}
    order = [at[op.name] for op in cut.flat().ops]
    start, end = (np.array([getattr(timeline.spans[i], f"{edge}_s") for i in order]) for edge in ("start", "end"))
    v, took_s = plan.verdict, timeline.makespan_s
    verdict = replace(v, packed_s=took_s) if v.choice == "packed" else replace(v, sequential_s=took_s)
    return replace(plan, timeline=timeline, period=_period(cut, start, end), verdict=verdict).sealed()


def _waits(chosen: Assignment, lane: np.ndarray, problem: Problem) -> list[tuple[int, ...]]:
    """For every step the earlier steps of other lanes it must wait for, without those that another wait implies."""
    extra = np.concatenate([chosen.holds, _geometry_order(chosen)])
    pred_ptr, pred = problem.pred_ptr, problem.pred
    if len(extra):
        after = np.concatenate([np.repeat(np.arange(problem.n), np.diff(pred_ptr)), extra[:, 1]])
        pred = np.concatenate([pred, extra[:, 0]])[np.argsort(after, kind="stable")]
        pred_ptr = np.concatenate([[0], np.cumsum(np.bincount(after, minlength=problem.n))])
    count, row = _reduced_waits(chosen.order, lane, int(lane.max()) + 1, pred_ptr, pred)
    flat = row[np.arange(row.shape[1]) < count[:, None]].tolist()
    end = np.cumsum(count)
    return [tuple(flat[a:b]) for a, b in zip((end - count).tolist(), end.tolist(), strict=True)]


def _geometry_order(chosen: Assignment) -> np.ndarray:
    """(k, 2) pairs (before, after) that keep lanes of overlapping geometries from running together."""
    order, lane, conflicts = chosen.order, chosen.lane, chosen.layout.conflicts
    if not conflicts.any():
        return np.empty((0, 2), np.int64)
    last: dict[int, int] = {}
    pairs: list[tuple[int, int]] = []
    rivals = [np.flatnonzero(row).tolist() for row in conflicts]
    for op, here in zip(order.tolist(), lane[order].tolist(), strict=True):
        pairs += [(last[rival], op) for rival in rivals[here] if rival in last]
        last[here] = op
    return np.array(pairs, np.int64).reshape(-1, 2)


def _reduced_waits(
    order: np.ndarray, lane: np.ndarray, lanes: int, pred_ptr: np.ndarray, pred: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(waits of each step (n,), and which they are (n, lanes)) without those that another wait implies."""
    n = len(order)
    known, row = np.full((2, n, lanes), -1, np.int64)
    last, latest = np.full((2, lanes), -1, np.int64)
    step_of, count = np.zeros((2, n), np.int64)
    found = Waits(step_of, known, last, latest, row, count)
    of = plain(order, np.int64), plain(lane, np.int64)
    _reduce_waits(*of, plain(pred_ptr, np.int64), plain(pred, np.int64), found)
    return found.length, found.row


class Waits(NamedTuple):
    """Vector clocks (Fidge 1988): known[s, l] is the last step of lane l that has ended when step s ends. step_of (n,)
    by op, and by lane the last step so far and the latest that the present one needs. The result: row (n, lanes), of
    which each step has its first length (n,)."""

    step_of: np.ndarray
    known: np.ndarray
    last: np.ndarray
    latest: np.ndarray
    row: np.ndarray
    length: np.ndarray


@kernel
def _reduce_waits(order: np.ndarray, lane: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray, found: Waits) -> None:
    step_of, known, last = found.step_of, found.known, found.last
    latest, row, count = found.latest, found.row, found.length
    lanes = len(last)
    for s in range(len(order)):
        op = order[s]
        mine = lane[op]
        step_of[op] = s
        for i in range(lanes):
            latest[i] = -1
            if last[mine] >= 0:
                known[s, i] = known[last[mine], i]
        for k in range(pred_ptr[op], pred_ptr[op + 1]):
            other = lane[pred[k]]
            if other != mine and step_of[pred[k]] > latest[other]:
                latest[other] = step_of[pred[k]]
        for i in range(lanes):
            needed = latest[i] > known[s, i]
            for j in range(lanes):
                if needed and j != i and latest[j] >= 0 and known[latest[j], i] >= latest[i]:
                    needed = False
            if needed:
                row[s, count[s]] = latest[i]
                count[s] += 1
        for k in range(count[s]):
            for j in range(lanes):
                if known[row[s, k], j] > known[s, j]:
                    known[s, j] = known[row[s, k], j]
        known[s, mine] = s
        last[mine] = s
