"""The ops' numbers: assembly and small fronts in numba, large fronts by torch's BLAS on the threads of the lane."""

from typing import Any

import numba
import numpy as np
import torch

import taskgraph as tg

from .errors import NotPositiveDefiniteError

flat, native = tg.cpu.flat, tg.cpu.native
Array = np.ndarray
TILE = 256  # rows of an update that one product makes: of the square only the upper part is computed


@numba.njit(cache=True, nogil=True)
def extend_add(child: Array, relative: Array, panel: Array, update: Array) -> None:
    """Add a child's update (its upper triangle) to its parent's panel and update."""
    columns, count = panel.shape[0], len(relative)
    for i in range(count):
        row = relative[i]
        if row < columns:
            for j in range(i, count):
                panel[row, relative[j]] += child[i, j]
        else:
            for j in range(i, count):
                update[row - columns, relative[j] - columns] += child[i, j]


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def factor_small(panel: Array, update: Array) -> int:
    """Partial Cholesky of one front in place: panel = R [I, X], update -= X^T X. The bad column, or -1."""
    columns, height = panel.shape
    for j in range(columns):
        if not panel[j, j] > 0.0:
            return j
        root = np.sqrt(panel[j, j])
        panel[j, j] = root
        panel[j, j + 1 :] *= 1.0 / root
        for k in range(j + 1, columns):
            factor = panel[j, k]
            for i in range(k, height):
                panel[k, i] -= factor * panel[j, i]
    for k in range(height - columns):
        at = columns + k
        p = 0
        while p + 4 <= columns:
            a, b, c, d = panel[p, at], panel[p + 1, at], panel[p + 2, at], panel[p + 3, at]
            for i in range(k, height - columns):
                here = columns + i
                update[k, i] -= (
                    a * panel[p, here] + b * panel[p + 1, here] + c * panel[p + 2, here] + d * panel[p + 3, here]
                )
            p += 4
        while p < columns:
            a = panel[p, at]
            for i in range(k, height - columns):
                update[k, i] -= a * panel[p, columns + i]
            p += 1
    return -1


@numba.njit(cache=True, nogil=True)
def branch_kernel(values: Array, guide: Array, stack: Array, panels: Array, out: Array) -> int:
    """Fronts in postorder, their updates on a stack (Duff and Reid 1983). The bad column, or -1.

    The stack begins with the updates of the first front's children. The guide: fronts, depth of the stack, values, such
    children; columns, rows below, values, children of every front; rows below of such children; sources; targets;
    relative rows.
    """
    fronts, count, held = guide[0], guide[2], np.int64(guide[3])
    at = 4 + 4 * fronts + guide[3]
    table = guide[4 : 4 + 4 * fronts].reshape(fronts, 4)
    sources, targets, relative = guide[at : at + count], guide[at + count : at + 2 * count], guide[at + 2 * count :]
    sizes, at_row = np.empty(fronts + held, np.int64), np.empty(fronts + held, np.int64)
    panels[:] = 0.0
    if held == 0:
        stack[0] = 0.0
    top, value, place, row, column = 0, 0, 0, 0, 0
    for k in range(held):
        sizes[k], at_row[k] = guide[4 + 4 * fronts + k], row
        row += sizes[k]
        top += sizes[k] * sizes[k]
    for s in range(fronts):
        c, m = np.int64(table[s, 0]), np.int64(table[s, 1])
        panel = panels[place : place + c * (c + m)]
        for k in range(value, value + table[s, 2]):
            panel[targets[k]] = values[sources[k]]
        value += table[s, 2]
        place += c * (c + m)
        square = panel.reshape(c, c + m)
        mine = stack[top : top + m * m] if s + 1 < fronts else out[: m * m]
        mine[:] = 0.0
        update = mine.reshape(m, m)
        low = top
        for _child in range(table[s, 3]):
            held -= 1
            size = sizes[held]
            low -= size * size
            extend_add(
                stack[low : low + size * size].reshape(size, size),
                relative[at_row[held] : at_row[held] + size], square, update,
            )  # fmt: skip
        bad = factor_small(square, update)
        if bad >= 0:
            return column + bad
        if s + 1 < fronts:
            for k in range(m * m):
                stack[low + k] = mine[k]
        sizes[held], at_row[held] = m, row
        held += 1
        top = low + m * m
        row += m
        column += c
    return -1


def refuse_branch(column: int, _values: Any, guide: Any, *_: Any) -> None:
    """Say which pivot it is."""
    index = guide.numpy()
    refuse(column, int(index[4 : 4 + 4 * int(index[0]) : 4].sum()))


