"""The independent checker behind `tg.verify`. It imports no solver and no rewriter: what it knows about plans and
slices, it knows alone."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import astuple
from itertools import pairwise

import numpy as np

from taskgraph.errors import PlanError
from taskgraph.graph.graph import Graph
from taskgraph.ops import COLLECTIVES
from taskgraph.record import instance
from taskgraph.schedule.plan import CHOICES, KINDS, SCHEMA, Plan, Timeline
from taskgraph.schedule.slices import check_slices

MAX_GEOMETRIES, MAX_LANES = 4, 1024
MOST_SECONDS = 1e40
"""Times are below this: what the largest Work takes at the least rate."""
_SLACK = 1e-9


def check_made_for(plan: Plan, graph: Graph) -> None:
    """PlanError unless this is a plan, of a version that can be read, for this graph."""
    instance("the plan", plan, Plan, PlanError, "Take what taskgraph.plan returned.")
    instance("the graph", graph, Graph, PlanError, "Take what GraphBuilder.build returned.")
    if plan.schema != SCHEMA:
        raise PlanError(f"the plan has schema {plan.schema}; this version knows {SCHEMA}. Plan again.")
    if plan.graph != graph.fingerprint:
        raise PlanError(f"the plan was made for graph {plan.graph_name!r}, not for this {graph.name!r}. Plan again.")


def check_plan(plan: Plan, graph: Graph, sliced: Graph, memory: bool) -> None:
    """Raise PlanError at the first broken rule (see `sliced.verify`). The steps of the plan name the ops of `sliced`,
    which is checked to compute what `graph` does."""
    check_made_for(plan, graph)
    check_slices(graph, plan.split, sliced)
    flat = sliced.flat()
    check_readable(plan)
    for rule in _RULES:
        rule(plan, flat)
    _names_and_period(plan, graph)
    if memory:
        _fits_memory(plan, flat)
    if plan.seal and plan.seal != plan.digest():
        raise PlanError(
            f"the plan of {plan.graph_name!r} changed after it was made: it breaks no rule, but its times, bounds, "
            "verdict or origin may not be its own. Plan again, or seal it with Plan.sealed() if the change is meant."
        )


def check_readable(plan: Plan) -> None:
    """PlanError unless indices name what is there, and all numbers are finite and none is negative: what can be asked
    of a plan without its graph, before it is shown to people."""
    instance("the plan", plan, Plan, PlanError, "Take what taskgraph.plan returned.")
    _indices_valid(plan)
    check_timeline(plan.timeline)
    v, b = plan.verdict, plan.bounds
    if v.kind not in KINDS or v.choice not in CHOICES:
        raise PlanError(f"the verdict is {v.choice!r}, {v.kind!r}; it is one of {CHOICES} and one of {KINDS}.")
    period = astuple(plan.period) if plan.period is not None else ()
    for what, numbers in (
        ("bounds", astuple(b)),
        ("verdict", (v.packed_s, v.sequential_s, v.error_band)),
        ("period", period),
    ):
        if not all(0 <= x < MOST_SECONDS for x in numbers):
            raise PlanError(f"the {what} {numbers} of the plan must be finite and not negative.")
    if plan.arena_bytes < 0:
        raise PlanError(f"the arena has {plan.arena_bytes} bytes; it must not be negative.")


def check_timeline(timeline: Timeline) -> None:
    """PlanError unless the kind is known, and spans are finite, not negative, and end no earlier than they start."""
    instance("a timeline", timeline, Timeline, PlanError)
    if timeline.kind not in KINDS:
        raise PlanError(f"a timeline is of kind {timeline.kind!r}; it is one of {', '.join(KINDS)}.")
    for span in timeline.spans:
        if not 0 <= span.start_s <= span.end_s < MOST_SECONDS:
            raise PlanError(
                f"the span of op {span.op!r} is from {span.start_s} to {span.end_s} s; it must be finite, not "
                "negative, and end no earlier than it starts."
            )


def _names_and_period(plan: Plan, graph: Graph) -> None:
    if plan.graph_name != graph.name:
        raise PlanError(f"the plan calls its graph {plan.graph_name!r}; it is {graph.name!r}.")
    period, repeat = plan.period, graph.repeat
    if period is None:
        return
    if repeat is None or repeat.count != period.count:
        held = f"{repeat.count} iterations" if repeat is not None else "no repeat"
        raise PlanError(f"the plan has a period of {period.count} iterations; the graph has {held}.")
    whole_s = period.prologue_s + (period.count - 1) * period.seconds + period.epilogue_s
    if not math.isclose(whole_s, plan.makespan_s, rel_tol=1e-6):
        raise PlanError(f"the period's parts sum to {whole_s} s; the makespan is {plan.makespan_s} s.")


def _verdict_agrees(plan: Plan, graph: Graph) -> None:
    """The chosen time of a simulated verdict is the makespan. What autotune compared are runs: its seal holds those."""
    v = plan.verdict
    if v.kind != "simulated" or plan.timeline.kind != "simulated" or (plan.ran and plan.seal):
        return
    chosen_s = v.packed_s if v.choice == "packed" else v.sequential_s
    if not math.isclose(chosen_s, plan.makespan_s, rel_tol=1e-6, abs_tol=1e-15):
        raise PlanError(
            f"the verdict says {v.choice} in {chosen_s} s; the timeline says {plan.makespan_s} s. Plan again."
        )


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


def _indices_valid(plan: Plan) -> None:
    if len(plan.lanes) > MAX_LANES:
        raise PlanError(f"the plan has {len(plan.lanes)} lanes; at most {MAX_LANES} are allowed.")
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


def _geometries_apart(plan: Plan, graph: Graph) -> None:
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
        if (span.op, span.lane) != (step.op, step.lane) or not span.end_s >= span.start_s:
            raise PlanError(f"the span of op {step.op!r} does not match its step.")
        ready = max([free.get(step.lane, 0.0), *(spans[w].end_s for w in step.waits)])
        if not span.start_s >= ready - slack:
            raise PlanError(f"op {step.op!r} starts at {span.start_s} s, before what it waits for ends at {ready} s.")
        free[step.lane] = span.end_s
    if not plan.makespan_s >= plan.bounds.best_s * (1 - _SLACK) - slack:
        raise PlanError(
            f"makespan {plan.makespan_s} s is below the {plan.bounds.binding} bound {plan.bounds.best_s} s."
        )


def _collectives_known(plan: Plan, graph: Graph) -> None:
    """Each collective between ranks goes over the device's network by an algorithm that may be used there."""
    network, ops = plan.device.network, {op.name: op for op in graph.ops}
    shared = [s.op for s in plan.steps if ops[s.op].kind in COLLECTIVES and ops[s.op].integer("ranks") > 1]
    wanted = shared if network is not None else []
    if [each.op for each in plan.collectives] != wanted:
        over = "no network" if network is None else network.name
        raise PlanError(
            f"the plan says of {len(plan.collectives)} collectives how they go over a network; over {over} it must of "
            f"{len(wanted)}, in the steps' order. Plan again."
        )
    for each in plan.collectives:
        assert network is not None
        op = ops[each.op]
        allowed = network.algorithms(op.kind, op.integer("ranks"))
        if each.algorithm not in allowed:
            raise PlanError(
                f"collective {each.op!r} goes by {each.algorithm!r}; {network.name} has {', '.join(allowed)} for it."
            )


