"""The symbolic factorisation: elimination tree, supernodes, the rows of every front, and where each value goes."""

from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse as sp

from .errors import MatrixError

Array = np.ndarray


class Symbolic(NamedTuple):
    """What the pattern and the order decide. Front s has columns first[s]..first[s+1]-1 and m = rows[s] - columns[s].

    A panel is stored by columns: `columns` times `heights` f64, the pivots' rows before the others.
    """

    order: Array  # i64[n]: the unknown at every place
    first: Array  # i64[fronts + 1]: the first column
    parent: Array  # i64[fronts]: the front that the update goes to, or -1
    row_at: Array  # i64[fronts + 1]: where a front's rows begin in `rows` and `relative`
    rows: Array  # i32[...]: the rows below the pivots, ascending
    relative: Array  # i32[...]: the place of each of them in the parent's front
    value_at: Array  # i64[fronts + 1]: where a front's values begin in `source` and `target`
    source: Array  # i32[...]: indices of the matrix's values
    target: Array  # i32[...]: where they go in the panel
    panel_at: Array  # i64[fronts + 1]: where a front's panel begins in the factor
    flops: Array  # f64[fronts]: of the partial factorisation
    columns: Array  # i64[fronts]: pivots of every front
    below: Array  # i64[fronts]: rows below them


@numba.njit(cache=True)
def elimination_tree(starts: Array, rows: Array) -> Array:
    """The parent of every column, or -1 (Liu 1990, with compressed paths). CSC of a symmetric matrix."""
    n = len(starts) - 1
    parent, ancestor = np.full(n, -1), np.full(n, -1)
    for j in range(n):
        for at in range(starts[j], starts[j + 1]):
            i = rows[at]
            while i != -1 and i < j:
                above = ancestor[i]
                ancestor[i] = j
                if above == -1:
                    parent[i] = j
                i = above
    return parent


@numba.njit(cache=True)
def postorder(parent: Array) -> Array:
    """Children before parents, subtrees in one piece, siblings in ascending order."""
    n = len(parent)
    head, sibling = np.full(n + 1, -1), np.full(n, -1)
    for j in range(n - 1, -1, -1):
        above = parent[j] if parent[j] >= 0 else n
        sibling[j] = head[above]
        head[above] = j
    order, stack, made = np.empty(n, np.int64), np.empty(n + 1, np.int64), 0
    top, stack[0] = 0, n
    while top >= 0:
        child = head[stack[top]]
        if child >= 0:
            head[stack[top]] = sibling[child]
            top += 1
            stack[top] = child
            continue
        if stack[top] < n:
            order[made] = stack[top]
            made += 1
        top -= 1
    return order


@numba.njit(cache=True)
def column_counts(starts: Array, rows: Array, parent: Array) -> Array:
    """Entries of every column of the factor, the diagonal included: row subtrees are walked, O(entries)."""
    n = len(parent)
    counts, seen = np.ones(n, np.int64), np.full(n, -1)
    for j in range(n):
        seen[j] = j
        for at in range(starts[j], starts[j + 1]):
            i = rows[at]
            while i < j and seen[i] != j:
                counts[i] += 1
                seen[i] = j
                i = parent[i]
    return counts


@numba.njit(cache=True)
def supernodes(parent: Array, counts: Array) -> Array:
    """First columns of the fronts, relaxed: a last child joins its parent where that adds few zeros.

    How many are few depends on the joined columns, as in CHOLMOD (Chen, Davis, Hager, Rajamanickam 2008).
    """
    n = len(parent)
    first, zeros, found = np.empty(n + 1, np.int64), np.zeros(n + 1), 0
    j = 0
    while j < n:
        last = j
        while last + 1 < n and parent[last] == last + 1 and counts[last] == counts[last + 1] + 1:
            last += 1
        first[found], zeros[found] = j, 0.0
        found += 1
        while found > 1:
            begin, before = first[found - 1], first[found - 2]
            if parent[begin - 1] < begin or parent[begin - 1] > last:
                break
            columns, below = last + 1 - before, counts[last] - 1
            added = (begin - before) * float(last + 1 - begin + below - counts[begin - 1] + 1)
            share = (zeros[found - 1] + zeros[found - 2] + added) / (columns * (columns + 1) / 2.0 + columns * below)
            most = 1.0 if columns <= 4 else 0.8 if columns <= 16 else 0.1 if columns <= 48 else 0.05
            if share > most:
                break
            zeros[found - 2] += zeros[found - 1] + added
            found -= 1
        j = last + 1
    first[found] = n
    return first[: found + 1].copy()


