"""Randomized Cholesky's numbers: elimination with sampled cliques in numba, and the triangular solves.

A matrix with no positive entry beside its diagonal, and a diagonal that is not less than the sum of the others of its
row, is a graph: an edge of weight -a[i, j] between unknowns, and one of the diagonal's excess to the ground, vertex n.
Exact elimination of a vertex joins its neighbours to a clique; RCHOL (Chen, Liang, Biros 2021) draws a tree of it that
has the clique as its expectation. So edges never grow in number.
"""

from typing import Any

import numba
import numpy as np

from .errors import CapacityError, SingularError

Array = np.ndarray
FULL, SINGULAR = -2, -3


@numba.njit(cache=True, inline="always")
def mixed(x: Any) -> Any:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True)
def sort_pairs(first: Array, second: Array, count: int) -> None:
    """Sort the first `count` pairs in place, by `first`, then by `second`: Shell sort (gaps of Ciura 2001)."""
    for gap in (3499, 1577, 701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, count):
            a, b, j = first[i], second[i], i
            while j >= gap and (first[j - gap] > a or (first[j - gap] == a and second[j - gap] > b)):
                first[j], second[j] = first[j - gap], second[j - gap]
                j -= gap
            first[j], second[j] = a, b


@numba.njit(cache=True, nogil=True)
def gather(vertex: int, head: Array, after: Array, other: Array, weight: Array, near: Array, pull: Array) -> int:
    """Take the edges of a vertex out of their list: neighbours ascending in `near`, summed weights in `pull`. A sum has
    one order, whatever the order in which edges came."""
    count, edge = 0, head[vertex]
    while edge >= 0:
        near[count], pull[count] = other[edge], weight[edge]
        count += 1
        edge = after[edge]
    sort_pairs(near, pull, count)
    kept = 0
    for i in range(count):
        if kept and near[kept - 1] == near[i]:
            pull[kept - 1] += pull[i]
        else:
            near[kept], pull[kept] = near[i], pull[i]
            kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def eliminate(
    guide: Array, given: tuple[Array, Array, Array], edges: Array, weights: Array, made: tuple[Array, Array, Array],
    left: tuple[Array, Array],
) -> int:  # fmt: skip
    """Eliminate the vertices begin..end-1 of one op. The number of edges that go on, or FULL, or SINGULAR - vertex.

    guide: begin, end, n, own edges; where the edges of each vertex begin; their other ends; their places among the
    values. given: (values of the matrix, excess of every vertex, seed). `edges` i32[k, 2] and `weights` f64[k] come
    from the children. made: (starts i32[end - begin + 1], rows, values) of the columns of G, the diagonal first. left:
    (edges, weights) for the parent.
    """
    begin, end, n, count = guide[0], guide[1], guide[2], guide[3]
    starts, rest = guide[4 : 5 + end - begin], guide[5 + end - begin :]
    values, excess, seed = given
    room = count + (end - begin) + len(weights)
    head, after = np.full(end - begin, -1), np.empty(room, np.int64)
    other, weight = np.empty(room, np.int64), np.empty(room)
    near, pull, total = np.empty(room, np.int64), np.empty(room), np.empty(room + 1)
    used, going = 0, 0
    for v in range(end - begin):
        for place in range(starts[v], starts[v + 1]):
            w = -values[rest[count + place]]
            if w > 0.0:
                other[used], weight[used], after[used], head[v] = rest[place], w, head[v], used
                used += 1
        if excess[begin + v] > 0.0:
            other[used], weight[used], after[used], head[v] = n, excess[begin + v], head[v], used
            used += 1
    for i in range(len(weights)):
        v = edges[i, 0] - begin
        if v >= end - begin:
            if going >= len(left[1]):
                return FULL
            left[0][going, 0], left[0][going, 1], left[1][going] = edges[i, 0], edges[i, 1], weights[i]
            going += 1
        else:
            other[used], weight[used], after[used], head[v] = edges[i, 1], weights[i], head[v], used
            used += 1
    free = np.int64(-1)  # slots of edges that were taken, linked by `after`
    at = 0
    for v in range(end - begin):
        edge = head[v]
        degree = gather(v, head, after, other, weight, near, pull)
        while edge >= 0:
            following = after[edge]
            after[edge], free = free, edge
            edge = following
        diagonal = 0.0
        for i in range(degree):
            diagonal += pull[i]
        if not diagonal > 0.0:
            return SINGULAR - (begin + v)
        made[0][v] = at
        inner = degree - 1 if near[degree - 1] == n else degree
        if at + 1 + inner > len(made[1]):
            return FULL
        root = np.sqrt(diagonal)
        made[1][at], made[2][at] = begin + v, root
        for i in range(inner):
            made[1][at + 1 + i], made[2][at + 1 + i] = near[i], -pull[i] / root
        at += 1 + inner
        # the tree: each neighbour, the lightest first, is joined to a heavier one, drawn by weight
        sort_pairs(pull, near, degree)
        total[0] = 0.0
        for i in range(degree):
            total[i + 1] = total[i] + pull[i]
        state = mixed(np.uint64(seed[0]) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(begin + v + 1))
        for i in range(degree - 1):
            state += np.uint64(0x9E3779B97F4A7C15)
            drawn = float(mixed(state) >> np.uint64(11)) * 2.0**-53
            rest_of = total[degree] - total[i + 1]
            if not rest_of > 0.0:
                continue
            wanted = total[i + 1] + drawn * rest_of
            j = min(max(np.searchsorted(total[: degree + 1], wanted, side="right") - 1, i + 1), degree - 1)
            low, high = min(near[i], near[j]), max(near[i], near[j])
            heavy = rest_of * pull[i] / diagonal
            if low < end:
                edge, free = free, after[free]
                other[edge], weight[edge], after[edge], head[low - begin] = high, heavy, head[low - begin], edge
            else:
                if going >= len(left[1]):
                    return FULL
                left[0][going, 0], left[0][going, 1], left[1][going] = low, high, heavy
                going += 1
    made[0][end - begin] = at
    return going


