"""verify(): the independent checker of plans. It imports no solver: what it knows, it knows alone.

What "ended before" means is told by vector clocks (Fidge 1988, Mattern 1989) over the only two things that order
steps at run time: the order within a lane, and waits. Row s of the clocks holds, for every lane, the last step of
that lane that has surely ended when step s starts; so step u ends before step s starts iff clock[s, lane(u)] >= u.
"""

from bisect import bisect_right
from collections import Counter

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op
from taskgraph.schedule.plan import SCHEMA, Plan

ALIGNMENT = 64
MAX_GEOMETRIES = 4
TOLERANCE = 1e-9
"""Relative, of times."""


def verify(plan: Plan, graph: Graph) -> None:
    """Raise PlanError at the first rule that `plan` breaks as a plan of `graph`, naming the op."""
    same_graph(plan, graph)
    flat = graph.flat()
    for rule in RULES:
        rule(plan, flat)


def same_graph(plan: Plan, graph: Graph) -> None:
    """The plan has this version's schema and was made for this graph."""
    if plan.schema != SCHEMA:
        raise PlanError(f"plan has schema {plan.schema!r}; this version reads {SCHEMA}. Plan again.")
    if plan.graph != graph.fingerprint:
        raise PlanError(
            f"plan was made for graph {plan.graph_name!r} ({plan.graph}), not for {graph.name!r} "
            f"({graph.fingerprint}). Plan again."
        )


def every_op_once(plan: Plan, flat: Graph) -> None:
    """Steps name every op of the flat graph exactly once, and nothing else."""
    count = Counter(step.op for step in plan.steps)
    known = {op.name for op in flat.ops}
    for name, times in count.items():
        if name not in known:
            raise PlanError(f"step runs op {name!r}, which is no op of graph {flat.name!r}.")
        if times > 1:
            raise PlanError(f"op {name!r} is run by {times} steps; every op must be run exactly once.")
    missing = next((op.name for op in flat.ops if op.name not in count), None)
    if missing is not None:
        raise PlanError(f"op {missing!r} is run by no step; every op must be run exactly once.")


def partitions_legal(plan: Plan, flat: Graph) -> None:
    """At most MAX_GEOMETRIES geometries of disjoint partitions that the device can make; lanes name existing ones."""
    device, sizes = plan.device, set(plan.device.partition_sizes())
    if len(plan.geometries) > MAX_GEOMETRIES:
        raise PlanError(f"plan has {len(plan.geometries)} geometries; at most {MAX_GEOMETRIES} fit in one plan.")
    for number, geometry in enumerate(plan.geometries):
        for part in geometry.partitions:
            if part.sm_count not in sizes:
                raise PlanError(f"geometry {number} has a partition of {part.sm_count} SMs, illegal on {device.name}.")
            if part.first_sm < 0 or part.end_sm > device.sm_count:
                raise PlanError(
                    f"geometry {number} has a partition of SMs [{part.first_sm}, {part.end_sm}); {device.name} has "
                    f"{device.sm_count}."
                )
        ordered = sorted(geometry.partitions, key=lambda p: p.first_sm)
        for left, right in zip(ordered, ordered[1:], strict=False):
            if right.first_sm < left.end_sm:
                raise PlanError(f"geometry {number} has partitions that overlap at SM {right.first_sm}.")
    for number, lane in enumerate(plan.lanes):
        if not 0 <= lane.geometry < len(plan.geometries):
            raise PlanError(f"lane {number} is in geometry {lane.geometry}; the plan has {len(plan.geometries)}.")
        if not 0 <= lane.partition < len(plan.geometries[lane.geometry].partitions):
            raise PlanError(f"lane {number} is in partition {lane.partition}, which geometry {lane.geometry} lacks.")


