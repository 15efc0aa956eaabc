"""What an op kind takes: its inputs by their numbers of axes, and its attributes by what they are.

Checked before a kind's own rules, which may therefore index shapes and read attributes as they please, whether an op
comes from Python or from a file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from taskgraph.errors import GraphError
from taskgraph.graph.op import BATCH_ROWS, ITEMSIZE, ROWS, Attr, Tensor
from taskgraph.record import Typed, integer, one_of, shown

Shapes = Sequence[Tensor]


class Attrs(dict[str, Attr]):
    """The static parameters of an op by name, read as what they are; GraphError for one that is missing or another."""

    def integer(self, key: str) -> int:
        """The attribute `key`, a number of something."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise GraphError(f"the attribute {key!r} is {shown(value)}; it must be an integer.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The attribute `key` as a float."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise GraphError(f"the attribute {key!r} is {shown(value)}; it must be a number.")
        return float(value)

    def flag(self, key: str) -> bool:
        """The attribute `key`, which is true or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise GraphError(f"the attribute {key!r} is {shown(value)}; it must be true or false.")
        return value


def need(condition: bool, kind: str, inputs: Shapes, text: str) -> None:
    """GraphError with the shapes of `inputs` and `text` unless `condition`."""
    if not condition:
        shapes = ", ".join(f"{t.name}: {t.dtype}{list(t.shape)}" for t in inputs)
        raise GraphError(f"{kind}({shapes}): {text}.")


FLOATS, INTEGERS = ("f64", "f32", "f16", "bf16", "f8"), ("i32", "i64")


def need_floats(kind: str, inputs: Shapes, *operands: Tensor) -> None:
    """GraphError unless all `operands` are of one float dtype."""
    kinds = {t.dtype for t in operands}
    names = ", ".join(dict.fromkeys(t.name for t in operands))
    need(len(kinds) == 1 and kinds <= set(FLOATS), kind, inputs, f"{names} must be floats of one dtype")


def need_integers(kind: str, inputs: Shapes, places: Tensor) -> None:
    """GraphError unless `places` are i32 or i64."""
    need(places.dtype in INTEGERS, kind, inputs, f"{places.name} must be i32 or i64")


def made_dtype(kind: str, inputs: Shapes, attrs: Attrs, default: str) -> str:
    """The dtype of the output: `out_dtype` where the op has one; GraphError unless it is a float."""
    made = str(attrs.get("out_dtype", default))
    need(made in FLOATS, kind, inputs, f"out_dtype is one of {', '.join(FLOATS)}; got {made!r}")
    return made


def moved(tensors: Shapes) -> float:
    """Bytes of all `tensors`, each moved once."""
    return float(sum(t.nbytes for t in tensors))


def _is_integer(value: Attr, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _finite(value: Attr) -> float:
    """The value as a float, NaN where it is no finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if isinstance(value, (int, float)) and number else math.nan


COUNT, PLACE, FLAG, NUMBER, POSITIVE, SMALL, WORD, DTYPE, AXES = (
    "an integer of at least 1", "an integer of at least 0", "true or false", "a finite number",
    "a finite number above 0", "a finite number of at least 0", "a text", f"one of {', '.join(ITEMSIZE)}",
    "integers of at least 0",
)  # fmt: skip
"""What an attribute can be, in the words of its error."""

_IS: Final[Mapping[str, Callable[[Attr], bool]]] = {
    COUNT: lambda v: _is_integer(v, 1),
    PLACE: lambda v: _is_integer(v, 0),
    FLAG: lambda v: isinstance(v, bool),
    NUMBER: lambda v: not math.isnan(_finite(v)),
    POSITIVE: lambda v: _finite(v) > 0,
    SMALL: lambda v: _finite(v) >= 0,
    WORD: lambda v: isinstance(v, str),
    DTYPE: lambda v: isinstance(v, str) and v in ITEMSIZE,
    AXES: lambda v: isinstance(v, tuple) and all(_is_integer(n, 0) for n in v),
}

OUT_DTYPE: Final[Mapping[str, str]] = {"out_dtype": DTYPE}


@dataclass(frozen=True, slots=True)
class Signature(Typed, error=GraphError):
    """What a kind takes.

    `axes` of each input, "+" for any number but none and "*" for any; the last `spare` inputs may be absent, and
    with `many` the only one may stand any number of times. `must` and `may` are attributes by name, each with what it
    can be (COUNT, NUMBER, ...); those of one of the `groups` are given together or not at all.
    """

    axes: str
    must: Mapping[str, str] = field(default_factory=dict)
    may: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[Mapping[str, str], ...] = ()
    spare: int = 0
    many: bool = False

    def _check(self) -> None:
        if {*self.axes} - {*"0123456789+*"}:
            raise GraphError(
                f"the axes of a signature are {shown(self.axes)}; they are digits, '+' or '*', one an input."
            )
        for key, can in self._attributes().items():
            one_of(f"what the attribute {shown(key)} can be", can, _IS, GraphError)
        integer("spare of a signature", self.spare, GraphError, 0, len(self.axes))

    def check(self, kind: str, ins: Shapes, attrs: Attrs) -> None:
        """GraphError, with the shapes, unless inputs and attributes are those."""
        wrong = self._wrong_input(ins) or self._wrong_attribute(attrs)
        need(not wrong, kind, ins, wrong)

    def _attributes(self) -> dict[str, str]:
        groups = {key: can for group in self.groups for key, can in group.items()}
        return {**self.must, **self.may, **groups}

    def _wrong_input(self, ins: Shapes) -> str:
        """What is wrong with the inputs; empty if nothing is."""
        most, least = len(self.axes), len(self.axes) - self.spare
        if not (ins if self.many else least <= len(ins) <= most):
            return f"takes {'1 or more' if self.many else least if least == most else f'{least} to {most}'} inputs"
        for i, t in enumerate(ins):
            axes = self.axes[0 if self.many else i]
            if axes != "*" and (not t.shape if axes == "+" else len(t.shape) != int(axes)):
                return f"input {i}, {t.name!r}, must have {axes.replace('+', '1 or more')} axes"
        return ""

    def _wrong_attribute(self, attrs: Attrs) -> str:
        """What is wrong with the attributes; empty if nothing is."""
        if lost := [key for key in self.must if key not in attrs]:
            return f"the attribute {lost[0]!r} is missing"
        known = self._attributes()
        for key, value in attrs.items():
            wanted = known.get(key)
            if wanted is None and key not in (ROWS, BATCH_ROWS):
                return f"there is no attribute {key!r}; there are {', '.join(known) or 'none'}"
            if wanted is not None and not _IS[wanted](value):
                return f"{key} is {shown(value)}; it must be {wanted}"
        for group in self.groups:
            if len(attrs.keys() & group.keys()) not in (0, len(group)):
                return f"{', '.join(group)} go together"
        return ""
