"""dgemm for numba, on the thread that calls it: torch's, else SciPy's."""

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import get_cython_function_address

Array = np.ndarray


def _link() -> None:
    """Let compiled code call MKL where torch brings it; else SciPy's OpenBLAS, whose threads are the process's."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    found = getattr(library, "dgemm_", None), getattr(library, "MKL_Set_Num_Threads_Local", None)
    if None in found:
        llvm.add_symbol("cholesky_dgemm", get_cython_function_address("scipy.linalg.cython_blas", "dgemm"))
        found = (None, ctypes.CDLL(None).abs)
    for name, function in zip(("cholesky_dgemm", "cholesky_blas_threads"), found, strict=True):
        if function is not None:
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_link()
_dgemm: Any = types.ExternalFunction("cholesky_dgemm", types.void(*[types.int64] * 13))
blas_threads: Any = types.ExternalFunction("cholesky_blas_threads", types.int32(types.int32))
"""Set how many threads products of the calling thread run on, and get how many it were."""


class Call(NamedTuple):
    """What Fortran takes by address: made once, filled for every call."""

    sizes: Array  # i64: "N", "T", m, n, k, lda, ldc
    factors: Array  # f64: alpha, beta


@numba.njit
def blas_call() -> Call:
    """Room for calls of `subtract_product`."""
    sizes, factors = np.empty(7, np.int64), np.empty(2)
    sizes[0], sizes[1] = 78, 84
    factors[0], factors[1] = -1.0, 1.0
    return Call(sizes, factors)


@numba.njit
def subtract_product(call: Call, rows: Array, left: int, right: int, out: Array, size: tuple[int, int]) -> None:
    """out[:n, :m] -= rows[:, left : left + n].T @ rows[:, right : right + m]; (n, m) = `size`. Rows lie one after the
    other, as those of `out` do, with their own strides."""
    sizes = call.sizes
    sizes[2], sizes[3], sizes[4] = size[1], size[0], rows.shape[0]
    sizes[5], sizes[6] = rows.strides[0] // 8, out.strides[0] // 8
    at, real, data = sizes.ctypes.data, call.factors.ctypes.data, rows.ctypes.data
    _dgemm(
        at, at + 8, at + 16, at + 24, at + 32, real, data + 8 * right, at + 40,
        data + 8 * left, at + 40, real + 8, out.ctypes.data, at + 48,
    )  # fmt: skip
