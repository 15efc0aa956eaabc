"""plan(): candidates from the schedulers, judged by the one evaluator, against the sequential graph."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from taskgraph.cost.model import op_table
from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.device import Device, get
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import RESOURCES
from taskgraph.jit import njit
from taskgraph.ops import COLLECTIVES, check_op
from taskgraph.record import function as called
from taskgraph.record import instance, integer, number, rows, shown
from taskgraph.schedule.arena import assign
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, evaluate
from taskgraph.schedule.plan import Lane, Period, Plan, Span, Step, Timeline, Verdict, uncollected
from taskgraph.schedule.problem import Costs, Problem, make_problem
from taskgraph.schedule.sliced import sliced
from taskgraph.schedule.solve import lists, proof, rules
from taskgraph.schedule.solve.explore import Candidate, explore, legal_sizes

SCHEDULERS = ("auto", "sequential", "list", "search", "exact")
LARGE = 20_000
"""From so many ops on, fewer list schedules are made."""
AUTO_OP_S, ENOUGH = 0.02, 1.01
"""What "auto" searches at most, in seconds for every op of the graph, and the gap at which it stops."""
MIN_GAIN = 1.02
"""A packed plan must be predicted this much faster than the sequential one; less is not worth its events."""


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
    to the lists. All but "list" and "exact" fall back to the sequential plan unless packing wins by MIN_GAIN. `costs`
    prices the ops. With `nano_batches` the search also splits the batch of a graph for a GPU where that pays:
    `Plan.split` says how, and everything that takes the plan with its graph splits the graph alike.
    DemandError if an op asks for more than the device has; PlanError for an unknown scheduler or a budget of 0.
    """
    instance("the graph", graph, Graph, GraphError, "Take what GraphBuilder.build returned.")
    if scheduler not in SCHEDULERS:
        raise PlanError(f"unknown scheduler {shown(scheduler)}; this version has {', '.join(SCHEDULERS)}.")
    budget_s = number("budget_s", budget_s, PlanError)
    if not budget_s > 0:
        raise PlanError(f"budget_s is {budget_s}; give the search some seconds, or use scheduler='list'.")
    seed = integer("seed", seed, PlanError, 0)
    instance("nano_batches", nano_batches, bool, PlanError)
    called("costs", costs, PlanError)
    target = get(device)
    with uncollected():
        flat = graph.flat()
        tensors = dict(flat.tensor)
        for op in flat.ops:
            check_op(op, tensors)
        if scheduler == "exact":
            proof.check_exact(len(flat.ops))
        looks = scheduler in ("search", "exact")
        problem = make_problem(flat, target, legal_sizes(len(flat.ops), target) if looks else None, costs)
    in_turn = lists.sequential(problem)
    baseline = Candidate("sequential", graph, problem, in_turn, evaluate(problem, in_turn))
    packings = [_in_one_order(made) for made in _packings(graph, problem, target)]
    limit_s = min(c.evaluation.makespan_s for c in [baseline, *packings])
    if scheduler == "exact":
        budget_s /= 2
    if scheduler == "auto":
        budget_s = min(budget_s, AUTO_OP_S * len(graph.ops))
    if looks or (scheduler == "auto" and _room(graph, target, problem, limit_s, nano_batches)):
        found = _searched(graph, target, problem, costs, budget_s, seed, limit_s, nano_batches)
        packings += [_in_one_order(found)] if found is not None else []
    packed = min(packings, key=lambda c: c.evaluation.makespan_s, default=baseline)
    if scheduler == "sequential":
        packed = baseline
    if scheduler == "exact":
        best = min([baseline, packed], key=lambda c: c.evaluation.makespan_s)
        packed = _in_one_order(proof.proved(best, target, budget_s, seed))
    wins = packed.evaluation.makespan_s * MIN_GAIN < baseline.evaluation.makespan_s
    chosen = packed if scheduler in ("list", "exact") or wins else baseline
    verdict = Verdict(
        choice="sequential" if chosen.assignment is in_turn else "packed",
        packed_s=packed.evaluation.makespan_s,
        sequential_s=baseline.evaluation.makespan_s,
        error_band=error_band(chosen.problem),
    )
    with uncollected():
        return _plan_of(graph, target, chosen, verdict, f"{scheduler}: {chosen.label}")


def _packings(graph: Graph, problem: Problem, device: Device) -> Iterator[Candidate]:
    """List schedules: serial ones on every layout, and parallel ones on lanes that share the device, where ops may be
    launched on some of its SMs. A large graph for a GPU gets the parallel ones alone, which fit it better."""
    gpu = device.kind == "gpu"
    for layout in [] if gpu and problem.n >= LARGE else lists.layouts(device):
        made = lists.pack(problem, layout)
        if made is not None:
            label, times = f"list on {lists.label(layout)}", evaluate(problem, made)
            yield Candidate(label, graph, problem, made, times)
    if gpu:
        for rule, assignment, times in rules.by_rules(problem, rules.FEW if problem.n >= rules.FROM else rules.MANY):
            yield Candidate(f"list with {rule.label()}", graph, problem, assignment, times)


def _room(graph: Graph, device: Device, problem: Problem, best_s: float, nano_batches: bool) -> bool:
    """Whether a search could do much better than `best_s` on a GPU: chains bind unless slices may overlap each other.
    A large graph is left to the lists."""
    if device.kind != "gpu" or (graph.repeat is None and problem.n >= rules.FROM):
        return False
    bounds = lower_bounds(problem)
    return max(replace(bounds, chain_s=0.0).best_s if nano_batches else bounds.best_s, 1e-12) * ENOUGH < best_s


