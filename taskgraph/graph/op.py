"""The values a graph is made of: Tensor, Work, Demand, Op. Frozen; SI numbers only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Final

from taskgraph.errors import DemandError, GraphError
from taskgraph.record import Typed, integer, shown
from taskgraph.units import parse_bytes, parse_rate

RESOURCES: Final = ("sm", "hbm", "h2d", "d2h", "link")
"""Order of every resource vector in the package."""

ROLES: Final = ("input", "weight", "state", "activation")

ITEMSIZE: Final[Mapping[str, int]] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8": 1,
    "i64": 8, "i32": 4, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip

MOST_TENSOR_BYTES: Final = 1 << 48
"""No tensor is larger, so that the bytes of all tensors of a graph are an integer of 64 bits."""
_MOST_WORKSPACE: Final = 1 << 56
LEAST_RATE: Final = 1e-3
LEAST_EFFICIENCY: Final = 1e-9
MOST_WORK: Final = 1e30
"""No part of a Work is larger, and no rate smaller, so that sums and times of all ops are finite."""

Attr = str | int | float | bool | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work(Typed, error=GraphError):
    """What a whole op does to the hardware, whoever runs it; works add up.

    Numbers, kept as floats; GraphError for anything else. A graph takes what is finite, from 0 to MOST_WORK, and not
    all zero."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    h2d_bytes: float = 0.0
    d2h_bytes: float = 0.0
    link_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.vector, other.vector, strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(a * times for a in self.vector))

    @property
    def vector(self) -> tuple[float, float, float, float, float]:
        """(flops, hbm, h2d, d2h, link), in the order of RESOURCES."""
        return (self.flops, self.hbm_bytes, self.h2d_bytes, self.d2h_bytes, self.link_bytes)


@dataclass(frozen=True, slots=True, repr=False)
class Demand(Typed, error=DemandError):
    """What the user pins about an op's use of the device; what is absent is derived from its Work.

    `sm` is the (min, max) number of SMs the op may be given; the rates cap what it draws from a
    soft resource, in bytes/s; `cluster_sms` is the size of its thread-block clusters in SMs. `efficiency`, above 0 and
    1 at most, is the share of its SMs' rate, in the dtype of its first output, at which its flops run: a formula says
    no shorter time; a measured one wins over both. DemandError for what is no such number.
    """

    _LATER: ClassVar[frozenset[str]] = frozenset({"efficiency"})

    sm: tuple[int, int] | None = None
    hbm_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    workspace_bytes: int = 0
    cluster_sms: int = 1
    efficiency: float = 1.0

    def __repr__(self) -> str:
        """As of a dataclass, without an efficiency of 1: fingerprints hold it, and older graphs keep theirs."""
        said = [f.name for f in fields(self) if f.name != "efficiency" or self.efficiency != 1.0]
        return f"Demand({', '.join(f'{name}={getattr(self, name)!r}' for name in said)})"

    def _check(self) -> None:
        if self.sm is not None and not 1 <= self.sm[0] <= self.sm[1]:
            raise DemandError(f"demand.sm is (min, max) with 1 <= min <= max; got {self.sm}.")
        for rate in ("hbm_bytes_per_s", "pcie_bytes_per_s", "link_bytes_per_s"):
            value = getattr(self, rate)
            if value is not None and not LEAST_RATE <= value <= MOST_WORK:
                raise DemandError(
                    f"demand.{rate} must be positive and finite, from {LEAST_RATE:g} to {MOST_WORK:g}; got {value}."
                )
        if not 0 <= self.workspace_bytes <= _MOST_WORKSPACE or self.cluster_sms < 1:
            raise DemandError(
                f"demand.workspace_bytes must be from 0 to {_MOST_WORKSPACE} and demand.cluster_sms >= 1; got "
                f"{self.workspace_bytes} and {self.cluster_sms}."
            )
        if not LEAST_EFFICIENCY <= self.efficiency <= 1.0:
            raise DemandError(
                f"demand.efficiency is a share of the device's rate, from {LEAST_EFFICIENCY:g} to 1; got "
                f"{self.efficiency}."
            )


