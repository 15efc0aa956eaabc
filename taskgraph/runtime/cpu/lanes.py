"""The lanes of the CPU backend: persistent threads pinned to core sets, and the replay of programs on them."""

import operator
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, ClassVar

import torch
from numba.core.compiler_lock import global_compiler_lock

from taskgraph.errors import ExecutionError
from taskgraph.runtime.cpu import kernels
from taskgraph.runtime.cpu.native import NativeEntry, Row, Team
from taskgraph.runtime.turns import here, in_op

Entry = Callable[[], Any]


class LaneThread:
    """A persistent thread pinned to a core set, shared by all executables that have a lane there.

    One thread a core set and lane number, however many plans are captured: pools of idle threads that outnumber the
    cores would slow every parallel op down. Turns are numbered, so that a replay that was interrupted can tell which
    lanes have begun and which have ended.
    """

    _alive: ClassVar[dict[tuple[tuple[int, ...], int], "LaneThread"]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()
    _left: ClassVar[deque["LaneThread"]] = deque()
    """Lanes of executables that went without `close`: the collector takes no locks, the next `open` closes them."""

    def __init__(self, key: tuple[tuple[int, ...], int]) -> None:
        self.program: list[Entry] = []
        self.failed: tuple[int, BaseException] | None = None
        self.turn = self.ended = 0
        self.abandoned = False
        self._key, self._users = key, 0
        self._start, self._done = threading.Lock(), threading.Lock()
        self._start.acquire()
        self._done.acquire()
        self.start, self.wait = self._start.release, self._done.acquire
        self._closing = False
        self._team: Team | None = None
        cores, number = key
        name = f"taskgraph-lane-{number}"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(cores,), name=name, daemon=True)
        self._thread.start()
        self._ready.wait()  # its pool has begun: no fork comes in between

    @classmethod
    def open(cls, cores: Sequence[int], number: int) -> "LaneThread":
        """Lane `number` on `cores`, started if it is the first there."""
        cls.close_left()
        key = (tuple(cores), number)
        with cls._guard:
            lane = cls._alive.get(key)
            if lane is None:
                lane = cls._alive[key] = cls(key)
            lane._users += 1
            return lane

    @classmethod
    def forget_all(cls) -> None:
        """In a forked child, where none of the threads is."""
        cls._alive, cls._guard, cls._left = {}, threading.Lock(), deque()

    @classmethod
    def leave(cls, lanes: Iterable["LaneThread"]) -> None:
        """What the collector calls for an executable that was never closed."""
        cls._left.extend(lanes)

    @classmethod
    def close_left(cls) -> None:
        """Close the lanes that were left, and let go what they ran last."""
        if not cls._left or not _Replays.lock.acquire(blocking=False):
            return
        left = []
        try:
            while cls._left:
                left.append(cls._left.popleft())
                left[-1].program = []
        finally:
            _Replays.lock.release()
        for lane in left:
            lane.close()

    def close(self) -> None:
        """One user less; the last one stops the thread."""
        with self._guard:
            self._users -= 1
            if self._users or self.abandoned:
                return
            del self._alive[self._key]
            self._closing = True
            self._start.release()
            self._thread.join()
            if self._team is not None:
                self._team.close()

    def team(self) -> Team | None:
        """The threads that help with wide native ops, started when they are first asked for; None on one core."""
        cores, number = self._key
        if self._team is None and len(cores) > 1:
            self._team = Team(cores, f"taskgraph-team-{number}")
        return self._team

    def abandon(self) -> None:
        """Leave the thread to an op that does not end; executables made later get another."""
        with self._guard:
            if self._alive.get(self._key) is self:
                del self._alive[self._key]
            self.abandoned = True

    def settle(self, turn: int, program: list[Entry]) -> None:
        """After an interruption: see to it that the lane runs, or has run, `program` in that turn."""
        if self.turn != turn:
            self.turn, self.program = turn, program
        if self.ended != turn and self._start.locked():
            self._start.release()  # a lane that runs already finds nothing new when it comes back

    def settled(self, turn: int) -> None:
        """Wait until that turn has ended, with both locks as they are between turns."""
        while self.ended != turn:
            time.sleep(1e-3)
        self._done.acquire(blocking=False)
        while not self._start.locked():
            time.sleep(1e-4)

    def _work(self, cores: Sequence[int]) -> None:
        broken: BaseException | None = None
        here.op_depth = 1
        here.cores = cores
        try:
            kernels.bind_threads(cores)
            kernels.use_threads(len(cores))
        except BaseException as error:  # handed to whoever replays first: a dead lane would hang them
            broken = error
        self._ready.set()
        with torch.inference_mode():
            while True:
                self._start.acquire()
                if self._closing:
                    break
                turn = self.turn
                if turn == self.ended:
                    continue
                entries = iter(self.program)
                try:
                    if broken is not None:
                        next(entries)
                        raise broken
                    for run in entries:
                        run()
                except BaseException as error:
                    at = len(self.program) - operator.length_hint(entries) - 1
                    self.failed = (at, error)
                    self._drain(at + 1)
                self._done.release()
                self.ended = turn
        kernels.release_threads()

    def _drain(self, at: int) -> None:
        """Keep the other lanes going after an error: take and give every remaining lock, run no op."""
        for entry in self.program[at:]:
            if isinstance(entry, Row):
                entry.drain()
            elif isinstance(getattr(entry, "__self__", None), _LOCK):
                entry()


