"""The search over collectives: with the choice open a plan is never worse than with any choice fixed."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import rewrite
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.network import ALGORITHMS

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
