"""Tiny model files that tests write: GGUF with a byte vocabulary, and folders in Hugging Face layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

HIDDEN, HEADS, KV, INNER = 32, 2, 1, 32
DIM = HIDDEN // HEADS
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*LETTERS, "<|turn|>", "<|end|>", "ab"]
KEYS: dict[str, tuple[str, Any]] = {
    "context_length": ("uint32", 512), "embedding_length": ("uint32", HIDDEN), "block_count": ("uint32", 1),
    "feed_forward_length": ("uint32", INNER), "attention.head_count": ("uint32", HEADS),
    "attention.head_count_kv": ("uint32", KV), "attention.layer_norm_rms_epsilon": ("float32", 1e-5),
}  # fmt: skip
TOKENIZER: dict[str, tuple[str, Any]] = {
    "tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", "gpt-2"),
    "tokenizer.ggml.tokens": ("array", TOKENS), "tokenizer.ggml.token_type": ("array", [1] * 256 + [3, 3, 1]),
    "tokenizer.ggml.merges": ("array", ["a b"]),
}  # fmt: skip


def gguf_tensors(arch: str = "llama", layers: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """What a model of these sizes has, drawn at random, by GGUF names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(layers):
        b = f"blk.{i}."
        shapes |= {
            f"{b}attn_norm.weight": (HIDDEN,), f"{b}attn_q.weight": (HEADS * DIM, HIDDEN),
            f"{b}attn_k.weight": (KV * DIM, HIDDEN), f"{b}attn_v.weight": (KV * DIM, HIDDEN),
            f"{b}attn_output.weight": (HIDDEN, HEADS * DIM), f"{b}ffn_norm.weight": (HIDDEN,),
            f"{b}ffn_gate.weight": (INNER, HIDDEN), f"{b}ffn_up.weight": (INNER, HIDDEN),
            f"{b}ffn_down.weight": (HIDDEN, INNER),
        }  # fmt: skip
        if arch == "qwen2":
            sizes = {"q": HEADS * DIM, "k": KV * DIM, "v": KV * DIM}
            shapes |= {f"{b}attn_{name}.bias": (size,) for name, size in sizes.items()}
        if arch == "qwen3":
            shapes |= {f"{b}attn_{name}_norm.weight": (DIM,) for name in "qk"}
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.2 + ("norm" in name)).astype(np.float32) for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    arch: str = "llama",
    keys: Mapping[str, tuple[str, Any] | None] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> dict[str, np.ndarray]:
    """A model file; `keys` (full names, or after "ARCH.") and `tensors` replace, add, or (None) leave out."""
    writer = gguf.GGUFWriter(str(path), arch)
    all_keys: dict[str, tuple[str, Any] | None] = {f"{arch}.{key}": value for key, value in KEYS.items()} | TOKENIZER
    for key, value in (keys or {}).items():
        all_keys[key if key.startswith(("general.", "tokenizer.", "split.", "other.")) else f"{arch}.{key}"] = value
    for key, entry in all_keys.items():
        if entry is not None:
            getattr(writer, f"add_{entry[0]}")(key, entry[1])
    made = {n: t for n, t in {**gguf_tensors(arch), **(tensors or {})}.items() if t is not None}
    for name, data in made.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, data)
        elif data.dtype == np.uint8:
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "intermediate_size": INNER, "vocab_size": len(TOKENS), "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": 257,
}  # fmt: skip


def hf_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """What a model of CONFIG has, drawn at random."""
    from taskgraph.models.gguf.config import hf_name

    found = {hf_name(name): torch.from_numpy(data) for name, data in gguf_tensors(seed=seed).items()}
    return {name: tensor for name, tensor in found.items() if name is not None}


def raw_tokenizer() -> RawTokenizer:
    """A token a byte, two special tokens, and one merge."""
    raw = RawTokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in TOKENS[256:258]])
    return raw


def write_folder(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **files: Any,
) -> Path:
    """A checkpoint; `files` are JSON objects by the stem of their names."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(dict(hf_tensors() if tensors is None else tensors), folder / "model.safetensors")
    raw_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
