"""Answers that follow a grammar: JSON, and JSON of a schema, by llguidance (extra `guided`).

A `Guide` is compiled once, outside the engine's thread; each request that has it walks its own `Course`, which gives
the tokens that may come next and takes the one that came.
"""

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import BackendUnavailable, RequestError
from taskgraph.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MOST_SCHEMA_BYTES = 1 << 15
"""A mask of a long constant costs a step some milliseconds, and its grammar some megabytes."""
_KEPT = 16
_SPACES = r"\x20|\r?\n[\x20\x09]{0,32}"
"""Between tokens of JSON; without a limit a weak model may give spaces for ever."""
_ANY_OBJECT = {"type": "object"}


class Course:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words

    @property
    def ended(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def advance(self, token: int) -> str:
        """Take the next token; why it cannot be, or nothing."""
        if self._matcher.consume_token(token):
            return ""
        return f"token {token} is not what its grammar allows{self._reason()}."

    def allowed(self) -> npt.NDArray[np.int32] | str:
        """The tokens that may come next, a bit each; or why the grammar cannot tell."""
        bits = np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            return f"its grammar is too much work{self._reason()}."
        return bits

    def _reason(self) -> str:
        said = str(self._matcher.get_error() or "").strip().partition("\n")[0]
        return f" ({said})" if said else ""


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """A compiled grammar for tokens of a vocabulary."""

    vocabulary: int
    source: str
    matcher: Any

    def begin(self) -> Course:
        """A course from the beginning."""
        return Course(self.matcher.deep_copy(), -(-self.vocabulary // 32))


class Guides:
    """Compiles grammars for a tokenizer, and keeps those used last; from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """`vocabulary` is the model's, which may be larger than the tokenizer's. BackendUnavailable without llguidance,
        RequestError for a tokenizer that it cannot read."""
        if find_spec("llguidance") is None:
            raise BackendUnavailable("answers of a grammar need llguidance: pip install 'taskgraph-gpu[guided]'.")
        import llguidance

        self.vocabulary = vocabulary
        ends = [token for token in tokenizer.eos_ids if 0 <= token < vocabulary]
        try:
            size = max(vocabulary, tokenizer.vocab_size)
            self._tokens = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends or None)
        except Exception as error:  # llguidance raises what it likes
            raise RequestError(f"response_format: no grammar can use this tokenizer ({error}).") from error
        self._made: OrderedDict[str, Guide] = OrderedDict()
        self._guard = threading.Lock()

    def json(self, schema: Mapping[str, Any] | bool | None = None) -> Guide:
        """A JSON object, or JSON of a schema; RequestError that says what is wrong with the schema."""
        wanted = _ANY_OBJECT if schema is None else schema
        try:
            if not isinstance(wanted, Mapping | bool):
                raise TypeError(f"it is a {type(wanted).__name__}, not an object")
            text = json.dumps(wanted, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the schema cannot be used: {error}.", "response_format") from error
        if len(text) > MOST_SCHEMA_BYTES:
            raise RequestError(
                f"the schema has {len(text)} bytes; give at most {MOST_SCHEMA_BYTES}.", "response_format"
            )
        with self._guard:
            if text in self._made:
                self._made.move_to_end(text)
                return self._made[text]
        guide = self._compiled(text)
        with self._guard:
            self._made[text] = guide
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return guide

    def _compiled(self, schema: str) -> Guide:
        from llguidance import LLMatcher

        try:
            options: JsonCompileOptions = {"whitespace_flexible": True, "whitespace_pattern": _SPACES}
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
            matcher = LLMatcher(self._tokens, grammar, log_level=0)
            wrong = matcher.get_error() if matcher.is_error() else ""
            guide = Guide(self.vocabulary, schema, matcher)
            if not wrong:  # the first mask is the dearest: pay for it here
                first = Course(matcher, -(-self.vocabulary // 32)).allowed()
                wrong = first if isinstance(first, str) else "" if first.any() else "it allows nothing"
        except Exception as error:  # as above
            wrong = str(error)
        if wrong:
            said = " ".join(str(wrong).split())
            raise RequestError(f"the schema cannot be used: {said[:300]}", "response_format")
        return guide


_GUARD = threading.Lock()


def guides_of(tokenizer: Tokenizer, vocabulary: int) -> Guides:
    """The one `Guides` of a tokenizer; the first call takes as long as reading the vocabulary does."""
    with _GUARD:
        return _guides(tokenizer, vocabulary)


@functools.lru_cache(maxsize=2)
def _guides(tokenizer: Tokenizer, vocabulary: int) -> Guides:
    return Guides(tokenizer, vocabulary)
