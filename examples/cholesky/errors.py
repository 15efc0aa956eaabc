"""What a matrix can be wrong in."""

from taskgraph import TaskgraphError


class MatrixError(TaskgraphError, ValueError):
    """The matrix or the vector is not what the factorisation takes."""


class NotPositiveDefiniteError(TaskgraphError, ArithmeticError):
    """A pivot is not above 0, so the matrix has no Cholesky factor."""
