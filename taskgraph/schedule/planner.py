"""plan(): candidates from the schedulers, judged by the one evaluator, against the sequential graph."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from taskgraph.cost.model import op_table
from taskgraph.errors import PlanError
from taskgraph.graph.device import Device, get
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import RESOURCES
from taskgraph.jit import njit
from taskgraph.ops import check_op
from taskgraph.schedule import lists
from taskgraph.schedule.arena import assign
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, evaluate
from taskgraph.schedule.plan import Lane, Plan, Span, Step, Timeline, Verdict
from taskgraph.schedule.problem import Costs, Problem, make_problem
from taskgraph.schedule.search import Space, anneal, realise, search_layouts, starts

SCHEDULERS = ("auto", "sequential", "list", "search")
WINDOW = 8
"""Iterations of a repeated body that the search looks at; the decisions then hold for all of them."""
_TABLE = 2_000_000
"""The most (op, SM count) pairs that a search looks at."""
MIN_GAIN = 1.02
"""A packed plan must be predicted this much faster than the sequential one; less is not worth its events."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    label: str
    assignment: Assignment
    evaluation: Evaluation


def plan(
    graph: Graph,
    device: str | Device = "cpu",
    scheduler: str = "auto",
    *,
    budget_s: float = 1.0,
    seed: int = 0,
    costs: Costs = op_table,
) -> Plan:
    """The best plan that `scheduler` finds for `graph` on `device`, with bounds and a verdict.

    "sequential" runs op after op on the whole device. "list" packs by list scheduling and keeps the result even
    where it loses. "search" anneals for about `budget_s` seconds, deterministically for a `seed`, and keeps the
    better of its result and the list's. "auto" packs by list scheduling. All but "list" fall back to the sequential
    plan unless packing wins by MIN_GAIN. `costs` prices the ops.
    DemandError if an op asks for more than the device has; PlanError for an unknown scheduler or a budget of 0.
    """
    if scheduler not in SCHEDULERS:
        raise PlanError(f"unknown scheduler {scheduler!r}; this version has {', '.join(SCHEDULERS)}.")
    if not budget_s > 0:
        raise PlanError(f"budget_s is {budget_s}; give the search some seconds, or use scheduler='list'.")
    target, flat = get(device), graph.flat()
    tensors = dict(flat.tensor)
    for op in graph.ops if graph.repeat is None else flat.ops:
        check_op(op, tensors)
    problem = make_problem(flat, target, _sizes(flat, target) if scheduler == "search" else None, costs)
    in_turn = lists.sequential(problem)
    baseline = _Candidate("sequential", in_turn, evaluate(problem, in_turn))
    packings = _packings(problem, target)
    if scheduler == "search":
        packings = chain(packings, _searched(graph, target, problem, costs, budget_s, seed))
    packed = min(packings, key=lambda c: c.evaluation.makespan_s, default=baseline)
    if scheduler == "sequential":
        packed = baseline
    wins = packed.evaluation.makespan_s * MIN_GAIN < baseline.evaluation.makespan_s
    chosen = packed if scheduler == "list" or wins else baseline
    verdict = Verdict(
        choice="sequential" if chosen is baseline else "packed",
        packed_s=packed.evaluation.makespan_s,
        sequential_s=baseline.evaluation.makespan_s,
        error_band=_error_band(problem),
    )
    return _plan_of(graph, target, problem, chosen, verdict, f"{scheduler}: {chosen.label}")


def _packings(problem: Problem, device: Device) -> Iterator[_Candidate]:
    """List schedules on every layout that is tried."""
    for layout in lists.layouts(device):
        assignment = lists.pack(problem, layout)
        if assignment is not None:
            yield _Candidate(f"list on {lists.label(layout)}", assignment, evaluate(problem, assignment))


def _searched(
    graph: Graph, device: Device, problem: Problem, costs: Costs, budget_s: float, seed: int
) -> Iterator[_Candidate]:
    """The best of an annealing run on each layout, on the problem's SM counts."""
    window, whole = _spaces(graph, device, problem, costs)
    tried = search_layouts(device)
    for layout in tried:
        if int(problem.sizes[window.lowest_mode()].max()) > layout.rows[:, 2].max():
            continue
        state = anneal(window, layout, starts(window, layout), budget_s / len(tried), seed)
        assignment, _ = realise(whole, layout, state)
        label = f"search on {lists.label(assignment.layout)}, seed {seed}"
        yield _Candidate(label, assignment, evaluate(problem, assignment))


