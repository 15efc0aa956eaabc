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

__all__ = ["LOGITS", "NEXT", "Decode", "Prefill", "mixed_step"]


@dataclass(frozen=True, slots=True)
class Decode:
    """Sequences that decode a token each. At the end of the step each has `context` keys, which the cost counts; its
    cache holds `cache` (0: as many)."""

    tokens: int = 0
    context: int = 1
    cache: int = 0

    @property
    def sequences(self) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Prefill:
    """`sequences` that prefill `tokens` in all, each equally many. At the end of the step each has `context` keys,
    which the cost counts; its cache holds `cache` (0: as many)."""

    tokens: int = 0
    context: int = 1
    sequences: int = 1
    cache: int = 0


@dataclass(frozen=True, slots=True)
class _Kind:
    """The sequences of one kind, and the number of their first token in the batch."""

    kind: str
    of: Decode | Prefill
    first: int

    def tokens(self, x: tg.Value) -> tg.Value:
        """Their tokens of all that are in the batch."""
        return x if self.of.tokens == x.shape[0] else x.rows(self.first, self.first + self.of.tokens)


def mixed_step(
    config: ModelConfig,
    decode: Decode,
    prefill: Prefill,
    *,
    dtype: str = "bf16",
    collectives: Mapping[str, str] | None = None,
) -> tg.Graph:
    """A step in which some sequences decode and others prefill; either kind may have no tokens.

    Inputs: tokens i64, decode first; decode_positions and prefill_positions i64, the place of each sequence's first new
    token. Outputs: logits of every sequence's last token, decode first, and next, their argmax. The graph of a rank's
    share (`ModelConfig.share`) has the collectives between the ranks, each of which must be given the same inputs.
    `collectives` names what takes the place of the all-reduce after "o" or "down", "scatter" or "gather" (see
    `rewrite.with_collectives`): {"o": "gather"} is NanoFlow's layer of two all-gathers and one all-reduce, whose weight
    "layer/o.columns" is sharded by columns. Every rank routes all tokens to experts, and what these give is summed as
    after "down".
    """
    if prefill.tokens % prefill.sequences:
        raise tg.GraphError(
            f"{prefill.tokens} prefill tokens are no multiple of {prefill.sequences} sequences; all have equally many."
        )
    parts = [_Kind("decode", decode, 0), _Kind("prefill", prefill, decode.tokens)]
    parts = [part for part in parts if part.of.tokens]
    b = tg.GraphBuilder(f"{config.name}-mixed-{decode.tokens}+{prefill.tokens}-tp{config.ranks}")
    positions = {part.kind: b.input(f"{part.kind}_positions", (part.of.sequences,), "i64") for part in parts}

    def attend(layer: Layer, x: tg.Value) -> tg.Value:
        whole = attention_of(layer, x)
        mixed = [
            (whole if len(parts) == 1 else whole.tokens(part.first, part.first + part.of.tokens)).over(
                positions[part.kind], part.of.cache or part.of.context, part.of.context, f"{part.kind}_"
            )
            for part in parts
        ]
        return mixed[0] if len(mixed) == 1 else tg.ops.concat_rows(mixed, name=layer.name("attention_rows"))

    ids = b.input("tokens", (decode.tokens + prefill.tokens,), "i64")
    x, table = layers(b, config, ids, dtype, attend)
    b.output(*sampled(b, config, _last_tokens(x, parts), table, dtype))
    graph = b.build()
    if not collectives:
        return graph
    return tg.rewrite.with_collectives(graph, {f"layer/{name}_reduce": choice for name, choice in collectives.items()})


def _last_tokens(x: tg.Value, parts: list[_Kind]) -> tg.Value:
    """What x, a row a token, has of every sequence's last token."""
    last = []
    for part in parts:
        mine, each = part.tokens(x), part.of.tokens // part.of.sequences
        last.append(
            mine if each == 1 else tg.ops.slice_rows(mine, each - 1, part.of.tokens, each, name=f"{part.kind}_last")
        )
    return last[0] if len(last) == 1 else tg.ops.concat_rows(last, name="last_tokens")
