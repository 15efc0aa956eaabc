"""Attention with a cache of keys and values, and the rotary embeddings before it.

A cache is static, (batch, kv heads, len, dim), or in pages (Kwon et al. 2023, "PagedAttention"): keys and values are
states (pages, kv heads, page size, dim). How a page is laid out inside is the backend's own affair, and dim may be
larger than the heads', so that a backend may round it up. Places, lengths and block tables of pages are i32 inputs, so
that one captured graph serves every batch that fits: a row of no sequence has slot -1 and length 0.

Rows of a batch over pages are ordered: no two write one slot, and a row reads what it wrote, what rows before it wrote,
and nothing of rows behind it. Nano-batches rely on that: a slice waits for the slices before it alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Tensor, Work
from taskgraph.ops.kinds import Kind, Output, Range, apply, axis_of, index_of, register, row_work
from taskgraph.ops.rotary import LLAMA3, ROPE, YARN, RopeSpec
from taskgraph.ops.signatures import COUNT, POSITIVE, Attrs, Shapes, Signature, moved, need, need_floats, need_integers
from taskgraph.record import instance, sequence

# ------------------------------------------------------------------------------------------- rope


def rope(x: Value, positions: Value, *, theta: float = 10000.0, name: str | None = None) -> Value:
    """Rotary embedding of x (tokens, heads, dim), halves rotated (Su et al. 2021; Hugging Face layout)."""
    return apply("rope", [x, positions], {"theta": theta}, name=name)


def rope_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, positions = ins
    need(len(x.shape) == 3 and x.shape[2] % 2 == 0, "rope", ins, "x must be (tokens, heads, even head_dim)")
    need_floats("rope", ins, x)
    need_integers("rope", ins, positions)
    need(positions.shape == x.shape[:1], "rope", ins, "positions must have one entry a token")
    return x.shape, x.dtype


ROPE_TAKES = Signature("31", {"theta": POSITIVE})
register(Kind("rope", ROPE_TAKES, rope_shape, row_work(3.0), split=(0, 0), index_ranges={1: index_of(0)}))


# ---------------------------------------------------------------------------------- static caches


def rope_kv(
    qkv: Value,
    positions: Value,
    keys: Value,
    values: Value,
    norms: Sequence[Value] = (),
    *,
    spec: RopeSpec,
    name: str | None = None,
) -> Value:
    """Split fused qkv (batch*t, (heads + 2 kv) * dim), normalise q and k where `norms`, their two weights, are given,
    rotate them, and write keys and values into the caches (batch, kv, len, dim) from `positions` (batch,) on ->
    q (batch*t, heads, dim)."""
    attrs = instance("spec of rope_kv", spec, RopeSpec, GraphError).attrs()
    inputs = [qkv, positions, keys, values, *sequence("norms of rope_kv", norms, GraphError)]
    return apply("rope_kv", inputs, attrs, name=name, writes=(2, 3))


def rope_kv_shape(ins: Shapes, attrs: Attrs) -> Output:
    qkv, positions, keys, values, *norms = ins
    need_floats("rope_kv", ins, qkv, keys, values, *norms)
    need_integers("rope_kv", ins, positions)
    need(len(norms) != 1, "rope_kv", ins, "q and k are normalised both or neither")
    heads, head_dim = attrs.integer("heads"), keys.shape[-1]
    need(heads >= 1 and head_dim % 2 == 0, "rope_kv", ins, "it takes at least one head, of an even dim")
    need(len(keys.shape) == 4 and keys.shape == values.shape, "rope_kv", ins, "caches are (batch, kv heads, len, dim)")
    width = (heads + 2 * keys.shape[1]) * head_dim
    need(qkv.shape[1:] == (width,), "rope_kv", ins, f"qkv must be (tokens, {width})")
    need_sequences("rope_kv", ins, qkv.shape[0], positions, keys.shape[0])
    need(all(t.shape == (head_dim,) for t in norms), "rope_kv", ins, f"q and k norms must be ({head_dim},)")
    return (qkv.shape[0], heads, head_dim), qkv.dtype


def need_sequences(kind: str, ins: Shapes, tokens: int, positions: Tensor, batch: int) -> None:
    """GraphError unless the `tokens` are those of `batch` sequences, and `positions` their first places."""
    need(positions.shape == (batch,), kind, ins, "positions hold the first position of every sequence")
    need(tokens % batch == 0, kind, ins, "every sequence must have the same number of tokens")


def rope_kv_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(flops=3.0 * math.prod(ins[0].shape), hbm_bytes=2 * moved(ins[:1]) + moved(ins[1:2]))


def last_place(context: int, tokens: int, sequences: int) -> Range:
    """The place of a sequence's first new token such that its last one fills the context: at the start of it, attention
    would be free."""
    place = max(context - tokens // sequences, 0)
    return place, place + 1


def rope_kv_positions(ins: Shapes, attrs: Attrs) -> Range:
    return last_place(ins[2].shape[2], ins[0].shape[0], ins[1].shape[0])


register(
    Kind(
        "rope_kv", Signature("214411", ROPE, groups=(LLAMA3, YARN), spare=2), rope_kv_shape, rope_kv_work,
        split=(0, 0, 0, 0, None, None), index_ranges={1: rope_kv_positions},
    )
)  # fmt: skip


def attention(
    q: Value, positions: Value, keys: Value, values: Value, *, context: int | None = None, name: str | None = None
) -> Value:
    """Causal attention of q (batch*t, heads, dim) over caches (batch, kv, len, dim) -> (batch*t, heads*dim).

    Token j of sequence b stands at positions[b] + j. `context` is the length that the cost counts (the whole cache
    unless given).
    """
    length = axis_of("attention", "keys", keys, 2) if context is None else context
    return apply("attention", [q, positions, keys, values], {"context": length}, name=name)


def attention_shape(ins: Shapes, attrs: Attrs) -> Output:
    q, positions, keys, values = ins
    need(len(q.shape) == 3 and len(keys.shape) == 4, "attention", ins, "q is (tokens, heads, dim), caches have 4 axes")
    need_floats("attention", ins, q, keys, values)
    need_integers("attention", ins, positions)
    need(keys.shape == values.shape and q.shape[2] == keys.shape[3], "attention", ins, "head dims differ")
    need(attrs.integer("context") >= 1, "attention", ins, "context must be at least 1")
    need(q.shape[1] % keys.shape[1] == 0, "attention", ins, "query heads must be a multiple of kv heads")
    need_sequences("attention", ins, q.shape[0], positions, keys.shape[0])
    return (q.shape[0], q.shape[1] * q.shape[2]), q.dtype


def attention_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """Scores and mixing, 4 flops a query, key and channel; each sequence's cached keys and values read once."""
    q, _, keys, _ = ins
    tokens, heads, dim = q.shape
    batch, kv_heads = keys.shape[:2]
    each, context = tokens // batch, attrs.integer("context")
    seen = each * (context + 1) - each * (each - 1) / 2 - each  # keys that the causal mask leaves, a sequence
    kv_bytes = 2.0 * batch * kv_heads * context * dim * ITEMSIZE[keys.dtype]
    return Work(flops=4.0 * batch * max(seen, each) * heads * dim, hbm_bytes=moved(ins[:2]) + kv_bytes + moved(outs))


