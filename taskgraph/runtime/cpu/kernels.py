"""The CPU kernels of the LLM ops: numba functions over preallocated arrays that split their work over threads.

bf16 tensors come as uint16 arrays of their bits and float32 tensors as they are; sums are float32. Every kernel
takes `threads` last and runs that many parts in one OpenMP region of the libgomp that torch has loaded: each calling
thread owns a pool there, pinned as that thread was when it first used it, and shared with its torch ops. (numba's
own parallel layers would bring a second pool that spins against torch's, or one that two lanes may not share.)
Weights are packed once, for the register tile of `taskgraph.runtime.cpu.tile`.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numba.core import types

from taskgraph.runtime.cpu.tile import (
    COLUMNS,
    OPENMP,
    PAIRS,
    ROWS,
    SINGLE,
    WIDE,
    exp,
    fork,
    kernel,
    narrow,
    tile,
    unpack,
    widen,
)

T = TypeVar("T")
_set_affinity: Any = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))


# -- the pool of the calling thread -------------------------------------------------------------------------------


@kernel
def _bind(masks: Any, part: Any, parts: Any) -> None:
    _set_affinity(0, masks.strides[0], masks.ctypes.data + part * masks.strides[0])


@kernel
def _bind_all(masks: Any) -> None:
    fork(_bind, (masks,), len(masks))


def bind_threads(cores: Sequence[int]) -> None:
    """Make the calling thread's pool len(cores) threads, itself the first, each on its own core.

    Two threads of a pool that meet on one core spin against each other for whole time slices (8 to 24 ms an op,
    measured beside one busy process), so a lane calls this once, before its first op, in place of sched_setaffinity.
    """
    masks = np.zeros((len(cores), max(cores) // 64 + 1), np.uint64)
    for i, core in enumerate(cores):
        masks[i, core // 64] = np.uint64(1 << core % 64)
    _bind_all(masks)


def release_threads() -> None:
    """End the calling thread's pool (omp_pause_resource_all); its next parallel op starts a new one.

    libgomp stops spinning, for wakes of 20 us and more, while the pools of a process hold more threads than it has
    cores. So a thread that ran parallel ops and will wait for lanes calls this first, and so does a lane at its end.
    """
    OPENMP.omp_pause_resource_all(1)


_TORCH = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
_mkl_threads: Any = getattr(_TORCH, "MKL_Set_Num_Threads_Local", None)
"""None where torch multiplies by another library, which asks OpenMP."""


def use_threads(count: int) -> None:
    """Make torch's ops of the calling thread run on `count` threads. torch.set_num_threads would change what threads
    get that are started later, and MKL's products in every thread."""
    torch.get_num_threads()  # the first time it takes what torch.set_num_threads said last
    OPENMP.omp_set_num_threads(count)
    if _mkl_threads is not None:
        _mkl_threads(count)


def on_one_thread(run: Callable[[], T]) -> T:
    """`run`, with torch's ops of the calling thread on one thread; afterwards it has as many as before."""
    count = torch.get_num_threads()
    if count == 1:
        return run()
    OPENMP.omp_set_num_threads(1)
    local = 0 if _mkl_threads is None else _mkl_threads(1)  # 0: it had no number of its own
    try:
        return run()
    finally:
        OPENMP.omp_set_num_threads(count)
        if _mkl_threads is not None:
            _mkl_threads(local)


# -- products -----------------------------------------------------------------------------------------------------


