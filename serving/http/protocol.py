"""The bodies of the OpenAI API that the server takes, turned into the engine's requests, and those that it gives.

Here stand the kinds of JSON that fields may have; what values mean, and which are in range, is checked where Python's
requests are (`serving.requests`). Null is a field that was not given.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from taskgraph.errors import RequestError
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving.http import logprobs
from taskgraph.serving.http.logprobs import PlacedChance
from taskgraph.serving.requests import MOST_LOGPROBS, Request, Sampling
from taskgraph.serving.textstream import (
    TextStream as TextStream,  # what an answer's text is, for those who have answers
)

if TYPE_CHECKING:
    from taskgraph.serving.guides import Guide, Guides

MOST_STOP_TEXTS, MOST_STOP_LETTERS = 4, 1024


def _integral(value: Any) -> Any:
    """1.0 is 1, as some clients' JSON has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_integral), Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


class ApiError(Exception):
    """What the client did wrong, or the server cannot do now: an HTTP status and the body of the OpenAI API."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Fields(BaseModel):
    """An object of the API: fields that are null are taken as absent, and those that are not known are refused."""

    model_config = ConfigDict(extra="forbid")

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not supported, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        asks = {name: value for name, value in data.items() if value is not None}
        return {name: value for name, value in asks.items() if value not in cls.neutral.get(name, ())}


class StreamOptions(Fields):
    """How a stream is told."""

    include_usage: Flag = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Fields):
    """A schema and what the client calls it; `strict` or not, answers follow it."""

    name: Text = ""
    description: Text = ""
    schema_: dict[str, Any] | Flag = Field(default=True, alias="schema")
    strict: Flag = False


class ResponseFormat(Fields):
    """What an answer must be: text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is wanted with the type json_schema, and with no other")
        return self

    def guide(self, guides: "Guides") -> "Guide":
        """The compiled grammar. RequestError for a schema that cannot be used."""
        return guides.json() if self.json_schema is None else guides.json(self.json_schema.schema_)


class Body(Fields, ABC):
    """What completions and chats share. Fields that would change the answer and are not supported are refused."""

    neutral = {
        "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False), "suffix": ("",), "modalities": (["text"],),
        "service_tier": ("auto", "default"), "store": (True, False),
    }  # fmt: skip

    model: Text
    n: Annotated[Whole, Field(ge=1, le=16)] = 1
    temperature: Annotated[Real, Field(ge=0, le=2)] = 1.0
    top_p: Real = 1.0
    top_k: Whole = 0
    seed: Whole | None = None
    stop: tuple[Text, ...] = ()
    stream: Flag = False
    stream_options: StreamOptions | None = None
    ignore_eos: Flag = False
    frequency_penalty: Real = 0.0
    presence_penalty: Real = 0.0
    logit_bias: dict[str, Real] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_texts(cls, given: Any) -> Any:
        """Texts that end an answer; empty ones end none."""
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts[:MOST_STOP_TEXTS]):
            raise ValueError("give a text, or a list of texts")
        if len(texts) > MOST_STOP_TEXTS:
            raise ValueError(f"{len(texts)} texts; give at most {MOST_STOP_TEXTS}")
        longest = max(map(len, texts), default=0)
        if longest > MOST_STOP_LETTERS:
            raise ValueError(f"a text of {longest} letters; give at most {MOST_STOP_LETTERS}")
        return tuple(text for text in texts if text)

    @property
    def guided(self) -> ResponseFormat | None:
        """The format that answers must have, unless it is any text."""
        wanted = self.response_format
        return None if wanted is None or wanted.type == "text" else wanted

    @property
    @abstractmethod
    def count(self) -> int:
        """How many prompts there are."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many likeliest tokens to tell of with each token's log-probability; None: tell of none."""

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of every prompt."""

    @abstractmethod
    def most_tokens(self, prompt: int, context: int) -> int:
        """Tokens to generate at most after `prompt` ones."""

    def echoes(self, tokenizer: Tokenizer) -> list[str]:
        """What comes before the answers to each prompt."""
        return [""] * self.count


B = TypeVar("B", bound=Body)


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Whole = 16
    echo: Flag = False
    best_of: Whole | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompt_kinds(cls, given: Any) -> Any:
        if _is_text(given):
            return given
        if _tokens(given):
            return list(map(int, given))
        if isinstance(given, list) and given and all(map(_is_text, given)):
            return given
        if isinstance(given, list) and given and all(map(_tokens, given)):
            return [list(map(int, each)) for each in given]
        raise ValueError("give a text, a list of tokens, or a list of such prompts; at least one of each")

    @model_validator(mode="after")
    def _together(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError("'best_of' other than n is not supported by this server; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("'logprobs' of a prompt that is echoed are not supported by this server; leave out one")
        return self

    @property
    def count(self) -> int:
        return len(self.prompt) if _nested(self.prompt) else 1

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        given: Any = self.prompt if _nested(self.prompt) else [self.prompt]
        return [tokenizer.encode(each) if isinstance(each, str) else list(each) for each in given]

    def most_tokens(self, prompt: int, context: int) -> int:
        return self.max_tokens

    def echoes(self, tokenizer: Tokenizer) -> list[str]:
        if not self.echo:
            return super().echoes(tokenizer)
        given: Any = self.prompt if _nested(self.prompt) else [self.prompt]
        return [each if isinstance(each, str) else tokenizer.decode(each) for each in given]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _tokens(value: Any) -> bool:
    """Whether this is a list of token numbers; whether there are such tokens is for the engine to say."""
    return isinstance(value, list) and bool(value) and all(type(_integral(token)) is int for token in value)


def _nested(prompt: Any) -> bool:
    """Whether these are several prompts, not one."""
    return isinstance(prompt, list) and not isinstance(prompt[0], int)


class Part(Fields):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text


class Message(Fields):
    """A message of a conversation."""

    neutral = {"tool_calls": ([],), "refusal": ("",), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast()]
    name: Text | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, given: Any) -> Any:
        return [{"type": "text", "text": given}] if isinstance(given, str) else given

    def plain(self) -> dict[str, str]:
        """For chat templates, which know no developers."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _told(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' want 'logprobs' to be true")
        return self

    @property
    def count(self) -> int:
        return 1

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.encode(tokenizer.conversation([message.plain() for message in self.messages]))]

    def most_tokens(self, prompt: int, context: int) -> int:
        """What the context leaves, unless told; a prompt that leaves nothing is refused by the engine."""
        told = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(context - prompt, 1) if told is None else told


