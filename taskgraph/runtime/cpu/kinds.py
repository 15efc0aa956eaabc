"""How each op kind runs on a CPU: the registry, open to other packages, and what the functions in it share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt
import torch

from taskgraph.errors import BackendUnavailable, GraphError
from taskgraph.graph.op import Op
from taskgraph.ops.kinds import known
from taskgraph.record import function
from taskgraph.runtime import rotary
from taskgraph.runtime.cpu.tile import DOT
from taskgraph.runtime.cpu.ways import PLAIN, Ways

if TYPE_CHECKING:
    from taskgraph.runtime.distributed import Group

_FORK_ROWS = 8
Entry = Callable[[], Any]
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class CpuSite:
    """Where an op runs: the threads of its lane, the names of the tensors that never change between replays, the
    group whose ranks its collectives are between, and the ways that products run."""

    threads: int
    constants: frozenset[str]
    group: "Group | None" = None
    ways: Ways = PLAIN

    @property
    def dots(self) -> bool:
        """Whether attention multiplies bf16 by the processor's dot products, as products of few rows do."""
        return DOT and self.ways.product("bf16", 1, fixed=True) == "dot"

    def threads_for(self, rows: int) -> int:
        """One thread for a handful of rows: the work is less than a fork of the lane's threads (about 1 us)."""
        return self.threads if rows >= _FORK_ROWS else 1


Binder = Callable[[Op, Tensors, Tensors, CpuSite], Entry]

FIXED, CHANGING, TILED, COMPILED, TORCH, OWN = "fixed", "changing", "tiled", "compiled", "torch", "own"
"""By what a kind runs, for people: products with weights that stay, attention by products of operands that change,
attention by our kernels over the tile of products, other kernels of ours, torch, or the code of another package."""


@dataclass(frozen=True, slots=True)
class CpuKind:
    """How a kind of op runs on a CPU: `bind` is called once, at capture, with the op, its tensors and where it runs. It
    makes all choices (dtype, packing, shapes) and returns what every replay calls, which has none and writes into the
    given outputs. `by` is one of FIXED, CHANGING, TILED, COMPILED, TORCH, OWN."""

    bind: Binder
    by: str


_KINDS: dict[str, CpuKind] = {}
CPU_KINDS: Final[Mapping[str, CpuKind]] = MappingProxyType(_KINDS)
"""How each kind runs, by its name."""


def register(kind: str, bind: Binder, by: str = OWN) -> None:
    """Say how ops of `kind` run on a CPU. GraphError for a kind that is not registered in `taskgraph.ops`, or has other
    code here already."""
    known(kind)
    made = CpuKind(function(f"what binds a {kind}", bind, GraphError), by)
    if _KINDS.setdefault(kind, made) != made:
        raise GraphError(f"op kind {kind!r} has code for the cpu backend already; register another kind.")


TORCH_DTYPE = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def need_floats(op: Op, *tensors: torch.Tensor) -> None:
    """BackendUnavailable, which names the op, unless all are of one dtype that our kernels have: f32, bf16 or f16."""
    first = tensors[0].dtype
    if first not in (torch.float32, torch.bfloat16, torch.float16) or any(t.dtype != first for t in tensors):
        raise BackendUnavailable(f"op {op.name!r}: {op.kind} on the cpu backend takes f32, bf16 or f16, all alike.")


_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A numpy view of a tensor for the kernels: bf16 as uint16 bits, f16 as int16 bits."""
    raw = _BITS.get(tensor.dtype)
    return (tensor if raw is None else tensor.view(raw)).numpy()


def rope_table(op: Op, length: int, dim: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """cos and sin (length, dim / 2), float32."""
    inverse = torch.from_numpy(rotary.inverse_frequencies(op, dim))
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    return (angle.cos() * rotary.size(op)).numpy(), (angle.sin() * rotary.size(op)).numpy()
