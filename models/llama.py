"""Decoders of the Llama family as task graphs over a static KV cache: Llama 2 and 3, SmolLM2, Qwen2 and Qwen3, and
with the layers of moe.py and deepseek.py Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3.

One dense step is nine ops a layer: projections fused where they share an input (q, k, v; gate, up), residual sums
fused into the products that feed them, and one vocabulary product a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import taskgraph as tg
from taskgraph.models import weight_cache
from taskgraph.models.config import ModelConfig
from taskgraph.models.deepseek import LatentAttention, latent_sources
from taskgraph.models.layer import Layer, LayerPattern, Names, PagedAttention, Sources, pattern_of, stretch
from taskgraph.models.moe import expert_mlp, expert_sources

if TYPE_CHECKING:
    import torch


class TensorSource(Protocol):
    """Anything that gives tensors by their Hugging Face names (a Checkpoint)."""

    def tensor(self, name: str) -> "torch.Tensor": ...


LOGITS, NEXT = "lm_head_proj.out", "sample.out"
"""Names of the outputs of every step graph."""


Attend = Callable[[Layer, tg.Value], tg.Value]
"""The attention of a layer: (layer, normalised input) -> mixed heads, which the output projection takes."""


def step_graph(
    config: ModelConfig,
    *,
    batch: int,
    tokens: int,
    cache: int,
    dtype: str = "bf16",
    context: int | None = None,
    all_logits: bool = False,
) -> tg.Graph:
    """One step of `batch` sequences of `tokens` new tokens each: prefill (tokens > 1) or decode (tokens == 1).

    Inputs: tokens i64 (batch * tokens,), sequence by sequence, and positions i64 (batch,), the place of each
    sequence's first new token. States: keys and values of every layer, (batch, kv heads, cache, head dim), or its
    latents, (batch, cache, rank + rotary). Outputs: logits (batch, vocabulary) of each sequence's last token, or of
    every token with `all_logits`, and next i64, their argmax. `context` is the cache length that the cost counts
    (default: `cache`). The graph of a rank's share (`ModelConfig.share`) has the collectives between the ranks, each of
    which must be given the same inputs.
    """
    b = tg.GraphBuilder(f"{config.name}-{'prefill' if tokens > 1 else 'decode'}-{batch}x{tokens}")
    ids = b.input("tokens", (batch * tokens,), "i64")
    positions = b.input("positions", (batch,), "i64")
    counted = min(context or cache, cache)

    def attend(layer: Layer, x: tg.Value) -> tg.Value:
        return attention_of(layer, x).over(positions, cache, counted)

    x, table = layers(b, config, ids, dtype, attend)
    if tokens > 1 and not all_logits:
        x = tg.ops.slice_rows(x, tokens - 1, batch * tokens, tokens, name="last_token")
    b.output(*sampled(b, config, x, table, dtype))
    return b.build()


def layers(
    b: tg.GraphBuilder,
    config: ModelConfig,
    ids: tg.Value,
    dtype: str,
    attend: Attend,
    slots: tg.Value | None = None,
) -> tuple[tg.Value, tg.Value]:
    """The tokens `ids` through the embedding and every layer, whose attention is `attend`.

    Returns the last layer's output (tokens, hidden), and the embedding table. Tokens whose entry of `slots` is below 0
    go to no expert.
    """
    table = b.weight("embed", (config.vocab_size, config.hidden_size), dtype)
    x = tg.ops.embedding(ids, table, name="embedding")
    pattern = layer_pattern(config)
    for i in range(pattern.first):
        x = _layer(Layer(b, config, dtype, pattern.head(i), i, slots), x, attend)
    with b.repeat(pattern.count, "layer") as loop:
        entry = h = loop.carry(x, "x")
        for j in range(pattern.period):
            h = _layer(Layer(b, config, dtype, pattern.body(j), pattern.first + j, slots), h, attend)
        return loop.next(entry, h), table


def _layer(layer: Layer, x: tg.Value, attend: Attend) -> tg.Value:
    """Attention, then an MLP or experts, each on what is normalised and added to what it was."""
    mixed = attend(layer, layer.norm(x, "attn_norm", "norm1"))
    x = layer.summed(mixed, "o", x)
    return mlp(layer, layer.norm(x, "mlp_norm", "norm2"), x)


def sampled(
    b: tg.GraphBuilder, config: ModelConfig, x: tg.Value, table: tg.Value, dtype: str
) -> tuple[tg.Value, tg.Value]:
    """The logits of the tokens whose last layer's output is `x`, and their argmax; `table` is the embedding's.

    Each of several ranks computes its part of the vocabulary, and gets the others' of them.
    """
    ranks = config.ranks
    x = Layer(b, config, dtype).norm(x, "norm", "final_norm")
    tied, shard = config.tie_embeddings and ranks == 1, (config.vocab_size // ranks, config.hidden_size)
    head = table if tied else b.weight("lm_head", shard, dtype)
    logits = tg.ops.gemm(x, head, transpose_w=True, name="lm_head_proj" if ranks == 1 else "lm_head_shard")
    if ranks > 1:
        logits = tg.ops.all_gather(logits, ranks=ranks, axis=1, name="lm_head_proj")
    return logits, tg.ops.argmax(logits, name="sample")


def layer_pattern(config: ModelConfig) -> LayerPattern:
    """The layers that the graphs of this model write out and those that they repeat."""
    return pattern_of([config.sparse(i) for i in range(config.layers)])


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """A layer's queries, keys and values of some tokens, fused, and the weights of the norms of heads, if any."""

    layer: Layer
    qkv: tg.Value
    norms: tuple[tg.Value, ...]

    @staticmethod
    def of(layer: Layer, x: tg.Value) -> "GroupedAttention":
        """The fused queries, keys and values of x, which is normalised."""
        config = layer.config
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        bias = layer.weight("qkv_bias", width) if config.qkv_bias else None
        qkv = layer.product(x, "qkv", width, "qkv_proj", bias=bias)
        names = ("q_norm", "k_norm") if config.qk_norm else ()
        return GroupedAttention(layer, qkv, tuple(layer.weight(n, config.head_dim) for n in names))

    def tokens(self, first: int, last: int) -> "GroupedAttention":
        """The same of the tokens `first` to `last` - 1."""
        return replace(self, qkv=self.qkv.rows(first, last))

    def over(self, positions: tg.Value, cache: int, context: int, mark: str = "") -> tg.Value:
        """Attention over a cache of its own, whose names and ops' names begin with `mark`."""
        layer, config = self.layer, self.layer.config
        room = (positions.shape[0], config.kv_heads, cache, config.head_dim)
        keys, values = layer.state(f"{mark}keys", *room), layer.state(f"{mark}values", *room)
        name = layer.name(f"{mark}rope")
        q = tg.ops.rope_kv(self.qkv, positions, keys, values, self.norms, spec=_rope_spec(config), name=name)
        return tg.ops.attention(q, positions, keys, values, context=context, name=layer.name(f"{mark}attention"))

    def over_pages(
        self, positions: tg.Value, slots: tg.Value, pages: Sequence[tg.Value], context: int
    ) -> PagedAttention:
        """Attention over keys and values in pages; every token's place and slot are given."""
        layer, config = self.layer, self.layer.config
        keys, values = pages
        places, name = tg.ops.TokenPlaces(positions, slots, context), layer.name("rope")
        q = tg.ops.paged_rope(self.qkv, places, keys, values, self.norms, spec=_rope_spec(config), name=name)
        kinds = (tg.ops.paged_decode, tg.ops.paged_prefill)
        return PagedAttention(q, *(partial(kind, keys=keys, values=values, context=context) for kind in kinds))


