"""The checker at its edges: what is just within a rule passes, and one step beyond is refused; and against a search of
all pairs, which knows nothing of clocks or claims."""

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph import ops
from taskgraph.errors import PlanError
from taskgraph.graph.device import Geometry, Partition
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Demand, Work, spec
from taskgraph.schedule.plan import Bounds, Lane, Period, Plan, Slot, Span, Step, Timeline, Verdict
from taskgraph.schedule.sliced import resident_bytes, verify
from taskgraph.schedule.verify import Claims, check_readable, check_timeline, collectives_in_order
from tests.schedule.test_verify import H100, diamond, packed, sequential, with_slot, with_span, with_step

WORK = Work(flops=1.0)


def refused(plan: Plan, graph: Graph | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        verify(plan, graph or diamond())
    return str(caught.value)


# ------------------------------------------------------------------------------- lanes and partitions


def beside(low: Partition, high: Partition) -> Plan:
    return replace(packed(), geometries=(Geometry((low, high)),))


def test_partitions_may_touch_each_other_and_the_last_sm() -> None:
    verify(beside(Partition(0, 64), Partition(64, 64)), diamond())
    verify(beside(Partition(64, 64), Partition(0, 64)), diamond())
    verify(beside(Partition(0, 64), Partition(68, 64)), diamond())
    wrong = refused(beside(Partition(0, 64), Partition(63, 64)))
    assert wrong == "partitions [0, 64) and [63, 127) overlap."
    assert "partitions [0, 64) and [63, 127) overlap." in refused(beside(Partition(63, 64), Partition(0, 64)))
    assert "partition of 64 SMs from 69 is not legal" in refused(beside(Partition(0, 64), Partition(69, 64)))
    assert "partition of 64 SMs from -1 is not legal" in refused(beside(Partition(-1, 64), Partition(64, 64)))
    assert "partition of 60 SMs from 64 is not legal" in refused(beside(Partition(0, 64), Partition(64, 60)))


def test_the_third_partition_is_compared_too() -> None:
    three = Geometry((Partition(0, 32), Partition(32, 64), Partition(88, 32)))
    assert "[32, 96) and [88, 120) overlap" in refused(replace(packed(), geometries=(three,)))


def test_four_geometries_and_1024_lanes_are_the_most() -> None:
    verify(replace(packed(), geometries=packed().geometries * 4), diamond())
    assert "has 5 geometries; at most 4" in refused(replace(packed(), geometries=packed().geometries * 5))
    assert "has 0 geometries; at most 4" in refused(replace(packed(), geometries=(), lanes=(), steps=()))
    verify(replace(packed(), lanes=packed().lanes * 512), diamond())
    many = (*packed().lanes * 512, Lane(0, 0))
    assert "has 1025 lanes; at most 1024" in refused(replace(packed(), lanes=many))


@pytest.mark.parametrize(("geometry", "partition"), [(-1, 0), (1, 0), (0, -1), (0, 2)])
def test_a_lane_names_a_partition_that_is_there(geometry: int, partition: int) -> None:
    plan = replace(packed(), lanes=(Lane(0, 0), Lane(geometry, partition)))
    assert refused(plan) == f"lane 1 names partition {partition} of geometry {geometry}, which is not there."


@pytest.mark.parametrize("lane", [-1, 2])
def test_a_step_names_a_lane_that_is_there(lane: int) -> None:
    assert refused(with_step(packed(), 2, lane=lane)) == f"op 'right' runs on lane {lane}; the plan has 2."


@pytest.mark.parametrize("wait", [-1, 2, 3, 4, 5])
def test_a_step_waits_for_an_earlier_one(wait: int) -> None:
    says = refused(with_step(packed(), 2, waits=(wait,)))
    assert says == f"op 'right' waits for step {wait}, which is not an earlier step of another lane."


def test_every_op_runs_once() -> None:
    plan = packed()
    assert refused(with_step(plan, 4, op="a")) == "op 'a' runs twice."
    assert refused(with_step(plan, 4, op="b")) == "op 'b' is not in the graph."
    assert refused(replace(plan, steps=plan.steps[:4])) == "1 ops never run, the first is 'last'."
    assert refused(replace(plan, steps=plan.steps[:3])) == "2 ops never run, the first is 'join'."


@pytest.mark.parametrize(
    ("sms", "least", "says"),
    [(0, 64, ""), (64, 64, ""), (8, 8, ""), (56, 8, ""), (56, 64, "needs 64 SMs; it is launched on 56."),
     (0, 72, "needs 72 SMs; it is launched on 64."), (65, 1, "is launched on 65 SMs; its partition has 64."),
     (-8, 1, "is launched on -8 SMs; its partition has 64.")],
)  # fmt: skip
def test_an_op_is_launched_on_as_many_sms_as_it_needs_and_its_partition_has(sms: int, least: int, says: str) -> None:
    graph = diamond(Demand(sm=(least, 132)))
    plan = with_step(replace(packed(), graph=graph.fingerprint), 1, sms=sms)
    if says:
        assert refused(plan, graph) == f"op 'left' {says}"
    else:
        verify(plan, graph)


# ------------------------------------------------------------------------------------- times and claims


def test_spans_may_be_early_by_rounding_only() -> None:
    plan = packed()  # 4 s: a slack of 4e-9
    verify(with_span(plan, 3, start_s=2.0 - 3e-9), diamond())
    assert "op 'join' starts at" in refused(with_span(plan, 3, start_s=2.0 - 5e-9))
    assert "op 'left' starts at 0.5 s, before what it waits for ends at 1.0 s" in refused(
        with_span(plan, 1, start_s=0.5)
    )
    verify(with_span(plan, 2, start_s=2.0, end_s=2.0), diamond())


def test_the_makespan_may_be_below_a_bound_by_rounding_only() -> None:
    plan = packed()
    for bound in ("sm_s", "proved_s"):
        verify(replace(plan, bounds=replace(plan.bounds, **{bound: 4.0 + 6e-9})), diamond())
        says = refused(replace(plan, bounds=replace(plan.bounds, **{bound: 4.0 + 1.2e-8})))
        assert f"is below the {bound.removesuffix('_s')} bound" in says


def test_every_step_has_a_span_of_its_own() -> None:
    plan = packed()
    spans = plan.timeline.spans
    many = replace(plan, timeline=replace(plan.timeline, spans=(*spans, spans[-1])))
    assert refused(many) == "the timeline has 6 spans for 5 steps."
    assert "span of op 'left' does not match" in refused(with_span(plan, 1, lane=1))
    assert "span of op 'left' does not match" in refused(with_span(plan, 1, op="right"))


def test_the_verdict_says_the_makespan_to_a_millionth() -> None:
    plan = packed()
    for factor, good in ((1 + 5e-7, True), (1 - 5e-7, True), (1 + 2e-6, False), (1 - 2e-6, False)):
        for choice in ("packed", "sequential"):
            times = {"packed_s": 9.0, "sequential_s": 9.0, f"{choice}_s": 4.0 * factor}
            changed = replace(plan, verdict=replace(plan.verdict, choice=choice, **times))  # type: ignore[arg-type]
            if good:
                verify(changed, diamond())
            else:
                assert f"the verdict says {choice} in" in refused(changed)


def test_measured_verdicts_and_sealed_tunings_compare_runs() -> None:
    other = replace(packed(), verdict=Verdict("packed", 3.0, 5.0, 0.1))
    assert "the verdict says" in refused(other)
    verify(replace(other, verdict=replace(other.verdict, kind="measured")), diamond())
    verify(replace(other, timeline=replace(other.timeline, kind="measured")), diamond())
    tuned = replace(other, made_by="autotune: best of three")
    assert "the verdict says" in refused(tuned)
    verify(tuned.sealed(), diamond())
    assert "the verdict says" in refused(other.sealed())
    assert "changed after it was made" in refused(replace(tuned.sealed(), made_by="autotune: other"))


def repeated(count: int) -> Graph:
    b = GraphBuilder("repeated")
    value = b.input("x", (16,), "f32")
    with b.repeat(count) as loop:
        inside = loop.carry(value)
        (made,) = b.op("custom", [inside], [spec("y", (16,), "f32")], WORK, "body")
        value = loop.next(inside, made)
    b.output(value)
    return b.build()


def test_a_period_is_that_of_the_graph_and_sums_to_the_makespan() -> None:
    graph = repeated(3)
    plan = sequential(graph, H100)  # an op a second
    verify(replace(plan, period=Period(3, 1.0, 1.0, 0.0, 1.0)), graph)
    verify(replace(plan, period=Period(3, 0.5, 1.5, 0.5, 1.0)), graph)
    for bad in (Period(3, 1.1, 1.0, 0.0, 1.0), Period(3, 1.0, 0.9, 0.0, 1.0), Period(3, 1.0, 1.0, 0.1, 1.0)):
        assert "the period's parts sum to" in refused(replace(plan, period=bad), graph)
    assert "has a period of 2 iterations; the graph has 3 iterations" in refused(
        replace(plan, period=Period(2, 1.0, 1.0, 1.0, 1.0)), graph
    )
    assert "has a period of 4 iterations; the graph has no repeat" in refused(
        replace(packed(), period=Period(4, 1.0, 1.0, 0.0, 1.0))
    )
    slack = Period(3, 1.0, 1.0 + 2e-6, 0.0, 1.0)
    verify(replace(plan, period=slack), graph)
    assert "parts sum" in refused(replace(plan, period=replace(slack, prologue_s=1.0 + 4e-6)), graph)


def test_numbers_end_below_the_most_seconds() -> None:
    plan = packed()
    check_readable(replace(plan, bounds=Bounds(0, 0, 0, 0, 0, 0), verdict=Verdict("packed", 0, 9e39, 0)))
    for verdict in (Verdict("packed", 1e40, 1, 0), Verdict("packed", 1, 1e40, 0), Verdict("packed", 1, 1, 1e40)):
        with pytest.raises(PlanError, match="the verdict"):
            check_readable(replace(plan, verdict=verdict))
    with pytest.raises(PlanError, match="the bounds"):
        check_readable(replace(plan, bounds=Bounds(0, 0, 0, 0, 0, 1e40)))
    with pytest.raises(PlanError, match="the period"):
        check_readable(replace(plan, period=Period(1, float("nan"), 0.0, 0.0, 1.0)))
    check_readable(replace(plan, arena_bytes=0))
    with pytest.raises(PlanError, match="the arena has -1 bytes"):
        check_readable(replace(plan, arena_bytes=-1))
    check_timeline(Timeline("simulated", "x", (Span("a", 0, 0.0, 9e39), Span("b", 0, 0.0, 0.0))))
    for start, end in ((0.0, 1e40), (-1e-9, 1.0), (2.0, 1.0)):
        with pytest.raises(PlanError, match=re.escape(f"the span of op 'a' is from {start} to {end} s")):
            check_timeline(Timeline("simulated", "x", (Span("a", 0, start, end),)))


# -------------------------------------------------------------------------------------- arena and memory


def test_slots_lie_within_the_arena_and_hold_their_tensors() -> None:
    plan = packed()
    end = max(slot.offset + slot.nbytes for slot in plan.arena)
    verify(replace(plan, arena_bytes=end), diamond())
    assert f"ends beyond the arena's {end - 1} bytes" in refused(replace(plan, arena_bytes=end - 1))
    verify(with_slot(plan, 3, nbytes=64), diamond())
    for change in ({"nbytes": 63}, {"offset": -64}, {"offset": 32}, {"offset": 63}):
        assert "too small or not aligned to 64 bytes" in refused(with_slot(plan, 1, **change))
    assert "each activation once; differs in []" in refused(replace(plan, arena=(*plan.arena, plan.arena[2])))
    assert "differs in ['t_a']" in refused(replace(plan, arena=plan.arena[1:]))
    assert "differs in ['t_a', 't_left', 't_right']" in refused(replace(plan, arena=plan.arena[3:]))


def roomy() -> tuple[Graph, Plan]:
    """Three ops on two lanes: inputs of 64 bytes, a weight of 128, a state of 256, an output of 512 that is given
    twice, and workspaces of 100, 300 (one lane) and 50 (the other)."""
    b = GraphBuilder("roomy")
    x, w, s = b.input("x", (16,), "f32"), b.weight("w", (32,), "f32"), b.state("s", (64,), "f32")
    (a,) = b.op("custom", [x, w], [spec("a", (16,), "f32")], WORK, "one", Demand(workspace_bytes=100))
    (c,) = b.op("custom", [a, s], [spec("c", (16,), "f32")], WORK, "two", Demand(workspace_bytes=300))
    (d,) = b.op("custom", [c], [spec("d", (128,), "f32")], WORK, "three", Demand(workspace_bytes=50))
    b.output(d, x)
    graph = b.build()
    plan = sequential(graph, H100)
    steps = (Step("one", 0), Step("two", 0), Step("three", 1, (1,)))
    return graph, replace(
        plan, lanes=(Lane(0, 0), Lane(0, 0)), steps=steps, arena_bytes=1024,
        timeline=replace(plan.timeline, spans=tuple(Span(s.op, s.lane, i, i + 1.0) for i, s in enumerate(steps))),
    )  # fmt: skip


def test_all_that_is_resident_counts_and_the_last_byte_fits() -> None:
    graph, plan = roomy()
    held = 64 + 128 + 256 + 512 + 1024 + (300 + 50)
    assert resident_bytes(plan, graph) == held
    assert resident_bytes(replace(plan, arena_bytes=2048), graph) == held + 1024
    verify(replace(plan, device=replace(plan.device, memory_bytes=held)), graph)
    tight = replace(plan, device=replace(plan.device, memory_bytes=held - 3))
    assert f"keeps {held} bytes (weights, states, arena, workspace), 3 more than h100_sxm has" in refused(tight, graph)
    verify(tight, graph, memory=False)


@pytest.mark.parametrize(("offset", "shared"), [(0, True), (64, True), (128, True), (192, False)])
def test_what_a_smaller_tensor_left_of_a_larger_ones_bytes_is_still_the_larger_ones(offset: int, shared: bool) -> None:
    """a had bytes 0 to 192 and b took the middle of them; c, on another lane, may overlap a in time and take none."""
    b = GraphBuilder("remains")
    x = b.input("x", (16,), "f32")
    made = [b.op("custom", [x], [spec(f"t_{name}", (16,), "f32")], WORK, name)[0] for name in "abc"]
    b.output(*b.op("custom", made[1:], [spec("out", (16,), "f32")], WORK, "last"))
    graph = b.build()
    steps = (Step("a", 0), Step("b", 0), Step("c", 1), Step("last", 0, (2,)))
    times = ((0, 1), (1, 2), (1, 2), (2, 3))
    spans = tuple(Span(s.op, s.lane, float(t), float(u)) for s, (t, u) in zip(steps, times, strict=True))
    plan = replace(
        sequential(graph, H100), lanes=(Lane(0, 0), Lane(0, 0)), steps=steps, arena_bytes=256,
        arena=(Slot("t_a", 0, 192), Slot("t_b", 64, 64), Slot("t_c", offset, 64)),
        timeline=Timeline("simulated", "hand", spans), verdict=Verdict("packed", 3.0, 4.0, 0.1),
    )  # fmt: skip
    if shared:
        assert f"tensors 't_{'b' if offset == 64 else 'a'}' and 't_c' share arena bytes" in refused(plan, graph)
    else:
        verify(plan, graph)
    if offset != 64:
        verify(with_step(plan, 2, waits=(0,)), graph)


# ------------------------------------------------------------------------------------------ collectives


def reduced(ranks: int) -> tuple[Graph, Plan]:
    """Three collectives beside each other: the first on lane 0, the others on lane 1."""
    b = GraphBuilder("reduced")
    x = b.input("x", (16, 16), "f32")
    b.output(*(ops.all_reduce(x, ranks=ranks, name=f"c{i}") for i in range(3)), ops.add(x, x, name="sum"))
    graph = b.build()
    steps = (Step("c0", 0), Step("sum", 1), Step("c1", 1), Step("c2", 1))
    return graph, replace(sequential(graph, H100), lanes=(Lane(0, 0), Lane(0, 0)), steps=steps)


def test_collectives_of_several_ranks_run_one_after_another() -> None:
    graph, plan = reduced(2)
    with pytest.raises(PlanError, match="collectives 'c0' and 'c1' may run at the same time"):
        collectives_in_order(plan, graph)
    collectives_in_order(with_step(plan, 2, waits=(0,)), graph)
    collectives_in_order(with_step(plan, 1, waits=(0,)), graph)
    with pytest.raises(PlanError, match="'c1' and 'c2'"):
        collectives_in_order(with_step(with_step(plan, 2, waits=(0,)), 3, lane=0), graph)
    collectives_in_order(*reversed(reduced(1)))  # one rank issues as it likes


# -------------------------------------------------------------------------------- against all pairs


def ended_before(plan: Plan) -> list[set[int]]:
    """For every step those that have ended when it starts: earlier ones of its lane, those it waits for, and theirs."""
    found: list[set[int]] = []
    for i, step in enumerate(plan.steps):
        direct = {j for j in range(i) if plan.steps[j].lane == step.lane} | set(step.waits)
        found.append(direct.union(*(found[j] for j in direct)))
    return found


def first_wrong(plan: Plan, graph: Graph) -> str:
    """What the first broken rule says, by looking at all pairs of steps and of tensors; "" for none."""
    ended = ended_before(plan)
    where = {step.op: i for i, step in enumerate(plan.steps)}
    for op, before in zip(graph.ops, graph.predecessors(), strict=True):
        if any(where[graph.ops[p].name] not in ended[where[op.name]] for p in before):
            return "no wait orders them"
    for i, later in enumerate(plan.steps):
        for j in range(i):
            one, two = plan.lanes[later.lane], plan.lanes[plan.steps[j].lane]
            a, b = plan.partition(later.lane), plan.partition(plan.steps[j].lane)
            apart = a.end_sm <= b.first_sm or b.end_sm <= a.first_sm
            if one.geometry != two.geometry and not apart and j not in ended[i]:
                return "of another geometry"
    used: dict[str, list[int]] = {}
    for i, step in enumerate(plan.steps):
        op = next(op for op in graph.ops if op.name == step.op)
        for name in (*op.outputs, *op.inputs):
            used.setdefault(name, []).append(i)
    for a in plan.arena:
        for b in plan.arena:
            shared = a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
            first, last = used[a.tensor], used[b.tensor][0]
            if a != b and shared and first[0] < last and not set(first) <= ended[last]:
                return "share arena bytes"
    return ""


LAYOUTS: tuple[tuple[tuple[Geometry, ...], tuple[Lane, ...]], ...] = (
    ((Geometry.of(64, 64),), (Lane(0, 0), Lane(0, 1), Lane(0, 0))),
    ((Geometry.of(64, 64), Geometry.of(132)), (Lane(0, 0), Lane(0, 1), Lane(1, 0))),
    ((Geometry.of(64, 64), Geometry((Partition(64, 64), Partition(0, 64)))), (Lane(0, 0), Lane(1, 0), Lane(1, 1))),
)


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.sampled_from(LAYOUTS), st.booleans(), st.sampled_from([0.0, 0.6, 1.0]))
def test_a_plan_passes_just_when_no_pair_of_steps_or_tensors_is_wrong(
    rng: random.Random, layout: tuple[tuple[Geometry, ...], tuple[Lane, ...]], equal: bool, waits: float
) -> None:
    """Random chains on random lanes with some of the waits that they need, and tensors anywhere in a small arena:
    all of one size in places of their own, or of any sizes that overlap in part."""
    geometries, lanes = layout
    b = GraphBuilder("random")
    values = [b.input("x", (16,), "f32")]
    for i in range(rng.randint(3, 8)):
        inputs = rng.sample(values[-4:], min(len(values), rng.randint(1, 2)))
        values.append(b.op("custom", inputs, [spec(f"t{i}", (16,), "f32")], WORK, f"op{i}")[0])
    b.output(values[-1])
    graph = b.build()
    steps: list[Step] = []
    for i, before in enumerate(graph.predecessors()):
        lane = rng.randrange(len(lanes))
        others = [j for j in range(i) if steps[j].lane != lane]
        wanted = {p for p in before if p in others} | {j for j in others if rng.random() < 0.15}
        steps.append(Step(f"op{i}", lane, tuple(sorted(p for p in wanted if rng.random() < waits or p in before))))
    slots = [
        Slot(f"t{i}", 64 * rng.randrange(5), 64 if equal else 64 * rng.randint(1, 3)) for i in range(len(steps) - 1)
    ]
    lost = [i for i, step in enumerate(steps) if step.waits]
    if lost and waits == 0.6:
        i = rng.choice(lost)
        steps[i] = replace(steps[i], waits=())
    n = float(len(steps))
    plan = replace(
        sequential(graph, H100), geometries=geometries, lanes=lanes, steps=tuple(steps), arena=tuple(slots),
        arena_bytes=64 * 7, verdict=Verdict("packed", n, n, 0.1),
        timeline=Timeline("simulated", "hand", tuple(Span(s.op, s.lane, i, i + 1.0) for i, s in enumerate(steps))),
    )  # fmt: skip
    wrong = first_wrong(plan, graph)
    if wrong:
        assert wrong in refused(plan, graph)
    else:
        verify(plan, graph)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=30))
def test_claims_are_those_of_every_byte(ranges: list[tuple[int, int]]) -> None:
    claims, owner = Claims(), [""] * 64
    for i, (start, size) in enumerate(ranges):
        had = {who for who in owner[start : start + size] if who}
        assert set(claims.take(start, start + size, str(i))) == had
        owner[start : start + size] = [str(i)] * size
