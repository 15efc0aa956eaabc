"""verify(): the independent checker. It imports no solver; what it knows about plans, it knows alone."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.graph.graph import Graph
from taskgraph.ops import COLLECTIVES
from taskgraph.schedule.plan import SCHEMA, Plan

MAX_GEOMETRIES = 4
_SLACK = 1e-9


def verify(plan: Plan, graph: Graph, memory: bool = True) -> None:
    """Raise PlanError at the first broken rule, naming the op or tensor.

    `memory=False` leaves out the rule that weights, states and arena fit the device: for studies of one device of
    several that will share the model.
    """
    if plan.schema != SCHEMA:
        raise PlanError(f"the plan has schema {plan.schema}; this version knows {SCHEMA}. Plan again.")
    if plan.graph != graph.fingerprint:
        raise PlanError(f"the plan was made for graph {plan.graph_name!r}, not for this {graph.name!r}. Plan again.")
    flat = plan.sliced(graph).flat()
    for rule in _RULES:
        rule(plan, flat)
    if memory:
        _fits_memory(plan, flat)


def _partitions_legal(plan: Plan, graph: Graph) -> None:
    device = plan.device
    sizes = set(device.partition_sizes())
    if not 1 <= len(plan.geometries) <= MAX_GEOMETRIES:
        raise PlanError(f"the plan has {len(plan.geometries)} geometries; at most {MAX_GEOMETRIES} are allowed.")
    for geometry in plan.geometries:
        ordered = sorted(geometry.partitions, key=lambda p: p.first_sm)
        for part in ordered:
            if part.sm_count not in sizes or part.first_sm < 0 or part.end_sm > device.sm_count:
                raise PlanError(
                    f"partition of {part.sm_count} SMs from {part.first_sm} is not legal on {device.name}: multiples "
                    f"of {device.sm_granularity}, at least {device.sm_min}, within {device.sm_count}."
                )
        for low, high in pairwise(ordered):
            if high.first_sm < low.end_sm:
                raise PlanError(
                    f"partitions [{low.first_sm}, {low.end_sm}) and [{high.first_sm}, {high.end_sm}) overlap."
                )


def _indices_valid(plan: Plan, graph: Graph) -> None:
    for i, lane in enumerate(plan.lanes):
        geometries = plan.geometries
        if not (
            0 <= lane.geometry < len(geometries) and 0 <= lane.partition < len(geometries[lane.geometry].partitions)
        ):
            raise PlanError(
                f"lane {i} names partition {lane.partition} of geometry {lane.geometry}, which is not there."
            )
    for i, step in enumerate(plan.steps):
        if not 0 <= step.lane < len(plan.lanes):
            raise PlanError(f"op {step.op!r} runs on lane {step.lane}; the plan has {len(plan.lanes)}.")
        for wait in step.waits:
            if not 0 <= wait < i or plan.steps[wait].lane == step.lane:
                raise PlanError(f"op {step.op!r} waits for step {wait}, which is not an earlier step of another lane.")


def _every_op_once(plan: Plan, graph: Graph) -> None:
    wanted = {op.name for op in graph.ops}
    seen: set[str] = set()
    for step in plan.steps:
        if step.op not in wanted or step.op in seen:
            raise PlanError(f"op {step.op!r} {'runs twice' if step.op in seen else 'is not in the graph'}.")
        seen.add(step.op)
    if seen != wanted:
        raise PlanError(f"{len(wanted - seen)} ops never run, the first is {min(wanted - seen)!r}.")


def _demands_met(plan: Plan, graph: Graph) -> None:
    ops = {op.name: op for op in graph.ops}
    for i, step in enumerate(plan.steps):
        given, room, demand = plan.sms(i), plan.partition(step.lane).sm_count, ops[step.op].demand
        if not 0 < given <= room:
            raise PlanError(f"op {step.op!r} is launched on {given} SMs; its partition has {room}.")
        if demand.sm is not None and given < demand.sm[0]:
            raise PlanError(f"op {step.op!r} needs {demand.sm[0]} SMs; it is launched on {given}.")


def _known_ended(plan: Plan) -> np.ndarray:
    """(steps, lanes): for each step, the last step of each lane that has ended before it starts."""
    known = np.full((len(plan.steps), len(plan.lanes)), -1, np.int64)
    latest: dict[int, int] = {}
    for i, step in enumerate(plan.steps):
        row = known[i]
        previous = latest.get(step.lane)
        if previous is not None:
            row[:] = known[previous]
            row[step.lane] = previous
        for wait in step.waits:
            np.maximum(row, known[wait], out=row)
            other = plan.steps[wait].lane
            row[other] = max(row[other], wait)
        latest[step.lane] = i
    return known


def _waits_cover_edges(plan: Plan, graph: Graph) -> None:
    known = _known_ended(plan)
    where = {step.op: i for i, step in enumerate(plan.steps)}
    for op, preds in zip(graph.ops, graph.predecessors(), strict=True):
        i = where[op.name]
        for p in preds:
            before = where[graph.ops[p].name]
            if known[i, plan.steps[before].lane] < before:
                raise PlanError(f"op {op.name!r} may start before {graph.ops[p].name!r} ends: no wait orders them.")


def _geometries_take_turns(plan: Plan, graph: Graph) -> None:
    """Steps in overlapping partitions of different geometries never run at the same time."""
    if len(plan.geometries) == 1:
        return
    known = _known_ended(plan)
    lanes = range(len(plan.lanes))
    rivals = {
        i: [
            j
            for j in lanes
            if plan.lanes[i].geometry != plan.lanes[j].geometry
            and plan.partition(i).first_sm < plan.partition(j).end_sm
            and plan.partition(j).first_sm < plan.partition(i).end_sm
        ]
        for i in lanes
    }
    last: dict[int, int] = {}
    for i, step in enumerate(plan.steps):
        for rival in rivals[step.lane]:
            if known[i, rival] < last.get(rival, -1):
                raise PlanError(f"op {step.op!r} may overlap {plan.steps[last[rival]].op!r} of another geometry.")
        last[step.lane] = i


def _timeline_possible(plan: Plan, graph: Graph) -> None:
    spans = plan.timeline.spans
    if len(spans) != len(plan.steps):
        raise PlanError(f"the timeline has {len(spans)} spans for {len(plan.steps)} steps.")
    slack = _SLACK * max(plan.makespan_s, 1e-12)
    free: dict[int, float] = {}
    for step, span in zip(plan.steps, spans, strict=True):
        if (span.op, span.lane) != (step.op, step.lane) or span.end_s < span.start_s:
            raise PlanError(f"the span of op {step.op!r} does not match its step.")
        ready = max([free.get(step.lane, 0.0), *(spans[w].end_s for w in step.waits)])
        if span.start_s < ready - slack:
            raise PlanError(f"op {step.op!r} starts at {span.start_s} s, before what it waits for ends at {ready} s.")
        free[step.lane] = span.end_s
    if plan.makespan_s < plan.bounds.best_s * (1 - _SLACK) - slack:
        raise PlanError(
            f"makespan {plan.makespan_s} s is below the {plan.bounds.binding} bound {plan.bounds.best_s} s."
        )


def collectives_in_turn(plan: Plan, graph: Graph) -> None:
    """Collectives between ranks run one after another, in the plan's order, so that all ranks issue them alike.

    A rule for plans that several ranks run together: `graph` is what the steps name, flat. PlanError names two that
    may run at the same time, which each rank might start in an order of its own.
    """
    shared = {op.name for op in graph.ops if op.kind in COLLECTIVES and op.integer("ranks") > 1}
    issued = [i for i, step in enumerate(plan.steps) if step.op in shared]
    known = _known_ended(plan)
    for before, after in pairwise(issued):
        if known[after, plan.steps[before].lane] < before:
            raise PlanError(
                f"collectives {plan.steps[before].op!r} and {plan.steps[after].op!r} may run at the same time, so "
                "ranks could start them in different orders and wait for each other; order them with after=."
            )


def _no_alias_in_arena(plan: Plan, graph: Graph) -> None:
    tensors = graph.tensor
    wanted = {t.name for t in graph.with_role("activation")} - set(graph.outputs)
    slots = {slot.tensor: slot for slot in plan.arena}
    if set(slots) != wanted or len(slots) != len(plan.arena):
        raise PlanError(f"the arena must hold each activation once; differs in {sorted(set(slots) ^ wanted)[:3]}.")
    for slot in plan.arena:
        if slot.nbytes < tensors[slot.tensor].nbytes or slot.offset < 0 or slot.offset % 64:
            raise PlanError(f"the slot of {slot.tensor!r} is too small or not aligned to 64 bytes.")
        if slot.offset + slot.nbytes > plan.arena_bytes:
            raise PlanError(f"the slot of {slot.tensor!r} ends beyond the arena's {plan.arena_bytes} bytes.")
    known = _known_ended(plan)
    producer: dict[str, int] = {}
    users: dict[str, dict[int, int]] = {}
    ops = {op.name: op for op in graph.ops}
    for i, step in enumerate(plan.steps):
        for name in ops[step.op].outputs:
            producer[name] = i
            users[name] = {step.lane: i}
        for name in ops[step.op].inputs:
            if name in wanted:
                users[name][step.lane] = i
    # Claim bytes in step order. A claim replaces older claims on the same bytes, and each of those must have ended.
    claims: list[tuple[int, int, str]] = []
    by_range: dict[tuple[int, int], str] = {}
    ranges = sorted({(slot.offset, slot.nbytes) for slot in plan.arena})
    exact = all(low + nbytes <= high for (low, nbytes), (high, _) in pairwise(ranges))
    for name in sorted(wanted, key=lambda n: producer[n]):
        slot = slots[name]
        if exact:
            old = by_range.get((slot.offset, slot.nbytes))
            by_range[slot.offset, slot.nbytes] = name
            rivals = [old] if old is not None else []
        else:
            end = slot.offset + slot.nbytes
            rivals = [other for low, high, other in claims if low < end and slot.offset < high]
            claims = _without(claims, slot.offset, end)
            claims.append((slot.offset, end, name))
        for other in rivals:
            if any(known[producer[name], lane] < last for lane, last in users[other].items()):
                raise PlanError(f"tensors {other!r} and {name!r} share arena bytes while both are alive.")


def _without(claims: list[tuple[int, int, str]], start: int, end: int) -> list[tuple[int, int, str]]:
    """`claims` less the bytes [start, end)."""
    left: list[tuple[int, int, str]] = []
    for low, high, name in claims:
        if low < start:
            left.append((low, min(high, start), name))
        if high > end:
            left.append((max(low, end), high, name))
    return left


def _fits_memory(plan: Plan, graph: Graph) -> None:
    held, room = resident_bytes(plan, graph), plan.device.memory_bytes
    if held > room:
        raise PlanError(
            f"graph {graph.name!r} keeps {held} bytes (weights, states, arena, workspace), {held - room} more than "
            f"{plan.device.name} has. Use a smaller batch or context, a larger device, or verify(memory=False)."
        )


def resident_bytes(plan: Plan, graph: Graph) -> int:
    """Bytes on the device while the plan runs: inputs, weights, states, outputs, arena, and a workspace a lane."""
    flat = plan.sliced(graph).flat()
    held = sum(t.nbytes for t in flat.with_role("input", "weight", "state"))
    held += sum(flat.tensor[name].nbytes for name in set(flat.outputs) if flat.tensor[name].role == "activation")
    ops = {op.name: op for op in flat.ops}
    workspace: dict[int, int] = {}
    for step in plan.steps:
        workspace[step.lane] = max(workspace.get(step.lane, 0), ops[step.op].demand.workspace_bytes)
    return held + plan.arena_bytes + sum(workspace.values())


_RULES: tuple[Callable[[Plan, Graph], None], ...] = (
    _partitions_legal,
    _indices_valid,
    _every_op_once,
    _demands_met,
    _waits_cover_edges,
    _geometries_take_turns,
    _timeline_possible,
    _no_alias_in_arena,
)
