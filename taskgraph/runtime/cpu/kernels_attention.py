"""CPU kernels of attention over a static cache, keys and values (b, kv, len, d): `Cache`, `Rope` of `arguments`.

They take `threads` last, as in `taskgraph.runtime.cpu.kernels`.
"""

from typing import Any

import numpy as np

from taskgraph.runtime.cpu.tile import (
    COLUMNS,
    PAIRS,
    ROWS,
    SINGLE,
    WIDE,
    exp,
    fork,
    inlined,
    kernel,
    narrow,
    tile,
    widen,
)


@kernel
def check_positions(positions: Any, each: Any, length: Any) -> None:
    """ValueError unless the `each` tokens of every sequence, the first at positions[b], stand within `length`."""
    for b in range(len(positions)):
        if positions[b] < 0 or positions[b] > length - each:
            raise ValueError(
                "a position is outside the KV cache; make the cache longer or stop earlier. The position is",
                positions[b],
            )


@inlined
def _turned(head: Any, norm: Any, eps: Any, cos: Any, sin: Any, place: Any, turned: Any) -> None:
    """turned = head, normalised unless norm is empty, rotated to its place; head is overwritten. It is inlined, so
    that nobody counts references."""
    half = len(head) // 2
    if len(norm) > 0:
        total = np.float32(0.0)
        for j in range(len(head)):
            total += head[j] * head[j]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(len(head)) + np.float32(eps))
        for j in range(len(head)):
            head[j] = head[j] * scale * norm[j]
    for j in range(half):
        low, high, turn_cos, turn_sin = head[j], head[j + half], cos[place, j], sin[place, j]
        turned[j] = narrow(low * turn_cos - high * turn_sin, turned)
        turned[j + half] = narrow(high * turn_cos + low * turn_sin, turned)


@kernel
def _rope_kv(qkv: Any, positions: Any, cache: Any, rope: Any, out: Any, part: Any, parts: Any) -> None:
    """No array is sliced within the loop: threads would wait for each other to count its references."""
    keys, values = cache
    cos, sin, q_norm, k_norm, eps = rope
    tokens, heads, dim = out.shape
    batch, kv_heads, _, _ = keys.shape
    each = tokens // batch
    head, turned = np.empty(dim, np.float32), np.empty(dim, out.dtype)
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        b = token // each
        at = positions[b] + token % each
        for h in range(heads + kv_heads):
            for j in range(dim):
                head[j] = widen(qkv[token, h * dim + j])
            _turned(head, q_norm if h < heads else k_norm, eps, cos, sin, at, turned)
            for j in range(dim):
                if h < heads:
                    out[token, h, j] = turned[j]
                else:
                    keys[b, h - heads, at, j] = turned[j]
                    values[b, h - heads, at, j] = qkv[token, (h + kv_heads) * dim + j]


