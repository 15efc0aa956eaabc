"""Small CPU kernels for what torch does in many passes: RMSNorm, RoPE with the cache write, decode attention.

bf16 tensors come as uint16 arrays of their bits and float32 tensors as they are; arithmetic is float32.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

_FAST = {"reassoc", "contract", "arcp", "nsz"}


@intrinsic
def _bits_to_f32(typingctx: Any, bits: Any) -> Any:  # pragma: no cover - compiled
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _f32_to_bits(typingctx: Any, value: Any) -> Any:  # pragma: no cover - compiled
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def _widen(x: Any) -> Any:
    """float32 of a stored element (compiled code only; see _widen_overload)."""


def _narrow(x: Any, like: Any) -> Any:
    """A float32 as an element of the array `like`, rounded to nearest even."""


def _widen_overload(x: Any) -> Any:
    def from_bf16(x: Any) -> Any:
        return _bits_to_f32(np.uint32(np.uint32(x) << np.uint32(16)))

    def from_f32(x: Any) -> Any:
        return x

    return from_bf16 if x == types.uint16 else from_f32


def _narrow_overload(x: Any, like: Any) -> Any:
    def to_bf16(x: Any, like: Any) -> Any:
        bits = _f32_to_bits(np.float32(x))
        even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))

    def to_f32(x: Any, like: Any) -> Any:
        return np.float32(x)

    return to_bf16 if like.dtype == types.uint16 else to_f32


overload(_widen, inline="always")(_widen_overload)
overload(_narrow, inline="always")(_narrow_overload)


def _kernel(function: Any) -> Any:
    """Compiled at first call for each dtype, cached on disk; releases the GIL."""
    return numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")(function)


@_kernel
def rmsnorm(x: Any, weight: Any, out: Any, eps: Any) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; x and out (m, n), weight (n,) of the same dtype."""
    m, n = x.shape
    for i in range(m):
        total = np.float32(0.0)
        for j in range(n):
            value = _widen(x[i, j])
            total += value * value
        scale = np.float32(1.0) / np.sqrt(total / np.float32(n) + np.float32(eps))
        for j in range(n):
            out[i, j] = _narrow(_widen(x[i, j]) * scale * _widen(weight[j]), out)


@_kernel
def rope_kv(
    qkv: Any, positions: Any, keys: Any, values: Any, cos: Any, sin: Any, q_norm: Any, k_norm: Any, eps: Any, out: Any
) -> None:
    """Split qkv (b*t, (h + 2 kv) * d); rotate q into out (b*t, h, d) and k into keys, copy v into values.

    keys and values are (b, kv, len, d), written at positions[b] + j; cos and sin (len, d / 2) float32;
    q_norm and k_norm (d,) float32, empty for none. ValueError when a position is outside the cache.
    """
    tokens, heads, dim = out.shape
    batch, kv_heads, length, _ = keys.shape
    each, half = tokens // batch, dim // 2
    head = np.empty(dim, np.float32)
    for token in range(tokens):
        b = token // each
        at = positions[b] + token % each
        if at < 0 or at >= length:
            raise ValueError("a position is outside the KV cache; make the cache longer or stop earlier")
        for h in range(heads + kv_heads):
            norm = q_norm if h < heads else k_norm
            for j in range(dim):
                head[j] = _widen(qkv[token, h * dim + j])
            if len(norm) > 0:
                total = np.float32(0.0)
                for j in range(dim):
                    total += head[j] * head[j]
                scale = np.float32(1.0) / np.sqrt(total / np.float32(dim) + np.float32(eps))
                for j in range(dim):
                    head[j] = head[j] * scale * norm[j]
            for j in range(half):
                low, high = head[j], head[j + half]
                head[j] = low * cos[at, j] - high * sin[at, j]
                head[j + half] = high * cos[at, j] + low * sin[at, j]
            if h < heads:
                for j in range(dim):
                    out[token, h, j] = _narrow(head[j], out)
            else:
                for j in range(dim):
                    keys[b, h - heads, at, j] = _narrow(head[j], keys)
        for h in range(kv_heads):
            for j in range(dim):
                values[b, h, at, j] = qkv[token, (heads + kv_heads + h) * dim + j]


def _exp_of(x: Any) -> Any:
    """e^x of a float32 <= 0: 2^n times a polynomial of the fraction (Cephes expf), so that loops vectorise."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * _bits_to_f32(np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))


_exp = numba.njit(inline="always")(_exp_of)


@_kernel
def decode_attention(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any) -> None:
    """One query token a sequence: q (b, h, d) over keys, values (b, kv, len, d) up to positions[b] -> out (b, h * d).

    Softmax is subtracted by its maximum (two passes); scratch is (len + d,) float32.
    """
    batch, heads, dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    scale = np.float32(1.0) / np.sqrt(np.float32(dim))
    query = np.empty(dim, np.float32)
    mixed = scratch[length:]
    for b in range(batch):
        seen = positions[b] + 1
        for h in range(heads):
            kv = h // group
            for j in range(dim):
                query[j] = _widen(q[b, h, j]) * scale
            top = np.float32(-np.inf)
            for i in range(seen):
                dot = np.float32(0.0)
                for j in range(dim):
                    dot += query[j] * _widen(keys[b, kv, i, j])
                scratch[i] = dot
                top = max(top, dot)
            total = np.float32(0.0)
            for i in range(seen):
                scratch[i] = _exp(scratch[i] - top)
                total += scratch[i]
            for j in range(dim):
                mixed[j] = np.float32(0.0)
            for i in range(seen):
                weight = scratch[i]
                for j in range(dim):
                    mixed[j] += weight * _widen(values[b, kv, i, j])
            for j in range(dim):
                out[b, h * dim + j] = _narrow(mixed[j] / total, out)