def _rope_spec(config: ModelConfig) -> tg.ops.RopeSpec:
    return tg.ops.RopeSpec(config.heads, config.rope_theta, config.norm_eps, stretch(config))


def attention_of(layer: Layer, x: tg.Value) -> GroupedAttention | LatentAttention:
    """The layer's attention of x, which is normalised, to be finished over one cache or several."""
    return LatentAttention.of(layer, x) if layer.config.latent else GroupedAttention.of(layer, x)


def mlp(layer: Layer, x: tg.Value, residual: tg.Value) -> tg.Value:
    """residual + the layer's MLP or experts of x, which is normalised."""
    config = layer.config
    if config.sparse(layer.number):
        return expert_mlp(layer, x, residual)
    gate_up = layer.product(x, "gate_up", 2 * config.intermediate_size, "gate_up_proj")
    active = tg.ops.swiglu(gate_up, name=layer.name("swiglu"))
    return layer.summed(active, "down", residual)


# ----------------------------------------------------------------------------------- weights and caches


def load_weights(config: ModelConfig, source: TensorSource, dtype: str) -> dict[str, "torch.Tensor"]:
    """Every weight of the step graphs by its flat name, fused and converted; about twice the largest weight extra.

    Of a source with an `identity`, a GGUF file, they are kept in the user's cache and mapped from there the next time.
    """
    identity = getattr(source, "identity", None)
    if identity is None:
        return _converted(config, source, dtype)
    key = weight_cache.key_of(identity, config, dtype)
    weights = weight_cache.load(key)
    if weights is None:
        weights = _converted(config, source, dtype)
        weight_cache.store(key, weights)
    return weights


