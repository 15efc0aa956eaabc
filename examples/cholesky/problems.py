"""Matrices to try it on."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp


def poisson(shape: Sequence[int], weights: Sequence[float] | None = None) -> sp.csc_array:
    """Minus the Laplacian on a grid of `shape` inner points, zero outside; `weights` stretch the axes."""
    total = sp.csc_array((int(np.prod(shape)),) * 2)
    for axis, length in enumerate(shape):
        ones = np.ones(length)
        line = sp.diags_array([-ones[1:], 2 * ones, -ones[1:]], offsets=[-1, 0, 1])
        before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
        part = sp.kron(sp.kron(sp.eye_array(before), line), sp.eye_array(after))
        total = total + (1.0 if weights is None else weights[axis]) * part
    return sp.csc_array(total)
