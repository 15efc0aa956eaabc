"""What a kernel family is: the shape of its kernels, its coefficients, its formula and the features of its correction.

A family is one `Family` in one file of `families/`. Its formula is plain numpy over many shapes and SM counts at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from taskgraph.cost.formulas import Numbers, drawn_share
from taskgraph.cost.surface import Term
from taskgraph.errors import CalibrationError
from taskgraph.graph.op import Op, Tensor

C = TypeVar("C", bound="Coefficients")

BF16_BYTES = 2.0
"""Bytes an element of the measured kernels."""
_BLOCK = 1 << 14
"""Numbers of an array that is worked on at a time."""


class Spec(NamedTuple):
    """The device as a formula takes it: its datasheet (rates of the whole device) and its response to fewer SMs."""

    sms: float
    """SMs of the whole device."""
    flops_per_s: float
    """Dense FLOP/s in the kernel's dtype."""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """In one direction; 0 for none."""
    l2_bytes: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    hbm_reach: float
    hbm_sharp: float
    link_reach: float
    link_sharp: float
    """`reach` and `sharp` of `drawn_share`, for device memory and for the link; see `fitted.RESPONSE`."""

    @property
    def sm_flops_per_s(self) -> float:
        """FLOP/s of one SM."""
        return self.flops_per_s / self.sms

    def hbm_share(self, sms: Numbers) -> np.ndarray:
        """Share of the device memory's rate that `sms` SMs can draw."""
        return drawn_share(sms, self.sms, self.hbm_reach, self.hbm_sharp)

    def link_share(self, sms: Numbers) -> np.ndarray:
        """Share of the link's rate that `sms` SMs can draw."""
        return drawn_share(sms, self.sms, self.link_reach, self.link_sharp)


def coefficient(start: float, low: float | None = None, high: float | None = None) -> Any:
    """A field of Coefficients: where its fit starts (and stays on a device without tables), and what it can mean at
    all; by default a factor of 20 about the start. Without limits a formula may fit as well and transfer badly: an
    efficiency above 1 is another effect in disguise."""
    limits = (start / 20 if low is None else low, start * 20 if high is None else high)
    return field(default=start, metadata={"limits": limits})


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The numbers of a formula that are fitted to measurements, positive; a family's class adds its fields."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Their names, in the order of `values`."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def limits(cls) -> dict[str, tuple[float, float]]:
        """The least and the largest that each may be fitted to."""
        return {f.name: f.metadata["limits"] for f in fields(cls)}

    @classmethod
    def of(cls: type[C], values: Sequence[float] | np.ndarray) -> C:
        """The coefficients of these values."""
        return cls(*map(float, values))

    def values(self) -> np.ndarray:
        """Their values (n,)."""
        return np.array([getattr(self, name) for name in self.names()], np.float64)


class Kernel(NamedTuple):
    """What an op is for the cost model; ops of equal kernels and works take equal times."""

    family: str
    dtype: str
    """Whose arithmetic rate counts."""
    shape: tuple[Numbers, ...]
    """A value of the family's `shape`; () for a stream of the op's declared work."""


Tensors = Sequence[Tensor]
KernelRule = Callable[[Op, Tensors, Tensors], Kernel]
"""The kernel of an op from its inputs as the op sees them (a slice sees its rows of a tensor) and its outputs."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table of measurements: positive numbers, or with `zero` from 0 on, or words.

    `word` gives the number that a word stands for, None for no word of the column; `words` says what they are."""

    name: str
    zero: bool = False
    word: Callable[[str], float | None] | None = None
    words: str = ""


def blocks(count: int, width: int) -> Iterator[slice]:
    """The rows of an array (count, width), as many at a time as stay in the cache while formulas work on them."""
    step = max(1, _BLOCK // max(width, 1))
    return (slice(first, first + step) for first in range(0, count, step))


Features = Mapping[str, np.ndarray]


def _as_everywhere(spec: Spec) -> dict[str, tuple[float, float, float]]:
    return {}


def _many(shape: Any) -> np.ndarray:
    return np.full(len(shape[0]), np.inf)


@dataclass(frozen=True, slots=True)
class Family:
    """Kernels whose times one formula tells.

    `shape`: a NamedTuple class, the numbers that tell its kernels apart.
    `coefficients`: a Coefficients class; its defaults are where the fit starts.
    `formula`: seconds (n, m), launch included, of a `shape` whose fields are (n, 1) arrays, on the device of a Spec,
    with coefficients, on SM counts (m,). More SMs must never be slower.
    `kinds`: the op kinds whose ops are its kernels, with the rule that tells an op's kernel (of this family, or not).
    `columns` of a table of measurements, besides system and milliseconds, and `read`, which makes of them, by name, the
    columns of `shape`; none for a family that no table measures.
    `features`: by name the numbers (n,) of a `shape` whose fields are (n,) arrays, on which the correction depends;
    `terms`: its tables over them; `ridge`: the penalty of their fit. None for a formula without a correction.
    `choices` that the formula tries for a shape, about: so many times as large are its arrays.
    `on_device`: (start, least, largest) of the coefficients whose fit depends on the device, by name.
    `thread_blocks`: about how many a kernel of a `shape` has, whose fields are (n,) arrays: on fewer than the SMs it
    leaves the others free; infinite for kernels that fill whatever they are given. `busy`: the share of its SMs that a
    kernel keeps from others on average, tails and idle waves aside. `by_response`: the SMs that it needs are read off
    its published response to fewer SMs instead.
    """

    name: str
    shape: type[Any]
    coefficients: type[Coefficients]
    formula: Callable[[Any, Spec, Any, np.ndarray], np.ndarray]
    kinds: Mapping[str, KernelRule] = field(default_factory=dict)
    columns: tuple[Column, ...] = ()
    read: Callable[[Mapping[str, np.ndarray]], Any] | None = None
    features: Callable[[Any, Spec], Features] | None = None
    terms: tuple[Term, ...] = ()
    ridge: float = 0.3
    choices: int = 1
    on_device: Callable[[Spec], Mapping[str, tuple[float, float, float]]] = _as_everywhere
    thread_blocks: Callable[[Any], np.ndarray] = _many
    busy: float = 0.98
    by_response: bool = False

    def seconds(self, shapes: np.ndarray, spec: Spec, coefficients: Coefficients, sms: np.ndarray) -> np.ndarray:
        """The formula's seconds (n, m), launch included, of `shapes` (n, fields of `shape`) on `sms` (m,) SMs."""
        made = np.empty((len(shapes), len(sms)))
        for part in blocks(len(shapes), len(sms) * self.choices):
            columns = self.shape._make(shapes[part].T[:, :, None])
            made[part] = self.formula(columns, spec, coefficients, sms)
        return made

    def features_of(self, shapes: np.ndarray, spec: Spec) -> Features:
        """The features (n,) of `shapes` (n, fields of `shape`)."""
        return {} if self.features is None else self.features(self.shape._make(shapes.T), spec)

    def occupied(self, shapes: np.ndarray, sms: np.ndarray) -> np.ndarray:
        """The SMs (n, m) that kernels of `shapes` (n, fields of `shape`) keep from others on `sms` (n, m)."""
        made: np.ndarray = np.minimum(self.busy * sms, self.thread_blocks(self.shape._make(shapes.T))[:, None])
        return made

    def shapes_of(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """The shapes (n, fields of `shape`) in the columns of a table of measurements."""
        if self.read is None:
            raise CalibrationError(f"no table measures the family {self.name!r}.")
        return np.stack(np.broadcast_arrays(*self.read(columns)), axis=1).astype(np.float64)