@numba.njit(cache=True)
def front_rows(starts: Array, rows: Array, first: Array, row_at: Array) -> tuple[Array, Array]:
    """(rows below every front, parents of fronts): the matrix's rows and those of the children, joined."""
    fronts, n = len(first) - 1, len(starts) - 1
    front_of, seen = np.empty(n, np.int64), np.full(n, -1)
    for s in range(fronts):
        front_of[first[s] : first[s + 1]] = s
    found, parent = np.empty(row_at[fronts], np.int32), np.full(fronts, -1)
    head, sibling = np.full(fronts, -1), np.full(fronts, -1)
    for s in range(fronts):
        at, end = row_at[s], first[s + 1]
        for place in range(starts[first[s]], starts[end]):
            i = rows[place]
            if i >= end and seen[i] != s:
                seen[i] = s
                found[at] = i
                at += 1
        child = head[s]
        while child >= 0:
            for place in range(row_at[child], row_at[child + 1]):
                i = found[place]
                if i >= end and seen[i] != s:
                    seen[i] = s
                    found[at] = i
                    at += 1
            child = sibling[child]
        if at > row_at[s]:
            found[row_at[s] : at] = np.sort(found[row_at[s] : at])
            above = front_of[found[row_at[s]]]
            parent[s], sibling[s], head[above] = above, head[above], s
    return found, parent


@numba.njit(cache=True)
def places(wanted: Array, begin: int, rows: Array, columns: int, out: Array) -> None:
    """The place of each ascending `wanted` row in a front of `columns` pivots from `begin` on and `rows` below."""
    at = 0
    for k in range(len(wanted)):
        i = wanted[k]
        if i < begin + columns:
            out[k] = i - begin
        else:
            while rows[at] != i:
                at += 1
            out[k] = columns + at


@numba.njit(cache=True)
def scatter(starts: Array, rows: Array, first: Array, row_at: Array, below: Array) -> tuple[Array, Array, Array]:
    """(value_at, places in the CSC arrays, targets in panels) of the entries on and below the diagonal."""
    fronts = len(first) - 1
    value_at = np.zeros(fronts + 1, np.int64)
    taken, target = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
    made = 0
    for s in range(fronts):
        columns = first[s + 1] - first[s]
        mine = below[row_at[s] : row_at[s + 1]]
        for j in range(first[s], first[s + 1]):
            low = starts[j]
            while low < starts[j + 1] and rows[low] < j:
                low += 1
            count = starts[j + 1] - low
            here = target[made : made + count]
            places(rows[low : starts[j + 1]], first[s], mine, columns, here)
            here += (j - first[s]) * (columns + len(mine))
            taken[made : made + count] = np.arange(low, starts[j + 1])
            made += count
        value_at[s + 1] = made
    return value_at, taken[:made].copy(), target[:made].copy()


@numba.njit(cache=True)
def relative_rows(first: Array, row_at: Array, rows: Array, parent: Array) -> Array:
    """For each row below a front, its place in the front of the parent."""
    relative = np.empty(len(rows), np.int32)
    for s in range(len(parent)):
        if parent[s] >= 0:
            p, a, z = parent[s], row_at[s], row_at[s + 1]
            above = rows[row_at[p] : row_at[p + 1]]
            places(rows[a:z], first[p], above, first[p + 1] - first[p], relative[a:z])
    return relative


