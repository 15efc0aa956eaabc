"""The Llama graphs on the CPU backend against transformers: same weights, same ids, same tokens."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import RopeScaling, from_hf, known, load_config
from taskgraph.models.weights import hf_name, open_checkpoint, rope_scaling_of
from taskgraph.serving.session import Session
from tests.schedule.problems_by_hand import max_live_bytes

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
]
NEW_TOKENS = 64


class StateDict:
    """A TensorSource over a transformers model."""

    def __init__(self, model: Any) -> None:
        self._tensors = model.state_dict()

    def tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._tensors[name]
        return found


# ------------------------------------------------------------------------------- SmolLM2, for real


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[tuple[Session, Any, Any]]:
    """(our session in f32, transformers' model with its own reading of the same GGUF, the tokenizer)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(str(smollm2_gguf))["config"]
    config.pop("model_type")
    reference = LlamaForCausalLM(LlamaConfig(**config)).eval()
    tensors = load_gguf_checkpoint(str(smollm2_gguf), True, reference)["tensors"]
    reference.load_state_dict({k: torch.as_tensor(v) for k, v in tensors.items()}, strict=False)
    reference.tie_weights()
    with open_checkpoint(smollm2_gguf) as checkpoint:
        weights = llama.load_weights(checkpoint.config, checkpoint, "f32")
        tokenizer = checkpoint.tokenizer()
    with Session(checkpoint.config, weights, cache=192) as session:
        yield session, reference, tokenizer


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_logits_equal_transformers(smollm2: tuple[Session, Any, Any], prompt: str) -> None:
    session, reference, tokenizer = smollm2
    ids = tokenizer.encode(prompt)
    ours = list(session.generate(ids, NEW_TOKENS))
    with torch.inference_mode():
        theirs = reference.generate(
            torch.tensor([ids]), do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
            eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )[0, len(ids) :].tolist()  # fmt: skip
        expected = reference(torch.tensor([ids])).logits[0]
    assert ours == theirs
    logits = session.run(ids, [0], all_logits=True)[llama.LOGITS]
    assert (logits - expected).abs().max() <= 1e-3


# --------------------------------------------------------------------------- every family, tiny


def tiny(family: str, **changes: int) -> Any:
    """A random two-layer model of the family from transformers, with its scalings and biases random too."""
    import transformers as hf

    shape: dict[str, Any] = {
        "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        **changes,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    }  # fmt: skip
    configs = {
        "llama": lambda: hf.LlamaConfig(**shape, tie_word_embeddings=False),
        "llama3": lambda: hf.LlamaConfig(**shape, rope_parameters=llama3, head_dim=32),
        "qwen2": lambda: hf.Qwen2Config(**shape, tie_word_embeddings=True),
        "qwen3": lambda: hf.Qwen3Config(**shape, head_dim=32),
    }
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(configs[family]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_family_equals_transformers(family: str, batch: int) -> None:
    model = tiny(family)
    body = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = from_hf(body, family)
    assert config.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, config.vocab_size, (batch, 12))
    weights = llama.load_weights(config, StateDict(model), "f32")
    with Session(config, weights, batch=batch, cache=32) as session, torch.inference_mode():
        expected = model(ids).logits
        prefill = session.run(ids[:, :8].flatten().tolist(), [0] * batch, all_logits=True)[llama.LOGITS]
        torch.testing.assert_close(prefill.view(batch, 8, -1), expected[:, :8], atol=1e-3, rtol=1e-3)
        chunk = session.run(ids[:, 8:10].flatten().tolist(), [8] * batch, all_logits=True)[llama.LOGITS]
        torch.testing.assert_close(chunk.view(batch, 2, -1), expected[:, 8:10], atol=1e-3, rtol=1e-3)
        for place in (10, 11):
            step = session.run(ids[:, place].tolist(), [place] * batch)[llama.LOGITS]
            torch.testing.assert_close(step, expected[:, place], atol=1e-3, rtol=1e-3)


def write_gguf(path: Path, model: Any) -> None:
    """A llama as llama.cpp's converter writes it: rotary pairs interleaved, Llama 3's scaling as rope_freqs."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_tensor("rope_freqs.weight", divisors(c.rope_parameters, c.head_dim))
    gguf_name = {hf_name(f"{stem}.weight"): f"{stem}.weight" for stem in ("token_embd", "output_norm", "output")}
    for i in range(c.num_hidden_layers):
        for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up"):
            gguf_name[hf_name(f"blk.{i}.{part}.weight")] = f"blk.{i}.{part}.weight"
        gguf_name[hf_name(f"blk.{i}.ffn_down.weight")] = f"blk.{i}.ffn_down.weight"
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, c.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(gguf_name[name], tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def divisors(rope: dict[str, float], dim: int) -> npt.NDArray[np.float32]:
    """What Llama 3's scaling divides each rotary frequency by, from transformers' own frequencies."""
    import transformers as hf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf.LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    ratio: npt.NDArray[np.float32] = (plain / scaled.double()).float().numpy()
    return ratio


def test_gguf_with_scaled_rope_equals_transformers(tmp_path: Path) -> None:
    model = tiny("llama3")
    write_gguf(tmp_path / "tiny.gguf", model)
    ids = torch.randint(0, model.config.vocab_size, (1, 90))
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert checkpoint.config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
        weights = llama.load_weights(checkpoint.config, checkpoint, "f32")
    with Session(checkpoint.config, weights, cache=96) as session, torch.inference_mode():
        logits = session.run(ids[0].tolist(), [0], all_logits=True)[llama.LOGITS]
        torch.testing.assert_close(logits, model(ids).logits[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_of_llama_3_give_its_published_scaling(factor: float) -> None:
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500_000.0}  # fmt: skip
    for dim in (64, 128):
        assert rope_scaling_of(divisors(rope, dim), 500_000.0, "x") == RopeScaling(factor, 1.0, 4.0, 8192)


def test_unknown_rope_freqs_are_refused() -> None:
    assert rope_scaling_of(np.ones(32, np.float32), 1e4, "plain") is None
    for strange in (np.full(32, 4.0), np.linspace(1, 8, 32), np.linspace(8, 1, 32)):
        with pytest.raises(tg.WeightsError, match="odd"):
            rope_scaling_of(strange.astype(np.float32), 1e4, "odd")


def test_bf16_follows_f32() -> None:
    model = tiny("llama")
    config = from_hf({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "llama")
    ids = torch.randint(0, config.vocab_size, (7,)).tolist()
    logits = {}
    for dtype in ("f32", "bf16"):
        weights = llama.load_weights(config, StateDict(model), dtype)
        with Session(config, weights, cache=16) as session:
            logits[dtype] = session.run(ids, [0])[llama.LOGITS].float().clone()
    error = (logits["bf16"] - logits["f32"]).norm() / logits["f32"].norm()
    assert error < 0.05


def test_cache_overflow_is_a_plan_error() -> None:
    model = tiny("llama")
    config = from_hf({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "llama")
    weights = llama.load_weights(config, StateDict(model), "f32")
    with Session(config, weights, cache=4) as session, pytest.raises(tg.PlanError, match="cache of 4"):
        session.run([1, 2, 3, 4, 5], [0])


# ------------------------------------------------------------------------------------- as graphs


def live_in_time(plan: tg.Plan, graph: tg.Graph) -> int:
    """The most bytes of activations that are alive at one moment of the timeline, from first write to last use."""
    span = {s.op: s for s in plan.timeline.spans}
    begin = {name: span[op.name].start_s for op in graph.ops for name in op.outputs}
    end = {name: span[op.name].end_s for op in graph.ops for name in op.outputs}
    for op in graph.ops:
        for name in op.inputs:
            if name in end:
                end[name] = max(end[name], span[op.name].end_s)
    held = {slot.tensor: slot.nbytes for slot in plan.arena}
    events = sorted((at, sign * held[name]) for name in held for at, sign in ((begin[name], 1), (end[name], -1)))
    return max(accumulate(nbytes for _, nbytes in events))


@pytest.mark.parametrize("name", known())
@pytest.mark.parametrize("tokens", [1, 128])
def test_known_sizes_plan_and_pack_memory(name: str, tokens: int) -> None:
    """Every shipped size plans on a GPU, and the arena of a list plan stays within 1.15x of what must live at once.

    What must live is counted step by step and moment by moment, for ops side by side hold more than one after another.
    """
    config = load_config(name)
    graph = llama.step_graph(config, batch=4, tokens=tokens, cache=256)
    tg.verify(tg.plan(graph, "h100_sxm", budget_s=0.1), graph, memory=False)
    plan, flat = tg.plan(graph, "h100_sxm", "list"), graph.flat()
    tg.verify(plan, graph, memory=False)
    index = {op.name: i for i, op in enumerate(flat.ops)}
    live = max_live_bytes(flat, [s.lane for s in plan.steps], [index[s.op] for s in plan.steps])
    assert live <= plan.arena_bytes <= 1.15 * max(live, live_in_time(plan, flat))
    declared = sum(t.nbytes for t in flat.with_role("weight") if t.dtype == "bf16") // 2  # an f32 one is a buffer
    assert declared == config.parameters