def lanes_and_waits_valid(plan: Plan, flat: Graph) -> None:
    """Every step is on a lane of the plan and waits for earlier steps of other lanes only."""
    for i, step in enumerate(plan.steps):
        if not 0 <= step.lane < len(plan.lanes):
            raise PlanError(f"op {step.op!r} is on lane {step.lane}; the plan has {len(plan.lanes)} lanes.")
        for wait in step.waits:
            if not 0 <= wait < i:
                raise PlanError(f"op {step.op!r} is step {i} and waits for step {wait}; waits name earlier steps.")
            if plan.steps[wait].lane == step.lane:
                raise PlanError(
                    f"op {step.op!r} waits for step {wait} of its own lane {step.lane}; lanes run in order."
                )


def demands_met(plan: Plan, flat: Graph) -> None:
    """Every op runs on as many SMs as it demands, on a device that has the paths it uses."""
    device, ops = plan.device, _ops(flat)
    sm_count = [plan.partition(lane).sm_count for lane in range(len(plan.lanes))]
    for step in plan.steps:
        op, sms = ops[step.op], sm_count[step.lane]
        if op.demand.sm is not None:
            least, most = op.demand.sm
            if sms < least:
                raise PlanError(f"op {op.name!r} demands at least {least} SMs; its partition has {sms}.")
            if sms > most and op.work.flops > 0:
                raise PlanError(f"op {op.name!r} demands at most {most} SMs; its partition has {sms}.")
        for path in ("h2d", "d2h", "link"):
            if getattr(op.work, f"{path}_bytes") > 0 and getattr(device, f"{path}_bytes_per_s") <= 0:
                raise PlanError(f"op {op.name!r} moves {path} bytes; {device.name} has no {path} path.")


def waits_cover_edges(plan: Plan, flat: Graph) -> None:
    """Every edge of the graph (data, control, state hazard) is ordered by lanes and waits."""
    clock, lane, step_of = _clocks(plan), _lanes(plan), _step_of(plan)
    at = np.array([step_of[op.name] for op in flat.ops], np.int64)
    before = flat.predecessors()
    head = np.repeat(np.arange(len(before)), [len(row) for row in before])
    tail = np.array([p for row in before for p in row], np.int64)
    broken = np.flatnonzero(clock[at[head], lane[at[tail]]] < at[tail])
    if len(broken):
        late, early = flat.ops[head[broken[0]]].name, flat.ops[tail[broken[0]]].name
        raise PlanError(f"op {late!r} must run after op {early!r}, but neither lane order nor waits say so.")


def geometries_apart(plan: Plan, flat: Graph) -> None:
    """A step starts only after all earlier steps of other geometries whose partitions share an SM with its own."""
    if len({lane.geometry for lane in plan.lanes}) < 2:
        return
    clock = _clocks(plan)
    parts = [plan.partition(i) for i in range(len(plan.lanes))]
    rivals = [
        np.array(
            [
                j
                for j, other in enumerate(plan.lanes)
                if other.geometry != here.geometry
                and parts[i].first_sm < parts[j].end_sm
                and parts[j].first_sm < parts[i].end_sm
            ],
            np.int64,
        )
        for i, here in enumerate(plan.lanes)
    ]
    last = np.full(len(plan.lanes), -1, np.int64)
    for i, step in enumerate(plan.steps):
        others = rivals[step.lane]
        open_steps = last[others][clock[i, others] < last[others]]
        if len(open_steps):
            other = plan.steps[open_steps[0]].op
            raise PlanError(
                f"op {step.op!r} may run beside op {other!r} of another geometry on the same SMs; join them by waits."
            )
        last[step.lane] = i


