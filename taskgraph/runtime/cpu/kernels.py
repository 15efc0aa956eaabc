"""The CPU kernels of the LLM ops: numba functions over preallocated arrays that split their work over threads.

bf16 tensors come as uint16 arrays of their bits and float32 tensors as they are; sums are float32. Every kernel
takes `threads` last and runs that many parts in one OpenMP region of the libgomp that torch has loaded: each calling
thread owns a pool there, pinned as that thread was when it first used it, and shared with its torch ops. (numba's
own parallel layers would bring a second pool that spins against torch's, or one that two lanes may not share.)
Weights are packed once, for the register tile of `taskgraph.runtime.cpu.tile`.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.core import types

from taskgraph.runtime.cpu.tile import (
    COLUMNS,
    FAST,
    OPENMP,
    PAIRS,
    ROWS,
    SINGLE,
    WIDE,
    exp,
    fork,
    kernel,
    narrow,
    tile,
    unpack,
    widen,
)

_set_affinity: Any = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))


# -- the pool of the calling thread -------------------------------------------------------------------------------


@kernel
def _bind(masks: Any, part: Any, parts: Any) -> None:
    _set_affinity(0, masks.strides[0], masks.ctypes.data + part * masks.strides[0])


@kernel
def _bind_all(masks: Any) -> None:
    fork(_bind, (masks,), len(masks))


def bind_threads(cores: Sequence[int]) -> None:
    """Make the calling thread's pool len(cores) threads, itself the first, each on its own core.

    Two threads of a pool that meet on one core spin against each other for whole time slices (8 to 24 ms an op,
    measured beside one busy process), so a lane calls this once, before its first op, in place of sched_setaffinity.
    """
    masks = np.zeros((len(cores), max(cores) // 64 + 1), np.uint64)
    for i, core in enumerate(cores):
        masks[i, core // 64] = np.uint64(1 << core % 64)
    _bind_all(masks)


def release_threads() -> None:
    """End the calling thread's pool (omp_pause_resource_all); its next parallel op starts a new one.

    libgomp stops spinning, for wakes of 20 us and more, while the pools of a process hold more threads than it has
    cores. So a thread that ran parallel ops and will wait for lanes calls this first, and so does a lane at its end.
    """
    OPENMP.omp_pause_resource_all(1)


# -- products -----------------------------------------------------------------------------------------------------


def pack_weight(w: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Panels of a weight (n, k): (n / 32, k, 32) float32, or for bf16 (n / 32, k / 2, 32) uint32 of two k each.

    n is padded with zeros to whole panels; a bf16 weight needs an even k.
    """
    n, k = w.shape
    if w.dtype == np.uint16 and k % 2:
        raise ValueError(f"a bf16 weight needs an even inner size; got {k}. Use float32.")
    words = np.ascontiguousarray(w).view(np.uint32 if w.dtype == np.uint16 else np.float32)
    panels = -(-n // COLUMNS)
    packed = torch.zeros(panels, words.shape[1], COLUMNS, dtype=torch.float32).numpy().view(words.dtype)
    whole = n // COLUMNS
    packed[:whole] = words[: whole * COLUMNS].reshape(whole, COLUMNS, words.shape[1]).transpose(0, 2, 1)
    if whole < panels:
        packed[whole, :, : n - whole * COLUMNS] = words[whole * COLUMNS :].T
    return packed


_UNPACK_ROWS = 2 * ROWS
"""From so many rows on a panel of bf16 pairs is widened once for all of them, not by every tile."""


_BLOCK_BYTES = 256 << 10
"""Bytes of the rows of x that stay in the second-level cache while panels pass by."""

_UNPACK_WORDS = 128
"""Words of a column of a panel that are widened at a time: they stay in the first-level cache (32 KiB)."""


@kernel
def _gemm(x: Any, packed: Any, bias: Any, residual: Any, out: Any, dot: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    k = x.shape[1]
    panels, steps, _ = packed.shape
    first, last = panels * part // parts, panels * (part + 1) // parts
    pairs = steps < k
    dots = pairs and dot
    unpacked = pairs and not dot and m >= _UNPACK_ROWS
    mode = PAIRS if dots else WIDE if pairs and not unpacked else SINGLE
    size = k * (x.itemsize if dots else 4)
    high = min(max(_BLOCK_BYTES // size // ROWS, 4), 16) * ROWS
    lines = np.empty((0 if dots or x.itemsize == 4 else min(high, m), k + 16), np.float32)
    wide = np.empty((2 * _UNPACK_WORDS if unpacked else 0, COLUMNS), np.float32)
    sums = np.empty((min(high, m), COLUMNS), np.float32)
    for block in range(0, m, high):
        end = min(block + high, m)
        start, stride = x.ctypes.data + block * x.strides[0], x.strides[0]
        if len(lines) > 0:
            for i in range(end - block):
                row, line = x[block + i], lines[i]
                for j in range(k):
                    line[j] = widen(row[j])
            start, stride = lines.ctypes.data, lines.strides[0]
        for panel in range(first, last):
            column = panel * COLUMNS
            width = min(COLUMNS, n - column)
            w = packed.ctypes.data + panel * packed.strides[0]
            for word in range(0, steps, _UNPACK_WORDS if unpacked else steps):
                words = min(_UNPACK_WORDS, steps - word) if unpacked else steps
                panel_at = w
                if unpacked:
                    unpack(w + word * packed.strides[1], words * COLUMNS, wide.ctypes.data)
                    panel_at, words = wide.ctypes.data, 2 * words
                for top in range(0, end - block, ROWS):
                    tile(
                        min(ROWS, end - block - top), start + top * stride + 8 * word, stride, panel_at, words,
                        sums.ctypes.data + top * 128, 128, mode, word > 0,
                    )  # fmt: skip
            for r in range(end - block):
                if bias.size > 0:
                    for c in range(width):
                        sums[r, c] += widen(bias[column + c])
                if residual.size > 0:
                    for c in range(width):
                        sums[r, c] += widen(residual[block + r, column + c])
                if width == COLUMNS:
                    for c in range(COLUMNS):
                        out[block + r, column + c] = narrow(sums[r, c], out)
                else:
                    for c in range(width):
                        out[block + r, column + c] = narrow(sums[r, c], out)


@kernel
def gemm(x: Any, packed: Any, bias: Any, residual: Any, out: Any, dot: Any, threads: Any = 1) -> None:
    """out = x w^T + bias + residual; x (m, k), packed from `pack_weight` of w (n, k), out (m, n).

    bias (n,) and residual (m, n) may be empty arrays, (0,) and (0, 0), for none. Stored dtypes are free: sums are
    float32. `dot` multiplies bf16 pairs by the processor's own instruction, only where it has one.
    Threads take columns, so each byte of the weight is read by one core.
    """
    fork(_gemm, (x, packed, bias, residual, out, dot), threads)


# -- elementwise and row kernels ----------------------------------------------------------------------------------


@kernel
def _rmsnorm(x: Any, residual: Any, weight: Any, total: Any, out: Any, eps: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        square = np.float32(0.0)
        if residual.size > 0:
            for j in range(n):
                total[i, j] = narrow(widen(x[i, j]) + widen(residual[i, j]), total)
            row = total[i]
        else:
            row = x[i]
        for j in range(n):
            value = widen(row[j])
            square += value * value
        scale = np.float32(1.0) / np.sqrt(square / np.float32(n) + np.float32(eps))
        for j in range(n):
            out[i, j] = narrow(widen(row[j]) * scale * widen(weight[j]), out)


@kernel
def rmsnorm(x: Any, weight: Any, out: Any, eps: Any, threads: Any = 1) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); x and out (m, n), weight (n,), one dtype."""
    fork(_rmsnorm, (x, x[:0], weight, x[:0], out, eps), threads)


@kernel
def add_rmsnorm(x: Any, residual: Any, weight: Any, total: Any, out: Any, eps: Any, threads: Any = 1) -> None:
    """total = x + residual (rounded to the dtype), out = rmsnorm(total); all (m, n), weight (n,), one dtype."""
    fork(_rmsnorm, (x, residual, weight, total, out, eps), threads)


@kernel
def _swiglu(x: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    one = np.float32(1.0)
    for i in range(m * part // parts, m * (part + 1) // parts):
        gate, up, row = x[i, :n], x[i, n:], out[i]
        for j in range(n):
            value = widen(gate[j])
            small = exp(-abs(value))
            share = (one if value >= np.float32(0.0) else small) / (one + small)
            row[j] = narrow(value * share * widen(up[j]), out)


@kernel
def swiglu(x: Any, out: Any, threads: Any = 1) -> None:
    """out = silu(gate) * up (Shazeer 2020); x (m, 2 n) holds gate then up, out (m, n), one dtype."""
    fork(_swiglu, (x, out), threads)


@kernel
def _add(x: Any, y: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        for j in range(n):
            out[i, j] = narrow(widen(x[i, j]) + widen(y[i, j]), out)


@kernel
def add(x: Any, y: Any, out: Any, threads: Any = 1) -> None:
    """out = x + y, each (m, n) of one dtype."""
    fork(_add, (x, y, out), threads)


@kernel
def embedding(tokens: Any, table: Any, out: Any) -> None:
    """out[i] = table[tokens[i]]; tokens (m,) int64, table (vocabulary, n) and out (m, n) of one dtype.

    ValueError when a token is not in the vocabulary.
    """
    for i in range(len(tokens)):
        if tokens[i] < 0 or tokens[i] >= len(table):
            raise ValueError("a token is outside the vocabulary")
        for j in range(out.shape[1]):
            out[i, j] = table[tokens[i], j]


@kernel
def _argmax(x: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        row = x[i]
        top, at, odd = np.float32(-np.inf), 0, np.int32(0)
        for start in range(0, n, 1024):
            stop = min(start + 1024, n)
            best = np.float32(-np.inf)
            for j in range(start, stop):
                value = widen(row[j])
                best = max(best, value)
                odd += np.int32(value != value)
            if odd > 0:
                at = start
                break
            if best > top:
                top, at = best, start
        while at < n - 1 and (widen(row[at]) == widen(row[at]) if odd > 0 else widen(row[at]) != top):
            at += 1
        out[i] = at


@kernel
def argmax(x: Any, out: Any, threads: Any = 1) -> None:
    """out[i] = the first index of the largest of x[i], or of its first NaN; x (m, n), out (m,) int64."""
    fork(_argmax, (x, out), threads)


# -- attention ----------------------------------------------------------------------------------------------------


@kernel
def check_positions(positions: Any, each: Any, length: Any) -> None:
    """ValueError unless the `each` tokens of every sequence, the first at positions[b], stand within `length`."""
    for b in range(len(positions)):
        if positions[b] < 0 or positions[b] > length - each:
            raise ValueError(
                "a position is outside the KV cache; make the cache longer or stop earlier. The position is",
                positions[b],
            )


@numba.njit(forceinline=True, fastmath=FAST, error_model="numpy")
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
def _rope_kv(
    qkv: Any,
    positions: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    out: Any,
    part: Any,
    parts: Any,
) -> None:
    """No array is sliced within the loop: threads would wait for each other to count its references."""
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
def rope_kv(
    qkv: Any,
    positions: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    out: Any,
    threads: Any = 1,
) -> None:
    """Split qkv (b*t, (h + 2 kv) * d); rotate q into out (b*t, h, d) and k into keys, copy v into values.

    keys and values are (b, kv, len, d), written at positions[b] + j; positions (b,) int64 counts the tokens already
    there; cos and sin (len, d / 2) float32; q_norm and k_norm (d,) float32, empty for none. RoFormer (Su et al.
    2021), halves as in Llama. ValueError when a position is outside the cache.
    """
    check_positions(positions, len(out) // len(keys), keys.shape[2])
    fork(_rope_kv, (qkv, positions, keys, values, cos, sin, q_norm, k_norm, eps, out), threads)


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


@numba.njit(forceinline=True, fastmath=FAST, error_model="numpy")
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
def _decode(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, part: Any, parts: Any) -> None:
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
def decode_attention(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, threads: Any = 1) -> None:
    """One query token a sequence: q (b, h, d) over keys, values (b, kv, len, d) up to positions[b] -> out (b, h * d).

    scratch is float32 of at least threads * len. Threads take (sequence, head) pairs. ValueError when a position is
    outside the cache.
    """
    check_positions(positions, 1, keys.shape[2])
    fork(_decode, (q, positions, keys, values, out, scratch), threads)


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
def _prefill(
    q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, dot: Any, part: Any, parts: Any
) -> None:
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
            tile(
                rows, query, stride, k_panels.ctypes.data + panel * k_panels.strides[0], dim // pack,
                scores.ctypes.data + panel * 128, scores.strides[0], mode,
            )  # fmt: skip
        padded = (seen + pack - 1) // pack * pack
        for r in range(rows):
            weigh(scores[r], shares[r], positions[b] + top + r + 1, padded, scale, dots)
        for panel in range(deep):
            tile(
                rows, share_at, share_stride, v_panels.ctypes.data + panel * v_panels.strides[0],
                padded // pack, mixed.ctypes.data + panel * 128, mixed.strides[0], mode,
            )  # fmt: skip
        for r in range(rows):
            for j in range(dim):
                out[token + r, h * dim + j] = narrow(mixed[r, j], out)


@kernel
def prefill_attention(
    q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, dot: Any, threads: Any = 1
) -> None:
    """Causal attention of t tokens a sequence: q (b*t, h, d), token j of b sees keys up to positions[b] + j.

    keys and values (b, kv, len, d) with even d, out (b*t, h * d); scratch float32 of `prefill_scratch_size` elements.
    `dot` is that of `gemm`. Threads take blocks of queries; each packs keys and values of its heads for the tile.
    ValueError when a position is outside the cache.
    """
    check_positions(positions, len(q) // len(keys), keys.shape[2])
    fork(_prefill, (q, positions, keys, values, out, scratch, dot), threads)
