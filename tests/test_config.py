"""Model configs: shipped shapes against published sizes, and bad configs against typed errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from taskgraph.errors import WeightsError
from taskgraph.models.config import from_hf, known, load_config

PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
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
    with pytest.raises(WeightsError, match="MixtralForCausalLM"):
        from_hf(body(architectures=["MixtralForCausalLM"]), "tiny")


def test_an_unsupported_rope_scaling_is_named() -> None:
    with pytest.raises(WeightsError, match="yarn"):
        from_hf(body(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "tiny")


def test_bad_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_config(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="llama-3-70b"):
        load_config("llama-9")
