"""The serving step as a graph: decode tokens and prefill chunks in one batch, over a KV cache in pages.

Dense ops take all tokens at once, decode first; attention is split by kind. Shapes are those of a `Bucket`; what a
step really holds comes in i32 inputs, and tokens that stand for nothing write nothing and are not read.
"""

from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.layer import Layer, PagedAttention

COLUMNS = 32
"""Channels of a page are a multiple of this, which the cpu backend's product tile wants."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The shapes of a step: tokens that decode, tokens of prefill chunks, how many chunks, and whether pages move."""

    decode: int
    prefill: int = 0
    chunks: int = 0
    moves: bool = False

    @property
    def tokens(self) -> int:
        return self.decode + self.prefill

    @property
    def samples(self) -> int:
        """Tokens whose logits are computed: every one that decodes, then the last one of every chunk."""
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

    def expected_moves(self, bucket: Bucket) -> dict[str, float]:
        """Pages that a step is taken to move, for its cost: when the device is full, as many go out as its tokens fill,
        and in the long run as many come back; few are copied, for only a shared page that is written to is."""
        filled = min(bucket.tokens / self.page_size, self.pages, max(self.host_pages, 1))
        return {"page_out": filled, "page_in": filled, "page_copy": min(1.0, filled)}

    def room(self, config: ModelConfig, pages: int) -> dict[str, tuple[int, ...]]:
        """What a layer keeps in `pages` pages: keys and values, or latents; name -> shape."""
        if config.latent:
            return {"latents": (pages, self.page_size, config.latent.rank + config.latent.rotary)}
        each = (pages, config.kv_heads, self.page_size, -(-config.head_dim // COLUMNS) * COLUMNS)
        return dict.fromkeys(("keys", "values"), each)


def step_graph(
    config: ModelConfig,
    bucket: Bucket,
    shape: PageShape,
    dtype: str = "bf16",
    kept: int = 0,
) -> tg.Graph:
    """One step of `bucket`'s shapes; with `bucket.moves` also pages to the host, from it, and within the device.

    Inputs: tokens i64, positions i32 and slots i32 of every token; decode_lengths and decode_blocks; prefill_starts,
    prefill_lengths and prefill_blocks; samples i64, the tokens to sample after; page_out, page_in and page_copy, pairs
    of pages. States of every layer: those of `PageShape.room`, and with moves the same of the host (host_keys, ...).
    Outputs: logits and next, as of every step graph. With `kept`, the samples of the largest step, it draws its tokens
    itself, keeps them for the next step, and feeds itself those of the one before: further inputs are sources i32 of
    every token (`tg.ops.feed`), and temperature f32, top_k i32, top_p f64 and uniform f64 of every sample
    (`tg.ops.draw`); a state is kept i64 (kept,); and the third output are the tokens drawn, -1 where there is none.

    In the graph of a rank's share (`ModelConfig.share`) pages have
    its share of the heads, and inputs are those of every rank.
    """
    b = tg.GraphBuilder(f"{config.name}-paged-{bucket.decode}+{bucket.prefill}/{bucket.chunks}")
    positions, slots = (b.input(name, (bucket.tokens,), "i32") for name in ("positions", "slots"))
    tables = _tables(b, bucket, shape)
    pairs = {name: b.input(name, (max(shape.pages, shape.host_pages), 2), "i32") for name in _MOVES if bucket.moves}

    def attend(layer: Layer, x: tg.Value) -> tg.Value:
        cache = _states(layer, shape.room(config, shape.pages))
        if pairs:
            host = _states(layer, shape.room(config, shape.host_pages), "host_")
            _move(layer, cache, host, pairs, shape.expected_moves(bucket))
        mine = llama.attention_of(layer, x)
        over = mine.over_pages(positions, slots, list(cache.values()), shape.context)
        return _attention(layer, over, bucket, tables)

    ids, last = b.input("tokens", (bucket.tokens,), "i64"), b.state("kept", (kept,), "i64") if kept else None
    if last is not None:
        sources = b.input("sources", (bucket.tokens,), "i32")
        ids = tg.ops.feed(ids, sources, last, vocabulary=config.vocab_size, name="feed")
    x, table = llama.layers(b, config, ids, dtype, attend, slots)
    if bucket.prefill:
        x = tg.ops.embedding(b.input("samples", (bucket.samples,), "i64"), x, name="sampled_rows")
    logits, likeliest = llama.sampled(b, config, x, table, dtype)
    b.output(logits, likeliest)
    if last is not None:
        each = (b.input(name, (bucket.samples,), kind) for name, kind in _DRAWS.items())
        temperature, top_k, top_p, uniform = each
        b.output(tg.ops.draw(logits, likeliest, temperature, top_k, top_p, uniform, last, name="draw"))
    return b.build()


DRAWN = "draw.out"
"""The name of the third output."""
_DRAWS = {"temperature": "f32", "top_k": "i32", "top_p": "f64", "uniform": "f64"}
_MOVES = {"page_out": "d2h", "page_in": "h2d", "page_copy": "d2d"}


def _tables(b: tg.GraphBuilder, bucket: Bucket, shape: PageShape) -> dict[str, tg.Value]:
    shapes: dict[str, tuple[int, ...]] = {}
    if bucket.decode:
        shapes |= {"decode_lengths": (bucket.decode,), "decode_blocks": (bucket.decode, shape.blocks)}
    if bucket.prefill:
        shapes |= {"prefill_starts": (bucket.chunks + 1,), "prefill_lengths": (bucket.chunks,)}
        shapes |= {"prefill_blocks": (bucket.chunks, shape.blocks)}
    return {name: b.input(name, size, "i32") for name, size in shapes.items()}


Pools = dict[str, tg.Value]


def _states(layer: Layer, room: dict[str, tuple[int, ...]], prefix: str = "") -> Pools:
    return {name: layer.state(prefix + name, *shape) for name, shape in room.items()}


def _move(layer: Layer, cache: Pools, host: Pools, pairs: dict[str, tg.Value], expected: dict[str, float]) -> None:
    """Pages out first, so that those coming in may take their places."""
    for (name, direction), which in ((move, which) for move in _MOVES.items() for which in cache):
        source, target = {"d2h": (cache, host), "h2d": (host, cache), "d2d": (cache, cache)}[direction]
        tg.ops.copy_pages(
            source[which], target[which], pairs[name], direction=direction, expected_pages=expected[name],
            name=layer.name(f"{name}_{which}"),
        )  # fmt: skip


def _attention(layer: Layer, over: PagedAttention, bucket: Bucket, tables: dict[str, tg.Value]) -> tg.Value:
    parts = []
    if bucket.decode:
        mine = over.q.rows(0, bucket.decode) if bucket.prefill else over.q
        each = [tables[f"decode_{name}"] for name in ("lengths", "blocks")]
        parts.append(over.decode(mine, *each, name=layer.name("decode_attention")))
    if bucket.prefill:
        mine = over.q.rows(bucket.decode, bucket.tokens) if bucket.decode else over.q
        chunks = [tables[f"prefill_{name}"] for name in ("starts", "lengths", "blocks")]
        parts.append(over.prefill(mine, *chunks, name=layer.name("prefill_attention")))
    return parts[0] if len(parts) == 1 else tg.ops.concat_rows(parts, name=layer.name("attention_rows"))