def _converted(config: ModelConfig, source: TensorSource, dtype: str) -> dict[str, "torch.Tensor"]:
    import torch

    kind = _kind(dtype)

    def read(name: str, wanted: torch.dtype) -> torch.Tensor:
        found = source.tensor(name)
        if found.element_size() < 2:
            raise tg.WeightsError(f"tensor {name!r} is quantised ({found.dtype}); use a bf16, f16 or f32 checkpoint.")
        return found.to(wanted)

    def joined(sources: Names | tuple[Names, ...], stem: str = "", wanted: torch.dtype = kind) -> torch.Tensor:
        parts = [read(stem + s, wanted) if isinstance(s, str) else joined(s, stem, wanted) for s in sources]
        if not isinstance(sources[0], str):
            return torch.stack(parts)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    weights = {"embed": joined(("model.embed_tokens.weight",)), "norm": joined(("model.norm.weight",))}
    if not config.tie_embeddings:
        weights["lm_head"] = joined(("lm_head.weight",))
    for i, mark in enumerate(layer_pattern(config).marks()):
        for name, sources in layer_sources(config, i).items():
            wanted = torch.float32 if name == "router_correction" else kind
            weights[mark + name] = joined(sources, f"model.layers.{i}.", wanted)
    return weights


def _kind(dtype: str) -> "torch.dtype":
    import torch

    return {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}[dtype]


def layer_sources(config: ModelConfig, layer: int) -> Sources:
    """Our weights of that layer and the Hugging Face tensors that they are made of."""
    sources: Sources = {
        "attn_norm": ("input_layernorm.weight",),
        "mlp_norm": ("post_attention_layernorm.weight",),
    }
    sources |= latent_sources(config) if config.latent else _attention_sources(config)
    if config.sparse(layer):
        return sources | expert_sources(config)
    return sources | {
        "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": ("mlp.down_proj.weight",),
    }


def _attention_sources(config: ModelConfig) -> Sources:
    qkv = tuple(f"self_attn.{p}_proj" for p in "qkv")
    sources: Sources = {"qkv": tuple(f"{name}.weight" for name in qkv), "o": ("self_attn.o_proj.weight",)}
    if config.qkv_bias:
        sources["qkv_bias"] = tuple(f"{name}.bias" for name in qkv)
    if config.qk_norm:
        sources |= {"q_norm": ("self_attn.q_norm.weight",), "k_norm": ("self_attn.k_norm.weight",)}
    return sources


def make_cache(config: ModelConfig, batch: int, cache: int, dtype: str) -> dict[str, "torch.Tensor"]:
    """Zeroed states of every layer by name: keys and values, or latents."""
    import torch

    room: dict[str, tuple[int, ...]]
    if config.latent:
        room = {"latents": (batch, cache, config.latent.rank + config.latent.rotary)}
    else:
        room = dict.fromkeys(("keys", "values"), (batch, config.kv_heads, cache, config.head_dim))
    marks = layer_pattern(config).marks()
    return {mark + n: torch.zeros(shape, dtype=_kind(dtype)) for mark in marks for n, shape in room.items()}
