"""Rotary embedding, halves rotated (Su et al. 2021; Hugging Face layout), alone and with the write of the cache of keys
and values. The .cu twin is rope.cu.

A program turns all heads of a token, so that sines are computed once a token. HALF is half of a head's channels, PADDED
the power of two that holds them; TOGETHER heads are turned at a time.
"""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow
from taskgraph.runtime.gpu.ahead.jit.faults import POSITION, SLOT, report
from taskgraph.runtime.gpu.ahead.jit.rows import wide


@triton.jit
def sines(angle):
    """cos and sin of angles from 0 to some 1e5, without the table in local memory that the library's have: less a
    multiple of pi / 2 in three parts (Cody and Waite 1980), then the polynomials of Moshier's Cephes (sinf.c)."""
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - quarter * 1.5703125
    x = x - quarter * 4.837512969970703e-4
    x = x - quarter * 7.549789948768648e-8
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (2.443315711809948e-5 * z - 1.388731625493765e-3))
    turn = quarter.to(tl.int32) & 3
    odd = (turn & 1) == 1
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((turn == 1) | (turn == 2), -c, c), tl.where(turn >= 2, -s, s)


@triton.jit
def _turned(row, norm, c, s, eps, here, i, HALF: tl.constexpr):
    """Both halves of some heads (rows of `row`), normalised where there is a norm, and turned."""
    low = tl.load(row + i, mask=here, other=0.0).to(tl.float32)
    high = tl.load(row + HALF + i, mask=here, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.sum(low * low + high * high, 1)[:, None]
        scale = tl.rsqrt(squares / (2 * HALF) + eps)
        low = low * scale * tl.load(norm + i, mask=i < HALF, other=0.0).to(tl.float32)
        high = high * scale * tl.load(norm + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    return low * c - high * s, high * c + low * s


@triton.jit
def _queries(
    row, norm, c, s, eps, out, HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr
):
    """The queries of one token, from `row` to `out`."""
    i = tl.arange(0, PADDED)[None, :]
    for first in range(0, HEADS, TOGETHER):
        head = first + tl.arange(0, TOGETHER)[:, None]
        here = (head < HEADS) & (i < HALF)
        at = head * (2 * HALF)
        low, high = _turned(row + at, norm, c, s, eps, here, i, HALF)
        tl.store(out + at + i, low.to(out.dtype.element_ty), mask=here)
        tl.store(out + at + HALF + i, high.to(out.dtype.element_ty), mask=here)


@triton.jit
def _kept(
    row, norm, c, s, eps, key_to, value_to, head_stride, count,
    KV: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The keys and then the values of one token, from `row` to h * head_stride of theirs: those of the first
    `count` heads, all or none."""
    i = tl.arange(0, PADDED)[None, :]
    for first in range(0, KV, TOGETHER):
        head = first + tl.arange(0, TOGETHER)[:, None]
        here = (head < count) & (i < HALF)
        at, to = head * (2 * HALF), head * head_stride
        low, high = _turned(row + at, norm, c, s, eps, here, i, HALF)
        kept_low = tl.load(row + KV * 2 * HALF + at + i, mask=here)
        kept_high = tl.load(row + KV * 2 * HALF + at + HALF + i, mask=here)
        tl.store(key_to + to + i, low.to(key_to.dtype.element_ty), mask=here)
        tl.store(key_to + to + HALF + i, high.to(key_to.dtype.element_ty), mask=here)
        tl.store(value_to + to + i, kept_low, mask=here)
        tl.store(value_to + to + HALF + i, kept_high, mask=here)


@triton.jit
def _angles(inverse, place, size, HALF: tl.constexpr, PADDED: tl.constexpr):
    """cos and sin (1, PADDED) at a place, times `size`."""
    i = tl.arange(0, PADDED)[None, :]
    c, s = sines(place.to(tl.float32) * tl.load(inverse + i, mask=i < HALF, other=0.0))
    return c * size, s * size


@triton.jit
def rope(
    x, positions, inverse, out, tokens, HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Every head of x (tokens, heads, dim)."""
    follow()
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        at = wide(token) * (HEADS * 2 * HALF)
        c, s = _angles(inverse, tl.load(positions + token), 1.0, HALF, PADDED)
        _queries(x + at, None, c, s, 0.0, out + at, HEADS, HALF, PADDED, TOGETHER)


@triton.jit
def rope_kv(
    qkv, positions, keys, values, q_norm, k_norm, inverse, out, tokens, each, length, eps, size, fault,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, TOGETHER: tl.constexpr,
    KV_TOGETHER: tl.constexpr,
):  # fmt: skip
    """A fused row a token, `each` of a sequence one after another from positions[sequence] on. The caches are
    (batch, kv heads, length, dim); a place beyond `length` is reported and left out."""
    follow()
    DIM: tl.constexpr = 2 * HALF
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        sequence = token // each
        position = tl.load(positions + sequence)
        place = position + token % each
        writes = (place >= 0) & (place < length)
        report(fault, POSITION, position, writes == 0)
        row, at = qkv + wide(token) * ((HEADS + 2 * KV) * DIM), wide(token) * (HEADS * DIM)
        cache = (wide(sequence) * KV * length + place) * DIM
        c, s = _angles(inverse, place, size, HALF, PADDED)
        _kept(
            row + HEADS * DIM, k_norm, c, s, eps, keys + cache, values + cache, length * DIM, tl.where(writes, KV, 0),
            KV, HALF, PADDED, KV_TOGETHER,
        )  # fmt: skip
        _queries(row, q_norm, c, s, eps, out + at, HEADS, HALF, PADDED, TOGETHER)


@triton.jit
def paged_rope(
    qkv, positions, slots, keys, values, q_norm, k_norm, inverse, out, tokens, slots_end, context, eps, size, fault,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr, TOGETHER: tl.constexpr, KV_TOGETHER: tl.constexpr,
):  # fmt: skip
    """The same on pages (page, kv head, PAGE, WIDE): token i stands at positions[i] and goes to slots[i], which is
    page * PAGE + row, or below 0 for nowhere; `slots_end` is beyond the last, `context` beyond the last position."""
    follow()
    DIM: tl.constexpr = 2 * HALF
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        slot, place = tl.load(slots + token).to(tl.int64), tl.load(positions + token)
        writes = (slot >= 0) & (slot < slots_end)
        report(fault, SLOT, slot, slot >= slots_end)
        report(fault, POSITION, place, (place < 0) | (place >= context))
        row, at = qkv + wide(token) * ((HEADS + 2 * KV) * DIM), wide(token) * (HEADS * DIM)
        cache = (slot // PAGE * (KV * PAGE) + slot % PAGE) * WIDE
        c, s = _angles(inverse, place, size, HALF, PADDED)
        _kept(
            row + HEADS * DIM, k_norm, c, s, eps, keys + cache, values + cache, PAGE * WIDE, tl.where(writes, KV, 0),
            KV, HALF, PADDED, KV_TOGETHER,
        )  # fmt: skip
        _queries(row, q_norm, c, s, eps, out + at, HEADS, HALF, PADDED, TOGETHER)
