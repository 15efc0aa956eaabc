"""Ops of mixtures of experts and of latent attention: against plain references, on slices, in planned steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops, rewrite
from taskgraph.cost.families import kernel_of
from taskgraph.errors import GraphError
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work
from taskgraph.models import llama
from taskgraph.models.config import Experts, Latent, ModelConfig, load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.ops import active_experts, latent_flops
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE, CpuSite
from taskgraph.runtime.cpu.standard import bind
from taskgraph.tune.fill import fill
from tests.cases_experts import HEADS, PLAIN, RANK, ROTARY, VALUES, latent_attention_reference
from tests.rewrite.test_rewrite import TINY, assert_equal, random_tensors, run, simulate

MOE_TINY = replace(
    TINY, family="qwen2_moe", experts=Experts(6, 2, 16, normalize=True, shared_size=24, shared_gate=True)
)
LATENT_TINY = replace(
    TINY, family="deepseek_v3", kv_heads=4, head_dim=12, latent=Latent(10, 16, 4, 8, 6, interleaved=True),
    experts=Experts(8, 3, 16, True, "sigmoid", 2.5, 4, 2, True, 16, dense=frozenset([0])),
)  # fmt: skip
Make = Callable[[GraphBuilder], Value]


def evaluate(make: Make, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output of one op on `given`, which its states change."""
    b = GraphBuilder("one")
    b.output(make(b))
    graph = b.build()
    (op,) = graph.ops
    out = graph.tensor[op.outputs[0]]
    made = torch.full(out.shape, float("nan"), dtype=TORCH_DTYPE[out.dtype])
    bind(op, [given[n] for n in op.inputs], [made], CpuSite(1, frozenset()), {})()
    return made


# ------------------------------------------------------------------------------------------ routing


