"""Attention of one row a sequence over its keys and values, in pages or one after another.

All tiles of keys of all sequences and heads are one line of work, of which every block takes an equal part (Sanovar et
al. 2024, "LeanAttention"), with a running maximum (Dao et al. 2022, "FlashAttention"; Milakov and Gimelshein 2018).
Heads that are cut where a part ends are put together by `join`. A block is one warp: it waits for no other, and many of
them on an SM keep many bytes on their way.
"""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow
from taskgraph.runtime.gpu.ahead.jit.faults import LENGTH, POSITION, report
from taskgraph.runtime.gpu.ahead.jit.faults import PAGE as NO_PAGE

_LOWEST = tl.constexpr(-1.0e30)
_LEAST = tl.constexpr(4)
"""Tiles of a part: less is not worth a block."""


@triton.jit
def _asked(lengths, row, there, limit, POSITIONS: tl.constexpr):
    """Keys that a sequence is said to have: its length, its position and one more, or all."""
    if lengths is None:
        asked = tl.where(there, limit, 0)
    else:
        asked = tl.load(lengths + row, mask=there, other=-1 if POSITIONS else 0) + (1 if POSITIONS else 0)
    return asked


@triton.jit
def _tiles(asked, limit, N: tl.constexpr):
    """Tiles of the keys that there are."""
    return ((tl.minimum(tl.maximum(asked, 0), limit) + N - 1) // N).to(tl.int32)


@triton.jit
def _all_tiles(lengths, batch, limit, POSITIONS: tl.constexpr, N: tl.constexpr, SCAN: tl.constexpr):
    """Tiles of one head of all sequences."""
    total = 0
    for first in range(0, batch, SCAN):
        row = first + tl.arange(0, SCAN)
        total += tl.sum(_tiles(_asked(lengths, row, row < batch, limit, POSITIONS), limit, N), 0)
    return total


@triton.jit
def _sequence_at(lengths, batch, limit, place, POSITIONS: tl.constexpr, N: tl.constexpr, SCAN: tl.constexpr):
    """The sequence whose tiles of one head hold number `place` of all sequences', and the tiles before it."""
    sequence = 0
    before = 0
    total = 0
    for first in range(0, batch, SCAN):
        row = first + tl.arange(0, SCAN)
        ends = total + tl.cumsum(_tiles(_asked(lengths, row, row < batch, limit, POSITIONS), limit, N), 0)
        past = (ends <= place) & (row < batch)
        sequence += tl.sum(past.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(past, ends, 0), 0))
        total = tl.max(ends, 0)
    return sequence, before


@triton.jit
def _mixed(score, v, most, weights, mixed):
    """A tile's scores (N, heads) and values (N, CHANNELS) joined to what was seen: the maximum, the weights by place in
    a tile, and the mixed values (CHANNELS, heads), in base 2."""
    larger = tl.maximum(most, tl.max(score, 0))
    weight = tl.exp2(score - larger[None, :])
    kept = tl.exp2(most - larger)
    mixed = tl.dot(tl.trans(v), weight.to(v.dtype), mixed * kept[None, :], input_precision="tf32x3")
    return larger, weights * kept[None, :] + weight, mixed


