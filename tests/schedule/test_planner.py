"""Plans of random graphs hold every rule and bound; the evaluator agrees with closed forms; plans never drift."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from benchmarks.schedule import layered_graph
from taskgraph.cost.model import predict
from taskgraph.errors import DemandError, PlanError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device, Geometry
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Demand, Work, spec
from taskgraph.models.config import load_config
from taskgraph.models.llama import step_graph
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Evaluation, Layout, dispatch, evaluate
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import candidate, plan, plan_from, replay_times
from taskgraph.schedule.problem import Budget, make_problem
from taskgraph.schedule.solve import SCHEDULERS, found, lists, rules
from taskgraph.schedule.solve.packing import LARGE
from tests.strategies import devices, graphs

DEVICES = st.one_of(devices(), st.sampled_from([specs.get("a100_sxm"), specs.get("h100_sxm")]))


def independent(*works: Work, demands: tuple[Demand | None, ...] = ()) -> Graph:
    """Ops "op0", "op1", ... without edges."""
    b = GraphBuilder("independent")
    x = b.input("x", (4,), "f32")
    pinned = demands or (None,) * len(works)
    for i, (work, demand) in enumerate(zip(works, pinned, strict=True)):
        b.output(*b.op("custom", [x], [spec(f"o{i}", (4,), "f32")], work, f"op{i}", demand))
    return b.build()


# ------------------------------------------------------------------------------------ random graphs


REPEATABLE = [name for name in SCHEDULERS.names() if name != "exact"]
BRIEF = 1e-3
"""Seconds of search in a test: a few trials, far below what the clock would cut short."""


@settings(max_examples=50, deadline=None)
@given(graphs(), DEVICES)
def test_every_plan_keeps_the_rules_and_the_bounds(graph: Graph, device: Device) -> None:
    made = {scheduler: plan(graph, device, scheduler, budget_s=BRIEF) for scheduler in REPEATABLE}
    for scheduler, p in made.items():
        tg.verify(p, graph)
        assert p.bounds.best_s <= p.makespan_s * (1 + 1e-9)
        assert Plan.from_json(p.to_json()) == p
        assert p.graph == graph.fingerprint
        assert p.made_by.startswith(scheduler)
        assert plan(graph, device, scheduler, budget_s=BRIEF) == p
        again = replay_times(graph, p)
        assert [(s.op, s.lane) for s in again.spans] == [(s.op, s.lane) for s in p.timeline.spans]
        for one, two in zip(again.spans, p.timeline.spans, strict=True):
            assert one.start_s == pytest.approx(two.start_s, rel=1e-9, abs=1e-15)
            assert one.end_s == pytest.approx(two.end_s, rel=1e-9, abs=1e-15)
    assert made["auto"].makespan_s <= made["sequential"].makespan_s
    verdict = made["auto"].verdict
    assert made["auto"].makespan_s == (verdict.packed_s if verdict.choice == "packed" else verdict.sequential_s)
    alone = sum(predict(op, graph.flat(), device).seconds for op in graph.flat().ops)
    assert made["sequential"].makespan_s == pytest.approx(alone, rel=1e-9)
    assert made["sequential"].verdict.choice == "sequential"
    assert len(made["sequential"].lanes) == 1


# ---------------------------------------------------------------------- the evaluator, in closed form

PLAIN = specs.make(
    "h100_sxm", name="plain", calibration="", sm_count=64, launch_seconds=0.0, hbm_bytes_per_s=1e12,
    sm_hbm_bytes_per_s=1e12, h2d_bytes_per_s=1e10, flops_per_s=(("f32", 1e14),),
)  # fmt: skip
PLAIN_SWITCHING = replace(PLAIN, switch_seconds=0.125)
SECOND_OF_BYTES, SECOND_OF_FLOPS = Work(hbm_bytes=1e12), Work(flops=1e14)


def run(graph: Graph, sizes: tuple[int, ...], partition: list[int], device: Device = PLAIN) -> Evaluation:
    """Op i on a lane of its own, in partition[i] of partitions of the given sizes."""
    modes = tuple(sorted(set(sizes)))
    layout = Layout((Geometry.of(*sizes),), (tuple(partition.count(p) for p in range(len(sizes))),))
    lane = np.argsort(np.argsort(partition, kind="stable"), kind="stable")
    mode = np.array([modes.index(sizes[p]) for p in partition])
    chosen = Assignment(layout, np.arange(len(partition)), lane, mode, NO_HOLDS)
    return evaluate(make_problem(graph, device, modes), chosen, True)


def test_one_op_alone_takes_its_isolated_time_after_its_launch() -> None:
    slow = replace(PLAIN, launch_seconds=0.25)
    times = run(independent(Work(flops=2e14, hbm_bytes=1e12)), (64,), [0], slow)
    assert times.end_s[0] == pytest.approx(2.25, rel=1e-12)
    assert times.start_s[0] == 0.0


@pytest.mark.parametrize(("sizes", "partition"), [((64,), [0, 0]), ((32, 32), [0, 1])])
def test_two_memory_bound_ops_share_hbm(sizes: tuple[int, ...], partition: list[int]) -> None:
    times = run(independent(SECOND_OF_BYTES, SECOND_OF_BYTES), sizes, partition)
    assert times.end_s == pytest.approx([2.0, 2.0], rel=1e-12)
    assert times.trace[0, 2] == pytest.approx(1.0)


def test_compute_and_memory_overlap_in_one_partition() -> None:
    times = run(independent(SECOND_OF_FLOPS, SECOND_OF_BYTES), (64,), [0, 0])
    # The memory-bound op draws through 1 of the 64 SMs, so the other one computes on 63 until that has ended.
    assert times.end_s == pytest.approx([1.0 + 1 / 64, 1.0], rel=1e-12)
    assert times.trace[0, 1:3] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("sizes", "partition"), [((64,), [0, 0]), ((32, 32), [0, 1])])
def test_two_compute_bound_ops_tie_with_serial(sizes: tuple[int, ...], partition: list[int]) -> None:
    assert run(independent(SECOND_OF_FLOPS, SECOND_OF_FLOPS), sizes, partition).makespan_s == pytest.approx(2.0)


def test_an_op_on_a_quarter_of_the_sms_computes_at_a_quarter_of_the_rate() -> None:
    assert run(independent(SECOND_OF_FLOPS), (16,), [0]).makespan_s == pytest.approx(4.0)


def test_sms_limit_the_bandwidth_that_a_partition_draws() -> None:
    thin = replace(PLAIN, sm_hbm_bytes_per_s=1e12 / 32)
    assert run(independent(SECOND_OF_BYTES), (16,), [0], thin).makespan_s == pytest.approx(2.0)
    both = run(independent(SECOND_OF_BYTES, SECOND_OF_BYTES), (16,), [0, 0], thin)
    assert both.makespan_s == pytest.approx(4.0)


def test_max_min_fair_share_of_three_unequal_demands() -> None:
    """Rates 0.2, 0.5, 1.0 of hbm are wanted; fair shares are 0.2, 0.4, 0.4 until the small one ends."""
    rates = (0.2e12, 0.5e12, 1e12)
    demands = tuple(Demand(hbm_bytes_per_s=rate) for rate in rates)
    times = run(independent(*[SECOND_OF_BYTES * 0.2] * 3, demands=demands), (64,), [0, 0, 0])
    # Both large ones run at 0.4 and end at 0.5 s having moved 0.2; the small one at 0.2 all along ends at 1 s.
    assert times.end_s == pytest.approx([1.0, 0.5, 0.5], rel=1e-12)
    times = run(independent(*[SECOND_OF_BYTES * w for w in (0.1, 0.4, 0.4)], demands=demands), (64,), [0, 0, 0])
    # After 0.5 s 0.2 of each large one is left: 0.5 each from then on.
    assert times.end_s == pytest.approx([0.5, 0.9, 0.9], rel=1e-12)


def test_copies_in_two_directions_do_not_contend() -> None:
    up, down = Work(h2d_bytes=1e10), Work(d2h_bytes=PLAIN.d2h_bytes_per_s)
    assert run(independent(up, down), (64,), [0, 0]).makespan_s == pytest.approx(1.0)
    assert run(independent(up, up), (64,), [0, 0]).makespan_s == pytest.approx(2.0)


def test_a_lane_waits_for_another() -> None:
    b = GraphBuilder("pair")
    x = b.input("x", (4,), "f32")
    (y,) = b.op("custom", [x], [spec("y", (4,), "f32")], SECOND_OF_FLOPS, "first")
    b.output(*b.op("custom", [y], [spec("z", (4,), "f32")], SECOND_OF_BYTES, "second"))
    times = run(b.build(), (64,), [0, 0])
    assert times.start_s == pytest.approx([0.0, 1.0])
    assert times.end_s == pytest.approx([1.0, 2.0])


LAYOUTS = (
    Layout.shared(64, 3),
    Layout.isolated(Geometry.of(32, 32)),
    Layout.isolated(Geometry.of(64), Geometry.of(40, 24)),
    Layout((Geometry.of(64), Geometry.of(16, 48)), ((2,), (1, 2))),
)


@settings(max_examples=60, deadline=None)
@given(graphs(repeats=False), st.sampled_from(LAYOUTS), st.integers(0, 2**32), st.booleans(), st.floats(1.0, 4.0))
def test_what_dispatch_decides_takes_the_times_that_it_saw(
    graph: Graph, layout: Layout, seed: int, backfill: bool, oversubscribe: float
) -> None:
    """Any priorities, modes and partitions give an assignment of every op whose evaluation agrees."""
    draw = np.random.default_rng(seed)
    problem = make_problem(graph, PLAIN_SWITCHING, (8, 16, 24, 32, 40, 48, 64))
    partition = draw.integers(len(layout.table), size=problem.n)
    room = np.searchsorted(problem.sizes, layout.table[partition, 2])
    mode = draw.integers(room + 1)
    chosen, seen = dispatch(
        problem, layout, draw.random(problem.n), mode, partition, (oversubscribe, 5 - oversubscribe), backfill
    )
    again = evaluate(problem, chosen)
    assert again.start_s == pytest.approx(seen.start_s, rel=1e-9, abs=1e-12)
    assert again.end_s == pytest.approx(seen.end_s, rel=1e-9, abs=1e-12)
    assert sorted(chosen.order.tolist()) == list(range(problem.n))
    for i, preds in enumerate(graph.predecessors()):
        assert all(seen.end_s[p] <= seen.start_s[i] + 1e-12 for p in preds)


def test_a_change_of_geometry_waits_for_all_lanes_and_costs_what_the_device_says() -> None:
    graph = independent(SECOND_OF_FLOPS, SECOND_OF_FLOPS * 0.5, SECOND_OF_FLOPS * 0.5)
    problem = make_problem(graph, PLAIN_SWITCHING, (32, 64))
    layout = Layout.isolated(Geometry.of(64), Geometry.of(32, 32))
    partition, mode = np.array([0, 1, 2]), np.array([1, 0, 0])
    _, times = dispatch(problem, layout, np.array([3.0, 2.0, 1.0]), mode, partition)
    assert times.start_s == pytest.approx([0.0, 1.0, 1.0])
    assert times.end_s == pytest.approx([1.0, 2.125, 2.125])


def test_lanes_that_wait_for_each_other_for_ever() -> None:
    b = GraphBuilder("stuck")
    x = b.input("x", (4,), "f32")
    (y,) = b.op("custom", [x], [spec("y", (4,), "f32")], SECOND_OF_FLOPS, "first")
    b.output(*b.op("custom", [y], [spec("z", (4,), "f32")], SECOND_OF_BYTES, "second"))
    problem = make_problem(b.build(), PLAIN)
    backwards = replace(found.sequential(problem), order=np.array([1, 0]))
    with pytest.raises(PlanError, match="never start"):
        evaluate(problem, backwards)


def test_packing_wins_where_resources_differ_and_not_where_they_are_the_same() -> None:
    mixed = plan(independent(SECOND_OF_FLOPS, SECOND_OF_BYTES), PLAIN)
    assert mixed.verdict.choice == "packed"
    assert mixed.makespan_s == pytest.approx(1.0 + 1 / 64)
    assert mixed.gap == pytest.approx(1.0)
    same = plan(independent(SECOND_OF_BYTES, SECOND_OF_BYTES), PLAIN)
    assert same.verdict.choice == "sequential"
    assert same.bounds.binding == "hbm"


def test_list_keeps_every_op_in_a_partition_that_is_large_enough() -> None:
    demands = tuple(Demand(sm=(low, 64)) for low in (1, 40, 64))
    p = plan(independent(*[SECOND_OF_FLOPS] * 3, demands=demands), PLAIN, "list")
    tg.verify(p, independent(*[SECOND_OF_FLOPS] * 3, demands=demands))
    assert all(p.partition(step.lane).sm_count == 64 for step in p.steps if step.op == "op2")


def test_pack_reports_an_op_that_fits_no_partition() -> None:
    problem = make_problem(independent(SECOND_OF_FLOPS, demands=(Demand(sm=(64, 64)),)), PLAIN, (32, 64))
    assert lists.pack(problem, Layout.isolated(Geometry.of(32, 32))) is None


# -------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_demands_that_no_device_can_meet(scheduler: str) -> None:
    with pytest.raises(DemandError, match=r"op0.*200 SMs.*132"):
        plan(independent(SECOND_OF_FLOPS, demands=(Demand(sm=(200, 300)),)), "h100_sxm", scheduler)
    with pytest.raises(DemandError, match=r"op1.*link.*l40s"):
        plan(independent(SECOND_OF_FLOPS, Work(link_bytes=1.0)), "l40s", scheduler)
    with pytest.raises(DemandError, match=r"op0.*workspace"):
        plan(independent(SECOND_OF_FLOPS, demands=(Demand(workspace_bytes=1 << 50),)), "h100_sxm", scheduler)


def test_search_gives_each_op_the_sms_that_it_needs() -> None:
    """The list's lanes take whole partitions; the search finds SM counts with which both ops run at full speed."""
    graph, device = design_page(), specs.get("h100_sxm")
    found = plan(graph, device, "search", budget_s=0.2)
    tg.verify(found, graph)
    assert found.makespan_s <= plan(graph, device, "list").makespan_s
    assert found.gap < 1.01


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan")])
def test_a_search_needs_a_budget(budget_s: float) -> None:
    with pytest.raises(PlanError, match="budget_s"):
        plan(independent(SECOND_OF_FLOPS), PLAIN, "search", budget_s=budget_s)


