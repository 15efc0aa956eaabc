"""The table from op kind to the function that binds its buffers on a CPU, and what such functions share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from taskgraph.graph.op import Op
from taskgraph.runtime import rotary
from taskgraph.runtime.cpu.tile import DOT
from taskgraph.runtime.cpu.ways import PLAIN, Ways

if TYPE_CHECKING:
    from taskgraph.runtime.distributed import Group

_FORK_ROWS = 8
Entry = Callable[[], Any]
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Site:
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


Binder = Callable[[Op, Tensors, Tensors, Site], Entry]

BINDERS: dict[str, Binder] = {}

TORCH_DTYPE = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def binder(kind: str) -> Callable[[Binder], Binder]:
    """Register the binder of `kind`."""

    def register(function: Binder) -> Binder:
        BINDERS[kind] = function
        return function

    return register


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