PLAIN: Final = Demand()
"""The demand of an op that pins nothing."""


def demand(
    sm: int | tuple[int, int] | None = None,
    hbm: str | float | None = None,
    pcie: str | float | None = None,
    link: str | float | None = None,
    workspace: str | float = 0,
    cluster_sms: int = 1,
    efficiency: float = 1.0,
) -> Demand:
    """A Demand from friendly units: `demand(sm=(2, 8), pcie="20GB/s", workspace="32MiB", efficiency=0.3)`.

    DemandError for what is no such unit or number."""
    return Demand(
        sm=sm if sm is None or isinstance(sm, (tuple, list)) else (integer("demand.sm", sm, DemandError),) * 2,
        hbm_bytes_per_s=None if hbm is None else parse_rate(hbm),
        pcie_bytes_per_s=None if pcie is None else parse_rate(pcie),
        link_bytes_per_s=None if link is None else parse_rate(link),
        workspace_bytes=int(parse_bytes(workspace)),
        cluster_sms=cluster_sms,
        efficiency=efficiency,
    )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor that is still to be made."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def spec(name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
    """Declare an output of a custom op: `spec("pages", (64, 1 << 20), "u8")`. GraphError if that is no tensor."""
    Tensor(name, shape, dtype)
    return TensorSpec(name, tuple(shape), dtype)


@dataclass(frozen=True, slots=True)
class Tensor(Typed, error=GraphError):
    """An edge of the graph. `role` is one of ROLES; only activations live in the arena."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str = "activation"

    def _check(self) -> None:
        if not self.name:
            raise GraphError("a tensor needs a name.")
        if self.dtype not in ITEMSIZE:
            raise GraphError(
                f"tensor {self.name!r} has unknown dtype {self.dtype!r}; use one of {', '.join(ITEMSIZE)}."
            )
        if self.role not in ROLES:
            raise GraphError(f"tensor {self.name!r} has unknown role {self.role!r}; use one of {', '.join(ROLES)}.")
        if any(n <= 0 for n in self.shape):
            raise GraphError(f"tensor {self.name!r} has shape {self.shape}; every dimension must be a positive int.")
        if self.nbytes > MOST_TENSOR_BYTES:
            raise GraphError(f"tensor {self.name!r} has {self.nbytes} bytes; a tensor has {MOST_TENSOR_BYTES} at most.")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Rows:
    """The part of a tensor from `start` to `stop` along `axis`."""

    axis: int
    start: int
    stop: int

    def overlaps(self, other: "Rows") -> bool:
        """Whether the two parts may share an element."""
        return self.axis != other.axis or (self.start < other.stop and other.start < self.stop)

    def covers(self, other: "Rows") -> bool:
        """Whether every element of `other` is an element of this part."""
        return self.axis == other.axis and self.start <= other.start and other.stop <= self.stop

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor with the shape of this part; GraphError if the part is not within it."""
        shape = tensor.shape
        if not (0 <= self.axis < len(shape) and 0 <= self.start < self.stop <= shape[self.axis]):
            part = f"rows {self.start}:{self.stop} on axis {self.axis}"
            raise GraphError(f"tensor {tensor.name!r} of shape {list(shape)} has no {part}.")
        return replace(tensor, shape=(*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :]))


ROWS: Final = "rows"
"""The attribute of an op that says which rows of its inputs it takes."""
BATCH_ROWS: Final = "batch_rows"
"""The attribute of a slice that says which rows of the batch it stands for in its states: see `Op.batch_rows`."""


def rows_attr(views: Mapping[int, Rows]) -> tuple[int, ...]:
    """The value of the attribute `rows` that `Op.views` reads back."""
    return tuple(n for i in sorted(views) for n in (i, views[i].axis, views[i].start, views[i].stop))


def with_rows(attrs: Mapping[str, Attr], views: Mapping[int, Rows]) -> tuple[tuple[str, Attr], ...]:
    """The attributes of an op that takes these rows of its inputs, in place of those that `attrs` may say."""
    rows: dict[str, Attr] = {ROWS: rows_attr(views)} if views else {}
    return tuple(sorted({**{key: value for key, value in attrs.items() if key != ROWS}, **rows}.items()))


