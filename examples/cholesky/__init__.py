"""Sparse Cholesky as a task graph: order, analyse, declare once by pattern, plan, capture, replay for new values."""

from .errors import MatrixError, NotPositiveDefiniteError
from .factor import Factor
from .ordering import grid_dissection, minimum_degree
from .symbolic import Symbolic, analyse

__all__ = [
    "Factor",
    "MatrixError",
    "NotPositiveDefiniteError",
    "Symbolic",
    "analyse",
    "grid_dissection",
    "minimum_degree",
]
