"""How attention with a cache of keys and values, static or in pages, and the rotation before it run on a GPU.

A page is (kv heads, page size, width), row after row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import ITEMSIZE, Op
from taskgraph.runtime import rotary
from taskgraph.runtime.gpu.kinds import (
    KERNELS,
    THREADS,
    Buffer,
    GpuSite,
    Launches,
    blocks,
    dense_strides,
    float_type,
    need_i64,
    register,
)

_SPLIT_KEYS, _MAX_SPLITS, _MAX_DIM = 256, 32, 256


def rope_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, positions = ins
    need_i64(op, positions)
    tokens, heads, dim = x.shape
    args = (x.address, positions.address, site.constant(rotary.inverse_frequencies(op, dim)), outs[0].address)
    name = f"rope_{float_type(op, x, outs[0])}"
    return [blocks(name, (tokens, heads), THREADS, (*args, np.int32(heads), np.int32(dim)), site)]


def rope_kv_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    qkv, positions, keys, values, *norms = ins
    need_i64(op, positions)
    batch, kv_heads, length, dim = keys.shape
    tokens, heads, _ = outs[0].shape
    kind = float_type(op, qkv, keys, values, outs[0], *norms)
    q_norm, k_norm = (t.address for t in norms) if norms else (0, 0)
    pointers = (qkv.address, positions.address, keys.address, values.address, q_norm, k_norm)
    last = np.float32(op.number("eps")), np.float32(rotary.size(op))
    numbers = (*map(np.int32, (heads, kv_heads, dim, tokens // batch)), np.int64(length), *last)
    args = (*pointers, site.constant(rotary.inverse_frequencies(op, dim)), outs[0].address, *numbers, site.fault())
    return [blocks(f"rope_kv_{kind}", (tokens, heads + 2 * kv_heads), THREADS, args, site)]


def paged_rope_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
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
    return [blocks(f"paged_rope_{kind}", (tokens, heads + 2 * kv_heads), THREADS, args, site)]


register("rope", rope_launches, KERNELS / "rope.cu")
register("rope_kv", rope_kv_launches, KERNELS / "rope.cu")
register("paged_rope", paged_rope_launches, KERNELS / "rope.cu")


# -- attention --------------------------------------------------------------------------------------------------------


def _need_dim(op: Op, dim: int) -> None:
    if dim > _MAX_DIM:
        raise BackendUnavailable(f"op {op.name!r}: the attention kernels take head dims up to {_MAX_DIM}; got {dim}.")


@dataclass(frozen=True, slots=True)
class _Pages:
    """Where the keys of a sequence lie: addresses of the block tables and of the lengths (i32), the rows of a page, the
    pages of a table, elements from page to page, and how many pages there are."""

    blocks: int
    lengths: int
    rows: int
    each: int
    stride: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class _DecodeCache:
    """Keys and values; `strides` in elements from sequence to sequence, head to head, key to key. Keys in use are
    positions[sequence] + 1 or those that `pages` say, else all `length`."""

    keys: int
    values: int
    positions: int
    kv_heads: int
    dim: int
    length: int
    strides: tuple[int, int, int]
    pages: _Pages = _Pages(0, 0, 1, 0, 0)


def _split_decode(kind: str, q: int, cache: _DecodeCache, batch: int, heads: int, out: int, site: GpuSite) -> Launches:
    """Splits of the keys, as many as fill the lane's SMs, and a combine step."""
    wanted = -(-site.sm_count // (batch * heads))
    splits = max(1, min(_MAX_SPLITS, wanted, -(-cache.length // _SPLIT_KEYS)))
    parts = site.scratch(4 * batch * heads * splits * (cache.dim + 2))
    shape = map(np.int32, (heads, cache.kv_heads, cache.dim, cache.length))
    p = cache.pages
    places = (*map(np.int64, cache.strides), np.int32(p.rows), np.int32(p.each), np.int64(p.stride), np.int32(p.count))
    args = (q, cache.keys, cache.values, p.blocks, p.lengths, cache.positions, parts, *shape, *places, site.fault())
    combine = (parts, out, np.int32(heads), np.int32(cache.dim), np.int32(splits))
    return [
        blocks(f"decode_split_{kind}", (batch, heads, splits), THREADS, args, site),
        blocks(f"decode_combine_{kind}", (batch, heads), THREADS, combine, site),
    ]


def attention_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, positions, keys, values = ins
    need_i64(op, positions)
    batch, kv_heads, length, dim = keys.shape
    tokens, heads, _ = q.shape
    kind = float_type(op, q, keys, values, outs[0])
    _need_dim(op, dim)
    if tokens == batch:
        strides = (kv_heads * length * dim, length * dim, dim)
        cache = _DecodeCache(keys.address, values.address, positions.address, kv_heads, dim, length, strides)
        return _split_decode(kind, q.address, cache, batch, heads, outs[0].address, site)
    pointers = (q.address, positions.address, keys.address, values.address, outs[0].address)
    numbers = (*map(np.int32, (heads, kv_heads, dim, tokens // batch)), np.int64(length))
    args = (*pointers, *numbers, site.fault())
    return [blocks(f"attention_{kind}", (tokens, heads), THREADS, args, site)]


def decode_attention_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, kv = ins
    _, batch, length, kv_heads, dim = kv.shape
    _need_dim(op, dim)
    half, sequence, key, head, _ = kv.strides or dense_strides(kv.shape)
    values = kv.address + half * ITEMSIZE[kv.dtype]
    strides = (sequence, head, key)
    cache = _DecodeCache(kv.address, values, 0, kv_heads, dim, length, strides)
    return _split_decode(float_type(op, q, kv, outs[0]), q.address, cache, batch, q.shape[1], outs[0].address, site)


def paged_decode_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, lengths, tables, keys, values = ins
    count, kv_heads, rows, wide = keys.shape
    batch, heads, dim = q.shape
    _need_dim(op, dim)
    pages = _Pages(tables.address, lengths.address, rows, tables.shape[1], kv_heads * rows * wide, count)
    strides = (0, rows * wide, wide)
    cache = _DecodeCache(keys.address, values.address, 0, kv_heads, dim, tables.shape[1] * rows, strides, pages)
    return _split_decode(
        float_type(op, q, keys, values, outs[0]), q.address, cache, batch, heads, outs[0].address, site
    )


def paged_prefill_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, starts, lengths, tables, keys, values = ins
    count, kv_heads, rows, wide = keys.shape
    tokens, heads, dim = q.shape
    _need_dim(op, dim)
    pointers = (t.address for t in (q, starts, lengths, tables, keys, values, outs[0]))
    shape = map(np.int32, (heads, kv_heads, dim, lengths.shape[0]))
    places = (np.int64(rows * wide), np.int64(wide), np.int32(rows), np.int32(tables.shape[1]))
    args = (*pointers, *shape, *places, np.int64(kv_heads * rows * wide), np.int32(count), site.fault())
    name = f"paged_prefill_{float_type(op, q, keys, values, outs[0])}"
    return [blocks(name, (tokens, heads), THREADS, args, site)]


register("attention", attention_launches, KERNELS / "attention.cu")
register("paged_decode", paged_decode_launches, KERNELS / "attention.cu")
register("paged_prefill", paged_prefill_launches, KERNELS / "attention.cu")
register("decode_attention", decode_attention_launches, KERNELS / "attention.cu", strided=True)
