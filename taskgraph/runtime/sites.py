"""What the launch rules of one step may ask for: scratch of the step's lane, and constants."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.runtime import driver
from taskgraph.runtime.driver import Memory


class LaneSite:
    """What launch rules may ask for, a step each. Ops on a lane run in order, so they share its scratch; constants
    live as long as the executable. A step that is bound again asks for the same and gets the same."""

    def __init__(self, sm_count: int, own: Callable[[int], Memory], scratch: list[Memory]) -> None:
        self._sm_count, self._own, self._scratch = sm_count, own, scratch
        self._kept: list[tuple[bytes | int, Memory]] = []
        self._at = 0

    @property
    def sm_count(self) -> int:
        return self._sm_count

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

    def _shared(self, nbytes: int) -> Memory:
        """The lane's least scratch that is large enough and that this step does not have yet; else a new one."""
        mine = {memory.address for _, memory in self._kept}
        fits = [m for m in self._scratch if m.nbytes >= nbytes and m.address not in mine]
        if not fits:
            self._scratch.append(self._own(nbytes))
            return self._scratch[-1]
        return min(fits, key=lambda memory: memory.nbytes)

    def _next(self, what: bytes | int, make: Callable[[], Memory]) -> Memory:
        if self._at == len(self._kept):
            self._kept.append((what, make()))
        kept, memory = self._kept[self._at]
        assert kept == what, "a launch rule asks for the same each time"
        self._at += 1
        return memory