def timeline_sane(plan: Plan, flat: Graph) -> None:
    """Spans, where there are any, are those of the steps, in their order, on SMs that exist, no faster than bounds."""
    spans = plan.timeline.spans
    if not spans:
        return
    if len(spans) != len(plan.steps):
        raise PlanError(f"timeline has {len(spans)} spans for {len(plan.steps)} steps; it needs one a step.")
    slack = TOLERANCE * max(abs(plan.makespan_s), max(abs(s.end_s) for s in spans))
    lane_end = [-np.inf] * len(plan.lanes)
    for step, span in zip(plan.steps, spans, strict=True):
        if (step.op, step.lane) != (span.op, span.lane):
            raise PlanError(f"the span of op {step.op!r} on lane {step.lane} says {span.op!r} on lane {span.lane}.")
        ready = max([lane_end[step.lane], *(spans[w].end_s for w in step.waits)])
        if not (np.isfinite(span.end_s) and span.start_s >= ready - slack and span.end_s >= span.start_s - slack):
            raise PlanError(
                f"op {step.op!r} runs from {span.start_s} to {span.end_s} s, but what it waits for ends at {ready} s."
            )
        lane_end[step.lane] = span.end_s
    if plan.timeline.kind != "measured" and plan.makespan_s < plan.bounds.best_s * (1 - TOLERANCE):
        raise PlanError(f"makespan {plan.makespan_s} s is below the lower bound {plan.bounds.best_s} s.")
    _check_capacity(plan, slack)


def arena_complete(plan: Plan, flat: Graph) -> None:
    """One aligned, large enough slot for every activation that is not a graph output, inside the arena."""
    producer = {name: op.name for op in flat.ops for name in op.outputs}
    wanted = {name: op for name, op in producer.items() if name not in set(flat.outputs)}
    seen: set[str] = set()
    for slot in plan.arena:
        if slot.tensor not in wanted:
            raise PlanError(f"slot of {slot.tensor!r}: it is no activation that lives in the arena.")
        what = f"slot of {slot.tensor!r}, made by op {wanted[slot.tensor]!r},"
        if slot.tensor in seen:
            raise PlanError(f"{what} is given twice.")
        seen.add(slot.tensor)
        if slot.nbytes < flat.tensor[slot.tensor].nbytes:
            raise PlanError(f"{what} has {slot.nbytes} bytes; the tensor needs {flat.tensor[slot.tensor].nbytes}.")
        if slot.offset < 0 or slot.offset % ALIGNMENT:
            raise PlanError(f"{what} is at offset {slot.offset}, which is no multiple of {ALIGNMENT}.")
        if slot.offset + slot.nbytes > plan.arena_bytes:
            raise PlanError(f"{what} ends at {slot.offset + slot.nbytes}; the arena has {plan.arena_bytes} bytes.")
    missing = next((name for name in wanted if name not in seen), None)
    if missing is not None:
        raise PlanError(f"tensor {missing!r}, made by op {wanted[missing]!r}, has no slot in the arena.")


def no_alias_in_arena(plan: Plan, flat: Graph) -> None:
    """Tensors that share bytes are ordered: producer and consumers of the one end before the other's producer starts.

    The order is transitive, so it is enough to compare each tensor, in order of production, with the last holder
    of each byte that it takes. `starts` and `holder` are the map from bytes to last holders, as cut points.
    """
    clock, step_of = _clocks(plan), _step_of(plan)
    users = _last_users(plan, flat)
    made_at = {name: step_of[op.name] for op in flat.ops for name in op.outputs}
    starts, holder = [0], [""]
    for slot in sorted(plan.arena, key=lambda s: made_at[s.tensor]):
        row, begin, end = clock[made_at[slot.tensor]], slot.offset, slot.offset + slot.nbytes
        first, last = bisect_right(starts, begin) - 1, bisect_right(starts, end - 1)
        for other in dict.fromkeys(holder[first:last]):
            late = next((step for lane, step in users[other].items() if row[lane] < step), None) if other else None
            if late is not None:
                raise PlanError(
                    f"op {plan.steps[made_at[slot.tensor]].op!r} writes {slot.tensor!r} over {other!r} in the arena, "
                    f"but op {plan.steps[late].op!r} may still use {other!r}."
                )
        stop = starts[last] if last < len(starts) else None
        cuts, names = [begin], [slot.tensor]
        if starts[first] < begin:
            cuts, names = [starts[first], begin], [holder[first], slot.tensor]
        if stop is None or stop > end:
            cuts, names = [*cuts, end], [*names, holder[last - 1]]
        starts[first:last], holder[first:last] = cuts, names


