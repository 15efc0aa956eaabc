"""What a running sequence asks of the draw of its tokens beyond temperature and cuts: biases, penalties, a grammar.
From these and its answer so far come edits of the next logits; and it may ask to be told chances.

Sequences that ask for nothing of it have no `Steer`, and a batch of such ones costs nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from taskgraph.serving.requests import Chance, Request
from taskgraph.serving.sampling import Edits, Ints

if TYPE_CHECKING:
    from taskgraph.serving.guides import Course


@dataclass(slots=True)
class Steer:
    """One sequence's wishes, the place of its answer in its grammar, and the chances of its tokens so far.

    `error` says why the sequence cannot go on: it ends then, alone."""

    bias_tokens: Ints
    bias_values: npt.NDArray[np.float32]
    presence: float
    frequency: float
    logprobs: int
    course: "Course | None"
    fed: int = 0
    error: str = ""
    chances: list[Chance] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request) -> "Steer | None":
        """What the request asks for; None for nothing. RequestError when its grammar does not begin."""
        how = request.sampling
        penalties = how.presence_penalty or how.frequency_penalty
        if not how.biases and not penalties and request.logprobs is None and request.guide is None:
            return None
        pairs = how.biases
        return cls(
            np.array([token for token, _ in pairs], np.int64), np.array([bias for _, bias in pairs], np.float32),
            how.presence_penalty, how.frequency_penalty, -1 if request.logprobs is None else request.logprobs,
            None if request.guide is None else request.guide.begin(),
        )  # fmt: skip

    def follow(self, answer: npt.NDArray[np.integer]) -> None:
        """Let the grammar know the answer so far."""
        course = self.course
        if course is None or self.error:
            return
        for token in answer[self.fed :].tolist():
            if not course.ended:
                self.error = course.advance(token)
            self.fed += 1

    @property
    def ended(self) -> bool:
        """Whether the answer is all that its grammar allows."""
        return self.course is not None and not self.error and self.course.ended

    def additions(self, answer: npt.NDArray[np.integer]) -> tuple[Ints, npt.NDArray[np.float32]]:
        """Tokens, and what is added to their logits after this answer."""
        if not self.presence and not self.frequency:
            return self.bias_tokens, self.bias_values
        tokens, counts = np.unique(answer, return_counts=True)
        taken = -(counts * self.frequency + self.presence).astype(np.float32)
        return np.concatenate([self.bias_tokens, tokens.astype(np.int64)]), np.append(self.bias_values, taken)

    def mask(self) -> npt.NDArray[np.int32] | None:
        """The tokens that the grammar allows next, as bits; None when it allows all, or the sequence has ended."""
        if self.course is None or self.error or self.course.ended:
            return None
        found = self.course.allowed()
        if isinstance(found, str):
            self.error = found
            return None
        return found


def edits_of(steered: Sequence[tuple[int, Steer, npt.NDArray[np.integer]]]) -> Edits | None:
    """The edits of the logits that tokens are drawn from, for some of their rows (row, its steer, its answer so far);
    None where there is nothing to change."""
    rows, tokens, values = [], [], []
    masked, allowed = [], []
    for row, steer, answer in steered:
        steer.follow(answer)
        which, added = steer.additions(answer)
        rows.append(np.full(len(which), row))
        tokens.append(which)
        values.append(added)
        if (mask := steer.mask()) is not None:
            masked.append(row)
            allowed.append(mask)
    if not masked and not any(map(len, rows)):
        return None
    return Edits(
        np.concatenate(rows).astype(np.int64), np.concatenate(tokens), np.concatenate(values),
        np.array(masked, np.int64), np.stack(allowed) if allowed else np.empty((0, 1), np.int32),
    )  # fmt: skip
