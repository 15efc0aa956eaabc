"""DeepSeek-V3's multi-head latent attention (arXiv 2412.19437, section 2.1.1) as part of a step's graph.

Its cache is one latent and one rotated key a token, which all heads share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import taskgraph as tg
from taskgraph.models.config import Latent, ModelConfig
from taskgraph.models.layer import Layer, PagedAttention, Sources, stretch
from taskgraph.models.stretch import Yarn


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """A layer's compressed queries, keys and values of some tokens, and the weights that attention takes."""

    layer: Layer
    q: tg.Value
    kv: tg.Value
    norm: tg.Value
    up: tg.Value

    @staticmethod
    def of(layer: Layer, x: tg.Value) -> "LatentAttention":
        """The compressed queries, keys and values of x, which is normalised."""
        config, a = layer.config, latent_of(layer.config)
        q = _queries(layer, a, x)
        kv = layer.product(x, "kv_a", a.rank + a.rotary, "kv_a_proj")
        up = layer.weight("kv_b", config.heads * (a.plain + a.values), a.rank)
        return LatentAttention(layer, q, kv, layer.weight("kv_norm", a.rank), up)

    def tokens(self, first: int, last: int) -> "LatentAttention":
        """The same of the tokens `first` to `last` - 1."""
        return replace(self, q=self.q.rows(first, last), kv=self.kv.rows(first, last))

    def over(self, positions: tg.Value, cache: int, context: int, mark: str = "") -> tg.Value:
        """Attention over a cache of latents of its own, whose names and ops' names begin with `mark`."""
        layer, config, a = self.layer, self.layer.config, latent_of(self.layer.config)
        latents = layer.state(f"{mark}latents", positions.shape[0], cache, a.rank + a.rotary)
        name, spec = layer.name(f"{mark}latent_rope"), _rope_spec(config)
        q = tg.ops.latent_rope(self.q, self.kv, self.norm, positions, latents, spec=spec, name=name)
        name, over = layer.name(f"{mark}attention"), tg.ops.LatentSpec(a.rotary, _score_scale(config), context)
        return tg.ops.latent_attention(q, positions, latents, self.up, spec=over, name=name)

    def over_pages(
        self, positions: tg.Value, slots: tg.Value, pages: Sequence[tg.Value], context: int
    ) -> PagedAttention:
        """Attention over a cache of latents in pages; every token's place and slot are given."""
        layer, config, a = self.layer, self.layer.config, latent_of(self.layer.config)
        (latents,) = pages
        places, name = tg.ops.TokenPlaces(positions, slots, context), layer.name("latent_rope")
        spec = _rope_spec(config)
        q = tg.ops.paged_latent_rope(self.q, self.kv, self.norm, places, latents, spec=spec, name=name)
        over = tg.ops.LatentSpec(a.rotary, _score_scale(config), context)
        kinds = (tg.ops.paged_latent_decode, tg.ops.paged_latent_prefill)
        return PagedAttention(q, *(partial(kind, latents=latents, up=self.up, spec=over) for kind in kinds))


_LATENT_EPS = 1e-6
"""The eps of the norms of the compressed queries, keys and values, whatever the config says of the others."""


def _queries(layer: Layer, a: Latent, x: tg.Value) -> tg.Value:
    width = layer.config.heads * (a.plain + a.rotary)
    if not a.q_rank:
        return layer.product(x, "q", width, "q_proj")
    low = layer.product(x, "q_a", a.q_rank, "q_a_proj")
    norm = layer.weight("q_a_norm", a.q_rank)
    low = tg.ops.rmsnorm(low, norm, eps=_LATENT_EPS, name=layer.name("q_norm"))
    return layer.product(low, "q_b", width, "q_b_proj")


def latent_of(config: ModelConfig) -> Latent:
    """The latent attention of the model; GraphError if it has none."""
    if config.latent is None:
        raise tg.GraphError(f"{config.name} has no latent attention.")
    return config.latent


def _rope_spec(config: ModelConfig) -> tg.ops.LatentRopeSpec:
    a = latent_of(config)
    return tg.ops.LatentRopeSpec(config.heads, a.rotary, config.rope_theta, _LATENT_EPS, stretch(config), a.interleaved)


def _score_scale(config: ModelConfig) -> float:
    stretch = config.rope_scaling.score_scale if isinstance(config.rope_scaling, Yarn) else 1.0
    return float(stretch / config.head_dim**0.5)


def latent_sources(config: ModelConfig) -> Sources:
    """The weights of a LatentAttention and of its output, and the checkpoint's tensors that they are."""
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
