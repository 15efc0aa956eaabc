"""DeepSeek-V3's multi-head latent attention (arXiv 2412.19437, section 2.1.1) as part of a step's graph.

Its cache is one latent and one rotated key a token, which all heads share.
"""

import taskgraph as tg
from taskgraph.models.config import Latent, ModelConfig, Yarn
from taskgraph.models.layer import Layer, Sources


def latent_attention(
    layer: Layer, x: tg.Value, residual: tg.Value, positions: tg.Value, cache: int, context: int
) -> tg.Value:
    """residual + attention of x, which is normalised, over the layer's latent cache."""
    config, a = layer.config, latent_of(layer.config)
    q = _queries(layer, a, x)
    kv = layer.product(x, "kv_a", a.rank + a.rotary, "kv_a_proj")
    latents = layer.state("latents", positions.shape[0], cache, a.rank + a.rotary)
    q = tg.ops.latent_rope(
        q, kv, layer.weight("kv_norm", a.rank), positions, latents, heads=config.heads, rotary=a.rotary,
        theta=config.rope_theta, eps=_LATENT_EPS, yarn=yarn(config), interleaved=a.interleaved,
        name=layer.name("latent_rope"),
    )  # fmt: skip
    up = layer.weight("kv_b", config.heads * (a.plain + a.values), a.rank)
    mixed = tg.ops.latent_attention(
        q, positions, latents, up, rotary=a.rotary, scale=_score_scale(config), context=context,
        name=layer.name("attention"),
    )  # fmt: skip
    return layer.product(mixed, "o", config.hidden_size, "o_proj", residual=residual)


_LATENT_EPS = 1e-6
"""Of the norms of the compressed queries, keys and values, whatever the config says of the others."""


def _queries(layer: Layer, a: Latent, x: tg.Value) -> tg.Value:
    width = layer.config.heads * (a.plain + a.rotary)
    if not a.q_rank:
        return layer.product(x, "q", width, "q_proj")
    low = layer.product(x, "q_a", a.q_rank, "q_a_proj")
    norm = layer.weight("q_a_norm", a.q_rank)
    return layer.product(
        tg.ops.rmsnorm(low, norm, eps=_LATENT_EPS, name=layer.name("q_norm")), "q_b", width, "q_b_proj"
    )


def latent_of(config: ModelConfig) -> Latent:
    """The latent attention of the model; GraphError if it has none."""
    if config.latent is None:
        raise tg.GraphError(f"{config.name} has no latent attention.")
    return config.latent


def yarn(config: ModelConfig) -> tuple[float, ...]:
    """YaRN's numbers as `ops.rope_kv` takes them; empty for models without."""
    s = config.rope_scaling
    return (s.factor, s.low, s.high, s.attention) if isinstance(s, Yarn) else ()


def _score_scale(config: ModelConfig) -> float:
    stretch = config.rope_scaling.score_scale if isinstance(config.rope_scaling, Yarn) else 1.0
    return float(stretch / config.head_dim**0.5)


def latent_sources(config: ModelConfig) -> Sources:
    """The weights of `latent_attention` and the checkpoint's tensors that they are."""
    sources: Sources = {
        "kv_a": ("self_attn.kv_a_proj_with_mqa.weight",),
        "kv_norm": ("self_attn.kv_a_layernorm.weight",),
        "kv_b": ("self_attn.kv_b_proj.weight",),
        "o": ("self_attn.o_proj.weight",),
    }
    if not latent_of(config).q_rank:
        return sources | {"q": ("self_attn.q_proj.weight",)}
    return sources | {
        "q_a": ("self_attn.q_a_proj.weight",),
        "q_a_norm": ("self_attn.q_a_layernorm.weight",),
        "q_b": ("self_attn.q_b_proj.weight",),
    }
