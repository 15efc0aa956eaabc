"""Formulas of one element: what a pointwise op computes, as steps over its inputs, written as a text.

A formula is steps between semicolons. A step is an operation and its arguments: `x0`, `x1`, ... are elements of the
inputs, `s0`, `s1`, ... results of earlier steps, anything else is a number. The last step is the result:

    "mul x0 x1; add s0 0.5; gelu s1"        gelu(x0 * x1 + 0.5)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

from taskgraph.errors import GraphError
from taskgraph.record import shown


class Operation(NamedTuple):
    """An operation on one element: how many arguments it takes, its flops by the formula, what it makes ("" for
    numbers, "bool" for 0 or 1), and whether it is one of integers too."""

    takes: int
    flops: float
    makes: str = ""
    whole: bool = False


OPERATIONS: Final[Mapping[str, Operation]] = {
    "copy": Operation(1, 0, whole=True),
    "add": Operation(2, 1, whole=True),
    "sub": Operation(2, 1, whole=True),
    "mul": Operation(2, 1, whole=True),
    "div": Operation(2, 1),
    "maximum": Operation(2, 1, whole=True),
    "minimum": Operation(2, 1, whole=True),
    "pow": Operation(2, 2),
    "neg": Operation(1, 1, whole=True),
    "abs": Operation(1, 1, whole=True),
    "exp": Operation(1, 1),
    "expm1": Operation(1, 1),
    "log": Operation(1, 1),
    "log1p": Operation(1, 1),
    "sqrt": Operation(1, 1),
    "rsqrt": Operation(1, 2),
    "sin": Operation(1, 1),
    "cos": Operation(1, 1),
    "tanh": Operation(1, 1),
    "sigmoid": Operation(1, 3),
    "erf": Operation(1, 1),
    "relu": Operation(1, 1, whole=True),
    "silu": Operation(1, 4),
    "gelu": Operation(1, 5),
    "gelu_tanh": Operation(1, 8),
    "floor": Operation(1, 1),
    "ceil": Operation(1, 1),
    "round": Operation(1, 1),
    "trunc": Operation(1, 1),
    "eq": Operation(2, 1, "bool", whole=True),
    "ne": Operation(2, 1, "bool", whole=True),
    "lt": Operation(2, 1, "bool", whole=True),
    "le": Operation(2, 1, "bool", whole=True),
    "gt": Operation(2, 1, "bool", whole=True),
    "ge": Operation(2, 1, "bool", whole=True),
    "and": Operation(2, 1, "bool", whole=True),
    "or": Operation(2, 1, "bool", whole=True),
    "not": Operation(1, 1, "bool", whole=True),
    "where": Operation(3, 1, whole=True),
    "bf16": Operation(1, 0),
    "f16": Operation(1, 0),
}
"""By name; a code of a backend is the place in this table. `maximum`, `minimum`, `relu`: a NaN stays one. `round` is to
the nearest even. `gelu` is x times the normal distribution (Hendrycks and Gimpel 2016), `gelu_tanh` their approximation
by tanh; `silu` is x sigmoid(x) (Elfwing et al. 2018). `and`, `or`, `not` are of truths: 0 is false. `where c a b` is a
where c is true, else b. `bf16` and `f16` round to that type."""

MOST_INPUTS: Final = 8
MOST_STEPS: Final = 64
MOST_ALIVE: Final = 8
"""Values that are alive at once: inputs that are still to be used, and results."""

Argument = str | float
"""`x0` or `s0`, or a number."""


class Applied(NamedTuple):
    """An operation by name, and what it takes."""

    name: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Formula:
    """Steps over `inputs` inputs; `text` is how a graph keeps it."""

    steps: tuple[Applied, ...]
    inputs: int

    @property
    def text(self) -> str:
        return "; ".join(" ".join((step.name, *map(_written, step.arguments))) for step in self.steps)

    @property
    def flops(self) -> float:
        """Flops of one element."""
        return sum(OPERATIONS[step.name].flops for step in self.steps)

    @property
    def whole(self) -> bool:
        """Whether integers stay integers: no step, and no number, needs fractions."""
        numbers = [a for step in self.steps for a in step.arguments if isinstance(a, float)]
        return all(OPERATIONS[step.name].whole for step in self.steps) and all(a.is_integer() for a in numbers)

    def truth(self, inputs: Sequence[bool]) -> bool:
        """Whether the result is a truth, where those of the inputs are truths that `inputs` says."""
        made: list[bool] = []
        for step in self.steps:
            given = [not isinstance(a, float) and (inputs if a[0] == "x" else made)[int(a[1:])] for a in step.arguments]
            kept = {"copy": given[0], "where": all(given[1:]) and len(given) > 1}.get(step.name, False)
            made.append(OPERATIONS[step.name].makes == "bool" or kept)
        return made[-1]


def _written(argument: Argument) -> str:
    return repr(argument) if isinstance(argument, float) else argument


@cache
def formula(text: str) -> Formula:
    """The formula that `text` is; GraphError where it is none, or takes more than there is room for."""
    steps: list[Applied] = []
    inputs: set[int] = set()
    for number, part in enumerate(text.split(";")):
        name, *given = part.split() or [""]
        if name not in OPERATIONS:
            raise GraphError(f"a formula has no operation {shown(name)}; use one of {', '.join(OPERATIONS)}.")
        arguments = tuple(_argument(word, number) for word in given)
        if len(arguments) != OPERATIONS[name].takes:
            raise GraphError(f"step {number} of a formula: {name} takes {OPERATIONS[name].takes}; got {shown(part)}.")
        inputs |= {int(a[1:]) for a in arguments if isinstance(a, str) and a[0] == "x"}
        steps.append(Applied(name, arguments))
    if inputs != set(range(len(inputs))) or not inputs:
        raise GraphError(f"a formula uses the inputs x0, x1, ... and leaves none out; got {shown(text)}.")
    made = Formula(tuple(steps), len(inputs))
    most = {
        "inputs": (len(inputs), MOST_INPUTS),
        "steps": (len(steps), MOST_STEPS),
        "values alive": (alive(made), MOST_ALIVE),
    }
    for what, (has, room) in most.items():
        if has > room:
            raise GraphError(f"a formula has {has} {what}; there is room for {room}. Make it of two ops.")
    return made


def _argument(word: str, step: int) -> Argument:
    if word[0] in "xs" and word[1:].isdecimal() and word[1:].isascii():
        place = int(word[1:])
        if word[0] == "s" and place >= step:
            raise GraphError(f"step {step} of a formula takes {word!r}, which is no earlier step.")
        return f"{word[0]}{place}"
    try:
        return float(word)
    except ValueError:
        raise GraphError(
            f"step {step} of a formula takes {shown(word)}; it must be an input (x0), a step (s0) or a number."
        ) from None


class Placed(NamedTuple):
    """A step, or the load of an input ("load", the input's number), with the places of what it takes and makes.

    A place is a register; a number is given as a float."""

    name: str
    into: int
    takes: tuple[int | float, ...]


def placed(made: Formula) -> tuple[Placed, ...]:
    """The steps in order, each input loaded ahead of its first use, with registers: none is written by a step that
    reads it."""
    last = {
        argument: i for i, step in enumerate(made.steps) for argument in step.arguments if isinstance(argument, str)
    }
    return tuple(_placed(made, last))


def alive(made: Formula) -> int:
    """The registers that `placed` takes."""
    return 1 + max(step.into for step in placed(made))


def _placed(made: Formula, last: Mapping[str, int]) -> Iterator[Placed]:
    place: dict[str, int] = {}
    free: list[int] = []
    count = 0
    for i, step in enumerate(made.steps):
        used = dict.fromkeys(a for a in step.arguments if isinstance(a, str))
        for name in [*(a for a in used if a not in place), f"s{i}"]:
            free.sort(reverse=True)
            place[name] = free.pop() if free else count
            count = max(count, place[name] + 1)
            if name[0] == "x":
                yield Placed("load", place[name], (int(name[1:]),))
        takes = tuple(place[a] if isinstance(a, str) else a for a in step.arguments)
        yield Placed(step.name, place[f"s{i}"], takes)
        free += [place[name] for name in used if last[name] == i]
        if f"s{i}" not in last and i + 1 < len(made.steps):
            free.append(place[f"s{i}"])  # nobody takes it


def number(name: str, value: object) -> float:
    """`value` as a number of a formula; GraphError if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GraphError(f"{name} is {shown(value)}; it must be a Value or a number.")
    try:
        return float(value)
    except OverflowError:
        raise GraphError(f"{name} is {shown(value)}; it must be a Value or a number.") from None


def joined(outer: Formula, at: Mapping[int, tuple[Formula, Sequence[int]]], inputs: Mapping[int, int]) -> Formula:
    """`outer` with formulas in place of some of its inputs: at[i] is what makes input i, and the numbers that its own
    inputs have in the result; `inputs` are the numbers of the others. GraphError where there is no room."""
    steps: list[Applied] = []
    made: dict[str, str] = {f"x{i}": f"x{n}" for i, n in inputs.items()}
    for i, (inner, numbers) in at.items():
        base = len(steps)
        steps += [_moved(step, {f"x{k}": f"x{n}" for k, n in enumerate(numbers)}, base) for step in inner.steps]
        made[f"x{i}"] = f"s{len(steps) - 1}"
    base = len(steps)
    steps += [_moved(step, made, base) for step in outer.steps]
    count = len({a for step in steps for a in step.arguments if isinstance(a, str) and a[0] == "x"})
    return formula(Formula(tuple(steps), count).text)


def _moved(step: Applied, names: Mapping[str, str], base: int) -> Applied:
    def renamed(argument: Argument) -> Argument:
        if isinstance(argument, float):
            return argument
        return names[argument] if argument[0] == "x" else f"s{base + int(argument[1:])}"

    return Applied(step.name, tuple(map(renamed, step.arguments)))
