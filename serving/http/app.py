"""`taskgraph serve`: the OpenAI-compatible front of the engine, over FastAPI and uvicorn (extra `serve`)."""

import asyncio
import contextlib
import json
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from taskgraph.errors import BackendUnavailable, ExecutionError, TaskgraphError
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving.http.access import Access, AccessLog, Gate, access_of
from taskgraph.serving.http.answers import Answer, all_or_none
from taskgraph.serving.http.keys import KeyRing
from taskgraph.serving.http.metrics import CONTENT_TYPE, Metrics
from taskgraph.serving.http.page import page_headers, page_text
from taskgraph.serving.http.protocol import ApiError, Body, ChatBody, CompletionBody, parsed
from taskgraph.serving.http.status import READY, PlanBook, status_body, status_of
from taskgraph.serving.service import Service

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """What an app serves: the engine, the model's name and tokenizer, the most bytes of a request's body, and the most
    seconds that it may take to come."""

    service: Service
    tokenizer: Tokenizer
    name: str
    most_body_bytes: int = 1 << 20
    most_body_s: float = 60.0
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", Metrics(self.service))

    @property
    def context(self) -> int:
        """The most tokens of a request and its answer."""
        return self.service.engine.limits.context


def create_app(served: Served, access: Access | None = None) -> FastAPI:
    """The app, open to whom `access` says (default: all who reach it, but no pages of other sites); the owner of
    `served.service` closes it when the app has ended."""
    app = FastAPI(title="taskgraph", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    rules = access or Access()
    app.add_middleware(Gate, access=rules)
    if rules.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=rules.origins, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"], expose_headers=["X-Request-Id"],
        )  # fmt: skip
    app.add_middleware(AccessLog, ended=served.metrics.responded)
    card = {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "taskgraph",
        "max_model_len": served.context,
    }

    book, page = PlanBook(served.service), page_text()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, served, CompletionBody)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, served, ChatBody)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, served)
        return card

    @app.api_route("/", methods=["GET", "HEAD"])
    async def front() -> Response:
        return Response(page, media_type="text/html", headers=page_headers(page))

    @app.get("/v1/status")
    def status(plan: str = "") -> JSONResponse:
        return JSONResponse(status_body(served.service, book, served.name, plan), headers={"Cache-Control": "no-store"})

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        return _health(served.service)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)

    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientDisconnect, _left)
    return app


def _health(service: Service) -> JSONResponse:
    """200 while requests are taken, else 503; with how full the engine is."""
    now = status_of(service)
    facts = {
        "status": now.state, "open": now.open, "most_open": now.most_open, "pages": now.pages,
        "pages_held": now.pages_held, "steps": now.steps, "tokens": now.tokens,
    }  # fmt: skip
    return JSONResponse(facts, 200 if now.state == READY else 503)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:200]}"
    code, message = None, f"{asked}: {error.detail}."
    if error.status_code in (404, 405):
        code, allowed = "not_supported", (error.headers or {}).get("Allow", "")
        way = f"use {allowed}" if allowed else "it has /v1/completions, /v1/chat/completions and /v1/models"
        message = f"{asked} is not supported by this server; {way}."
    return JSONResponse(ApiError(error.status_code, message, code=code).body(), error.status_code, error.headers)


async def _left(_: Request, error: Exception) -> Response:
    """For a client that left before its request was whole; nobody reads this."""
    return Response(status_code=499)


# ------------------------------------------------------------------------------------- a request


async def _answer(request: Request, served: Served, kind: type[Body]) -> Response:
    body = parsed(kind, await _read(request, served))
    _check_model(body.model, served)
    if not served.service.ready:
        raise ApiError(503, "the server is shutting down or has failed; try another.")
    answer = await Answer.begin(body, served.service, served.tokenizer)
    request.state.usage = answer.usage  # for the access log
    if body.stream:
        return EventStream(answer.events(), answer.close)
    try:
        whole = await _unless_gone(request.receive, answer.whole())
    finally:
        answer.close()
    return await _left(request, ClientDisconnect()) if whole is None else JSONResponse(whole)


