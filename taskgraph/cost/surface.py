"""Corrections: a sum of small multilinear tables over named features of a shape, in the log of time.

What a formula leaves out (which kernel a library picks, its pipeline depth, a tail wave) is smooth in few numbers.
A Term is a table over up to three features with evenly spaced knots; between knots it is linear, beyond them constant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from taskgraph.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Axis:
    """Knots at low, low + step, ..., `count` of them (two at least), on one feature."""

    feature: str
    low: float
    step: float
    count: int

    def __post_init__(self) -> None:
        if self.count < 2 or self.step <= 0:
            raise CalibrationError(f"axis {self.feature!r} of a correction needs two knots or more, step > 0 apart.")


Term = tuple[Axis, ...]
"""Its table is one list of values: the knots of the first axis lie side by side, those of the last farthest apart."""


def sizes_of(terms: Sequence[Term]) -> list[int]:
    """The number of table entries of every term."""
    return [prod(axis.count for axis in term) for term in terms]


_AXES = 3
"""Axes of a term at most."""
CORNERS = 1 << _AXES
"""Entries of a term's table about a point."""
_CORNERS = np.arange(CORNERS)
_FAR = 1e300
"""Where the axes that a term has not begin: every point lies before them, on their first knot."""


def corners(features: Mapping[str, np.ndarray], terms: Sequence[Term]) -> tuple[np.ndarray, np.ndarray]:
    """(index, weight), each (terms * 8, n): the entries of every term's table around n points, two an axis, and their
    multilinear weights. Indices count through the tables of all terms, one after another."""
    names = list(features)
    knots = np.tile([0.0, _FAR, 1.0, 1.0, 0.0], (len(terms), _AXES, 1))  # feature, low, step, last knot, stride
    for term, rows in zip(terms, knots, strict=True):
        stride = 1
        for axis, row in zip(term, rows, strict=False):  # a term may have fewer axes
            row[:] = (names.index(axis.feature), axis.low, axis.step, axis.count - 1, stride)
            stride *= axis.count
    which, low, step, last, stride_of = np.moveaxis(knots, -1, 0)[..., None]  # (terms, axes, 1) each
    values = np.stack([np.asarray(features[name], np.float64) for name in names])[which[..., 0].astype(np.int64)]
    place = np.clip((values - low) / step, 0.0, last)
    below = np.minimum(np.floor(place), last - 1.0)
    part = place - below
    index = (np.cumsum([0, *sizes_of(terms)])[:-1, None] + (stride_of * below).sum(axis=1)).astype(np.int64)
    weight, shape = np.ones((1, 1, 1)), (len(terms) * len(_CORNERS), values.shape[-1])
    at = index[:, None, :]
    for d in range(_AXES):
        up = (_CORNERS >> d & 1)[None, :, None]
        weight = weight * np.where(up, part[:, d, None, :], 1.0 - part[:, d, None, :])
        at = at + up * stride_of[:, d, None, :].astype(np.int64)
    return at.reshape(shape), weight.reshape(shape)


def corrections(features: Mapping[str, np.ndarray], terms: Sequence[Term], values: np.ndarray) -> np.ndarray:
    """The sum of all terms (one at least) at every point (n,); `values` are those of all tables, one after another."""
    index, weight = corners(features, terms)
    made: np.ndarray = np.add.accumulate(weight * values[index])[-1]  # one by one: a sum's order is part of its value
    return made
