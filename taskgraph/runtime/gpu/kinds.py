"""How each op kind runs on a GPU by kernels: the registry, open to other packages, and what the functions in it share.

Launches are made once, before capture, from the op and the addresses of its buffers. Nothing here imports CUDA.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from taskgraph.errors import BackendUnavailable, GraphError
from taskgraph.graph.op import ITEMSIZE, Op, Rows
from taskgraph.ops.kinds import known
from taskgraph.record import as_path, function
from taskgraph.runtime.gpu import virtual
from taskgraph.runtime.gpu.ahead.cubins import Specialisation, obtainable

THREADS = 128
"""Threads of a block in the kernels that reduce over one; `common.cuh` has the same number."""
_SM_THREADS = 2048
"""Resident threads of an SM (CUDA Programming Guide, compute capabilities 8.0, 9.0, 10.0)."""
KERNELS: Final = virtual.sources() / "kernels"
"""The .cu files of this package, and `common.cuh`, which every file may include."""


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from entry to entry along each axis, last axis fastest."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor on the device: where it is and what it is. `pinned`: it lies in pinned host memory. `strides`, in
    elements, where its rows do not lie one after another."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    pinned: bool = False
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def part(self, rows: Rows) -> "Buffer":
        """The rows of this tensor, in place."""
        shape = (*self.shape[: rows.axis], rows.stop - rows.start, *self.shape[rows.axis + 1 :])
        strides = self.strides or dense_strides(self.shape)
        offset = rows.start * strides[rows.axis] * ITEMSIZE[self.dtype]
        dense = self.strides is None and math.prod(self.shape[: rows.axis]) == 1
        return replace(self, address=self.address + offset, shape=shape, strides=None if dense else strides)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel on a grid of blocks of `block` threads. `source` is the .cu file that it is in, the one that its kind
    is registered with, or the Triton function that it is compiled from."""

    kernel: str
    grid: tuple[int, ...]
    block: int
    args: tuple[Any, ...]
    source: Path | Specialisation = Path()
    scratch: int = 0
    """Address of what a Triton function keeps between its own instructions (`Specialisation.scratch_bytes` a block)."""
    dependent: bool = False
    """Whether a kernel of a .cu file waits, before it touches memory, for the kernel before it; of a Triton function
    its code says that."""


@dataclass(frozen=True, slots=True)
class CopyLaunch:
    """A copy by a copy engine."""

    target: int
    source: int
    nbytes: int


class GpuSite(Protocol):
    """What may be asked for: the SMs of the lane, what they are, scratch memory, and constants on the device."""

    @property
    def sm_count(self) -> int: ...

    @property
    def arch(self) -> str:
        """The architecture whose cubins run here, "sm_90" say; "" where none do, as on a virtual device."""
        ...

    def scratch(self, nbytes: int) -> int:
        """Address of bytes that belong to this op alone."""
        ...

    def constant(self, values: npt.NDArray[Any]) -> int:
        """Address of a copy of `values`."""
        ...

    def fault(self) -> int:
        """Address of this op's word in pinned memory, where its kernels `report` what they cannot use (common.cuh)."""
        ...


Launches = list[Launch | CopyLaunch]
Rule = Callable[[Op, Sequence[Buffer], Sequence[Buffer], GpuSite], Launches]
Takes = Callable[[Op, Sequence[Buffer], Sequence[Buffer]], bool]
"""Whether the Triton kernels of a kind take an op with these inputs and outputs: types, dims, strides."""


@dataclass(frozen=True, slots=True)
class GpuKind:
    """How a kind of op runs on a GPU: `launches` gives the kernels, which are in the .cu file `source`, and their
    arguments. `strided`: they take the strides of the operands; else all rows lie one after another. `dependent`: they
    wait for the kernel before (`follow` in common.cuh) before they touch memory."""

    launches: Rule
    source: Path
    strided: bool = False
    dependent: bool = False


@dataclass(frozen=True, slots=True)
class AheadKind:
    """How a kind of op runs by Triton functions that are compiled ahead, where `takes` says that they can."""

    launches: Rule
    takes: Takes


_KINDS: dict[str, GpuKind] = {}
GPU_KINDS: Final[Mapping[str, GpuKind]] = MappingProxyType(_KINDS)
"""How each kind runs, by its name."""
_AHEAD: dict[str, AheadKind] = {}
AHEAD_KINDS: Final[Mapping[str, AheadKind]] = MappingProxyType(_AHEAD)
"""How each kind that has Triton functions runs by them, by its name."""


def register(kind: str, launches: Rule, source: str | Path, *, strided: bool = False, dependent: bool = False) -> None:
    """Say how ops of `kind` run on a GPU: `launches` gives their kernels, `source` is the .cu file with them.

    `dependent`: each of them calls `follow()` of common.cuh before it touches memory, as all of this package's do. Only
    then may it be launched while the kernel before it on its lane still runs.

    It is compiled when a kernel of it is first needed: by NVRTC for a real device, by the host's compiler for a virtual
    one. GraphError for a kind that is not registered in `taskgraph.ops` or has other kernels already, and for a file
    that does not exist."""
    known(kind)
    path = as_path(source, GraphError, f"the kernels of {kind}").absolute()
    if path.suffix != ".cu" or not path.is_file():
        raise GraphError(f"the kernels of {kind} are in {str(path)!r}, which is no .cu file; give one that exists.")
    follows = dependent or path.parent == KERNELS.absolute()
    made = GpuKind(function(f"what launches a {kind}", launches, GraphError), path, strided, follows)
    if _KINDS.setdefault(kind, made) != made:
        raise GraphError(f"op kind {kind!r} has kernels for the cuda backend already; register another kind.")


