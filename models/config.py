"""Model shapes: read from a Hugging Face config.json, and shipped for the well-known sizes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from taskgraph.errors import ConfigError, GraphError, WeightsError
from taskgraph.models.documents import json_object
from taskgraph.models.families import FAMILIES, ModelFamily
from taskgraph.models.families import Experts as Experts
from taskgraph.models.families import Latent as Latent
from taskgraph.models.hf_keys import check_keys, check_scale
from taskgraph.models.keys import ConfigKeys, HeadKeys, Heads, grouped_heads, layer_count, rotary_base, rotated
from taskgraph.models.stretch import RopeScaling as RopeScaling
from taskgraph.models.stretch import Stretch, rope_body, stretch_of
from taskgraph.models.stretch import Yarn as Yarn
from taskgraph.record import shown


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shapes of a decoder of the Llama family, dense or with experts, with grouped or latent attention.

    With `ranks` above 1 it is one rank's share of a model, as `share` makes it; each of its key-value heads is then
    that of `kv_copies` ranks.
    """

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
    rope_scaling: Stretch = None
    experts: Experts | None = None
    latent: Latent | None = None
    ranks: int = 1
    kv_copies: int = 1

    @property
    def record(self) -> ModelFamily:
        """The record of its family."""
        return FAMILIES[self.family]

    @property
    def qkv_bias(self) -> bool:
        return self.record.qkv_bias

    @property
    def qk_norm(self) -> bool:
        return self.record.qk_norm

    def sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and layer not in self.experts.dense

    def share(self, ranks: int, expert_rank: int | None = None) -> "ModelConfig":
        """The share of one of `ranks` tensor-parallel ranks: its heads and features. Graphs of it are that rank's.

        Every rank has its features of all experts, or with `expert_rank` whole experts, those of that rank. Of more
        ranks than key-value heads several neighbours have the same one (Megatron-LM).
        GraphError when there is something that the ranks cannot share equally, and for a share of a share.
        """
        if self.ranks > 1:
            raise GraphError(f"{self.name} is the share of one of {self.ranks} ranks already; share the whole model.")
        e, whole = self.experts, expert_rank is not None
        copies = max(ranks // self.kv_heads, 1)
        parts = {"heads": self.heads, "kv heads": self.kv_heads * copies, "features": self.intermediate_size}
        parts |= {"vocabulary": self.vocab_size, "hidden size": self.hidden_size}
        if e is not None:
            parts |= {"shared features": e.shared_size}
            parts |= {"experts": e.count} if whole else {"expert features": e.inner_size}
        odd = next((name for name, number in parts.items() if ranks < 1 or number % ranks), None)
        if odd is not None:
            if odd == "kv heads":
                raise GraphError(
                    f"{self.name} has {self.kv_heads} kv heads, which {ranks} ranks cannot share; choose a divisor, or "
                    "a multiple, of which several ranks have the same head."
                )
            raise GraphError(f"{self.name} has {parts[odd]} {odd}, which {ranks} ranks cannot share; choose a divisor.")
        if e is not None and whole:
            e = replace(e, shared_size=e.shared_size // ranks, ranks=ranks, rank=expert_rank or 0)
        elif e is not None:
            e = replace(e, shared_size=e.shared_size // ranks, inner_size=e.inner_size // ranks)
        return replace(
            self, heads=self.heads // ranks, kv_heads=self.kv_heads * copies // ranks, experts=e,
            intermediate_size=self.intermediate_size // ranks, ranks=ranks, kv_copies=copies,
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        """The exact number of parameters."""
        sparse = sum(map(self.sparse, range(self.layers)))
        mlps = sparse * self._expert_parameters()
        mlps += (self.layers - sparse) * 3 * self.hidden_size * self.intermediate_size
        tables = 1 if self.tie_embeddings else 2
        layers = self.layers * (self._attention_parameters() + 2 * self.hidden_size)
        return layers + mlps + self.hidden_size * (tables * self.vocab_size + 1)

    def _attention_parameters(self) -> int:
        if self.latent is not None:
            a, hidden, heads = self.latent, self.hidden_size, self.heads
            queries = a.q_rank * (hidden + heads * self.head_dim + 1) if a.q_rank else hidden * heads * self.head_dim
            compressed = hidden * (a.rank + a.rotary) + a.rank
            return queries + compressed + a.rank * heads * (a.plain + a.values) + heads * a.values * hidden
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        extra = (width if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        return self.hidden_size * (width + self.heads * self.head_dim) + extra

    def _expert_parameters(self) -> int:
        e = self.experts
        if e is None:
            return 0
        inner = e.count * e.inner_size + e.shared_size
        return self.hidden_size * (3 * inner + e.count + (1 if e.shared_gate else 0))


# ----------------------------------------------------------------------------------- reading config.json

_HF_HEADS = HeadKeys("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def from_hf(body: Mapping[str, Any], name: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; ConfigError names what is missing or not supported."""
    keys = ConfigKeys(name, body)
    family = _family(keys)
    check_keys(keys, family)
    latent = family.latent(keys) if family.latent is not None else None
    sizes = grouped_heads(keys, _HF_HEADS) if latent is None else _latent_heads(keys, latent)
    layers, base = layer_count(keys, "num_hidden_layers"), keys.number("rope_theta", family.rope_theta)
    theta = rotary_base(keys, "rope_theta", rope_body(keys).number("rope_theta", base))
    check_scale(keys, sizes.head_dim)
    return ModelConfig(
        name=name,
        family=family.name,
        hidden_size=sizes.hidden,
        layers=layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=keys.count("intermediate_size"),
        vocab_size=keys.count("vocab_size"),
        norm_eps=keys.number("rms_norm_eps"),
        rope_theta=theta,
        max_context=keys.count("max_position_embeddings", 2048),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        rope_scaling=stretch_of(keys, theta, latent.rotary if latent else sizes.head_dim),
        experts=family.experts(keys, layers) if family.experts is not None else None,
        latent=latent,
    )


def _family(keys: ConfigKeys) -> ModelFamily:
    """By the first architecture, or by model_type where the config lists none."""
    named = keys.keys.get("architectures")
    if named:
        keys.need(isinstance(named, list), "architectures", "it must be a list of names")
        by_class = {family.architecture: family for family in FAMILIES.values()}
        if not isinstance(named[0], str) or named[0] not in by_class:
            known = ", ".join(by_class)
            raise ConfigError(f"{keys.name}: architecture {shown(named[0])} is not supported; use one of {known}.")
        return by_class[named[0]]
    kind = keys.keys.get("model_type")
    keys.need(isinstance(kind, str) and kind in FAMILIES, "model_type", f"use one of {', '.join(FAMILIES)}")
    return FAMILIES[str(kind)]


def _latent_heads(keys: ConfigKeys, latent: Latent) -> Heads:
    heads = keys.count("num_attention_heads")
    sizes = Heads(keys.count("hidden_size"), heads, heads, latent.plain + latent.rotary)
    return rotated(keys, _HF_HEADS, sizes)


# ------------------------------------------------------------------------------------------- known sizes


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
    return from_hf(json_object(path), path.resolve().parent.name)
