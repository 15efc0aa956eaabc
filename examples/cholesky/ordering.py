"""Orders of elimination: nested dissection by METIS or, of grids, by geometry; minimum degree by AMD or SuperLU."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import spilu

from taskgraph import BackendUnavailable

from .errors import MatrixError

Order = np.ndarray  # i64[n]: the unknown that is eliminated first, second, ...


def grid_dissection(shape: Sequence[int], leaf: int = 8) -> Order:
    """Nested dissection of a grid of `shape` points, numbered as numpy counts them (George 1973).

    A plane of points cuts the longest axis and comes after both halves; parts of up to `leaf` points stay whole. The
    separators are valid for stencils that reach one point along each axis, diagonals included.
    """
    if not shape or any(int(length) < 1 for length in shape):
        raise MatrixError(f"a grid of shape {tuple(shape)} has no points; give lengths from 1 on.")
    pieces: list[np.ndarray] = []
    todo = [(np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape), False)]
    while todo:  # last in, first out; the pieces are found from the last to the first
        block, whole = todo.pop()
        if whole or block.size <= leaf or max(block.shape) < 3:
            pieces.append(block.ravel())
            continue
        axis = int(np.argmax(block.shape))
        left, separator, right = np.split(block, [block.shape[axis] // 2, block.shape[axis] // 2 + 1], axis)
        todo += [(left, False), (right, False), (separator, True)]
    return np.concatenate(pieces[::-1])


def minimum_degree(matrix: sp.sparray) -> Order:
    """Multiple minimum degree (Liu 1985) on the pattern of a symmetric matrix, as SuperLU orders it.

    SciPy has no call that only orders: an incomplete factorisation that keeps next to nothing is made for its order, of
    a matrix with the same pattern that cannot break down.
    """
    pattern = sp.csc_array(matrix, copy=True)
    pattern.data = np.full(pattern.nnz, -1.0)
    pattern = sp.csc_array(pattern + sp.diags_array(np.diff(pattern.indptr) + 1.0))
    made = spilu(pattern, drop_tol=1.0, fill_factor=1.0, permc_spec="MMD_AT_PLUS_A")
    return np.argsort(made.perm_c).astype(np.int64)


def metis(matrix: sp.sparray) -> Order:
    """Nested dissection by METIS (Karypis and Kumar 1998) of any pattern; BackendUnavailable without `pymetis`."""
    pymetis = _library("pymetis", "pymetis")
    edges = sp.csc_array(matrix - sp.diags_array(matrix.diagonal()))
    edges.eliminate_zeros()
    if not edges.nnz:
        return np.arange(matrix.shape[0])
    pattern = pymetis.CSRAdjacency(edges.indptr.astype(np.int32), edges.indices.astype(np.int32))
    return np.array(pymetis.nested_dissection(adjacency=pattern)[0], np.int64)


def approximate_minimum_degree(matrix: sp.sparray) -> Order:
    """AMD (Amestoy, Davis and Duff 1996) of any pattern; BackendUnavailable without `cvxopt`."""
    amd, base = _library("cvxopt.amd", "cvxopt"), _library("cvxopt", "cvxopt")
    found = sp.coo_array(matrix)
    ones = base.spmatrix(1.0, found.row.tolist(), found.col.tolist(), matrix.shape)
    return np.array(amd.order(ones), np.int64).ravel()


def fill_reducing(matrix: sp.sparray) -> Order:
    """By METIS where it is installed, else `minimum_degree`: what to take for a matrix that is no grid."""
    return metis(matrix) if find_spec("pymetis") else minimum_degree(matrix)


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"this order is made by {package}, which is not installed: pip install {package}, or take minimum_degree "
            "or grid_dissection."
        ) from error