def attention_positions(ins: Shapes, attrs: Attrs) -> Range:
    context = min(attrs.integer("context"), ins[2].shape[2])
    return last_place(context, ins[0].shape[0], ins[1].shape[0])


register(
    Kind(
        "attention", Signature("3144", {"context": COUNT}), attention_shape, attention_work, split=(0, 0, 0, 0),
        index_ranges={1: attention_positions},
    )
)  # fmt: skip


def decode_attention(q: Value, kv: Value, *, name: str | None = None) -> Value:
    """One query token a sequence, q (batch, heads, dim), over the whole of kv (2, batch, len, kv heads, dim)."""
    return apply("decode_attention", [q, kv], name=name)


def decode_attention_shape(ins: Shapes, attrs: Attrs) -> Output:
    q, kv = ins
    axes = len(q.shape) == 3 and len(kv.shape) == 5
    need(axes, "decode_attention", ins, "q has 3 axes, kv (2, batch, len, heads, dim)")
    need_floats("decode_attention", ins, q, kv)
    need(kv.shape[:2] == (2, q.shape[0]), "decode_attention", ins, "q and kv must have the same batch")
    need(q.shape[2] == kv.shape[4] and q.shape[1] % kv.shape[3] == 0, "decode_attention", ins, "heads do not fit")
    return q.shape, q.dtype


def decode_attention_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    q, kv = ins
    return Work(flops=4.0 * q.shape[0] * kv.shape[2] * q.shape[1] * q.shape[2], hbm_bytes=moved(ins) + moved(outs))


register(Kind("decode_attention", Signature("35"), decode_attention_shape, decode_attention_work, split=(0, 1)))


