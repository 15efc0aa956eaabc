"""The ops' numbers, native: assembly and small fronts are loops in numba, large fronts are products by BLAS."""

from typing import Any

import numba
import numpy as np

import taskgraph as tg

from .blas import Call, blas_call, blas_threads, subtract_product
from .errors import NotPositiveDefiniteError

barrier, flat, native = tg.cpu.barrier, tg.cpu.flat, tg.cpu.native
Array = np.ndarray
TILE = 64  # rows of an update that one product makes: of the square only the upper part is computed
BLOCK = 16  # rows of a panel that loops factorise before a product subtracts them from the rest
WIDE_BLOCK = 32  # the same within a tile of pivots
SMALL = 1500  # entries of a panel from which on products are faster than loops (measured, Zen 5)


@numba.njit
def extend_add(child: Array, relative: Array, panel: Array, update: Array, part: int, parts: int) -> None:
    """Add a child's update (its upper triangle) to its parent's panel and update: to one row in `parts`."""
    columns, count = panel.shape[0], len(relative)
    for i in range(count):
        row = relative[i]
        if parts > 1 and row % parts != part:
            continue
        if row < columns:
            for j in range(i, count):
                panel[row, relative[j]] += child[i, j]
        else:
            for j in range(i, count):
                update[row - columns, relative[j] - columns] += child[i, j]


FAST = {"contract", "reassoc"}


@numba.njit(fastmath=FAST, error_model="numpy")
def subtract_row(rows: Array, at: int, out: Array) -> None:
    """out -= rows[:, at].T @ rows[:, at : at + len(out)]."""
    n, p = len(out), 0
    while p + 4 <= len(rows):
        a, b, c, d = rows[p, at], rows[p + 1, at], rows[p + 2, at], rows[p + 3, at]
        ra, rb, rc, rd = rows[p, at:], rows[p + 1, at:], rows[p + 2, at:], rows[p + 3, at:]
        for i in range(n):
            out[i] -= a * ra[i] + b * rb[i] + c * rc[i] + d * rd[i]
        p += 4
    while p < len(rows):
        a, ra = rows[p, at], rows[p, at:]
        for i in range(n):
            out[i] -= a * ra[i]
        p += 1


@numba.njit(fastmath=FAST, error_model="numpy")
def subtract_two_rows(rows: Array, at: int, out: Array, below: Array) -> None:
    """`subtract_row` at `at` for `out` and at `at` + 1 for `below`, which is one shorter: `rows` are read once."""
    n, p = len(below), 0
    first, rest = 0.0, out[1:]
    for k in range(len(rows)):
        first += rows[k, at] * rows[k, at]
    out[0] -= first
    while p + 4 <= len(rows):
        a, b, c, d = rows[p, at], rows[p + 1, at], rows[p + 2, at], rows[p + 3, at]
        e, f, g, h = rows[p, at + 1], rows[p + 1, at + 1], rows[p + 2, at + 1], rows[p + 3, at + 1]
        ra, rb, rc, rd = rows[p, at + 1 :], rows[p + 1, at + 1 :], rows[p + 2, at + 1 :], rows[p + 3, at + 1 :]
        for i in range(n):
            rest[i] -= a * ra[i] + b * rb[i] + c * rc[i] + d * rd[i]
            below[i] -= e * ra[i] + f * rb[i] + g * rc[i] + h * rd[i]
        p += 4
    while p < len(rows):
        a, e, ra = rows[p, at], rows[p, at + 1], rows[p, at + 1 :]
        for i in range(n):
            rest[i] -= a * ra[i]
            below[i] -= e * ra[i]
        p += 1


@numba.njit(fastmath=FAST, error_model="numpy")
def factor_rows(panel: Array, low: int, high: int) -> int:
    """Make the rows low..high-1 rows of the factor; those before have been subtracted. The bad column, or -1."""
    height = panel.shape[1]
    for k in range(low, high):
        row = panel[k, k:]
        subtract_row(panel[low:k], k, row)
        if not row[0] > 0.0:
            return k
        row[0] = np.sqrt(row[0])
        scale = 1.0 / row[0]
        for i in range(1, height - k):
            row[i] *= scale
    return -1


@numba.njit
def subtract_square(call: Call, rows: Array, at: int, out: Array, count: int, part: int, parts: int) -> None:
    """The upper triangle of out[:count] -= rows[:, at : at + count].T @ rows[:, at:], `TILE` rows at a time: one tile
    in `parts`."""
    width = rows.shape[1] - at
    for low in range(part * TILE, count, parts * TILE):
        size = (min(TILE, count - low), width - low)
        subtract_product(call, rows, at + low, at + low, out[low:, low:], size)


@numba.njit
def factor_partly(call: Call, panel: Array, update: Array) -> int:
    """Partial Cholesky of one front in place: panel = R [I, X], update -= X^T X. The bad column, or -1."""
    columns, height = panel.shape
    m = height - columns
    if columns * height < SMALL:
        bad = factor_rows(panel, 0, columns)
        if bad < 0:
            for k in range(0, m - 1, 2):
                subtract_two_rows(panel, columns + k, update[k, k:], update[k + 1, k + 1 :])
            if m % 2:
                subtract_row(panel, height - 1, update[m - 1, m - 1 :])
        return bad
    if columns > 2 * TILE:
        return factor_together(panel, update, 0, 1, 0)
    for low in range(0, columns, BLOCK):
        high = min(low + BLOCK, columns)
        bad = factor_rows(panel, low, high)
        if bad >= 0:
            return bad
        subtract_square(call, panel[low:high], high, panel[high:, high:], columns - high, 0, 1)
    subtract_square(call, panel, columns, update, m, 0, 1)
    return -1