def _spaces(graph: Graph, device: Device, problem: Problem, costs: Costs) -> tuple[Space, Space]:
    """What the search sees, and the whole: the same where nothing repeats, else a window of iterations."""
    repeat = graph.repeat
    if repeat is None or repeat.count <= WINDOW:
        return (Space.flat(problem),) * 2
    sizes = problem.sizes.tolist()
    fewer = replace(graph, repeat=replace(repeat, count=WINDOW)).flat()
    seen = make_problem(fewer, device, sizes, costs)
    return _repeated(graph, seen, WINDOW), _repeated(graph, problem, repeat.count)


def _repeated(graph: Graph, problem: Problem, count: int) -> Space:
    """One decision for each op of the body, whatever the iteration."""
    repeat = graph.repeat
    assert repeat is not None
    body = np.tile(np.arange(repeat.first, repeat.last), count)
    decision = np.concatenate([np.arange(repeat.first), body, np.arange(repeat.last, len(graph.ops))])
    return Space(problem, decision, np.arange(len(graph.ops)), count, repeat.count)


def _sizes(flat: Graph, device: Device) -> tuple[int, ...] | None:
    """Every legal SM count, as far as the tables of a graph of this size stay small; None for the usual few."""
    every = device.partition_sizes()
    return every if len(flat.ops) * len(every) <= _TABLE else None


def _error_band(problem: Problem) -> float:
    """The bands of the ops, weighted by their times: errors of one model lean the same way, so they do not cancel."""
    weight = problem.best_seconds()
    return float(np.average(problem.band, weights=weight))


# ------------------------------------------------------------------------------------------- replay


def replay_times(graph: Graph, plan: Plan, costs: Costs = op_table) -> Timeline:
    """The simulated timeline of `plan` as it stands: its lanes, its order, the evaluator's clock."""
    problem, chosen, times = _replayed(graph, plan, costs, record=False)
    return _timeline(graph.flat(), plan.device, problem, chosen.order, [s.lane for s in plan.steps], times)


def utilisation(graph: Graph, plan: Plan, costs: Costs = op_table) -> dict[str, list[tuple[float, float]]]:
    """For each resource of the device the steps (time in seconds, used share of its capacity) of a simulated replay."""
    _, _, times = _replayed(graph, plan, costs, record=True)
    moments = [*times.trace[:, 0].tolist(), times.makespan_s]
    return {
        name: list(zip(moments, [*times.trace[:, 1 + i].tolist(), 0.0], strict=True))
        for i, name in enumerate(RESOURCES)
    }


def _replayed(graph: Graph, plan: Plan, costs: Costs, record: bool) -> tuple[Problem, Assignment, Evaluation]:
    flat = graph.flat()
    index = {op.name: i for i, op in enumerate(flat.ops)}
    order = np.array([index[step.op] for step in plan.steps])
    sms = np.array([plan.sms(i) for i in range(len(plan.steps))])
    problem = make_problem(flat, plan.device, np.unique(sms).tolist(), costs)
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
    return problem, chosen, evaluate(problem, chosen, record)


def _timeline(
    flat: Graph, device: Device, problem: Problem, order: np.ndarray, lanes: list[int], times: Evaluation
) -> Timeline:
    rows = zip(order.tolist(), lanes, times.start_s[order].tolist(), times.end_s[order].tolist(), strict=True)
    spans = tuple(Span(flat.ops[i].name, where, begin, end) for i, where, begin, end in rows)
    return Timeline("simulated", f"{device.name}, {' + '.join(sorted(set(problem.sources)))}", spans)


# ----------------------------------------------------------------------------------- from assignment to plan


def plan_from(graph: Graph, device: Device, problem: Problem, chosen: Assignment, made_by: str) -> Plan:
    """The plan of an assignment that came from elsewhere, as it stands: no search, no fall back.

    `problem` is that of `graph.flat()` on `device`; the verdict compares with the sequential order on its SM counts.
    """
    turns = _turns(chosen.order, chosen.lane, chosen.layout.conflicts)
    held = replace(chosen, holds=np.concatenate([chosen.holds, turns]))
    times, in_turn = evaluate(problem, held), evaluate(problem, lists.sequential(problem))
    verdict = Verdict("packed", times.makespan_s, in_turn.makespan_s, _error_band(problem))
    return _plan_of(graph, device, problem, _Candidate(made_by, held, times), verdict, made_by)


