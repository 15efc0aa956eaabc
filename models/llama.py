"""Decoders of the Llama family as task graphs over a static KV cache: Llama 2 and 3, SmolLM2, Qwen2 and Qwen3, and
with the layers of moe.py and deepseek.py Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3.

One dense step is nine ops a layer: projections fused where they share an input (q, k, v; gate, up), residual sums
fused into the products that feed them, and one vocabulary product a step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import taskgraph as tg
from taskgraph.models.config import ModelConfig, RopeScaling
from taskgraph.models.deepseek import latent_attention, latent_sources, yarn
from taskgraph.models.layer import Layer, Layout, Names, Sources, layout_of
from taskgraph.models.moe import expert_mlp, expert_sources

if TYPE_CHECKING:
    import torch


class TensorSource(Protocol):
    """Anything that gives tensors by their Hugging Face names (a Checkpoint)."""

    def tensor(self, name: str) -> "torch.Tensor": ...


LOGITS, NEXT = "lm_head_proj.out", "sample.out"
"""Names of the outputs of every step graph."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What the layers of a step share."""

    builder: tg.GraphBuilder
    config: ModelConfig
    dtype: str
    positions: tg.Value
    cache: int
    context: int

    def layer(self, x: tg.Value, number: int, mark: str) -> tg.Value:
        """The layer of that number appended: attention, then an MLP or experts."""
        layer = Layer(self.builder, self.config, self.dtype, mark, number)
        normed = layer.norm(x, "attn_norm", "norm1")
        attend = latent_attention if self.config.latent else grouped_attention
        x = attend(layer, normed, x, self.positions, self.cache, self.context)
        return mlp(layer, layer.norm(x, "mlp_norm", "norm2"), x)


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
    (default: `cache`).
    """
    b = tg.GraphBuilder(f"{config.name}-{'prefill' if tokens > 1 else 'decode'}-{batch}x{tokens}")
    ids = b.input("tokens", (batch * tokens,), "i64")
    positions = b.input("positions", (batch,), "i64")
    table = b.weight("embed", (config.vocab_size, config.hidden_size), dtype)
    x = tg.ops.embedding(ids, table, name="embedding")
    x = _layers(_Step(b, config, dtype, positions, cache, min(context or cache, cache)), x)
    if tokens > 1 and not all_logits:
        x = tg.ops.slice_rows(x, tokens - 1, batch * tokens, tokens, name="last_token")
    x = Layer(b, config, dtype).norm(x, "norm", "final_norm")
    head = table if config.tie_embeddings else b.weight("lm_head", (config.vocab_size, config.hidden_size), dtype)
    logits = tg.ops.gemm(x, head, transpose_w=True, name="lm_head_proj")
    b.output(logits, tg.ops.argmax(logits, name="sample"))
    return b.build()


def _layers(step: _Step, x: tg.Value) -> tg.Value:
    plan = layout(step.config)
    for i in range(plan.first):
        x = step.layer(x, i, plan.head(i))
    with step.builder.repeat(plan.count, "layer") as loop:
        entry = h = loop.carry(x, "x")
        for j in range(plan.period):
            h = step.layer(h, plan.first + j, plan.body(j))
        return loop.next(entry, h)


def layout(config: ModelConfig) -> Layout:
    """The layers that the graphs of this model write out and those that they repeat."""
    return layout_of([config.sparse(i) for i in range(config.layers)])


def grouped_attention(
    layer: Layer, x: tg.Value, residual: tg.Value, positions: tg.Value, cache: int, context: int
) -> tg.Value:
    """residual + attention of x, which is normalised, over the layer's cached keys and values."""
    config = layer.config
    room = (positions.shape[0], config.kv_heads, cache, config.head_dim)
    keys, values = layer.state("keys", *room), layer.state("values", *room)
    q = tg.ops.rope_kv(
        qkv_product(layer, x), positions, keys, values, *head_norms(layer), heads=config.heads,
        theta=config.rope_theta, eps=config.norm_eps, scaling=rope_scaling(config), yarn=yarn(config),
        name=layer.name("rope"),
    )  # fmt: skip
    mixed = tg.ops.attention(q, positions, keys, values, context=context, name=layer.name("attention"))
    return layer.product(mixed, "o", config.hidden_size, "o_proj", residual=residual)


def qkv_product(layer: Layer, x: tg.Value) -> tg.Value:
    """Queries, keys and values of all heads, one after another."""
    config = layer.config
    width = (config.heads + 2 * config.kv_heads) * config.head_dim
    bias = layer.weight("qkv_bias", width) if config.qkv_bias else None
    return layer.product(x, "qkv", width, "qkv_proj", bias=bias)


def head_norms(layer: Layer) -> list[tg.Value]:
    """The weights of the norms of every head's query and key, for models that have them."""
    return [layer.weight(n, layer.config.head_dim) for n in ("q_norm", "k_norm")] if layer.config.qk_norm else []


def mlp(layer: Layer, x: tg.Value, residual: tg.Value) -> tg.Value:
    """residual + the layer's MLP or experts of x, which is normalised."""
    config = layer.config
    if config.sparse(layer.number):
        return expert_mlp(layer, x, residual)
    gate_up = layer.product(x, "gate_up", 2 * config.intermediate_size, "gate_up_proj")
    active = tg.ops.swiglu(gate_up, name=layer.name("swiglu"))
    return layer.product(active, "down", config.hidden_size, "down_proj", residual=residual)


def rope_scaling(config: ModelConfig) -> tuple[float, ...]:
    """Llama 3's rotary scaling as `ops.rope_kv` takes it; empty for the others."""
    s = config.rope_scaling
    if not isinstance(s, RopeScaling):
        return ()
    return (s.factor, s.low_freq_factor, s.high_freq_factor, float(s.original_max_position))


# ----------------------------------------------------------------------------------- weights and caches


def load_weights(config: ModelConfig, source: TensorSource, dtype: str) -> dict[str, "torch.Tensor"]:
    """Every weight of the step graphs by its flat name, fused and converted; about twice the largest weight extra."""
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
    for i, mark in enumerate(layout(config).marks()):
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
    marks = layout(config).marks()
    return {mark + n: torch.zeros(shape, dtype=_kind(dtype)) for mark in marks for n, shape in room.items()}
