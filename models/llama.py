"""The Llama family (Llama 2 and 3, SmolLM2, Qwen2, Qwen3 dense) as task graphs over a static KV cache.

One step is nine ops a layer: projections fused where they share an input (q, k, v; gate, up), residual sums
fused into the products that feed them, and one vocabulary product a step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import taskgraph as tg
from taskgraph.models.config import ModelConfig

if TYPE_CHECKING:
    import torch


class TensorSource(Protocol):
    """Anything that gives tensors by their Hugging Face names (a Checkpoint)."""

    def tensor(self, name: str) -> "torch.Tensor": ...


Attend = Callable[[tg.GraphBuilder, tg.Value, Sequence[tg.Value]], tg.Value]
"""The attention of a layer, made inside its repeat: (builder, fused qkv, q and k norms if any) -> mixed heads."""


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
    sequence's first new token. States: keys and values of every layer, (batch, kv heads, cache, head dim).
    Outputs: logits (batch, vocabulary) of each sequence's last token, or of every token with `all_logits`, and
    next i64, their argmax. `context` is the cache length that the cost counts (default: `cache`).
    """
    b = tg.GraphBuilder(f"{config.name}-{'prefill' if tokens > 1 else 'decode'}-{batch}x{tokens}")
    ids = b.input("tokens", (batch * tokens,), "i64")
    positions = b.input("positions", (batch,), "i64")

    def attend(b: tg.GraphBuilder, qkv: tg.Value, norms: Sequence[tg.Value]) -> tg.Value:
        room = (batch, config.kv_heads, cache, config.head_dim)
        keys, values = b.state("keys", room, dtype), b.state("values", room, dtype)
        q = tg.ops.rope_kv(
            qkv,
            positions,
            keys,
            values,
            *norms,
            heads=config.heads,
            theta=config.rope_theta,
            eps=config.norm_eps,
            scaling=rope_scaling(config),
            name="rope",
        )
        return tg.ops.attention(q, positions, keys, values, context=min(context or cache, cache), name="attention")

    x, table = layers(b, config, ids, dtype, attend)
    if tokens > 1 and not all_logits:
        x = tg.ops.slice_rows(x, tokens - 1, batch * tokens, tokens, name="last_token")
    b.output(*sampled(b, config, x, table, dtype))
    return b.build()


def layers(
    b: tg.GraphBuilder, config: ModelConfig, ids: tg.Value, dtype: str, attend: Attend
) -> tuple[tg.Value, tg.Value]:
    """The tokens `ids` through the embedding and every layer, whose attention is `attend`.

    Returns the last layer's output (tokens, hidden), and the embedding table."""
    hidden, width = config.hidden_size, (config.heads + 2 * config.kv_heads) * config.head_dim

    def norm(x: tg.Value, weight: str, name: str) -> tg.Value:
        return tg.ops.rmsnorm(x, b.weight(weight, (hidden,), dtype), eps=config.norm_eps, name=name)

    table = b.weight("embed", (config.vocab_size, hidden), dtype)
    x = tg.ops.embedding(ids, table, name="embedding")
    with b.repeat(config.layers, "layer") as layer:
        entry = h = layer.carry(x, "x")
        bias = b.weight("qkv_bias", (width,), dtype) if config.qkv_bias else None
        weight = b.weight("qkv", (width, hidden), dtype)
        qkv = tg.ops.gemm(norm(h, "attn_norm", "norm1"), weight, bias, transpose_w=True, name="qkv_proj")
        norms = [b.weight(n, (config.head_dim,), dtype) for n in ("q_norm", "k_norm")] if config.qk_norm else []
        mixed = attend(b, qkv, norms)
        o = b.weight("o", (hidden, config.heads * config.head_dim), dtype)
        h = tg.ops.gemm(mixed, o, residual=h, transpose_w=True, name="o_proj")
        gate_up = b.weight("gate_up", (2 * config.intermediate_size, hidden), dtype)
        both = tg.ops.gemm(norm(h, "mlp_norm", "norm2"), gate_up, transpose_w=True, name="gate_up_proj")
        down = b.weight("down", (hidden, config.intermediate_size), dtype)
        active = tg.ops.swiglu(both, name="swiglu")
        h = tg.ops.gemm(active, down, residual=h, transpose_w=True, name="down_proj")
        x = layer.next(entry, h)
    return x, table


def sampled(
    b: tg.GraphBuilder, config: ModelConfig, x: tg.Value, table: tg.Value, dtype: str
) -> tuple[tg.Value, tg.Value]:
    """The logits of the rows of `x`, the last layer's output, and their argmax; `table` is the embedding's."""
    x = tg.ops.rmsnorm(x, b.weight("norm", (config.hidden_size,), dtype), eps=config.norm_eps, name="final_norm")
    head = table if config.tie_embeddings else b.weight("lm_head", (config.vocab_size, config.hidden_size), dtype)
    logits = tg.ops.gemm(x, head, transpose_w=True, name="lm_head_proj")
    return logits, tg.ops.argmax(logits, name="sample")


LOGITS, NEXT = "lm_head_proj.out", "sample.out"
"""Names of the outputs of every step graph."""


def rope_scaling(config: ModelConfig) -> tuple[float, ...]:
    """Llama 3's rotary scaling as `ops.rope_kv` takes it; empty for the others."""
    s = config.rope_scaling
    return () if s is None else (s.factor, s.low_freq_factor, s.high_freq_factor, float(s.original_max_position))


def load_weights(config: ModelConfig, source: TensorSource, dtype: str) -> dict[str, "torch.Tensor"]:
    """Every weight of the step graphs by its flat name, fused and converted; about twice the largest weight extra."""
    import torch

    kind = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}[dtype]

    def joined(*names: str) -> torch.Tensor:
        parts = [source.tensor(name).to(kind) for name in names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    weights = {"embed": joined("model.embed_tokens.weight"), "norm": joined("model.norm.weight")}
    if not config.tie_embeddings:
        weights["lm_head"] = joined("lm_head.weight")
    for i in range(config.layers):
        for name, sources in _layer_sources(config).items():
            weights[f"layer.{i}/{name}"] = joined(*(f"model.layers.{i}.{s}" for s in sources))
    return weights


def _layer_sources(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Our weight of a layer -> the Hugging Face tensors that it joins along the first axis."""
    qkv = tuple(f"self_attn.{p}_proj" for p in "qkv")
    sources = {
        "attn_norm": ("input_layernorm.weight",),
        "qkv": tuple(f"{name}.weight" for name in qkv),
        "o": ("self_attn.o_proj.weight",),
        "mlp_norm": ("post_attention_layernorm.weight",),
        "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": ("mlp.down_proj.weight",),
    }
    if config.qkv_bias:
        sources["qkv_bias"] = tuple(f"{name}.bias" for name in qkv)
    if config.qk_norm:
        sources |= {"q_norm": ("self_attn.q_norm.weight",), "k_norm": ("self_attn.k_norm.weight",)}
    return sources


def make_cache(config: ModelConfig, batch: int, cache: int, dtype: str) -> dict[str, "torch.Tensor"]:
    """Zeroed keys and values of every layer by state name."""
    import torch

    kind = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}[dtype]
    room = (batch, config.kv_heads, cache, config.head_dim)
    return {f"layer.{i}/{n}": torch.zeros(room, dtype=kind) for i in range(config.layers) for n in ("keys", "values")}
