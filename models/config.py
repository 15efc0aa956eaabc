"""Model shapes: read from a Hugging Face config.json, and shipped for the well-known sizes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from taskgraph.errors import WeightsError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretch of low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shapes of a dense decoder of the Llama family."""

    name: str
    family: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_context: int
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def parameters(self) -> int:
        """The exact number of parameters."""
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = self.hidden_size * (width + self.heads * self.head_dim + 3 * self.intermediate_size + 2)
        layer += width if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        tables = 1 if self.tie_embeddings else 2
        return self.layers * layer + self.hidden_size * (tables * self.vocab_size + 1)


def from_hf(body: Mapping[str, Any], name: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; WeightsError names what is missing or not supported."""
    architecture = (body.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise WeightsError(f"{name}: architecture {architecture!r} is not supported; use one of {', '.join(FAMILIES)}.")
    try:
        hidden, heads = int(body["hidden_size"]), int(body["num_attention_heads"])
        rope = body.get("rope_parameters") or {}
        return ModelConfig(
            name=name,
            family=FAMILIES[architecture],
            hidden_size=hidden,
            layers=int(body["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(body.get("num_key_value_heads") or heads),
            head_dim=int(body.get("head_dim") or hidden // heads),
            intermediate_size=int(body["intermediate_size"]),
            vocab_size=int(body["vocab_size"]),
            norm_eps=float(body["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or body.get("rope_theta") or 10000.0),
            max_context=int(body.get("max_position_embeddings") or 2048),
            tie_embeddings=bool(body.get("tie_word_embeddings", False)),
            rope_scaling=_scaling(body.get("rope_scaling") or rope, name),
        )
    except KeyError as error:
        raise WeightsError(f"{name}: its config.json has no {error.args[0]!r}.") from error


def _scaling(body: Mapping[str, Any], name: str) -> RopeScaling | None:
    kind = body.get("rope_type") or body.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise WeightsError(f"{name}: rope scaling {kind!r} is not supported; this version knows llama3's.")
    return RopeScaling(
        factor=float(body["factor"]),
        low_freq_factor=float(body["low_freq_factor"]),
        high_freq_factor=float(body["high_freq_factor"]),
        original_max_position=int(body["original_max_position_embeddings"]),
    )


def known() -> tuple[str, ...]:
    """Names of the configurations that ship with the package."""
    folder = resources.files("taskgraph.models") / "configs"
    return tuple(sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".json")))


def load_config(source: str | Path) -> ModelConfig:
    """The configuration of a known name ("llama-3-70b"), a config.json, or a folder that holds one."""
    name = "smollm2-135m" if source == "smollm2" else str(source)
    if name in known():
        text = (resources.files("taskgraph.models") / "configs" / f"{name}.json").read_text()
        return from_hf(json.loads(text), name)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(f"no model {name!r}: not a config.json, and not one of {', '.join(known())}.")
    try:
        return from_hf(json.loads(path.read_text()), path.parent.name)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON: {error}.") from error
