"""How the ops over a paged KV cache run on a GPU. A page is (kv heads, page size, width), row after row."""

from collections.abc import Sequence

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.runtime import rotary
from taskgraph.runtime.gpu.dense import (
    THREADS,
    Buffer,
    DecodeCache,
    Launch,
    Launches,
    Pages,
    Site,
    blocks,
    float_type,
    launch_rule,
    need_dim,
    split_decode,
)


@launch_rule("paged_rope")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    qkv, positions, slots, keys, values, *norms = ins
    pages, kv_heads, rows, wide = keys.shape
    tokens, heads, dim = outs[0].shape
    kind = float_type(op, qkv, keys, values, outs[0], *norms)
    q_norm, k_norm = (t.address for t in norms) if norms else (0, 0)
    pointers = (qkv.address, positions.address, slots.address, keys.address, values.address, q_norm, k_norm)
    ends = (np.int64(pages * rows), np.int32(op.integer("context")))
    last = np.float32(op.number("eps")), np.float32(rotary.size(op)), site.fault()
    numbers = (*map(np.int32, (heads, kv_heads, dim, rows, wide)), *ends, *last)
    args = (*pointers, site.constant(rotary.inverse_frequencies(op, dim)), outs[0].address, *numbers)
    return [blocks(f"paged_rope_{kind}", "rope", (tokens, heads + 2 * kv_heads), THREADS, args, site)]


@launch_rule("paged_decode")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    q, lengths, tables, keys, values = ins
    count, kv_heads, rows, wide = keys.shape
    batch, heads, dim = q.shape
    need_dim(op, dim)
    pages = Pages(tables.address, lengths.address, rows, tables.shape[1], kv_heads * rows * wide, count)
    strides = (0, rows * wide, wide)
    cache = DecodeCache(keys.address, values.address, 0, kv_heads, dim, tables.shape[1] * rows, strides, pages)
    return split_decode(float_type(op, q, keys, values, outs[0]), q.address, cache, batch, heads, outs[0].address, site)


@launch_rule("paged_prefill")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    q, starts, lengths, tables, keys, values = ins
    count, kv_heads, rows, wide = keys.shape
    tokens, heads, dim = q.shape
    need_dim(op, dim)
    pointers = (t.address for t in (q, starts, lengths, tables, keys, values, outs[0]))
    shape = map(np.int32, (heads, kv_heads, dim, lengths.shape[0]))
    places = (np.int64(rows * wide), np.int64(wide), np.int32(rows), np.int32(tables.shape[1]))
    args = (*pointers, *shape, *places, np.int64(kv_heads * rows * wide), np.int32(count), site.fault())
    name = f"paged_prefill_{float_type(op, q, keys, values, outs[0])}"
    return [blocks(name, "attention", (tokens, heads), THREADS, args, site)]


_COPY_SMS = 8
"""Blocks that move pages unless the demand says more: enough for the copy path, and most SMs stay free."""


@launch_rule("copy_pages")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    source, target, pairs = ins
    page = source.nbytes // source.shape[0]
    if page % 4:
        raise BackendUnavailable(f"op {op.name!r}: pages of {page} bytes; the kernel moves multiples of 4.")
    wide = min(site.sm_count, op.demand.sm[1] if op.demand.sm else _COPY_SMS)
    numbers = (np.int32(pairs.shape[0]), np.int64(page // 4))
    ends = (np.int32(source.shape[0]), np.int32(target.shape[0]), site.fault())
    args = (source.address, target.address, pairs.address, outs[0].address, *numbers, *ends)
    return [Launch("copy_pages", "pages", (wide,), 1024, args)]
