"""Device memory that executables share whose replays follow one another: arenas, inputs, outputs and scratch of one are
free for the next, and their lanes too."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from taskgraph.errors import ExecutionError
from taskgraph.graph.graph import Graph
from taskgraph.runtime.gpu.driver import Gpu, Memory
from taskgraph.runtime.gpu.kinds import Buffer
from taskgraph.runtime.gpu.lanes import Lanes

ALIGNED = 256
"""Parts begin at multiples of this, as allocations of the driver do."""


class Bytes(Protocol):
    """A stretch of memory."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of shared memory."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors that lie in one stretch of memory: where each begins in it, its shape and its dtype."""

    address: int
    nbytes: int
    tensors: dict[str, tuple[int, tuple[int, ...], str]]


def aligned(nbytes: int) -> int:
    """The least multiple of `ALIGNED` that has room for so many bytes."""
    return -(-nbytes // ALIGNED) * ALIGNED


class Lease:
    """What one executable has of the memory: parts that do not meet each other, but those of other leases."""

    def __init__(self, shared: "SharedMemory") -> None:
        self._shared, self._used = shared, list[int]()
        self.nbytes = 0

    def take(self, nbytes: int) -> Part:
        """The first stretch of so many bytes that this lease has not taken; the memory grows where there is none."""
        size, slabs = aligned(max(nbytes, 1)), self._shared._slabs
        self._used += [0] * (len(slabs) - len(self._used))
        at = next((i for i, slab in enumerate(slabs) if slab.nbytes - self._used[i] >= size), len(slabs))
        if at == len(slabs):
            slabs.append(Memory(size))
            self._used.append(0)
        made = Part(slabs[at].address + self._used[at], nbytes)
        self._used[at] += size
        self.nbytes += size
        return made

    def close(self) -> None:
        """Give it back; a second call does nothing."""
        self._shared._leases.discard(self)


def placed(graph: Graph, own: Mapping[str, Buffer], lease: Lease) -> tuple[Block, dict[str, Buffer]]:
    """Places in `lease` for the inputs of a graph, one stretch for all, and for its outputs. What an executable has in
    pinned memory of the host, by its buffers `own`, stays there."""
    inputs = [t for t in graph.with_role("input") if not own[t.name].pinned]
    offsets = list(itertools.accumulate((aligned(t.nbytes) for t in inputs), initial=0))
    tensors = {t.name: (at, t.shape, t.dtype) for t, at in zip(inputs, offsets, strict=False)}
    block = Block(lease.take(offsets[-1]).address, offsets[-1], tensors)
    made = {name: Buffer(block.address + at, shape, dtype) for name, (at, shape, dtype) in tensors.items()}
    for name in graph.outputs:
        if name not in made and not own[name].pinned:
            t = graph.tensor[name]
            made[name] = Buffer(lease.take(t.nbytes).address, t.shape, t.dtype)
    return block, made


class SharedMemory:
    """Memory for executables of which one replays at a time: all of them on one stream, or each waited for.

    It is as large as the largest of them, nearly: give it those first. `CudaExecutable.share` puts an executable there.
    Close it after them. What has its memory there runs at the same time as what has it in another one, `beside`, if
    their partitions are of one split: then they are disjoint."""

    def __init__(self, device: str | None = None, beside: "SharedMemory | None" = None) -> None:
        self.lanes: Lanes = Lanes(Gpu.open(device), None if beside is None else beside.lanes)
        """What their lanes are, one stream for all that have the same."""
        self._slabs: list[Memory] = []
        self._leases: set[Lease] = set()
        self._closed = False

    def lease(self) -> Lease:
        """The share of one more executable. ExecutionError when it is closed."""
        if self._closed:
            raise ExecutionError("the shared memory is closed; make another.", op="")
        made = Lease(self)
        self._leases.add(made)
        return made

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def asked_bytes(self) -> int:
        """Bytes that its executables would hold if each had its own."""
        return sum(lease.nbytes for lease in self._leases)

    def close(self) -> None:
        """Free it; a second call does nothing."""
        self.lanes.close()
        for slab in reversed(self._slabs):
            slab.close()
        self._slabs, self._leases, self._closed = [], set(), True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
