"""The answers that the server gives, as its engine's tokens come: text, why it ended, and how many tokens it has."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from taskgraph.errors import BackendUnavailable, RequestError, WeightsError
from taskgraph.models import requests as ask
from taskgraph.models.protocol import ApiError, Body, Shape, TextStream, requests_of
from taskgraph.models.requests import Completion
from taskgraph.models.service import Service, Stream, TooManyRequests
from taskgraph.models.tokenizer import Tokenizer

_REASONS = {ask.LENGTH: "length", ask.STOP: "stop"}


@contextlib.contextmanager
def as_api_errors() -> Iterator[None]:
    """What the engine refuses is the client's to correct; what it cannot do now, to try again."""
    try:
        yield
    except TooManyRequests as error:
        raise ApiError(429, str(error), code="rate_limit_exceeded") from error
    except RequestError as error:
        code = "context_length_exceeded" if "context" in str(error) else None
        raise ApiError(400, str(error), code=code) from error
    except BackendUnavailable as error:
        raise ApiError(503, str(error)) from error


class Choice:
    """One of a request's answers: its text as it comes, then why it ended and how many tokens it has."""

    def __init__(self, stream: Stream, text: TextStream) -> None:
        self._stream, self._text = stream, text
        self.tokens, self.reason = 0, ""
        self.close = stream.close

    async def pieces(self) -> AsyncIterator[str]:
        """Pieces of text; ApiError when the engine stops before the end."""
        with as_api_errors():
            async for event in self._stream:
                if isinstance(event, Completion):
                    self._ended(event)
                    break
                self.tokens += 1
                if piece := self._text.push(event):
                    yield piece
                if self._text.stopped:
                    break
        if piece := self._text.flush():
            yield piece
        if self._text.stopped:
            self.reason = "stop"
        self.close()

    def _ended(self, completion: Completion) -> None:
        if completion.reason not in _REASONS:
            raise ApiError(503, "the server is shutting down; the answer is not whole.")
        self.reason = _REASONS[completion.reason]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server gives for a body: the choices that the engine works on. Close it."""

    choices: Sequence[Choice]
    shape: Shape
    prompt_tokens: int
    tells_usage: bool

    @classmethod
    async def begin(cls, body: Body, service: Service, tokenizer: Tokenizer) -> Self:
        """Open all choices, or none: ApiError for what cannot be served."""
        try:
            prompts = await asyncio.to_thread(body.prompts, tokenizer)
        except WeightsError as error:
            raise ApiError(400, str(error)) from error
        stop = frozenset(tokenizer.eos_ids[: ask.MOST_STOPS])
        asked = len(prompts) * body.n
        if asked > service.most_open:
            raise ApiError(400, f"{asked} answers are asked for; at most {service.most_open} can be.")
        choices: list[Choice] = []
        try:
            with as_api_errors():
                choices.extend(
                    Choice(service.submit(request), TextStream(tokenizer, body.stops))
                    for request in requests_of(body, prompts, service.engine.limits.context, stop)
                )
        except ApiError:
            _close(choices)
            raise
        usage = body.stream_options is not None and body.stream_options.include_usage
        return cls(choices, Shape.of(body), sum(map(len, prompts)), usage)

    def close(self) -> None:
        """End what has not ended."""
        _close(self.choices)

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        generated = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """The answer when all its choices have ended."""

        async def text(choice: Choice) -> str:
            return "".join([piece async for piece in choice.pieces()])

        async with all_or_none([asyncio.ensure_future(text(choice)) for choice in self.choices]) as tasks:
            texts = await asyncio.gather(*tasks)
        ended = [(text, choice.reason) for text, choice in zip(texts, self.choices, strict=True)]
        return self.shape.whole(ended, self.usage())

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON objects of a streamed answer, of all choices as they come."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def feed(index: int, choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    queue.put_nowait(self.shape.piece(index, piece))
                queue.put_nowait(self.shape.piece(index, "", choice.reason))
            except ApiError as error:
                queue.put_nowait(error.body())
            finally:
                queue.put_nowait(None)

        for index in range(len(self.choices)):
            if (first := self.shape.begin(index)) is not None:
                yield first
        async with all_or_none([asyncio.ensure_future(feed(i, c)) for i, c in enumerate(self.choices)]) as tasks:
            left = len(tasks)
            while left:
                event = await queue.get()
                left -= event is None
                if event is not None:
                    yield event
        if self.tells_usage:
            yield self.shape.usage(self.usage())


def _close(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.close()


@contextlib.asynccontextmanager
async def all_or_none(tasks: "list[asyncio.Future[Any]]") -> "AsyncIterator[list[asyncio.Future[Any]]]":
    """When the body ends early, so do the tasks, to their last line."""
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
