"""The grouped products of routed experts, whose numbers of rows only the device knows. The .cu twin is experts.cu.

Rows are listed by expert; programs, as many as the lane's SMs hold, go over the tiles of all experts. An expert without
rows has no tile, so its weights are not read.
"""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow
from taskgraph.runtime.gpu.ahead.jit.rows import wide


@triton.jit
def expert_lists(routing, tokens, places, counts, rows, HELD: tl.constexpr, N: tl.constexpr):
    """A program an expert: the tokens that come to it, in order, how many, and each one's place among them."""
    follow()
    expert = tl.program_id(0)
    count = 0
    for first in range(0, rows, N):
        token = first + tl.arange(0, N)
        at = token.to(tl.int64) * HELD + expert
        comes = (tl.load(routing + at, mask=token < rows, other=0.0) != 0.0).to(tl.int32)
        place = count + tl.cumsum(comes, 0) - comes
        tl.store(places + at, place, mask=comes != 0)
        tl.store(tokens + expert.to(tl.int64) * rows + place, token, mask=comes != 0)
        count += tl.sum(comes, 0)
    tl.store(counts + expert, count)


@triton.jit
def _tile(number, counts, expert, ACROSS: tl.constexpr, BM: tl.constexpr):
    """Of a tile, tiles of one expert lying together and those of the same columns beside each other: its expert, the
    expert's rows, its first row, its place among the columns and where the expert's rows begin among all."""
    tiles = (counts + BM - 1) // BM
    ends = tl.cumsum(tiles, 0) * ACROSS
    mine = tl.sum((ends <= number).to(tl.int32), 0)
    here = expert == mine
    count, high = tl.sum(tl.where(here, counts, 0), 0), tl.sum(tl.where(here, tiles, 0), 0)
    inside = number - tl.sum(tl.where(here, ends, 0), 0) + high * ACROSS
    begin = tl.sum(tl.where(expert < mine, counts, 0), 0)
    return mine, count, inside % high * BM, inside // high, begin