@numba.njit
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
    call = blas_call()
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
        panel[:] = 0.0
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
                relative[at_row[held] : at_row[held] + size], square, update, 0, 1,
            )  # fmt: skip
        bad = factor_partly(call, square, update)
        if bad >= 0:
            return column + bad
        if s + 1 < fronts and low < top:
            for k in range(m):
                stack[low + k * m + k : low + k * m + m] = update[k, k:]
        sizes[held], at_row[held] = m, row
        held += 1
        top = low + m * m
        row += m
        column += c
    return -1


def refuse_branch(column: int, _values: Any, guide: Any, *_: Any) -> None:
    """Say which pivot it is."""
    index = guide.numpy()
    refuse(column - 1, int(index[4 : 4 + 4 * int(index[0]) : 4].sum()))


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
    before = blas_threads(1)
    bad = branch_kernel(flat(tensors, 0, np.float64), guide, stack, panels, out)
    blas_threads(before)
    return bad + 1


def refuse_front(column: int, _values: Any, guide: Any, *_: Any) -> None:
    """Say which pivot it is."""
    refuse(column - 1, int(guide[0]))


@numba.njit(fastmath=FAST, error_model="numpy")
def finish_rows(call: Call, panel: Array, low: int, high: int, begin: int, end: int) -> None:
    """Rows low..high-1 of the factor in the columns begin..end-1, where the columns low..high-1 are done."""
    n = end - begin
    for first in range(low, high, WIDE_BLOCK):
        last = min(first + WIDE_BLOCK, high)
        if first > low:
            subtract_product(call, panel[low:first], first, begin, panel[first:, begin:], (last - first, n))
        for k in range(first, last):
            row, scale = panel[k, begin:end], 1.0 / panel[k, k]
            for p in range(first, k):
                a, above = panel[p, k], panel[p, begin:end]
                for i in range(n):
                    row[i] -= a * above[i]
            for i in range(n):
                row[i] *= scale


@numba.njit
def assemble_part(tensors: Any, panel: Array, update: Array, part: int, parts: int) -> None:
    """The matrix's own entries and the children's updates: one row of the front in `parts`."""
    values, guide = flat(tensors, 0, np.float64), flat(tensors, 1, np.int32)
    children, given, height = np.int64(guide[2]), np.int64(guide[3]), panel.shape[1]
    panel[part::parts] = 0.0
    update[(part - len(panel)) % parts :: parts] = 0.0  # rows of the front after those of the panel
    for k in range(given):
        row = guide[4 + given + k] // height
        if row % parts == part:
            panel[row, guide[4 + given + k] - row * height] = values[guide[4 + k]]
    at = 4 + 2 * given
    for k in range(children):
        child = flat(tensors, 2 + k, np.float64)
        size = np.int64(np.sqrt(float(len(child))))
        extend_add(child.reshape(size, size), guide[at : at + size], panel, update, part, parts)
        at += size


@numba.njit
def factor_together(panel: Array, update: Array, part: int, parts: int, team: Any) -> int:
    """`factor_partly` by all threads of a lane: each has some columns, then some tiles. The rows of the next block are
    the first tile, which is part 0's, so that it goes on with them while the others end theirs."""
    columns, height = panel.shape
    call = blas_call()
    for low in range(0, columns, TILE):
        high = min(low + TILE, columns)
        if part == 0:
            factor_rows(panel[:, :high], low, high)
        barrier(team)
        for k in range(low, high):
            if not panel[k, k] > 0.0:
                return k
        share = -(-(height - high) // parts)
        begin = min(high + part * share, height)
        finish_rows(call, panel, low, high, begin, min(begin + share, height))
        barrier(team)
        subtract_square(call, panel[low:high], high, panel[high:, high:], columns - high, part, parts)
    subtract_square(call, panel, columns, update, height - columns, part, parts)
    return -1


@native(refuse_front, wide=True)
def factor_front(tensors: Any, count: Any, part: Any, parts: Any, team: Any) -> int:
    """A custom op of (values, guide, *updates of children, panel, update if there is one): one front, on all threads of
    the lane. The guide: columns, rows below, children, values; sources; targets; relative rows."""
    guide = flat(tensors, 1, np.int32)
    columns, below, children = np.int64(guide[0]), np.int64(guide[1]), np.int64(guide[2])
    flat_panel = flat(tensors, 2 + children, np.float64)
    flat_update = flat(tensors, 3 + children, np.float64) if below else flat_panel[:0]
    panel, update = flat_panel.reshape(columns, columns + below), flat_update.reshape(below, below)
    assemble_part(tensors, panel, update, part, parts)
    barrier(team)
    before = blas_threads(1)
    if parts == 1:
        bad = factor_partly(blas_call(), panel, update)
    else:
        bad = factor_together(panel, update, part, parts, team)
    blas_threads(before)
    return bad + 1


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
