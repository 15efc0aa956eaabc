"""CPU kernels over a KV cache in pages: pages lie in memory as the weight panels of the product tile.

In page p of kv head h, keys are the panels of q k^T, (page / 32, dim / pack, 32, pack), and values those of p v,
(dim / 32, page / pack, 32, pack), with pack = 2 for bf16 and 1 for float32: attention multiplies by pages as they lie.
A query's sums run over its keys in order, whatever rows stand beside it, so a token's output does not depend on the
batch or on how its prompt was cut into chunks. Kernels take `threads` last, as in `taskgraph.runtime.cpu.kernels`.
"""

from typing import Any, NamedTuple

import numpy as np

from taskgraph.runtime.cpu.arguments import Array
from taskgraph.runtime.cpu.kernels_attention import _turned, weigh
from taskgraph.runtime.cpu.tile import COLUMNS, PAIRS, ROWS, SINGLE, WIDE, fork, kernel, narrow, tile, widen


class _Spot(NamedTuple):
    """A token's place in a head's page: the page's first element in the flat arrays, the place in it, and the page's
    tokens and channels."""

    page: int
    at: int
    size: int
    wide: int


@kernel
def _append(keys: Any, values: Any, spot: Any, k: Any, qkv: Any, token: Any, v: Any, last: Any) -> None:
    """Write a key and a value (`qkv[token]` from number `v` on) of one head to a spot of the flat keys and values.

    Attention multiplies values by the word: what the word of the `last` token has of none is zeroed, for another
    sequence may have left a NaN there."""
    page, at, size, wide = spot
    pack, dim = 4 // keys.itemsize, len(k)
    first = page + at // COLUMNS * (wide * COLUMNS) + at % COLUMNS * pack
    for word in range(dim // pack):  # two loops: a division an element would last longer than all the rest
        for j in range(pack):
            keys[first + word * (COLUMNS * pack) + j] = k[word * pack + j]
    first = page + at // pack * (COLUMNS * pack) + at % pack
    for begin in range(0, dim, COLUMNS):
        for j in range(min(COLUMNS, dim - begin)):
            values[first + begin * size + j * pack] = qkv[token, v + begin + j]
        if last and at % pack < pack - 1:
            for j in range(min(COLUMNS, dim - begin)):
                values[first + begin * size + j * pack + 1] = 0


@kernel
def _paged_rope(qkv: Any, places: Any, cache: Any, rope: Any, out: Any, part: Any, parts: Any) -> None:
    """No array is sliced within the loop: threads would wait for each other to count its references."""
    positions, slots = places
    keys, values = cache
    cos, sin, q_norm, k_norm, eps = rope
    tokens, heads, dim = out.shape
    _, kv_heads, size, wide = keys.shape
    flat_k, flat_v = keys.reshape(keys.size), values.reshape(values.size)
    head, turned = np.empty(dim, np.float32), np.empty(dim, out.dtype)
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        place, slot = positions[token], slots[token]
        last = token + 1 == tokens or slots[token + 1] != slot + 1
        for h in range(heads + kv_heads):
            if h >= heads and slot < 0:
                break
            for j in range(dim):
                head[j] = widen(qkv[token, h * dim + j])
            _turned(head, q_norm if h < heads else k_norm, eps, cos, sin, place, turned)
            if h < heads:
                for j in range(dim):
                    out[token, h, j] = turned[j]
            else:
                page = (slot // size * np.int64(kv_heads) + h - heads) * size * wide
                spot = _Spot(page, slot % size, size, wide)
                _append(flat_k, flat_v, spot, turned, qkv, token, (h + kv_heads) * dim, last)


@kernel
def paged_rope(qkv: Any, places: Any, cache: Any, rope: Any, out: Any, threads: Any = 1) -> None:
    """`kernels_attention.rope_kv` with a place of its own for every token: `places` are Places."""
    positions, slots = places
    room = cache.keys.shape[0] * cache.keys.shape[2]
    for i in range(len(slots)):
        if slots[i] >= room or positions[i] < 0 or positions[i] >= len(rope.cos):
            raise ValueError("a slot or a position is outside the pages. They are", slots[i], positions[i])
    fork(_paged_rope, (qkv, places, cache, rope, out), threads)


class _Cuts(NamedTuple):
    """A thread's own memory, (ROWS, columns) each, and whether bf16 is multiplied by the processor's dot products."""

    scores: Array
    shares: Array
    queries: Array
    part_sum: Array
    mixed: Array
    dot: bool


@kernel
def _rows(q: Any, seen: Any, grow: Any, blocks: Any, cache: Any, h: Any, cuts: Any, out: Any) -> None:
    """Attention of up to ROWS query rows, q and out (rows, dim), over the pages `blocks` of one sequence and kv head h:
    row r sees `seen` + grow * r keys."""
    keys, values = cache
    scores, shares, queries, part_sum, mixed, dot = cuts
    (rows, dim), (size, wide) = q.shape, keys.shape[2:]
    pack, last = 4 // keys.itemsize, seen + grow * (rows - 1)
    scale, dots = np.float32(1.0) / np.sqrt(np.float32(dim)), keys.itemsize == 2 and dot
    mode = SINGLE if keys.itemsize == 4 else PAIRS if dots else WIDE
    page_bytes = keys.itemsize * size * wide
    query, stride, unit = q.ctypes.data, q.strides[0], keys.itemsize
    share_at, share_stride = shares.ctypes.data, shares.strides[0]
    if mode == WIDE:
        for r in range(rows):
            for j in range(dim):
                queries[r, j] = widen(q[r, j])
        query, stride = queries.ctypes.data, queries.strides[0]
    if not dots:
        share_at, share_stride, unit = scores.ctypes.data, scores.strides[0], 4
    for panel in range((last + COLUMNS - 1) // COLUMNS):
        place = panel * COLUMNS
        address = keys.ctypes.data + blocks[place // size] * keys.strides[0] + h * page_bytes
        address += place % size // COLUMNS * (wide * COLUMNS * keys.itemsize)
        into = (scores.ctypes.data + place * 4, scores.strides[0])
        tile(rows, (query, stride), address, dim // pack, into, mode)
    padded = (last + pack - 1) // pack * pack
    for r in range(rows):
        weigh(scores[r], shares[r], seen + grow * r, padded, scale, dots)
    deep = (dim + COLUMNS - 1) // COLUMNS
    for r in range(rows):
        for j in range(deep * COLUMNS):
            mixed[r, j] = np.float32(0.0)
    for first in range(0, last, size):
        steps = min(size, padded - first) // pack
        page = values.ctypes.data + blocks[first // size] * values.strides[0] + h * page_bytes
        for panel in range(deep):
            weights, address = (share_at + first * unit, share_stride), page + panel * (size * COLUMNS * keys.itemsize)
            tile(rows, weights, address, steps, (part_sum.ctypes.data, 128), mode)
            for r in range(rows):
                for j in range(COLUMNS):
                    mixed[r, panel * COLUMNS + j] += part_sum[r, j]
    for r in range(rows):
        for j in range(dim):
            out[r, j] = narrow(mixed[r, j], out)


def scratch_size(length: int, dim: int, threads: int) -> int:
    """float32 elements that both attention kernels need as scratch for sequences of up to `length` keys."""
    wide, deep = -(-length // COLUMNS) * COLUMNS, -(-dim // COLUMNS) * COLUMNS
    return threads * ROWS * (2 * wide + 2 * deep + COLUMNS)


@kernel
def _cut(scratch: Any, dot: Any, part: Any, parts: Any, dim: Any, like: Any) -> Any:
    """This thread's part of the scratch, cut up for queries of `dim` channels that are stored as in `like`."""
    mine = scratch[len(scratch) // parts * part : len(scratch) // parts * (part + 1)]
    deep = (dim + COLUMNS - 1) // COLUMNS * COLUMNS
    wide = (len(mine) // ROWS - 2 * deep - COLUMNS) // 2
    scores = mine[: ROWS * wide].reshape(ROWS, wide)
    shares = mine[ROWS * wide : 2 * ROWS * wide].view(like.dtype)[: ROWS * wide].reshape(ROWS, wide)
    rest = mine[2 * ROWS * wide :]
    sums, rest = rest[: ROWS * COLUMNS].reshape(ROWS, COLUMNS), rest[ROWS * COLUMNS :]
    mixed = rest[: ROWS * deep].reshape(ROWS, deep)
    return _Cuts(scores, shares, rest[ROWS * deep :].reshape(ROWS, deep), sums, mixed, dot)


@kernel
def _paged_decode(q: Any, tables: Any, cache: Any, out: Any, scratch: Any, dot: Any, part: Any, parts: Any) -> None:
    lengths, blocks = tables
    batch, heads, dim = q.shape
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    cuts = _cut(scratch, dot, part, parts, dim, q)
    total, before = max(lengths.sum() * kv_heads, 1), 0
    for b in range(batch):
        for h in range(kv_heads):
            mine = min(before * parts // total, parts - 1) == part
            before += lengths[b]
            if not mine:
                continue
            target = out[b, h * group * dim : (h + 1) * group * dim].reshape(group, dim)
            if lengths[b] == 0:
                target[:] = narrow(np.float32(0.0), out)
                continue
            for top in range(0, group, ROWS):
                end = min(top + ROWS, group)
                queries = q[b, h * group + top : h * group + end]
                _rows(queries, lengths[b], 0, blocks[b], cache, h, cuts, target[top:end])


@kernel
def check_tables(lengths: Any, blocks: Any, pages: Any, size: Any) -> None:
    """ValueError when a sequence has more tokens than pages, or a page that does not exist; of `size` tokens each."""
    for b in range(len(lengths)):
        if lengths[b] < 0 or lengths[b] > blocks.shape[1] * size:
            raise ValueError(
                "a sequence is longer than its block table, or shorter than nothing. Its length is", lengths[b]
            )
        for i in range((lengths[b] + size - 1) // size):
            if blocks[b, i] < 0 or blocks[b, i] >= pages:
                raise ValueError("a block table names a page that does not exist:", blocks[b, i])


@kernel
def check_chunks(starts: Any, lengths: Any, rows: Any) -> None:
    """ValueError unless chunks follow each other within `rows`, each no longer than its sequence."""
    if starts[0] < 0 or starts[-1] > rows:
        raise ValueError("the chunks have more rows than there are: they end at", starts[-1])
    for i in range(len(lengths)):
        if starts[i + 1] < starts[i] or starts[i + 1] - starts[i] > lengths[i]:
            raise ValueError(
                "a chunk has more rows than its sequence has tokens, or fewer than none: it ends at", starts[i + 1]
            )


@kernel
def paged_decode(q: Any, tables: Any, cache: Any, out: Any, scratch: Any, dot: Any, threads: Any = 1) -> None:
    """One query a sequence: q (n, h, d) over the tokens that its Tables name -> out (n, h * d).

    Threads take (sequence, kv head) pairs, shared out by their lengths; heads of a group share each page. `dot` is
    that of `kernels.gemm`.
    """
    check_tables(tables.lengths, tables.blocks, len(cache.keys), cache.keys.shape[2])
    fork(_paged_decode, (q, tables, cache, out, scratch, dot), threads)


@kernel
def _paged_prefill(q: Any, chunks: Any, cache: Any, out: Any, scratch: Any, dot: Any, part: Any, parts: Any) -> None:
    starts, lengths, blocks = chunks
    _, heads, dim = q.shape
    group = heads // cache.keys.shape[1]
    cuts = _cut(scratch, dot, part, parts, dim, q)
    whole = out.reshape(len(q), heads, dim)
    total, before = 1, 0
    for s in range(len(lengths)):
        total += (starts[s + 1] - starts[s]) * lengths[s] * heads
    for s in range(len(lengths)):
        each = starts[s + 1] - starts[s]
        for head in range(heads):
            for top in range(0, each, ROWS):
                rows, token = min(ROWS, each - top), starts[s] + top
                mine = min(before * parts // total, parts - 1) == part
                before += rows * lengths[s]
                if mine:
                    queries, target = q[token : token + rows, head], whole[token : token + rows, head]
                    _rows(queries, lengths[s] - each + top + 1, 1, blocks[s], cache, head // group, cuts, target)


@kernel
def paged_prefill(q: Any, chunks: Any, cache: Any, out: Any, scratch: Any, dot: Any, threads: Any = 1) -> None:
    """Several queries a sequence: rows of q (t, h, d) over the tokens that their Chunks name -> out (t, h * d).

    Rows beyond the last chunk are zeroed. Threads take blocks of ROWS queries of a head, shared out by their keys.
    """
    check_tables(chunks.lengths, chunks.blocks, len(cache.keys), cache.keys.shape[2])
    check_chunks(chunks.starts, chunks.lengths, len(q))
    fork(_paged_prefill, (q, chunks, cache, out, scratch, dot), threads)
    out[chunks.starts[-1] :] = narrow(np.float32(0.0), out)


@kernel
def copy_pages(source: Any, target: Any, pairs: Any, done: Any) -> None:
    """Copy page pairs[i, 0] of `source` (pages, bytes) to page pairs[i, 1] of `target`; pairs with a -1 are skipped."""
    done[0] = 0
    for i in range(len(pairs)):
        if pairs[i, 0] >= len(source) or pairs[i, 1] >= len(target):
            raise ValueError("a page to copy does not exist: from and to are", pairs[i, 0], pairs[i, 1])
        if pairs[i, 0] >= 0 and pairs[i, 1] >= 0:
            target[pairs[i, 1]] = source[pairs[i, 0]]
            done[0] += 1
