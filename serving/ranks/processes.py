"""Processes that are the ranks of one model on this machine: one actor in each, called together.

A rank that dies, or waits too long for another, ends them all: the caller gets RankLost, and so does every call after.
No rank outlives the process that started it, however that ends. Signals to the whole group of processes, as of ctrl-c
or of a service manager, are that process's to answer: ranks have SIGINT and SIGTERM blocked.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import taskgraph as tg
from taskgraph.errors import RankLost, TaskgraphError

Make = Callable[["tg.distributed.Group"], Any]
"""Builds the actor of a group's rank, in its process; can be pickled."""


class Ranks(AbstractContextManager["Ranks"]):
    """`size` processes with an actor each, which `make(group)` builds there; `make` must be picklable.

    A call runs on all ranks at once, and must make the same collectives on each. What it raises there is raised here.
    RankLost when a rank dies, or others wait for it longer than `timeout_s` and it does not answer in twice that.
    When that happened, or an op failed on one rank only, all ranks are ended, and every later call raises RankLost.
    """

    def __init__(self, size: int, make: Make, *, timeout_s: float = 60.0, start_s: float = 600.0) -> None:
        self.size, self.timeout_s, self._lost = size, timeout_s, ""
        self._folder = tempfile.TemporaryDirectory(prefix="taskgraph-ranks-")
        url = (Path(self._folder.name) / "meet").as_uri()
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []
        atexit.register(self.close)  # before multiprocessing's own way of ending them, which would wait for ever
        try:
            self._start(make, url)
            self._answers(start_s)
        except BaseException:
            self._close("The ranks did not start.")
            raise

    def _start(self, make: Make, url: str) -> None:
        for rank in range(self.size):
            here, there = _SPAWN.Pipe()
            arguments = (there, make, url, rank, self.size, self.timeout_s)
            process = _SPAWN.Process(target=_serve, args=arguments, name=f"taskgraph-rank-{rank}", daemon=True)
            with _deaf():
                process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self._links.append(here)
            self._processes.append(process)

    @property
    def pids(self) -> tuple[int | None, ...]:
        """The process id of each rank."""
        return tuple(process.pid for process in self._processes)

    @property
    def exitcodes(self) -> tuple[int | None, ...]:
        """How each rank's process ended; None while it runs."""
        return tuple(process.exitcode for process in self._processes)

    def check(self) -> None:
        """RankLost if a rank is gone; not while a call runs, which finds out by itself."""
        if self._lost:
            raise RankLost(f"{self._lost} Start the ranks again.")
        gone = wait([process.sentinel for process in self._processes], 0.0)
        for rank, process in enumerate(self._processes):
            if process.sentinel in gone:
                self._end(rank)

    def call(self, method: str, *args: Any, **named: Any) -> list[Any]:
        """The results of the actors' method on all ranks, in their order."""
        if self._lost:
            raise RankLost(f"{self._lost} Start the ranks again.")
        for rank, link in enumerate(self._links):
            try:
                link.send((method, args, named))
            except OSError:
                self._end(rank)
        return self._answers(2 * self.timeout_s)

    def _answers(self, limit_s: float) -> list[Any]:
        """One answer of each rank. The first that ends without one is named, for the others may only wait for it."""
        got: dict[int, Any] = {}
        until = time.monotonic() + limit_s
        while len(got) < self.size:
            waiting = [rank for rank in range(self.size) if rank not in got]
            ready = wait([self._links[rank] for rank in waiting], max(until - time.monotonic(), 0.0))
            if not ready:
                self._close(f"Ranks {waiting} did not answer within {limit_s:g} s.")
                raise RankLost(f"{self._lost} Start the ranks again.")
            for rank in [rank for rank in waiting if self._links[rank] in ready]:
                try:
                    got[rank] = self._links[rank].recv()
                except (EOFError, OSError):
                    self._end(rank)
        failures = [answer for answer in got.values() if isinstance(answer, _Failure)]
        if failures:
            self._fail(failures)
        return [got[rank] for rank in range(self.size)]

    def _end(self, rank: int) -> NoReturn:
        """A rank is gone."""
        self._processes[rank].join(5.0)
        self._close(f"Rank {rank} of {self.size} died (exit code {self._processes[rank].exitcode}).")
        raise RankLost(f"{self._lost} Start the ranks again.")

    def _fail(self, failures: Sequence["_Failure"]) -> NoReturn:
        """Raise what was first wrong: a rank that lost another one is a consequence."""
        first = min(failures, key=lambda failure: isinstance(failure.error, RankLost))
        if any(failure.fatal for failure in failures):
            self._close(f"Rank {first.rank} of {self.size} failed ({first.error}).")
        raise first.error

    def _close(self, reason: str) -> None:
        self._lost = self._lost or reason
        atexit.unregister(self.close)
        for link in self._links:
            link.close()  # a rank that waits for a call ends
        for process in self._processes:
            process.join(_GRACE_S)
            process.kill()
            process.join()
        self._folder.cleanup()

    def close(self) -> None:
        """End all ranks; a second call does nothing."""
        if not self._lost:
            self._close("The ranks are closed.")

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a rank's actor raised, and whether the rank is of no use any more."""

    rank: int
    error: BaseException
    fatal: bool


_SPAWN = multiprocessing.get_context("spawn")
_GRACE_S = 2.0


def _serve(link: Connection, make: Make, url: str, rank: int, size: int, timeout_s: float) -> None:
    """A rank's process: calls until the pipe ends, or until its group is broken: then its exit code is 1."""
    threading.Thread(target=_follow, name="taskgraph-parent", daemon=True).start()
    try:
        group = tg.distributed.connect(url, rank, size, timeout_s=timeout_s)
        _own_cores(rank, size)  # not before: gloo's threads and the lanes share a core badly
        actor, answer = make(group), None
    except BaseException as error:
        link.send(_Failure(rank, _portable(error), True))
        _leave(1)
    while True:
        try:
            link.send(answer)
            if group.broken:
                _leave(1)
            method, args, named = link.recv()
        except (EOFError, OSError):
            _leave(int(group.broken))
        try:
            answer = getattr(actor, method)(*args, **named)
        except Exception as error:
            answer = _Failure(rank, _portable(error), group.broken)


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that is started in this has SIGINT and SIGTERM blocked from its first instruction on."""
    resource_tracker.ensure_running()  # here, because it lets signals through when it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow() -> None:
    """End with the process that started this one, whatever runs here."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _leave(1)


def _leave(code: int) -> NoReturn:
    """End now: the others see the connections close, and taking torch apart would last seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_cores(rank: int, size: int) -> None:
    """Ranks that shared cores would wait for each other's threads."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= size:
        os.sched_setaffinity(0, cores[rank * len(cores) // size : (rank + 1) * len(cores) // size])


def _portable(error: BaseException) -> BaseException:
    """The error as another process can read it."""
    try:
        sent: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is pickled
        return TaskgraphError(f"{type(error).__name__}: {error}")
    return sent
