"""The bodies of the OpenAI API that the server takes, turned into the engine's requests, and those that it gives."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taskgraph.models.requests import Request, Sampling
from taskgraph.models.tokenizer import Tokenizer

Tokens = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
MOST_TOKENS = 1 << 20
"""More than any context; what is between gets the engine's own answer."""


class ApiError(Exception):
    """What the client did wrong, or the server cannot do now: an HTTP status and the body of the OpenAI API."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Body(BaseModel, ABC):
    """What completions and chats share. Fields that would change the answer and are not supported are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    n: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of every prompt."""

    @abstractmethod
    def most_tokens(self, prompt: int, context: int) -> int:
        """Tokens to generate at most after `prompt` ones."""


B = TypeVar("B", bound=Body)


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS)] = 16
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    logprobs: None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        given = self.prompt
        if isinstance(given, str):
            return [tokenizer.encode(given)]
        if isinstance(given[0], int):
            return [given]
        return [tokenizer.encode(each) if isinstance(each, str) else each for each in given]

    def most_tokens(self, prompt: int, context: int) -> int:
        return self.max_tokens


class Part(BaseModel):
    """A piece of a message's text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For chat templates, which know no developers."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS)] | None = None
    logprobs: Literal[False] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.encode(tokenizer.conversation([message.plain() for message in self.messages]))]

    def most_tokens(self, prompt: int, context: int) -> int:
        """What the context leaves, unless told; a prompt that leaves nothing is refused by the engine."""
        return self.max_completion_tokens or self.max_tokens or max(context - prompt, 1)


def parsed(kind: type[B], text: bytes) -> B:
    """The body; ApiError that says what is wrong with the first wrong field."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:1]) or None
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is no JSON: {first['msg']}.") from error
        if first["type"] == "extra_forbidden":
            name = ".".join(str(part) for part in first["loc"])
            raise ApiError(400, f"{name!r} is not supported by this server; leave it out.", param=field) from error
        raise ApiError(400, f"{field or 'the body'}: {first['msg']}.", param=field) from error


def requests_of(body: Body, prompts: Sequence[Sequence[int]], context: int, stop: frozenset[int]) -> list[Request]:
    """The engine's requests: `n` for each prompt, with seeds one after another. The body's seed is every prompt's, as
    if it came alone; without one each prompt gets its own."""
    stops = frozenset() if body.ignore_eos else stop
    return [
        Request(
            prompt, body.most_tokens(len(prompt), context),
            Sampling(body.temperature, body.top_k, body.top_p, seed + i), stops,
        )
        for prompt in prompts
        for seed in [secrets.randbits(62) if body.seed is None else body.seed]
        for i in range(body.n)
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- what comes back


class TextStream:
    """The text of an answer as its tokens come; it ends before the first of the stop texts."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self._stops, self._held = tokenizer.stream_decoder(), stops, ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; what may be the beginning of a stop text is held back."""
        return self._take(self._decoder.push(token), final=False)

    def flush(self) -> str:
        """What was held back, at the end."""
        return self._take(self._decoder.flush(), final=True)

    def _take(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """The JSON of an answer: that of a completion, or of a chat."""

    chat: bool
    model: str
    id: str
    created: int

    @staticmethod
    def of(body: Body) -> "Shape":
        chat = isinstance(body, ChatBody)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        return Shape(chat, body.model, name, int(time.time()))

    def whole(self, texts: Sequence[tuple[str, str]], usage: Mapping[str, int]) -> dict[str, Any]:
        """The answer with all its choices: (text, why it ended)."""
        choices = []
        for index, (text, reason) in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return {**self._head("chat.completion"), "choices": choices, "usage": dict(usage)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """The first piece of a choice, which chats have."""
        return self._piece(index, {"role": "assistant", "content": ""}, None) if self.chat else None

    def piece(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """The next piece of a choice."""
        return self._piece(index, {"content": text} if text else {}, reason) if self.chat else {
            **self._head(""), "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": reason}]
        }  # fmt: skip

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The piece after the last, for those who asked."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _piece(self, index: int, delta: Mapping[str, str], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, chat: str) -> dict[str, Any]:
        kind = chat if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
