"""The table from op kind to the function that binds its buffers on a CPU, and what such functions share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from taskgraph.graph.op import Op

_FORK_ROWS = 8
Entry = Callable[[], Any]
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Site:
    """Where an op runs: the threads of its lane, and the names of the tensors that never change between replays."""

    threads: int
    constants: frozenset[str]

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


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A numpy view of a tensor for the kernels: bf16 as uint16 bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def rope_table(op: Op, length: int, dim: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """cos and sin (length, dim / 2), float32, with Llama 3's scaling of low frequencies or YaRN where the op has it."""
    inverse = 1.0 / op.number("theta") ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = op.number("scaling_factor", 0.0)
    if factor:
        low, high = op.number("scaling_low_freq"), op.number("scaling_high_freq")
        wavelength = 2 * math.pi / inverse
        turns = op.number("scaling_original_context") / wavelength
        smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        inverse = (1 - smooth) * inverse / factor + smooth * inverse
    stretch = op.number("yarn_factor", 0.0)
    if stretch:
        low, high = op.number("yarn_low"), op.number("yarn_high")
        slow = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
        inverse = inverse / stretch * slow + inverse * (1 - slow)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    size = op.number("yarn_attention", 1.0)
    return (angle.cos() * size).numpy(), (angle.sin() * size).numpy()
