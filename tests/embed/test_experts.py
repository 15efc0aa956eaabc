"""Mixtures of experts and collectives of torch graphs: recognised as what they are, with eager torch's results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import taskgraph as tg
from taskgraph.embed import backend, report

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48, "num_local_experts": 6, "num_experts": 6,
}  # fmt: skip
BLOCKS: dict[str, tuple[Any, Any]] = {
    "mixtral": (MixtralConfig, MixtralSparseMoeBlock),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeSparseMoeBlock),
}


def block(name: str, form: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    config_class, made_by = BLOCKS[name]
    config = config_class(**SIZES, **{"num_experts_per_tok": 2, **more})
    config._experts_implementation = form
    made: nn.Module = made_by(config).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return made.to(dtype)


def imported(module: nn.Module, x: torch.Tensor) -> list[str]:
    """The kinds of the module's ops, which give eager torch's results."""
    with torch.no_grad():
        made = tg.from_torch(module, (x,))
        with tg.compile(made.graph, tg.plan(made.graph, "cpu")) as exe:
            exe.bind(made.tensors)
            for _ in range(2):
                x = torch.randn_like(x)
                near = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(made.call(exe, x), module(x), rtol=near, atol=near)
    return [op.kind for op in made.graph.ops]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_mixture_is_route_and_experts(name: str, form: str, dtype: torch.dtype) -> None:
    kinds = imported(block(name, form, dtype), torch.randn(1, 7, 32, dtype=dtype))
    assert kinds == ["gemm", "route", "experts"]


@pytest.mark.parametrize("form", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("more", [{"norm_topk_prob": True}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 5}])
def test_routers_of_other_numbers(form: str, more: dict[str, Any]) -> None:
    kinds = imported(block("qwen3_moe", form, **more), torch.randn(2, 5, 32))
    assert kinds == ["gemm", "route", "experts"]


class OtherRouter(nn.Module):
    """Experts that are told where rows go, perhaps twice to the same."""

    def __init__(self, form: str) -> None:
        super().__init__()
        made = block("mixtral", form)
        self.experts, self.weight = made.experts, nn.Parameter(torch.randn(32, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.tanh(x @ self.weight)
        made: torch.Tensor = self.experts(x, (scores.abs() * 6).long().clamp(0, 5), scores)
        return made


@pytest.mark.parametrize("form", ["batched_mm", "grouped_mm"])
def test_experts_behind_a_router_that_is_not_known(form: str) -> None:
    kinds = imported(OtherRouter(form), torch.randn(9, 32))
    assert kinds.count("experts") == 1
    assert "aten.routing" in kinds


class Seen(nn.Module):
    """A mixture of which something within is an output too, or changes."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x: torch.Tensor) -> Any:
        _, weights, places = self.inner.gate(x)
        made = self.inner.experts(x, places, weights)
        if self.what == "weights":
            return made + weights.sum()
        if self.what == "places":
            return made + places.sum()
        return made * 2


@pytest.mark.parametrize("what", ["weights", "places", "nothing"])
def test_what_others_read_too_is_still_there(what: str) -> None:
    kinds = imported(Seen(block("mixtral", "batched_mm"), what), torch.randn(7, 32))
    assert "experts" in kinds
    assert ("route" in kinds) == (what == "nothing")


def test_a_compiled_mixture() -> None:
    module = block("mixtral", "grouped_mm")
    fast = torch.compile(module, backend=backend, options={"verdict": "plan"})
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(1, 6, 32)
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
    assert all(piece.recognised == piece.ops for piece in report(fast).pieces if piece.way == "plan")


# ------------------------------------------------------------------------------------------ collectives


class Sharded(nn.Module):
    """A product whose inner axis several ranks share."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.rest = nn.Linear(16, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        summed = functional.all_reduce(self.part(x), "sum", dist.group.WORLD)
        joined = functional.all_gather_single(self.rest(summed), 0, dist.group.WORLD)
        shared = functional.reduce_scatter_single(joined * 2, "sum", 0, dist.group.WORLD)
        most = functional.all_reduce(summed, "max", dist.group.WORLD)
        return torch.cat([shared, most], 0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_functional_collectives_are_ours() -> None:
    kinds = imported(Sharded(), torch.randn(2, 3, 16))
    assert [kinds.count(k) for k in ("all_reduce", "all_gather", "reduce_scatter")] == [1, 1, 1]
    assert kinds.count("aten") == 2  # the largest, which no kind of ours is, and its wait


@pytest.mark.usefixtures("one_rank")
def test_a_compiled_module_calls_torchs_collectives() -> None:
    module = Sharded()
    fast = torch.compile(module, backend=backend, options={"verdict": "plan"})
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 3, 16)
            torch.testing.assert_close(fast(x), module(x))
    assert report(fast).hit_rate == 1.0


def test_collectives_of_more_ranks_are_planned_with_their_links() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        with torch.device("meta"):
            made = tg.from_torch(Sharded(), (torch.empty(2, 3, 16),))
    finally:
        dist.destroy_process_group()
    (op,) = [op for op in made.graph.ops if op.kind == "all_reduce"]
    assert op.integer("ranks") == 4
    assert op.work.link_bytes == 2 * 3 / 4 * 2 * 3 * 8 * 4
    assert tg.plan(made.graph, "h100_sxm").timeline.kind == "simulated"
