"""Tokens from logits, all rows at once: softmax at a temperature, cut to top-k and top-p, one uniform number a row."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_FEW = 256
"""Likeliest tokens that are sorted at first; rows whose cut lies beyond them are sorted whole."""


def uniforms(seeds: npt.NDArray[np.uint64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, place), the same whatever the batch: SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = seeds * np.uint64(0x9E3779B97F4A7C15) + places.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    result: npt.NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def draw(
    logits: "torch.Tensor",
    temperature: npt.NDArray[np.float32],
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float32],
    uniform: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """A token for every row of logits (rows, vocabulary), each with its own parameters; temperatures above 0."""
    import torch

    scaled = logits.float() / torch.from_numpy(temperature)[:, None]
    chances = torch.softmax(scaled, dim=1)
    result = np.empty(len(temperature), np.int64)
    cut = (top_k > 0) | (top_p < 1.0)
    free = np.flatnonzero(~cut)
    if len(free):
        result[free] = _inverse(chances[free].double().cumsum(1), uniform[free])
    rows = np.flatnonzero(cut)
    width = min(_FEW, chances.shape[1])
    while len(rows):
        best = torch.topk(chances[rows], width)
        kept = _kept(best.values.double(), top_k[rows], top_p[rows])
        enough = (kept[:, -1] == 0).numpy() | (width == chances.shape[1]) | (top_k[rows] == width)
        which = _inverse(torch.where(kept > 0, best.values.double(), 0.0).cumsum(1), uniform[rows])
        tokens = best.indices.numpy()[np.arange(len(rows)), which]
        result[rows[enough]] = tokens[enough]
        rows, width = rows[~enough], chances.shape[1]
    return result


def _kept(
    sorted_chances: "torch.Tensor", top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float32]
) -> "torch.Tensor":
    """1 for the tokens that both cuts leave: the first top_k, and those before which less than top_p has been."""
    import torch

    place = torch.arange(sorted_chances.shape[1])
    within_k = place[None, :] < torch.from_numpy(np.where(top_k > 0, top_k, sorted_chances.shape[1] + 1))[:, None]
    before = sorted_chances.cumsum(1) - sorted_chances
    return (within_k & (before < torch.from_numpy(top_p)[:, None].double())).int()


def _inverse(cumulative: "torch.Tensor", uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The first entry of each row whose cumulative weight exceeds uniform times the whole."""
    import torch

    target = torch.from_numpy(uniform)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    result: npt.NDArray[np.int64] = found.clamp(max=cumulative.shape[1] - 1).numpy()
    return result
