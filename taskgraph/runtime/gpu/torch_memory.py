"""Memory that torch allocates inside our captures: a pool of its own for each executable, alive as long as it is.

A captured graph holds addresses. A temporary of a torch op is given back to torch's allocator when the op returns, the
workspace of cuBLAS on a lane's stream when its owner clears them; from the common pool a later eager op could get the
same memory, and a replay would write over it. Memory of a `torch.cuda.MemPool` goes to nobody else while that lives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class TorchPool:
    """A pool of torch's allocator; nothing where torch has no CUDA device, for then it allocates no device memory."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.MemPool() if torch.cuda.is_available() else None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the block what this thread allocates by torch on the device comes from the pool."""
        if self._pool is None:
            yield
            return
        with torch.cuda.use_mem_pool(self._pool):
            yield

    def close(self) -> None:
        """Let the memory go; the graphs that use it must be closed. A second call does nothing."""
        self._pool = None


def held_bytes() -> int:
    """Device memory that torch's allocator holds, the workspaces of cuBLAS among it."""
    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0
