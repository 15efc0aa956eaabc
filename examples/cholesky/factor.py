"""The task graph of a pattern, and an executable factorisation that is replayed for new values."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

import taskgraph as tg

from .errors import MatrixError, SingularError
from .kernels import factor_branch, factor_front, least_pivot, solve_factored
from .replayed import Replayed
from .symbolic import Symbolic, analyse, checked

Array = np.ndarray
DENSE_FLOPS = 1e6  # of a front from which on torch's products are worth their calls
BRANCH_EFFICIENCY, FRONT_EFFICIENCY = 0.045, 0.15
"""Shares of the device's rate that flops reach: 4.5 GFLOP/s of a core of 95 in branches, about 28 of 200 in fronts
(measured in CPU time on an AMD EPYC). Times that autotune measured win over them."""


class Piece(NamedTuple):
    """What one op eliminates: the fronts begin..end-1 in postorder; `children` are what its first front waits for."""

    begin: int
    end: int
    children: tuple[int, ...]


def pieces(parent: Array, cost: Array, grain: float) -> list[Piece]:
    """Subtrees that cost up to `grain` whole, and above them chains of up to as much; children before parents.

    `parent` i64[fronts] is a postordered forest, `cost` f64[fronts]. A front that costs more is an op of its own.
    """
    total, size = cost.copy(), np.ones(len(cost), np.int64)
    children: list[list[int]] = [[] for _ in size]
    for s, above in enumerate(parent.tolist()):
        if above >= 0:
            total[above] += total[s]
            size[above] += size[s]
            children[above].append(s)
    small = total <= grain
    above_small = np.where(parent >= 0, small[parent], False)
    found: list[Piece] = []
    held = 0.0
    for s in np.flatnonzero(~small | ~above_small).tolist():
        mine = float(total[s] if small[s] else cost[s])
        if found and children[s] == [found[-1].end - 1] and held + mine <= grain:
            found[-1] = found[-1]._replace(end=s + 1)
            held += mine
            continue
        held = mine
        found.append(Piece(s - int(size[s]) + 1, s + 1, ()) if small[s] else Piece(s, s + 1, tuple(children[s])))
    return found


def branch_guide(symbolic: Symbolic, piece: Piece) -> Array:
    """What `factor_branch` reads; see `branch_kernel`."""
    here = slice(piece.begin, piece.end)
    columns, below = symbolic.columns[here], symbolic.below[here]
    popped = np.bincount(symbolic.parent[piece.begin : piece.end - 1] - piece.begin, minlength=len(columns))
    popped[0] += len(piece.children)
    outside = symbolic.below[list(piece.children)]
    stack = (outside * outside).tolist()
    most = depth = sum(stack)
    inner = (below * below)[:-1]  # the last update goes to the op's output
    for square, count in zip(inner.tolist(), popped[:-1].tolist(), strict=True):
        most = max(most, depth + square)
        for _child in range(count):
            depth -= stack.pop()
        stack.append(square)
        depth += square
    a, z = symbolic.value_at[piece.begin], symbolic.value_at[piece.end]
    counts = np.diff(symbolic.value_at[piece.begin : piece.end + 1])
    parts = [
        np.array([len(columns), max(most, 1), z - a, len(outside)]),
        np.stack([columns, below, counts, popped], 1).ravel(),
        outside,
        symbolic.source[a:z],
        symbolic.target[a:z],
        *(symbolic.relative[symbolic.row_at[c] : symbolic.row_at[c + 1]] for c in piece.children),
        symbolic.relative[symbolic.row_at[piece.begin] : symbolic.row_at[piece.end]],
    ]
    return np.concatenate(parts).astype(np.int32)


def front_guide(symbolic: Symbolic, piece: Piece) -> Array:
    """What `factor_front` reads."""
    front = piece.begin
    a, z = symbolic.value_at[front], symbolic.value_at[front + 1]
    head = np.array([symbolic.columns[front], symbolic.below[front], len(piece.children), z - a])
    rows = [symbolic.relative[symbolic.row_at[c] : symbolic.row_at[c + 1]] for c in piece.children]
    return np.concatenate([head, symbolic.source[a:z], symbolic.target[a:z], *rows]).astype(np.int32)


class Declared(NamedTuple):
    """A graph, the values of its weights, and where each of its outputs lies in the factor."""

    graph: tg.Graph
    weights: dict[str, Array]
    panels: dict[str, slice]


def declare(symbolic: Symbolic, values: int, grain_flops: float, dense_flops: float = DENSE_FLOPS) -> Declared:
    """One op a piece, one edge a child; `values` is how many entries the matrix has. What the pattern says is a weight.

    Branches of small fronts run on one core, which their Demand says, with their stack in the arena; a front of more
    than `grain_flops` and `dense_flops` runs on all cores of its lane.
    """
    b = tg.GraphBuilder("cholesky")
    given = b.input("values", (values,), "f64")
    weights: dict[str, Array] = {}
    panels: dict[str, slice] = {}
    updates: dict[int, tg.Value] = {}
    outputs: list[tg.Value] = []
    below = symbolic.below
    for piece in pieces(symbolic.parent, symbolic.flops, grain_flops):
        root, dense = piece.end - 1, bool(symbolic.flops[piece.begin] > max(grain_flops, dense_flops))
        guide = front_guide(symbolic, piece) if dense else branch_guide(symbolic, piece)
        place = slice(int(symbolic.panel_at[piece.begin]), int(symbolic.panel_at[piece.end]))
        m, size = int(below[root]), place.stop - place.start
        stack = [] if dense else [tg.spec(f"stack.{root}", (int(guide[1]),), "f64")]
        outs = [*stack, tg.spec(f"panel.{root}", (size,), "f64")]
        if m:
            outs.append(tg.spec(f"update.{root}", (m, m), "f64"))
        moved = 8.0 * (2 * size + m * m + sum(int(below[c]) ** 2 for c in piece.children))
        weight = b.weight(f"guide.{root}", guide.shape, "i32")
        result = b.call(
            factor_front if dense else factor_branch,
            [given, weight, *(updates.pop(c) for c in piece.children)],
            outs,
            work=tg.Work(flops=float(symbolic.flops[piece.begin : piece.end].sum()), hbm_bytes=moved),
            demand=tg.demand(efficiency=FRONT_EFFICIENCY) if dense else tg.demand((1, 1), efficiency=BRANCH_EFFICIENCY),
            name=f"{'front' if dense else 'branch'}.{root}",
        )
        made = list(result) if isinstance(result, tuple) else [result]
        outputs.append(made[len(stack)])
        if m:
            updates[root] = made[-1]
        weights[f"guide.{root}"], panels[f"panel.{root}"] = guide, place
    b.output(*outputs)
    return Declared(b.build(), weights, panels)


def default_grain(symbolic: Symbolic) -> float:
    """Flops of an op: a fortieth of all, so that lanes can be even; not less than the cost of an op is worth."""
    return float(np.clip(symbolic.flops.sum() / 40, 3e5, 2e7))


class Factor(Replayed):
    """A Cholesky factorisation of one pattern, captured on the cpu backend. Close it, or use it in a `with`.

    `order` is that of elimination (see `ordering`). Subtrees of up to `grain_flops` are one op (see `default_grain`).
    `scheduler` and `tune_s` are as in `Replayed`. A front of more than `grain_flops` and `dense_flops` is one op of
    torch's BLAS. MatrixError for a matrix that is not symmetric; NotPositiveDefiniteError from `refactor`.
    """

    def __init__(
        self,
        matrix: sp.sparray,
        order: Array,
        *,
        grain_flops: float | None = None,
        scheduler: str = "auto",
        tune_s: float = 20.0,
        dense_flops: float = DENSE_FLOPS,
    ) -> None:
        found = checked(matrix)
        super().__init__(found, scheduler, tune_s)
        self.symbolic = analyse(found, order)
        grain = default_grain(self.symbolic) if grain_flops is None else grain_flops
        if not grain >= 0.0:
            raise MatrixError(f"grain_flops is {grain}; it must be 0 (every front an op) or more.")
        graph, weights, panels = declare(self.symbolic, found.nnz, grain, dense_flops)
        self.factor = np.empty(int(self.symbolic.panel_at[-1]))
        self.values = found.data.copy()
        outputs = {name: self.factor[place] for name, place in panels.items()}
        self.capture(graph, {"values": self.values, **weights}, outputs)

    def refactor(self, matrix: sp.sparray) -> None:
        """Replay for the values of `matrix`, which has the pattern of the first and is symmetric.

        NotPositiveDefiniteError where a pivot is not above 0; SingularError, which is one too, where a pivot is nothing
        but the rounding of what cancelled."""
        found = self.taken(matrix)
        self.values[:] = found.data
        self.replay()
        s = self.symbolic
        share, column = least_pivot(s.first, s.row_at, s.panel_at, self.factor, found.diagonal()[s.order])
        if share < 10.0 * np.finfo(np.float64).eps * len(s.order) ** 0.5:
            self._factored = False
            raise SingularError(
                f"the pivot of unknown {s.order[column]} is {share:.0e} of its diagonal entry: to working precision "
                "the matrix is singular. Fix one unknown of each part that floats, or add a little of the identity."
            )

    def solve(self, rhs: Array) -> Array:
        """x of A x = rhs, f64[n]."""
        s = self.symbolic
        inner = self.right_hand_side(rhs, len(s.order))[s.order]
        solve_factored(s.first, s.row_at, s.rows, s.panel_at, self.factor, inner)
        result = np.empty_like(inner)
        result[s.order] = inner
        return result