def register_ahead(kind: str, launches: Rule, takes: Takes) -> None:
    """Say how ops of `kind` run by Triton functions on a real GPU.

    `launches` makes `ahead.launching.launch`es of them; `takes` says which ops they can do, the others keep to the .cu
    file that `register` was given, if any. GraphError for a kind that is not registered in `taskgraph.ops` or has other
    functions already."""
    known(kind)
    made = AheadKind(
        function(f"what launches a {kind}", launches, GraphError), function(f"what takes a {kind}", takes, GraphError)
    )
    if _AHEAD.setdefault(kind, made) != made:
        raise GraphError(f"op kind {kind!r} has Triton functions already; register another kind.")


def launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """The launches of one op; BackendUnavailable when there is no kernel for its kind, types or shape.

    They are of Triton functions where its kind has such, cubins run on the site, and that of each is kept or can be
    compiled; else of the .cu file."""
    if site.arch and runs_ahead(op, ins, outs, DrySite(site.sm_count, site.arch)):
        return AHEAD_KINDS[op.kind].launches(op, ins, outs, site)
    kind = GPU_KINDS.get(op.kind)
    if kind is None:
        raise BackendUnavailable(
            f"op {op.name!r}: the cuda backend has no kernel for kind {op.kind!r}; register one by "
            "taskgraph.runtime.gpu.kinds.register, or use GraphBuilder.call with a function that launches on the "
            "stream it is given."
        )
    strided = next((name for name, b in zip(op.inputs, ins, strict=True) if b.strides is not None), None)
    if strided is not None and not kind.strided:
        raise BackendUnavailable(
            f"op {op.name!r}: the {op.kind} kernel reads dense rows; its view of {strided!r} is not. Copy it first."
        )
    made = kind.launches(op, ins, outs, site)
    source, follows = kind.source, kind.dependent
    return [replace(one, source=source, dependent=follows) if isinstance(one, Launch) else one for one in made]


def runs_ahead(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: "DrySite") -> bool:
    """Whether the op runs by Triton functions there."""
    kind = AHEAD_KINDS.get(op.kind)
    if kind is None or not kind.takes(op, ins, outs):
        return False
    return all(obtainable(spec, site.arch) for spec in specialisations(op, ins, outs, site))


def specialisations(
    op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: "DrySite"
) -> tuple[Specialisation, ...]:
    """The cubins that an op which Triton functions take needs there."""
    made = AHEAD_KINDS[op.kind].launches(op, ins, outs, site)
    found = [one.source for one in made if isinstance(one, Launch) and isinstance(one.source, Specialisation)]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class DrySite:
    """A site of launches that are never made: its addresses are those of nothing, aligned as scratch is."""

    sm_count: int
    arch: str

    def scratch(self, nbytes: int) -> int:
        return 256

    def constant(self, values: npt.NDArray[Any]) -> int:
        return 256

    def fault(self) -> int:
        return 8


TRITON, CU, COPY = "Triton", "cuda/kernels", "copy engine"


def made_by(made: Launches) -> str:
    """What runs the launches of an op, for people."""
    kernels = [one for one in made if isinstance(one, Launch)]
    if not kernels:
        return COPY
    return TRITON if all(isinstance(one.source, Specialisation) for one in kernels) else CU


def seen(op: Op, ins: Sequence[Buffer]) -> list[Buffer]:
    """The inputs of `op` narrowed to the rows that it takes of them."""
    views = op.views
    return [b.part(views[i]) if i in views else b for i, b in enumerate(ins)]


def float_type(op: Op, *buffers: Buffer) -> str:
    """The one float type of all buffers, for the kernel's name."""
    found = {b.dtype for b in buffers}
    if len(found) != 1 or not found <= {"f32", "bf16"}:
        raise BackendUnavailable(
            f"op {op.name!r}: the {op.kind} kernels take one type, f32 or bf16; got {', '.join(sorted(found))}."
        )
    return found.pop()


def blocks(kernel: str, grid: tuple[int, ...], block: int, args: tuple[Any, ...], site: GpuSite) -> Launch:
    """A launch of a kernel that loops over the blocks of `grid` (`each_block` in common.cuh): no more blocks than the
    SMs that the op is launched on hold at a time."""
    nx, ny, nz = (*grid, 1, 1)[:3]
    at_once = site.sm_count * (_SM_THREADS // block)
    launched = min(nx * ny * nz, at_once)
    return Launch(kernel, (launched,), block, (*args, np.int32(nx), np.int32(ny), np.int32(nz)))


def spread(elements: int, site: GpuSite) -> tuple[int, ...]:
    """A grid for grid-stride loops: enough blocks to fill the lane's SMs, not more than there is work."""
    return (max(1, min(-(-elements // 256), 8 * site.sm_count)),)


def need_i64(op: Op, positions: Buffer) -> None:
    """BackendUnavailable unless the positions are what the kernels read."""
    if positions.dtype != "i64":
        raise BackendUnavailable(f"op {op.name!r}: positions must be i64 on the cuda backend; got {positions.dtype}.")


def at_most(op: Op, what: str, number: int, limit: int) -> None:
    """BackendUnavailable beyond what the kernels' arrays hold."""
    if number > limit:
        raise BackendUnavailable(f"op {op.name!r}: the {op.kind} kernels take up to {limit} {what}; got {number}.")