class LaneProgram:
    """The entries of one lane as they are assembled, and for each the name of its op; native ops become rows."""

    def __init__(self, lane: LaneThread, stamps: bool) -> None:
        self.entries: list[Entry] = []
        self.names: list[str] = []
        self._lane, self._stamps = lane, stamps
        self._items: list[tuple[int, ...]] = []
        self._ops: list[NativeEntry | None] = []

    def add(self, name: str, *entries: Entry) -> None:
        """Entries of the op `name`."""
        for entry in entries:
            if isinstance(entry, NativeEntry):
                self._items.append(entry.row)
                self._ops.append(entry)
            else:
                self._end_row()
                self.entries.append(entry)
                self.names.append(name)

    def add_items(self, items: Iterable[tuple[int, ...]]) -> None:
        """Waits and posts of a row."""
        for item in items:
            self._items.append(item)
            self._ops.append(None)

    def finish(self) -> list[Entry]:
        """The program."""
        self._end_row()
        return self.entries

    def _end_row(self) -> None:
        if self._items:
            wide = any(entry is not None and entry.function.wide for entry in self._ops)
            self.entries.append(Row(self._items, self._ops, self._lane.team() if wide else None, self._stamps))
            self.names.append("")
            self._items, self._ops = [], []


_LOCK = type(threading.Lock())
_TURNS = count(1)


class _Replays:
    """One replay at a time: executables share the lanes and the cores."""

    lock = threading.Lock()


def alone() -> threading.Lock:
    """The lock that whoever runs ops holds."""
    return _Replays.lock


def replay(lanes: Sequence[LaneThread], programs: Sequence[list[Entry]]) -> list[tuple[int, int, BaseException]]:
    """Run every lane's program; (lane, number of the entry, error) of those that failed.

    An interruption (KeyboardInterrupt) is raised when the ops under way have ended; a second one, at once: then the
    lanes are abandoned, and every executable that has them says so from then on.
    """
    with _Replays.lock:
        kernels.release_threads()  # the caller's own pool would slow the lanes' pools down
        for lane in lanes:
            if lane.abandoned:
                raise ExecutionError("a replay was interrupted while an op did not end; compile the plan again.", op="")
        turn = next(_TURNS)
        try:
            for lane, program in zip(lanes, programs, strict=True):
                lane.program, lane.turn = program, turn
                lane.start()
            for lane in lanes:
                lane.wait()
        except BaseException:
            _end(lanes, programs, turn)
            raise
        failed = [(i, *lane.failed) for i, lane in enumerate(lanes) if lane.failed is not None]
        for lane in lanes:
            lane.failed = None
    return failed


def replay_here(program: list[Entry]) -> tuple[int, BaseException] | None:
    """Run the program of a lane of one core on the calling thread; the number and the error of an entry that failed."""
    with _Replays.lock, torch.inference_mode(), in_op():
        return kernels.on_one_thread(lambda: _run(program))


def _run(program: list[Entry]) -> tuple[int, BaseException] | None:
    entries = iter(program)
    try:
        for run in entries:
            run()
    except Exception as error:
        return len(program) - operator.length_hint(entries) - 1, error
    return None


def _end(lanes: Sequence[LaneThread], programs: Sequence[list[Entry]], turn: int) -> None:
    """Bring an interrupted turn to its end: lanes wait for each other, so all of them must have begun."""
    try:
        for lane, program in zip(lanes, programs, strict=True):
            lane.settle(turn, program)
        for lane in lanes:
            lane.settled(turn)
            lane.failed = None
    except BaseException:
        for lane in lanes:
            lane.abandon()
        raise


# ------------------------------------------------------------------------------------------------- forks


_FORK_WAIT_S = 10.0
"""How long a fork waits for a replay of another thread to end."""
_held: list[Callable[[], None]] = []
"""What the fork that is under way gives back afterwards."""


def _before_fork() -> None:
    """A child has one thread: what others of this process hold would stay held there, also inside libgomp, and the pool
    of the calling thread would be one of threads that are not there. An op that forks waits for nobody."""
    _held.clear()
    global_compiler_lock.acquire()
    _held.append(global_compiler_lock.release)
    if not here.op_depth:
        locks = (_Replays.lock, LaneThread._guard)
        _held.extend(lock.release for lock in locks if lock.acquire(timeout=_FORK_WAIT_S))
    kernels.release_threads()


def _in_parent() -> None:
    while _held:
        _held.pop()()
    cores = getattr(here, "cores", None)
    if cores is not None:
        kernels.bind_threads(cores)


def _in_child() -> None:
    while _held:
        _held.pop()()
    LaneThread.forget_all()
    _Replays.lock = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
