"""The search: slices, layouts and fixed orders. Whatever it finds is a legal plan that the one clock agrees with."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.errors import GraphError
from taskgraph.graph.split import Split
from taskgraph.models import paged
from taskgraph.models.config import load_config
from taskgraph.rewrite.nanobatch import apply, splittable
from taskgraph.schedule.planner import candidate, replay_times
from taskgraph.schedule.problem import Budget, make_problem
from taskgraph.schedule.sliced import sliced
from taskgraph.schedule.solve import cycles, explore
from taskgraph.schedule.solve.annealing import search_layouts, starts
from tests.strategies import devices, graphs

LAYERS = 80
SLOW = tg.devices.make(
    "a100_sxm", name="slow", flops_per_s={"f32": 5e10, "bf16": 5e10}, hbm_bytes_per_s=1e10, calibration=""
)
"""So slow that small tensors take long beside a launch."""


def layered(layers: int, batch: int = 256, width: int = 64) -> tg.Graph:
    """A chain of layers, each a product bound by arithmetic and a custom op bound by memory: only slices overlap."""
    b = tg.GraphBuilder("layered")
    x, w = b.input("x", (batch, width), "f32"), b.weight("w", (width, width), "f32")
    with b.repeat(layers, "layer") as loop:
        h = loop.carry(x)
        up = tg.ops.gemm(h, w, name="up")
        nbytes = 2 * 4 * batch * width
        (mixed,) = b.op(
            ("call", {"function": "tests.schedule.test_search:halve", "split_axes": (0,)}), [up],
            [tg.spec("mixed", (batch, width), "f32")], tg.Work(flops=1.0, hbm_bytes=3.0 * nbytes),
            "mix",
        )  # fmt: skip
        out = loop.next(h, mixed)
    b.output(out)
    return b.build()


def halve(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(x, 0.5, out=out)


@settings(max_examples=25, deadline=None)
@given(graphs(max_ops=6), devices(), st.integers(0, 3))
def test_whatever_a_search_finds_is_a_plan(graph: tg.Graph, device: tg.Device, seed: int) -> None:
    plan = tg.plan(graph, device, "search", budget_s=0.01, seed=seed)
    tg.verify(plan, graph, memory=False)
    assert tg.Plan.from_json(plan.to_json()) == plan
    again = {s.op: (s.start_s, s.end_s) for s in replay_times(graph, plan).spans}
    for span in plan.timeline.spans:
        assert again[span.op] == pytest.approx((span.start_s, span.end_s), rel=1e-9, abs=1e-15)
    assert plan == tg.plan(graph, device, "search", budget_s=0.01, seed=seed)


def test_slices_are_chosen_where_only_they_overlap() -> None:
    graph = layered(LAYERS)
    whole = candidate(graph, SLOW, "search", Budget(0.3, nano_batches=False))
    plan = candidate(graph, SLOW, "search", Budget(0.3))
    assert plan.split.parts and not whole.split.parts
    assert plan.makespan_s < 0.9 * whole.makespan_s
    assert plan.graph == graph.fingerprint != sliced(plan, graph).fingerprint
    assert sliced(plan, sliced(plan, graph)) == sliced(plan, graph)


def test_a_sliced_plan_computes_what_the_graph_does() -> None:
    graph = layered(3)
    sliced = candidate(graph, SLOW, "search", Budget(0.3))
    assert sliced.split.parts
    torch.manual_seed(0)
    tensors = {"x": torch.randn(256, 64), "w": torch.randn(64, 64) / 8}
    with tg.compile(graph, sliced) as exe:
        (found,) = exe(tensors).values()
    with tg.compile(graph, tg.plan(graph, scheduler="sequential")) as exe:
        (wanted,) = exe(tensors).values()
    torch.testing.assert_close(found, wanted)
    with tg.compile(graph, sliced, "sim") as simulated:
        assert simulated.timeline().makespan_s == pytest.approx(sliced.makespan_s)


def test_a_period_is_near_the_least_one() -> None:
    """No period can be shorter than a layer's area, nor than one slice's chain; and the whole is made of it."""
    graph = layered(LAYERS)
    plan = candidate(graph, SLOW, "search", Budget(1.0))
    period = plan.period
    assert period is not None and period.count == LAYERS
    assert plan.makespan_s == pytest.approx(period.prologue_s + (LAYERS - 1) * period.seconds + period.epilogue_s)
    bound = max(plan.bounds.sm_s, plan.bounds.hbm_s, plan.bounds.chain_s) / LAYERS
    assert bound * (1 - 1 / LAYERS) <= period.seconds <= 1.02 * bound
    assert period.overlap > 1.0


@pytest.mark.parametrize("sizes", [(128, 128), (96, 160), (64, 96, 96)])
def test_places_of_a_cycle_keep_every_dependency(sizes: tuple[int, ...]) -> None:
    graph = apply(layered(LAYERS), Split.of(sizes))
    space = explore._space(graph, make_problem(graph, SLOW), explore.WINDOW)
    layout = search_layouts(SLOW)[0]
    cycle = cycles.plain_cycle(space, layout, starts(space, layout)[0])
    best = cycles.polish(space, layout, [cycle], 0.05, 0)
    at = space.iteration + best.place[space.decision]
    before = np.repeat(np.arange(space.problem.n), np.diff(space.problem.succ_ptr))
    assert (at[before] < at[space.problem.succ]).all()
    assert best.seconds <= cycles.polish(space, layout, [cycle], 0.0, 0).seconds


def test_a_cycle_that_no_window_shows_stays_what_it_is() -> None:
    """Its clock never runs, so there is no period to take places from."""
    graph = apply(layered(LAYERS), Split.of((128, 128)))
    space = explore._space(graph, make_problem(graph, SLOW), explore.WINDOW)
    layout = search_layouts(SLOW)[0]
    cycle = cycles.plain_cycle(space, layout, starts(space, layout)[0])
    far = cycles.polish(space, layout, [replace(cycle, place=1e3 * cycle.place)], 0.05, 0)
    assert far.seconds == np.inf


def test_a_step_whose_kernels_all_fill_the_device_stays_sequential() -> None:
    """Decode rows attend to their pages beside the products of prompts: sliced, they overlap, and yet both GPUs that
    were measured ran such plans at 0.97x to 1.04x. What a search finds lies within the band, and so is not taken."""
    graph = paged.step_graph(load_config("llama-3-8b"), paged.Bucket(384, 1280, 3), paged.PageShape(4000, 16, 4096))
    plan = tg.plan(graph, "h100_sxm", "search", budget_s=2.0)
    found = candidate(graph, tg.devices.get("h100_sxm"), "search", Budget(2.0))
    assert plan.verdict.choice == "sequential" and plan.makespan_s == pytest.approx(plan.verdict.sequential_s)
    assert found.makespan_s <= plan.verdict.packed_s * (1 + 1e-9) and found.verdict.sure_gain < 1.0


def test_a_repeat_that_only_moves_rows_is_not_emptied() -> None:
    b = tg.GraphBuilder("rotate")
    x = b.input("x", (8, 4), "f32")
    twice = tg.ops.add(x, x, name="twice")
    with b.repeat(3, "turn") as loop:
        h = loop.carry(twice)
        low, high = tg.ops.slice_rows(h, 0, 4, 1, name="low"), tg.ops.slice_rows(h, 4, 8, 1, name="high")
        out = loop.next(h, tg.ops.concat_rows([high, low], name="turned"))
    b.output(tg.ops.add(out, out, name="end"))
    graph = b.build()
    assert apply(graph, Split.of((4, 4))) is graph
    assert splittable(graph) == {} and explore.slicings(graph) == []
    with pytest.raises(GraphError, match=r"'twice' cannot be split: repeat 'turn'.*only moves rows"):
        apply(graph, Split.of((4, 4), ["twice"]))
    tg.verify(tg.plan(graph, "h100_sxm"), graph)


def test_slicings_sum_to_the_batch_and_are_multiples() -> None:
    found = explore.slicings(layered(2, batch=2048))
    sizes = [made.parts[0][1] for made in found]
    assert len(sizes) > 4 and all(sum(each) == 2048 and all(n % 128 == 0 for n in each) for each in sizes)
    assert {len(each) for each in sizes} == {2, 3, 4}
    assert explore.slicings(layered(2, batch=1)) == []
