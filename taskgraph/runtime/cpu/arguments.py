"""What the CPU kernels take together: named tuples of arrays, which numba passes as if each were an argument."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]


class Cache(NamedTuple):
    """Keys and values: static, (b, kv, len, d) each, or in pages, which lie as `kernels_paged` says."""

    keys: Array
    values: Array


class Rope(NamedTuple):
    """How queries and keys are rotated: cos and sin (positions, d / 2) float32, what each head of them is multiplied by
    when it is normalised first, (d,) float32 and empty for not at all, and the epsilon of that."""

    cos: Array
    sin: Array
    q_norm: Array
    k_norm: Array
    eps: float


class LatentRope(NamedTuple):
    """How latents and the rotary channels are: cos and sin (positions, rotary / 2) float32, the latents' norm (rank,)
    float32 and its epsilon, and whether channels to rotate together are neighbours, or else halves apart."""

    cos: Array
    sin: Array
    norm: Array
    eps: float
    interleaved: bool


class Places(NamedTuple):
    """Where token i stands in its sequence, and the slot of the cache that keeps it (-1: none does); (t,) int32."""

    positions: Array
    slots: Array


class Tables(NamedTuple):
    """Sequence i has its first lengths[i] tokens in the pages blocks[i]; (n,) and (n, pages) int32."""

    lengths: Array
    blocks: Array


class Chunks(NamedTuple):
    """Rows starts[i] to starts[i + 1] are the last of the lengths[i] tokens in the pages blocks[i]; (n + 1,) int32."""

    starts: Array
    lengths: Array
    blocks: Array


def ready(kernel: Any, *arguments: Any) -> Callable[[], Any]:
    """`partial(kernel, *arguments)`, compiled now; a call of it looks for no compiled signature any more.

    That look takes longer than all else around a kernel: 0.2 us, and 0.6 us more for each named tuple (measured)."""
    types = tuple(map(kernel.typeof_pyval, arguments))
    kernel.compile(types)
    return partial(kernel.overloads[types].entry_point, *arguments)
