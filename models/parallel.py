"""One rank of a tensor-parallel mixed step: decode and prefill tokens together (Megatron-LM, Shoeybi et al. 2019).

Dense ops take all tokens at once, decode first; attention is split by kind over two caches. Products are sharded
by columns (qkv, gate and up, vocabulary) and rows (o, down), and an all-reduce follows each product sharded by rows,
unless `collectives` says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models.config import ModelConfig
from taskgraph.models.layer import Layer
from taskgraph.models.llama import LOGITS, NEXT, attention_of, layers, sampled
from taskgraph.rewrite import with_collectives

__all__ = ["LOGITS", "NEXT", "mixed_step"]


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of one kind: their rows of the batch, the length of their caches, and that which the cost counts."""

    kind: str
    sequences: int
    first: int
    tokens: int
    cache: int
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
    expert_rank: int | None = None,
) -> tg.Graph:
    """A step of `decode_tokens` sequences that decode and `prefill_sequences` that prefill `prefill_tokens` in all.

    The contexts are the keys that a sequence has at the end of the step, which the cost counts; caches hold that many
    unless told. Inputs: tokens i64, decode first; decode_positions and prefill_positions i64, the place of each
    sequence's first new token. Outputs: logits of every sequence's last token, decode first, and next, their argmax.
    Either kind may have no tokens. With `tensor_parallel` ranks the graph is that of one rank, which has its share of
    heads, features and vocabulary; every rank must be given the same inputs. `collectives` names what takes the place
    of the all-reduce after "o" or "down", "scatter" or "gather" (see `rewrite.with_collectives`): {"o": "gather"} is
    NanoFlow's layer of two all-gathers and one all-reduce, whose weight "layer/o.columns" is sharded by columns.
    Of a mixture of experts every rank has its features of all experts, or with `expert_rank` the whole experts of
    that rank; all ranks route all tokens, and what experts give is summed as after "down".
    """
    if prefill_tokens % prefill_sequences:
        raise tg.GraphError(
            f"{prefill_tokens} prefill tokens are no multiple of {prefill_sequences} sequences; all have equally many."
        )
    share = config.share(tensor_parallel, expert_rank)
    tokens = decode_tokens + prefill_tokens
    groups = [
        _Group("decode", decode_tokens, 0, decode_tokens, decode_cache or decode_context, decode_context),
        _Group(
            "prefill", prefill_sequences, decode_tokens, prefill_tokens, prefill_cache or prefill_context,
            prefill_context,
        ),
    ]  # fmt: skip
    groups = [g for g in groups if g.tokens]
    b = tg.GraphBuilder(f"{config.name}-mixed-{decode_tokens}+{prefill_tokens}-tp{tensor_parallel}")
    positions = {g.kind: b.input(f"{g.kind}_positions", (g.sequences,), "i64") for g in groups}

    def attend(layer: Layer, x: tg.Value) -> tg.Value:
        whole = attention_of(layer, x)
        mixed = [
            (whole if g.tokens == tokens else whole.rows(g.first, g.last)).over(
                positions[g.kind], g.cache, g.context, f"{g.kind}_"
            )
            for g in groups
        ]
        return mixed[0] if len(mixed) == 1 else tg.ops.concat_rows(mixed, name=layer.name("attention_rows"))

    x, table = layers(b, share, b.input("tokens", (tokens,), "i64"), dtype, attend, tensor_parallel)
    b.output(*sampled(b, share, _last_tokens(x, groups), table, dtype, tensor_parallel))
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
