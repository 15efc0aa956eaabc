"""Who may call an executable: one thread at a time, in the process that made it, and never from inside an op."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from taskgraph.errors import ExecutionError


class _Here(threading.local):
    """What this thread does: `op_depth` is above 0 while it runs the functions of ops."""

    op_depth = 0


here = _Here()
_forks = [0]


@contextmanager
def in_op() -> Iterator[None]:
    """Within the block this thread runs ops."""
    here.op_depth += 1
    try:
        yield
    finally:
        here.op_depth -= 1


def forks() -> int:
    """How many forks lie between this process and the one that imported the package."""
    return _forks[0]


def _count_fork() -> None:
    _forks[0] += 1
    here.op_depth = 0


os.register_at_fork(after_in_child=_count_fork)


class Turns:
    """The calls of one executable, one after another: `with turns.next(): ...`.

    ExecutionError where waiting would be for ever: in a forked child, which has none of the maker's threads, and from
    an op or a signal handler while the same thread replays.
    """

    def __init__(self, name: str) -> None:
        self._name, self._born = name, forks()
        self._lock: Any = threading.RLock()

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that made the executable."""
        return self._born != _forks[0]

    def next(self) -> Any:
        """The lock to hold during a call."""
        if self._born != _forks[0]:
            raise ExecutionError(
                f"the executable of {self._name!r} was made before this process was forked, and its threads and "
                "device are the parent's; compile the plan again in this process.", op="",
            )  # fmt: skip
        if here.op_depth:
            raise ExecutionError(
                f"an op called the executable of {self._name!r}; ops run while a replay holds the lanes, so they "
                "cannot start another. Call it outside the graph.", op="",
            )  # fmt: skip
        if self._lock._is_owned():
            raise ExecutionError(
                f"the executable of {self._name!r} was called while this thread was still inside a call of it (a "
                "signal handler or a callback); call it afterwards.", op="",
            )  # fmt: skip
        return self._lock
