"""Pointwise formulas as kernels read them: words for the steps, and where each element of an operand lies.

Both backends interpret a formula: one compiled kernel runs every formula there is, so that none is compiled when a
graph is. The codes are those of `formula.OPERATIONS`; `cuda/kernels/pointwise.cu` has the same.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from taskgraph.ops.formula import OPERATIONS, Formula, placed

WORDS: Final = 5
"""Words of a step: code, register of the result, three arguments."""
LOAD: Final = len(OPERATIONS)
CODES: Final = {**{name: i for i, name in enumerate(OPERATIONS)}, "load": LOAD}
MOST_AXES: Final = 6

TYPES: Final = {"f32": 0, "bf16": 1, "f16": 2, "bool": 3, "i32": 4, "i64": 5}
"""How kernels tell the stored types apart."""


def steps_of(made: Formula) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """The steps (n, WORDS) and the numbers of the formula; an argument below 0 is number -1 - argument."""
    numbers: dict[str, int] = {}
    values: list[float] = []
    rows = []
    for step in placed(made):
        words = [CODES[step.name], step.into, 0, 0, 0]
        for i, argument in enumerate(step.takes):
            if isinstance(argument, float):
                if repr(argument) not in numbers:
                    numbers[repr(argument)] = len(values)
                    values.append(argument)
                words[2 + i] = -1 - numbers[repr(argument)]
            else:
                words[2 + i] = argument
        rows.append(words)
    return np.array(rows, np.int32), np.array(values, np.float64)


def single(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The numbers of a formula that is computed in float32."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


def axes_of(
    shape: tuple[int, ...], inner: tuple[int, ...], strides: Sequence[int]
) -> tuple[list[int], list[int]] | None:
    """Sizes and strides, in elements, of the least axes along which element i of an output of `shape` is found in an
    operand of the shape `inner`, which is repeated to it: last axis last. None for more than MOST_AXES."""
    lead = len(shape) - len(inner)
    sizes: list[int] = []
    steps: list[int] = []
    for axis, size in enumerate(shape):
        repeated = axis < lead or (inner[axis - lead] == 1 and size > 1)
        step = 0 if repeated else int(strides[axis - lead])
        if size == 1:
            continue
        if steps and steps[-1] == step * size:
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > MOST_AXES:
        return None
    return sizes or [1], steps or [0]


def row_of(kind: str, sizes: Sequence[int], steps: Sequence[int]) -> list[int]:
    """An operand as kernels read it: its type, its number of axes, their sizes, their strides, last axis first."""
    rest = [0] * (MOST_AXES - len(sizes))
    return [TYPES[kind], len(sizes), *sizes[::-1], *rest, *steps[::-1], *rest]


def rows_of(operands: Sequence[tuple[str, Any]]) -> npt.NDArray[np.int64]:
    """Operands (type, (sizes, strides)) as a table."""
    return np.array([row_of(kind, *axes) for kind, axes in operands], np.int64)
