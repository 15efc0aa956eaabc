"""The exact scheduler: its plans keep every rule, its bounds hold for every schedule that brute force finds."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from benchmarks.schedule import layered_graph
from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Work, spec
from taskgraph.schedule.evaluate import Evaluation, Layout, dispatch, evaluate
from taskgraph.schedule.planner import plan
from taskgraph.schedule.problem import Problem, make_problem
from taskgraph.schedule.rcpsp import exact
from taskgraph.schedule.solve import found, lists, proof
from tests.strategies import devices, graphs

H100 = specs.get("h100_sxm")
SIZES = (32, 64, 132)


def schedules(problem: Problem, sm_count: int) -> Iterator[Evaluation]:
    """Every order of the ops by every choice of modes, eager and within the device."""
    n = problem.n
    layout, row = Layout.shared(sm_count, n), np.zeros(n, np.int64)
    for order in permutations(range(n)):
        for mode in product(range(len(problem.sizes)), repeat=n):
            for limit in (1.0, np.inf):
                priority = np.array(order, np.float64)
                yield dispatch(problem, layout, priority, np.array(mode), row, (limit, limit))[1]


@pytest.mark.parametrize(("nodes", "width", "seed"), [(4, 2, 1), (4, 3, 3)])
def test_brute_force_stays_above_the_bound_and_is_not_better_than_exact(nodes: int, width: int, seed: int) -> None:
    graph = layered_graph(nodes, width, seed)
    problem = make_problem(graph, H100, SIZES)
    best = min(schedules(problem, H100.sm_count), key=lambda times: times.makespan_s)
    bound_s, _ = proof.proven_bound(problem, best, 20.0)
    assert 0.9 * best.makespan_s < bound_s <= best.makespan_s
    made = plan(graph, H100, "exact", budget_s=1.0)
    tg.verify(made, graph)
    assert made.makespan_s <= best.makespan_s * 1.001


@settings(max_examples=20, deadline=None)
@given(graphs(max_ops=5, repeats=False), devices(), st.integers(0, 2**32))
def test_the_bound_holds_for_plans_of_every_kind(graph: Graph, device: Device, seed: int) -> None:
    sizes = device.partition_sizes()
    problem = make_problem(graph, device, sizes)
    made = [evaluate(problem, found.sequential(problem))]
    packed = [lists.pack(problem, layout) for layout in lists.layouts(device)]
    made += [evaluate(problem, each) for each in packed if each is not None]
    draw = np.random.default_rng(seed)
    for layout in lists.layouts(device):
        row = draw.integers(len(layout.table), size=problem.n)
        mode = draw.integers(np.searchsorted(problem.sizes, layout.table[row, 2]) + 1)
        made.append(dispatch(problem, layout, draw.random(problem.n), mode, row, (np.inf, np.inf))[1])
    for known in (made[0], min(made, key=lambda times: times.makespan_s)):
        bound_s, _ = proof.proven_bound(problem, known, 2.0)
        assert bound_s <= min(times.makespan_s for times in made)


@settings(max_examples=8, deadline=None)
@given(graphs(max_ops=4), devices())
def test_exact_plans_keep_the_rules_and_are_no_longer_than_the_others(graph: Graph, device: Device) -> None:
    made = plan(graph, device, "exact", budget_s=0.2)
    tg.verify(made, graph)
    assert made.made_by.startswith("exact: ")
    assert made.bounds.proved_s <= made.makespan_s
    assert made.gap == made.makespan_s / max(made.bounds.best_s, made.bounds.proved_s)
    assert made.makespan_s <= plan(graph, device, "list").makespan_s
    assert made.makespan_s <= plan(graph, device, "search", budget_s=0.1).makespan_s * 1.0001
    assert tg.Plan.from_json(made.to_json()) == made


def pair(*works: Work) -> Graph:
    b = GraphBuilder("pair")
    x = b.input("x", (4,), "f32")
    for i, work in enumerate(works):
        b.output(*b.op("custom", [x], [spec(f"o{i}", (4,), "f32")], work, f"op{i}"))
    return b.build()


def test_a_proof_binds_where_chain_and_areas_do_not() -> None:
    """Two chains, each of arithmetic and then a copy: all bounds but the proven one ignore that a copy path idles
    while both of its users compute."""
    b = GraphBuilder("two-chains")
    x = b.input("x", (4,), "f32")
    for i in range(2):
        (y,) = b.op("custom", [x], [spec(f"y{i}", (4,), "f32")], Work(flops=2e11), f"compute{i}")
        b.output(*b.op("custom", [y], [spec(f"z{i}", (4,), "f32")], Work(h2d_bytes=2e8), f"copy{i}"))
    plain = specs.make("h100_sxm", calibration="", name="plain")
    made = plan(b.build(), plain, "exact", budget_s=2.0)
    tg.verify(made, b.build())
    others = max(made.bounds.chain_s, made.bounds.sm_s, made.bounds.h2d_s)
    assert made.bounds.binding == "proved"
    assert others * 1.1 < made.bounds.proved_s
    assert made.gap < 1.01
    assert "proved" in tg.explain(made)
    assert "proved" not in tg.explain(plan(b.build(), plain, "list"))


def test_exact_refuses_large_graphs() -> None:
    with pytest.raises(PlanError, match=r"at most 40 ops.*has 41.*search"):
        plan(layered_graph(41, 3, 0), H100, "exact")


def test_exact_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "available", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"taskgraph-gpu\[exact\]"):
        plan(pair(Work(flops=1e12)), H100, "exact")
    assert exact.available()


def test_plans_of_before_the_proof_still_load() -> None:
    text = plan(pair(Work(flops=1e12)), H100).to_json()
    assert '"proved_s": 0.0, ' in text
    assert tg.Plan.from_json(text.replace('"proved_s": 0.0, ', "")).bounds.proved_s == 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_every_mode_has_a_class_that_is_no_worse(seed: int, modes: int) -> None:
    """Otherwise the bound would hold only for the modes that the classes stand for."""
    draw = np.random.default_rng(seed)
    problem = make_problem(pair(Work(flops=1e12)), H100, H100.partition_sizes()[:modes])
    seconds = draw.integers(1, 6, problem.seconds.shape).astype(np.float64)
    use = draw.integers(0, 6, problem.use.shape).astype(np.float64)
    made = proof._classes(replace(problem, seconds=seconds, use=use), 0)
    area = use[0] * seconds[0][:, None]
    for k in np.flatnonzero(problem.legal[0]).tolist():
        covers = (made.seconds <= seconds[0, k]) & (made.area <= area[k] * (1 + 1e-9)).all(axis=1)
        assert covers.any()