@kernel
def rope_kv(qkv: Any, positions: Any, cache: Any, rope: Any, out: Any, threads: Any = 1) -> None:
    """Split qkv (b*t, (h + 2 kv) * d); rotate q into out (b*t, h, d) and k into the cache's keys, copy v to its values.

    They are written at positions[b] + j; positions (b,) int64 counts the tokens already there. `rope` is a Rope.
    RoFormer (Su et al. 2021), halves as in Llama. ValueError when a position is outside the cache.
    """
    check_positions(positions, len(out) // len(cache.keys), cache.keys.shape[2])
    fork(_rope_kv, (qkv, positions, cache, rope, out), threads)


@kernel
def _softmax(scores: Any, seen: Any) -> None:
    """exp(scores - max) over the first `seen`, divided by their sum, in place."""
    top = np.float32(-np.inf)
    for i in range(seen):
        top = max(top, scores[i])
    total = np.float32(0.0)
    for i in range(seen):
        scores[i] = exp(scores[i] - top)
        total += scores[i]
    scale = np.float32(1.0) / total
    for i in range(seen):
        scores[i] *= scale


@inlined
def _attend(query: Any, k: Any, v: Any, scores: Any, mixed: Any, seen: Any, dim: Any) -> None:
    """mixed = softmax(query k^T) v over the first `seen` rows; inlined, so that a constant `dim` unrolls."""
    for i in range(seen):
        dot, row = np.float32(0.0), k[i]
        for j in range(dim):
            dot += query[j] * widen(row[j])
        scores[i] = dot
    _softmax(scores, seen)
    for j in range(dim):
        mixed[j] = np.float32(0.0)
    for i in range(seen):
        share, row = scores[i], v[i]
        for j in range(dim):
            mixed[j] += share * widen(row[j])


@kernel
def _decode(q: Any, positions: Any, cache: Any, out: Any, scratch: Any, part: Any, parts: Any) -> None:
    keys, values = cache
    batch, heads, dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    scores = scratch[part * length : (part + 1) * length]
    query, mixed = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for task in range(batch * heads * part // parts, batch * heads * (part + 1) // parts):
        b, h = task // heads, task % heads
        k, v, seen = keys[b, h // group], values[b, h // group], positions[b] + 1
        for j in range(dim):
            query[j] = widen(q[b, h, j]) / np.sqrt(np.float32(dim))
        if dim == 64:
            _attend(query, k, v, scores, mixed, seen, 64)
        elif dim == 128:
            _attend(query, k, v, scores, mixed, seen, 128)
        else:
            _attend(query, k, v, scores, mixed, seen, dim)
        for j in range(dim):
            out[b, h * dim + j] = narrow(mixed[j], out)


@kernel
def decode_attention(q: Any, positions: Any, cache: Any, out: Any, scratch: Any, threads: Any = 1) -> None:
    """One query token a sequence: q (b, h, d) over the cache up to positions[b] -> out (b, h * d).

    scratch is float32 of at least threads * len. Threads take (sequence, head) pairs. ValueError when a position is
    outside the cache.
    """
    check_positions(positions, 1, cache.keys.shape[2])
    fork(_decode, (q, positions, cache, out, scratch), threads)


def prefill_scratch_size(length: int, dim: int, threads: int) -> int:
    """float32 elements that `prefill_attention` needs as scratch: packed keys and values, scores and weights."""
    length, dim = -(-length // COLUMNS) * COLUMNS, -(-dim // COLUMNS) * COLUMNS
    return threads * (2 * length * dim + 2 * ROWS * length + 2 * ROWS * dim)


@kernel
def pack_keys(k: Any, first: Any, count: Any, panel: Any) -> None:
    """Rows of k from `first` on, up to COLUMNS, as a panel of the weight of q k^T: (words of a row, COLUMNS) uint32."""
    words = k.view(np.uint32)
    for s in range(words.shape[1]):
        for i in range(count):
            panel[s, i] = words[first + i, s]


@kernel
def pack_values(v: Any, seen: Any, width: Any, panels: Any) -> None:
    """The first `seen` rows of v, `width` wide, as the weight of p v, in the panels of `pack_weight`: elements
    (width / 32, words of rows, 32 times a word's). What the last word has of no row is zeroed."""
    pack = 4 // v.itemsize
    for panel in range((width + COLUMNS - 1) // COLUMNS):
        first = panel * COLUMNS
        count = min(COLUMNS, width - first)
        for i in range((seen + pack - 1) // pack * pack):
            row, source = panels[panel, i // pack], v[min(i, seen - 1)]
            if i < seen:
                for j in range(count):
                    row[j * pack + i % pack] = source[first + j]
            else:
                for j in range(count):
                    row[j * pack + i % pack] = 0


@kernel
def weigh(row: Any, share: Any, visible: Any, padded: Any, scale: Any, dots: Any) -> None:
    """Scores into softmax shares, zero from `visible` up to `padded`: in place, and for `dots` as elements of share."""
    for i in range(visible):
        row[i] *= scale
    _softmax(row, visible)
    for i in range(visible, padded):
        row[i] = np.float32(0.0)
    if dots:
        for i in range(padded):
            share[i] = narrow(row[i], share)


@kernel
def _prefill(q: Any, positions: Any, cache: Any, out: Any, scratch: Any, dot: Any, part: Any, parts: Any) -> None:
    keys, values = cache
    tokens, heads, dim = q.shape
    batch, kv_heads, length, _ = keys.shape
    group, each, pack = heads // kv_heads, tokens // batch, 4 // q.itemsize
    wide, deep = (length + COLUMNS - 1) // COLUMNS, (dim + COLUMNS - 1) // COLUMNS
    mine = scratch[len(scratch) // parts * part : len(scratch) // parts * (part + 1)].view(np.uint32)
    cut, cut_v = wide * COLUMNS * dim // pack, deep * COLUMNS * (wide * COLUMNS // pack)
    k_panels = mine[:cut].reshape(wide, dim // pack, COLUMNS)
    v_panels = mine[cut : cut + cut_v].reshape(deep, wide * COLUMNS // pack, COLUMNS)
    v_elements = v_panels.view(q.dtype)
    rest = mine[cut + cut_v :].view(np.float32)
    scores = rest[: ROWS * wide * COLUMNS].reshape(ROWS, wide * COLUMNS)
    rest = rest[ROWS * wide * COLUMNS :]
    mixed = rest[: ROWS * deep * COLUMNS].reshape(ROWS, deep * COLUMNS)
    rest = rest[ROWS * deep * COLUMNS :]
    queries = rest[: ROWS * deep * COLUMNS].reshape(ROWS, deep * COLUMNS)
    shares = rest[ROWS * deep * COLUMNS :].view(q.dtype)[: ROWS * wide * COLUMNS].reshape(ROWS, wide * COLUMNS)
    scale, dots = np.float32(1.0) / np.sqrt(np.float32(dim)), q.itemsize == 2 and dot
    mode = SINGLE if q.itemsize == 4 else PAIRS if dots else WIDE
    share_at, share_stride = scores.ctypes.data, scores.strides[0]
    if dots:
        share_at, share_stride = shares.ctypes.data, shares.strides[0]
    blocks = (each + ROWS - 1) // ROWS
    total, packed = batch * heads * blocks, -1
    for task in range(total * part // parts, total * (part + 1) // parts):
        head, top = task // blocks, task % blocks * ROWS
        b, h = head // heads, head % heads
        if packed != b * kv_heads + h // group:
            packed = b * kv_heads + h // group
            cached = positions[b] + each
            for panel in range((cached + COLUMNS - 1) // COLUMNS):
                first = panel * COLUMNS
                pack_keys(keys[b, h // group], first, min(COLUMNS, cached - first), k_panels[panel])
            pack_values(values[b, h // group], cached, dim, v_elements)
        rows, token = min(ROWS, each - top), b * each + top
        seen = positions[b] + top + rows
        query, stride = q.ctypes.data + token * q.strides[0] + h * q.strides[1], q.strides[0]
        if mode == WIDE:
            for r in range(rows):
                for j in range(dim):
                    queries[r, j] = widen(q[token + r, h, j])
            query, stride = queries.ctypes.data, queries.strides[0]
        for panel in range((seen + COLUMNS - 1) // COLUMNS):
            w, into = k_panels.ctypes.data + panel * k_panels.strides[0], scores.ctypes.data + panel * 128
            tile(rows, (query, stride), w, dim // pack, (into, scores.strides[0]), mode)
        padded = (seen + pack - 1) // pack * pack
        for r in range(rows):
            weigh(scores[r], shares[r], positions[b] + top + r + 1, padded, scale, dots)
        for panel in range(deep):
            w, into = v_panels.ctypes.data + panel * v_panels.strides[0], mixed.ctypes.data + panel * 128
            tile(rows, (share_at, share_stride), w, padded // pack, (into, mixed.strides[0]), mode)
        for r in range(rows):
            for j in range(dim):
                out[token + r, h * dim + j] = narrow(mixed[r, j], out)


@kernel
def prefill_attention(q: Any, positions: Any, cache: Any, out: Any, scratch: Any, dot: Any, threads: Any = 1) -> None:
    """Causal attention of t tokens a sequence: q (b*t, h, d), token j of b sees keys up to positions[b] + j.

    The cache has an even d; out (b*t, h * d); scratch float32 of `prefill_scratch_size` elements. `dot` is that of
    `kernels.gemm`. Threads take blocks of queries; each packs keys and values of its heads for the tile. ValueError
    when a position is outside the cache.
    """
    check_positions(positions, len(q) // len(cache.keys), cache.keys.shape[2])
    fork(_prefill, (q, positions, cache, out, scratch, dot), threads)
