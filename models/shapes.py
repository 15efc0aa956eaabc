"""What a checkpoint of a model holds: the shape of every tensor by its Hugging Face name."""

import re

from taskgraph.models.config import Experts, Latent, ModelConfig

Shape = tuple[int, ...]

_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.(.+)", re.ASCII)
_EXPERT_NAME = re.compile(r"(\w+)\.experts\.(0|[1-9]\d{0,8})\.(\w+)\.weight", re.ASCII)


def shape_of(config: ModelConfig, name: str) -> Shape | None:
    """The shape of the tensor of that name in a checkpoint of the model; None if it has none."""
    table = (config.vocab_size, config.hidden_size)
    top = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_embeddings:
        top["lm_head.weight"] = table
    found = _LAYER_NAME.fullmatch(name)
    if found is None:
        return top.get(name)
    return _in_layer(config, int(found[1]), found[2]) if int(found[1]) < config.layers else None


def _in_layer(config: ModelConfig, layer: int, part: str) -> Shape | None:
    hidden = config.hidden_size
    if part in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        return (hidden,)
    if part.startswith("self_attn."):
        attention = _latent(config, config.latent) if config.latent else _grouped(config)
        return attention.get(part.removeprefix("self_attn."))
    if config.experts is not None and config.sparse(layer):
        return _sparse(config, config.experts, part)
    inner = config.intermediate_size
    return _mlp("mlp.", hidden, inner).get(part)


def _grouped(config: ModelConfig) -> dict[str, Shape]:
    rows = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    wide = {name: n * config.head_dim for name, n in rows.items()}
    found: dict[str, Shape] = {f"{name}.weight": (n, config.hidden_size) for name, n in wide.items()}
    found["o_proj.weight"] = (config.hidden_size, config.heads * config.head_dim)
    if config.qkv_bias:
        found |= {f"{name}.bias": (n,) for name, n in wide.items()}
    if config.qk_norm:
        found |= {f"{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return found


def _latent(config: ModelConfig, a: Latent) -> dict[str, Shape]:
    hidden, heads, width = config.hidden_size, config.heads, config.heads * config.head_dim
    found: dict[str, Shape] = {
        "kv_a_proj_with_mqa.weight": (a.rank + a.rotary, hidden),
        "kv_a_layernorm.weight": (a.rank,),
        "kv_b_proj.weight": (heads * (a.plain + a.values), a.rank),
        "o_proj.weight": (hidden, heads * a.values),
    }
    if not a.q_rank:
        return found | {"q_proj.weight": (width, hidden)}
    low: dict[str, Shape] = {"q_a_proj.weight": (a.q_rank, hidden), "q_a_layernorm.weight": (a.q_rank,)}
    return found | low | {"q_b_proj.weight": (width, a.q_rank)}


def _sparse(config: ModelConfig, e: Experts, part: str) -> Shape | None:
    hidden, named = config.hidden_size, config.record.expert_names
    expert = _EXPERT_NAME.fullmatch(part)
    if expert is not None and expert[1] == named.block and int(expert[2]) < e.count:
        wide, narrow = (e.inner_size, hidden), (hidden, e.inner_size)
        return {named.gate: wide, named.up: wide, named.down: narrow}.get(expert[3])
    block = f"{named.block}."
    found: dict[str, Shape] = {f"{block}gate.weight": (e.count, hidden)}
    if e.correction:
        found[f"{block}gate.e_score_correction_bias"] = (e.count,)
    if e.shared_size:
        found |= _mlp(f"{block}{named.shared}.", hidden, e.shared_size)
    if e.shared_gate:
        found[f"{block}shared_expert_gate.weight"] = (1, hidden)
    return found.get(part)


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    ends = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{prefix}{name}.weight": shape for name, shape in ends.items()}
