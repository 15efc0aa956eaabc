"""plan(): candidates from the schedulers, judged by the one evaluator, against the sequential graph."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from taskgraph.cost.model import ERROR_BAND
from taskgraph.errors import PlanError
from taskgraph.graph.device import Device, Geometry, get
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import RESOURCES
from taskgraph.jit import njit
from taskgraph.ops import check_op
from taskgraph.schedule import lists
from taskgraph.schedule.arena import assign
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.evaluate import Assignment, Evaluation, evaluate
from taskgraph.schedule.plan import Lane, Plan, Span, Step, Timeline, Verdict
from taskgraph.schedule.problem import Problem, make_problem

SCHEDULERS = ("auto", "sequential", "list")
MIN_GAIN = 1.02
"""A packed plan must be predicted this much faster than the sequential one; less is not worth its events."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    label: str
    geometry: Geometry
    assignment: Assignment
    evaluation: Evaluation


def plan(graph: Graph, device: str | Device = "cpu", scheduler: str = "auto") -> Plan:
    """The best plan that `scheduler` finds for `graph` on `device`, with bounds and a verdict.

    "sequential" runs op after op on the whole device. "list" packs by list scheduling and keeps the result even
    where it loses. "auto" packs, and falls back to the sequential plan unless packing wins by MIN_GAIN.
    DemandError if an op asks for more than the device has; PlanError for an unknown scheduler.
    """
    if scheduler not in SCHEDULERS:
        raise PlanError(f"unknown scheduler {scheduler!r}; this version has {', '.join(SCHEDULERS)}.")
    target, flat = get(device), graph.flat()
    tensors = dict(flat.tensor)
    for op in graph.ops if graph.repeat is None else flat.ops:
        check_op(op, tensors)
    problem = make_problem(flat, target)
    in_turn = lists.sequential(problem)
    baseline = _Candidate("sequential", Geometry.of(target.sm_count), in_turn, evaluate(problem, in_turn))
    packed = min(_packings(problem, target), key=lambda c: c.evaluation.makespan_s, default=baseline)
    if scheduler == "sequential":
        packed = baseline
    wins = packed.evaluation.makespan_s * MIN_GAIN < baseline.evaluation.makespan_s
    chosen = packed if scheduler == "list" or wins else baseline
    verdict = Verdict(
        choice="sequential" if chosen is baseline else "packed",
        packed_s=packed.evaluation.makespan_s,
        sequential_s=baseline.evaluation.makespan_s,
        error_band=ERROR_BAND,
    )
    return _plan_of(graph, target, problem, chosen, verdict, f"{scheduler}: {chosen.label}")


def replay_times(graph: Graph, plan: Plan) -> Timeline:
    """The simulated timeline of `plan` as it stands: its lanes, its order, the evaluator's clock."""
    chosen, times = _replayed(graph, plan, record=False)
    return _timeline(graph.flat(), plan.device, chosen.order, chosen.lane, times)


def utilisation(graph: Graph, plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """For each resource of the device the steps (time in seconds, used share of its capacity) of a simulated replay."""
    _, times = _replayed(graph, plan, record=True)
    moments = [*times.trace[:, 0].tolist(), times.makespan_s]
    return {
        name: list(zip(moments, [*times.trace[:, 1 + i].tolist(), 0.0], strict=True))
        for i, name in enumerate(RESOURCES)
    }


def _replayed(graph: Graph, plan: Plan, record: bool) -> tuple[Assignment, Evaluation]:
    flat = graph.flat()
    index = {op.name: i for i, op in enumerate(flat.ops)}
    order = np.array([index[step.op] for step in plan.steps])
    lane = np.empty(len(order), np.int64)
    lane[order] = [step.lane for step in plan.steps]
    sizes = tuple(sorted({size for geometry in plan.geometries for size in geometry.sizes}))
    mode = np.array([sizes.index(plan.partition(i).sm_count) for i in range(len(plan.lanes))])
    chosen = Assignment(order, lane, mode, np.array([here.partition for here in plan.lanes]))
    return chosen, evaluate(make_problem(flat, plan.device, sizes), chosen, record)


def _timeline(flat: Graph, device: Device, order: np.ndarray, lane: np.ndarray, times: Evaluation) -> Timeline:
    rows = zip(
        order.tolist(), lane[order].tolist(), times.start_s[order].tolist(), times.end_s[order].tolist(), strict=True
    )
    spans = tuple(Span(flat.ops[i].name, where, begin, end) for i, where, begin, end in rows)
    return Timeline("simulated", f"{device.name}, roofline", spans)


def _packings(problem: Problem, device: Device) -> Iterator[_Candidate]:
    """List schedules over the geometries that are tried: shared lanes on the whole device, and isolated partitions."""
    for geometry in device.splits():
        whole = len(geometry.partitions) == 1
        for lanes_each in [(2,), (3,)] if whole else [(1,) * len(geometry.partitions)]:
            assignment = lists.pack(problem, geometry, lanes_each)
            if len(assignment.order) == problem.n:
                label = f"list on {' + '.join(map(str, geometry.sizes))} SMs, {sum(lanes_each)} lanes"
                yield _Candidate(label, geometry, assignment, evaluate(problem, assignment))


def _plan_of(
    graph: Graph, device: Device, problem: Problem, chosen: _Candidate, verdict: Verdict, made_by: str
) -> Plan:
    flat, order, times = graph.flat(), chosen.assignment.order, chosen.evaluation
    used, lane_of_op = np.unique(chosen.assignment.lane, return_inverse=True)
    step_lane = lane_of_op[order]
    waits = [tuple(row) for row in _waits(order, lane_of_op, problem)]
    slots, arena_bytes = assign(flat, step_lane.tolist(), waits, order.tolist())
    return Plan(
        graph=graph.fingerprint,
        graph_name=graph.name,
        device=device,
        geometries=(chosen.geometry,),
        lanes=tuple(Lane(0, int(chosen.assignment.lane_partition[i])) for i in used),
        steps=tuple(
            Step(flat.ops[i].name, lane, wait)
            for i, lane, wait in zip(order.tolist(), step_lane.tolist(), waits, strict=True)
        ),
        arena=slots,
        arena_bytes=arena_bytes,
        timeline=_timeline(flat, device, order, lane_of_op, times),
        bounds=lower_bounds(problem, device),
        verdict=verdict,
        made_by=made_by,
    )


def _waits(order: np.ndarray, lane: np.ndarray, problem: Problem) -> list[list[int]]:
    """For every step the earlier steps of other lanes it must wait for, without those that another wait implies."""
    count, row = _reduced_waits(order, lane, int(lane.max()) + 1, problem.pred_ptr, problem.pred)
    return [row[i, :c].tolist() for i, c in enumerate(count)] if row.shape[1] else [[] for _ in count]


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
