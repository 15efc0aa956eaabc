"""The families of models that the graphs know: a record each, from the class name in a config.json to tensor names.

A family whose layers are Llama's is its record alone; CONTRIBUTING.md says how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from taskgraph.errors import ConfigError
from taskgraph.models.documents import known_formats, words
from taskgraph.models.keys import ConfigKeys


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
class ExpertNames:
    """What a checkpoint calls a layer's block of experts, an expert's products, and the expert of every token."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """What the models of one architecture have that others of Llama's kind have not.

    `name` is the model_type of their config.json, and `architecture` its class. `rope_theta` is the base of rotary
    frequencies that a config without means. With `window_switch` a sliding window counts only where
    use_sliding_window is true. `experts` and `latent` read what the config says of these; `reads` are the keys that
    they read, and those that change nothing here; `only` are settings with the one value that is supported. With
    `predicts` a checkpoint may hold layers beyond its last, which predict further tokens and are not read.
    """

    name: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 1e4
    window_switch: bool = False
    experts: Callable[[ConfigKeys, int], Experts] | None = None
    latent: Callable[[ConfigKeys], Latent] | None = None
    reads: frozenset[str] = frozenset()
    only: tuple[tuple[str, Any], ...] = ()
    expert_names: ExpertNames = ExpertNames()
    predicts: bool = False


# ------------------------------------------------------------------------------ latent attention, experts


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


# ------------------------------------------------------------------------------------------- the records

_READS = {name: words(text) for name, text in known_formats()["hf"]["families"].items()}

FAMILIES: dict[str, ModelFamily] = {}
"""ModelFamily by its name."""


def register(family: ModelFamily) -> ModelFamily:
    """Know a family from now on. ConfigError where its name or its architecture is known already."""
    twin = next((f for f in FAMILIES.values() if family.name == f.name or family.architecture == f.architecture), None)
    if twin is not None:
        raise ConfigError(f"the family {twin.name!r} ({twin.architecture}) is known already; choose another name.")
    FAMILIES[family.name] = family
    return family


register(ModelFamily("llama", "LlamaForCausalLM"))
register(ModelFamily("qwen2", "Qwen2ForCausalLM", qkv_bias=True, window_switch=True))
register(ModelFamily("qwen3", "Qwen3ForCausalLM", qk_norm=True, window_switch=True))
register(
    ModelFamily(
        "mixtral",
        "MixtralForCausalLM",
        rope_theta=1e6,
        experts=_mixtral_experts,
        reads=_READS["mixtral"],
        expert_names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    )
)
register(
    ModelFamily(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        qkv_bias=True,
        window_switch=True,
        experts=_qwen_experts,
        reads=_READS["qwen"],
    )
)
register(
    ModelFamily(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        window_switch=True,
        experts=_qwen_experts,
        reads=_READS["qwen"],
    )
)
register(
    ModelFamily(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        experts=_deepseek_experts,
        latent=_latent,
        reads=_READS["deepseek_v3"],
        only=(("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)),
        expert_names=ExpertNames(shared="shared_experts"),
        predicts=True,
    )
)
