"""Sparse Cholesky as a task graph: order, analyse, declare once by pattern, plan, capture, replay for new values."""

from .errors import CapacityError, MatrixError, NotPositiveDefiniteError, SingularError
from .factor import Factor
from .gradients import Solved, conjugate_gradients
from .ordering import grid_dissection, minimum_degree
from .randomized import Randomized
from .symbolic import Symbolic, analyse

__all__ = [
    "CapacityError",
    "Factor",
    "MatrixError",
    "NotPositiveDefiniteError",
    "Randomized",
    "SingularError",
    "Solved",
    "Symbolic",
    "analyse",
    "conjugate_gradients",
    "grid_dissection",
    "minimum_degree",
]
