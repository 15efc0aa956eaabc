"""One rank of a tensor-parallel mixed step: decode and prefill tokens together (Megatron-LM, Shoeybi et al. 2019).

Dense ops take all tokens at once, decode first; attention is split by kind over two caches. Products are sharded
by columns (qkv, gate and up, vocabulary) and rows (o, down), and an all-reduce follows each product sharded by rows,
unless `collectives` says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models.config import ModelConfig
from taskgraph.models.llama import LOGITS, NEXT, rope_scaling
from taskgraph.schedule.rewrite import with_collectives

__all__ = ["LOGITS", "NEXT", "mixed_step"]


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of one kind: their rows of the batch, their positions and their caches."""

    kind: str
    sequences: int
    first: int
    tokens: int
    context: int

    @property
    def last(self) -> int:
        return self.first + self.tokens


def mixed_step(
    config: ModelConfig,
    *,
    tensor_parallel: int = 1,
    decode_tokens: int,
    decode_context: int,
    prefill_tokens: int,
    prefill_context: int,
    prefill_sequences: int = 1,
    dtype: str = "bf16",
    decode_cache: int | None = None,
    prefill_cache: int | None = None,
    collectives: Mapping[str, str] | None = None,
) -> tg.Graph:
    """A step of `decode_tokens` sequences that decode and `prefill_sequences` that prefill `prefill_tokens` in all.

    The contexts are the keys that a sequence has at the end of the step, which the cost counts; caches hold that many
    unless told. Inputs: tokens i64, decode first; decode_positions and prefill_positions i64, the place of each
    sequence's first new token. Outputs: logits of every sequence's last token, decode first, and next, their argmax.
    Either kind may have no tokens. With `tensor_parallel` ranks the graph is that of one rank, which has its share of
    heads, features and vocabulary; every rank must be given the same inputs. `collectives` names what takes the place
    of the all-reduce after "o" or "down", "scatter" or "gather" (see `rewrite.with_collectives`): {"o": "gather"} is
    NanoFlow's layer of two all-gathers and one all-reduce, whose weight "layer/o.columns" is sharded by columns.
    """
    _check_shares(config, tensor_parallel, prefill_tokens, prefill_sequences)
    tokens = decode_tokens + prefill_tokens
    groups = [
        _Group("decode", decode_tokens, 0, decode_tokens, decode_cache or decode_context),
        _Group("prefill", prefill_sequences, decode_tokens, prefill_tokens, prefill_cache or prefill_context),
    ]
    context = {"decode": decode_context, "prefill": prefill_context}
    groups = [g for g in groups if g.tokens]
    b = tg.GraphBuilder(f"{config.name}-mixed-{decode_tokens}+{prefill_tokens}-tp{tensor_parallel}")
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.heads // tensor_parallel, config.kv_heads // tensor_parallel
    features, width = config.intermediate_size // tensor_parallel, (heads + 2 * kv_heads) * dim
    positions = {g.kind: b.input(f"{g.kind}_positions", (g.sequences,), "i64") for g in groups}
    table = b.weight("embed", (config.vocab_size, hidden), dtype)
    x = tg.ops.embedding(b.input("tokens", (tokens,), "i64"), table, name="embedding")

    def product(x: tg.Value, weight: str, shape: tuple[int, int], name: str, **extra: tg.Value | None) -> tg.Value:
        return tg.ops.gemm(x, b.weight(weight, shape, dtype), transpose_w=True, name=name, **extra)  # type: ignore[arg-type]

    def norm(x: tg.Value, weight: str, name: str) -> tg.Value:
        return tg.ops.rmsnorm(x, b.weight(weight, (hidden,), dtype), eps=config.norm_eps, name=name)

    def summed(x: tg.Value, weight: str, name: str, residual: tg.Value) -> tg.Value:
        """residual + the sum over ranks of x times this rank's rows of the weight."""
        shape = (hidden, x.shape[1])
        if tensor_parallel == 1:
            return product(x, weight, shape, f"{name}_proj", residual=residual)
        part = product(x, weight, shape, f"{name}_proj")
        return tg.ops.add(
            tg.ops.all_reduce(part, ranks=tensor_parallel, name=f"{name}_reduce"), residual, name=f"{name}_add"
        )

    def attention(qkv: tg.Value, group: _Group) -> tg.Value:
        room = (group.sequences, kv_heads, group.context, dim)
        keys, values = (b.state(f"{group.kind}_{n}", room, dtype) for n in ("keys", "values"))
        mine = qkv if group.tokens == tokens else qkv.rows(group.first, group.last)
        q = tg.ops.rope_kv(
            mine, positions[group.kind], keys, values, *norms, heads=heads, theta=config.rope_theta,
            eps=config.norm_eps, scaling=rope_scaling(config), name=f"{group.kind}_rope",
        )  # fmt: skip
        return tg.ops.attention(
            q, positions[group.kind], keys, values, context=context[group.kind], name=f"{group.kind}_attention"
        )

    with b.repeat(config.layers, "layer") as layer:
        entry = h = layer.carry(x, "x")
        norms = [b.weight(n, (dim,), dtype) for n in ("q_norm", "k_norm")] if config.qk_norm else []
        bias = b.weight("qkv_bias", (width,), dtype) if config.qkv_bias else None
        qkv = product(norm(h, "attn_norm", "norm1"), "qkv", (width, hidden), "qkv_proj", bias=bias)
        mixed = [attention(qkv, group) for group in groups]
        heads_out = mixed[0] if len(mixed) == 1 else tg.ops.concat_rows(mixed, name="attention_rows")
        h = summed(heads_out, "o", "o", h)
        gate_up = product(norm(h, "mlp_norm", "norm2"), "gate_up", (2 * features, hidden), "gate_up_proj")
        h = summed(tg.ops.swiglu(gate_up, name="swiglu"), "down", "down", h)
        x = layer.next(entry, h)
    x = norm(_last_tokens(x, groups), "norm", "final_norm")
    shards = config.vocab_size // tensor_parallel
    head = table if config.tie_embeddings and tensor_parallel == 1 else b.weight("lm_head", (shards, hidden), dtype)
    if tensor_parallel == 1:
        logits = tg.ops.gemm(x, head, transpose_w=True, name="lm_head_proj")
    else:
        part = tg.ops.gemm(x, head, transpose_w=True, name="lm_head_shard")
        logits = tg.ops.all_gather(part, ranks=tensor_parallel, axis=1, name="lm_head_proj")
    b.output(logits, tg.ops.argmax(logits, name="sample"))
    graph = b.build()
    if not collectives:
        return graph
    return with_collectives(graph, {f"layer/{name}_reduce": choice for name, choice in collectives.items()})


def _last_tokens(x: tg.Value, groups: list[_Group]) -> tg.Value:
    """The rows of x of every sequence's last token."""
    parts = []
    for group in groups:
        each = group.tokens // group.sequences
        rows = x if group.tokens == x.shape[0] else x.rows(group.first, group.last)
        parts.append(
            rows if each == 1 else tg.ops.slice_rows(rows, each - 1, group.tokens, each, name=f"{group.kind}_last")
        )
    return parts[0] if len(parts) == 1 else tg.ops.concat_rows(parts, name="last_tokens")


def _check_shares(config: ModelConfig, ranks: int, prefill_tokens: int, prefill_sequences: int) -> None:
    shared = {
        "heads": config.heads,
        "kv heads": config.kv_heads,
        "features": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "hidden size": config.hidden_size,
    }
    odd = next((name for name, number in shared.items() if ranks < 1 or number % ranks), None)
    if odd is not None:
        raise tg.GraphError(
            f"{config.name} has {shared[odd]} {odd}, which {ranks} ranks cannot share; choose a divisor."
        )
    if prefill_tokens % prefill_sequences:
        raise tg.GraphError(
            f"{prefill_tokens} prefill tokens are no multiple of {prefill_sequences} sequences; all have equally many."
        )
