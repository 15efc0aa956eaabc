"""CPU kernels over views of any strides: rotary embedding of halves, and attention of a few queries.

Operands are addresses, sizes and strides in elements, so that one compilation serves all views; `like` is an empty
array of their dtype (bf16 as its bits). Sums are float32. The last axis of every operand has stride 1.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from taskgraph.runtime.cpu.kernels_pointwise import _pointer
from taskgraph.runtime.cpu.tile import exp, fork, inlined, kernel, narrow, widen

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
def _attend(like: Any, at: Any, sizes: Any, steps: Any, how: Any, scratch: Any, part: Any, parts: Any) -> None:
    scale, mask, causal = how.scale, how.mask, how.causal
    heads, rows, dim, kv_heads, keys, wide = sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]
    group = heads // kv_heads
    tasks = sizes[0] * heads * rows
    width = max(dim, wide)
    scores = scratch[part * (keys + 2 * width) : (part + 1) * (keys + 2 * width)]
    query, mixed = scores[keys : keys + width], scores[keys + width :]
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        b, h, t = task // (heads * rows), task // rows % heads, task % rows
        g = h // group
        seen = min(keys, t + 1) if causal else keys
        q = _row(at[0], b * steps[0, 0] + h * steps[0, 1] + t * steps[0, 2], dim, like)
        k = _row(at[1], b * steps[1, 0] + g * steps[1, 1], (keys - 1) * steps[1, 2] + dim, like)
        v = _row(at[2], b * steps[2, 0] + g * steps[2, 1], (keys - 1) * steps[2, 2] + wide, like)
        out = _row(at[3], b * steps[3, 0] + h * steps[3, 1] + t * steps[3, 2], wide, like)
        first = b * steps[4, 0] + h * steps[4, 1] + t * steps[4, 2]
        step = steps[4, 3]
        for j in range(dim):
            query[j] = widen(q[j]) * np.float32(scale)
        top = np.float32(-np.inf)
        truths = carray(_pointer(at[4] + first), ((seen - 1) * step + 1,), np.uint8)
        added = carray(_pointer(at[4] + 4 * first), ((seen - 1) * step + 1,), np.float32)
        for i in range(seen):
            if mask == TRUTHS and truths[i * step] == 0:
                scores[i] = np.float32(-np.inf)
                continue
            dot, start = np.float32(0.0), i * steps[1, 2]
            for j in range(dim):
                dot += query[j] * widen(k[start + j])
            if mask == ADDED:
                dot += added[i * step]
            scores[i] = dot
            top = max(top, dot)
        total = np.float32(0.0)
        for j in range(wide):
            mixed[j] = np.float32(0.0)
        for i in range(seen):
            if scores[i] == np.float32(-np.inf):
                continue
            share, start = exp(scores[i] - top), i * steps[2, 2]
            total += share
            for j in range(wide):
                mixed[j] += share * widen(v[start + j])
        part_of = np.float32(1.0) / total if total > np.float32(0.0) else np.float32(0.0)
        for j in range(wide):
            out[j] = narrow(mixed[j] * part_of, out)


@kernel
def attend(like: Any, at: Any, sizes: Any, steps: Any, how: Any, scratch: Any, threads: Any) -> None:
    """out = softmax(q k^T scale + mask) v: at (5,) int64 addresses of q (b, h, t, d), k (b, g, s, d), v (b, g, s, e),
    out (b, h, t, e) and the mask (b, h, t, s); sizes (7,) int64 are b, h, t, d, g, s, e; steps (5, 4) the strides.
    Queries of h heads share g heads of keys. A query that sees nothing gives zeros, as torch's does. `how` are
    Scores; scratch (threads * (s + 2 max(d, e)),) float32."""
    if threads == 1:
        _attend(like, at, sizes, steps, how, scratch, 0, 1)
    else:
        fork(_attend, (like, at, sizes, steps, how, scratch), threads)
