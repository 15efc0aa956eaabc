"""The pages of sequences that were pre-empted: on the host, and on disk when the host has no room for more."""

import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from taskgraph.serving.cache.disk import DiskTier

Slots = npt.NDArray[np.int32]
HOST, WRITING, DISK, READING, GONE = "host", "writing", "disk", "reading", "gone"
"""Where a parked sequence is: on the host, on its way to disk, there, on its way back, or nowhere any more."""


@dataclass(slots=True, eq=False)
class Parked:
    """A sequence's pages off the device: its host pages, unless it is on disk, and the blocks it is on disk as."""

    slots: Slots
    place: str = HOST
    keys: list[bytes] = field(default_factory=list)
    moving: int = 0
    failed: bool = False
    unwanted: bool = False


class Parking:
    """Sequences in the order in which they were parked. A sequence is on disk whole or not at all; what cannot be
    written stays on the host, and what cannot be read is gone."""

    def __init__(self, release: Callable[[Slots], None], disk: DiskTier | None) -> None:
        """`release` takes the host pages that are given up."""
        self._release, self._disk = release, disk
        self._all: list[Parked] = []
        self._moving: dict[bytes, Parked] = {}
        self._names = itertools.count()

    def __len__(self) -> int:
        return len(self._all)

    def park(self, slots: Slots) -> Parked:
        """The sequence whose pages are in these host pages."""
        self._all.append(parked := Parked(slots))
        return parked

    def writable(self) -> list[Parked]:
        """Those on the host that the disk has room for, the longest parked first."""
        room = self._disk.room if self._disk is not None else 0
        return [p for p in self._all if p.place == HOST and not p.failed and len(p.slots) <= room]

    def next_out(self, flying: Container[int]) -> Parked | None:
        """The one to write next: none of its pages is still on its way to the host."""
        return next((p for p in self.writable() if not any(s in flying for s in p.slots.tolist())), None)

    def write(self, parked: Parked) -> None:
        """Begin to move a sequence from the host to disk."""
        assert self._disk is not None
        parked.keys = [b"parked%d" % next(self._names) for _ in parked.slots]
        self._begin(parked, WRITING)
        for slot, key in zip(parked.slots.tolist(), parked.keys, strict=True):
            self._disk.store(slot, key, pinned=True)

    def read(self, parked: Parked, slots: Slots) -> None:
        """Begin to move a sequence from disk to these host pages."""
        assert self._disk is not None
        parked.slots = slots
        self._begin(parked, READING)
        for slot, key in zip(slots.tolist(), parked.keys, strict=True):
            self._disk.load(slot, key)

    def _begin(self, parked: Parked, place: str) -> None:
        parked.place, parked.moving, parked.failed = place, len(parked.keys), False
        self._moving |= dict.fromkeys(parked.keys, parked)

    def settled(self, key: bytes, good: bool) -> bool:
        """A block has been written or read; whether it is a parked sequence's."""
        parked = self._moving.pop(key, None)
        if parked is None:
            return False
        parked.moving -= 1
        parked.failed |= not good
        if not parked.moving:
            self._arrive(parked)
        return True

    def _arrive(self, parked: Parked) -> None:
        whole = not parked.failed
        if parked.place == WRITING:
            parked.place = DISK if whole else HOST
        else:
            parked.place = HOST if whole else GONE
        if parked.place in (DISK, GONE):
            self._release(parked.slots)
        if parked.place in (HOST, GONE):
            self._clear(parked)
        if parked.place == GONE:
            self._all.remove(parked)
        elif parked.unwanted:
            self.drop(parked)

    def leave(self, parked: Parked) -> None:
        """A sequence that is on the host goes back to the device; its host pages are the caller's."""
        self._all.remove(parked)
        parked.place = GONE

    def drop(self, parked: Parked) -> None:
        """Give up a sequence's pages, at once or when they arrive."""
        if parked.place in (WRITING, READING):
            parked.unwanted = True
        elif parked.place != GONE:
            if parked.place == HOST:
                self._release(parked.slots)
            self._clear(parked)
            self.leave(parked)

    def _clear(self, parked: Parked) -> None:
        """Off the disk."""
        if self._disk is not None:
            for key in parked.keys:
                self._disk.forget(key)
        parked.keys = []
