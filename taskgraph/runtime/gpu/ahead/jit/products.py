"""Persistent products: as many programs as the partition has SMs, each with every so-many-th tile of the output.

Tiles go in groups of GROUP rows of tiles, so that those at work at a time share operands in L2. The loops over tiles
and over k are one (`flatten`): the loads of the next tile are under way while this one is written. The .cu twin is
gemm.cu.
"""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow


@triton.jit
def tile_of(number, down, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """The place (row, column) of a tile among `down` by ACROSS, group by group of GROUP rows."""
    first = number // (GROUP * ACROSS) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = number % (GROUP * ACROSS)
    return first + inside % height, inside // height


@triton.jit
def product(
    x, w, bias, residual, out, m,
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out (m, N) = x (m, K) times w (K, N), or (N, K) where TRANSPOSED, plus bias (N) and residual (m, N) unless None;
    any shape and types."""
    follow()
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    down = tl.cdiv(m, BM)
    for number in tl.range(tl.program_id(0), down * ACROSS, tl.num_programs(0), flatten=True):
        tile_row, tile_column = tile_of(number, down, ACROSS, GROUP)
        row, column = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
        total = tl.zeros([BM, BN], tl.float32)
        line = x + row.to(tl.int64)[:, None] * K
        for begin in range(0, K, BK):
            inner = begin + tl.arange(0, BK)
            left = tl.load(line + inner[None, :], mask=(row < m)[:, None] & (inner < K)[None, :], other=0.0)
            there = (inner < K)[:, None] & (column < N)[None, :]
            if TRANSPOSED:
                right = tl.load(w + column.to(tl.int64)[None, :] * K + inner[:, None], mask=there, other=0.0)
            else:
                right = tl.load(w + inner.to(tl.int64)[:, None] * N + column[None, :], mask=there, other=0.0)
            total = tl.dot(left, right.to(left.dtype), total, input_precision="ieee")
        here = (row < m)[:, None] & (column < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        if bias is not None:
            total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            total += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def product_by_tiles(
    x, w, bias, residual, out, m,
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors, which are bulk copies from sm_90 on: for rows of multiples of 16 bytes. A tile is
    written in two halves, for which fewer registers do."""
    follow()
    HALF: tl.constexpr = BN // 2
    lefts = tl.make_tensor_descriptor(x, [m, K], [K, 1], [BM, BK])
    if TRANSPOSED:
        rights = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BN, BK])
    else:
        rights = tl.make_tensor_descriptor(w, [K, N], [N, 1], [BK, BN])
    outs = tl.make_tensor_descriptor(out, [m, N], [N, 1], [BM, HALF])
    if residual is not None:
        residuals = tl.make_tensor_descriptor(residual, [m, N], [N, 1], [BM, HALF])
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    down = tl.cdiv(m, BM)
    for number in tl.range(tl.program_id(0), down * ACROSS, tl.num_programs(0), flatten=True):
        tile_row, tile_column = tile_of(number, down, ACROSS, GROUP)
        row, column = tile_row * BM, tile_column * BN
        total = tl.zeros([BM, BN], tl.float32)
        for begin in range(0, K, BK):
            left = lefts.load([row, begin])
            if TRANSPOSED:
                total = tl.dot(left, rights.load([column, begin]).T, total)
            else:
                total = tl.dot(left, rights.load([begin, column]), total)
        low, high = tl.split(tl.permute(tl.reshape(total, [BM, 2, HALF]), [0, 2, 1]))
        if bias is not None:
            place = column + tl.arange(0, HALF)
            low += tl.load(bias + place, mask=place < N, other=0.0).to(tl.float32)[None, :]
            high += tl.load(bias + place + HALF, mask=place + HALF < N, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            low += residuals.load([row, column]).to(tl.float32)
        outs.store([row, column], low.to(out.dtype.element_ty))
        if residual is not None:
            high += residuals.load([row, column + HALF]).to(tl.float32)
        outs.store([row, column + HALF], high.to(out.dtype.element_ty))
