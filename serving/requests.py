"""What clients give to the serving engine and get from it, and the one place where that is checked."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import RequestError

if TYPE_CHECKING:
    from taskgraph.serving.guides import Guide

MOST_STOPS, MOST_LOGPROBS, MOST_BIASES = 8, 20, 1024


class ContextExceeded(RequestError):  # noqa: N818 - the name says what it means
    """A prompt that with its max_tokens is longer than the context."""


LENGTH, STOP, CANCELLED, FAILED = "length", "stop", "cancelled", "failed"
"""Why a request ended: max_tokens reached, a stop token or the end of its grammar, its client's wish, or an error."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are drawn: the likeliest at temperature 0, else from softmax(logits / temperature) cut to
    the `top_k` likeliest (0: all) and to the fewest that together have `top_p`. Equal seeds draw equal tokens.

    Before that, `logit_bias` (pairs or a mapping of token and number) is added to the logits, and of a token that the
    answer has c times c * frequency_penalty + (c > 0) * presence_penalty is taken off. RequestError names the field
    that is out of range or of the wrong kind.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        store("temperature", number("temperature", self.temperature, 0.0, 100.0, "0 (greedy) to 100"))
        store("top_k", whole("top_k", self.top_k, 0))
        store("top_p", number("top_p", self.top_p, math.ulp(0.0), 1.0, "more than 0, and 1 at most"))
        store("seed", whole("seed", self.seed) % 2**64)
        for name in ("presence_penalty", "frequency_penalty"):
            store(name, number(name, getattr(self, name), -2.0, 2.0, "-2 to 2"))
        store("logit_bias", _biases(self.logit_bias))

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs, in the order of tokens."""
        return _biases(self.logit_bias)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt in tokens, and how many to generate at most; tokens of `stop` end it (and are given back too).

    With `logprobs` every token comes with its log-probability and those of so many likeliest ones (`Chance`). A
    `guide` leaves only the tokens that its grammar allows, and ends the request with the grammar.
    """

    prompt: Sequence[int] | npt.NDArray[np.integer]
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    logprobs: int | None = None
    guide: "Guide | None" = None


@dataclass(frozen=True, slots=True)
class Chance:
    """A token, the natural logarithm of its probability, and the likeliest tokens with theirs, the likeliest first.

    Probabilities are softmax(logits): what the model says, before temperature, cuts, biases, penalties and grammar."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: its tokens, why it ended, and when it came, gave its first token and ended; a failed one's
    error, and the `Chance` of every token where they were asked for."""

    request: int
    tokens: tuple[int, ...]
    reason: str
    arrival_s: float
    first_s: float
    end_s: float
    error: str = ""
    chances: tuple[Chance, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave: tokens[i] is the new token of request requests[i]; `finished` are those that it ended;
    `chances` has, by i, those of requests that asked for log-probabilities."""

    requests: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    finished: tuple[Completion, ...] = field(default=())
    chances: Mapping[int, Chance] = field(default_factory=dict)


def checked(request: Request, context: int, vocabulary: int) -> Request:
    """The request with its prompt as an array of its own; RequestError when it cannot be served with these limits."""
    for given, wanted in ((request, Request), (getattr(request, "sampling", None), Sampling)):
        if not isinstance(given, wanted):
            raise RequestError(f"{_short(given)} is no {wanted.__name__}; give a Request, with a Sampling.")
    most = whole("max_tokens", request.max_tokens, 1)
    prompt = _prompt(request.prompt)
    if len(prompt) + most > context:
        raise ContextExceeded(
            f"{len(prompt)} prompt tokens and max_tokens {_short(most)} exceed the context of {context}; "
            "shorten the prompt or lower max_tokens.",
            "max_tokens",
        )
    low, high = int(prompt.min()), int(prompt.max())
    _in_vocabulary("prompt", low if low < 0 else high, vocabulary)
    for token, _ in request.sampling.biases:
        _in_vocabulary("logit_bias", token, vocabulary)
    logprobs = None if request.logprobs is None else whole("logprobs", request.logprobs, 0, MOST_LOGPROBS)
    return replace(
        request, prompt=prompt.astype(np.int32), max_tokens=most, stop=_stops(request.stop, vocabulary),
        logprobs=None if logprobs is None else min(logprobs, vocabulary), guide=_guide(request.guide, vocabulary),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- one value


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int; RequestError that names the field unless it is a whole number of that range."""
    wanted = "a whole number" + ("" if least is None else f" of at least {least}" if most is None else "")
    if most is not None:
        wanted = f"a whole number from {least} to {most}"
    try:
        found = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise RequestError(f"{name} is {_short(value)}; give {wanted}.", name)
    return found


def number(name: str, value: Any, least: float, most: float, wanted: str) -> float:
    """The value as a float; RequestError that names the field unless it is a number of that range."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not least <= value <= most:
        raise RequestError(f"{name} is {_short(value)}; give {wanted}.", name)
    return float(value)


def _short(value: object) -> str:
    """The value as an error shows it."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Token and bias, in the order of tokens; those of 0 say nothing."""
    try:
        pairs = list(given.items() if isinstance(given, Mapping) else given)
        pairs = [(token, bias) for token, bias in pairs]
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"logit_bias is {_short(given)}; give a mapping of tokens to numbers.", "logit_bias"
        ) from error
    if len(pairs) > MOST_BIASES:
        raise RequestError(f"logit_bias has {len(pairs)} tokens; give at most {MOST_BIASES}.", "logit_bias")
    made = {
        whole("logit_bias", token, 0): number("logit_bias", bias, -100.0, 100.0, "biases of -100 to 100")
        for token, bias in pairs
    }
    return tuple(sorted((token, bias) for token, bias in made.items() if bias))


def _prompt(given: Any) -> npt.NDArray[np.integer]:
    try:
        array = np.asarray(given)
        mixed = array is not given and any(isinstance(token, bool | np.bool_) for token in given)
    except Exception as error:  # whatever the client's object does when it is read
        raise RequestError(f"the prompt is no list of token numbers ({type(error).__name__}).", "prompt") from error
    if array.ndim == 1 and not len(array):
        raise RequestError("the prompt has no tokens; give at least one.", "prompt")
    if array.ndim != 1 or mixed or not np.issubdtype(array.dtype, np.integer):
        raise RequestError("the prompt must be a list of token numbers.", "prompt")
    return array


def _stops(given: Any, vocabulary: int) -> frozenset[int]:
    if not isinstance(given, frozenset | set | list | tuple):
        raise RequestError(f"stop is {_short(given)}; give a set of token numbers.", "stop")
    if len(given) > MOST_STOPS:
        raise RequestError(f"{len(given)} stop tokens; give at most {MOST_STOPS}.", "stop")
    stops = frozenset(whole("stop", token) for token in given)
    for token in stops:
        _in_vocabulary("stop", token, vocabulary)
    return stops


def _guide(given: Any, vocabulary: int) -> "Guide | None":
    if given is not None and getattr(given, "vocabulary", None) != vocabulary:
        wanted = f"one that `Guides` made for the vocabulary of {vocabulary}"
        raise RequestError(f"guide is {_short(given)}; give {wanted}.", "guide")
    found: Guide | None = given
    return found


def _in_vocabulary(name: str, token: int, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        raise RequestError(f"{name}: token {_short(token)} is outside the vocabulary of {vocabulary}.", name)
