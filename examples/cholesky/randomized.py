"""Randomized Cholesky within the elimination tree: the graph, its replay, and what it preconditions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

import taskgraph as tg

from .errors import CapacityError, MatrixError
from .factor import Piece, pieces
from .replayed import Replayed, symmetric
from .sampling import FULL, eliminate, refuse_singular, sample_branch, solve_lower
from .symbolic import Ordered, checked, ordered

Array = np.ndarray
FLOPS_AN_ENTRY, EFFICIENCY = 60.0, 0.01
"""Of an entry of the factor, drawn and sorted, and the share of a core's peak: 60 ns on a core of 100 GFLOP/s. Measured
times win over it."""


class Counts(NamedTuple):
    """What one elimination of each piece made, piece by piece: entries of the factor, and edges that went on."""

    entries: list[int]
    edges: list[int]


def excess(matrix: sp.csc_array) -> Array:
    """By how much each diagonal entry exceeds the others of its row, f64[n], rounding taken for none.

    MatrixError unless the matrix is an M-matrix with a dominant diagonal."""
    diagonal = matrix.diagonal()
    beside = matrix - sp.diags_array(diagonal)
    if beside.nnz and beside.max() > 0.0:
        raise MatrixError(
            "randomized Cholesky takes matrices whose entries beside the diagonal are not above 0; this one has "
            f"{beside.max():g}. Use Factor, which is exact."
        )
    rest = diagonal + np.asarray(beside.sum(axis=1)).ravel()
    worst = int(np.argmin(rest - 1e-12 * diagonal))
    if rest[worst] < -1e-12 * abs(diagonal[worst]) or diagonal[worst] < 0.0:
        raise MatrixError(
            f"row {worst} has the diagonal {diagonal[worst]:g}, which is {-rest[worst]:g} less than the others of "
            "the row together; randomized Cholesky takes diagonally dominant matrices. Use Factor, which is exact."
        )
    return np.where(rest > 1e-14 * diagonal, rest, 0.0)


def piece_guide(found: Ordered, piece_begin: int, piece_end: int) -> Array:
    """What `eliminate` reads of the vertices begin..end-1."""
    inner = found.inner
    a, z = inner.indptr[piece_begin], inner.indptr[piece_end]
    rows, places = inner.indices[a:z], inner.data[a:z]
    columns = np.repeat(np.arange(piece_begin, piece_end), np.diff(inner.indptr[piece_begin : piece_end + 1]))
    later = rows > columns
    starts = np.concatenate(
        [[0], np.cumsum(np.bincount(columns[later] - piece_begin, minlength=piece_end - piece_begin))]
    )
    head = [piece_begin, piece_end, inner.shape[0], int(later.sum())]
    return np.concatenate([head, starts, rows[later], places[later]]).astype(np.int32)


def tried(found: Ordered, parts: Sequence[Piece], guides: Sequence[Array], given: tuple[Array, Array, Array]) -> Counts:
    """Eliminate once outside any graph, to know how many entries there are: outputs of ops have a fixed size."""
    counts = Counts([], [])
    waiting: dict[int, tuple[Array, Array]] = {}
    for piece, guide in zip(parts, guides, strict=True):
        children = [waiting.pop(child) for child in piece.children]
        edges = np.concatenate([c[0] for c in children] or [np.empty((0, 2), np.int32)])
        weights = np.concatenate([c[1] for c in children] or [np.empty(0)])
        columns = slice(guide[0], guide[1])
        room, most = int(guide[3]) + int(guide[1] - guide[0]) + len(weights), int(found.counts[columns].sum())
        made = (np.empty(guide[1] - guide[0] + 1, np.int32), np.empty(most, np.int32), np.empty(most))
        left = (np.empty((room, 2), np.int32), np.empty(room))
        going = eliminate(guide, given, edges, weights, made, left)
        refuse_singular(going)
        assert going != FULL
        counts.entries.append(int(made[0][-1]))
        counts.edges.append(going)
        waiting[piece.end - 1] = (left[0][:going].copy(), left[1][:going].copy())
    return counts


class Randomized(Replayed):
    """RCHOL (Chen, Liang, Biros 2021) of one pattern: A is about G G^T, a preconditioner for conjugate gradients.

    For diagonally dominant matrices without positive entries beside the diagonal (Laplacians with a boundary). Subtrees
    of the elimination tree of `order` of up to `grain` entries are one op, separators come after their children. `G` is
    the same, bit for bit, for a `seed`, whatever the grain and the lanes. `scheduler`, `tune_s`: see `Replayed`.
    MatrixError for other matrices, SingularError where a part has no boundary.
    """

    def __init__(
        self,
        matrix: sp.sparray,
        order: Array,
        *,
        seed: int = 0,
        grain: float | None = None,
        scheduler: str = "auto",
        tune_s: float = 20.0,
    ) -> None:
        found = symmetric(checked(matrix))
        super().__init__(found, scheduler, tune_s)
        self.ordered = ordered(found, order)
        if not 0 <= seed < 1 << 62:
            raise MatrixError(f"seed is {seed}; it must be from 0 to 2**62 - 1.")
        self.seed = np.array([seed], np.int64)
        first = self.ordered.first
        front_of = np.repeat(np.arange(len(first) - 1), np.diff(first))
        above = self.ordered.tree[first[1:] - 1]
        parent = np.where(above >= 0, front_of[above], -1)
        own = np.diff(self.ordered.inner.indptr[first]).astype(np.float64)
        if grain is None:
            grain = float(np.clip(own.sum() / 40, 2e4, 1e6))
        if not grain >= 0:
            raise MatrixError(f"grain is {grain}; it must be 0 (every front an op) or more.")
        parts = pieces(parent, own, grain)
        self._parts = [
            Piece(int(first[p.begin]), int(first[p.end]), tuple(int(first[c + 1]) - 1 for c in p.children))
            for p in parts
        ]
        self._guides = [piece_guide(self.ordered, p.begin, p.end) for p in self._parts]
        self.values, self.excess = np.empty(found.nnz), np.empty(found.shape[0])
        self._declare(found)

    def _declare(self, found: sp.csc_array) -> None:
        """A graph with room for what these values make, and a quarter more."""
        self.values[:], self.excess[:] = found.data, excess(found)[self.ordered.order]
        counts = tried(self.ordered, self._parts, self._guides, (self.values, self.excess, self.seed))
        b = tg.GraphBuilder("randomized-cholesky")
        n = len(self.excess)
        shared = [
            b.input("values", (len(self.values),), "f64"),
            b.input("excess", (n,), "f64"),
            b.input("seed", (1,), "i64"),
        ]
        tensors = {"values": self.values, "excess": self.excess, "seed": self.seed}
        self._made: list[tuple[Array, Array, Array]] = []
        outputs: dict[str, Array] = {}
        waiting: dict[int, tuple[tg.Value, tg.Value]] = {}
        results: list[tg.Value] = []
        for piece, guide, entries, going in zip(self._parts, self._guides, *counts, strict=True):
            k = piece.end - 1
            most, edges = entries + entries // 4 + 16, going + going // 4 + 17
            specs = [
                tg.spec(f"starts.{k}", (piece.end - piece.begin + 1,), "i32"),
                tg.spec(f"rows.{k}", (most,), "i32"),
                tg.spec(f"entries.{k}", (most,), "f64"),
            ]
            if going:
                specs += [tg.spec(f"edges.{k}", (edges, 2), "i32"), tg.spec(f"weights.{k}", (edges,), "f64")]
            weight = b.weight(f"guide.{k}", guide.shape, "i32")
            children = [each for c in piece.children for each in waiting.pop(c, ())]
            made = b.call(
                sample_branch,
                [*shared, weight, *children],
                specs,
                work=tg.Work(flops=FLOPS_AN_ENTRY * entries, hbm_bytes=12.0 * entries + 16.0 * going),
                demand=tg.demand(sm=(1, 1), efficiency=EFFICIENCY),
                name=f"sample.{k}",
            )
            tensors[f"guide.{k}"] = guide
            arrays = (np.zeros(piece.end - piece.begin + 1, np.int32), np.zeros(most, np.int32), np.zeros(most))
            self._made.append(arrays)
            outputs |= dict(zip((s.name for s in specs[:3]), arrays, strict=True))
            results += made[:3]
            if going:
                waiting[k] = (made[3], made[4])
        b.output(*results)
        self.capture(b.build(), tensors, outputs)

    def refactor(self, matrix: sp.sparray) -> None:
        """Replay for the values of `matrix`, which has the pattern of the first; declared anew where they make more
        entries than there is room for."""
        found = self.taken(matrix)
        self.values[:], self.excess[:] = found.data, excess(found)[self.ordered.order]
        try:
            self.replay()
        except CapacityError:
            self.close()
            self._declare(found)
            self.replay()
        self._collect()

    def _collect(self) -> None:
        """The columns of all pieces in one."""
        ends = [int(starts[-1]) for starts, _, _ in self._made]
        base = np.concatenate([[0], np.cumsum(ends)])
        parts = [starts[:-1] + low for (starts, _, _), low in zip(self._made, base, strict=False)]
        self.starts = np.concatenate([*parts, base[-1:]])
        self.rows = np.concatenate([rows[:end] for (_, rows, _), end in zip(self._made, ends, strict=True)])
        self.entries = np.concatenate([entries[:end] for (_, _, entries), end in zip(self._made, ends, strict=True)])

    def apply(self, residual: Array) -> Array:
        """(G G^T)^-1 residual, f64[n]: the preconditioner."""
        order = self.ordered.order
        inner = self.right_hand_side(residual, len(order))[order]
        solve_lower(self.starts, self.rows, self.entries, inner)
        result = np.empty_like(inner)
        result[order] = inner
        return result

    def lower(self) -> sp.csc_array:
        """G, its rows and columns in the order of elimination."""
        self.right_hand_side(np.zeros(len(self.excess)), len(self.excess))
        return sp.csc_array((self.entries, self.rows, self.starts), shape=(len(self.excess),) * 2)