async def _read(request: Request, served: Served) -> bytes:
    """The body, if it has as many bytes as may be, and comes in time; no more of it is read."""
    most, parts, size = served.most_body_bytes, [], 0
    too_large = ApiError(413, f"the body has more than {most} bytes; send less.")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise too_large
    try:
        async with asyncio.timeout(served.most_body_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {served.most_body_s:g} s; send it at once.") from error
    return b"".join(parts)


def _check_model(name: str, served: Served) -> None:
    if name != served.name:
        raise ApiError(
            404, f"no model {name!r} here; this server has {served.name!r}.", param="model", code="model_not_found"
        )


# ------------------------------------------------------------------------------ clients that leave


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None, with `work` cancelled, when the client disconnects first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    async with all_or_none([task, gone]):
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None


async def _gone(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()


class EventStream(Response):
    """Server-sent events, each a JSON object; the request ends at once when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Mapping[str, Any], None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": _line(json.dumps(event)), "more_body": True})
        await send({"type": "http.response.body", "body": _line("[DONE]"), "more_body": False})


def _line(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


# ------------------------------------------------------------------------------------- the server


def run_server(
    served: Served, host: str, port: int, *, drain_s: float = 30.0, access: Access | None = None,
    started: Callable[[int], None] | None = None, say: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM, and close the service; ExecutionError when the engine fails, which also ends it.

    From the signal on no new requests are taken; those that run get `drain_s` seconds to end and are cancelled after
    them, or at a second signal; `say` hears what is waited for. SIGHUP has the keys' file read again. `started` is
    called with the port, which port 0 leaves to the system. BackendUnavailable for an address that others can reach
    when `access` has no keys."""
    rules = access_of(host, None) if access is None else access
    if rules.keys is None:
        access_of(host, None)
    with _listening(host, port) as listener:
        app = create_app(served, rules)
        server = _Server(uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False))
        if started is not None:
            started(listener.getsockname()[1])
        tell = say or (lambda _: None)
        server.keys, server.say = rules.keys, tell
        asyncio.run(_until_stopped(server, served.service, listener, drain_s, tell))
    served.service.close()
    failure = served.service.failure
    if failure is not None:
        raise ExecutionError(f"the engine failed and with it all requests: {failure}") from failure


class _Server(uvicorn.Server):
    """A server that ends by SIGINT and SIGTERM, and does not raise them again when it has; `hurried` by a second.
    SIGHUP has it read its keys again, if it has any."""

    hurried = reread = False
    keys: KeyRing | None = None
    say: Callable[[str], None] = staticmethod(lambda text: None)

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        self.reread = True

    def read_keys(self) -> None:
        """Read the keys again, if that was asked for."""
        if self.keys is None or not self.reread:
            return
        self.reread = False
        try:
            self.keys.reload()
        except TaskgraphError as error:
            self.say(f"the keys stay as they are: {error}")
        else:
            self.say(f"read the keys again: {len(self.keys.keys)} of {self.keys.path}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.hurried = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}
        if self.keys is not None:
            handlers[signal.SIGHUP] = self.handle_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_TELL_S = 5.0
"""How often a server that waits for requests says so."""


async def _until_stopped(
    server: _Server, service: Service, listener: socket.socket, drain_s: float, say: Callable[[str], None]
) -> None:
    async def drain() -> None:
        while not (server.should_exit or service.stopped.is_set()):
            server.read_keys()
            await asyncio.sleep(0.05)
        server.should_exit = True
        await _drain(server, service, drain_s, say)
        await asyncio.to_thread(service.close)

    async with all_or_none([asyncio.ensure_future(drain())]):
        await server.serve(sockets=[listener])


async def _drain(server: _Server, service: Service, drain_s: float, say: Callable[[str], None]) -> None:
    """Wait until no request is open, for `drain_s` seconds at most or until a second signal."""
    clock = asyncio.get_running_loop().time
    begin = told = clock()
    while service.open and not service.stopped.is_set():
        left = begin + drain_s - clock()
        if server.hurried or left <= 0:
            say(f"cancelling {_counted(service.open)}: {'a second signal' if server.hurried else 'time is up'}")
            return
        if told == begin or clock() - told >= _TELL_S:
            told = clock()
            say(f"stopping: waiting for {_counted(service.open)}, {left:.0f} s at most; signal again to cancel")
        await asyncio.sleep(0.05)


def _counted(requests: int) -> str:
    return f"{requests} request{'s' if requests != 1 else ''}"


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound; BackendUnavailable when the address is taken or not ours."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), backlog=1024, family=family)
    except OSError as error:
        raise BackendUnavailable(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port.") from error
