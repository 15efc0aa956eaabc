"""Python functions of custom ops, by name. Graphs and plans hold the name; executables look the function up once."""

import importlib
from collections.abc import Callable
from typing import Any

from taskgraph.errors import GraphError

_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def register_function(function: Callable[..., Any]) -> str:
    """Remember `function` and return its key "module:qualname", numbered when another one has that name."""
    stem = f"{getattr(function, '__module__', '__main__')}:{getattr(function, '__qualname__', type(function).__name__)}"
    key, number = stem, 1
    while _FUNCTIONS.get(key, function) is not function:
        number += 1
        key = f"{stem}#{number}"
    _FUNCTIONS[key] = function
    return key


def find_function(key: str) -> Callable[..., Any]:
    """The function registered as `key`, else imported by that name; GraphError if neither works."""
    if key in _FUNCTIONS:
        return _FUNCTIONS[key]
    module, _, qualname = key.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise GraphError(
            f"function {key!r} of a custom op is not importable; pass it to compile(functions=...)."
        ) from error
    if not callable(found):
        raise GraphError(f"{key!r} is not callable.")
    result: Callable[..., Any] = found
    return result