def checked(matrix: sp.sparray) -> sp.csc_array:
    """The matrix as canonical CSC; MatrixError unless square, its pattern symmetric with a full diagonal."""
    if not sp.issparse(matrix) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        shape = f" of shape {matrix.shape}" if sp.issparse(matrix) else ""
        raise MatrixError(f"Cholesky takes a square sparse matrix of scipy; got {type(matrix).__name__}{shape}.")
    if np.iscomplexobj(matrix.data):
        raise MatrixError(f"the matrix has {matrix.dtype} entries; Cholesky here is of real ones. Give matrix.real.")
    found = sp.csc_array(matrix, dtype=np.float64, copy=True)
    found.sum_duplicates()
    flipped = sp.csc_array(found.T)
    flipped.sort_indices()
    if not (np.array_equal(found.indptr, flipped.indptr) and np.array_equal(found.indices, flipped.indices)):
        raise MatrixError("the pattern is not symmetric; give both triangles, as (A + A.T) / 2 has them.")
    ones = sp.csc_array((np.ones(found.nnz), found.indices, found.indptr), shape=found.shape)
    if ones.diagonal().min() == 0.0:
        raise MatrixError(f"row {int(ones.diagonal().argmin())} has no diagonal entry; an SPD matrix has all of them.")
    return found


class Ordered(NamedTuple):
    """A pattern in an order that is a postorder of its elimination tree, and the fronts of its columns."""

    order: Array  # i64[n]: the unknown at every place
    inner: sp.csc_array  # the permuted pattern; its data are places among the values of the matrix
    tree: Array  # i64[n]: the parent of every column, or -1
    counts: Array  # i64[n]: entries of every column of the exact factor
    first: Array  # i64[fronts + 1]: the first column of every front


def ordered(matrix: sp.csc_array, order: Array) -> Ordered:
    """The pattern of a `checked` matrix in an order of elimination (i64[n], a permutation), which is replaced by an
    equivalent postorder of its tree."""
    n = matrix.shape[0]
    order = np.asarray(order, np.int64)
    if order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise MatrixError(
            f"the order is no permutation of {n} unknowns; give each of 0 to {n - 1} once, as fill_reducing does."
        )
    numbered = sp.csc_array((np.arange(matrix.nnz), matrix.indices, matrix.indptr), shape=(n, n))

    def permuted(by: Array) -> sp.csc_array:
        made = sp.csc_array(numbered[by][:, by])
        made.sort_indices()
        return made

    inner = permuted(order)
    order = order[postorder(elimination_tree(inner.indptr, inner.indices))]
    inner = permuted(order)
    tree = elimination_tree(inner.indptr, inner.indices)
    counts = column_counts(inner.indptr, inner.indices, tree)
    return Ordered(order, inner, tree, counts, supernodes(tree, counts))


def analyse(matrix: sp.sparray, order: Array) -> Symbolic:
    """The symbolic factorisation of a symmetric pattern in the given order of elimination (i64[n], a permutation).

    Multifrontal as in Duff and Reid 1983 and Liu 1992. The order is replaced by an equivalent postorder of its tree.
    """
    order, inner, _, counts, first = ordered(checked(matrix), order)
    columns, below = np.diff(first), counts[first[1:] - 1] - 1
    row_at = np.concatenate([[0], np.cumsum(below)])
    rows, parent = front_rows(inner.indptr, inner.indices, first, row_at)
    relative = relative_rows(first, row_at, rows, parent)
    value_at, taken, target = scatter(inner.indptr, inner.indices, first, row_at, rows)
    panel_at = np.concatenate([[0], np.cumsum(columns * (columns + below))])
    c, m = columns.astype(np.float64), below.astype(np.float64)
    flops = c**3 / 3 + c * c * m + c * m * m
    source = inner.data[taken].astype(np.int32)
    return Symbolic(
        order, first, parent, row_at, rows, relative, value_at, source, target, panel_at, flops, columns, below
    )