@st.composite
def routings(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 4]))
    each = draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    return {
        "top_k": draw(st.integers(1, kept * each)), "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize": draw(st.booleans()), "scale": draw(st.sampled_from([1.0, 2.5])), "groups": groups,
        "top_groups": kept, "experts": groups * each, "tokens": draw(st.integers(1, 7)),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def chosen_of(choice: list[float], groups: int, kept: int, top_k: int) -> list[int]:
    """The experts of one token, by sorting."""
    size = len(choice) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = sorted(members, key=lambda m: -sum(sorted((choice[i] for i in m), reverse=True)[:2]))
    held = [i for m in best[:kept] for i in m] if kept < groups else list(range(len(choice)))
    return sorted(held, key=lambda i: -choice[i])[:top_k]


@settings(max_examples=60, deadline=None)
@given(routings(), st.booleans())
def test_route_takes_the_best_experts(case: dict[str, Any], corrected: bool) -> None:
    torch.manual_seed(case.pop("seed"))
    tokens, experts = case.pop("tokens"), case.pop("experts")
    given = {"l": torch.randn(tokens, experts), "c": torch.randn(experts)}
    out = evaluate(
        lambda b: ops.route(
            b.input("l", (tokens, experts), "f32"),
            b.weight("c", (experts,), "f32") if corrected else None,
            spec=ops.RouteSpec(**case),
        ),
        given,
    )
    scores = given["l"].sigmoid() if case["scoring"] == "sigmoid" else given["l"].softmax(-1)
    choice = scores + given["c"] if corrected else scores
    for row, score, by in zip(out, scores, choice, strict=True):
        chosen = chosen_of(by.tolist(), case["groups"], case["top_groups"], case["top_k"])
        assert set(row.nonzero().flatten().tolist()) == set(chosen)
        total = score[chosen].sum() if case["normalize"] else 1.0
        torch.testing.assert_close(row[chosen], score[chosen] / total * case["scale"])


# ------------------------------------------------------------------------------------------ experts


def experts_of(tokens: int, count: int, hidden: int, inner: int, dtype: str = "f32") -> Make:
    def make(b: GraphBuilder) -> Value:
        return ops.experts(
            b.input("x", (tokens, hidden), dtype), b.input("r", (tokens, count), "f32"),
            b.weight("g", (count, 2 * inner, hidden), dtype), b.weight("d", (count, hidden, inner), dtype),
            b.input("res", (tokens, hidden), dtype), top_k=count,
        )  # fmt: skip

    return make


def random_experts(tokens: int, count: int, hidden: int, inner: int) -> dict[str, torch.Tensor]:
    routing = torch.rand(tokens, count) * (torch.rand(tokens, count) < 0.3)
    return {
        "x": torch.randn(tokens, hidden), "r": routing, "g": torch.randn(count, 2 * inner, hidden) / hidden**0.5,
        "d": torch.randn(count, hidden, inner) / inner**0.5, "res": torch.randn(tokens, hidden),
    }  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_experts_equal_all_of_them_weighed(tokens: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    given = random_experts(tokens, count, 8, 6)
    gate, up = torch.einsum("th,efh->tef", given["x"], given["g"]).chunk(2, -1)
    each = torch.einsum("tef,ehf->teh", F.silu(gate) * up, given["d"])
    wanted = given["res"] + torch.einsum("te,teh->th", given["r"], each)
    torch.testing.assert_close(evaluate(experts_of(tokens, count, 8, 6), given), wanted, rtol=1e-4, atol=1e-4)


def test_experts_in_bf16_keep_its_precision() -> None:
    torch.manual_seed(4)
    given = random_experts(64, 6, 32, 16)
    wanted = evaluate(experts_of(64, 6, 32, 16), given)
    given |= {name: given[name].bfloat16() for name in ("x", "g", "d", "res")}
    got = evaluate(experts_of(64, 6, 32, 16, "bf16"), given)
    assert (got.float() - wanted).norm() <= 0.01 * wanted.norm()


def test_weights_of_experts_without_tokens_are_not_read() -> None:
    torch.manual_seed(0)
    given = random_experts(5, 4, 8, 6)
    given["r"][:, 2] = 0.0
    whole = evaluate(experts_of(5, 4, 8, 6), given)
    for name in ("g", "d"):
        given[name][2] = float("nan")
    assert torch.equal(evaluate(experts_of(5, 4, 8, 6), given), whole)


def test_a_token_meets_only_its_experts() -> None:
    """No dense compute: a token whose values are not finite spoils its own row, not another's."""
    torch.manual_seed(1)
    given = random_experts(5, 4, 8, 6)
    given["r"][1] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    whole = evaluate(experts_of(5, 4, 8, 6), given)
    given["x"][1] = float("inf")
    spoilt = evaluate(experts_of(5, 4, 8, 6), given)
    others = [0, 2, 3, 4]
    assert torch.isfinite(spoilt[others]).all()
    torch.testing.assert_close(spoilt[others], whole[others])
    assert not torch.isfinite(spoilt[1]).all()


def test_gated_add() -> None:
    torch.manual_seed(2)
    given = {"x": torch.randn(3, 8), "g": torch.randn(3, 1), "y": torch.randn(3, 8)}
    out = evaluate(
        lambda b: ops.gated_add(b.input("x", (3, 8), "f32"), b.input("g", (3, 1), "f32"), b.input("y", (3, 8), "f32")),
        given,
    )
    torch.testing.assert_close(out, given["y"] + given["x"] / (1 + (-given["g"]).exp()))


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 2.0), (2, 3.0), (1000, 4.0)])
def test_active_experts(tokens: int, wanted: float) -> None:
    assert active_experts(tokens, 2, 4) == pytest.approx(wanted)


# ----------------------------------------------------------------------------------- latent attention


def latent_case(each: int, context: int, starts: list[int]) -> tuple[Make, dict[str, torch.Tensor], torch.Tensor]:
    """An op of the shapes of `cases_experts`, what it gets, and what it must give."""
    torch.manual_seed(0)
    shapes = {
        "q": (len(starts) * each, HEADS, PLAIN + ROTARY), "keys": (len(starts), 32, RANK + ROTARY),
        "up": (HEADS * (PLAIN + VALUES), RANK),
    }  # fmt: skip
    given = {name: torch.randn(shape) / 2 for name, shape in shapes.items()} | {"at": torch.tensor(starts)}

    def make(b: GraphBuilder) -> Value:
        q, up = b.input("q", shapes["q"], "f32"), b.weight("up", shapes["up"], "f32")
        at, keys = b.input("at", (len(starts),), "i64"), b.state("keys", shapes["keys"], "f32")
        return ops.latent_attention(q, at, keys, up, spec=ops.LatentSpec(ROTARY, 0.3, context=context))

    return make, given, latent_attention_reference(given, 0.3)


@pytest.mark.parametrize(
    ("each", "context", "starts"), [(1, 32, [0, 13, 31]), (4, 8, [0, 9]), (1, 2, [1]), (24, 32, [0, 8])]
)
def test_latent_attention_equals_the_reference_in_both_forms(each: int, context: int, starts: list[int]) -> None:
    make, given, wanted = latent_case(each, context, starts)
    torch.testing.assert_close(evaluate(make, given), wanted, rtol=1e-4, atol=1e-4)


