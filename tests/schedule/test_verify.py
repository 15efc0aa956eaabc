"""Correct hand-made plans pass; each way to break one is found, and the op is named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from taskgraph.errors import PlanError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device, Geometry
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Demand, Work, spec
from taskgraph.graph.split import Split
from taskgraph.schedule.audit import audit
from taskgraph.schedule.plan import Bounds, Lane, Period, Plan, Slot, Span, Step, Timeline, Verdict
from taskgraph.schedule.planner import plan as plan_of
from taskgraph.schedule.sliced import verify
from tests.strategies import devices, graphs

H100 = specs.get("h100_sxm")


def sequential(graph: Graph, device: Device) -> Plan:
    """One lane, one op after another, no byte shared."""
    flat = graph.flat()
    at, slots = 0, []
    for op in flat.ops:
        for name in op.outputs:
            if name not in flat.outputs:
                slots.append(Slot(name, at, flat.tensor[name].nbytes))
                at += -(-flat.tensor[name].nbytes // 64) * 64
    n = len(flat.ops)
    return Plan(
        graph=graph.fingerprint,
        graph_name=graph.name,
        device=device,
        geometries=(Geometry.of(device.sm_count),),
        lanes=(Lane(0, 0),),
        steps=tuple(Step(op.name, 0) for op in flat.ops),
        arena=tuple(slots),
        arena_bytes=at,
        timeline=Timeline("simulated", "hand", tuple(Span(op.name, 0, i, i + 1.0) for i, op in enumerate(flat.ops))),
        bounds=Bounds(1.0, 0, 0, 0, 0, 0),
        verdict=Verdict("sequential", n, n, 0.1),
        made_by="hand",
    )


def diamond(demand: Demand | None = None) -> Graph:
    """a -> (left, right) -> join -> last."""
    b = GraphBuilder("diamond")
    x = b.input("x", (16,), "f32")

    def op(name: str, *inputs: Any, demand: Demand | None = None) -> Any:
        return b.op("custom", inputs, [spec(f"t_{name}", (16,), "f32")], Work(flops=1.0), name, demand)[0]

    a = op("a", x)
    join = op("join", op("left", a, demand=demand), op("right", a))
    b.output(op("last", join))
    return b.build()


def packed() -> Plan:
    """left and right beside each other in two partitions."""
    plan = sequential(diamond(), H100)
    steps = (
        Step("a", 0),
        Step("left", 0),
        Step("right", 1, (0,)),
        Step("join", 0, (2,)),
        Step("last", 0),
    )
    times = ((0, 1), (1, 2), (1, 2), (2, 3), (3, 4))
    spans = tuple(Span(s.op, s.lane, float(b), float(e)) for s, (b, e) in zip(steps, times, strict=True))
    return replace(
        plan,
        geometries=(Geometry.of(64, 64),),
        lanes=(Lane(0, 0), Lane(0, 1)),
        steps=steps,
        timeline=replace(plan.timeline, spans=spans),
        verdict=Verdict("packed", 4.0, 5.0, 0.1),
    )


def with_step(plan: Plan, i: int, **changes: Any) -> Plan:
    return replace(plan, steps=(*plan.steps[:i], replace(plan.steps[i], **changes), *plan.steps[i + 1 :]))


def with_slot(plan: Plan, i: int, **changes: Any) -> Plan:
    return replace(plan, arena=(*plan.arena[:i], replace(plan.arena[i], **changes), *plan.arena[i + 1 :]))


def with_span(plan: Plan, i: int, **changes: Any) -> Plan:
    s = plan.timeline.spans
    return replace(plan, timeline=replace(plan.timeline, spans=(*s[:i], replace(s[i], **changes), *s[i + 1 :])))


@settings(max_examples=40, deadline=None)
@given(graphs(), devices())
def test_sequential_plans_pass(graph: Graph, device: Device) -> None:
    verify(sequential(graph, device), graph)


def test_packed_plan_passes_and_may_reuse_bytes() -> None:
    verify(packed(), diamond())
    verify(with_slot(packed(), 3, offset=0), diamond())  # join over a: left and right have ended


BROKEN: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "graph": (lambda p: replace(p, graph="0"), "was made for graph"),
    "schema": (lambda p: replace(p, schema=99), "schema 99"),
    "unknown op": (lambda p: with_step(p, 4, op="ghost"), "'ghost'"),
    "twice": (lambda p: with_step(p, 4, op="a"), "'a'"),
    "missing": (lambda p: replace(p, steps=p.steps[:4]), "'last'"),
    "lane": (lambda p: with_step(p, 1, lane=7), "'left'"),
    "later wait": (lambda p: with_step(p, 2, waits=(3,)), "'right'"),
    "own wait": (lambda p: with_step(p, 1, waits=(0,)), "'left' waits for step 0"),
    "illegal size": (lambda p: replace(p, geometries=(Geometry.of(60, 64),)), "60 SMs"),
    "out of range": (lambda p: replace(p, geometries=(Geometry.of(64, 128),)), "within 132"),
    "five": (lambda p: replace(p, geometries=p.geometries * 5), "5 geometries"),
    "no partition": (lambda p: replace(p, lanes=(Lane(0, 0), Lane(0, 2))), "partition 2"),
    "no geometry": (lambda p: replace(p, lanes=(Lane(0, 0), Lane(1, 0))), "geometry 1"),
    "overlap": (
        lambda p: replace(p, geometries=(Geometry(Geometry.of(64).partitions * 2),)),
        "overlap",
    ),
    "edge": (lambda p: with_step(p, 3, waits=()), "'join' may start before 'right'"),
    "rival geometries": (
        lambda p: replace(p, geometries=(Geometry.of(64), Geometry.of(132)), lanes=(Lane(0, 0), Lane(1, 0))),
        "'right' may overlap 'left'",
    ),
    "few spans": (lambda p: replace(p, timeline=replace(p.timeline, spans=p.timeline.spans[:2])), "2 spans"),
    "wrong span": (lambda p: with_span(p, 1, op="a"), "'left'"),
    "early": (lambda p: with_span(p, 3, start_s=1.5), "'join' starts at 1.5"),
    "backwards": (lambda p: with_span(p, 4, end_s=2.0), "'last'"),
    "too fast": (lambda p: replace(p, bounds=replace(p.bounds, sm_s=5.0)), "below the sm bound"),
    "no slot": (lambda p: replace(p, arena=p.arena[1:]), "t_a"),
    "output slot": (lambda p: replace(p, arena=(*p.arena, Slot("t_last", 0, 64))), "'t_last'"),
    "two slots": (lambda p: replace(p, arena=(*p.arena, p.arena[0])), "each activation once"),
    "small": (lambda p: with_slot(p, 1, nbytes=63), "'t_left' is too small"),
    "unaligned": (lambda p: with_slot(p, 1, offset=32), "'t_left'"),
    "outside": (lambda p: with_slot(p, 1, offset=4096), "'t_left' ends beyond"),
    "alias": (lambda p: with_slot(p, 2, offset=64), "'t_left' and 't_right' share"),
    "alias of input": (lambda p: with_slot(p, 1, offset=0), "'t_a' and 't_left' share"),
    "memory": (lambda p: replace(p, device=specs.make(H100, memory_bytes=300)), "more than h100_sxm"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_plans_are_found(how: str) -> None:
    change, text = BROKEN[how]
    with pytest.raises(PlanError) as caught:
        verify(change(packed()), diamond())
    assert text in str(caught.value)


@pytest.mark.parametrize(("sm", "legal"), [((1, 64), True), ((65, 132), False)])
def test_demand_of_sms(sm: tuple[int, int], legal: bool) -> None:
    graph = diamond(Demand(sm=sm))
    plan = replace(packed(), graph=graph.fingerprint)
    if legal:
        verify(plan, graph)
    else:
        with pytest.raises(PlanError, match="'left' needs"):
            verify(plan, graph)


def test_geometries_joined_by_waits_pass() -> None:
    two = replace(packed(), geometries=(Geometry.of(64), Geometry.of(132)), lanes=(Lane(0, 0), Lane(1, 0)))
    joined = with_step(two, 2, waits=(1,))
    later = with_span(with_span(joined, 2, start_s=2.0, end_s=3.0), 3, start_s=3.0, end_s=4.0)
    verify(replace(with_span(later, 4, start_s=4.0, end_s=5.0), verdict=Verdict("packed", 5.0, 5.0, 0.1)), diamond())
    with pytest.raises(PlanError, match="'right' starts at"):
        verify(joined, diamond())


# ------------------------------------------------------------------------------ what a plan claims

NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 1e300)


@pytest.mark.parametrize("bad", NUMBERS)
@pytest.mark.parametrize("where", ["start_s", "end_s", "chain_s", "proved_s", "packed_s", "sequential_s", "error_band"])
def test_no_number_of_a_plan_is_nan_infinite_negative_or_beyond(where: str, bad: float) -> None:
    """Checks written as `x < bound` let NaN through; a plan by hand has no seal that would see it."""
    plan = packed()
    if where in ("start_s", "end_s"):
        broken = with_span(plan, 2, **{where: bad})
    elif hasattr(plan.bounds, where):
        broken = replace(plan, bounds=replace(plan.bounds, **{where: bad}))
    else:
        broken = replace(plan, verdict=replace(plan.verdict, **{where: bad}))
    with pytest.raises(PlanError) as caught:
        verify(broken, diamond())
    assert "\n" not in str(caught.value)


CLAIMS: dict[str, Callable[[Plan], Plan]] = {
    "chosen time": lambda p: replace(p, verdict=replace(p.verdict, packed_s=p.verdict.packed_s * 0.99)),
    "choice": lambda p: replace(p, verdict=replace(p.verdict, choice="sequential")),
    "no choice": lambda p: replace(p, verdict=replace(p.verdict, choice="best")),
    "kind of verdict": lambda p: replace(p, verdict=replace(p.verdict, kind="guessed")),
    "kind of timeline": lambda p: replace(p, timeline=replace(p.timeline, kind="dreamt")),
    "name": lambda p: replace(p, graph_name="other"),
    "negative arena": lambda p: replace(p, arena_bytes=-1),
    "lanes": lambda p: replace(p, lanes=p.lanes * 1000),
    "split": lambda p: replace(p, split=Split(((("ghost",), (8, 8)),))),
    "period": lambda p: replace(p, period=Period(2, 1.0, 1.0, 0.0, 1.0)),
}


@pytest.mark.parametrize("how", CLAIMS)
def test_claims_that_contradict_the_plan_are_found_without_a_seal(how: str) -> None:
    with pytest.raises(PlanError):
        verify(CLAIMS[how](packed()), diamond())


SEALED: dict[str, Callable[[Plan], Plan]] = {
    "sequential time": lambda p: replace(p, verdict=replace(p.verdict, sequential_s=2 * p.verdict.sequential_s)),
    "band": lambda p: replace(p, verdict=replace(p.verdict, error_band=0.0)),
    "measured": lambda p: replace(p, verdict=replace(p.verdict, kind="measured", packed_s=1e-9)),
    "bound": lambda p: replace(p, bounds=replace(p.bounds, sm_s=p.makespan_s)),
    "proof": lambda p: replace(p, bounds=replace(p.bounds, proved_s=p.makespan_s)),
    "maker": lambda p: replace(p, made_by="exact: proven"),
    "origin": lambda p: replace(p, timeline=replace(p.timeline, origin="a GPU")),
    "arena": lambda p: replace(p, arena_bytes=p.arena_bytes + 64),
    "SMs": lambda p: with_step(p, 0, sms=8 if p.sms(0) != 8 else 16),
    "device": lambda p: replace(p, device=replace(p.device, launch_seconds=1.0)),
}


@pytest.mark.parametrize("how", SEALED)
def test_a_plan_that_changed_since_it_was_made_does_not_pass(how: str) -> None:
    graph = diamond()
    plan = plan_of(graph, "h100_sxm", "list")
    verify(plan, graph)
    changed = SEALED[how](plan)
    assert changed != plan
    for edited in (changed, Plan.from_json(changed.to_json())):
        with pytest.raises(PlanError, match="changed after it was made"):
            verify(edited, graph)
    verify(changed.sealed(), graph)


@pytest.mark.parametrize("how", ["sequential time", "band", "bound", "device"])
def test_an_audit_finds_what_no_rule_can(how: str) -> None:
    """By prices: also where whoever changed the plan sealed it again."""
    graph = diamond()
    plan = plan_of(graph, "h100_sxm", "list")
    audit(plan, graph)
    with pytest.raises(PlanError, match="by these prices"):
        audit(SEALED[how](plan).sealed(), graph)


@settings(max_examples=15, deadline=None)
@given(graphs(), devices())
def test_plans_pass_the_audit(graph: Graph, device: Device) -> None:
    for scheduler in ("sequential", "list", "auto"):
        audit(plan_of(graph, device, scheduler), graph)
