"""The answers that the server gives, as its engine's tokens come: text, why it ended, and how many tokens it has."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from taskgraph.errors import BackendUnavailable, RequestError, WeightsError
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving import requests as ask
from taskgraph.serving.guides import Guide, guides_of
from taskgraph.serving.http.logprobs import Ledger
from taskgraph.serving.http.protocol import ApiError, Body, Piece, Shape, requests_of
from taskgraph.serving.requests import Chance, Completion, ContextExceeded
from taskgraph.serving.service import Service, Stream, TooManyRequests
from taskgraph.serving.textstream import TextStream

log = logging.getLogger("taskgraph.serve")
_REASONS = {ask.LENGTH: "length", ask.STOP: "stop"}


@contextlib.contextmanager
def as_api_errors() -> Iterator[None]:
    """Errors as the API has them: 400 for what the client can correct, 429 and 503 for what it may try again later, and
    500 for anything else, which ends this request alone."""
    try:
        yield
    except ApiError:
        raise
    except TooManyRequests as error:
        raise ApiError(429, str(error), code="rate_limit_exceeded") from error
    except ContextExceeded as error:
        raise ApiError(400, str(error), param=error.field or None, code="context_length_exceeded") from error
    except RequestError as error:
        raise ApiError(400, str(error), param=error.field or None) from error
    except WeightsError as error:
        raise ApiError(400, str(error)) from error
    except BackendUnavailable as error:
        raise ApiError(503, str(error)) from error
    except Exception as error:  # a bug, of which the client hears
        log.exception("a request failed")
        raise ApiError(500, f"this request failed in the server ({type(error).__name__}); others go on.") from error


class AnswerChoice:
    """One of a request's answers: its text as it comes, then why it ended and how many tokens it has."""

    def __init__(self, stream: Stream, text: TextStream, ledger: Ledger, echo: str = "") -> None:
        self._stream, self._text, self._ledger, self._echo = stream, text, ledger, echo
        self.tokens, self.reason = 0, ""
        self.close = stream.close

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of text; ApiError when the engine stops before the end, or the request fails."""
        with as_api_errors():
            if self._echo:
                yield Piece(self._echo)
            async for event in self._stream:
                if isinstance(event, Completion):
                    self._ended(event)
                    break
                self.tokens += 1
                if piece := self._push(event):
                    yield piece
                if self._text.stopped:
                    break
            text = self._text.flush()
            if piece := self._piece(text, final=True):
                yield piece
        if self._text.stopped:
            self.reason = "stop"
        self.close()

    def _push(self, event: int | Chance) -> Piece | None:
        text = self._text.push(event.token if isinstance(event, Chance) else event)
        if isinstance(event, Chance) and (self._text.cut or not self._text.stopped):  # no token that is an end
            self._ledger.note(event)
        return self._piece(text, final=False)

    def _piece(self, text: str, *, final: bool) -> Piece | None:
        """The text with the tokens that it begins; at the end of an answer that no stop text cut, all of them."""
        self._ledger.place(self._text.decoded, 0 if final else self._text.pending)
        told = self._ledger.take(None if final and not self._text.cut else self._text.released)
        return Piece(text, told) if text or told else None

    def _ended(self, completion: Completion) -> None:
        if completion.reason == ask.FAILED:
            raise ApiError(500, completion.error)
        if completion.reason not in _REASONS:
            raise ApiError(503, "the server is shutting down; the answer is not whole.")
        self.reason = _REASONS[completion.reason]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server gives for a body: the choices that the engine works on. Close it."""

    choices: Sequence[AnswerChoice]
    shape: Shape
    prompt_tokens: int
    tells_usage: bool

    @classmethod
    async def begin(cls, body: Body, service: Service, tokenizer: Tokenizer) -> Self:
        """Open all choices, or none: ApiError for what cannot be served."""
        asked = body.count * body.n
        if asked > service.most_open:
            raise ApiError(400, f"{asked} answers are asked for; at most {service.most_open} can be.")
        engine = service.engine
        choices: list[AnswerChoice] = []
        try:
            with as_api_errors():
                prompts, guide = await asyncio.to_thread(_prepared, body, tokenizer, engine.vocabulary)
                ends = frozenset(tokenizer.eos_ids)
                marks = {tokenizer.special_texts[text] for text in body.stop if text in tokenizer.special_texts}
                known = [token for token in (*marks, *tokenizer.eos_ids) if token < engine.vocabulary]
                stops = frozenset(known[: ask.MOST_STOPS])
                wanted = requests_of(
                    body, prompts, engine.most_tokens, stops - marks, marks=stops & marks, guide=guide
                )  # fmt: skip
                shown_ends = frozenset(marks) if body.ignore_eos else ends | marks
                echoes = [echo for echo in body.echoes(tokenizer) for _ in range(body.n)]
                choices.extend(
                    AnswerChoice(
                        service.submit(request),
                        TextStream(tokenizer, body.stop, shown_ends, ends),
                        Ledger(tokenizer),
                        echo,
                    )
                    for request, echo in zip(wanted, echoes, strict=True)
                )
        except BaseException:
            _close(choices)
            raise
        usage = body.stream_options is not None and body.stream_options.include_usage
        return cls(choices, Shape.of(body, tokenizer), sum(map(len, prompts)), usage)

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

        async def said(choice: AnswerChoice) -> Piece:
            pieces = [piece async for piece in choice.pieces()]
            return Piece("".join(piece.text for piece in pieces), [told for piece in pieces for told in piece.told])

        async with all_or_none([asyncio.ensure_future(said(choice)) for choice in self.choices]) as tasks:
            pieces = await asyncio.gather(*tasks)
        ended = [(piece, choice.reason) for piece, choice in zip(pieces, self.choices, strict=True)]
        return self.shape.whole(ended, self.usage())

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON objects of a streamed answer, of all choices as they come."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def feed(index: int, choice: AnswerChoice) -> None:
            try:
                async for piece in choice.pieces():
                    queue.put_nowait(self.shape.piece(index, piece))
                queue.put_nowait(self.shape.piece(index, Piece(""), choice.reason))
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


def _prepared(body: Body, tokenizer: Tokenizer, vocabulary: int) -> tuple[list[list[int]], Guide | None]:
    """The tokens of the prompts, and the grammar: what takes its time, so not for the event loop."""
    prompts, wanted = body.prompts(tokenizer), body.guided
    if wanted is None:
        return prompts, None
    try:
        guides = guides_of(tokenizer, vocabulary)
    except BackendUnavailable as error:
        raise RequestError(f"response_format is not supported by this server: {error}", "response_format") from error
    return prompts, wanted.guide(guides)


def _close(choices: Sequence[AnswerChoice]) -> None:
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
