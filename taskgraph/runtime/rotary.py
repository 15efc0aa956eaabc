"""The frequencies of rotary embeddings (Su et al. 2021) and the scalings that stretch them, for every backend."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.graph.op import Op

Frequencies = npt.NDArray[np.floating[Any]]


def inverse_frequencies(op: Op, dim: int) -> npt.NDArray[np.float32]:
    """Turns a token of each pair of `dim` channels, stretched as the op's attributes say."""
    plain = 1.0 / np.float32(op.number("theta")) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return _yarn(op, _llama3(op, plain)).astype(np.float32)


def size(op: Op) -> float:
    """What cosines and sines are multiplied by (YaRN's attention factor)."""
    return op.number("yarn_attention", 1.0)


def _llama3(op: Op, inverse: Frequencies) -> Frequencies:
    """Llama 3.1's scaling: frequencies that turn less than `low_freq` times over the original context are divided by
    `factor`, those that turn more than `high_freq` times are kept, and those between are mixed."""
    factor = op.number("scaling_factor", 0.0)
    if not factor:
        return inverse
    low, high = op.number("scaling_low_freq"), op.number("scaling_high_freq")
    turns = op.number("scaling_original_context") * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clip(0.0, 1.0)
    return (1 - kept) * inverse / factor + kept * inverse


def _yarn(op: Op, inverse: Frequencies) -> Frequencies:
    """Peng et al. 2023: by their number, frequencies are kept up to `low`, divided by `factor` from `high` on."""
    factor = op.number("yarn_factor", 0.0)
    if not factor:
        return inverse
    low, high = op.number("yarn_low"), op.number("yarn_high")
    slow = ((np.arange(len(inverse), dtype=np.float32) - low) / (high - low)).clip(0.0, 1.0)
    mixed: Frequencies = inverse / factor * slow + inverse * (1 - slow)
    return mixed
