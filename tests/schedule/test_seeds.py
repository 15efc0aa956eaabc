"""Where a search begins: placements are legal, and graphs whose best plan is known by hand are found from them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.cost.model import OpTable, op_table
from taskgraph.graph.graph import Graph
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.ops import COLLECTIVES
from taskgraph.rewrite.nanobatch import apply
from taskgraph.schedule.evaluate import Layout, evaluate
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import candidate
from taskgraph.schedule.problem import Budget, Costs, legal_sizes, make_problem
from taskgraph.schedule.solve import cycles, explore, seeds
from taskgraph.schedule.solve.annealing import STATES, Space, bordered, realise, search_layouts, starts
from tests.strategies import devices, graphs

DEVICE = tg.devices.make("h200_sxm", name="plain", calibration="", launch_seconds=1e-9, switch_seconds=1e-9)
LAYERS = 6


def space_of(graph: Graph, device: tg.Device) -> Space:
    problem = make_problem(graph, device)
    return explore._space(graph, problem.on(legal_sizes(problem.n, device)), explore.WINDOW)


def settled(space: Space, layout: Layout, seconds: float) -> float:
    """What a schedule of so many seconds takes at the clocks that its power leaves."""
    return space.problem.settled(seconds, bool(layout.table[:, 2].max() < space.problem.sm_count))


@settings(max_examples=40, deadline=None)
@given(graphs(), devices(), st.data())
def test_placements_are_partitions_that_the_device_has_and_ops_fit(
    graph: Graph, device: tg.Device, data: st.DataObject
) -> None:
    space = space_of(graph, device)
    traits = seeds.traits_of(space, [op.name for op in graph.ops])
    least, whole = space.problem.sizes[space.lowest_mode()], int(space.problem.sizes[-1])
    for layout in search_layouts(device):
        if least.max() > layout.table[:, 2].max():
            continue
        for rows, row in seeds.placements(space, layout, traits):
            assert {*rows[:, 2].tolist()} <= {*device.partition_sizes()}
            assert (rows[row, 2] >= least).all()
            assert (rows[:, 3] == layout.table[:, 3]).all()
            for geometry in {*rows[:, 0].tolist()}:
                mine = rows[rows[:, 0] == geometry]
                assert (mine[1:, 1] == mine[:-1, 1] + mine[:-1, 2]).all() and mine[:, 2].sum() <= whole
        made = seeds.cycles(space, layout, traits, starts(space, layout)[0])
        if made:
            some = cycles.CYCLES.judged(
                space, layout, data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=4))
            )
            for each in some:
                at = space.iteration + each.place[space.decision]
                before = np.repeat(np.arange(space.problem.n), np.diff(space.problem.succ_ptr))
                assert (at[before] < at[space.problem.succ]).all()
            if np.isfinite(some[0].seconds) and space.total == space.window:
                chosen = cycles.written_out(space, layout, some[0])
                assert chosen.layout == bordered(layout, some[0].table)
                assert evaluate(space.problem, chosen).makespan_s == pytest.approx(
                    settled(space, layout, some[0].seconds)
                )


@settings(max_examples=15, deadline=None)
@given(graphs(), devices())
def test_what_a_state_is_judged_at_is_what_it_takes(graph: Graph, device: tg.Device) -> None:
    space = space_of(graph, device)
    traits = seeds.traits_of(space, [op.name for op in graph.ops])
    for layout in search_layouts(device):
        made = seeds.states(space, layout, traits, starts(space, layout)[0])
        if made and space.total == space.window:
            best = STATES.judged(space, layout, made)[0]
            _, times = realise(space, layout, best)
            assert times.makespan_s == pytest.approx(settled(space, layout, best.seconds))


# ------------------------------------------------------------------------------ graphs whose best plan is known


def curved(curves: dict[str, Callable[[np.ndarray], np.ndarray]]) -> Costs:
    """Prices by hand: the seconds of every op on some SMs, by its kind's curve. Each fills what it gets; nothing else
    is shared."""

    def costs(graph: Graph, device: tg.Device, sizes: Sequence[int]) -> OpTable:
        made = op_table(graph, device, sizes)
        sms = np.array(sizes, np.float64)
        seconds = np.stack([curves[op.kind](sms) for op in graph.ops])
        return replace(made, seconds=seconds, sm_use=np.tile(sms, (len(seconds), 1)), rates=np.zeros_like(made.rates))

    return costs


def layered(*rows: Sequence[str]) -> Graph:
    """A repeat whose body is `rows` of ops, by kind; ops of a row do not need each other, and each needs all of the row
    before."""
    b = tg.GraphBuilder("layered")
    x = b.input("x", (4,), "f32")
    with b.repeat(LAYERS, "layer") as loop:
        before = [entry := loop.carry(x)]
        for i, row in enumerate(rows):
            before = [
                b.op(kind, before, [tg.spec(f"{kind}{i}_{j}", (4,), "f32")], tg.Work(flops=1.0), f"{kind}{i}_{j}")[0]
                for j, kind in enumerate(row)
            ]
        out = loop.next(entry, before[0])
    b.output(out)
    return b.build()


def linear(seconds: float) -> Callable[[np.ndarray], np.ndarray]:
    """So many on the whole device, and in proportion longer on fewer SMs."""
    return lambda sms: seconds * DEVICE.sm_count / sms


def early(seconds: float, sms_needed: int) -> Callable[[np.ndarray], np.ndarray]:
    """No faster on more SMs than these."""
    return lambda sms: seconds * np.maximum(sms_needed / sms, 1.0)


def found(graph: Graph, costs: Costs, seconds: float = 0.5) -> Plan:
    plan = candidate(graph, DEVICE, "search", Budget(seconds), costs)
    tg.verify(plan, graph)
    return plan


@pytest.mark.parametrize("needed", [24, 64, 96])
def test_two_ops_of_which_one_needs_few_sms_get_partitions_in_turns_with_the_whole_device(needed: int) -> None:
    """A product on all SMs, then two ops side by side: one that no more than `needed` SMs make faster, and one that
    takes as long on what is left of 128. Each row of the body takes 1 ms at best, and nothing is faster."""
    curves = {"product": linear(1e-3), "stream": early(1e-3, needed), "attend": early(1e-3, 128 - needed)}
    plan = found(layered(["product"], ["stream", "attend"], ["last"]), curved({**curves, "last": linear(1e-4)}))
    assert plan.makespan_s <= LAYERS * (2e-3 + 1e-4) * 1.01
    sizes = {geometry.sizes for geometry in plan.geometries}
    assert {len(each) for each in sizes} == {1, 2}
    assert any(sorted(each) == sorted((needed, 128 - needed)) for each in sizes)


def test_chains_that_need_few_sms_keep_partitions() -> None:
    """Two chains, of which one is no faster on more than 40 SMs: apart they take what the longer one takes."""
    b = tg.GraphBuilder("chains")
    x = b.input("x", (4,), "f32")
    for kind in ("stream", "product"):
        at = x
        for i in range(8):
            (at,) = b.op(kind, [at], [tg.spec(f"{kind}{i}", (4,), "f32")], tg.Work(flops=1.0), f"{kind}_{i}")
        b.output(at)
    graph = b.build()
    costs = curved({"stream": early(1e-3, 40), "product": linear(0.6e-3)})
    plan = found(graph, costs)
    assert plan.verdict.sequential_s == pytest.approx(8 * 1.6e-3, rel=1e-3)
    assert plan.makespan_s <= 8 * 1e-3 * 1.02
    assert [len(geometry.sizes) for geometry in plan.geometries] == [2]


def test_ops_that_are_linear_in_sms_gain_nothing_by_partitions() -> None:
    costs = curved({"product": linear(1e-3), "other": linear(0.5e-3)})
    plan = found(layered(["product"], ["product", "other"]), costs, 0.1)
    assert plan.makespan_s == pytest.approx(LAYERS * 2.5e-3, rel=1e-3)


def test_one_slice_computes_while_another_communicates() -> None:
    """A rank's step, whose collectives take a third of the time and few SMs. Their order is that of the plan, for all
    ranks, so what the search promises must hold with one after another."""
    config = replace(load_config("llama-3-70b").share(8), layers=4)
    graph = mixed_step(config, Decode(1024, 1024), Prefill(1024, 1024))
    plan = candidate(graph, tg.devices.get("h100_sxm"), "search", Budget(1.0))
    tg.verify(plan, graph)
    assert plan.split.parts
    listed = candidate(graph, tg.devices.get("h100_sxm"), "list", Budget(1.0))
    assert plan.makespan_s < 0.95 * listed.makespan_s
    kind = {op.name: op.kind for op in apply(graph, plan.split).flat().ops}
    spans = sorted((s.start_s, s.end_s) for s in plan.timeline.spans if kind[s.op] in COLLECTIVES)
    assert all(end <= start * (1 + 1e-9) for (_, end), (start, _) in pairwise(spans))
