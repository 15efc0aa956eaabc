"""Compact Triton kernels of the ops of a step over pages, with which plans reach the speed that they assume.

Attention is by blocks of keys with a running maximum (Dao et al. 2022, "FlashAttention"; Milakov and Gimelshein 2018).
A page is (kv heads, page rows, wide). Importing this needs Triton.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.runtime import rotary

Tensors = Sequence[torch.Tensor]
_LOG2_E = math.log2(math.e)


@triton.jit
def _decode(
    q, lengths, tables, keys, values, out, scale, blocks,
    KV: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    g, d, n = tl.arange(0, PADDED), tl.arange(0, DIM), tl.arange(0, N)
    length = tl.load(lengths + row)
    at = ((row * KV + head) * GROUP + g[:, None]) * DIM + d[None, :]
    mine = (g < GROUP)[:, None]
    x = tl.load(q + at, mask=mine, other=0.0)
    most = tl.full([PADDED], -1.0e30, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mixed = tl.zeros([PADDED, DIM], tl.float32)
    for first in range(0, length, N):
        key = first + n
        there = key < length
        page = tl.load(tables + row * blocks + key // PAGE, mask=there, other=0).to(tl.int64)
        place = ((page * KV + head) * PAGE + key % PAGE) * WIDE
        k = tl.load(keys + place[:, None] + d[None, :], mask=there[:, None], other=0.0)
        score = tl.where(there[None, :], tl.dot(x, tl.trans(k)) * scale, -1.0e30)
        larger = tl.maximum(most, tl.max(score, 1))
        share = tl.exp2(score - larger[:, None])
        kept = tl.exp2(most - larger)
        v = tl.load(values + place[:, None] + d[None, :], mask=there[:, None], other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(share.to(v.dtype), v)
        total = total * kept + tl.sum(share, 1)
        most = larger
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _prefill(
    q, starts, lengths, tables, keys, values, out, scale, blocks, chunks,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    chunk = 0
    first_tile = 0
    before = 0
    for c in range(0, chunks):
        tiles = (tl.load(starts + c + 1) - tl.load(starts + c) + M - 1) // M
        here = (tile >= before) & (tile < before + tiles)
        chunk = tl.where(here, c, chunk)
        first_tile = tl.where(here, before, first_tile)
        before += tiles
    if tile < before:
        begin, end = tl.load(starts + chunk), tl.load(starts + chunk + 1)
        length = tl.load(lengths + chunk)
        r = (tile - first_tile) * M + tl.arange(0, M)
        d, n = tl.arange(0, DIM), tl.arange(0, N)
        place_of_row = length - (end - begin) + r
        mine = (begin + r < end)[:, None]
        at = ((begin + r[:, None]) * HEADS + head) * DIM + d[None, :]
        x = tl.load(q + at, mask=mine, other=0.0)
        kv_head = head // (HEADS // KV)
        most = tl.full([M], -1.0e30, tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, DIM], tl.float32)
        last = tl.minimum(length, length - (end - begin) + (tile - first_tile + 1) * M)
        for first in range(0, last, N):
            key = first + n
            there = key < length
            page = tl.load(tables + chunk * blocks + key // PAGE, mask=there, other=0).to(tl.int64)
            place = ((page * KV + kv_head) * PAGE + key % PAGE) * WIDE
            k = tl.load(keys + place[:, None] + d[None, :], mask=there[:, None], other=0.0)
            seen = there[None, :] & (key[None, :] <= place_of_row[:, None])
            score = tl.where(seen, tl.dot(x, tl.trans(k)) * scale, -1.0e30)
            larger = tl.maximum(most, tl.max(score, 1))
            share = tl.exp2(score - larger[:, None])
            kept = tl.exp2(most - larger)
            v = tl.load(values + place[:, None] + d[None, :], mask=there[:, None], other=0.0)
            mixed = mixed * kept[:, None] + tl.dot(share.to(v.dtype), v)
            total = total * kept + tl.sum(share, 1)
            most = larger
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _rope(
    qkv, positions, slots, keys, values, inverse, out, size,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, HALF)
    slot, position = tl.load(slots + token).to(tl.int64), tl.load(positions + token).to(tl.float32)
    row = qkv + (token * (HEADS + 2 * KV) + head) * 2 * HALF
    low, high = tl.load(row + i).to(tl.float32), tl.load(row + HALF + i).to(tl.float32)
    if head < HEADS + KV:
        angle = position * tl.load(inverse + i)
        c, s = tl.cos(angle) * size, tl.sin(angle) * size
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if head < HEADS:
        target = out + (token * HEADS + head) * 2 * HALF
        tl.store(target + i, low.to(out.dtype.element_ty))
        tl.store(target + HALF + i, high.to(out.dtype.element_ty))
    else:
        if slot >= 0:
            place = ((slot // PAGE * KV + (head - HEADS) % KV) * PAGE + slot % PAGE) * WIDE
            if head < HEADS + KV:
                tl.store(keys + place + i, low.to(keys.dtype.element_ty))
                tl.store(keys + place + HALF + i, high.to(keys.dtype.element_ty))
            else:
                tl.store(values + place + i, low.to(values.dtype.element_ty))
                tl.store(values + place + HALF + i, high.to(values.dtype.element_ty))


@triton.jit
def _swiglu(x, out, features, N: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    there = at < features
    gate = tl.load(x + row * 2 * features + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * features + features + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * features + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _rmsnorm(x, weight, out, columns, eps, N: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    there = at < columns
    value = tl.load(x + row * columns + at, mask=there, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, (value * scale * w).to(out.dtype.element_ty), mask=there)


# ------------------------------------------------------------------------------------------- by op kind


def _scale(dim: int) -> float:
    return _LOG2_E / math.sqrt(dim)


def paged_decode(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """Attention of one row a sequence; a program a sequence and kv head."""
    q, lengths, tables, keys, values = ins
    (batch, heads, dim), (_, kv, page, wide) = q.shape, keys.shape
    _decode[batch, kv](
        q, lengths, tables, keys, values, out, _scale(dim), tables.shape[1], KV=kv, GROUP=heads // kv,
        PADDED=max(16, triton.next_power_of_2(heads // kv)), DIM=dim, WIDE=wide, PAGE=page, N=64,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def paged_prefill(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """Attention of chunks of rows at the end of their keys; a program a tile of rows and head."""
    q, starts, lengths, tables, keys, values = ins
    (rows, heads, dim), (_, kv, page, wide), chunks = q.shape, keys.shape, lengths.shape[0]
    _prefill[triton.cdiv(rows, 64) + chunks, heads](
        q, starts, lengths, tables, keys, values, out, _scale(dim), tables.shape[1], chunks, HEADS=heads, KV=kv,
        DIM=dim, WIDE=wide, PAGE=page, M=64, N=64, num_warps=4, num_stages=3,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _inverse(op: Op, dim: int, place: str) -> torch.Tensor:
    return torch.from_numpy(rotary.inverse_frequencies(op, dim)).to(place)


def paged_rope(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """Rotate queries and keys, and put keys and values into their slots."""
    if len(ins) > 5:
        raise BackendUnavailable(f"op {op.name!r}: norms of queries and keys have no Triton kernel here.")
    qkv, positions, slots, keys, values = ins
    (tokens, heads, dim), (_, kv, page, wide) = out.shape, keys.shape
    _rope[tokens, heads + 2 * kv](
        qkv, positions, slots, keys, values, _inverse(op, dim, str(qkv.device)), out, rotary.size(op), HEADS=heads,
        KV=kv, HALF=dim // 2, WIDE=wide, PAGE=page, num_warps=1,
    )  # fmt: skip


def swiglu(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """silu(gate) * up over the halves of every row."""
    rows, features = out.shape
    _swiglu[rows, triton.cdiv(features, 1024)](ins[0], out, features, N=1024, num_warps=4)


def rmsnorm(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """Every row over the root of its mean square, times the weight."""
    columns = out.shape[-1]
    wide = triton.next_power_of_2(columns)
    _rmsnorm[out.numel() // columns,](ins[0], ins[1], out, columns, op.number("eps"), N=wide, num_warps=8)


KERNELS: dict[str, Callable[[Op, Tensors, Any], None]] = {
    "paged_decode": paged_decode,
    "paged_prefill": paged_prefill,
    "paged_rope": paged_rope,
    "swiglu": swiglu,
    "rmsnorm": rmsnorm,
}
"""kind -> what fills the output."""