def refuse(column: int, count: int) -> None:
    raise NotPositiveDefiniteError(
        f"the pivot of column {column} of {count} in this op is not above 0: the matrix is not positive definite. "
        "Check its sign and boundary conditions, or add a multiple of the identity."
    )


@native(refuse_branch)
def factor_branch(tensors: Any, count: Any) -> int:
    """A custom op of (values, guide, *updates of children, stack, panels, update if there is one): `branch_kernel`."""
    guide = flat(tensors, 1, np.int32)
    children, top = np.int64(guide[3]), 0
    stack, panels = flat(tensors, 2 + children, np.float64), flat(tensors, 3 + children, np.float64)
    for k in range(children):
        child = flat(tensors, 2 + k, np.float64)
        stack[top : top + len(child)] = child
        top += len(child)
    out = flat(tensors, 4 + children, np.float64) if count > 4 + children else stack[:0]
    return branch_kernel(flat(tensors, 0, np.float64), guide, stack, panels, out) + 1


@numba.njit(cache=True, nogil=True)
def fill(values: Array, guide: Array, panel: Array) -> None:
    """The matrix's own entries of one front."""
    count = guide[3]
    panel[:] = 0.0
    for k in range(count):
        panel[guide[4 + count + k]] = values[guide[4 + k]]


def factor_front(values: Any, guide: Any, *tensors: Any) -> None:
    """A custom op: one front. The guide: columns, rows below, children, values; sources; targets; relative rows."""
    index = guide.numpy()
    columns, below, children, count = (int(x) for x in index[:4])
    panel = tensors[children].view(columns, columns + below)
    update = tensors[children + 1] if below else torch.empty(0, 0, dtype=torch.float64)
    update.zero_()
    fill(values.numpy(), index, tensors[children].numpy())
    square, corner, at = panel.numpy(), update.numpy(), 4 + 2 * count
    for child in tensors[:children]:
        size = len(child)
        extend_add(child.numpy(), index[at : at + size], square, corner)
        at += size
    pivots, rest = panel[:, :columns], panel[:, columns:]
    root, bad = torch.linalg.cholesky_ex(pivots, upper=True)
    if int(bad):
        refuse(int(bad) - 1, columns)
    pivots.copy_(root)
    if below:
        rest.copy_(torch.linalg.solve_triangular(root.mT, rest, upper=False))
        for low in range(0, below, TILE):
            part = update[low : low + TILE, low:]
            part.addmm_(rest[:, low : low + TILE].mT, rest[:, low:], alpha=-1.0)


@numba.njit(cache=True, nogil=True)
def least_pivot(first: Array, row_at: Array, panel_at: Array, factor: Array, diagonal: Array) -> tuple[float, int]:
    """The least pivot over the diagonal entry that it was, and its column."""
    least, where = np.inf, 0
    for s in range(len(first) - 1):
        c, height = first[s + 1] - first[s], first[s + 1] - first[s] + row_at[s + 1] - row_at[s]
        for j in range(c):
            root = factor[panel_at[s] + j * height + j]
            share = root * root / diagonal[first[s] + j]
            if share < least:
                least, where = share, first[s] + j
    return least, where


@numba.njit(cache=True, nogil=True)
def solve_factored(first: Array, row_at: Array, rows: Array, panel_at: Array, factor: Array, x: Array) -> None:
    """Solve R^T R x = x in place, in the order of elimination."""
    fronts = len(first) - 1
    for s in range(fronts):
        a, c, m = first[s], first[s + 1] - first[s], row_at[s + 1] - row_at[s]
        panel = factor[panel_at[s] : panel_at[s + 1]].reshape(c, c + m)
        mine = rows[row_at[s] : row_at[s + 1]]
        for j in range(c):
            y = x[a + j] / panel[j, j]
            x[a + j] = y
            for i in range(j + 1, c):
                x[a + i] -= panel[j, i] * y
            for i in range(m):
                x[mine[i]] -= panel[j, c + i] * y
    for s in range(fronts - 1, -1, -1):
        a, c, m = first[s], first[s + 1] - first[s], row_at[s + 1] - row_at[s]
        panel = factor[panel_at[s] : panel_at[s + 1]].reshape(c, c + m)
        mine = rows[row_at[s] : row_at[s + 1]]
        for j in range(c - 1, -1, -1):
            y = x[a + j]
            for i in range(j + 1, c):
                y -= panel[j, i] * x[a + i]
            for i in range(m):
                y -= panel[j, c + i] * x[mine[i]]
            x[a + j] = y / panel[j, j]
