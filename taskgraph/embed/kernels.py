"""CPU kernels over views of any strides: rotary embedding of halves, and attention of a few queries.

Operands are addresses, sizes and strides in elements, so that one compilation serves all views; `like` is an empty
array of their dtype (bf16 as its bits). Sums are float32. The last axis of every operand has stride 1.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from taskgraph.runtime.cpu.kernels_pointwise import _pointer
from taskgraph.runtime.cpu.tile import COLUMNS, ROWS, SINGLE, exp, fork, inlined, kernel, narrow, tile, widen

_TILED = 6
"""Queries that share a head of keys, from which on copying them into panels pays."""
NO_MASK, TRUTHS, ADDED = 0, 1, 2
"""A mask of attention: none, which keys are seen (bool), or what is added to scores (float32)."""


@inlined
def _row(address: Any, first: Any, count: Any, like: Any) -> Any:
    return carray(_pointer(address + first * like.itemsize), (count,), like.dtype)


@kernel
def _rotate(like: Any, at: Any, sizes: Any, steps: Any, part: Any, parts: Any) -> None:
    heads, rows, dim = sizes[1], sizes[2], sizes[3]
    half = dim // 2
    tasks = sizes[0] * heads * rows
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        b, h, t = task // (heads * rows), task // rows % heads, task % rows
        x = _row(at[0], b * steps[0, 0] + h * steps[0, 1] + t * steps[0, 2], dim, like)
        cos = _row(at[1], b * steps[1, 0] + h * steps[1, 1] + t * steps[1, 2], dim, like)
        sin = _row(at[2], b * steps[2, 0] + h * steps[2, 1] + t * steps[2, 2], dim, like)
        out = _row(at[3], b * steps[3, 0] + h * steps[3, 1] + t * steps[3, 2], dim, like)
        for j in range(half):
            low, high = widen(x[j]), widen(x[j + half])
            out[j] = narrow(low * widen(cos[j]) - high * widen(sin[j]), out)
            out[j + half] = narrow(high * widen(cos[j + half]) + low * widen(sin[j + half]), out)


@kernel
def rotate(like: Any, at: Any, sizes: Any, steps: Any, threads: Any) -> None:
    """out = x * cos + (-x's second half, x's first half) * sin (Su et al. 2021, "RoFormer"): at (4,) int64 addresses of
    x, cos, sin and out, sizes (4,) of them all, steps (4, 4) their strides, 0 where they are repeated."""
    if threads == 1:
        _rotate(like, at, sizes, steps, 0, 1)
    else:
        fork(_rotate, (like, at, sizes, steps), threads)


class Scores(NamedTuple):
    """How queries and keys become scores: times `scale`, with a `mask` of NO_MASK, TRUTHS or ADDED; `causal`: query i
    sees keys 0 to i."""

    scale: float
    mask: int
    causal: bool


@kernel
def _times(x: Any, rows: Any, panel: Any, steps: Any, out: Any, column: Any) -> None:
    """out[:rows, column : column + COLUMNS] = x[:rows] times a panel (steps, COLUMNS)."""
    for top in range(0, rows, ROWS):
        source = (x.ctypes.data + top * x.strides[0], x.strides[0])
        into = (out.ctypes.data + top * out.strides[0] + 4 * column, out.strides[0])
        tile(min(ROWS, rows - top), source, panel.ctypes.data, steps, into, SINGLE)


@kernel
def _soften(row: Any, seen: Any, address: Any, step: Any, mask: Any) -> Any:
    """Make scores shares: row[i] = e^(row[i] - the largest) where key i is seen, else 0. Returns 1 / their sum."""
    least = np.float32(-np.inf)
    if mask == ADDED:
        added = carray(_pointer(address), ((seen - 1) * step + 1,), np.float32)
        for i in range(seen):
            row[i] += added[i * step]
    elif mask == TRUTHS:
        truths = carray(_pointer(address), ((seen - 1) * step + 1,), np.uint8)
        for i in range(seen):
            row[i] = row[i] if truths[i * step] != 0 else least
    top, total = least, np.float32(0.0)
    for i in range(seen):
        top = max(top, row[i])
    if top == least:
        row[:] = np.float32(0.0)
        return np.float32(0.0)
    for i in range(seen):
        share = exp(row[i] - top) if row[i] > least else np.float32(0.0)
        total += share
        row[i] = share
    row[seen:] = np.float32(0.0)
    return np.float32(1.0) / total


@kernel
def _attend(like: Any, at: Any, sizes: Any, steps: Any, how: Any, part: Any, parts: Any) -> None:
    heads, rows, dim, kv_heads, keys, wide = sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]
    group = heads // kv_heads
    each = 1 if sizes[0] * kv_heads >= parts else group
    tasks = sizes[0] * kv_heads * each
    panels, columns = (keys + COLUMNS - 1) // COLUMNS, (wide + COLUMNS - 1) // COLUMNS
    tiled = group * rows >= _TILED
    turned = np.zeros((panels if tiled else 0, dim, COLUMNS), np.float32)
    values = np.zeros((columns if tiled else 0, keys, COLUMNS), np.float32)
    high = min(rows, 4 * ROWS)
    queries, scores = np.empty((high, dim), np.float32), np.empty((high, panels * COLUMNS), np.float32)
    mixed, shares = np.empty((high, columns * COLUMNS), np.float32), np.empty(high, np.float32)
    scale = np.float32(how.scale)
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        b, g, piece = task // (kv_heads * each), task // each % kv_heads, task % each
        k_at, v_at = b * steps[1, 0] + g * steps[1, 1], b * steps[2, 0] + g * steps[2, 1]
        if tiled:
            for i in range(keys):
                k, v = _row(at[1], k_at + i * steps[1, 2], dim, like), _row(at[2], v_at + i * steps[2, 2], wide, like)
                panel, place = turned[i // COLUMNS], i % COLUMNS
                for j in range(dim):
                    panel[j, place] = widen(k[j])
                for c in range(columns):
                    row, some = values[c, i], v[c * COLUMNS : (c + 1) * COLUMNS]
                    for j in range(len(some)):
                        row[j] = widen(some[j])
        for h in range(g * group + piece * group // each, g * group + (piece + 1) * group // each):
            for first in range(0, rows, high):
                count = min(high, rows - first)
                for r in range(count):
                    q = _row(at[0], b * steps[0, 0] + h * steps[0, 1] + (first + r) * steps[0, 2], dim, like)
                    for j in range(dim):
                        queries[r, j] = widen(q[j]) * scale
                if tiled:
                    for p in range(panels):
                        _times(queries, count, turned[p], dim, scores, p * COLUMNS)
                else:
                    for i in range(keys):
                        k = _row(at[1], k_at + i * steps[1, 2], dim, like)
                        for r in range(count):
                            query, dot = queries[r], np.float32(0.0)
                            for j in range(dim):
                                dot += query[j] * widen(k[j])
                            scores[r, i] = dot
                for r in range(count):
                    t = first + r
                    seen = min(keys, t + 1) if how.causal else keys
                    place = b * steps[4, 0] + h * steps[4, 1] + t * steps[4, 2]
                    size = 4 if how.mask == ADDED else 1
                    shares[r] = _soften(scores[r, :keys], seen, at[4] + size * place, steps[4, 3], how.mask)
                if tiled:
                    for c in range(columns):
                        _times(scores, count, values[c], keys, mixed, c * COLUMNS)
                else:
                    mixed[:count] = np.float32(0.0)
                    for i in range(keys):
                        v = _row(at[2], v_at + i * steps[2, 2], wide, like)
                        for r in range(count):
                            row, share = mixed[r], scores[r, i]
                            for j in range(wide):
                                row[j] += share * widen(v[j])
                for r in range(count):
                    out = _row(at[3], b * steps[3, 0] + h * steps[3, 1] + (first + r) * steps[3, 2], wide, like)
                    for j in range(wide):
                        out[j] = narrow(mixed[r, j] * shares[r], out)


@kernel
def attend(like: Any, at: Any, sizes: Any, steps: Any, how: Any, threads: Any) -> None:
    """out = softmax(q k^T scale + mask) v: at (5,) int64 addresses of q (b, h, t, d), k (b, g, s, d), v (b, g, s, e),
    out (b, h, t, e) and the mask (b, h, t, s); sizes (7,) int64 are b, h, t, d, g, s, e; steps (5, 4) the strides.
    Queries of h heads share g heads of keys. A query that sees nothing gives zeros, as torch's does. `how` are Scores.

    Keys and values of a head are copied once into panels for the register tile, but for a few queries. Threads
    take heads of keys, or heads of queries where there are too few of those."""
    fork(_attend, (like, at, sizes, steps, how), threads)
