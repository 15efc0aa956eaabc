"""Attention of chunks of rows at the end of their keys, which lie in pages.

By tiles of keys with a running maximum (Dao et al. 2022, "FlashAttention"). A tile of rows has all query heads of a kv
head for some tokens, so that keys are read once for them. Blocks take tiles from the longest to the shortest, in turns
that go to and fro. Tiles that no row's causal edge crosses are computed without masks.
"""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow
from taskgraph.runtime.gpu.ahead.jit.faults import CHUNK, LENGTH, POSITION, report
from taskgraph.runtime.gpu.ahead.jit.faults import PAGE as NO_PAGE

_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _tiles_of(starts, chunk, TOKENS: tl.constexpr):
    """Tiles of rows of a chunk."""
    return tl.maximum(tl.load(starts + chunk + 1) - tl.load(starts + chunk) + TOKENS - 1, 0) // TOKENS


@triton.jit
def _length(lengths, chunk, POSITIONS: tl.constexpr):
    """Keys of a chunk: its length, or the position of its first row and its POSITIONS rows."""
    return (tl.load(lengths + chunk) + POSITIONS).to(tl.int32)


@triton.jit
def _pages(tables, chunk, key, each, count, ROWS: tl.constexpr):
    """The pages of keys, the first in place of one that does not exist; without tables that of the chunk's number."""
    if tables is None:
        page = key * 0 + chunk
    else:
        page = tl.load(tables + chunk * each + tl.minimum(key // ROWS, each - 1))
    return tl.where((page < 0) | (page >= count), 0, page)


@triton.jit
def _inside(key, d, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Where channels of keys lie in their pages of a head."""
    return (key % ROWS * WIDE)[:, None] + d[None, :]


@triton.jit
def prefill(
    q, starts, lengths, tables, keys, values, out, fault, tokens, chunks, each, count, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Pages are (KV, ROWS, WIDE), `count` of them; without `tables` page i is chunk i's. A tile is TOKENS * PADDED rows
    by N keys. ALL holds the channels of all heads of a token. Chunks have `lengths`, or POSITIONS rows each from the
    positions that stand there. Rows of no chunk are given zeros."""
    follow()
    block, blocks = tl.program_id(0), tl.num_programs(0)
    M: tl.constexpr = TOKENS * PADDED
    m, d, n = tl.arange(0, M), tl.arange(0, CHANNELS), tl.arange(0, N)
    limit = each * ROWS
    total = 0
    for chunk in range(0, chunks):
        total += _tiles_of(starts, chunk, TOKENS)
    if block == 0:
        for chunk in range(0, chunks):
            begin, stop = tl.load(starts + chunk), tl.load(starts + chunk + 1)
            length = _length(lengths, chunk, POSITIONS)
            if POSITIONS:
                report(fault, POSITION, length - POSITIONS, (length < POSITIONS) | (length > limit))
            else:
                report(fault, CHUNK, stop, (stop - begin > length) | (stop > tokens))
                report(fault, LENGTH, length, (stop > begin) & (length > limit))

    for turn in range(0, (total * KV + blocks - 1) // blocks):
        item = turn * blocks + tl.where(turn % 2 == 0, block, blocks - 1 - block)
        if item < total * KV:
            tile = total - 1 - item // KV
            head = item % KV
            chunk = 0
            before = 0
            reached = 0
            for other in range(0, chunks):
                tiles = _tiles_of(starts, other, TOKENS)
                here = (tile >= reached) & (tile < reached + tiles)
                chunk = tl.where(here, other, chunk)
                before = tl.where(here, reached, before)
                reached += tiles
            begin, stop = tl.load(starts + chunk), tl.load(starts + chunk + 1)
            length = _length(lengths, chunk, POSITIONS)
            first = begin + (tile - before) * TOKENS
            token = first + m // PADDED
            mine = (token < tl.minimum(stop, tokens)) & (token >= 0) & (m % PADDED < GROUP)
            seen = tl.minimum(tl.maximum(length - stop + token + 1, 1), limit)
            least = tl.minimum(tl.maximum(length - stop + first + 1, 1), limit)
            most_keys = tl.minimum(tl.maximum(length - stop + tl.minimum(first + TOKENS, stop), 1), limit)
            spread = ((token * KV + head) * GROUP + m % PADDED).to(tl.int64)[:, None] * DIM + d[None, :]
            there = mine[:, None] & (d < DIM)[None, :]
            x = tl.load(q + spread, mask=there, other=0.0)
            most = tl.full([M], _LOWEST, tl.float32)
            weights = tl.zeros([M], tl.float32)
            mixed = tl.zeros([M, CHANNELS], tl.float32)
            full = least // N
            page = _pages(tables, chunk, n, each, count, ROWS)
            for t in range(0, full):
                rows = ((page * KV + head) * ROWS).to(tl.int64)[:, None] * WIDE + _inside(t * N + n, d, ROWS, WIDE)
                if CHANNELS == DIM:
                    k = tl.load(keys + rows)
                    v = tl.load(values + rows)
                else:
                    k = tl.load(keys + rows, mask=(d < DIM)[None, :], other=0.0)
                    v = tl.load(values + rows, mask=(d < DIM)[None, :], other=0.0)
                score = tl.dot(x, tl.trans(k), input_precision="tf32x3")
                larger = tl.maximum(most, tl.max(score, 1) * scale)
                weight = tl.exp2(score * scale - larger[:, None])
                kept = tl.exp2(most - larger)
                mixed = tl.dot(weight.to(v.dtype), v, mixed * kept[:, None], input_precision="tf32x3")
                weights = weights * kept + tl.sum(weight, 1)
                most = larger
                page = _pages(tables, chunk, (t + 1) * N + n, each, count, ROWS)  # a turn ahead of their use
            for t in range(full, (most_keys + N - 1) // N):
                key = t * N + n
                page = _pages(tables, chunk, key, each, count, ROWS)
                rows = ((page * KV + head) * ROWS).to(tl.int64)[:, None] * WIDE + _inside(key, d, ROWS, WIDE)
                known = (key < most_keys)[:, None] & (d < DIM)[None, :]
                k = tl.load(keys + rows, mask=known, other=0.0)
                v = tl.load(values + rows, mask=known, other=0.0)
                score = tl.dot(x, tl.trans(k), input_precision="tf32x3") * scale
                score = tl.where(key[None, :] < seen[:, None], score, _LOWEST)
                larger = tl.maximum(most, tl.max(score, 1))
                weight = tl.exp2(score - larger[:, None])
                kept = tl.exp2(most - larger)
                mixed = tl.dot(weight.to(v.dtype), v, mixed * kept[:, None], input_precision="tf32x3")
                weights = weights * kept + tl.sum(weight, 1)
                most = larger
            tl.store(out + spread, (mixed / weights[:, None]).to(out.dtype.element_ty), mask=there)
            if tables is not None:
                for t in range(0, (most_keys + ROWS - 1) // ROWS, CHANNELS):
                    known = t + d < (most_keys + ROWS - 1) // ROWS
                    asked = tl.load(tables + chunk * each + t + d, mask=known, other=0)
                    report(fault, NO_PAGE, asked, (asked < 0) | (asked >= count))

    ended = tl.minimum(tl.maximum(tl.load(starts + chunks), 0), tokens)
    begun = tl.minimum(tl.maximum(tl.load(starts), 0), ended)
    column = tl.arange(0, ALL)
    for place in range(block, tokens - ended + begun, blocks):
        row = tl.where(place < begun, place, place - begun + ended)
        zeros = tl.zeros([ALL], out.dtype.element_ty)
        tl.store(out + row.to(tl.int64) * KV * GROUP * DIM + column, zeros, mask=column < KV * GROUP * DIM)