# ------------------------------------------------------------------------------------------ pages


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where the tokens of a batch over pages stand and go: token i stands at positions[i], one of `context` positions
    that there are, and what it leaves goes to slot slots[i], which is page * page size + offset, or -1 for nowhere."""

    positions: Value
    slots: Value
    context: int


def paged_rope(
    qkv: Value,
    places: TokenPlaces,
    keys: Value,
    values: Value,
    norms: Sequence[Value] = (),
    *,
    spec: RopeSpec,
    name: str | None = None,
) -> Value:
    """`rope_kv` on pages: every token's keys and values go to its slot."""
    at = instance("places of paged_rope", places, TokenPlaces, GraphError)
    attrs = instance("spec of paged_rope", spec, RopeSpec, GraphError).attrs() | {"context": at.context}
    inputs = [qkv, at.positions, at.slots, keys, values, *sequence("norms of paged_rope", norms, GraphError)]
    return apply("paged_rope", inputs, attrs, name=name, writes=(3, 4))


def paged_rope_shape(ins: Shapes, attrs: Attrs) -> Output:
    qkv, positions, slots, keys, _, *norms = ins
    need(len(norms) != 1, "paged_rope", ins, "q and k are normalised both or neither")
    need_floats("paged_rope", ins, qkv, *ins[3:])
    _need_pages("paged_rope", ins, 3)
    need_int32("paged_rope", ins, 1, 2)
    heads, kv_heads = attrs.integer("heads"), keys.shape[1]
    need(heads >= 1 and attrs.integer("context") >= 1, "paged_rope", ins, "heads and context are at least 1")
    dim, rest = divmod(qkv.shape[-1], heads + 2 * kv_heads)
    need(len(qkv.shape) == 2 and rest == 0, "paged_rope", ins, f"qkv must hold {heads} + 2 x {kv_heads} equal heads")
    need(dim % 2 == 0 and dim <= keys.shape[3], "paged_rope", ins, f"a head of {dim} does not fit the pages")
    each = positions.shape == slots.shape == qkv.shape[:1]
    need(each, "paged_rope", ins, "positions and slots have one entry a token")
    need(all(t.shape == (dim,) for t in norms), "paged_rope", ins, f"q and k norms must be ({dim},)")
    return (qkv.shape[0], heads, dim), qkv.dtype


def paged_rope_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    rows, width = ins[0].shape
    return Work(flops=3.0 * rows * width, hbm_bytes=2 * moved(ins[:1]) + moved(ins[1:3]))


def all_positions(ins: Shapes, attrs: Attrs) -> Range:
    """The positions that there are."""
    return 0, attrs.integer("context")


def paged_rope_slots(ins: Shapes, attrs: Attrs) -> Range:
    return 0, ins[3].shape[0] * ins[3].shape[2]


register(
    Kind(
        "paged_rope", Signature("2114411", {**ROPE, "context": COUNT}, groups=(LLAMA3, YARN), spare=2),
        paged_rope_shape, paged_rope_work, split=(0, 0, 0, None, None, None, None), ordered=True,
        index_ranges={1: all_positions, 2: paged_rope_slots},
    )
)  # fmt: skip


def paged_decode(
    q: Value, lengths: Value, blocks: Value, keys: Value, values: Value, *, context: int, name: str | None = None
) -> Value:
    """One query a sequence: q (n, heads, dim) over the first lengths[i] keys of the pages blocks[i] -> (n, heads*dim).

    A sequence of length 0 gives zeros. `context` is the length that the cost counts.
    """
    return apply("paged_decode", [q, lengths, blocks, keys, values], {"context": context}, name=name)


def paged_decode_shape(ins: Shapes, attrs: Attrs) -> Output:
    _need_heads("paged_decode", ins, 3)
    need_decode_tables("paged_decode", ins)
    return _mixed(ins[0])


def paged_decode_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    rows, context = ins[0].shape[0], attrs.integer("context")
    return _pages_work(ins, outs, 3, rows, float(rows * context), context)


def length_within(context: int, blocks: Tensor, size: int) -> Range:
    """The context that the cost counts, as far as the block tables of pages of `size` tokens reach."""
    length = min(context, blocks.shape[1] * size)
    return length, length + 1


def paged_decode_lengths(ins: Shapes, attrs: Attrs) -> Range:
    return length_within(attrs.integer("context"), ins[2], ins[3].shape[2])


