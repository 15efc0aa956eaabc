"""CPU kernels of multi-head latent attention, for every cache whose rows of latents can be looked up by block tables.

A cache is a matrix (slots, rank + rotary); key i of a sequence lies at slot block[i / size] * size + i % size. A static
cache is one of pages as long as a sequence. Heads attend over latents with the up-projection folded into queries and
results ("absorbed"), or over keys and values made of them ("expanded"), COLUMNS keys at a time with a running softmax
(Milakov and Gimelshein 2018), so that a query's sums run over its keys in order, whatever rows stand beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.runtime.kernels import pack_keys, pack_values, pack_weight
from taskgraph.runtime.kernels_paged import check_tables
from taskgraph.runtime.tile import COLUMNS, ROW_BLOCK, ROWS, exp, fork, kernel, narrow, tile, widen

# -- rotating and writing -----------------------------------------------------------------------------------------


@kernel
def _turn(source: Any, target: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    """Rotate pairs of neighbours, or of the two halves; they leave as halves."""
    half = len(cos)
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        low, high = widen(source[a]), widen(source[b])
        target[j] = narrow(low * cos[j] - high * sin[j], target)
        target[j + half] = narrow(high * cos[j] + low * sin[j], target)


@kernel
def _latent_rope(
    q: Any, kv: Any, norm: Any, positions: Any, slots: Any, cache: Any, cos: Any, sin: Any, eps: Any,
    interleaved: Any, out: Any, part: Any, parts: Any,
) -> None:  # fmt: skip
    tokens, heads, dim = out.shape
    rank, plain = len(norm), dim - 2 * cos.shape[1]
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        turn_cos, turn_sin = cos[positions[token]], sin[positions[token]]
        for h in range(heads):
            row = q[token, h * dim : (h + 1) * dim]
            out[token, h, :plain] = row[:plain]
            _turn(row[plain:], out[token, h, plain:], turn_cos, turn_sin, interleaved)
        if slots[token] < 0:
            continue
        square = np.float32(0.0)
        for j in range(rank):
            square += widen(kv[token, j]) * widen(kv[token, j])
        scale = np.float32(1.0) / np.sqrt(square / np.float32(rank) + np.float32(eps))
        target = cache[slots[token]]
        for j in range(rank):
            target[j] = narrow(widen(kv[token, j]) * scale * norm[j], cache)
        _turn(kv[token, rank:], target[rank:], turn_cos, turn_sin, interleaved)


@kernel
def latent_rope(
    q: Any, kv: Any, norm: Any, positions: Any, slots: Any, cache: Any, cos: Any, sin: Any, eps: Any,
    interleaved: Any, out: Any, threads: Any = 1,
) -> None:  # fmt: skip
    """Rotate the last channels of each head of q (t, h * d) into out (t, h, d); normalise and rotate kv (t, rank +
    rotary) into cache[slots[i]] (-1: nowhere). Token i stands at positions[i]; norm (rank,) float32."""
    for i in range(len(slots)):
        if slots[i] >= len(cache) or positions[i] < 0 or positions[i] >= len(cos):
            raise ValueError("a slot or a position is outside the KV cache; give it more room or stop earlier")
    fork(_latent_rope, (q, kv, norm, positions, slots, cache, cos, sin, eps, interleaved, out), threads)


# -- products by head ---------------------------------------------------------------------------------------------


def pack_heads(weights: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """`pack_weight` of each head's (n, k): (heads, n / 32, words of k, 32)."""
    return np.stack([pack_weight(w) for w in weights])


