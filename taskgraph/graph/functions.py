"""Python functions of custom ops, by name. Graphs and plans hold the name; executables look the function up once.

A name that was registered here keeps its function alive, and ops keep their names alive: a function is freed with the
last graph that runs it. The table itself holds neither.
"""

import importlib
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from threading import Lock
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary, finalize

from taskgraph.errors import GraphError
from taskgraph.graph.op import Attr
from taskgraph.record import integer, sequence, shown

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Splittable:
    """A function of a custom op that may run on slices of its batch, for `GraphBuilder.call`.

    `axes` has for each input the axis that carries the batch, or None where a slice needs the whole; every output
    carries it on its first axis. Slices have a multiple of `multiple` rows. GraphError for what is no such thing.
    """

    function: Function
    axes: Sequence[int | None]
    multiple: int = 1

    def __post_init__(self) -> None:
        for axis in sequence("the axes of Splittable", self.axes, GraphError):
            if axis is not None:
                integer("an axis of Splittable", axis, GraphError, 0)
        integer("the multiple of Splittable", self.multiple, GraphError, 1)

    def attrs(self, inputs: int) -> dict[str, Attr]:
        """What an op of so many inputs says of it; GraphError unless there is an axis or None for each."""
        if len(self.axes) != inputs:
            raise GraphError(f"Splittable has an axis or None for each of {inputs} inputs; got {shown(self.axes)}.")
        axes = tuple(-1 if axis is None else int(axis) for axis in self.axes)
        return {"split_axes": axes, "split_multiple": int(self.multiple)}


class FunctionName(str):
    """The name of a registered function, which lives as long as the name. A copy in another process is a plain str.

    `fits` are the numbers of tensors that it is known to take: many ops have one function."""

    function: Function
    fits: set[int]

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (str(self),))

    def __copy__(self) -> "FunctionName":
        return self

    def __deepcopy__(self, memo: Any) -> "FunctionName":
        return self


_NAMES: WeakValueDictionary[str, FunctionName] = WeakValueDictionary()
_BY_IDENTITY: WeakValueDictionary[tuple[int, ...], FunctionName] = WeakValueDictionary()
_FREE: dict[str, list[int]] = {}
"""stem -> numbers of names that are gone, the least first; a stem that nobody uses any more is not here."""
_TAKEN: dict[str, int] = {}
"""stem -> how many numbers were ever given at a time."""
_GONE: deque[tuple[str, int]] = deque()
"""Names that were freed since the last registration: a finalizer may run anywhere, so it takes no lock."""
_GUARD = Lock()


def register_function(function: Function) -> str:
    """The name of `function`, "module:qualname", numbered while other functions of that name live.

    GraphError for what is no function that fills its outputs: not callable, a coroutine or a generator function.
    """
    identity = _identity(function)
    known = _BY_IDENTITY.get(identity)
    if known is not None:
        return known
    _need_plain(function)
    with _GUARD:
        _return_numbers()
        known = _BY_IDENTITY.get(identity)
        if known is not None:
            return known
        stem = _stem(function)
        number = _next_number(stem)
        name = FunctionName(stem if number == 1 else f"{stem}#{number}")
        name.function, name.fits = function, set()
        finalize(name, _GONE.append, (stem, number)).atexit = False
        _NAMES[str(name)] = _BY_IDENTITY[identity] = name
        return name


def _need_plain(function: Any) -> None:
    if not callable(function):
        raise GraphError(f"a custom op runs a function; got {type(function).__name__} {function!r:.60}.")
    called = inspect.getattr_static(type(function), "__call__", function)
    for test, what in ((inspect.iscoroutinefunction, "a coroutine"), (inspect.isgeneratorfunction, "a generator"),
                       (inspect.isasyncgenfunction, "an asynchronous generator")):  # fmt: skip
        if test(function) or test(called):
            raise GraphError(
                f"{_stem(function)!r} is {what} function: calling it runs none of it. A custom op fills its outputs "
                "before it returns; give a plain function."
            )


def _identity(function: Function) -> tuple[int, ...]:
    """Equal for what is one function: a bound method is made anew every time it is looked up."""
    if isinstance(function, MethodType):
        return (id(function.__self__), id(function.__func__))
    return (id(function),)


def _stem(function: Function) -> str:
    """Where an importable function is found; what is not importable has a part that no import finds."""
    qualname = getattr(function, "__qualname__", None)
    if isinstance(qualname, str):
        return f"{getattr(function, '__module__', None) or '__main__'}:{qualname}"
    inner = getattr(function, "func", None)  # functools.partial
    if callable(inner):
        return f"{getattr(inner, '__module__', None) or '__main__'}:<partial>.{getattr(inner, '__qualname__', 'call')}"
    kind = type(function)
    return f"{kind.__module__}:<{kind.__qualname__}>"


def _return_numbers() -> None:
    while _GONE:
        stem, number = _GONE.popleft()
        free = _FREE.setdefault(stem, [])
        heappush(free, number)
        if len(free) == _TAKEN[stem]:
            del _FREE[stem], _TAKEN[stem]


def _next_number(stem: str) -> int:
    """The least number that no living function of that stem has."""
    if free := _FREE.get(stem):
        return heappop(free)
    _TAKEN[stem] = _TAKEN.get(stem, 0) + 1
    return _TAKEN[stem]


def find_function(key: str) -> Function:
    """The function registered as `key`, else imported by that name; GraphError if neither works."""
    known = key if isinstance(key, FunctionName) else _NAMES.get(key)
    if known is not None:
        return known.function
    module, _, qualname = key.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise GraphError(
            f"function {key!r} of a custom op is not importable; pass it to compile(functions=...)."
        ) from error
    if not callable(found):
        raise GraphError(f"{key!r} is not callable.")
    result: Function = found
    return result


def check_arity(name: str, function: Function, arguments: int) -> None:
    """GraphError unless `function` takes that many tensors, and no more than `stream` beside them."""
    known = _BY_IDENTITY.get(_identity(function))
    if known is not None and arguments in known.fits:
        return
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a builtin that tells nothing
        return
    given = ([None] * arguments, {"stream": None} if "stream" in signature.parameters else {})
    try:
        signature.bind(*given[0], **given[1])
    except TypeError as error:
        raise GraphError(
            f"op {name!r}: its function is called with {arguments} tensors, inputs then outputs, but takes {signature} "
            f"({error})."
        ) from error
    if known is not None:
        known.fits.add(arguments)