register(
    Kind(
        "paged_decode", Signature("31244", {"context": COUNT}), paged_decode_shape, paged_decode_work,
        split=(0, 0, 0, None, None), ordered=True, index_ranges={1: paged_decode_lengths, 2: index_of(3)},
    )
)  # fmt: skip


def paged_prefill(
    q: Value,
    starts: Value,
    lengths: Value,
    blocks: Value,
    keys: Value,
    values: Value,
    *,
    context: int,
    name: str | None = None,
) -> Value:
    """Causal attention of chunks: rows starts[i] to starts[i + 1] of q are the last tokens of the lengths[i] that
    sequence i has in the pages blocks[i] -> (tokens, heads*dim). Rows beyond the last start give zeros.

    `context` is the length that the cost counts.
    """
    return apply("paged_prefill", [q, starts, lengths, blocks, keys, values], {"context": context}, name=name)


def paged_prefill_shape(ins: Shapes, attrs: Attrs) -> Output:
    _need_heads("paged_prefill", ins, 4)
    need_chunk_tables("paged_prefill", ins)
    return _mixed(ins[0])


def paged_prefill_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    sequences, context = ins[2].shape[0], attrs.integer("context")
    each = ins[0].shape[0] / sequences
    pairs = sequences * each * max(context - (each - 1) / 2, each / 2)
    return _pages_work(ins, outs, 4, sequences, pairs, context)


def no_chunks(ins: Shapes, attrs: Attrs) -> Range:
    """Starts at 0 alone: chunks that fit together are not a matter of a range, so a prefill gets no rows."""
    return 0, 1


register(
    Kind(
        "paged_prefill", Signature("311244", {"context": COUNT}), paged_prefill_shape, paged_prefill_work,
        split=(None,) * 6, index_ranges={1: no_chunks, 3: index_of(4)},
    )
)  # fmt: skip


def _mixed(q: Tensor) -> Output:
    return (q.shape[0], q.shape[1] * q.shape[2]), q.dtype


def _pages_work(ins: Shapes, outs: Shapes, keys: int, sequences: int, pairs: float, context: int) -> Work:
    """4 flops a query, visible key and channel; each sequence's keys and values read once."""
    _, heads, dim = ins[0].shape
    pages = ins[keys]
    kv_bytes = 2.0 * sequences * context * pages.shape[1] * dim * ITEMSIZE[pages.dtype]
    return Work(flops=4.0 * pairs * heads * dim, hbm_bytes=moved([ins[0], *ins[1:keys], *outs]) + kv_bytes)


def _need_pages(kind: str, ins: Shapes, keys: int) -> None:
    k, v = ins[keys : keys + 2]
    need(len(k.shape) == 4 and k.shape == v.shape, kind, ins, "keys and values are (pages, kv heads, page size, dim)")


def _need_heads(kind: str, ins: Shapes, keys: int) -> None:
    q, pages = ins[0], ins[keys]
    need_floats(kind, ins, q, *ins[keys:])
    _need_pages(kind, ins, keys)
    fits = len(q.shape) == 3 and q.shape[2] <= pages.shape[3]
    need(fits, kind, ins, "q is (tokens, heads, dim), dim as in the pages")
    need(q.shape[1] % pages.shape[1] == 0, kind, ins, "query heads must be a multiple of kv heads")


def need_int32(kind: str, ins: Shapes, *which: int) -> None:
    """GraphError unless these inputs are i32."""
    need(all(ins[i].dtype == "i32" for i in which), kind, ins, "places, lengths and tables are i32")


def need_decode_tables(kind: str, ins: Shapes) -> None:
    """GraphError unless inputs 1 and 2 are lengths and blocks of a row of q each."""
    q, lengths, blocks = ins[:3]
    need_int32(kind, ins, 1, 2)
    need(lengths.shape == q.shape[:1], kind, ins, "lengths have one entry a sequence")
    need(len(blocks.shape) == 2 and blocks.shape[0] == q.shape[0], kind, ins, "blocks have a row a sequence")


def need_chunk_tables(kind: str, ins: Shapes) -> None:
    """GraphError unless inputs 1 to 3 are starts, lengths and blocks of the chunks in the rows of q."""
    starts, lengths, blocks = ins[1:4]
    need_int32(kind, ins, 1, 2, 3)
    need(starts.shape == (lengths.shape[0] + 1,), kind, ins, "starts have one entry more than lengths")
    need(len(blocks.shape) == 2 and blocks.shape[:1] == lengths.shape, kind, ins, "blocks have a row a sequence")
