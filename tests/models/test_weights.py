"""Checkpoints: tensors equal to transformers' from the same file, and damaged files as typed errors."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from taskgraph.errors import WeightsError
from taskgraph.models.weights import Checkpoint, open_checkpoint

NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.7.self_attn.v_proj.weight",
    "model.layers.29.self_attn.o_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight",
]


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(smollm2_gguf) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> dict[str, torch.Tensor]:
    """The state that `from_pretrained(gguf_file=...)` loads; called below it, for that entry needs `accelerate`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(str(smollm2_gguf))["config"]
    config.pop("model_type")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    tensors: dict[str, torch.Tensor] = load_gguf_checkpoint(str(smollm2_gguf), True, model)["tensors"]
    return tensors


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A random Llama of 2 layers, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def state(folder: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    return dict(LlamaForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gguf_tensor_equals_transformers(checkpoint: Checkpoint, reference: dict[str, Any], name: str) -> None:
    tensor = checkpoint.tensor(name)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.as_tensor(reference[name]))


@pytest.mark.model
@pytest.mark.slow
def test_gguf_names_equal_transformers(checkpoint: Checkpoint, reference: dict[str, Any]) -> None:
    assert set(checkpoint.names()) == set(reference)


@pytest.mark.model
def test_gguf_config_is_that_of_smollm2(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert config.parameters == 134_515_008
    assert (config.family, config.head_dim, config.rope_theta) == ("llama", 64, 100_000.0)
    assert config.tie_embeddings


@pytest.mark.model
def test_an_absent_tensor_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(WeightsError, match="no_such"):
        checkpoint.tensor("model.no_such.weight")


def test_safetensors_load_back_equal(tiny_folder: Path) -> None:
    want = state(tiny_folder)
    with open_checkpoint(tiny_folder) as opened:
        assert set(opened.names()) == set(want)
        for name, tensor in want.items():
            assert opened.tensor(name).dtype == torch.bfloat16
            assert torch.equal(opened.tensor(name), tensor)


def test_sharded_safetensors_load_back_equal(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import LlamaForCausalLM

    sharded = tmp_path_factory.mktemp("sharded")
    LlamaForCausalLM.from_pretrained(tiny_folder).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    want = state(tiny_folder)
    with open_checkpoint(sharded) as opened:
        assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in want.items())


@pytest.mark.model
@pytest.mark.parametrize("size", [0, 3, 100, 1_000_000, 98_362_431])
def test_a_truncated_gguf_is_named(smollm2_gguf: Path, tmp_path: Path, size: int) -> None:
    damaged = tmp_path / "damaged.gguf"
    shutil.copyfile(smollm2_gguf, damaged)
    with damaged.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(WeightsError, match=r"damaged\.gguf"):
        open_checkpoint(damaged)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(b"this is not a GGUF file at all" * 10)
    with pytest.raises(WeightsError, match=r"text\.gguf"):
        open_checkpoint(path)


@pytest.mark.parametrize("size", [0, 4, 200, 20_000])
def test_truncated_safetensors_are_named(tiny_folder: Path, size: int) -> None:
    path = tiny_folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        open_checkpoint(tiny_folder)


@pytest.mark.parametrize("name", ["absent.gguf", "absent.safetensors", "absent-folder"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=name):
        open_checkpoint(tmp_path / name)


def test_a_bad_config_is_named(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        open_checkpoint(tiny_folder)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=str(tmp_path)):
        open_checkpoint(tmp_path)
