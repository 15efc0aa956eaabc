"""Log-probabilities in the words of the OpenAI API: those of completions, and those of chats."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving.requests import Chance

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""


@dataclass(frozen=True, slots=True)
class PlacedChance:
    """A token's chance, and where in the answer its text begins."""

    chance: Chance
    offset: int


class Ledger:
    """Keeps the chances of an answer's tokens until their text is released, and finds where in the answer each begins.

    A token begins where the text of the tokens before it ends. Tokens that make one character together all begin where
    the character does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoded = tokenizer, 0
        self._new: list[Chance] = []
        self._told: deque[PlacedChance] = deque()

    def note(self, chance: Chance) -> None:
        """A token has come."""
        self._new.append(chance)

    def place(self, decoded: int, pending: int) -> None:
        """The tokens so far, without the last `pending` that may be part of a character, are so many letters."""
        end = len(self._new)
        while pending and end:
            end -= 1
            pending -= not self._tokenizer.silent(self._new[end].token)
        ready, self._new = self._new[:end], self._new[end:]
        last, raw = max(decoded - self._decoded - 1, 0), b""
        for chance in ready:
            at = min(len(raw.decode(errors="replace")), last)
            self._told.append(PlacedChance(chance, self._decoded + at))
            raw += b"" if self._tokenizer.silent(chance.token) else self._tokenizer.token_bytes(chance.token)
        self._decoded = decoded

    def take(self, released: int | None) -> list[PlacedChance]:
        """Those that begin before letter `released`; None: all."""
        taken = []
        while self._told and (released is None or self._told[0].offset < released):
            taken.append(self._told.popleft())
        return taken


def of_completion(tokenizer: Tokenizer, told: Sequence[PlacedChance]) -> dict[str, Any]:
    """`logprobs` of a completion's choice: parallel lists; the likeliest of a token by their texts, its own too."""

    def likeliest(chance: Chance) -> dict[str, float] | None:
        if not chance.top:
            return None
        named: dict[str, float] = {}
        for token, logprob in (*chance.top, (chance.token, chance.logprob)):
            named.setdefault(_name(tokenizer, token), _finite(logprob))
        return named

    return {
        "tokens": [_name(tokenizer, each.chance.token) for each in told],
        "token_logprobs": [_finite(each.chance.logprob) for each in told],
        "top_logprobs": [likeliest(each.chance) for each in told],
        "text_offset": [each.offset for each in told],
    }


def of_chat(tokenizer: Tokenizer, told: Sequence[PlacedChance]) -> dict[str, Any]:
    """`logprobs` of a chat's choice: an object for each token."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": _text(raw, ""), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        {
            **one(each.chance.token, each.chance.logprob),
            "top_logprobs": [one(token, logprob) for token, logprob in each.chance.top],
        }
        for each in told
    ]
    return {"content": content, "refusal": None}


def _name(tokenizer: Tokenizer, token: int) -> str:
    return _text(tokenizer.token_bytes(token), "bytes:")


def _text(raw: bytes, mark: str) -> str:
    """The text of a token; of one that is part of a character, its bytes as \\xNN."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