@triton.jit
def expert_up(
    x, gate_up, tokens, counts, active, rows, room,
    HELD: tl.constexpr, HELD_PADDED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of the rows of every expert, gate first in gate_up (HELD, 2 INNER, HIDDEN), into `active`. BULK:
    weights come by bulk copies, of whose tiles some reach into rows of others, which nobody keeps."""
    follow()
    ACROSS: tl.constexpr = (INNER + BN - 1) // BN
    if BULK:
        weights = tl.make_tensor_descriptor(gate_up, [HELD * 2 * INNER, HIDDEN], [HIDDEN, 1], [BN, BK])
    each = tl.arange(0, HELD_PADDED)
    count_of = tl.load(counts + each, mask=each < HELD, other=0)
    total = tl.sum((count_of + BM - 1) // BM, 0) * ACROSS
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, count, first, tile_column, begin = _tile(number, count_of, each, ACROSS, BM)
        r, column = first + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
        token = tl.load(tokens + expert.to(tl.int64) * rows + r, mask=r < count, other=0)
        line = x + token.to(tl.int64)[:, None] * HIDDEN
        weight = gate_up + (expert.to(tl.int64) * (2 * INNER) + column)[None, :] * HIDDEN
        gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for step in range(0, HIDDEN, BK):
            inner = step + tl.arange(0, BK)
            left = tl.load(line + inner[None, :], mask=(r < count)[:, None] & (inner < HIDDEN)[None, :], other=0.0)
            if BULK:
                line_of = expert * (2 * INNER) + tile_column * BN
                gate = tl.dot(left, weights.load([line_of, step]).T, gate)
                up = tl.dot(left, weights.load([line_of + INNER, step]).T, up)
            else:
                there = (inner < HIDDEN)[:, None] & (column < INNER)[None, :]
                right = tl.load(weight + inner[:, None], mask=there, other=0.0)
                gate = tl.dot(left, right, gate, input_precision="ieee")
                right = tl.load(weight + INNER * HIDDEN + inner[:, None], mask=there, other=0.0)
                up = tl.dot(left, right, up, input_precision="ieee")
        made = gate / (1.0 + tl.exp(-gate)) * up
        target = (begin + r).to(tl.int64)
        fits = (r < count) & (target < room)
        here = fits[:, None] & (column < INNER)[None, :]
        tl.store(active + target[:, None] * INNER + column[None, :], made.to(active.dtype.element_ty), mask=here)


@triton.jit
def expert_down(
    active, down, counts, made, room,
    HELD: tl.constexpr, HELD_PADDED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Those rows times down (HELD, HIDDEN, INNER), into `made`; BULK as above."""
    follow()
    ACROSS: tl.constexpr = (HIDDEN + BN - 1) // BN
    if BULK:
        weights = tl.make_tensor_descriptor(down, [HELD * HIDDEN, INNER], [INNER, 1], [BN, BK])
    each = tl.arange(0, HELD_PADDED)
    count_of = tl.load(counts + each, mask=each < HELD, other=0)
    total = tl.sum((count_of + BM - 1) // BM, 0) * ACROSS
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, count, first, tile_column, begin = _tile(number, count_of, each, ACROSS, BM)
        r, column = first + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
        target = (begin + r).to(tl.int64)
        fits = (r < count) & (target < room)
        weight = down + (expert.to(tl.int64) * HIDDEN + column)[None, :] * INNER
        total_of = tl.zeros([BM, BN], tl.float32)
        for step in range(0, INNER, BK):
            inner = step + tl.arange(0, BK)
            there = fits[:, None] & (inner < INNER)[None, :]
            left = tl.load(active + target[:, None] * INNER + inner[None, :], mask=there, other=0.0)
            if BULK:
                total_of = tl.dot(left, weights.load([expert * HIDDEN + tile_column * BN, step]).T, total_of)
            else:
                there = (inner < INNER)[:, None] & (column < HIDDEN)[None, :]
                right = tl.load(weight + inner[:, None], mask=there, other=0.0)
                total_of = tl.dot(left, right, total_of, input_precision="ieee")
        here = fits[:, None] & (column < HIDDEN)[None, :]
        tl.store(made + target[:, None] * HIDDEN + column[None, :], total_of, mask=here)


@triton.jit
def expert_sum(
    routing, places, counts, made, residual, out, rows, room,
    HELD: tl.constexpr, HELD_PADDED: tl.constexpr, HIDDEN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program N channels of a token: its residual, or nothing, plus the weighted rows of its experts in order."""
    follow()
    ACROSS: tl.constexpr = (HIDDEN + N - 1) // N
    each = tl.arange(0, HELD_PADDED)
    count_of = tl.load(counts + each, mask=each < HELD, other=0)
    begin_of = tl.cumsum(count_of, 0) - count_of
    for block in range(tl.program_id(0), rows * ACROSS, tl.num_programs(0)):
        token, column = wide(block // ACROSS), block % ACROSS * N + tl.arange(0, N)
        weight = tl.load(routing + token * HELD + each, mask=each < HELD, other=0.0)
        comes = (weight != 0.0).to(tl.int32)
        target = begin_of + tl.load(places + token * HELD + each, mask=comes != 0, other=0)
        comes = tl.where(target < room, comes, 0)
        order = tl.cumsum(comes, 0) * comes
        sum_of = tl.zeros([N], tl.float32)
        if residual is not None:
            sum_of += tl.load(residual + token * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        for number in range(1, tl.sum(comes, 0) + 1):
            here = order == number
            share, row = tl.sum(tl.where(here, weight, 0.0), 0), tl.sum(tl.where(here, target, 0), 0)
            line = made + row.to(tl.int64) * HIDDEN + column
            sum_of += share * tl.load(line, mask=column < HIDDEN, other=0.0)
        tl.store(out + token * HIDDEN + column, sum_of.to(out.dtype.element_ty), mask=column < HIDDEN)
