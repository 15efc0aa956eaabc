"""Keys of a config.json: honoured as transformers does, known to be harmless, or named in an error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taskgraph.errors import ConfigError, WeightsError
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, from_hf, known, load_config
from taskgraph.models.shapes import shape_of
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime import rotary
from tests.model_files import CONFIG, hf_tensors, write_folder

EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", EXPERTS),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**EXPERTS, "num_experts_per_tok": 2, "mlp_only_layers": [0]}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "qk_nope_head_dim": 8,
        },
    ),
}  # fmt: skip
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def written(architecture: str) -> tuple[Any, dict[str, Any]]:
    """transformers' config of a family, and what it writes to config.json."""
    import transformers as hf

    name, changes = FAMILIES[architecture]
    sizes = {**SIZES, **({"num_key_value_heads": 4} if "Deepseek" in architecture else {}), **changes}
    made = getattr(hf, name)(**sizes)
    return made, {**made.to_dict(), "architectures": [architecture]}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_transformers_writes_is_read(architecture: str) -> None:
    assert from_hf(written(architecture)[1], "tiny").layers == 2


@pytest.mark.parametrize("architecture", FAMILIES)
def test_shapes_are_those_of_transformers(architecture: str) -> None:
    import transformers as hf

    made, body = written(architecture)
    config = from_hf(body, "tiny")
    with torch.device("meta"):
        state = getattr(hf, architecture)(made).state_dict()
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items() if ".experts." not in name}
    moved = {name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if "Mixtral" in architecture else name: shape
             for name, shape in theirs.items()}  # fmt: skip
    assert {name: shape_of(config, name) for name in moved} == moved
    sources = {
        f"model.layers.{i}.{part}" for i in range(2) for names in llama.layer_sources(config, i).values()
        for part in (n for group in names for n in ([group] if isinstance(group, str) else group))
    }  # fmt: skip
    assert all(shape_of(config, name) is not None for name in sources), "what is loaded has a shape"
    assert {name for name in moved if "layers" in name} <= sources, "what transformers has is loaded"


@pytest.mark.parametrize("name", known())
def test_shipped_configs_are_read(name: str) -> None:
    assert load_config(name).layers > 0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
        {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e5,
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3,
        },
        {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e5,
            "truncate": False,
        },
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
        {"rope_type": "default", "rope_theta": 5e5},
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=rope))
    config = from_hf({**CONFIG, **SIZES, "rope_parameters": rope}, "tiny")
    graph = llama.step_graph(config, batch=1, tokens=1, cache=8, dtype="f32")
    op = next(op for op in graph.flat().ops if op.kind == "rope_kv")
    np.testing.assert_allclose(rotary.inverse_frequencies(op, config.head_dim), theirs.inv_freq.numpy(), rtol=1e-5)
    assert rotary.size(op) == pytest.approx(theirs.attention_scaling)


def changed(**changes: Any) -> ModelConfig:
    return from_hf({**CONFIG, **changes}, "tiny")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1), ("pretraining_tp", 4), ("torch_dtype", "bfloat16"), ("use_cache", False),
        ("initializer_range", 0.02), ("eos_token_id", [1, 2]), ("temperature", 0.6), ("_name_or_path", "x"),
        ("auto_map", {"AutoModel": "x"}), ("attention_bias", False), ("mlp_bias", False), ("logit_scale", 1.0),
        ("partial_rotary_factor", 1.0), ("hidden_act", "silu"), ("sliding_window", None), ("sliding_window", 512),
        ("layer_types", ["full_attention"]), ("query_pre_attn_scalar", 16), ("attention_multiplier", 0.25),
        ("quantization_config", None), ("some_new_key", None), ("rope_scaling", {"type": "linear", "factor": 1.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}),
    ],
)  # fmt: skip
def test_a_key_that_changes_nothing_is_read_past(key: str, value: Any) -> None:
    assert changed(**{key: value}) == changed()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("some_new_key", 1), ("some_new_key", False), ("quantization_config", {"quant_method": "fp8"}),
        ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("partial_rotary_factor", 0.5),
        ("logit_scale", 0.5), ("logits_scaling", 8.0), ("embedding_multiplier", 12.0), ("residual_multiplier", 0.2),
        ("attention_multiplier", 0.5), ("query_pre_attn_scalar", 32), ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0), ("clip_qkv", 8.0), ("sliding_window", 128), ("sliding_window", "wide"),
        ("layer_types", ["sliding_attention"]), ("layer_types", 3), ("layer_types", ["linear_attention"]),
        ("use_qk_norm", True), ("is_encoder_decoder", True), ("num_local_experts", 8), ("alibi", True),
        ("num_hidden_layers", 10**9), ("vocab_size", 10**400), ("rope_theta", 0.5), ("qkv_bias", True),
        ("rope_scaling", "linear"), ("architectures", "LlamaForCausalLM"), ("num_key_value_heads", [1, 1]),
    ],
)  # fmt: skip
def test_a_key_that_is_not_honoured_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"tiny.*{key}") as caught:
        changed(**{key: value})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"), ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"type": "mrope", "factor": 2.0}, "mrope"), ({"rope_type": "proportional"}, "proportional"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"), ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_theta": 1.0}}, "full_attention"), ({"rope_type": ["linear"]}, "linear"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": "x"}, "mscale"),
    ],
)  # fmt: skip
def test_a_rotary_setting_that_is_not_honoured_is_named(rope: dict[str, Any], reason: str) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConfigError, match=f"tiny.*{reason}"):
            changed(**{key: rope})