def seen_inputs(op: "Op", tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs of `op` as it sees them: narrowed to its rows."""
    views = op.views
    whole = [tensors[name] for name in op.inputs]
    return [views[i].of(t) if i in views else t for i, t in enumerate(whole)] if views else whole


@dataclass(frozen=True, slots=True)
class Op(Typed, error=GraphError):
    """A node. `writes` names the state tensors among `inputs` that it changes in place.

    `after` names ops that must end first though no tensor connects them; `attrs` holds the static
    parameters of the kind as sorted (key, value) pairs. There are no callables inside. The attributes `rows`
    and `batch_rows` belong to every kind: see `views` and `batch_rows`.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Work
    demand: Demand = PLAIN
    after: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()

    def _check(self) -> None:
        if not self.name or not self.kind:
            raise GraphError(f"an op needs a name and a kind; got {self.name!r} and {self.kind!r}.")
        keys = [key for key, _ in self.attrs]
        if len({*keys}) < len(keys):
            raise GraphError(f"op {self.name!r} has two attributes of one name among {', '.join(keys)}.")
        for key, value in self.attrs:
            if isinstance(value, float) and not math.isfinite(value):
                raise GraphError(f"attribute {key!r} of op {self.name!r} is {value}; it must be finite.")
            if key == ROWS and not (isinstance(value, tuple) and len(value) % 4 == 0 and min(value, default=0) >= 0):
                raise GraphError(
                    f"attribute {ROWS!r} of op {self.name!r} is {shown(value)}; it has four numbers a view."
                )
            if key == BATCH_ROWS and not (isinstance(value, tuple) and len(value) == 2 and 0 <= value[0] <= value[1]):
                raise GraphError(
                    f"attribute {BATCH_ROWS!r} of op {self.name!r} is {shown(value)}; it has a start and an end."
                )

    def attr(self, key: str, default: Attr | None = None) -> Attr:
        """The static parameter `key`; GraphError if the op has none and no default is given."""
        for name, value in self.attrs:
            if name == key:
                return value
        if default is None:
            raise GraphError(f"op {self.name!r} of kind {self.kind!r} has no attribute {key!r}.")
        return default

    @property
    def views(self) -> "dict[int, Rows]":
        """Input number -> the rows of it that the op reads or writes in place of the whole; a slice costs no copy.

        Kept in the attribute `rows` as (input, axis, start, stop) of every narrowed input, one after another.
        """
        for name, value in self.attrs:
            if name == ROWS and isinstance(value, tuple) and len(value) % 4 == 0:
                return {value[i]: Rows(*value[i + 1 : i + 4]) for i in range(0, len(value), 4)}
        return {}

    @property
    def batch_rows(self) -> tuple[int, int] | None:
        """The rows of a batch that the op stands for, where its places in states are data: it writes those of its rows,
        which no other row has, and reads those of its rows and of the rows before them."""
        for name, value in self.attrs:
            if name == BATCH_ROWS and isinstance(value, tuple) and len(value) == 2:
                return value
        return None

    def integer(self, key: str, default: int | None = None) -> int:
        """The static parameter `key` as an int."""
        value = self.attr(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise GraphError(f"attribute {key!r} of op {self.name!r} must be an int; got {value!r}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The static parameter `key` as a float."""
        value = self.attr(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise GraphError(f"attribute {key!r} of op {self.name!r} must be a number; got {value!r}.")
        return float(value)


def check_work(name: str, work: Work) -> None:
    """GraphError unless `work` is from 0 to MOST_WORK and not all zero."""
    vector = work.vector
    if min(vector) >= 0.0 and 0.0 < sum(vector) <= MOST_WORK:  # the sum of what is no number is none
        return
    for field, value in zip(fields(work), vector, strict=True):
        if not 0 <= value <= MOST_WORK:
            raise GraphError(
                f"op {name!r} has work.{field.name} = {value}; it must be finite, not negative, {MOST_WORK:g} at most."
            )
    if not any(vector):
        raise GraphError(f"op {name!r} has no work at all; give it flops or bytes, or leave it out of the graph.")