@pytest.mark.parametrize(
    ("rate", "work"),
    [
        ("hbm", Work(hbm_bytes=1.0)),
        ("pcie", Work(h2d_bytes=1.0)),
        ("pcie", Work(d2h_bytes=1.0)),
        ("link", Work(link_bytes=1.0)),
    ],
)
def test_a_rate_beyond_the_device_is_a_demand_error(rate: str, work: Work) -> None:
    with pytest.raises(DemandError, match=rf"op0.*99 TB/s of {rate}.*h100_sxm has"):
        plan(independent(work, demands=(tg.demand(**{rate: "99TB/s"}),)), "h100_sxm")  # type: ignore[arg-type]


def test_unknown_scheduler() -> None:
    with pytest.raises(PlanError, match=r"magic.*sequential"):
        plan(independent(SECOND_OF_FLOPS), "h100_sxm", "magic")


def test_plan_of_another_graph() -> None:
    one, two = independent(SECOND_OF_FLOPS), independent(SECOND_OF_BYTES)
    with pytest.raises(PlanError, match="graph"):
        tg.verify(plan(one, PLAIN), two)
    with pytest.raises(PlanError, match="graph"):
        tg.compile(two, plan(one, PLAIN), backend="sim")


def _schema(body: dict[str, Any]) -> None:
    body["schema"] = 99


