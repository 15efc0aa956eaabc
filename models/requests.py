"""What clients give to the serving engine and get from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from taskgraph.errors import RequestError

MOST_STOPS = 8
LENGTH, STOP, CANCELLED, FAILED = "length", "stop", "cancelled", "failed"
"""Why a request ended: max_tokens reached, a stop token, its client's wish, or a step that raised."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are drawn: the likeliest at temperature 0, else from softmax(logits / temperature) cut to
    the `top_k` likeliest (0: all) and to the fewest that together have `top_p`. Equal seeds draw equal tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError(f"temperature is {self.temperature}; give 0 (greedy) to 100.")
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_k is {self.top_k} and top_p {self.top_p}; give top_k >= 0 and 0 < top_p <= 1.")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt in tokens, and how many to generate at most; tokens of `stop` end it (and are given back too)."""

    prompt: Sequence[int] | npt.NDArray[np.integer]
    max_tokens: int = 16
    sampling: Sampling = Sampling()
    stop: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: its tokens, why it ended, and when it came, gave its first token and ended."""

    request: int
    tokens: tuple[int, ...]
    reason: str
    arrival_s: float
    first_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave: row i is the new token of request requests[i]; `finished` are those that it ended."""

    requests: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    finished: tuple[Completion, ...] = field(default=())


def checked_prompt(request: Request, context: int, vocabulary: int) -> npt.NDArray[np.int32]:
    """The prompt as an array; RequestError when the request cannot be served with these limits."""
    if isinstance(request.max_tokens, bool) or not isinstance(request.max_tokens, int) or request.max_tokens < 1:
        raise RequestError(f"max_tokens is {request.max_tokens!r}; give a whole number of at least 1.")
    prompt = np.asarray(request.prompt)
    if prompt.ndim != 1 or not len(prompt) or not np.issubdtype(prompt.dtype, np.integer):
        raise RequestError("the prompt must be a list of token numbers with at least one.")
    if len(prompt) + request.max_tokens > context:
        raise RequestError(
            f"{len(prompt)} prompt tokens and max_tokens {request.max_tokens} exceed the context of {context}; "
            "shorten the prompt or lower max_tokens."
        )
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocabulary:
        raise RequestError(f"token {low if low < 0 else high} is outside the vocabulary of {vocabulary}.")
    if len(request.stop) > MOST_STOPS:
        raise RequestError(f"{len(request.stop)} stop tokens; give at most {MOST_STOPS}.")
    return prompt.astype(np.int32)