def memory_fits(plan: Plan, flat: Graph) -> None:
    """Arena, weights, states, inputs, outputs and the largest workspace fit in the device's memory."""
    outside = {t.name: t.nbytes for t in flat.with_role("weight", "state", "input")}
    outside |= {name: flat.tensor[name].nbytes for name in flat.outputs}
    largest = max(flat.ops, key=lambda op: op.demand.workspace_bytes)
    total = plan.arena_bytes + sum(outside.values()) + largest.demand.workspace_bytes
    if total > plan.device.memory_bytes:
        raise PlanError(
            f"plan of {flat.name!r} needs {total} bytes ({plan.arena_bytes} of arena, {sum(outside.values())} of "
            f"weights, states, inputs and outputs, {largest.demand.workspace_bytes} of workspace for op "
            f"{largest.name!r}): {total - plan.device.memory_bytes} more than {plan.device.name} has. "
            f"Take a larger device or a smaller batch."
        )


RULES = (
    every_op_once,
    partitions_legal,
    lanes_and_waits_valid,
    demands_met,
    waits_cover_edges,
    geometries_apart,
    timeline_sane,
    arena_complete,
    no_alias_in_arena,
    memory_fits,
)
"""In this order: a rule may rely on those before it."""


# -------------------------------------------------------------------------------------- what rules share


def _ops(flat: Graph) -> dict[str, Op]:
    return {op.name: op for op in flat.ops}


def _step_of(plan: Plan) -> dict[str, int]:
    return {step.op: i for i, step in enumerate(plan.steps)}


def _lanes(plan: Plan) -> np.ndarray:
    return np.array([step.lane for step in plan.steps], np.int64)


def _clocks(plan: Plan) -> np.ndarray:
    """clock[s, l]: the last step of lane l that has ended when step s starts, -1 for none."""
    clock = np.full((len(plan.steps), len(plan.lanes)), -1, np.int32)
    last: dict[int, int] = {}
    for i, step in enumerate(plan.steps):
        row = clock[i]
        if step.lane in last:
            row[:] = clock[last[step.lane]]
            row[step.lane] = last[step.lane]
        for wait in step.waits:
            np.maximum(row, clock[wait], out=row)
        for wait in step.waits:
            lane = plan.steps[wait].lane
            row[lane] = max(row[lane], wait)
        last[step.lane] = i
    return clock


def _last_users(plan: Plan, flat: Graph) -> dict[str, dict[int, int]]:
    """tensor -> lane -> the last step of that lane that makes or reads it."""
    ops = _ops(flat)
    users: dict[str, dict[int, int]] = {}
    for i, step in enumerate(plan.steps):
        for name in (*ops[step.op].inputs, *ops[step.op].outputs):
            users.setdefault(name, {})[step.lane] = i
    return users


def _check_capacity(plan: Plan, slack: float) -> None:
    """Partitions that are busy at one time, each counted once, have no more SMs together than the device."""
    start = np.array([s.start_s for s in plan.timeline.spans]) + slack
    end = np.array([s.end_s for s in plan.timeline.spans]) - slack
    real = np.flatnonzero(end > start)
    parts = [plan.partition(i) for i in range(len(plan.lanes))]
    kinds = sorted(set(parts), key=lambda p: (p.first_sm, p.sm_count))
    kind = np.array([kinds.index(part) for part in parts])[_lanes(plan)[real]]
    order = np.argsort(np.concatenate([end[real], start[real]]), kind="stable")
    change = np.repeat([-1, 1], len(real))[order]
    owner = np.concatenate([kind, kind])[order]
    busy = np.zeros(len(order), np.int64)
    for number, part in enumerate(kinds):
        busy += part.sm_count * (np.cumsum(np.where(owner == number, change, 0)) > 0)
    over = np.flatnonzero(busy > plan.device.sm_count)
    if len(over):
        op = plan.steps[int(np.concatenate([real, real])[order][over[0]])].op
        raise PlanError(f"when op {op!r} starts, {busy[over[0]]} SMs are busy; {plan.device.name} has fewer.")
