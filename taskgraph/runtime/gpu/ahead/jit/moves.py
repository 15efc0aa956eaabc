"""Moves of rows and pages, in units of some bytes; their .cu twins are in elementwise.cu and pages.cu."""

import triton
import triton.language as tl

from taskgraph.runtime.gpu.ahead.jit.dependent import follow
from taskgraph.runtime.gpu.ahead.jit.faults import PAGE, report
from taskgraph.runtime.gpu.ahead.jit.rows import place_of, tiles_of


@triton.jit
def slice_rows(x, out, start, step, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """Rows start, start + step, ... of a matrix whose rows are COLUMNS units."""
    follow()
    for block in range(tl.program_id(0), tiles_of(rows, COLUMNS, ROWS, N), tl.num_programs(0)):
        row, column = place_of(block, COLUMNS, ROWS, N)
        there = (row < rows) & (column < COLUMNS)
        tl.store(
            out + row * COLUMNS + column, tl.load(x + (start + row * step) * COLUMNS + column, mask=there), mask=there
        )


@triton.jit
def copy_pages(
    source, target, pairs, done, count, source_pages, target_pages, fault, UNITS: tl.constexpr, N: tl.constexpr
):
    """Page pairs[2i] of `source` becomes page pairs[2i + 1] of `target` for every i with neither below 0; `done` is how
    many. A page that does not exist is reported and left out. A page is UNITS units, and the grid bounds the SMs."""
    follow()
    program = tl.program_id(0)
    copied = 0
    for i in range(0, count):
        begin, end = tl.load(pairs + 2 * i), tl.load(pairs + 2 * i + 1)
        wanted = (begin >= 0) & (end >= 0)
        fits = (begin < source_pages) & (end < target_pages)
        report(fault, PAGE, tl.where(begin >= source_pages, begin, end), wanted & (fits == 0))
        if wanted & fits:
            if copied % tl.num_programs(0) == program:
                for first in range(0, UNITS, N):
                    at = first + tl.arange(0, N)
                    value = tl.load(source + begin.to(tl.int64) * UNITS + at, mask=at < UNITS)
                    tl.store(target + end.to(tl.int64) * UNITS + at, value, mask=at < UNITS)
            copied += 1
    if program == 0:
        tl.store(done, copied)