@kernel
def _by_head(x: Any, depth: Any, packed: Any, columns: Any, out: Any, part: Any, parts: Any) -> None:
    """out[:, h] = x[:, h, :depth] packed[h] in `columns` columns, then what x has behind `depth`, as it is."""
    tokens, heads, _ = out.shape
    sums, pairs = np.empty((ROWS, COLUMNS), np.float32), x.itemsize == 2
    steps = depth * x.itemsize // 4
    for h in range(heads * part // parts, heads * (part + 1) // parts):
        for panel in range(packed.shape[1]):
            first = panel * COLUMNS
            width = min(COLUMNS, columns - first)
            w = packed.ctypes.data + h * packed.strides[0] + panel * packed.strides[1]
            for top in range(0, tokens, ROWS):
                rows = min(ROWS, tokens - top)
                address = x.ctypes.data + top * x.strides[0] + h * x.strides[1]
                tile(rows, address, x.strides[0], w, steps, sums.ctypes.data, 128, pairs)
                for r in range(rows):
                    for c in range(width):
                        out[top + r, h, first + c] = narrow(sums[r, c], out)
        for token in range(tokens):
            for j in range(out.shape[2] - columns):
                out[token, h, columns + j] = x[token, h, depth + j]


# -- attention ----------------------------------------------------------------------------------------------------


@kernel
def _make(near: Any, rank: Any, packed: Any, h: Any, columns: Any, sums: Any, made: Any) -> None:
    """made (COLUMNS keys, columns of packed[h]) of the latents of `near`, rounded to its dtype."""
    steps, pairs = rank * near.itemsize // 4, near.itemsize == 2
    for panel in range(packed.shape[1]):
        first = panel * COLUMNS
        w = packed.ctypes.data + h * packed.strides[0] + panel * packed.strides[1]
        for top in range(0, COLUMNS, ROWS):
            rows = min(ROWS, COLUMNS - top)
            address = near.ctypes.data + top * near.strides[0]
            tile(rows, address, near.strides[0], w, steps, sums.ctypes.data, 128, pairs)
            for r in range(rows):
                for c in range(min(COLUMNS, columns - first)):
                    made[top + r, first + c] = narrow(sums[r, c], near)


@kernel
def _fold(
    rows: Any, q: Any, q_stride: Any, first: Any, seen: Any, scale: Any, keys: Any, values: Any, scores: Any,
    shares: Any, sums: Any, top: Any, total: Any, mixed: Any,
) -> None:  # fmt: skip
    """Mix COLUMNS keys from number `first` on into up to ROWS rows, of which row r sees the first seen[r] in all."""
    pairs, pack = shares.itemsize == 2, 4 // shares.itemsize
    tile(rows, q, q_stride, keys.ctypes.data, len(keys), scores.ctypes.data, 128, pairs)
    for r in range(rows):
        visible = min(seen[r] - first, COLUMNS)
        row, largest = scores[r], top[r]
        for i in range(visible):
            row[i] *= scale
            largest = max(largest, row[i])
        shrink, sum_ = exp(top[r] - largest), np.float32(0.0)
        for i in range(COLUMNS):
            row[i] = exp(row[i] - largest) if i < visible else np.float32(0.0)
            sum_ += row[i]
            shares[r, i] = narrow(row[i], shares)
        top[r], total[r] = largest, total[r] * shrink + sum_
        for j in range(mixed.shape[1]):
            mixed[r, j] *= shrink
    for panel in range(len(values)):
        address = values.ctypes.data + panel * values.strides[0]
        tile(rows, shares.ctypes.data, shares.strides[0], address, COLUMNS // pack, sums.ctypes.data, 128, pairs)
        for r in range(rows):
            for j in range(COLUMNS):
                mixed[r, panel * COLUMNS + j] += sums[r, j]


@kernel
def _latent_attention(
    x: Any, starts: Any, lengths: Any, blocks: Any, size: Any, cache: Any, rank: Any, keys_up: Any, values_up: Any,
    expanded: Any, scale: Any, out: Any, part: Any, parts: Any,
) -> None:  # fmt: skip
    """x (t, h, depth) -> out (t, h, width). Tasks are up to ROW_BLOCK rows over one sequence: of one head when it is
    expanded, else of all, which then see the same keys and values."""
    (_, heads, depth), width, wide = x.shape, out.shape[2], cache.shape[1]
    pack, plain = 4 // x.itemsize, depth - (wide - rank)
    near, made = np.zeros((COLUMNS, wide), x.dtype), np.zeros((COLUMNS, depth), x.dtype)
    made_values = np.zeros((COLUMNS, width), x.dtype)
    keys = np.zeros((depth // pack, COLUMNS), np.uint32)
    values = np.zeros(((width + COLUMNS - 1) // COLUMNS, COLUMNS // pack, COLUMNS * pack), x.dtype)
    scores, sums = np.empty((ROWS, COLUMNS), np.float32), np.empty((ROWS, COLUMNS), np.float32)
    shares, seen = np.zeros((ROWS, COLUMNS), x.dtype), np.zeros(ROW_BLOCK, np.int64)
    top, total = np.empty(ROW_BLOCK, np.float32), np.empty(ROW_BLOCK, np.float32)
    mixed = np.empty((ROW_BLOCK, len(values) * COLUMNS), np.float32)
    groups, per = (heads, 1) if expanded else (1, heads)
    whole, before = np.int64(1), np.int64(0)
    for s in range(len(lengths)):
        whole += (starts[s + 1] - starts[s]) * np.int64(lengths[s]) * heads
    for s in range(len(lengths)):
        each = starts[s + 1] - starts[s]
        for task in range(groups * ((each * per + ROW_BLOCK - 1) // ROW_BLOCK)):
            head, offset = task % groups, task // groups * ROW_BLOCK
            rows = min(ROW_BLOCK, each * per - offset)
            mine = min(before * parts // whole, parts - 1) == part
            before += rows * np.int64(lengths[s])
            if not mine or lengths[s] == 0:
                continue
            for r in range(rows):
                seen[r] = lengths[s] - each + (offset + r) // per + 1
                top[r], total[r] = np.float32(-np.inf), np.float32(0.0)
                mixed[r, :] = np.float32(0.0)
            stride = x.strides[0] if expanded else x.strides[1]
            queries = x.ctypes.data + (starts[s] + offset // per) * x.strides[0] + (head + offset % per) * x.strides[1]
            for first in range(0, seen[rows - 1], COLUMNS):
                for i in range(COLUMNS):
                    if first + i < seen[rows - 1]:
                        near[i] = cache[blocks[s, (first + i) // size] * np.int64(size) + (first + i) % size]
                    else:
                        near[i, :] = 0
                if expanded:
                    _make(near, rank, keys_up, head, plain, sums, made)
                    made[:, plain:] = near[:, rank:]
                    _make(near, rank, values_up, head, width, sums, made_values)
                    pack_keys(made, 0, COLUMNS, keys)
                    pack_values(made_values, COLUMNS, width, values)
                else:
                    pack_keys(near, 0, COLUMNS, keys)
                    pack_values(near, COLUMNS, width, values)
                for r in range(0, rows, ROWS):
                    count = min(ROWS, rows - r)
                    if seen[r + count - 1] > first:
                        _fold(
                            count, queries + r * stride, stride, first, seen[r : r + count], scale, keys, values,
                            scores, shares, sums, top[r : r + count], total[r : r + count], mixed[r : r + count],
                        )  # fmt: skip
            for r in range(rows):
                target = out[starts[s] + (offset + r) // per, head + (offset + r) % per]
                for j in range(width):
                    target[j] = narrow(mixed[r, j] / total[r], out)


@kernel
def latent_attention(
    q: Any, starts: Any, lengths: Any, blocks: Any, size: Any, cache: Any, keys_up: Any, values_up: Any,
    expanded: Any, scale: Any, absorbed: Any, mixed: Any, out: Any, threads: Any = 1,
) -> None:  # fmt: skip
    """Rows starts[i] to starts[i + 1] of q (t, h, d) are the last of the lengths[i] tokens of the table blocks[i] ->
    out (t, h, v). Rows of no sequence, and those of a sequence of length 0, are zeroed.

    keys_up and values_up are `pack_heads` of the up-projection's halves: values (v, rank), and keys (plain, rank) when
    `expanded`, else (rank, plain). absorbed (t, h, rank + rotary) and mixed (t, h, rank) are scratch.
    """
    tokens, wide, rank = len(q), cache.shape[1], mixed.shape[2]
    check_tables(lengths, blocks, len(cache) // size, size)
    if starts[-1] > tokens:
        raise ValueError("the chunks have more rows than there are")
    result = out if expanded else mixed
    result[starts[-1] :] = 0
    for i in range(len(lengths)):
        if lengths[i] == 0:
            result[starts[i] : starts[i + 1]] = 0
        elif starts[i + 1] - starts[i] > lengths[i]:
            raise ValueError("a chunk has more rows than its sequence has tokens")
    if not expanded:
        fork(_by_head, (q, q.shape[2] - (wide - rank), keys_up, rank, absorbed), threads)
    x = q if expanded else absorbed
    places = (starts, lengths, blocks, size, cache, rank, keys_up, values_up)
    fork(_latent_attention, (x, *places, expanded, scale, result), threads)
    if not expanded:
        fork(_by_head, (mixed, rank, values_up, out.shape[2], out), threads)
