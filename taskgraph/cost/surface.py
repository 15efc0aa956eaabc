"""Corrections: a sum of small multilinear tables over named features of a shape, in the log of time.

What a formula leaves out (which kernel a library picks, its pipeline depth, a tail wave) is smooth in few numbers.
A Term is a table over up to three features with evenly spaced knots; between knots it is linear, beyond them constant.
All terms of a family are fitted together by penalised least absolute deviations (IRLS), so a term without data is 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.jit import njit


@dataclass(frozen=True, slots=True)
class Axis:
    """Knots at low, low + step, ..., `count` of them, on one feature."""

    feature: str
    low: float
    step: float
    count: int


Term = tuple[Axis, ...]


def sizes_of(terms: Sequence[Term]) -> list[int]:
    """The number of table entries of every term."""
    return [int(np.prod([axis.count for axis in term])) for term in terms]


def pack(terms: Sequence[Term], features: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(axes (terms, 3, 4): feature index, low, step, count; offsets (terms,) into the values) for numba."""
    axes = np.zeros((len(terms), 3, 4))
    axes[:, :, 2] = axes[:, :, 3] = 1.0
    for t, term in enumerate(terms):
        for d, axis in enumerate(term):
            axes[t, d] = (features.index(axis.feature), axis.low, axis.step, axis.count)
    return axes, np.cumsum([0, *sizes_of(terms)])[: len(terms)].astype(np.int64)


@njit
def corners(features: np.ndarray, axes: np.ndarray, offset: int, index: np.ndarray, weight: np.ndarray) -> None:
    """The eight table entries of one term around a point and their multilinear weights."""
    index[:] = offset
    weight[:] = 1.0
    stride = 1
    for d in range(3):
        count = int(axes[d, 3])
        if count > 1:
            place = (features[int(axes[d, 0])] - axes[d, 1]) / axes[d, 2]
            place = min(max(place, 0.0), count - 1.0)
            low = min(int(place), count - 2)
            part = place - low
            for corner in range(8):
                up = (corner >> d) & 1
                index[corner] += stride * (low + up)
                weight[corner] *= part if up else 1.0 - part
        else:
            for corner in range(8):
                if (corner >> d) & 1:
                    weight[corner] = 0.0
        stride *= count


@njit
def correction(features: np.ndarray, axes: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> float:
    """The sum of all terms at a point."""
    total = 0.0
    index, weight = np.empty(8, np.int64), np.empty(8)
    for t in range(len(offsets)):
        corners(features, axes[t], offsets[t], index, weight)
        for corner in range(8):
            total += weight[corner] * values[index[corner]]
    return total


@njit
def _normal_equations(
    features: np.ndarray, axes: np.ndarray, offsets: np.ndarray, wanted: np.ndarray, weights: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    matrix, vector = np.zeros((size, size)), np.zeros(size)
    terms = len(offsets)
    index, weight = np.empty(8 * terms, np.int64), np.empty(8 * terms)
    for r in range(len(wanted)):
        for t in range(terms):
            corners(features[r], axes[t], offsets[t], index[8 * t : 8 * t + 8], weight[8 * t : 8 * t + 8])
        for a in range(8 * terms):
            if weight[a] != 0.0:
                scaled = weights[r] * weight[a]
                vector[index[a]] += scaled * wanted[r]
                for b in range(8 * terms):
                    matrix[index[a], index[b]] += scaled * weight[b]
    return matrix, vector


@njit
def corrections(features: np.ndarray, axes: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`correction` of many rows."""
    out = np.empty(len(features))
    for r in range(len(features)):
        out[r] = correction(features[r], axes, offsets, values)
    return out


def fit(
    features: np.ndarray,
    wanted: np.ndarray,
    terms: Sequence[Term],
    names: Sequence[str],
    ridge: float,
    rounds: int = 12,
) -> np.ndarray:
    """Values of all terms that bring the correction near `wanted`: ridge-penalised least absolute deviations by
    iteratively reweighted least squares (Holland and Welsch 1977)."""
    axes, offsets = pack(terms, names)
    size = sum(sizes_of(terms))
    values, weights = np.zeros(size), np.ones(len(wanted))
    for _ in range(rounds):
        matrix, vector = _normal_equations(features, axes, offsets, wanted, weights, size)
        values = np.linalg.solve(matrix + ridge * np.eye(size), vector)
        error = np.abs(wanted - corrections(features, axes, offsets, values))
        weights = 1.0 / np.maximum(error, 0.01)
        weights /= weights.mean()
    return values


def to_lists(terms: Sequence[Term], values: np.ndarray) -> list[list[float]]:
    """The tables, one list a term, rounded to what matters."""
    parts = np.split(values, np.cumsum(sizes_of(terms))[:-1])
    return [[round(float(v), 4) for v in part] for part in parts]


def describe(terms: Sequence[Term]) -> list[Mapping[str, object]]:
    """The axes of every term for the coefficient file."""
    return [{"axes": [[a.feature, a.low, a.step, a.count] for a in term]} for term in terms]
