"""A step's tokens, as the scheduler forms them and runners compute them, and what its samples meant."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taskgraph.serving.cache.pages import Moves
from taskgraph.serving.sampling import Draws, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A step's tokens: `decode` ones, one a sequence, then those of prefill chunks.

    `tokens`, their `positions` in their sequences and the `slots` of their keys; `lengths` and `blocks` of the
    sequences that decode and of the chunks; `starts`, the first token of each chunk behind those that decode. Sample i
    goes to sequence `owner[i]` (its index in the scheduler, or -1 for a chunk within a prompt) as token number
    `place[i]`, if the sequence's `epoch` still is what it was. Token `fed[i]` is the sample `source[i]` of the batch
    before.
    """

    tokens: Ints
    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int32]
    decode: int
    lengths: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    owner: Ints
    place: Ints
    epoch: Ints
    fed: Ints
    source: Ints
    draws: Draws | None
    moves: Moves

    @property
    def chunks(self) -> int:
        return len(self.starts) - 1

    @property
    def prefill(self) -> int:
        return len(self.tokens) - self.decode


class Taken(NamedTuple):
    """What a batch's samples meant: the sequences `seqs` got `tokens` (sample `samples` of the batch), and some end by
    length, by a stop token or the end of their grammar, or by an error, which `failed` says. `retire` those."""

    seqs: Ints
    tokens: Ints
    samples: Ints
    full: list[int]
    stopped: list[int]
    failed: dict[int, str]