def _plan_of(
    graph: Graph, device: Device, problem: Problem, chosen: _Candidate, verdict: Verdict, made_by: str
) -> Plan:
    flat, assignment, times = graph.flat(), chosen.assignment, chosen.evaluation
    order, layout = assignment.order, assignment.layout
    used, lane_of_op = np.unique(assignment.lane, return_inverse=True)
    kept, geometry_of = np.unique(layout.rows[layout.lane_partition[used], 0], return_inverse=True)
    first_row = np.searchsorted(layout.rows[:, 0], kept)
    step_lane = lane_of_op[order].tolist()
    waits = [tuple(row) for row in _waits(assignment, lane_of_op, problem)]
    slots, arena_bytes = assign(flat, step_lane, waits, order.tolist())
    room = layout.rows[layout.lane_partition[assignment.lane], 2]
    sms = np.where(problem.sizes[assignment.mode] < room, problem.sizes[assignment.mode], 0)[order].tolist()
    return Plan(
        graph=graph.fingerprint,
        graph_name=graph.name,
        device=device,
        geometries=tuple(layout.geometries[g] for g in kept),
        lanes=tuple(
            Lane(int(g), int(layout.lane_partition[i] - first_row[g])) for i, g in zip(used, geometry_of, strict=True)
        ),
        steps=tuple(
            Step(flat.ops[i].name, lane, wait, count)
            for i, lane, wait, count in zip(order.tolist(), step_lane, waits, sms, strict=True)
        ),
        arena=slots,
        arena_bytes=arena_bytes,
        timeline=_timeline(flat, device, problem, order, step_lane, times),
        bounds=lower_bounds(problem),
        verdict=verdict,
        made_by=made_by,
    )


def _waits(chosen: Assignment, lane: np.ndarray, problem: Problem) -> list[list[int]]:
    """For every step the earlier steps of other lanes it must wait for, without those that another wait implies."""
    turns = _turns(chosen.order, chosen.lane, chosen.layout.conflicts)
    extra = np.concatenate([chosen.holds, turns])
    pred_ptr, pred = problem.pred_ptr, problem.pred
    if len(extra):
        after = np.concatenate([np.repeat(np.arange(problem.n), np.diff(pred_ptr)), extra[:, 1]])
        pred = np.concatenate([pred, extra[:, 0]])[np.argsort(after, kind="stable")]
        pred_ptr = np.concatenate([[0], np.cumsum(np.bincount(after, minlength=problem.n))])
    count, row = _reduced_waits(chosen.order, lane, int(lane.max()) + 1, pred_ptr, pred)
    return [row[i, :c].tolist() for i, c in enumerate(count)] if row.shape[1] else [[] for _ in count]


def _turns(order: np.ndarray, lane: np.ndarray, conflicts: np.ndarray) -> np.ndarray:
    """(k, 2) pairs (before, after) that keep lanes of overlapping geometries from running together."""
    if not conflicts.any():
        return np.empty((0, 2), np.int64)
    last: dict[int, int] = {}
    pairs: list[tuple[int, int]] = []
    rivals = [np.flatnonzero(row).tolist() for row in conflicts]
    for op, here in zip(order.tolist(), lane[order].tolist(), strict=True):
        pairs += [(last[rival], op) for rival in rivals[here] if rival in last]
        last[here] = op
    return np.array(pairs, np.int64).reshape(-1, 2)


@njit
def _reduced_waits(
    order: np.ndarray, lane: np.ndarray, lanes: int, pred_ptr: np.ndarray, pred: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Vector clocks (Fidge 1988): known[s, l] is the last step of lane l that has ended when step s ends."""
    n = len(order)
    step_of = np.empty(n, np.int64)
    known = np.full((n, lanes), -1, np.int64)
    last = np.full(lanes, -1, np.int64)
    count, row = np.zeros(n, np.int64), np.zeros((n, max(lanes - 1, 0)), np.int64)
    for s in range(n):
        op = order[s]
        mine = lane[op]
        step_of[op] = s
        if last[mine] >= 0:
            known[s] = known[last[mine]]
        latest = np.full(lanes, -1, np.int64)
        for k in range(pred_ptr[op], pred_ptr[op + 1]):
            other = lane[pred[k]]
            if other != mine:
                latest[other] = max(latest[other], step_of[pred[k]])
        for i in range(lanes):
            needed = latest[i] > known[s, i]
            for j in range(lanes):
                if needed and j != i and latest[j] >= 0 and known[latest[j], i] >= latest[i]:
                    needed = False
            if needed:
                row[s, count[s]] = latest[i]
                count[s] += 1
        for i in range(count[s]):
            for j in range(lanes):
                known[s, j] = max(known[s, j], known[row[s, i], j])
        known[s, mine] = s
        last[mine] = s
    return count, row
