"""Model shapes: read from a Hugging Face config.json, and shipped for the well-known sizes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from taskgraph.errors import ConfigError, GraphError, WeightsError
from taskgraph.models.documents import json_object, shown
from taskgraph.models.hf_keys import check_keys, check_scale
from taskgraph.models.stretch import RopeScaling as RopeScaling
from taskgraph.models.stretch import Stretch, rope_body, stretch_of
from taskgraph.models.stretch import Yarn as Yarn

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
"""Architecture -> family, which is also the model_type of its config.json."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of a model's sparse layers; the fields are those of `ops.route`.

    `shared_size` is the inner size of the expert that every token goes to (0: there is none), `shared_gate` whether
    a sigmoid weighs it. `dense` are the layers that have a plain MLP instead. Of `ranks` that share the experts out,
    number `rank` has its part of all `count`.
    """

    count: int
    top_k: int
    inner_size: int
    normalize: bool
    scoring: str = "softmax"
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    correction: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    dense: frozenset[int] = frozenset()
    ranks: int = 1
    rank: int = 0

    @property
    def held(self) -> int:
        """Experts that this rank has."""
        return self.count // self.ranks


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: ranks of the compressed queries (0: not compressed) and keys and values, and the
    channels of a head: rotated, not rotated, and of its values."""

    q_rank: int
    rank: int
    rotary: int
    plain: int
    values: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shapes of a decoder of the Llama family, dense or with experts, with grouped or latent attention.

    With `ranks` above 1 it is one rank's share of a model, as `share` makes it.
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

    @property
    def qkv_bias(self) -> bool:
        return self.family in ("qwen2", "qwen2_moe")

    @property
    def qk_norm(self) -> bool:
        return self.family in ("qwen3", "qwen3_moe")

    def sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and layer not in self.experts.dense

    def share(self, ranks: int, expert_rank: int | None = None) -> "ModelConfig":
        """The share of one of `ranks` tensor-parallel ranks: its heads and features. Graphs of it are that rank's.

        Every rank has its features of all experts, or with `expert_rank` whole experts, those of that rank.
        GraphError when there is something that the ranks cannot share equally, and for a share of a share.
        """
        if self.ranks > 1:
            raise GraphError(f"{self.name} is the share of one of {self.ranks} ranks already; share the whole model.")
        e, whole = self.experts, expert_rank is not None
        parts = {"heads": self.heads, "kv heads": self.kv_heads, "features": self.intermediate_size}
        parts |= {"vocabulary": self.vocab_size, "hidden size": self.hidden_size}
        if e is not None:
            parts |= {"shared features": e.shared_size}
            parts |= {"experts": e.count} if whole else {"expert features": e.inner_size}
        odd = next((name for name, number in parts.items() if ranks < 1 or number % ranks), None)
        if odd is not None:
            raise GraphError(f"{self.name} has {parts[odd]} {odd}, which {ranks} ranks cannot share; choose a divisor.")
        if e is not None and whole:
            e = replace(e, shared_size=e.shared_size // ranks, ranks=ranks, rank=expert_rank or 0)
        elif e is not None:
            e = replace(e, shared_size=e.shared_size // ranks, inner_size=e.inner_size // ranks)
        return replace(
            self, heads=self.heads // ranks, kv_heads=self.kv_heads // ranks, experts=e,
            intermediate_size=self.intermediate_size // ranks, ranks=ranks,
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


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """The keys of a config.json, or of a GGUF file; ConfigError names the one that is missing or makes no sense."""

    name: str
    keys: Mapping[str, Any]
    source: str = "config.json"
    prefix: str = ""

    def wrong(self, key: str, reason: str) -> ConfigError:
        named = self.prefix + shown(key).strip(QUOTES)
        return ConfigError(f"{self.name}: {named} is {shown(self.keys.get(key))}; {reason}.")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.keys.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.name}: its {self.source} has no {self.prefix + key!r}.")
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MOST
        if not good:
            raise self.wrong(key, "it must be a positive number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value != int(value) or value > MOST_COUNT:
            raise self.wrong(key, f"it must be a whole number of at most {MOST_COUNT}")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.keys.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "it must be true or false")
        return value

    def need(self, good: bool, key: str, reason: str) -> None:
        if not good:
            raise self.wrong(key, reason)

    def part(self, key: str) -> "ConfigKeys":
        """The object under `key`, empty when there is none."""
        value = self.keys.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.wrong(key, "it must be an object")
        return ConfigKeys(f"{self.name}: {key}", value, self.source, self.prefix)


QUOTES = "'\""
MOST, MOST_COUNT, MOST_LAYERS = 1e30, (1 << 31) - 1, 1000
"""Larger numbers, counts and depths are damage: the deepest published model has 126 layers."""


def layer_count(keys: ConfigKeys, key: str) -> int:
    """The number of layers, which must be one that a graph can have."""
    layers = keys.count(key)
    keys.need(layers <= MOST_LAYERS, key, f"at most {MOST_LAYERS} layers are supported")
    return layers


class HeadKeys(NamedTuple):
    """What a kind of file calls the sizes of attention."""

    hidden: str
    heads: str
    kv_heads: str
    head_dim: str


class Heads(NamedTuple):
    """The hidden size, the heads of queries and of keys and values, and the channels of each."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def grouped_heads(keys: ConfigKeys, named: HeadKeys) -> Heads:
    """The sizes of grouped attention, checked against each other; by default each head has its share of the hidden
    size and keys and values of its own."""
    hidden, heads = keys.count(named.hidden), keys.count(named.heads)
    kv_heads = keys.count(named.kv_heads, heads)
    keys.need(heads % kv_heads == 0, named.kv_heads, f"{heads} attention heads are no multiple of it")
    if keys.keys.get(named.head_dim) is None:
        keys.need(hidden % heads == 0, named.heads, f"{named.hidden} {hidden} is no multiple of it")
    return rotated(keys, named, Heads(hidden, heads, kv_heads, keys.count(named.head_dim, hidden // heads)))


def rotated(keys: ConfigKeys, named: HeadKeys, sizes: Heads) -> Heads:
    """These sizes, if a head's channels can be rotated in pairs."""
    pairs = f"the rotary embedding needs pairs of channels, and a head has {sizes.head_dim}"
    keys.need(sizes.head_dim % 2 == 0, named.head_dim, pairs)
    return sizes


def rotary_base(keys: ConfigKeys, key: str, value: float) -> float:
    """The base of the rotary frequencies under `key`."""
    keys.need(value >= 1, key, "it must be at least 1")
    return value


_HF_HEADS = HeadKeys("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def from_hf(body: Mapping[str, Any], name: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; ConfigError names what is missing or not supported."""
    keys = ConfigKeys(name, body)
    family = _family(keys)
    check_keys(keys, family)
    _check_supported(keys, family)
    latent = _latent(keys) if family == "deepseek_v3" else None
    sizes = grouped_heads(keys, _HF_HEADS) if latent is None else _latent_heads(keys, latent)
    layers, usual = layer_count(keys, "num_hidden_layers"), 1e6 if family == "mixtral" else 1e4
    theta = rotary_base(keys, "rope_theta", rope_body(keys).number("rope_theta", keys.number("rope_theta", usual)))
    check_scale(keys, sizes.head_dim)
    return ModelConfig(
        name=name,
        family=family,
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
        experts=_EXPERTS[family](keys, layers) if family in _EXPERTS else None,
        latent=latent,
    )


def _family(keys: ConfigKeys) -> str:
    """By the first architecture, or by model_type where the config lists none."""
    named = keys.keys.get("architectures")
    if named:
        keys.need(isinstance(named, list), "architectures", "it must be a list of names")
        if not isinstance(named[0], str) or named[0] not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ConfigError(f"{keys.name}: architecture {shown(named[0])} is not supported; use one of {known}.")
        return FAMILIES[named[0]]
    known, kind = ", ".join(FAMILIES.values()), keys.keys.get("model_type")
    keys.need(isinstance(kind, str) and kind in FAMILIES.values(), "model_type", f"use one of {known}")
    return str(kind)


def _check_supported(keys: ConfigKeys, family: str) -> None:
    """ConfigError for a setting that changes the arithmetic and that the graphs do not have."""
    if family == "qwen2_moe":
        keys.need(keys.flag("qkv_bias", True), "qkv_bias", "the qkv bias of this family cannot be left out")
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        given = keys.keys.get(key, only)
        keys.need(family != "deepseek_v3" or given == only, key, f"this version knows {only}")


def _latent_heads(keys: ConfigKeys, latent: Latent) -> Heads:
    heads = keys.count("num_attention_heads")
    sizes = Heads(keys.count("hidden_size"), heads, heads, latent.plain + latent.rotary)
    return rotated(keys, _HF_HEADS, sizes)


def _latent(keys: ConfigKeys) -> Latent:
    made = Latent(
        q_rank=keys.count("q_lora_rank") if keys.keys.get("q_lora_rank") is not None else 0,
        rank=keys.count("kv_lora_rank"),
        rotary=keys.count("qk_rope_head_dim"),
        plain=keys.count("qk_nope_head_dim"),
        values=keys.count("v_head_dim"),
        interleaved=keys.flag("rope_interleave", True),
    )
    keys.need(made.rotary % 2 == 0, "qk_rope_head_dim", "the rotary embedding needs pairs of channels")
    return made


# --------------------------------------------------------------------------------------------- experts


def _checked(keys: ConfigKeys, experts: Experts, layers: int) -> Experts:
    keys.need(
        experts.top_k <= experts.count, "num_experts_per_tok", f"there are only {experts.count} experts to choose from"
    )
    beyond = [i for i in experts.dense if not 0 <= i < layers]
    keys.need(not beyond, "mlp_only_layers", f"there are {layers} layers")
    return experts


def _count(keys: ConfigKeys) -> int:
    """The number of experts, which families name differently."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return keys.count(next((n for n in names if keys.keys.get(n) is not None), names[0]))


def _mixtral_experts(keys: ConfigKeys, layers: int) -> Experts:
    inner = keys.count("intermediate_size")
    return _checked(keys, Experts(_count(keys), keys.count("num_experts_per_tok"), inner, normalize=True), layers)


def _qwen_experts(keys: ConfigKeys, layers: int) -> Experts:
    """A layer has experts when its number, from 1, is a multiple of decoder_sparse_step and it is not in
    mlp_only_layers."""
    step, named = keys.count("decoder_sparse_step", 1), keys.keys.get("mlp_only_layers") or []
    good = isinstance(named, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in named)
    keys.need(good, "mlp_only_layers", "it must be a list of layer numbers")
    shared = keys.count("shared_expert_intermediate_size") if keys.keys.get("shared_expert_intermediate_size") else 0
    made = Experts(
        count=_count(keys),
        top_k=keys.count("num_experts_per_tok"),
        inner_size=keys.count("moe_intermediate_size"),
        normalize=keys.flag("norm_topk_prob"),
        shared_size=shared,
        shared_gate=shared > 0,
        dense=frozenset([*named, *(i for i in range(layers) if (i + 1) % step)]),
    )
    return _checked(keys, made, layers)


def _deepseek_experts(keys: ConfigKeys, layers: int) -> Experts:
    """The first layers are dense; sigmoid scores, a learnt correction of the choice, and groups of experts."""
    count, inner, groups = _count(keys), keys.count("moe_intermediate_size"), keys.count("n_group", 1)
    kept, first = keys.count("topk_group", 1), keys.keys.get("first_k_dense_replace") or 0
    keys.need(type(first) is int and 0 <= first <= layers, "first_k_dense_replace", f"there are {layers} layers")
    keys.need(count % groups == 0, "n_group", f"{count} experts do not make equal groups")
    keys.need(kept <= groups, "topk_group", f"there are only {groups} groups")
    keys.need(groups == 1 or count // groups >= 2, "n_group", "a group is scored by its two best experts")
    top = keys.count("num_experts_per_tok")
    keys.need(top <= kept * (count // groups), "num_experts_per_tok", f"{kept} groups do not hold as many experts")
    shared = inner * keys.count("n_shared_experts") if keys.keys.get("n_shared_experts") else 0
    made = Experts(
        count, top, inner, keys.flag("norm_topk_prob", True), "sigmoid", keys.number("routed_scaling_factor", 1.0),
        groups, kept, True, shared, False, frozenset(range(first)),
    )  # fmt: skip
    return _checked(keys, made, layers)


_EXPERTS = {
    "mixtral": _mixtral_experts,
    "qwen2_moe": _qwen_experts,
    "qwen3_moe": _qwen_experts,
    "deepseek_v3": _deepseek_experts,
}


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
