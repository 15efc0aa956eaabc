"""What the launch rules of one step may ask for: scratch of the step's lane, constants, and a word for faults."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import ExecutionError
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.driver import Memory
from taskgraph.runtime.gpu.shared import Bytes


class LaneSite:
    """What launch rules may ask for, a step each. Ops on a lane run in order, so they share its scratch; constants
    live as long as the executable. A step that is bound again asks for the same and gets the same. New scratch is
    `room`'s, where that is not the executable's own memory."""

    def __init__(
        self,
        sm_count: int,
        own: Callable[[int], Bytes],
        scratch: list[Bytes],
        fault: int,
        arch: str = "",
        room: Callable[[int], Bytes] | None = None,
    ) -> None:
        self._sm_count, self._own, self._scratch, self._fault, self._arch = sm_count, own, scratch, fault, arch
        self._room = room or own
        self._kept: list[tuple[bytes | int, Bytes]] = []
        self._at = 0

    @property
    def sm_count(self) -> int:
        return self._sm_count

    @property
    def arch(self) -> str:
        return self._arch

    def again(self) -> "LaneSite":
        """Begin from the first request."""
        self._at = 0
        return self

    def scratch(self, nbytes: int) -> int:
        return self._next(nbytes, lambda: self._shared(nbytes)).address

    def constant(self, values: npt.NDArray[Any]) -> int:
        packed = np.ascontiguousarray(values)
        memory = self._next(packed.tobytes(), lambda: self._own(packed.nbytes))
        driver.upload(memory.address, packed.ctypes.data, packed.nbytes)
        return memory.address

    def fault(self) -> int:
        return self._fault

    def _shared(self, nbytes: int) -> Bytes:
        """The lane's least scratch that is large enough and that this step does not have yet; else a new one."""
        mine = {memory.address for _, memory in self._kept}
        fits = [m for m in self._scratch if m.nbytes >= nbytes and m.address not in mine]
        if not fits:
            self._scratch.append(self._room(nbytes))
            return self._scratch[-1]
        return min(fits, key=lambda memory: memory.nbytes)

    def _next(self, what: bytes | int, make: Callable[[], Bytes]) -> Bytes:
        if self._at == len(self._kept):
            self._kept.append((what, make()))
        kept, memory = self._kept[self._at]
        assert kept == what, "a launch rule asks for the same each time"
        self._at += 1
        return memory


_WHAT = (
    "", "the token {}, which is outside its table", "the position {}, which is outside the cache",
    "the slot {}, which is outside the pages", "the page {}, which does not exist",
    "the length {}, which its block table does not hold", "chunks that end at row {}, which do not fit",
    "the index {}, which its axis has not",
)  # fmt: skip
"""By the numbers of `Fault` in common.cuh."""


class Faults:
    """A word an op in pinned host memory. Kernels write there what they were given and cannot use: reading it after a
    replay costs no copy."""

    def __init__(self, ops: Sequence[str], memory: Memory) -> None:
        self._ops = ops
        raw: Any = (ctypes.c_int64 * len(ops)).from_address(memory.address)
        self._words = np.frombuffer(raw, np.int64)
        self._words[:] = 0
        self._base = memory.address

    def address(self, step: int) -> int:
        """The address of the word of that step."""
        return self._base + 8 * step

    def check(self) -> None:
        """ExecutionError, which names the first op that reported anything since the last check."""
        if not self._words.any():
            return
        at = int(np.flatnonzero(self._words)[0])
        word, op = int(self._words[at]), self._ops[at]
        self._words[:] = 0
        value = word & ((1 << 48) - 1)
        value -= (1 << 48) if value >> 47 else 0
        raise ExecutionError(f"op {op!r} was given {_WHAT[word >> 48].format(value)}.", op=op)
