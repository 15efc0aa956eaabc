"""One typed door to numba: functions are compiled on first call and cached on disk."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def njit(function: Callable[P, R]) -> Callable[P, R]:
    """numba.njit without the interpreter, releasing the GIL, cached on disk; keeps the signature for type checkers."""
    compiled: Callable[P, R] = numba.njit(cache=True, nogil=True)(function)
    return compiled
