"""The engine in a thread of its own, and what asyncio code sees of it: streams of tokens."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable

from taskgraph.errors import BackendUnavailable, RequestError
from taskgraph.serving.engine import Engine
from taskgraph.serving.requests import Chance, Completion, Request, StepOutput

_CHECK_S = 1.0
"""How often an idle engine's runner is looked after."""

Event = int | Chance | Completion | Exception
"""A token, or its chance where that was asked for, the end of a request, or why it cannot go on."""


class TooManyRequests(RequestError):  # noqa: N818 - the name says what it means
    """A request beyond those that may be open at once; it may be sent again later."""


class Stream:
    """An open request: iterate, in the event loop that opened it, for its tokens and last its completion.

    BackendUnavailable is raised there when the engine stops. `close` ends the request if it has not ended."""

    def __init__(self, service: "Service", loop: asyncio.AbstractEventLoop) -> None:
        self._service, self.loop, self.number = service, loop, -1
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[int | Chance | Completion]:
        event: Event = -1
        while not isinstance(event, Completion):
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            yield event

    def close(self) -> None:
        self._service.leave(self)


class Service(contextlib.AbstractContextManager["Service"]):
    """Runs an engine in its own thread until it is closed, and closes the engine then.

    At most `most_open` requests may run and wait together. When a step raises, or the idle runner cannot go on, all
    requests fail with BackendUnavailable, and so do later ones. `failure` is what was raised then. `stopped` is set
    when the thread ends, for whatever reason. `watchers` hear, in the engine's thread, of every request that ended.
    """

    def __init__(self, engine: Engine, most_open: int = 256) -> None:
        self.engine, self.most_open = engine, most_open
        self.failure: BaseException | None = None
        self.stopped = threading.Event()
        self._began_s = time.monotonic()
        self.watchers: list[Callable[[Completion], None]] = []
        self._streams: dict[int, Stream] = {}
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="taskgraph-engine", daemon=True)
        self._thread.start()

    # -- for clients -------------------------------------------------------------------------------

    @property
    def open(self) -> int:
        """Requests that run or wait."""
        return len(self._streams)

    @property
    def uptime_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began_s

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and self.failure is None

    def submit(self, request: Request) -> Stream:
        """Open a request from within an event loop; close the stream when it is not wanted any more.

        RequestError when the engine refuses it, TooManyRequests, or BackendUnavailable when it has stopped."""
        stream = Stream(self, asyncio.get_running_loop())
        with self._change:
            if not self.ready:
                raise self._unavailable()
            if len(self._streams) >= self.most_open:
                raise TooManyRequests(f"{self.most_open} requests are open, which is the most; try again later.")
            stream.number = self.engine.submit(request)
            self._streams[stream.number] = stream
            self._change.notify()
        return stream

    def leave(self, stream: Stream) -> None:
        """Cancel the stream's request unless it has ended."""
        with self._change:
            if self._streams.pop(stream.number, None) is not None:
                self.engine.cancel(stream.number)
                self._change.notify()

    def _unavailable(self) -> BackendUnavailable:
        if self.failure is not None:
            return BackendUnavailable(f"the engine has failed ({self.failure}); start the server again.")
        return BackendUnavailable("the server is shutting down; send the request to another.")

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wanted():
                self._deliver(self.engine.step())
            self.engine.close()
        except Exception as error:  # whatever it is, clients must hear of it; `failure` keeps it for the owner
            self.failure = error
        finally:
            self._fail_all()
            self.stopped.set()

    def _wanted(self) -> bool:
        """Wait for something to do; False when it is time to stop. Raises what the runner's check raises."""
        with self._change:
            while not self.engine.busy and not self._closing:
                if not self._change.wait(_CHECK_S):
                    self.engine.runner.check()
            return self.engine.busy

    def _deliver(self, output: StepOutput) -> None:
        """Hand out a step's tokens and completions, with one call into each event loop."""
        calls: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        with self._change:
            streams = self._streams
            for i, (number, token) in enumerate(zip(output.requests.tolist(), output.tokens.tolist(), strict=True)):
                if number in streams:
                    event = output.chances.get(i, token)
                    calls.setdefault(streams[number].loop, []).append((streams[number], event))
            for completion in output.finished:
                stream = streams.pop(completion.request, None)
                if stream is not None:
                    calls.setdefault(stream.loop, []).append((stream, completion))
        for loop, events in calls.items():
            _put(loop, events)
        self._tell(output.finished)

    def _tell(self, ended: Iterable[Completion]) -> None:
        for completion in ended:
            for watcher in self.watchers:
                watcher(completion)

    def _fail_all(self) -> None:
        with self._change:
            streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            _put(stream.loop, [(stream, self._unavailable())])

    # -- life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what still runs, wait for the last step, and close the engine."""
        with self._change:
            self._closing = True
            for number in self._streams:
                self.engine.cancel(number)
            self._change.notify()
        self._thread.join()
        if self.failure is not None:
            self._tell(self.engine.abort())
            self.engine.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _put(loop: asyncio.AbstractEventLoop, events: list[tuple[Stream, Event]]) -> None:
    """Add events to their streams, in the loop's thread; nothing when the loop has been closed with its clients."""

    def add() -> None:
        for stream, event in events:
            stream.events.put_nowait(event)

    with contextlib.suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(add)
