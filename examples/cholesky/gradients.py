"""Conjugate gradients with a preconditioner (Hestenes and Stiefel 1952)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from .errors import MatrixError

Array = np.ndarray


class Solved(NamedTuple):
    """x f64[n], the relative residual after every iteration, and whether the last of them is small enough."""

    x: Array
    residuals: list[float]
    converged: bool


def conjugate_gradients(
    matrix: sp.sparray,
    rhs: Array,
    precondition: Callable[[Array], Array],
    *,
    tolerance: float = 1e-8,
    most: int = 1000,
) -> Solved:
    """Solve A x = rhs until ||A x - rhs|| <= tolerance ||rhs||, or for `most` iterations; A and the preconditioner are
    symmetric positive definite."""
    rhs = np.asarray(rhs, np.float64)
    if rhs.shape != (matrix.shape[0],) or not tolerance > 0.0:
        raise MatrixError(
            f"the right-hand side has shape {rhs.shape} and the tolerance is {tolerance}; the matrix takes "
            f"{(matrix.shape[0],)} and a tolerance above 0."
        )
    x, r = np.zeros_like(rhs), rhs.copy()
    goal = tolerance * float(np.linalg.norm(rhs))
    norm, found = float(np.linalg.norm(r)), list[float]()
    z = precondition(r)
    p, rz = z.copy(), float(r @ z)
    while norm > goal and len(found) < most:
        ap = matrix @ p
        alpha = rz / float(p @ ap)
        x += alpha * p
        r -= alpha * ap
        norm = float(np.linalg.norm(r))
        found.append(norm * tolerance / goal)
        z = precondition(r)
        rz, before = float(r @ z), rz
        p = z + rz / before * p
    return Solved(x, found, norm <= goal)