def _no_steps(body: dict[str, Any]) -> None:
    del body["steps"]


def _bad_device(body: dict[str, Any]) -> None:
    body["device"]["hbm_bytes_per_s"] = 0.0


@pytest.mark.parametrize(("spoil", "word"), [(_schema, "schema 99"), (_no_steps, "steps"), (_bad_device, "device")])
def test_plan_files_that_do_not_fit(tmp_path: Path, spoil: Callable[[dict[str, Any]], None], word: str) -> None:
    path = tmp_path / "deep" / "plan.json"
    p = plan(independent(SECOND_OF_FLOPS), PLAIN)
    p.save(path)
    assert Plan.load(path) == p
    assert [f.name for f in path.parent.iterdir()] == ["plan.json"]
    body = json.loads(path.read_text())
    spoil(body)
    path.write_text(json.dumps(body))
    with pytest.raises(PlanError, match=rf"plan\.json.*{word}"):
        Plan.load(path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


def test_missing_plan_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json.*No such file"):
        Plan.load(tmp_path / "none.json")


# -------------------------------------------------------------------------------------------- corpus


def design_page() -> Graph:
    b = GraphBuilder("mixed-step")
    x, w = b.input("x", (2048, 4096), "bf16"), b.weight("w_up", (4096, 14336), "bf16")
    kv, q = b.state("kv", (2, 512, 1024, 8, 128), "bf16"), b.input("q", (512, 32, 128), "bf16")
    up = tg.ops.gemm(x, w, name="up")
    att = tg.ops.decode_attention(q, kv, name="decode")
    page = b.call(
        print, [], [spec("pages", (64, 1 << 20), "u8")], name="page_in", work=Work(h2d_bytes=64 << 20),
        demand=tg.demand(sm=(2, 8), pcie="20GB/s"), after=["up"],
    )  # fmt: skip
    b.output(up, att, page)
    return b.build()


def llama(batch: int, tokens: int) -> Graph:
    return step_graph(load_config("llama-3-8b"), batch=batch, tokens=tokens, cache=1024)


def shaped(a: float, b: float, c: float) -> Graph:
    return independent(Work(flops=a), Work(hbm_bytes=b), Work(d2h_bytes=c), Work(flops=a, hbm_bytes=b))


CORPUS: dict[str, tuple[Callable[[], Graph], str, str, str]] = {
    "decode": (lambda: llama(256, 1), "h100_sxm", "auto", "ca075c80e05f6e59"),
    "decode, list": (lambda: llama(8, 1), "a100_sxm", "list", "92bef4c2a17620e0"),
    "prefill": (lambda: llama(1, 512), "h100_sxm", "auto", "e619725cf2810044"),
    "design page": (design_page, "h100_sxm", "auto", "ee948861e58e0570"),
    "design page, b200": (design_page, "b200_sxm", "list", "e396ff30f5457f9e"),
    "four works": (lambda: shaped(1e12, 1e9, 1e7), "h200_sxm", "list", "131f944bdc7c7829"),
}


def digest(p: Plan) -> str:
    """Every decision, and the times to nine digits (the last ones depend on the compiler)."""
    spans = [(f"{s.start_s:.9e}", f"{s.end_s:.9e}") for s in p.timeline.spans]
    decided = (p.geometries, p.lanes, p.steps, p.arena, p.arena_bytes, p.verdict.choice, p.made_by, spans)
    return hashlib.blake2b(repr(decided).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize("case", CORPUS)
def test_plans_of_the_corpus_do_not_change(case: str) -> None:
    make, device, scheduler, known = CORPUS[case]
    graph = make()
    p = plan(graph, device, scheduler)
    tg.verify(p, graph)
    assert digest(p) == known


def test_the_design_page_is_packed() -> None:
    p = plan(design_page(), "h100_sxm")
    assert p.verdict.choice == "packed"
    assert p.verdict.gain > 1.1


# ----------------------------------------------------------------------------------------- large graphs


@pytest.mark.parametrize(("nodes", "width"), [(2 * rules.FROM, 4), (LARGE, 64)])
def test_large_graphs_keep_the_rules_and_the_search_is_no_worse_than_the_list(nodes: int, width: int) -> None:
    graph = layered_graph(nodes, width, 3)
    listed, found = plan(graph, "h100_sxm", "list"), candidate(graph, specs.get("h100_sxm"), "search", Budget(1.0))
    tg.verify(listed, graph)
    tg.verify(found, graph)
    assert found.made_by.startswith("search: search over rules")
    assert found.bounds.best_s <= found.makespan_s < listed.makespan_s


def test_more_ready_ops_than_may_start_wait_in_order() -> None:
    """All ops are ready at once, far more than the front holds: they start by priority whatever their number."""
    graph = independent(*[SECOND_OF_FLOPS * (1.0 + i / 7) for i in range(300)])
    problem = make_problem(graph, PLAIN, (64,))
    priority = np.random.default_rng(5).integers(0, 40, 300).astype(np.float64)
    chosen, _ = dispatch(problem, Layout.shared(64, 2), priority, np.zeros(300, np.int64), np.zeros(300, np.int64))
    assert chosen.order.tolist() == sorted(range(300), key=lambda i: (-priority[i], i))


def wide_then_large(branches: int) -> Graph:
    """Ops of one core side by side, then one that any number of cores may share."""
    b = GraphBuilder("tree")
    x = b.input("x", (8,), "f32")
    narrow, work = tg.demand(sm=(1, 1)), Work(flops=1e9)
    sides = [
        b.call(print, [x], [spec(f"s{i}", (8,), "f32")], work=work, demand=narrow, name=f"side{i}")
        for i in range(branches)
    ]
    top = b.call(print, sides, [spec("top", (8,), "f32")], work=Work(flops=1e9 * branches), name="top")
    b.output(top)
    return b.build()


@pytest.mark.parametrize("cores", [2, 4])
def test_the_top_of_a_tree_gets_all_cores_while_nothing_else_runs(cores: int) -> None:
    scaling = tuple((s + 1) / cores for s in range(cores))
    device = tg.devices.make("cpu", sm_count=cores, compute_scaling=scaling, name="cores")
    graph = wide_then_large(2 * cores)
    problem = make_problem(graph, device)
    whole = Geometry.of(cores)
    turns = [each for each in lists.layouts(device) if whole in each.geometries and len(each.geometries) == 2]
    assert turns
    for layout in turns:
        made = lists.pack(problem, layout)
        assert made is not None
        p = plan_from(problem, made)
        tg.verify(p, graph)
        top = next(i for i, step in enumerate(p.steps) if step.op == "top")
        assert p.partition(p.steps[top].lane).sm_count == cores
        assert max(s.end_s for s in p.timeline.spans if s.op != "top") <= p.timeline.spans[top].start_s * (1 + 1e-9)
    even = next(each for each in turns if each.geometries[0].sizes == (1,) * cores)
    made = lists.pack(problem, even)
    assert made is not None
    best_s = evaluate(problem, made).makespan_s
    launches = 3 * device.launch_seconds
    assert best_s <= 4 * 1e9 * cores / device.rate("f32") + launches + 1e-4
