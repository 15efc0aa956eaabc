"""What a matrix can be wrong in."""

from taskgraph import TaskgraphError


class MatrixError(TaskgraphError, ValueError):
    """The matrix or the vector is not what the factorisation takes."""


class NotPositiveDefiniteError(TaskgraphError, ArithmeticError):
    """A pivot is not above 0, so the matrix has no Cholesky factor."""


class SingularError(NotPositiveDefiniteError):
    """A part of the matrix has no pivot left: it is singular."""


class CapacityError(TaskgraphError, OverflowError):
    """An op drew more entries than its outputs were declared for; the factor is declared anew with more room."""
