"""Damaged model files give typed errors of one line and nothing else: 10,000 seeded mutations of each format."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from taskgraph.errors import WeightsError
from taskgraph.models import llama
from taskgraph.models.config import load_config
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.models.weights import open_checkpoint
from tests.model_files import CONFIG, raw_tokenizer, write_folder, write_gguf

MUTATIONS = 10_000
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, 10**400, 2**63, 2**31, -(2**63), 1e308, float("nan"), float("inf"), "", "x",
    "\n", "9" * 50, [], [1], ["a"], [[]], {}, {"a": 1}, [None], "yarn", "linear", "\udc80", [257, -1], {"content": 3},
]  # fmt: skip
EXTREMES = [0, 1, 2**7, 2**8 - 1, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def mutated_bytes(rng: random.Random, data: bytes, head: int) -> bytes:
    """One to three changes, most of them in the first `head` bytes: bytes, numbers, pieces, the end."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(head, len(changed)) if rng.random() < 0.9 else len(changed))
        match rng.randrange(6):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 3:
                changed[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
            case 4:
                del changed[at : at + rng.randint(1, 9)]
            case _:
                changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        if not changed:
            return b""
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.05 else changed)


def mutated_json(rng: random.Random, content: Any, text: bytes) -> bytes:
    """A value somewhere in it replaced, left out or doubled; sometimes its bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, text, len(text))
    changed = json.loads(text)
    place = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    if rng.random() < 0.1:
        del place[key]
    elif isinstance(place, dict) and rng.random() < 0.1:
        place[rng.choice(["x", "", "\n", "rope_scaling", "type", key + "0"])] = place[key]
    else:
        place[key] = rng.choice(ODD)
    return json.dumps(changed).encode()


def held(seed: int, mutate: Callable[[random.Random], bytes], path: Path, use: Callable[[int], None]) -> None:
    """Every mutation is refused by a WeightsError of one line that names the place, or can be used."""
    rng, good = random.Random(seed), 0
    for number in range(MUTATIONS):
        data = mutate(rng)
        path.write_bytes(data)
        try:
            use(number)
            good += 1
        except WeightsError as error:
            message = str(error)
            assert message and len(message.splitlines()) == 1 and len(message) < 1000, (number, message)
        except Exception as error:
            kept = path.with_name(f"failed-{number}-{path.name}")
            kept.write_bytes(data)
            raise AssertionError(f"mutation {number} ({kept}): {error!r}") from error
    assert 0 < good < MUTATIONS, "some mutations change nothing that counts, and most do"


def used(source: Path, number: int) -> None:
    with open_checkpoint(source) as checkpoint:
        if number % 4 == 0:
            checkpoint.tokenizer().encode("ab c<|end|>")
        if number % 16 == 0:
            llama.load_weights(checkpoint.config, checkpoint, "f32")


@pytest.mark.slow
def test_damaged_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, keys={"rope.scaling.factor": ("float32", 2.0), "tokenizer.ggml.eos_token_id": ("uint32", 257)})
    data = path.read_bytes()
    head = data.index(b"blk.0.ffn_down") + 400
    short = data.index(b"tokenizer.ggml.tokens") + 60
    held(1, lambda rng: mutated_bytes(rng, data, rng.choice((short, head))), path, lambda n: used(path, n))


@pytest.mark.slow
def test_damaged_safetensors_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    head = 8 + struct.unpack("<Q", data[:8])[0]

    def use(number: int) -> None:
        with open_checkpoint(path) as checkpoint:
            if number % 4 == 0:
                llama.load_weights(checkpoint.config, checkpoint, "f32")

    held(2, lambda rng: mutated_bytes(rng, data, head), path, use)


@pytest.mark.slow
def test_damaged_index_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    other = write_folder(tmp_path / "other", tensors={})
    (other / "model.safetensors").rename(folder / "b.safetensors")
    path = folder / "model.safetensors.index.json"
    with open_checkpoint(folder) as whole:
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(whole.names(), "a.safetensors")}
    text = json.dumps(content).encode()

    def use(number: int) -> None:
        open_checkpoint(folder).close()

    held(3, lambda rng: mutated_json(rng, content, text), path, use)


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
        "moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 24,
        "qk_nope_head_dim": 32, "topk_group": 2, "first_k_dense_replace": 0, "n_shared_experts": 1,
    },
    "qwen": {
        "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0],
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "layer_types": ["full_attention"],
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_damaged_configs(tmp_path: Path, family: str) -> None:
    content = {**CONFIG, **CONFIGS[family]}
    path, text = tmp_path / "config.json", json.dumps(content).encode()

    def use(number: int) -> None:
        config = load_config(path)
        assert config.parameters > 0 and 0 < config.layers <= 1000

    held(4, lambda rng: mutated_json(rng, content, text), path, use)


SETTINGS = {
    "bos_token": {"content": "<|turn|>"}, "eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}",
    "added_tokens_decoder": {"257": {"content": "<|end|>", "special": True}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
def test_damaged_settings_of_tokens(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m")
    content: Any = {"eos_token_id": [257, 3], "bos_token_id": 256} if name.startswith("generation") else SETTINGS
    text = json.dumps(content).encode()
    held(5, lambda rng: mutated_json(rng, content, text), folder / name, lambda n: use_tokenizer(folder, n))


def use_tokenizer(folder: Path, number: int) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert all(tokenizer.encode(tokenizer.decode([number], specials=True)) for number in tokenizer.eos_ids)
    tokenizer.decode(tokenizer.encode("ab<|end|> a"))
    if tokenizer.chat_template is not None and number % 8 == 0:
        tokenizer.chat("a")


@pytest.mark.slow
def test_damaged_tokenizers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    raw = raw_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<|turn|> $A <|end|>", special_tokens=[("<|turn|>", 256), ("<|end|>", 257)]
    )
    content = json.loads(raw.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {key: i for key, i in vocabulary.items() if key in ("a", "b", "ab") or i > 240}
    text = json.dumps(content).encode()
    held(6, lambda rng: mutated_json(rng, content, text), folder / "tokenizer.json", lambda n: use_tokenizer(folder, n))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}", "\xff", ""])
def test_deep_and_endless_json(tmp_path: Path, name: str, text: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")) as caught, open_checkpoint(folder) as checkpoint:
        checkpoint.tokenizer()
    assert len(str(caught.value).splitlines()) == 1
