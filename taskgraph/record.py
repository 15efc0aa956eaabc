"""Values at the border: one reader of typed fields, for records that come from JSON and from Python alike.

The rules, read from a dataclass's annotations: an integer is an int (or a numpy one) of 64 bits and no bool; a number
is an integer or a float; a text can be written as UTF-8; a tuple may come as a list; a record has each of its fields
once and no other. What a number may be (finite, not negative) is for the `_check` of its class to say.
"""

import json
import numbers
import operator
import os
import stat
import types
import typing
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from taskgraph.errors import TaskgraphError

T = TypeVar("T")
Error = type[TaskgraphError]

INT64 = 1 << 63
"""Integers are below this, and not below minus this: what arrays hold."""
MOST_BYTES = 2 << 30
"""A larger file is none of ours."""


def shown(value: object, most: int = 100) -> str:
    """`value` for a message, cut to one printable line: its repr, what an exception says, else its type."""
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value)
    except Exception:  # a foreign __repr__ may raise anything
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Bad(Exception):  # noqa: N818 - becomes an error of the caller's kind
    """Entry `index` of a column is no value of its type: `text` says why, `path` where inside it."""

    def __init__(self, index: int, text: str, path: str = "") -> None:
        super().__init__(text)
        self.index, self.text, self.path = index, text, path


# ------------------------------------------------------------------------------------------- types


class Type:
    """How the values of one annotation are read: `one` of them, or a whole `column`, where no Python runs for an entry
    of the expected kind."""

    def one(self, value: Any) -> Any:
        """The value; Bad(0, ...) where it is none of this type."""
        raise NotImplementedError

    def fits(self, value: Any) -> bool:
        """Whether `one` would give `value` itself; False where that takes long to say."""
        return False

    def column(self, values: list[Any]) -> list[Any]:
        """Each of the values; Bad names the first that is none of this type."""
        return [self._at(i, value) for i, value in enumerate(values)]

    def _at(self, index: int, value: Any) -> Any:
        try:
            return self.one(value)
        except Bad as bad:
            raise Bad(index, bad.text, bad.path) from None


class _Integer(Type):
    def one(self, value: Any) -> int:
        if type(value) is not int:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise Bad(0, f"is {shown(value)}; it must be an integer")
            value = operator.index(value)
        if not -INT64 <= value < INT64:
            raise Bad(0, f"is {shown(value)}; integers have 64 bits")
        return int(value)

    def fits(self, value: Any) -> bool:
        return type(value) is int and -INT64 <= value < INT64

    def column(self, values: list[Any]) -> list[Any]:
        plain = {*map(type, values)} == {int} and min(values) >= -INT64 and max(values) < INT64
        return values if plain else super().column(values)


class _Number(Type):
    def one(self, value: Any) -> float:
        if type(value) is float:
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Bad(0, f"is {shown(value)}; it must be a number")
        try:
            return float(value)
        except OverflowError:
            raise Bad(0, f"is {shown(value)}; that is beyond every number") from None

    def fits(self, value: Any) -> bool:
        return type(value) is float

    def column(self, values: list[Any]) -> list[Any]:
        return values if {*map(type, values)} == {float} else super().column(values)


class _Flag(Type):
    def one(self, value: Any) -> bool:
        if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
            raise Bad(0, f"is {shown(value)}; it must be true or false")
        return bool(value)

    def fits(self, value: Any) -> bool:
        return value is True or value is False