def pack_weight(w: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Panels of a weight (n, k): (n / 32, k, 32) float32, or for bf16 (n / 32, k / 2, 32) uint32 of two k each.

    n is padded with zeros to whole panels; a bf16 weight needs an even k.
    """
    n, k = w.shape
    if w.dtype == np.uint16 and k % 2:
        raise ValueError(f"a bf16 weight needs an even inner size; got {k}. Use float32.")
    words = np.ascontiguousarray(w).view(np.uint32 if w.dtype == np.uint16 else np.float32)
    panels = -(-n // COLUMNS)
    packed = torch.zeros(panels, words.shape[1], COLUMNS, dtype=torch.float32).numpy().view(words.dtype)
    whole = n // COLUMNS
    packed[:whole] = words[: whole * COLUMNS].reshape(whole, COLUMNS, words.shape[1]).transpose(0, 2, 1)
    if whole < panels:
        packed[whole, :, : n - whole * COLUMNS] = words[whole * COLUMNS :].T
    return packed


_UNPACK_ROWS = 2 * ROWS
"""From so many rows on a panel of bf16 pairs is widened once for all of them, not by every tile."""


_BLOCK_BYTES = 256 << 10
"""Bytes of the rows of x that stay in the second-level cache while panels pass by."""

_UNPACK_WORDS = 128
"""Words of a column of a panel that are widened at a time: they stay in the first-level cache (32 KiB)."""


@kernel
def _gemm(x: Any, packed: Any, bias: Any, residual: Any, out: Any, dot: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    k = x.shape[1]
    panels, steps, _ = packed.shape
    first, last = panels * part // parts, panels * (part + 1) // parts
    pairs = steps < k
    dots = pairs and dot
    unpacked = pairs and not dot and m >= _UNPACK_ROWS
    mode = PAIRS if dots else WIDE if pairs and not unpacked else SINGLE
    size = k * (x.itemsize if dots else 4)
    high = min(max(_BLOCK_BYTES // size // ROWS, 4), 16) * ROWS
    lines = np.empty((0 if dots or x.itemsize == 4 else min(high, m), k + 16), np.float32)
    wide = np.empty((2 * _UNPACK_WORDS if unpacked else 0, COLUMNS), np.float32)
    sums = np.empty((min(high, m), COLUMNS), np.float32)
    for block in range(0, m, high):
        end = min(block + high, m)
        start, stride = x.ctypes.data + block * x.strides[0], x.strides[0]
        if len(lines) > 0:
            for i in range(end - block):
                row, line = x[block + i], lines[i]
                for j in range(k):
                    line[j] = widen(row[j])
            start, stride = lines.ctypes.data, lines.strides[0]
        for panel in range(first, last):
            column = panel * COLUMNS
            width = min(COLUMNS, n - column)
            w = packed.ctypes.data + panel * packed.strides[0]
            for word in range(0, steps, _UNPACK_WORDS if unpacked else steps):
                words = min(_UNPACK_WORDS, steps - word) if unpacked else steps
                panel_at = w
                if unpacked:
                    unpack(w + word * packed.strides[1], words * COLUMNS, wide.ctypes.data)
                    panel_at, words = wide.ctypes.data, 2 * words
                for top in range(0, end - block, ROWS):
                    rows, into = (start + top * stride + 8 * word, stride), (sums.ctypes.data + top * 128, 128)
                    tile(min(ROWS, end - block - top), rows, panel_at, words, into, mode, word > 0)
            for r in range(end - block):
                if bias.size > 0:
                    for c in range(width):
                        sums[r, c] += widen(bias[column + c])
                if residual.size > 0:
                    for c in range(width):
                        sums[r, c] += widen(residual[block + r, column + c])
                if width == COLUMNS:
                    for c in range(COLUMNS):
                        out[block + r, column + c] = narrow(sums[r, c], out)
                else:
                    for c in range(width):
                        out[block + r, column + c] = narrow(sums[r, c], out)


@kernel
def gemm(x: Any, packed: Any, bias: Any, residual: Any, out: Any, dot: Any, threads: Any = 1) -> None:
    """out = x w^T + bias + residual; x (m, k), packed from `pack_weight` of w (n, k), out (m, n).

    bias (n,) and residual (m, n) may be empty arrays, (0,) and (0, 0), for none. Stored dtypes are free: sums are
    float32. `dot` multiplies bf16 pairs by the processor's own instruction, only where it has one.
    Threads take columns, so each byte of the weight is read by one core.
    """
    fork(_gemm, (x, packed, bias, residual, out, dot), threads)


# -- elementwise and row kernels ----------------------------------------------------------------------------------


@kernel
def _rmsnorm(x: Any, weight: Any, out: Any, eps: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        square, row = np.float32(0.0), x[i]
        for j in range(n):
            value = widen(row[j])
            square += value * value
        scale = np.float32(1.0) / np.sqrt(square / np.float32(n) + np.float32(eps))
        for j in range(n):
            out[i, j] = narrow(widen(row[j]) * scale * widen(weight[j]), out)


@kernel
def rmsnorm(x: Any, weight: Any, out: Any, eps: Any, threads: Any = 1) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); x and out (m, n), weight (n,), one dtype."""
    fork(_rmsnorm, (x, weight, out, eps), threads)


@kernel
def _swiglu(x: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    one = np.float32(1.0)
    for i in range(m * part // parts, m * (part + 1) // parts):
        gate, up, row = x[i, :n], x[i, n:], out[i]
        for j in range(n):
            value = widen(gate[j])
            small = exp(-abs(value))
            share = (one if value >= np.float32(0.0) else small) / (one + small)
            row[j] = narrow(value * share * widen(up[j]), out)


@kernel
def swiglu(x: Any, out: Any, threads: Any = 1) -> None:
    """out = silu(gate) * up (Shazeer 2020); x (m, 2 n) holds gate then up, out (m, n), one dtype."""
    fork(_swiglu, (x, out), threads)


@kernel
def _argmax(x: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        row = x[i]
        top, at, odd = np.float32(-np.inf), 0, np.int32(0)
        for start in range(0, n, 1024):
            stop = min(start + 1024, n)
            best = np.float32(-np.inf)
            for j in range(start, stop):
                value = widen(row[j])
                best = max(best, value)
                odd += np.int32(value != value)
            if odd > 0:
                at = start
                break
            if best > top:
                top, at = best, start
        while at < n - 1 and (widen(row[at]) == widen(row[at]) if odd > 0 else widen(row[at]) != top):
            at += 1
        out[i] = at


@kernel
def argmax(x: Any, out: Any, threads: Any = 1) -> None:
    """out[i] = the first index of the largest of x[i], or of its first NaN; x (m, n), out (m,) int64."""
    fork(_argmax, (x, out), threads)
