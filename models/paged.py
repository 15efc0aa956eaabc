"""The serving step as a graph: decode tokens and prefill chunks in one batch, over a KV cache in pages.

Dense ops take all tokens at once, decode first; attention is split by kind. Shapes are those of a `Bucket`; what a
step really holds comes in i32 inputs, and rows that stand for nothing write nothing and are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.layer import Layer, rope_scaling, yarn

COLUMNS = 32
"""Channels of a page are a multiple of this, which the cpu backend's product tile wants."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The shapes of a step: rows that decode, rows of prefill chunks, how many chunks, and whether pages move."""

    decode: int
    prefill: int = 0
    chunks: int = 0
    moves: bool = False

    @property
    def tokens(self) -> int:
        return self.decode + self.prefill

    @property
    def samples(self) -> int:
        """Rows whose logits are computed: every decode row, then the last row of every chunk."""
        return self.decode + self.chunks


@dataclass(frozen=True, slots=True)
class PageShape:
    """The pages of a layer: how many on the device and on the host, tokens of a page, the most tokens of a sequence."""

    pages: int
    page_size: int
    context: int
    host_pages: int = 0

    @property
    def blocks(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.context // self.page_size)

    def room(self, config: ModelConfig, pages: int) -> tuple[int, int, int, int]:
        """The shape of `pages` pages of keys, or of values."""
        return (pages, config.kv_heads, self.page_size, -(-config.head_dim // COLUMNS) * COLUMNS)


def step_graph(
    config: ModelConfig,
    bucket: Bucket,
    shape: PageShape,
    dtype: str = "bf16",
    tensor_parallel: int = 1,
    expert_rank: int | None = None,
) -> tg.Graph:
    """One step of `bucket`'s shapes; with `bucket.moves` also pages to the host, from it, and within the device.

    Inputs: tokens i64, positions i32 and slots i32 of every row; decode_lengths and decode_blocks; prefill_starts,
    prefill_lengths and prefill_blocks; samples i64, the rows to sample; page_out, page_in and page_copy, pairs of
    pages. States of every layer: keys and values, and with moves host_keys and host_values.
    Outputs: logits and next, as of every step graph. With `tensor_parallel` ranks the graph is that of one, as
    `parallel.mixed_step` says: its pages have its share of the heads, and its inputs are those of every rank.
    """
    if config.latent:
        raise tg.ConfigError(f"{config.name} has latent attention, which pages do not serve; use a static step.")
    config = config.share(tensor_parallel, expert_rank)
    b = tg.GraphBuilder(f"{config.name}-paged-{bucket.decode}+{bucket.prefill}/{bucket.chunks}")
    rows = {name: b.input(name, (bucket.tokens,), "i32") for name in ("positions", "slots")}
    tables = _tables(b, bucket, shape)
    pairs = {name: b.input(name, (max(shape.pages, shape.host_pages), 2), "i32") for name in _MOVES if bucket.moves}

    def attend(layer: Layer, x: tg.Value) -> tg.Value:
        mine = llama.GroupedAttention.of(layer, x)
        cache = [layer.state(name, *shape.room(config, shape.pages)) for name in ("keys", "values")]
        if pairs:
            room = shape.room(config, shape.host_pages)
            _move(layer, cache, [layer.state(f"host_{name}", *room) for name in ("keys", "values")], pairs)
        q = tg.ops.paged_rope(
            mine.qkv, rows["positions"], rows["slots"], *cache, *mine.norms, heads=config.heads, context=shape.context,
            theta=config.rope_theta, eps=config.norm_eps, scaling=rope_scaling(config), yarn=yarn(config),
            name=layer.name("rope"),
        )  # fmt: skip
        return _attention(layer, q, bucket, tables, cache, shape.context)

    x, table = llama.layers(b, config, b.input("tokens", (bucket.tokens,), "i64"), dtype, attend, tensor_parallel)
    if bucket.prefill:
        x = tg.ops.embedding(b.input("samples", (bucket.samples,), "i64"), x, name="sampled_rows")
    b.output(*llama.sampled(b, config, x, table, dtype, tensor_parallel))
    return b.build()


_MOVES = {"page_out": "d2h", "page_in": "h2d", "page_copy": "d2d"}


def _tables(b: tg.GraphBuilder, bucket: Bucket, shape: PageShape) -> dict[str, tg.Value]:
    shapes: dict[str, tuple[int, ...]] = {}
    if bucket.decode:
        shapes |= {"decode_lengths": (bucket.decode,), "decode_blocks": (bucket.decode, shape.blocks)}
    if bucket.prefill:
        shapes |= {"prefill_starts": (bucket.chunks + 1,), "prefill_lengths": (bucket.chunks,)}
        shapes |= {"prefill_blocks": (bucket.chunks, shape.blocks)}
    return {name: b.input(name, size, "i32") for name, size in shapes.items()}


def _move(layer: Layer, cache: Sequence[tg.Value], host: Sequence[tg.Value], pairs: dict[str, tg.Value]) -> None:
    """Pages out first, so that those coming in may take their places."""
    for (name, direction), which in ((move, i) for move in _MOVES.items() for i in (0, 1)):
        ends = {"d2h": (cache, host), "h2d": (host, cache), "d2d": (cache, cache)}[direction]
        label = f"{name}_{('keys', 'values')[which]}"
        tg.ops.copy_pages(ends[0][which], ends[1][which], pairs[name], direction=direction, name=layer.name(label))


def _attention(
    layer: Layer, q: tg.Value, bucket: Bucket, tables: dict[str, tg.Value], cache: Sequence[tg.Value], context: int
) -> tg.Value:
    parts = []
    if bucket.decode:
        mine = q.rows(0, bucket.decode) if bucket.prefill else q
        parts.append(
            tg.ops.paged_decode(
                mine,
                tables["decode_lengths"],
                tables["decode_blocks"],
                *cache,
                context=context,
                name=layer.name("decode_attention"),
            )
        )
    if bucket.prefill:
        mine = q.rows(bucket.decode, bucket.tokens) if bucket.decode else q
        chunks = [tables[f"prefill_{name}"] for name in ("starts", "lengths", "blocks")]
        parts.append(tg.ops.paged_prefill(mine, *chunks, *cache, context=context, name=layer.name("prefill_attention")))
    return parts[0] if len(parts) == 1 else tg.ops.concat_rows(parts, name=layer.name("attention_rows"))
