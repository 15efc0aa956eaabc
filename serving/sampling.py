"""Tokens from logits, all samples at once: biases, penalties and a grammar's mask, then the draw (`tg.ops.draw`) by one
uniform number a sample; and what the model's own probabilities were.

A row is the logits of one sample. A row whose largest logit is no finite number (a NaN is larger than all others) has
no token: it is given NO_TOKEN, or NONE_LEFT when that is so only with its biases and its grammar.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import taskgraph as tg

if TYPE_CHECKING:
    import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0, as for `tg.ops.draw`."""
NO_TOKEN, NONE_LEFT = -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """What is changed in the logits of drawn rows: `values` are added to the `tokens` of `rows`, and of the rows
    `masked` only the tokens stay whose bits are set in `allowed` (a row of 32-bit words each)."""

    rows: Ints
    tokens: Ints
    values: npt.NDArray[np.float32]
    masked: Ints
    allowed: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The samples of a batch that are not just the likeliest token, and how they are drawn (`tg.ops.draw`). `logprobs`
    says how many likeliest tokens each wants to know the chances of; -1 is not even its own."""

    samples: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    uniform: Floats
    logprobs: Ints
    edits: Edits | None = None

    @property
    def on_host(self) -> bool:
        """Whether the host must see their logits."""
        return self.edits is not None or bool((self.logprobs >= 0).any())


@dataclass(frozen=True, slots=True, eq=False)
class Chances:
    """Log-probabilities by the model's own logits: of the token of each of `samples`, and of its likeliest tokens."""

    samples: Ints
    logprobs: Floats
    top_tokens: Ints
    top_logprobs: Floats


def uniforms(seeds: npt.NDArray[np.uint64], places: Ints) -> Floats:
    """One number in [0, 1) for each (seed, place), the same whatever the batch: SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = seeds * np.uint64(0x9E3779B97F4A7C15) + places.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    result: Floats = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def likeliest(tokens: Ints, logits: "torch.Tensor") -> Ints:
    """The argmax of rows, `tokens`, where the logit there is a finite number, else NO_TOKEN."""
    return np.where(np.isfinite(logits.float().numpy()), tokens, NO_TOKEN)


def sample(logits: "torch.Tensor", draws: Draws) -> tuple[Ints, Chances | None]:
    """A token for every row of logits (rows, vocabulary), and the chances that were asked for."""
    raw = logits.float()
    edited, edits = raw, draws.edits
    if edits is not None:
        edited = _edited(raw, edits)
    tokens = tg.cpu.draw(edited, draws.temperature, draws.top_k, draws.top_p, draws.uniform)
    if edits is not None:
        tokens = np.where(np.isfinite(raw.amax(1).numpy()), np.where(tokens < 0, NONE_LEFT, tokens), NO_TOKEN)
    asked = np.flatnonzero((draws.logprobs >= 0) & (tokens >= 0))
    return tokens, _chances(raw, draws, tokens, asked) if len(asked) else None


def _edited(raw: "torch.Tensor", edits: Edits) -> "torch.Tensor":
    import torch

    logits = raw.clone()
    where = (torch.from_numpy(edits.rows), torch.from_numpy(edits.tokens))
    logits.index_put_(where, torch.from_numpy(edits.values), accumulate=True)
    if len(edits.masked):
        bits = np.unpackbits(edits.allowed.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
        rows = torch.from_numpy(edits.masked)
        logits[rows] = logits[rows].masked_fill_(torch.from_numpy(bits) == 0, float("-inf"))
    return logits


def _chances(raw: "torch.Tensor", draws: Draws, tokens: Ints, asked: Ints) -> Chances:
    import torch

    logs = torch.log_softmax(raw[asked].double(), dim=1)
    own = logs[torch.arange(len(asked)), torch.from_numpy(tokens[asked])]
    best = torch.topk(logs, int(draws.logprobs[asked].max()))
    return Chances(draws.samples[asked], own.numpy(), best.indices.numpy(), best.values.numpy())