def test_the_cheaper_form_is_counted() -> None:
    """DeepSeek-V3: decode folds the up-projection into the queries, a long prefill makes keys and values."""
    shape = (128, 192, 64, (128 * 256, 512))
    absorbed, expanded = latent_flops(1, 4096, *shape)
    assert absorbed < expanded / 50
    absorbed, expanded = latent_flops(4096, 4096, *shape)
    assert expanded < absorbed / 2


def test_a_position_beyond_the_latent_cache_is_refused() -> None:
    def make(b: GraphBuilder) -> Value:
        return ops.latent_rope(
            b.input("q", (2, 24), "f32"), b.input("kv", (2, 12), "f32"), b.weight("n", (8,), "f32"),
            b.input("p", (2,), "i64"), b.state("c", (2, 4, 12), "f32"), spec=ops.LatentRopeSpec(2, 4),
        )  # fmt: skip

    given = {"q": torch.randn(2, 24), "kv": torch.randn(2, 12), "n": torch.ones(8), "c": torch.zeros(2, 4, 12)}
    for places in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="outside the KV cache"):
            evaluate(make, {**given, "p": torch.tensor(places)})


# ------------------------------------------------------------------------------------- in step graphs


@pytest.mark.parametrize("config", [MOE_TINY, LATENT_TINY], ids=["moe", "latent"])
@pytest.mark.parametrize(("tokens", "sizes"), [(1, (1, 3)), (3, (2, 2))])
def test_a_step_equals_its_nano_batches(config: ModelConfig, tokens: int, sizes: tuple[int, int]) -> None:
    graph = llama.step_graph(config, batch=4, tokens=tokens, cache=8, dtype="f32")
    split = rewrite.split_batch(graph, sizes)
    assert {"route#1", "experts#0", "attention#1"} <= {op.name.rsplit("/")[-1] for op in split.ops}
    assert_equal(graph, split, tolerance=1e-4)


@pytest.mark.parametrize("config", [MOE_TINY, LATENT_TINY], ids=["moe", "latent"])
def test_a_step_goes_through_json(config: ModelConfig) -> None:
    graph = llama.step_graph(config, batch=2, tokens=3, cache=8)
    assert Graph.from_json(graph.to_json()) == graph
    for op in graph.ops:
        ops.check_op(op, dict(graph.tensor))


@pytest.mark.parametrize("tokens", [1, 3])
def test_measured_steps_stand_at_the_end_of_their_context(tokens: int) -> None:
    graph = llama.step_graph(LATENT_TINY, batch=2, tokens=tokens, cache=8, context=6, dtype="f32").flat()
    given = fill(graph, {}, 0)
    assert given["positions"].tolist() == [6 - tokens] * 2
    run(graph, given)


# ------------------------------------------------------------------------------------- mixed, sharded


def mixed(config: ModelConfig, ranks: int = 1, expert_rank: int | None = None) -> Graph:
    share = config.share(ranks, expert_rank)
    return mixed_step(share, Decode(3, 6, cache=8), Prefill(8, 7, sequences=2, cache=8), dtype="f32")


@pytest.mark.parametrize("config", [MOE_TINY, LATENT_TINY], ids=["moe", "latent"])
def test_a_mixed_step_equals_a_decode_and_a_prefill(config: ModelConfig) -> None:
    graph = mixed(config)
    tensors = random_tensors(graph)
    got, _ = run(graph, tensors)
    logits = []
    for kind, mine, batch, each in (("decode", slice(0, 3), 3, 1), ("prefill", slice(3, 11), 2, 4)):
        step = llama.step_graph(config, batch=batch, tokens=each, cache=8, dtype="f32")
        given = {**tensors, "tokens": tensors["tokens"][mine], "positions": tensors[f"{kind}_positions"]}
        given |= {n.replace(f"{kind}_", ""): t for n, t in tensors.items() if f"/{kind}_" in n}
        wanted = {t.name for t in step.flat().with_role("input", "weight", "state")}
        logits.append(run(step, {n: t for n, t in given.items() if n in wanted})[0][llama.LOGITS])
    torch.testing.assert_close(got[llama.LOGITS], torch.cat(logits), rtol=1e-4, atol=1e-4)
    assert_equal(graph, rewrite.split_batch(graph, (7, 4)), tolerance=1e-4)


