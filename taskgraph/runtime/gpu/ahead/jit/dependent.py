"""How a Triton kernel waits for the kernel before it on its lane: `follow` in common.cuh is its twin."""

from contextvars import ContextVar

import triton
import triton.language as tl

target: ContextVar[int] = ContextVar("target", default=0)
"""The compute capability that is compiled for, 90 say; 0 in the interpreter."""


def _compiled_for() -> int:
    return target.get()


_compiled_for.__triton_builtin__ = True  # type: ignore[attr-defined] # a function that Triton calls and does not read


@triton.constexpr_function
def _can_follow():
    return _compiled_for() >= 90  # PTX ISA, "griddepcontrol": sm_90 or higher


@triton.jit
def follow():
    """What a kernel does first, before it loads or stores anything: waits until the kernel before has ended and its
    memory is seen, and lets the next one be launched, which waits in turn. Launched otherwise it waits for nothing."""
    if _can_follow():
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