def collectives_in_order(plan: Plan, graph: Graph) -> None:
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
    claims = Claims()
    for name in sorted(wanted, key=lambda n: producer[n]):
        slot = slots[name]
        ended = known[producer[name]].tolist()
        for other in claims.take(slot.offset, slot.offset + slot.nbytes, name):
            if any(ended[lane] < last for lane, last in users[other].items()):
                raise PlanError(f"tensors {other!r} and {name!r} share arena bytes while both are alive.")


class Claims:
    """Who has each byte: pieces that do not overlap, by where they begin. A claim costs what it replaces, and looking
    for that is a bisection, whatever the number of claims."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: dict[int, tuple[int, str]] = {}
        """Start of a piece -> (its end, who has it)."""

    def take(self, start: int, end: int, name: str) -> list[str]:
        """Claim the bytes [start, end) for `name`; who had any of them."""
        starts, pieces = self._starts, self._pieces
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        if first and pieces[starts[first - 1]][0] > start:
            first -= 1
        taken = [(low, *pieces.pop(low)) for low in starts[first:last]]
        made = [(start, end, name)]
        for low, high, other in taken:
            if low < start:
                made.append((low, start, other))
            if high > end:
                made.append((end, high, other))
        starts[first:last] = sorted(low for low, _, _ in made)
        pieces.update((low, (high, who)) for low, high, who in made)
        return [other for _, _, other in taken]


def _fits_memory(plan: Plan, graph: Graph) -> None:
    held, room = bytes_held(plan, graph), plan.device.memory_bytes
    if held > room:
        raise PlanError(
            f"graph {graph.name!r} keeps {held} bytes (weights, states, arena, workspace), {held - room} more than "
            f"{plan.device.name} has. Use a smaller batch or context, a larger device, or verify(memory=False)."
        )


def bytes_held(plan: Plan, flat: Graph) -> int:
    """Bytes on the device while the plan runs (see `sliced.resident_bytes`); `flat` is what its steps name."""
    held = sum(t.nbytes for t in flat.with_role("input", "weight", "state"))
    held += sum(flat.tensor[name].nbytes for name in set(flat.outputs) if flat.tensor[name].role == "activation")
    ops = {op.name: op for op in flat.ops}
    workspace: dict[int, int] = {}
    for step in plan.steps:
        workspace[step.lane] = max(workspace.get(step.lane, 0), ops[step.op].demand.workspace_bytes)
    return held + plan.arena_bytes + sum(workspace.values())


_RULES: tuple[Callable[[Plan, Graph], None], ...] = (
    _partitions_legal,
    _every_op_once,
    _demands_met,
    _waits_cover_edges,
    _geometries_apart,
    _timeline_possible,
    _verdict_agrees,
    _no_alias_in_arena,
    _collectives_known,
)
