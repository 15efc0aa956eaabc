"""Ops row by row: add, swiglu, rmsnorm, embedding, argmax. Their .cu twins are in elementwise.cu.

A tile is ROWS by N, powers of two; what lies beyond a row of COLUMNS is masked. Programs loop over tiles.
"""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow
from taskgraph.runtime.gpu.ahead.jit.faults import TOKEN, report


@triton.jit
def wide(number):
    """A number as i64, for products of it that pass i32; the interpreter counts loops in Python's integers."""
    return number + tl.full([], 0, tl.int64)


@triton.jit
def place_of(block, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """Rows (ROWS, 1) and columns (1, N) of a tile, those of one band of rows one after another."""
    ACROSS: tl.constexpr = (COLUMNS + N - 1) // N
    row = ((block // ACROSS) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return row, ((block % ACROSS) * N + tl.arange(0, N))[None, :]


@triton.jit
def tiles_of(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """How many tiles `rows` rows are."""
    return tl.cdiv(rows, ROWS) * ((COLUMNS + N - 1) // N)


@triton.jit
def add(a, b, out, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """a + b, entry by entry."""
    follow()
    for block in range(tl.program_id(0), tiles_of(rows, COLUMNS, ROWS, N), tl.num_programs(0)):
        row, column = place_of(block, COLUMNS, ROWS, N)
        there = (row < rows) & (column < COLUMNS)
        at = row * COLUMNS + column
        x = tl.load(a + at, mask=there, other=0.0).to(tl.float32)
        y = tl.load(b + at, mask=there, other=0.0).to(tl.float32)
        tl.store(out + at, (x + y).to(out.dtype.element_ty), mask=there)


@triton.jit
def swiglu(x, out, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """silu(gate) * up, gate first (Shazeer 2020), of x (rows, 2 COLUMNS)."""
    follow()
    for block in range(tl.program_id(0), tiles_of(rows, COLUMNS, ROWS, N), tl.num_programs(0)):
        row, column = place_of(block, COLUMNS, ROWS, N)
        there = (row < rows) & (column < COLUMNS)
        place = x + row * (2 * COLUMNS) + column
        gate = tl.load(place, mask=there, other=0.0).to(tl.float32)
        up = tl.load(place + COLUMNS, mask=there, other=0.0).to(tl.float32)
        made = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + row * COLUMNS + column, made.to(out.dtype.element_ty), mask=there)


@triton.jit
def gated_add(x, gate, base, out, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """base + sigmoid(gate) * x, one gate a row."""
    follow()
    for block in range(tl.program_id(0), tiles_of(rows, COLUMNS, ROWS, N), tl.num_programs(0)):
        row, column = place_of(block, COLUMNS, ROWS, N)
        there = (row < rows) & (column < COLUMNS)
        at = row * COLUMNS + column
        open_by = tl.load(gate + row, mask=row < rows, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=there, other=0.0).to(tl.float32) / (1.0 + tl.exp(-open_by))
        made = tl.load(base + at, mask=there, other=0.0).to(tl.float32) + value
        tl.store(out + at, made.to(out.dtype.element_ty), mask=there)


@triton.jit
def rmsnorm(x, weight, out, rows, eps, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). Where N holds a row it is read once; else its
    squares are summed first, and it is read again."""
    follow()
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        if N >= COLUMNS:
            column = tl.arange(0, N)[None, :]
            there = (row < rows) & (column < COLUMNS)
            w = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
            value = tl.load(x + row * COLUMNS + column, mask=there, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(value * value, 1)[:, None] / COLUMNS + eps)
            tl.store(out + row * COLUMNS + column, (value * scale * w).to(out.dtype.element_ty), mask=there)
        else:
            squares = tl.zeros([ROWS, N], tl.float32)
            for first in range(0, COLUMNS, N):
                column = first + tl.arange(0, N)[None, :]
                there = (row < rows) & (column < COLUMNS)
                value = tl.load(x + row * COLUMNS + column, mask=there, other=0.0).to(tl.float32)
                squares += value * value
            scale = tl.rsqrt(tl.sum(squares, 1)[:, None] / COLUMNS + eps)
            for first in range(0, COLUMNS, N):
                column = first + tl.arange(0, N)[None, :]
                there = (row < rows) & (column < COLUMNS)
                value = tl.load(x + row * COLUMNS + column, mask=there, other=0.0).to(tl.float32)
                w = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
                tl.store(out + row * COLUMNS + column, (value * scale * w).to(out.dtype.element_ty), mask=there)


@triton.jit
def embedding(
    tokens, table, out, rows, vocabulary, fault, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Rows of the table (vocabulary, COLUMNS). A token outside it is reported and gives zeros."""
    follow()
    for block in range(tl.program_id(0), tiles_of(rows, COLUMNS, ROWS, N), tl.num_programs(0)):
        row, column = place_of(block, COLUMNS, ROWS, N)
        token = tl.load(tokens + row, mask=row < rows, other=0).to(tl.int64)
        known = (token >= 0) & (token < vocabulary)
        report(fault, TOKEN, token, (row < rows) & (known == 0))
        there = (row < rows) & (column < COLUMNS)
        value = tl.load(table + token * COLUMNS + column, mask=there & known, other=0.0)
        tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _best(value, at, beyond):
    """The entry of the block that is largest, the first of equals, NaN above all; and its place."""
    nan = tl.min(tl.where(value != value, at, beyond), 0)
    top = tl.max(tl.where(value == value, value, float("-inf")), 0)
    first = tl.min(tl.where(value == top, at, beyond), 0)
    return tl.where(nan < beyond, float("nan"), top), tl.where(nan < beyond, nan, first)


@triton.jit
def argmax(x, out, values, places, rows, parts, COLUMNS: tl.constexpr, N: tl.constexpr):
    """Of every row the place of its largest entry: of equals the first, and a NaN is larger than any number.

    A program looks at one of `parts` parts of a row, in steps of N. With one part it writes `out`; else it leaves the
    best of its part in `values` and `places` (rows, parts) for `argmax_join`."""
    follow()
    lane = tl.arange(0, N)
    share = tl.cdiv(tl.cdiv(COLUMNS, N), parts) * N
    for block in range(tl.program_id(0), rows * parts, tl.num_programs(0)):
        begin = block % parts * share
        end = tl.minimum(begin + share, COLUMNS)
        line = x + wide(block // parts) * COLUMNS
        at = begin + lane
        best = tl.load(line + at, mask=at < end, other=float("-inf")).to(tl.float32)
        for first in range(begin + N, end, N):
            column = first + lane
            value = tl.load(line + column, mask=column < end, other=float("-inf")).to(tl.float32)
            larger = (value > best) | ((value != value) & (best == best))
            best = tl.where(larger, value, best)
            at = tl.where(larger, column, at)
        value, place = _best(best, tl.where(at < end, at, COLUMNS), COLUMNS)
        if parts == 1:
            tl.store(out + block, place.to(tl.int64))
        else:
            tl.store(values + block, value)
            tl.store(places + block, place)


@triton.jit
def argmax_join(values, places, out, parts, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """The best of the parts of a row; a program a row."""
    follow()
    row, part = tl.program_id(0), tl.arange(0, PADDED)
    value = tl.load(values + row * parts + part, mask=part < parts, other=float("-inf"))
    place = tl.load(places + row * parts + part, mask=part < parts, other=COLUMNS)
    tl.store(out + row, _best(value, place, COLUMNS)[1].to(tl.int64))
