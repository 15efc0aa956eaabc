"""Every family against transformers: a random tiny model saved to disk, read by our names, prefill and then decode."""

from pathlib import Path
from typing import Any

import pytest
import torch

from taskgraph.errors import WeightsError
from taskgraph.models import llama
from taskgraph.models.layer import LayerPattern, pattern_of
from taskgraph.models.weights import open_checkpoint
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.requests import Request
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.session import Session

SHAPE: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
QWEN_MOE: dict[str, Any] = {**SHAPE, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    **SHAPE, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1,
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 24, "qk_nope_head_dim": 32,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_mtp_layers": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SHAPE, "tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2Config", {**SHAPE, "rope_parameters": YARN}),
    "qwen3 yarn": ("Qwen3Config", {**SHAPE, "head_dim": 32, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral one": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN_MOE, "shared_expert_intermediate_size": 48}),
    "qwen2_moe sparse": (
        "Qwen2MoeConfig",
        {**QWEN_MOE, "shared_expert_intermediate_size": 48, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN_MOE, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3_moe dense first": ("Qwen3MoeConfig", {**QWEN_MOE, "head_dim": 32, "mlp_only_layers": [0]}),
    "deepseek": ("DeepseekV3Config", DEEPSEEK),
    "deepseek plain": (
        "DeepseekV3Config",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
         "rope_interleave": False, "first_k_dense_replace": 0},
    ),
    "deepseek yarn": (
        "DeepseekV3Config", {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}},
    ),
}  # fmt: skip


def tiny(case: str) -> Any:
    """The random transformers model of the case, with norms, biases and corrections random too."""
    import transformers as hf

    kind, settings = CASES[case]
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(getattr(hf, kind)(**settings)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(case: str, tmp_path: Path) -> None:
    model, batch = tiny(case), 2
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        config, weights = checkpoint.config, llama.load_weights(checkpoint.config, checkpoint, "f32")
    assert config.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, config.vocab_size, (batch, 48))
    with Session(config, weights, batch=batch, cache=48) as session, torch.inference_mode():
        expected = model(ids).logits
        steps = [(0, 44, True), (44, 2, True), (46, 1, False), (47, 1, False)]
        for start, count, every in steps:
            run = session.run(ids[:, start : start + count].flatten().tolist(), [start] * batch, all_logits=every)
            ours = run[llama.LOGITS].view(batch, count, -1)
            torch.testing.assert_close(ours, expected[:, start : start + count], atol=1e-3, rtol=1e-3)


SERVED = ("qwen3 yarn", "qwen2_moe sparse", "deepseek plain", "deepseek yarn")


@pytest.mark.parametrize("case", SERVED)
def test_the_engine_serves_the_family(case: str, tmp_path: Path) -> None:
    """Requests in one batch, prompts in chunks, sequences pre-empted to the host: each gets the greedy tokens that
    transformers' logits of its text say, and that it gets alone."""
    model = tiny(case)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        config, weights = checkpoint.config, llama.load_weights(checkpoint.config, checkpoint, "f32")
    lengths = ((37, 30), (25, 45), (64, 4))
    requests = [Request(torch.randint(0, config.vocab_size, (n,)).tolist(), new) for n, new in lengths]
    limits = Limits(sequences=2, tokens=24, chunks=2, context=96)
    with cpu_engine(config, weights, limits, KvMemory(4, 6), policy=Policy(expected_output=1.0)) as engine:
        together = [c.tokens for c in engine.run(requests)]
        assert engine.scheduler.preemptions > 0
        assert [engine.run([request])[0].tokens for request in requests[:2]] == together[:2]
    for request, tokens in zip(requests, together, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == tokens


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek"])
def test_bf16_follows_f32(case: str, tmp_path: Path) -> None:
    """By the median token: at a near tie of two experts bf16 takes the other one, and that token's logits differ."""
    tiny(case).save_pretrained(tmp_path)
    logits = {}
    ids = torch.randint(0, 160, (24,)).tolist()
    with open_checkpoint(tmp_path) as checkpoint:
        for dtype in ("f32", "bf16"):
            weights = llama.load_weights(checkpoint.config, checkpoint, dtype)
            with Session(checkpoint.config, weights, cache=25) as session:
                logits[dtype] = session.run(ids, [0], all_logits=True)[llama.LOGITS].float().clone()
    error = (logits["bf16"] - logits["f32"]).norm(dim=-1) / logits["f32"].norm(dim=-1)
    assert error.median() < 0.05


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(WeightsError, match=r"experts\.2\.w1.*quantised"):
        llama.load_weights(checkpoint.config, checkpoint, "f32")


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("aaaa", LayerPattern(0, 1, 4)),
        ("abbbb", LayerPattern(1, 1, 4)),
        ("abab", LayerPattern(0, 2, 2)),
        ("aabab", LayerPattern(1, 2, 2)),
        ("aab", LayerPattern(2, 1, 1)),
        ("a", LayerPattern(0, 1, 1)),
    ],
)
def test_the_pattern_stores_the_fewest_layers(kinds: str, pattern: LayerPattern) -> None:
    assert pattern_of(kinds) == pattern
    marks = pattern.marks()
    assert len(marks) == len(set(marks)) == len(kinds)