@triton.jit
def decode(
    q, lengths, tables, keys, values, out, parts, cut, fault, batch, limit, each, count, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr, POSITIONS: tl.constexpr, N: tl.constexpr, SCAN: tl.constexpr,
    APART: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """A block an equal part of the tiles of N keys, each in one page of `count`; without `tables` page i is sequence
    i's. A page is (KV, ROWS, WIDE), or (ROWS, WIDE) with the heads BESIDE each other in a row.

    `parts` (blocks, 2, GROUP, CHANNELS + 2): what a block has of the head that was begun before its part, and of the
    one that goes on behind it: mixed values, maximum, sum. `cut` (blocks, 2): the head that is cut where this part
    begins and nowhere before, and the last block that has a part of it; -1 for none. APART: the last tile of a head, of
    which a part is no key, has code of its own, so that the loop masks nothing."""
    follow()
    block, blocks = tl.program_id(0), tl.num_programs(0)
    g, d, n = tl.arange(0, PADDED), tl.arange(0, CHANNELS), tl.arange(0, N)
    mine = (g < GROUP)[:, None] & (d < DIM)[None, :]
    spread = g[:, None] * DIM + d[None, :]
    for row in range(block, batch, blocks):
        asked = _asked(lengths, row, row < batch, limit, POSITIONS)
        wrong = (asked > limit) | (asked < (1 if POSITIONS else 0))
        report(fault, POSITION if POSITIONS else LENGTH, asked - (1 if POSITIONS else 0), wrong)
        if asked <= 0:
            for head in range(KV):
                place = (row * KV + head) * GROUP * DIM
                tl.store(out + place + spread, tl.zeros([PADDED, CHANNELS], out.dtype.element_ty), mask=mine)

    total = _all_tiles(lengths, batch, limit, POSITIONS, N, SCAN) * KV
    share = tl.maximum((total + blocks - 1) // blocks, _LEAST)
    tile = tl.minimum(block * share, total)
    end = tl.minimum(tile + share, total)
    sequence, before = _sequence_at(lengths, batch, limit, tile // KV, POSITIONS, N, SCAN)
    before = before * KV
    tl.store(cut + 2 * block, -1)
    height = count * ROWS if BESIDE else count * KV * ROWS
    across: tl.constexpr = KV * DIM if BESIDE else DIM
    key_rows = tl.make_tensor_descriptor(keys, [height, across], [WIDE, 1], [N, CHANNELS])
    value_rows = tl.make_tensor_descriptor(values, [height, across], [WIDE, 1], [N, CHANNELS])
    while tile < end:
        length = tl.minimum(_asked(lengths, sequence, sequence < batch, limit, POSITIONS), limit).to(tl.int32)
        tiles = _tiles(length, limit, N)
        head = (tile - before) // tl.maximum(tiles, 1)
        begin = before + head * tiles
        stop = tl.minimum(begin + tiles, end)
        whole = tl.minimum(stop - begin, length // N) if APART else stop - begin
        item = sequence * KV + head
        above = 0 if BESIDE else head * ROWS
        column = head * DIM if BESIDE else 0
        page = sequence
        if tables is not None:
            page = tl.load(tables + sequence * each + (tile - begin) * N // ROWS)
        x = tl.load(q + item * GROUP * DIM + tl.trans(spread), mask=tl.trans(mine), other=0.0)
        most = tl.full([PADDED], _LOWEST, tl.float32)
        weights = tl.zeros([N, PADDED], tl.float32)
        mixed = tl.zeros([CHANNELS, PADDED], tl.float32)
        for t in range(tile - begin, whole):
            wrong = (page < 0) | (page >= count)
            report(fault, NO_PAGE, page, wrong)
            place = tl.where(wrong, 0, page) * (ROWS if BESIDE else KV * ROWS) + above + t * N % ROWS
            score = tl.dot(key_rows.load([place, column]), x, input_precision="tf32x3") * scale
            v = value_rows.load([place, column])
            if not APART:
                score = tl.where((t * N + n < length)[:, None], score, _LOWEST)
                v = tl.where((t * N + n < length)[:, None], v, 0.0)
            most, weights, mixed = _mixed(score, v, most, weights, mixed)
            if tables is not None:  # one tile ahead, so that no load of keys waits for a load of a page
                page = tl.load(tables + sequence * each + tl.minimum(t + 1, stop - begin - 1) * N // ROWS)
        if APART and whole < stop - begin:
            wrong = (page < 0) | (page >= count)
            report(fault, NO_PAGE, page, wrong)
            place = tl.where(wrong, 0, page) * (ROWS if BESIDE else KV * ROWS) + above + whole * N % ROWS
            rows = (place + n[:, None]).to(tl.int64) * WIDE + column + d[None, :]
            there = (whole * N + n < length)[:, None] & (d < DIM)[None, :]
            k = tl.load(keys + rows, mask=there, other=0.0)
            v = tl.load(values + rows, mask=there, other=0.0)
            score = tl.dot(k, x, input_precision="tf32x3") * scale
            score = tl.where((whole * N + n < length)[:, None], score, _LOWEST)
            most, weights, mixed = _mixed(score, v, most, weights, mixed)
        sums = tl.sum(weights, 0)
        if stop - tile == tiles:
            sums = tl.where(sums > 0, sums, 1.0)  # of a sequence without keys
            done = tl.trans(mixed / sums[None, :]).to(out.dtype.element_ty)
            tl.store(out + item * GROUP * DIM + spread, done, mask=mine)
        else:
            late = (tile == begin).to(tl.int32)
            part = parts + ((2 * block + late) * GROUP + g) * (CHANNELS + 2)
            tl.store(part[:, None] + d[None, :], tl.trans(mixed), mask=(g < GROUP)[:, None])
            tl.store(part + CHANNELS, most, mask=g < GROUP)
            tl.store(part + CHANNELS + 1, sums, mask=g < GROUP)
            if (late == 0) & (begin >= (block - 1) * share):
                tl.store(cut + 2 * block, item)
                tl.store(cut + 2 * block + 1, (begin + tiles - 1) // share)
        tile = stop
        if tile == before + tiles * KV:
            before = tile
            sequence += 1


@triton.jit
def join(
    parts, cut, out, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block a place where `decode` may have cut a head: puts together what there is of it."""
    follow()
    block = tl.program_id(0)
    item = tl.load(cut + 2 * block)
    if item >= 0:
        last = tl.load(cut + 2 * block + 1)
        g, d = tl.arange(0, PADDED), tl.arange(0, CHANNELS)
        there = g < GROUP
        most = tl.full([PADDED], _LOWEST, tl.float32)
        total = tl.zeros([PADDED], tl.float32)
        mixed = tl.zeros([PADDED, CHANNELS], tl.float32)
        for other in range(block - 1, last + 1):
            part = parts + ((2 * other + (other == block - 1).to(tl.int32)) * GROUP + g) * (CHANNELS + 2)
            largest = tl.load(part + CHANNELS, mask=there, other=_LOWEST)
            weight = tl.load(part + CHANNELS + 1, mask=there, other=0.0)
            values = tl.load(part[:, None] + d[None, :], mask=there[:, None], other=0.0)
            larger = tl.maximum(most, largest)
            kept, added = tl.exp2(most - larger), tl.exp2(largest - larger)
            mixed = mixed * kept[:, None] + values * added[:, None]
            total = total * kept + weight * added
            most = larger
        done = (mixed / total[:, None]).to(out.dtype.element_ty)
        place = item * GROUP * DIM + g[:, None] * DIM + d[None, :]
        tl.store(out + place, done, mask=there[:, None] & (d < DIM)[None, :])
