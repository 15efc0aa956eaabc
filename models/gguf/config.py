"""The ModelConfig of a GGUF file: which of its keys and tensors are honoured, harmless, or refused by name.

The rules are those of llama.cpp's loader (llama-model.cpp), which also refuses a file with a tensor that it does not
use. Where llama.cpp takes no notice of a key that changes arithmetic, this refuses.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import WeightsError
from taskgraph.models.config import ModelConfig
from taskgraph.models.documents import known_formats, words
from taskgraph.models.keys import ConfigKeys, HeadKeys, grouped_heads, layer_count, rotary_base
from taskgraph.models.stretch import gguf_stretch, neutral, number_is
from taskgraph.record import shown

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_HEADS = HeadKeys("embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length")

_KNOWN = known_formats()["gguf"]
_READ = words(f"{_KNOWN['read']} {_KNOWN['rotary']}")
_UNCHANGED: Mapping[str, list[Any]] = _KNOWN["unchanged"]
"""Keys of an architecture that are honoured with these values only."""
_HARMLESS = re.compile(
    r"general\.(?!type$)|quantize\.|imatrix\.|mradermacher\.|split\.(no|tensors\.count)$|tokenizer\.|training\."
)
"""Keys outside of the architecture's that change no arithmetic; those of the tokenizer are its to check."""

DIVISORS = "rope_freqs.weight"
_UNUSED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
"""Tensors that the graphs do not take: divisors of rotary frequencies, read here, and tables of the frequencies."""


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None for tensors that have none (rope_freqs)."""
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,8})\.(\w+)", stem, re.ASCII)
    if match:
        part = _KNOWN["layer_tensors"].get(match[2])
        return f"model.layers.{match[1]}.{part}.{kind}" if part else None
    return f"{_KNOWN['tensors'][stem]}.{kind}" if stem in _KNOWN["tensors"] else None


def unused(name: str) -> bool:
    """Whether a tensor is known to change nothing beyond what the config says."""
    return _UNUSED.fullmatch(name) is not None


def read_config(
    metadata: Mapping[str, Any], file: Path, tied: bool, divisors: npt.NDArray[np.float32] | None = None
) -> ModelConfig:
    """The config in a file's metadata; `tied` says that it has no output head, `divisors` are its rope_freqs.

    WeightsError, or ConfigError, names a key that is missing, senseless, not supported or not known.
    """
    name, arch = str(file), _architecture(metadata, str(file))
    keys = ConfigKeys(name, {k.removeprefix(f"{arch}."): v for k, v in metadata.items()}, "GGUF metadata", f"{arch}.")
    _check_keys(keys, metadata, arch)
    layers = layer_count(keys, "block_count")
    keys = replace(keys, keys={k: _one_for_all(keys, k, layers) for k in keys.keys})
    sizes = grouped_heads(keys, _HEADS)
    _check_head(keys, sizes.head_dim)
    theta = rotary_base(keys, "rope.freq_base", keys.number("rope.freq_base", 10000.0))
    if divisors is not None and divisors.size != sizes.head_dim // 2:
        raise WeightsError(
            f"{name}: {DIVISORS} has {divisors.size} entries, and there are {sizes.head_dim // 2} rotary frequencies."
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise WeightsError(f"{name}: its GGUF metadata has no 'tokenizer.ggml.tokens', a vocabulary; fetch it again.")
    return ModelConfig(
        name=file.stem,
        family=arch,
        hidden_size=sizes.hidden,
        layers=layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=keys.count("feed_forward_length"),
        vocab_size=len(tokens),
        norm_eps=_meant(keys.number("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        max_context=keys.count("context_length"),
        tie_embeddings=tied,
        rope_scaling=gguf_stretch(keys, theta, sizes.head_dim, divisors),
    )


def _architecture(metadata: Mapping[str, Any], name: str) -> str:
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise WeightsError(f"{name}: GGUF architecture {shown(arch)} is not supported; use one of {known}.")
    return str(arch)


def _check_keys(keys: ConfigKeys, metadata: Mapping[str, Any], arch: str) -> None:
    plain, kind, parts = replace(keys, prefix=""), metadata.get("general.type", "model"), metadata.get("split.count", 0)
    plain.need(kind == "model", "general.type", "it holds no model; give the file of the model itself")
    split = "a model in several files is not supported; join them (gguf-split --merge)"
    plain.need(parts in (0, 1), "split.count", split)
    for full, value in metadata.items():
        if _HARMLESS.match(full) or full in ("general.type", "split.count"):
            continue
        key = full.removeprefix(f"{arch}.")
        if key == full or (key not in _READ and key not in _UNCHANGED):
            raise WeightsError(
                f"{keys.name}: the GGUF key {shown(full)} ({shown(value)}) is not known to this version and may change "
                "the arithmetic; use another file of the model, or its safetensors checkpoint."
            )
        if key in _UNCHANGED:
            allowed = " or ".join(map(repr, _UNCHANGED[key]))
            keys.need(neutral(value, *_UNCHANGED[key]), key, f"only {allowed} is supported")


def _one_for_all(keys: ConfigKeys, key: str, layers: int) -> Any:
    """The value of a key: of an array with one entry a layer their common value; others than that are refused."""
    value = keys.keys[key]
    if not isinstance(value, list) or key not in _READ:
        return value
    keys.need(len(value) == layers, key, f"it must have one entry for each of {layers} layers")
    keys.need(all(v == value[0] for v in value), key, "layers that differ are not supported")
    return value[0]


def _check_head(keys: ConfigKeys, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.need(keys.count(key, head_dim) == head_dim, key, f"only whole heads of {head_dim} channels are supported")
    scale, window = keys.keys.get("attention.scale"), keys.keys.get("attention.sliding_window")
    good = neutral(scale, 0.0) or number_is(scale, head_dim**-0.5)
    keys.need(good, "attention.scale", f"scores are multiplied by 1 / sqrt({head_dim}) only")
    if not neutral(window, 0):
        wide = keys.count("attention.sliding_window") >= keys.count("context_length")
        keys.need(wide, "attention.sliding_window", "attention within a window is not supported")


def _meant(value: float) -> float:
    """The shortest decimal of a number that the file holds as f32: 1e-5, as every config.json has it. Products in f32
    are the same, and so is the step's graph, to which saved plans and remembered winners belong."""
    return float(str(np.float32(value)))