def _searched(
    graph: Graph, device: Device, problem: Problem, costs: Costs, budget_s: float, seed: int, limit_s: float,
    nano_batches: bool,
) -> Candidate | None:  # fmt: skip
    """What `explore` finds; of a large graph without a repeat the schedule of the best rule."""
    if graph.repeat is None and problem.n >= rules.FROM and device.kind == "gpu":
        rule, assignment, times = rules.best_rule(problem, budget_s, seed)
        return Candidate(f"search over rules, {rule.label()}, seed {seed}", graph, problem, assignment, times)
    return explore(graph, device, costs, budget_s, seed, limit_s, nano_batches)


def _in_one_order(found: Candidate) -> Candidate:
    """The candidate with its collectives one after another, as they start: ranks that issued them in different orders
    would wait for each other (`verify.collectives_in_turn`)."""
    if not any(op.kind in COLLECTIVES and op.integer("ranks") > 1 for op in found.graph.ops):
        return found
    ops, chosen = found.graph.flat().ops, found.assignment
    order = chosen.order[np.argsort(found.evaluation.start_s[chosen.order], kind="stable")]
    shared = [i for i in order.tolist() if ops[i].kind in COLLECTIVES and ops[i].integer("ranks") > 1]
    turns = [(a, b) for a, b in pairwise(shared) if chosen.lane[a] != chosen.lane[b]]
    if not turns:
        return found
    held = replace(chosen, order=order, holds=np.concatenate([chosen.holds, turns]))
    return replace(found, assignment=held, evaluation=evaluate(found.problem, held))


def error_band(problem: Problem) -> float:
    """The bands of the ops, weighted by their times: errors of one model lean the same way, so they do not cancel."""
    weight = problem.best_seconds()
    return float(np.average(problem.band, weights=weight))


# ------------------------------------------------------------------------------------------- replay


def replay_times(graph: Graph, plan: Plan, costs: Costs = op_table) -> Timeline:
    """The simulated timeline of `plan` as it stands: its lanes, its order, the evaluator's clock."""
    graph = sliced(plan, graph)
    problem, chosen, times = _replayed(graph, plan, costs, record=False)
    return _timeline(graph.flat(), plan.device, problem, chosen.order, [s.lane for s in plan.steps], times)


def utilisation(graph: Graph, plan: Plan, costs: Costs = op_table) -> dict[str, list[tuple[float, float]]]:
    """For each resource of the device the steps (time in seconds, used share of its capacity) of a simulated replay."""
    _, _, times = _replayed(sliced(plan, graph), plan, costs, record=True)
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
    names = [flat.ops[i].name for i in order.tolist()]
    spans = rows(Span, len(names), names, lanes, times.start_s[order].tolist(), times.end_s[order].tolist())
    return Timeline("simulated", f"{device.name}, {' + '.join(sorted(set(problem.sources)))}", spans)


# ----------------------------------------------------------------------------------- from assignment to plan


def plan_from(graph: Graph, device: Device, problem: Problem, chosen: Assignment, made_by: str) -> Plan:
    """The plan of an assignment that came from elsewhere, as it stands: no search, no fall back.

    `problem` is that of `graph.flat()` on `device`; the verdict compares with the sequential order on its SM counts.
    """
    turns = _turns(chosen.order, chosen.lane, chosen.layout.conflicts)
    held = replace(chosen, holds=np.concatenate([chosen.holds, turns]))
    found = _in_one_order(Candidate(made_by, graph, problem, held, evaluate(problem, held)))
    in_turn = evaluate(problem, lists.sequential(problem))
    verdict = Verdict("packed", found.evaluation.makespan_s, in_turn.makespan_s, error_band(problem))
    return _plan_of(graph, device, found, verdict, made_by)


def _plan_of(graph: Graph, device: Device, chosen: Candidate, verdict: Verdict, made_by: str) -> Plan:
    flat, problem = chosen.graph.flat(), chosen.problem
    assignment, times = chosen.assignment, chosen.evaluation
    order, layout = assignment.order, assignment.layout
    used, lane_of_op = np.unique(assignment.lane, return_inverse=True)
    kept, geometry_of = np.unique(layout.rows[layout.lane_partition[used], 0], return_inverse=True)
    first_row = np.searchsorted(layout.rows[:, 0], kept)
    step_lane = lane_of_op[order].tolist()
    waits = _waits(assignment, lane_of_op, problem)
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
        steps=rows(Step, problem.n, [flat.ops[i].name for i in order.tolist()], step_lane, waits, sms),
        arena=slots,
        arena_bytes=arena_bytes,
        timeline=_timeline(flat, device, problem, order, step_lane, times),
        bounds=replace(lower_bounds(problem), proved_s=chosen.proved_s),
        verdict=verdict,
        made_by=made_by,
        split=chosen.split,
        period=_period(chosen.graph, times.start_s, times.end_s),
    ).sealed()


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
    turns = _turns(chosen.order, chosen.lane, chosen.layout.conflicts)
    extra = np.concatenate([chosen.holds, turns])
    pred_ptr, pred = problem.pred_ptr, problem.pred
    if len(extra):
        after = np.concatenate([np.repeat(np.arange(problem.n), np.diff(pred_ptr)), extra[:, 1]])
        pred = np.concatenate([pred, extra[:, 0]])[np.argsort(after, kind="stable")]
        pred_ptr = np.concatenate([[0], np.cumsum(np.bincount(after, minlength=problem.n))])
    count, row = _reduced_waits(chosen.order, lane, int(lane.max()) + 1, pred_ptr, pred)
    flat = row[np.arange(row.shape[1]) < count[:, None]].tolist()
    end = np.cumsum(count)
    return [tuple(flat[a:b]) for a, b in zip((end - count).tolist(), end.tolist(), strict=True)]


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
