"""Sparse Cholesky as a task graph: order, analyse, declare once by pattern, plan, capture, replay for new values."""

from .errors import CapacityError, MatrixError, NotPositiveDefiniteError, SingularError
from .factor import Factor
from .gradients import Solved, conjugate_gradients
from .ordering import approximate_minimum_degree, fill_reducing, grid_dissection, metis, minimum_degree
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
    "approximate_minimum_degree",
    "conjugate_gradients",
    "fill_reducing",
    "grid_dissection",
    "metis",
    "minimum_degree",
]