def parsed(kind: type[B], text: bytes) -> B:
    """The body; ApiError that says what is wrong with the first wrong field."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _wrong(error) from error


def _wrong(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
    field = ".".join(str(part) for part in first["loc"][:1]) or None
    message = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is no JSON: {message}.")
        case "extra_forbidden":
            return ApiError(400, f"{path!r} is not supported by this server; leave it out.", param=field)
        case "literal_error":
            given = repr(first["input"])[:60]
            expected = first["ctx"]["expected"]
            return ApiError(400, f"{path}: {given} is not supported by this server; give {expected}.", param=field)
    return ApiError(400, f"{path or 'the body'}: {message}.", param=field)


def requests_of(
    body: Body,
    prompts: Sequence[Sequence[int]],
    context: int,
    stop: Set[int],
    *,
    marks: Set[int] = frozenset(),
    guide: "Guide | None" = None,
) -> list[Request]:
    """The engine's requests: `n` for each prompt. The i-th answer to a prompt has the body's seed + i, whichever prompt
    it is; without a seed each prompt draws one. `stop` are the tokens that end answers, which `ignore_eos` ignores, and
    `marks` the special tokens that are stop texts of the body. RequestError names a field with a wrong value."""
    stops = frozenset(marks) if body.ignore_eos else frozenset(stop | marks)
    biases = {_token(text): bias for text, bias in body.logit_bias.items()}
    return [
        Request(
            prompt, body.most_tokens(len(prompt), context),
            Sampling(
                body.temperature, body.top_k, body.top_p, seed + i, body.presence_penalty, body.frequency_penalty,
                biases,
            ),
            stops, body.alternatives, guide,
        )
        for prompt in prompts
        for seed in [secrets.randbits(62) if body.seed is None else body.seed]
        for i in range(body.n)
    ]  # fmt: skip


def _token(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise RequestError(f"logit_bias: {text[:40]!r} is no token number.", "logit_bias")
    return int(text)


# --------------------------------------------------------------------------------------- what comes back


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: text, and what is told of its tokens."""

    text: str
    told: Sequence[PlacedChance] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """The JSON of an answer: that of a completion, or of a chat. With `tells` choices have log-probabilities."""

    chat: bool
    model: str
    id: str
    created: int
    tokenizer: Tokenizer
    tells: bool

    @staticmethod
    def of(body: Body, tokenizer: Tokenizer) -> "Shape":
        chat = isinstance(body, ChatBody)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        return Shape(chat, body.model, name, int(time.time()), tokenizer, body.alternatives is not None)

    def whole(self, answers: Sequence[tuple[Piece, str]], usage: Mapping[str, int]) -> dict[str, Any]:
        """The answer with all its choices: (what it says, why it ended)."""
        choices = []
        for index, (piece, reason) in enumerate(answers):
            message = {"role": "assistant", "content": piece.text}
            said = {"message": message} if self.chat else {"text": piece.text}
            choices.append({"index": index, **said, "logprobs": self._logprobs(piece), "finish_reason": reason})
        return {**self._head("chat.completion"), "choices": choices, "usage": dict(usage)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """The first piece of a choice, which chats have."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None) if self.chat else None

    def piece(self, index: int, piece: Piece, reason: str | None = None) -> dict[str, Any]:
        """The next piece of a choice."""
        logprobs = self._logprobs(piece) if piece.told else None
        if self.chat:
            return self._delta(index, {"content": piece.text} if piece.text else {}, logprobs, reason)
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(""), "choices": [choice]}

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The piece after the last, for those who asked."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.tells:
            return None
        return (logprobs.of_chat if self.chat else logprobs.of_completion)(self.tokenizer, piece.told)

    def _delta(
        self, index: int, delta: Mapping[str, str], logprobs: Mapping[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, chat: str) -> dict[str, Any]:
        kind = chat if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
