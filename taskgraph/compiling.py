"""Who is told when a function is compiled. Apart from `jit`, so that a program can ask to be told without numba."""

from collections.abc import Callable

Listener = Callable[[str, int], None]
"""Told the function that is about to be compiled, and how many were before it in this process."""

_listener: Listener | None = None
_count = 0


def listen(listener: Listener | None) -> Listener | None:
    """Tell `listener` of every function that this process compiles from now on; returns who was told until now."""
    global _listener
    before, _listener = _listener, listener
    return before


def begin(name: str) -> None:
    """Say that the function `name` is about to be compiled."""
    global _count
    if _listener is not None:
        _listener(name, _count)
    _count += 1
