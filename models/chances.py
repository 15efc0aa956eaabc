"""Log-probabilities in the words of the OpenAI API: those of completions, and those of chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskgraph.models.requests import Chance
from taskgraph.models.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""


@dataclass(frozen=True, slots=True)
class Told:
    """A token's chance, and where in the answer its text begins."""

    chance: Chance
    offset: int


def of_completion(tokenizer: Tokenizer, told: Sequence[Told]) -> dict[str, Any]:
    """`logprobs` of a completion's choice: parallel lists; the likeliest of a token by their texts, its own too."""

    def likeliest(chance: Chance) -> dict[str, float] | None:
        if not chance.top:
            return None
        pairs = [*chance.top, (chance.token, chance.logprob)]
        return {_name(tokenizer, token): _finite(logprob) for token, logprob in reversed(pairs)}

    return {
        "tokens": [_name(tokenizer, each.chance.token) for each in told],
        "token_logprobs": [_finite(each.chance.logprob) for each in told],
        "top_logprobs": [likeliest(each.chance) for each in told],
        "text_offset": [each.offset for each in told],
    }


def of_chat(tokenizer: Tokenizer, told: Sequence[Told]) -> dict[str, Any]:
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
