"""The search over collectives: with the choice open a plan is never worse than with any choice fixed."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import rewrite
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.network import ALGORITHMS, collective_cost
from taskgraph.schedule.plan import Collective

FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


def layer(tokens: int) -> tg.Graph:
    """Two layers of one of eight ranks of a 70B model."""
    share = replace(load_config("llama-3-70b").share(8), layers=2)
    return mixed_step(share, Decode(tokens, 1024), Prefill(tokens, tokens))


@FEW
@given(
    st.sampled_from(["", "torus:2x4", "switch:8", "machines:2x4"]), st.sampled_from([16, 256, 1024]), st.integers(0, 9)
)
def test_never_worse_than_a_fixed_choice(text: str, tokens: int, seed: int) -> None:
    graph, plain = layer(tokens), tg.devices.get("h100_sxm")
    device = tg.devices.networked(plain, text) if text else plain
    best = tg.plan_collectives(graph, device, "list", seed=seed)
    tg.verify(best.plan, best.graph)
    assert best.plan.makespan_s == min(best.makespans_s.values()) == best.makespans_s[best.label]
    for variant in (graph, *rewrite.collective_variants(graph).values()):
        for algorithm in ("auto", *ALGORITHMS) if text else ("auto",):
            fixed = tg.devices.networked(plain, text, algorithm=algorithm) if text else plain
            try:
                made = tg.plan(variant, fixed, "list", seed=seed)
            except tg.NetworkError:
                continue  # the algorithm has no schedule for a collective of the variant
            assert best.plan.makespan_s <= made.makespan_s


def test_a_saved_plan_knows_how_its_collectives_go(tmp_path: Path) -> None:
    """By the algorithm of their prices, the fastest of all for each, also of a graph that a search has cut."""
    graph, device = layer(16), tg.devices.networked("h100_sxm", "machines:2x4")
    best = tg.plan_collectives(graph, device, "list")
    best.plan.save(tmp_path / "plan.json")
    made = tg.Plan.load(tmp_path / "plan.json")
    tg.verify(made, best.graph)
    network, flat = made.device.network, best.graph.flat()
    assert network is not None
    shared = {op.name: op for op in flat.ops if op.kind in tg.ops.COLLECTIVES}
    assert [each.op for each in made.collectives] == [step.op for step in made.steps if step.op in shared]
    for each in made.collectives:
        op = shared[each.op]
        nbytes = max(sum(flat.tensor[name].nbytes for name in side) for side in (op.inputs, op.outputs))
        assert each.algorithm == collective_cost(network, op.kind, 8, nbytes)[0]
        assert f" by {each.algorithm}" in tg.explain(made)
    assert tg.plan(graph, "h100_sxm", "list").collectives == ()


def test_other_ways_of_collectives_are_refused() -> None:
    graph, device = layer(16), tg.devices.networked("h100_sxm", "switch:8")
    made = tg.plan(graph, device, "list")
    first = made.collectives[0]

    def broken(*ways: Collective) -> tg.Plan:
        return replace(made, collectives=ways).sealed()

    for wrong, says in (
        (broken(), "says of 0 collectives"),
        (broken(*made.collectives[::-1]), "in the steps' order"),
        (broken(replace(first, algorithm="dimensions"), *made.collectives[1:]), "switch:8 by shortest has ring"),
        (replace(made, collectives=(replace(first, algorithm="ring"), *made.collectives[1:])), "changed after it was"),
        (replace(made, device=tg.devices.get("h100_sxm")).sealed(), "over no network"),
    ):
        with pytest.raises(tg.PlanError, match=says):
            tg.verify(wrong, graph)


def test_an_algorithm_that_is_fixed_stays() -> None:
    device = tg.devices.networked("h100_sxm", "switch:8", algorithm="ring")
    best = tg.plan_collectives(layer(16), device, "list")
    assert best.plan.device.network == device.network
    assert not any(", by " in label for label in best.makespans_s)


def test_a_graph_without_collectives_is_planned_once() -> None:
    b = tg.GraphBuilder("alone")
    x = b.input("x", (64, 64), "f32")
    b.output(tg.ops.add(x, x))
    best = tg.plan_collectives(b.build(), tg.devices.networked("h100_sxm", "switch:8"), "list")
    assert list(best.makespans_s) == ["as given"] == [best.label]
    with pytest.raises(tg.GraphError):
        tg.plan_collectives("alone")  # type: ignore[arg-type]
