"""What both factorisations share: one pattern, one captured plan, values that are checked and replayed."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
import scipy.sparse as sp

import taskgraph as tg

from .errors import CapacityError, MatrixError, NotPositiveDefiniteError
from .symbolic import checked

Array = np.ndarray
OWN_ERRORS = (NotPositiveDefiniteError, CapacityError)


def symmetric(found: sp.csc_array) -> sp.csc_array:
    """A `checked` matrix; MatrixError unless its values are finite and symmetric."""
    if not np.isfinite(found.data).all():
        raise MatrixError("the matrix has entries that are not finite.")
    if abs(found - found.T).max() > 1e-12 * abs(found).max():
        raise MatrixError("the matrix is not symmetric in its values; give (A + A.T) / 2.")
    return found


class Replayed:
    """A graph of one pattern, planned and captured on the cpu backend. Close it, or use it in a `with`.

    `scheduler` is what `tg.plan` takes, or "autotune", which measures plans for up to `tune_s` seconds and remembers
    the fastest. Plans are priced by the op times that were measured here before.
    """

    def __init__(self, pattern: sp.csc_array, scheduler: str, tune_s: float) -> None:
        self.pattern = pattern
        self._scheduler, self._tune_s = scheduler, tune_s
        self._factored = False

    def capture(self, graph: tg.Graph, tensors: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Plan and capture; `tensors` and `outputs` are bound where they are."""
        self.graph, self.tensors = graph, {**tensors, **outputs}
        if self._scheduler == "autotune":
            plan = tg.autotune(graph, "cpu", self._tune_s, tensors=tensors).plan
        else:
            plan = tg.plan(graph, "cpu", scheduler=self._scheduler, costs=tg.costs_known("cpu"))
        self._capture(plan)

    def _capture(self, plan: tg.Plan) -> None:
        self.plan, self._factored = plan, False
        self.executable = tg.compile(self.graph, plan, backend="cpu")
        self.executable.bind(self.tensors)

    def replan(self, plan: tg.Plan) -> None:
        """Run by another plan of the same graph from now on; there is no factor until the next replay."""
        self.executable.close()
        self._capture(plan)

    def taken(self, matrix: sp.sparray) -> sp.csc_array:
        """The matrix as canonical CSC; MatrixError unless it has the pattern of the first and is symmetric."""
        found = checked(matrix)
        same = np.array_equal(found.indptr, self.pattern.indptr) and np.array_equal(found.indices, self.pattern.indices)
        if not same:
            raise MatrixError("the matrix has another pattern; make a factorisation of it.")
        return symmetric(found)

    def replay(self) -> None:
        """Factorise what the bound values are."""
        self._factored = False
        try:
            self.executable.launch()
        except tg.ExecutionError as error:
            if isinstance(error.__cause__, OWN_ERRORS):
                raise type(error.__cause__)(f"op {error.op!r}: {error.__cause__}") from error
            raise
        self._factored = True

    def right_hand_side(self, rhs: Array, unknowns: int) -> Array:
        """f64[unknowns]; MatrixError for another shape, or while there is no factor."""
        if not self._factored:
            raise MatrixError("there is no factor yet; call refactor(matrix) first.")
        rhs = np.asarray(rhs, np.float64)
        if rhs.shape != (unknowns,):
            raise MatrixError(f"the right-hand side has shape {rhs.shape}; the matrix takes {(unknowns,)}.")
        return rhs

    def close(self) -> None:
        """Stop the lanes."""
        self.executable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
