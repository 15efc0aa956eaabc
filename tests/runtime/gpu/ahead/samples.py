"""A Triton function to compile, and what is wrong with others."""

import triton
import triton.language as tl


@triton.jit
def scaled(x, out, count, factor, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    there = at < count
    tl.store(out + at, tl.load(x + at, mask=there, other=0.0) * factor, mask=there)


@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.zeros([N + 1], tl.float32))