class _Text(Type):
    def one(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Bad(0, f"is {shown(value)}; it must be a text")
        if not _writable(value):
            raise Bad(0, f"is {ascii(value)[:60]}; it has characters that UTF-8 has not")
        return value

    def fits(self, value: Any) -> bool:
        return isinstance(value, str) and value.isascii()

    def column(self, values: list[Any]) -> list[Any]:
        plain = {*map(type, values)} == {str} and _writable("".join(values))
        return values if plain else super().column(values)


def _writable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


class _Optional(Type):
    def __init__(self, inner: Type) -> None:
        self.inner = inner

    def one(self, value: Any) -> Any:
        return None if value is None else self.inner.one(value)

    def fits(self, value: Any) -> bool:
        return value is None or self.inner.fits(value)


class _Scalar(Type):
    """A text, a number, a flag, or a tuple of integers: what an op's attributes are."""

    def __init__(self) -> None:
        self.integers = _Many(_Integer())

    def one(self, value: Any) -> Any:
        if type(value) in (bool, float):
            return value
        if isinstance(value, str):
            return _Text().one(value)
        if isinstance(value, (list, tuple)):
            return self.integers.one(value)
        if isinstance(value, numbers.Integral):
            return _Integer().one(value)
        if isinstance(value, numbers.Real):
            return float(value)
        raise Bad(0, f"is {shown(value)}; it must be a text, a number, true, false, or integers")

    def fits(self, value: Any) -> bool:
        return type(value) in (bool, float) or (isinstance(value, str) and value.isascii())


class _Many(Type):
    """A tuple of any length, from a list or a tuple."""

    def __init__(self, inner: Type) -> None:
        self.inner = inner

    def one(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise Bad(0, f"is {shown(value)}; it must be a list")
        if not value:
            return ()
        given = list(value)
        try:
            made = self.inner.column(given)
        except Bad as bad:
            raise Bad(0, bad.text, f".{bad.index}{bad.path}") from None
        if type(value) is tuple and (made is given or all(map(operator.is_, value, made))):
            return value
        return tuple(made)

    def fits(self, value: Any) -> bool:
        return value == () or (type(value) is tuple and all(map(self.inner.fits, value)))

    def column(self, values: list[Any]) -> list[Any]:
        if not all(type(value) is list for value in values):
            return super().column(values)
        ends = list(accumulate(map(len, values)))
        flat = list(chain.from_iterable(values))
        try:
            made = self.inner.column(flat) if flat else []
        except Bad as bad:
            outer = bisect_right(ends, bad.index)
            inner = bad.index - (ends[outer] - len(values[outer]))
            raise Bad(outer, bad.text, f".{inner}{bad.path}") from None
        return [tuple(made[end - len(value) : end]) for end, value in zip(ends, values, strict=True)]


class _Fixed(Type):
    """A tuple with a type for each place."""

    def __init__(self, inner: Sequence[Type]) -> None:
        self.inner = inner

    def one(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) != len(self.inner):
            raise Bad(0, f"is {shown(value)}; it must have {len(self.inner)} entries")
        made = []
        for i, (each, inner) in enumerate(zip(value, self.inner, strict=True)):
            try:
                made.append(inner.one(each))
            except Bad as bad:
                raise Bad(0, bad.text, f".{i}{bad.path}") from None
        if type(value) is tuple and all(map(operator.is_, value, made)):
            return value
        return tuple(made)

    def fits(self, value: Any) -> bool:
        if type(value) is not tuple or len(value) != len(self.inner):
            return False
        return all(map(operator.call, [inner.fits for inner in self.inner], value))


class _Table(Type):
    """A mapping of texts to values of one type."""

    def __init__(self, inner: Type) -> None:
        self.inner = inner

    def one(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Bad(0, f"is {shown(value)}; it must be an object")
        made = {}
        for key, each in value.items():
            try:
                made[_Text().one(key)] = self.inner.one(each)
            except Bad as bad:
                raise Bad(0, bad.text, f".{key}{bad.path}") from None
        return made


class _Record(Type):
    """A dataclass: an instance of it, or an object with its fields."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def one(self, value: Any) -> Any:
        return value if type(value) is self.kind else self.column([value])[0]

    def fits(self, value: Any) -> bool:
        return type(value) is self.kind

    def column(self, values: list[Any]) -> list[Any]:
        if {*map(type, values)} == {self.kind}:
            return values
        schema = schema_of(self.kind)
        self._keys(values, schema)
        columns = []
        for name, (inner, spare) in schema.items():
            try:
                given = [v.get(name, spare) if spare is not _NONE else v[name] for v in values]
                columns.append(inner.column(given))
            except Bad as bad:
                raise Bad(bad.index, bad.text, f".{name}{bad.path}") from None
        return self._made(columns, len(values))

    def _keys(self, values: list[Any], schema: "Schema") -> None:
        wanted = schema.keys()
        for i, value in enumerate(values):
            if type(value) is not dict:
                raise Bad(i, f"is {shown(value)}; it must be an object with {', '.join(wanted)}")
            if value.keys() != wanted:
                if unknown := next((key for key in value if key not in schema), None):
                    raise Bad(i, "is not known; leave it out", f".{unknown}")
                if lost := next((k for k, (_, spare) in schema.items() if spare is _NONE and k not in value), None):
                    raise Bad(i, "is missing", f".{lost}")

    def _made(self, columns: list[list[Any]], count: int) -> list[Any]:
        """Values of the dataclass, each checked by what its class checks beyond types."""
        check, whole = getattr(self.kind, "_check", None), all(f.init for f in fields(self.kind))
        made: list[Any] = list(from_columns(self.kind, count, *columns)) if whole else []
        for i in range(count if check is not None or not whole else 0):
            try:
                if not whole:
                    made.append(self.kind(*(column[i] for column in columns)))
                elif check is not None:
                    check(made[i])
            except TaskgraphError as error:
                raise Bad(i, f"{_REFUSED}{str(error).rstrip('.')}") from None
        return made


class _Kept(Type):
    """An instance of a class that is no record: taken as it is, from Python alone."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def one(self, value: Any) -> Any:
        if not isinstance(value, self.kind):
            raise Bad(0, f"is {shown(value)}; it must be a {self.kind.__name__}")
        return value


_REFUSED = "is refused: "
_NONE = object()
Schema = Mapping[str, tuple[Type, Any]]
"""Field name -> how it is read, and what it is where files from before it lack it (_NONE: no file may)."""


@cache
def schema_of(kind: Any) -> Schema:
    """The fields of a dataclass. Its class variable `_LATER` names those that older files need not have."""
    hints, later = typing.get_type_hints(kind), getattr(kind, "_LATER", ())
    known: list[Field[Any]] = [f for f in fields(kind) if f.init]
    return {f.name: (_type_of(hints[f.name]), f.default if f.name in later else _NONE) for f in known}


_PLAIN: Mapping[Any, Type] = {int: _Integer(), float: _Number(), str: _Text(), bool: _Flag()}


@cache
def _type_of(hint: Any) -> Type:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if is_dataclass(hint) and isinstance(hint, type):
        return _Record(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        some = [each for each in inner if each is not type(None)]
        return _Optional(_type_of(some[0])) if len(some) == 1 else _Scalar()
    if origin is tuple:
        return _Many(_type_of(inner[0])) if inner[-1] is Ellipsis else _Fixed([_type_of(each) for each in inner])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _Table(_type_of(inner[1]))
    return _Kept(hint)


@cache
def _fits(kind: Any) -> tuple[Callable[[Any], tuple[Any, ...]], list[Callable[[Any], bool]]]:
    """(what gives all fields of a dataclass that has two or more, what says of each that it is of its type)."""
    schema = schema_of(kind)
    return operator.attrgetter(*schema), [inner.fits for inner, _ in schema.values()]


class Typed:
    """What a dataclass is that checks itself when it is made: its fields are brought to their types, or the `error` of
    its class names the one that is wrong; then its `_check`, if it has one, says what else must hold."""

    __slots__ = ()
    _error: ClassVar[Error]

    def __init_subclass__(cls, error: Error | None = None) -> None:
        if error is not None:  # else slots are being put into the class, which has its error
            cls._error = error

    def __post_init__(self) -> None:
        kind: Any = type(self)
        fields_of, fits = _fits(kind)
        if len(fits) < 2 or not all(map(operator.call, fits, fields_of(self))):
            self._bring()
        check = getattr(self, "_check", None)
        if check is not None:
            check()

    def _bring(self) -> None:
        kind: Any = type(self)
        for name, (inner, _) in schema_of(kind).items():
            given = getattr(self, name)
            try:
                made = inner.one(given)
            except Bad as bad:
                called = getattr(self, "name", None)
                whose = f" {called!r}: " if isinstance(called, str) and called else "."
                raise self._error(f"{kind.__name__.lower()}{whose}{name}{bad.path} {bad.text}.") from None
            if made is not given:
                object.__setattr__(self, name, made)


def from_columns(kind: type[T], count: int, *columns: Iterable[Any]) -> tuple[T, ...]:
    """`count` values of a frozen slotted dataclass from its columns: what a million calls of it make, ten times faster,
    because slots are filled a column at a time, no line of Python runs for a row, and nothing is checked."""
    made, slots = tuple(map(kind.__new__, repeat(kind, count))), cast(Any, kind)
    for field, column in zip(fields(slots), columns, strict=True):
        deque(map(getattr(kind, field.name).__set__, made, column), maxlen=0)
    return made


# ------------------------------------------------------------------------------------------- files


def decode(kind: type[T], text: object, error: Error, what: str, way_out: str, schema: int | None = None) -> T:
    """The record in a JSON text; `error` in one line, with the path inside the document, when it is none.

    `what` is its name for people ("plan file"), `way_out` what to do; `schema` the version that the text must state.
    """
    body = parse(text, error, what, way_out)
    if schema is not None:
        found = body.pop("schema", None) if isinstance(body, dict) else None
        if type(found) is not int or found != schema:
            raise error(f"{what} has schema {shown(found)}; this version reads {schema}. {way_out}")
    return convert(kind, body, error, what, way_out)


def convert(kind: type[T], body: object, error: Error, what: str, way_out: str) -> T:
    """The record in plain data that JSON gave."""
    try:
        made: T = _Record(kind).one(body)
    except Bad as bad:
        where = f"{bad.path.lstrip('.')} {bad.text}" if bad.path else bad.text.removeprefix(_REFUSED)
        shown_where = " ".join(where.encode(errors="backslashreplace").decode().split())
        raise error(f"not a {what}: {shown_where}. {way_out}") from None
    return made


def parse(text: object, error: Error, what: str, way_out: str) -> Any:
    """The data in a JSON text; keys that stand twice in an object are refused."""
    if not isinstance(text, (str, bytes, bytearray)):
        raise error(f"a {what} is read from a text; got {shown(text)}. {way_out}")
    try:
        whole = text if isinstance(text, str) else text.decode()
        return json.loads(whole.removeprefix("\ufeff"), object_pairs_hook=_once)
    except RecursionError:
        raise error(f"not a {what}: it nests too deeply. {way_out}") from None
    except ValueError as wrong:
        raise error(f"not a {what}: {' '.join(str(wrong).split())}. {way_out}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} stands twice in one object")
    return made


def read_text(path: object, error: Error, what: str) -> str:
    """The text of a file; `error` names it when it is no regular file, too large, not UTF-8, or cannot be read."""
    place = as_path(path, error, what)
    try:
        about = place.stat()
        if not stat.S_ISREG(about.st_mode):
            raise error(f"cannot read {what} {str(place)!r}: not a regular file.")
        if about.st_size > MOST_BYTES:
            raise error(f"cannot read {what} {str(place)!r}: {about.st_size} bytes; no {what} has over {MOST_BYTES}.")
        return place.read_text(encoding="utf-8-sig")
    except OSError as wrong:
        raise error(f"cannot read {what} {str(place)!r}: {wrong.strerror}.") from wrong
    except ValueError as wrong:  # not UTF-8, or a path with a NUL
        if isinstance(wrong, TaskgraphError):
            raise
        raise error(f"cannot read {what} {str(place)!r}: {wrong}.") from wrong


def as_path(path: object, error: Error, what: str) -> Path:
    """`path` as a Path; `error` when it is no text and no path."""
    if not isinstance(path, (str, os.PathLike)):
        raise error(f"the path of a {what} is a text or a Path; got {shown(path)}.")
    return Path(path)


# --------------------------------------------------------------------------------------- arguments


def _argument(kind: type[T], name: str, value: object, error: Error) -> T:
    try:
        made: T = _PLAIN[kind].one(value)
    except Bad as bad:
        raise error(f"{name} {bad.text}.") from None
    return made


def integer(name: str, value: object, error: Error, low: int = -INT64, high: int = INT64 - 1) -> int:
    """`value` as an integer from `low` to `high`; `error` names the argument."""
    made: int = _argument(int, name, value, error)
    if not low <= made <= high:
        raise error(f"{name} is {made}; it must be {_range(low, high, -INT64, INT64 - 1)}.")
    return made


def number(
    name: str, value: object, error: Error, low: float = float("-inf"), high: float = float("inf"), above: bool = False
) -> float:
    """`value` as a finite number from `low` (with `above`: beyond it) to `high`; `error` names the argument."""
    made: float = _argument(float, name, value, error)
    if not (low < made <= high if above else low <= made <= high) or made in (float("inf"), float("-inf")):
        limits = _range(low, high, float("-inf"), float("inf"))
        raise error(f"{name} is {made}; it must be {f'finite and above {low:g}' if above else limits}.")
    return made


def _range(low: float, high: float, least: float, most: float) -> str:
    if low == least and high == most:
        return "finite"
    if high == most:
        return f"at least {low} and finite"
    return f"at most {high}" if low == least else f"from {low} to {high}"


def text(name: str, value: object, error: Error, empty: bool = False) -> str:
    """`value` as a text that is not empty (unless `empty`); `error` names the argument."""
    if type(value) is str and value and value.isascii():
        return value
    made: str = _argument(str, name, value, error)
    if not made and not empty:
        raise error(f"{name} is empty; give it some characters.")
    return made


def one_of(name: str, value: object, options: Iterable[str], error: Error) -> str:
    """`value` if it is one of `options`; `error` names the argument and them."""
    known = tuple(options)
    if not isinstance(value, str) or value not in known:
        raise error(f"{name} is {shown(value)}; use one of {', '.join(known)}.")
    return value


def instance(name: str, value: object, kind: type[T] | tuple[type[T], ...], error: Error, way_out: str = "") -> T:
    """`value` if it is a `kind`; `error` names the argument."""
    if not isinstance(value, kind):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise error(f"{name} is {shown(value)}; it must be a {names}.{f' {way_out}' if way_out else ''}")
    return value


def sequence(name: str, value: object, error: Error) -> Sequence[Any]:
    """`value` if it is a list or a tuple; `error` names the argument."""
    if not isinstance(value, (list, tuple)):
        raise error(f"{name} is {shown(value)}; it must be a list or a tuple.")
    return value


def function(name: str, value: object, error: Error) -> Callable[..., Any]:
    """`value` if it can be called; `error` names the argument."""
    if not callable(value):
        raise error(f"{name} is {shown(value)}; it must be a function.")
    made: Callable[..., Any] = value
    return made
