"""Launches of Triton kernels: the arguments say which specialisation it is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.runtime.gpu.ahead.cubins import Constant, Specialisation
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launch

_POINTERS: Final[Mapping[str, str]] = {
    "f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8",
    "u8": "u8", "bool": "i1",
}  # fmt: skip
"""Triton's names of what lies in memory."""
_VALUES: Final[Mapping[type[Any], str]] = {np.int32: "i32", np.int64: "i64", np.float32: "fp32"}
_FLOATS = frozenset({"f32", "f16", "bf16"})
_DESCRIPTOR_BYTES = 128
"""Of a CUtensorMap (CUDA driver API)."""
ALIGNMENT = 16
"""Bytes of the widest load of a thread."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """An address and what lies there; `aligned` where it is always a multiple of 16, as scratch is."""

    address: int
    dtype: str
    aligned: bool = False


Argument = Buffer | Pointer | np.int32 | np.int64 | np.float32 | Constant


def launch(function: str, grid: tuple[int, ...], arguments: Mapping[str, Argument], warps: int, stages: int) -> Launch:
    """A launch of the Triton function "module:name" on `grid`.

    `arguments` has all its parameters in order. Buffers and `Pointer`s are pointers, numpy's scalars are passed by
    value; everything else (plain integers, floats, flags, texts, None) is a constant that the kernel is compiled for:
    keep what changes from batch to batch out of those."""
    types: list[tuple[str, str]] = []
    constants: list[tuple[str, Constant]] = []
    args: list[Any] = []
    for name, given in arguments.items():
        if isinstance(given, Buffer | Pointer):
            types.append((name, _pointer(given)))
            args.append(given.address)
        elif isinstance(given, np.int32 | np.int64 | np.float32):
            types.append((name, _VALUES[type(given)]))
            args.append(given)
        elif given is None or isinstance(given, int | float | str):
            constants.append((name, given))
        else:
            raise BackendUnavailable(f"{function}: the argument {name!r} is a {type(given).__name__}.")
    spec = Specialisation(function, tuple(types), tuple(constants), warps, stages)
    return Launch(spec.name, grid, 32 * warps, tuple(args), spec)


def with_descriptors(made: Launch, count: int, site: GpuSite) -> Launch:
    """The launch with room for `count` tensor descriptors (tl.make_tensor_descriptor) that each block makes."""
    assert isinstance(made.source, Specialisation)
    nbytes = count * _DESCRIPTOR_BYTES
    scratch = site.scratch(nbytes * math.prod(made.grid))
    return replace(made, source=replace(made.source, scratch_bytes=nbytes), scratch=scratch)


def _pointer(given: Buffer | Pointer) -> str:
    """Only what is loaded in wide rows says whether it is aligned: tables and lengths would give needless variants."""
    hinted = given.aligned if isinstance(given, Pointer) else given.dtype in _FLOATS
    mark = f":{ALIGNMENT}" if hinted and given.address % ALIGNMENT == 0 else ""
    return f"*{_POINTERS[given.dtype]}{mark}"
