"""How a Triton kernel says what it was given and cannot use: the words of `Fault` in common.cuh."""

import triton
import triton.language as tl

TOKEN, POSITION, SLOT, PAGE, LENGTH, CHUNK, INDEX = (tl.constexpr(number) for number in range(1, 8))


@triton.jit
def report(fault, what: tl.constexpr, value, wrong):
    """Store the fault and its value, a number or a block of numbers, where it is `wrong`; one of them stays."""
    told = value.to(tl.int64) & 0xFFFFFFFFFFFF
    tl.store(fault + told * 0, told | (what << 48), mask=wrong)