def refuse_singular(going: int) -> None:
    """Say which pivot it is, if `eliminate` found one."""
    if going <= SINGULAR:
        raise SingularError(
            f"the pivot of column {SINGULAR - going} is 0: a connected part of the matrix has rows that all sum to 0, "
            "so it is singular. Fix one unknown of it, or add a small multiple of the identity."
        )


def sample_branch(values: Any, excess: Any, seed: Any, guide: Any, *tensors: Any) -> None:
    """A custom op of (values, excess, seed, guide, *(edges, weights) of children, starts, rows, entries[, edges,
    weights]): `eliminate`. Of the edges that go on, the first row holds their number."""
    index = guide.numpy()
    arrays = [tensor.numpy() for tensor in tensors]
    root = arrays[-2].ndim == 1  # nothing goes on
    made = arrays[-3:] if root else arrays[-5:-2]
    children = arrays[: -3 if root else -5]
    held = [int(edges[0, 0]) for edges in children[::2]]
    edges = np.concatenate(
        [e[1 : 1 + k] for e, k in zip(children[::2], held, strict=True)] or [np.empty((0, 2), np.int32)]
    )
    weights = np.concatenate([w[1 : 1 + k] for w, k in zip(children[1::2], held, strict=True)] or [np.empty(0)])
    left = (np.empty((0, 2), np.int32), np.empty(0)) if root else (arrays[-2][1:], arrays[-1][1:])
    given = (values.numpy(), excess.numpy(), seed.numpy())
    going = eliminate(index, given, edges, weights, (made[0], made[1], made[2]), left)
    if going == FULL:
        raise CapacityError("the columns of the factor hold more entries than were declared.")
    refuse_singular(going)
    for array in made[1:]:
        array[int(made[0][-1]) :] = 0
    if not root:
        arrays[-2][0], arrays[-1][0] = going, 0.0
        for array in (arrays[-2], arrays[-1]):
            array[1 + going :] = 0


@numba.njit(cache=True, nogil=True)
def solve_lower(starts: Array, rows: Array, entries: Array, x: Array) -> None:
    """Solve G G^T x = b in place; columns with the diagonal first."""
    n = len(starts) - 1
    for j in range(n):
        a = starts[j]
        y = x[j] / entries[a]
        x[j] = y
        for k in range(a + 1, starts[j + 1]):
            x[rows[k]] -= entries[k] * y
    for j in range(n - 1, -1, -1):
        a = starts[j]
        y = x[j]
        for k in range(a + 1, starts[j + 1]):
            y -= entries[k] * x[rows[k]]
        x[j] = y / entries[a]
