"""Mixtures of experts and latent attention on the cuda backend, by the virtual driver, against the cpu backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import BackendUnavailable
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.models.config import ModelConfig, Yarn
from taskgraph.models.llama import step_graph
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.gpu.kinds import Buffer, DrySite
from taskgraph.runtime.gpu.standard import launches
from tests.conftest import Call
from tests.ops.test_experts import LATENT_TINY, MOE_TINY
from tests.runtime.gpu.test_cuda import run_plan

Tensors = dict[str, torch.Tensor]


def tensors_of(graph: Graph, seed: int = 0) -> Tensors:
    """Random values, of a size that layers keep; ids and places are small."""
    made = torch.Generator().manual_seed(seed)
    given = {}
    for t in graph.flat().with_role("input", "weight", "state"):
        values = torch.randn(t.shape, generator=made) / t.shape[-1] ** 0.5 + (1.0 if "norm" in t.name else 0.0)
        ids = torch.randint(0, 9, t.shape, generator=made)
        given[t.name] = ids if t.dtype == "i64" else values.to(TORCH_DTYPE[t.dtype])
    return given


def assert_cuda_equals_cpu(on_virtual: Call, graph: Graph, tolerance: float, rows: float = 1.0) -> None:
    """Outputs and states; at least the share `rows` of the rows of each are within `tolerance` of its scale."""
    given = tensors_of(graph)
    expected = {name: t.clone() for name, t in given.items()}
    with tg.compile(graph, tg.plan(graph, "cpu", "sequential"), "cpu") as exe:
        wanted = exe(expected)
    states = tuple(t.name for t in graph.flat().with_role("state"))
    wanted |= {name: expected[name] for name in states}
    got = on_virtual(run_plan, graph, tg.plan(graph, "h100_sxm", "list"), given, states)
    for name, value in wanted.items():
        if value.dtype.is_floating_point:
            error = (got[name].float() - value.float()).abs().amax(-1)
            scale = max(float(value.float().abs().max()), 1.0)
            assert float((error <= tolerance * scale).float().mean()) >= rows, name


STRETCHED = replace(LATENT_TINY, rope_scaling=Yarn(8.0, 1.0, 3.0, 1.2, 1.0))


@pytest.mark.parametrize("tokens", [1, 7], ids=["decode", "prefill"])
@pytest.mark.parametrize("config", [MOE_TINY, STRETCHED], ids=["moe", "latent"])
def test_steps_equal_the_cpu_backend(on_virtual: Call, config: ModelConfig, tokens: int) -> None:
    assert_cuda_equals_cpu(on_virtual, step_graph(config, batch=2, tokens=tokens, cache=24, dtype="f32"), 2e-5)


@pytest.mark.parametrize("config", [MOE_TINY, LATENT_TINY], ids=["moe", "latent"])
def test_bf16_steps_follow_the_cpu_backend(on_virtual: Call, config: ModelConfig) -> None:
    """At a near tie of two experts the other one may be taken: not every row is held to it."""
    graph = step_graph(config, batch=2, tokens=7, cache=24, all_logits=True)
    assert_cuda_equals_cpu(on_virtual, graph, 3e-2, rows=0.7)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_k": 8, "normalize": False},
        {"top_k": 3, "scoring": "sigmoid", "scale": 2.5, "groups": 4, "top_groups": 2},
        {"top_k": 2, "scoring": "sigmoid", "first": 4, "held": 3},
    ],
)
@pytest.mark.parametrize("corrected", [False, True])
def test_routing_equals_the_cpu_backend(on_virtual: Call, options: dict[str, Any], corrected: bool) -> None:
    b = GraphBuilder("route")
    correction = b.weight("c", (8,), "f32") if corrected else None
    b.output(ops.route(b.input("l", (40, 8), "f32"), correction, spec=ops.RouteSpec(**options)))
    assert_cuda_equals_cpu(on_virtual, b.build(), 1e-6)


@pytest.mark.parametrize(("tokens", "top_k", "count"), [(1, 1, 4), (70, 2, 5), (33, 4, 4)])
def test_grouped_products_equal_the_cpu_backend(on_virtual: Call, tokens: int, top_k: int, count: int) -> None:
    """More rows than a tile, experts without any, and sizes that no tile divides."""
    hidden, inner = 70, 37
    b = GraphBuilder("experts")
    x = b.input("x", (tokens, hidden), "f32")
    routing = ops.route(b.input("l", (tokens, count), "f32"), spec=ops.RouteSpec(top_k))
    weights = b.weight("g", (count, 2 * inner, hidden), "f32"), b.weight("d", (count, hidden, inner), "f32")
    b.output(ops.experts(x, routing, *weights, x, top_k=top_k))
    assert_cuda_equals_cpu(on_virtual, b.build(), 1e-5)


def test_what_the_kernels_do_not_do_is_refused() -> None:
    b = GraphBuilder("many")
    b.output(ops.route(b.input("l", (1, 600), "f32"), spec=ops.RouteSpec(2)))
    (op,) = b.build().ops
    with pytest.raises(BackendUnavailable, match="512 experts; got 600"):
        launches(op, [Buffer(0, (1, 600), "f32")], [Buffer(0, (1, 600), "f32")], DrySite(132, ""))
