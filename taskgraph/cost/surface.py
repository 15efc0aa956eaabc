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


def corners(features: Mapping[str, np.ndarray], term: Term) -> tuple[np.ndarray, np.ndarray]:
    """(index, weight), each (corners, n): the entries of the term's table around n points, two an axis, and their
    multilinear weights."""
    points = len(features[term[0].feature])
    index, weight = np.zeros((1, points), np.int64), np.ones((1, points))
    stride = 1
    for axis in term:
        place = np.clip((features[axis.feature] - axis.low) / axis.step, 0.0, axis.count - 1.0)
        low = np.minimum(place.astype(np.int64), axis.count - 2)
        part = place - low
        index = np.concatenate([index + stride * low, index + stride * (low + 1)])
        weight = np.concatenate([weight * (1.0 - part), weight * part])
        stride *= axis.count
    return index, weight


def corrections(
    features: Mapping[str, np.ndarray], terms: Sequence[Term], tables: Sequence[np.ndarray]
) -> np.ndarray | float:
    """The sum of all terms at every point (n,), 0 without terms; `tables` holds the values of each term."""
    total: np.ndarray | float = 0.0
    for term, table in zip(terms, tables, strict=True):
        index, weight = corners(features, term)
        for part in weight * table[index]:  # one corner after another: the order of a sum is part of its value
            total = total + part
    return total