def part_of(config: ModelConfig, name: str, whole: torch.Tensor, rank: int, by_expert: bool) -> torch.Tensor:
    """What rank `rank` of two holds of a tensor of the step on one rank."""

    def part(t: torch.Tensor, axis: int) -> torch.Tensor:
        return t.chunk(2, axis)[rank]

    heads = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
    stem = name.rpartition("/")[2]
    if stem in ("experts_gate_up", "experts_down") and by_expert:
        return part(whole, 0)
    if stem in ("qkv", "qkv_bias"):
        return torch.cat([part(p, 0) for p in whole.split(heads)])
    if stem in ("gate_up", "shared_gate_up", "experts_gate_up"):
        axis = whole.dim() - 2
        return torch.cat([part(half, axis) for half in whole.chunk(2, axis)], axis)
    if stem in ("q_b", "kv_b", "lm_head"):
        return part(whole, 0)
    if stem in ("o", "down", "shared_down") or stem.endswith(("_keys", "_values")):
        return part(whole, 1)
    return part(whole, 2) if stem == "experts_down" else whole


@pytest.mark.parametrize("by_expert", [False, True], ids=["features", "experts"])
@pytest.mark.parametrize("config", [MOE_TINY, LATENT_TINY], ids=["moe", "latent"])
def test_two_ranks_together_equal_one(config: ModelConfig, by_expert: bool) -> None:
    whole = random_tensors(mixed(config), 5)
    wanted, _ = run(mixed(config), whole)
    graphs = [mixed(config, 2, rank if by_expert else None) for rank in range(2)]
    ranks = [
        {name: part_of(config, name, t, rank, by_expert).clone() for name, t in whole.items()} for rank in range(2)
    ]
    for graph, tensors in zip(graphs, ranks, strict=True):
        for t in graph.flat().with_role("input", "weight", "state"):
            assert tensors[t.name].shape == t.shape, t.name
    for logits, token in simulate(graphs, ranks):
        torch.testing.assert_close(logits, wanted[llama.LOGITS], rtol=1e-4, atol=1e-3)
        assert torch.equal(token, wanted[llama.NEXT])


def test_expert_work_is_shared_out() -> None:
    """Two ranks by experts: half the rows and half the weights each; by features the same."""

    def work(ranks: int, rank: int | None = None) -> Work:
        graph = mixed_step(load_config("mixtral-8x7b").share(ranks, rank), Decode(64, context=64), Prefill())
        return next(op for op in graph.ops if op.kind == "experts").work

    one = work(1)
    for shared in (work(2), work(2, 1)):
        assert shared.flops == one.flops / 2
        assert shared.hbm_bytes == pytest.approx(one.hbm_bytes / 2, rel=1e-3)


def test_shares_of_experts_that_do_not_divide_are_refused() -> None:
    three = replace(MOE_TINY, heads=6, kv_heads=3, hidden_size=36, intermediate_size=48, vocab_size=51)
    with pytest.raises(GraphError, match="16 expert features, which 3 ranks"):
        mixed(three, 3)
    with pytest.raises(GraphError, match="shared features, which 3 ranks"):
        mixed(replace(three, experts=replace(three.experts, shared_size=25)), 3, 0)


# ----------------------------------------------------------------------------------------- big models


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "qwen2.5-7b", "qwen1.5-moe-a2.7b", "deepseek-v3"])
@pytest.mark.parametrize("tokens", [1, 512])
def test_big_models_plan_without_weights(name: str, tokens: int) -> None:
    graph = llama.step_graph(load_config(name), batch=8, tokens=tokens, cache=1024)
    plan = tg.plan(graph, "h100_sxm")
    tg.verify(plan, graph, memory=False)
    assert plan.bounds.best_s * (1 - 1e-9) <= plan.makespan_s <= plan.verdict.sequential_s * (1 + 1e-9)
    experts = [op for op in graph.ops if op.kind == "experts"]
    assert {kernel_of(op, graph.tensor).family for op in experts} <= {"moe"}
    latent = [op for op in graph.ops if op.kind == "latent_attention"]
    assert {kernel_of(op, graph.tensor)[:2] for op in latent} <= {("stream", "bf16")}
    assert bool(experts) == (name != "qwen2.5-7b")
    assert bool(latent) == (name == "deepseek-v3")


def test_expert_work_grows_with_the_experts_in_use() -> None:
    """Mixtral: one token reads 2 of 8 experts a layer, 64 tokens nearly all of them."""
    few, many = (
        next(op for op in llama.step_graph(load_config("mixtral-8x7b"), batch=n, tokens=1, cache=64).ops
             if op.kind == "experts").work
        for n in (1, 64)
    )  # fmt: skip
    expert = 3 * 4096 * 14336 * 2
    assert few.hbm_bytes == pytest.approx(2 * expert, rel=1e-3)
    assert many.hbm_bytes == pytest.approx(8 * expert, rel=1e-3)
    assert many.flops == 64 * few.flops == 64 * 2 * 2 * 3 * 4096 * 14336
