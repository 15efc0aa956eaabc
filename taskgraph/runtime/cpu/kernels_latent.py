"""The CPU kernel that rotates queries and writes a cache of latents, (slots, rank + rotary), static or in pages."""

from typing import Any

import numpy as np

from taskgraph.runtime.cpu.tile import fork, kernel, narrow, widen


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
def _latent_rope(q: Any, kv: Any, places: Any, cache: Any, rope: Any, out: Any, part: Any, parts: Any) -> None:
    positions, slots = places
    cos, sin, norm, eps, interleaved = rope
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
def latent_rope(q: Any, kv: Any, places: Any, cache: Any, rope: Any, out: Any, threads: Any = 1) -> None:
    """Rotate the last channels of each head of q (t, h * d) into out (t, h, d); normalise and rotate kv (t, rank +
    rotary) into its place of the cache. `places` are Places, `rope` is a LatentRope."""
    positions, slots = places
    for i in range(len(slots)):
        if slots[i] >= len(cache) or positions[i] < 0 or positions[i] >= len(rope.cos):
            raise ValueError("a slot or a position is outside the KV cache. They are", slots[i], positions[i])
    fork(_latent_rope, (q, kv, places, cache, rope, out), threads)