# ---------------------------------------------------------------------------------------- safetensors


def q_proj(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return hf_tensors() | {"model.layers.0.self_attn.q_proj.weight": torch.ones(shape).to(dtype)}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.down_proj.bias", "lm_head.bias",
        "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_norm.weight", "score.weight", "model.layers.0.mlp.experts.0.w1.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_the_model_has_not_is_named(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m", tensors=hf_tensors() | {name: torch.ones(32)})
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*{name}"):
        open_checkpoint(folder)


def test_tables_of_frequencies_are_read_past(tmp_path: Path) -> None:
    extra = {"model.rotary_emb.inv_freq": torch.ones(8), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    with open_checkpoint(write_folder(tmp_path / "m", tensors=hf_tensors() | extra)) as checkpoint:
        assert len(llama.load_weights(checkpoint.config, checkpoint, "f32")) == 8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.bool], ids=str)
def test_a_type_that_is_no_float_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path / "m", tensors=q_proj((32, 32), dtype))
    with open_checkpoint(folder) as checkpoint, pytest.raises(WeightsError, match=r"q_proj\.weight.*quantised"):
        llama.load_weights(checkpoint.config, checkpoint, "f32")


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (32, 32, 1), (1024,)])
def test_a_shape_that_is_not_the_models_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = write_folder(tmp_path / "m", tensors=q_proj(shape))
    with open_checkpoint(folder) as checkpoint, pytest.raises(WeightsError, match=r"q_proj\.weight.*\(32, 32\)"):
        llama.load_weights(checkpoint.config, checkpoint, "f32")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = hf_tensors()
    del tensors["model.norm.weight"]
    folder = write_folder(tmp_path / "m", tensors=tensors)
    with open_checkpoint(folder) as checkpoint, pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        llama.load_weights(checkpoint.config, checkpoint, "f32")


def test_a_tied_head_may_be_there_twice_but_not_differ(tmp_path: Path) -> None:
    tensors = hf_tensors()
    table = tensors["model.embed_tokens.weight"]
    for number, head in enumerate((table.clone(), table + 1)):
        folder = write_folder(tmp_path / str(number), tensors=tensors | {"lm_head.weight": head})
        with open_checkpoint(folder) as checkpoint:
            if number == 0:
                assert "lm_head" not in llama.load_weights(checkpoint.config, checkpoint, "f32")
                continue
            with pytest.raises(WeightsError, match="tie_word_embeddings"):
                llama.load_weights(checkpoint.config, checkpoint, "f32")


def test_files_and_their_index_agree(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors")
    with pytest.raises(WeightsError, match=r"model\.norm\.weight.*a\.safetensors and b\.safetensors"):
        open_checkpoint(folder)
    names = dict.fromkeys(hf_tensors(), "a.safetensors")
    for where, reason in (
        ({**names, "model.norm.weight": "c.safetensors"}, r"c\.safetensors"),
        ({**names, "model.other.weight": "a.safetensors"}, r"model\.other\.weight"),
        ({**names, "model.norm.weight": "../m/b.safetensors"}, "weight_map"),
        ([], "weight_map"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        with pytest.raises(WeightsError, match=reason):
            open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names()) == set(names)
