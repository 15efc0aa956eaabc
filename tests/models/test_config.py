"""Model configs: shipped shapes against published sizes, and bad configs against typed errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from taskgraph.errors import ConfigError, WeightsError
from taskgraph.models.config import from_hf, known, load_config

PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def body(**changes: Any) -> dict[str, Any]:
    """A small valid config.json with `changes`; a change to None removes the key."""
    base = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def test_every_shipped_config_has_a_published_size() -> None:
    assert set(known()) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert load_config(name).parameters == PUBLISHED_PARAMETERS[name]


def test_llama3_rope_scaling_is_read() -> None:
    scaling = load_config("llama-3.2-1b").rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (32.0, 1.0, 4.0)


def test_a_folder_and_a_file_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(body()))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json")
    assert load_config(tmp_path).head_dim == 16


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "rms_norm_eps"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(WeightsError, match=f"tiny.*{key}"):
        from_hf(body(**{key: None}), "tiny")


def test_an_unsupported_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
        from_hf(body(architectures=["GPT2LMHeadModel"]), "tiny")


def test_the_model_type_stands_in_for_the_architecture() -> None:
    assert from_hf(body(architectures=None, model_type="qwen3"), "tiny").family == "qwen3"
    for kind in ("gpt2", None):
        with pytest.raises(ConfigError, match=r"model_type.*qwen3"):
            from_hf(body(architectures=None, model_type=kind), "tiny")


def test_an_unsupported_rope_scaling_is_named() -> None:
    with pytest.raises(ConfigError, match="longrope"):
        from_hf(body(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "tiny")


def test_a_yarn_without_its_context_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling.*original_max_position_embeddings"):
        from_hf(body(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "tiny")


EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **EXPERTS, "num_experts": None, "n_routed_experts": 8, "kv_lora_rank": 32, "q_lora_rank": 24,
    "qk_rope_head_dim": 16, "v_head_dim": 24, "qk_nope_head_dim": 32, "n_group": 4, "topk_group": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {**EXPERTS, "num_experts": None, "num_local_experts": 8}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", EXPERTS),
    "deepseek": ("DeepseekV3ForCausalLM", LATENT),
}


def family_body(family: str, **changes: Any) -> dict[str, Any]:
    architecture, keys = ARCHITECTURES[family]
    return body(architectures=[architecture], **{**keys, **changes})


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_each_family_reads_its_keys(family: str) -> None:
    assert from_hf(family_body(family), "tiny").parameters > 0


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_attention_heads", 6),
        ("llama", "num_attention_heads", 0),
        ("llama", "hidden_size", -64),
        ("llama", "hidden_size", "big"),
        ("llama", "num_hidden_layers", 2.5),
        ("llama", "num_hidden_layers", True),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "head_dim", 15),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "tie_word_embeddings", "yes"),
        ("llama", "rope_scaling", 4.0),
        ("mixtral", "num_experts_per_tok", 9),
        ("mixtral", "num_local_experts", None),
        ("mixtral", "sliding_window", 128),
        ("qwen2_moe", "moe_intermediate_size", None),
        ("qwen2_moe", "mlp_only_layers", [2]),
        ("qwen2_moe", "mlp_only_layers", 1),
        ("qwen2_moe", "decoder_sparse_step", 0),
        ("qwen2_moe", "qkv_bias", False),
        ("deepseek", "kv_lora_rank", None),
        ("deepseek", "qk_rope_head_dim", 15),
        ("deepseek", "n_group", 3),
        ("deepseek", "n_group", 8),
        ("deepseek", "topk_group", 5),
        ("deepseek", "num_experts_per_tok", 5),
        ("deepseek", "first_k_dense_replace", 3),
        ("deepseek", "scoring_func", "softmax"),
        ("deepseek", "topk_method", "greedy"),
        ("deepseek", "moe_layer_freq", 2),
    ],
)
def test_a_senseless_value_names_its_key(family: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"tiny.*{key}"):
        from_hf(family_body(family, **{key: value}), "tiny")


@pytest.mark.parametrize(("family", "theta"), [("llama", 1e4), ("mixtral", 1e6)])
def test_the_usual_rotary_base_is_that_of_the_family(family: str, theta: float) -> None:
    assert from_hf(family_body(family), "tiny").rope_theta == theta
    assert from_hf(family_body(family, rope_theta=500.0), "tiny").rope_theta == 500.0
    assert from_hf(family_body(family, rope_parameters={"rope_theta": 7.0}), "tiny").rope_theta == 7.0


def test_sparse_layers_follow_the_step_and_the_list() -> None:
    keys = family_body("qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    config = from_hf(keys, "tiny")
    assert [i for i in range(6) if config.sparse(i)] == [1, 5]


def test_bad_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_config_that_is_no_object_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json holds a list"):
        load_config(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="llama-3-70b"):
        load_config("llama-9")
