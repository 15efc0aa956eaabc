"""Architectures of transformers and plain modules: imported, planned and run, their results are eager torch's."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import taskgraph as tg
from benchmarks.embed_models import BY_COMPILE, MODELS, PLAIN

FAST = ("llama", "gpt2", "bert", "t5", *sorted({*PLAIN} - BY_COMPILE))
WHOLE = {"llama": 0.95, "gpt2": 0.95, "bert": 0.95, "t5": 0.9}
"""Of these nearly all calls are recognised."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "The tensor attributes", UserWarning)
        yield
    torch._dynamo.reset()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS if n not in BY_COMPILE]
)
def test_results_are_eager_torchs(name: str) -> None:
    module, inputs = MODELS[name]()
    want = module(**inputs)
    imported = tg.from_torch(module, inputs)
    plan = tg.plan(imported.graph, "cpu", "sequential")
    tg.verify(plan, imported.graph)
    tg.verify(tg.plan(imported.graph, "h100_sxm", "list"), imported.graph)
    with tg.compile(imported.graph, plan) as exe:
        exe.bind(imported.tensors)
        close(imported.call(exe, **inputs), want)
    known = sum(made.kind != "aten" for made in imported.recognised)
    assert known >= WHOLE.get(name, 0.0) * len(imported.recognised)


@pytest.mark.parametrize("name", ["llama", "pruned"])
def test_compiled_results_are_eager_torchs(name: str) -> None:
    module, inputs = MODELS[name]()
    fast = torch.compile(module, backend=tg.embed.backend, options={"verdict": "plan", "quiet": True})
    for _ in range(2):
        close(fast(**inputs), module(**inputs))
    assert tg.embed.report(fast).pieces


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llama_in_halves(dtype: torch.dtype) -> None:
    module, inputs = MODELS["llama"]()
    module.to(dtype)
    want = module(**inputs).float()
    imported = tg.from_torch(module, inputs)
    with tg.compile(imported.graph, tg.plan(imported.graph, "cpu", "sequential")) as exe:
        exe.bind(imported.tensors)
        got = imported.call(exe, **inputs).float()
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())
    assert {"gemm", "rmsnorm", "aten.rotary", "aten.attention"} <= {made.kind for made in imported.recognised}


def small(**more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, eos_token_id=None, pad_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "taskgraph"])
def test_generate_with_a_static_cache_uses_one_plan_a_step(attention: str) -> None:
    if attention == "taskgraph":
        assert tg.embed.register_attention() == attention
    model, ids = small(), torch.randint(0, 128, (1, 5))
    model.set_attn_implementation(attention)

    def generate() -> torch.Tensor:
        made: torch.Tensor = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static")
        return made

    want = generate()
    model.forward = torch.compile(model.forward, backend=tg.embed.backend, options={"verdict": "plan"})
    assert torch.equal(generate(), want)
    assert torch.equal(generate(), want), "a second cache"
    pieces = [p for p in tg.embed.report().pieces if p.calls]
    assert sorted(p.calls for p in pieces if p.way == "plan")[-1] == 22, "11 steps after the prompt, twice"


def test_attention_of_torch_with_masks_groups_and_lengths() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    class Attend(torch.nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.options = options

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, *mask, **self.options)

    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    full = [t.repeat_interleave(2, 1) for t in (k, v)]
    truths = torch.rand(2, 1, 3, 7) > 0.3
    truths[0, 0, 1] = False
    cases: list[tuple[dict[str, Any], tuple[torch.Tensor, ...]]] = [
        ({"enable_gqa": True}, (q, k, v)),
        ({"scale": 0.3}, (q, *full, truths)),
        ({}, (q, *full, torch.randn(2, 1, 3, 7))),
        ({"is_causal": True}, (q, *full)),
        ({"enable_gqa": True}, (q.repeat(1, 1, 9, 1), k, v)),
        ({}, (q.transpose(1, 2).contiguous().transpose(1, 2), *full)),
    ]
    for options, inputs in cases:
        imported = tg.from_torch(Attend(**options), inputs)
        assert [made.kind for made in imported.recognised] == ["aten.attention"]
        with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
            got = imported.call(exe, *inputs)
        torch.testing.assert_close(got, attend(*inputs, **options), rtol=1e-4, atol=1e-5)


def test_a_decode_step_is_priced_by_the_families_of_kernels() -> None:
    from taskgraph.cost.families import kernel_of
    from taskgraph.embed.sources import _Decoder

    with torch.device("meta"):
        step = _Decoder(small(dtype="bfloat16").to("meta", torch.bfloat16), 4, 64, torch.bfloat16)
    imported = tg.from_torch(step, (torch.zeros(4, 1, dtype=torch.int64, device="meta"),))
    families = {kernel_of(op, imported.graph.tensor).family for op in imported.graph.ops}
    assert {"gemm", "decode_attention", "stream"} <= families
    assert {t.name for t in imported.graph.with_role("state")} >= {"cache_0_keys", "cache_1_values"}


@pytest.mark.slow
def test_a_decode_step_of_transformers_is_predicted_as_the_hand_written_one(tmp_path: Any) -> None:
    from dataclasses import replace

    from taskgraph.embed.sources import hugging_face
    from taskgraph.models.config import load_config
    from taskgraph.models.llama import step_graph

    LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    imported = hugging_face(str(tmp_path), batch=16, context=1024, tokens=1)
    by_hand = step_graph(replace(load_config("llama-3-8b"), layers=4), batch=16, tokens=1, cache=1024)
    times = [tg.plan(graph, "h100_sxm").makespan_s for graph in (imported.graph, by_hand)]
    assert times[0] == pytest.approx(times[1], rel=0.05)
