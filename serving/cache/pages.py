"""The pages of a KV cache: who holds them, what they hold, and where they go when the device is full.

A page is free, held by one or more sequences, or idle: held by none, but with a block of tokens that a later prompt
may begin with (found by the hash of all tokens up to its end). Idle pages are given away last, the longest unused
first, and go to the host's pages and from there to disk when there are such. All book-keeping; the data moves in the
steps that take the `Moves`, whose order makes it safe to reuse a page at once.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from taskgraph.serving.cache.disk import DiskTier
from taskgraph.serving.cache.parking import DISK, HOST, Parked, Parking

Pages = npt.NDArray[np.int32]
Key = bytes
"""Hash of every token from the start of a sequence to the end of a page."""


def block_keys(tokens: npt.NDArray[np.int32], page_size: int, before: Sequence[Key] = ()) -> list[Key]:
    """The keys of all full pages of `tokens`; `before` are those of its first pages that are known already."""
    keys = list(before)
    for first in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(tokens[first : first + page_size].astype(np.int32).tobytes())
        keys.append(digest.digest())
    return keys


class PagePool:
    """Pages 0 to `pages` - 1 of one memory: free, held (by reference count), or idle with a key."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.holders = np.zeros(pages, np.int32)
        self._free = np.arange(pages - 1, -1, -1, dtype=np.int32)
        self._top = pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key: dict[int, Key] = {}
        self._page: dict[Key, int] = {}

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return self._top

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: free and idle."""
        return self._top + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that someone holds."""
        return self.pages - self.available

    def allocate(self, count: int, evicted: Callable[[int, Key], None] | None = None) -> Pages:
        """`count` pages with one holder each; idle ones are told to `evicted` first. There must be enough."""
        if count > self.available:
            raise RuntimeError(f"{count} pages wanted, {self.available} available; ask `available` first.")
        while self._top < count:
            page, _ = self._idle.popitem(last=False)
            key = self._forget(page)
            if evicted is not None:
                evicted(page, key)
            self._push(np.array([page], np.int32))
        self._top -= count
        taken = self._free[self._top : self._top + count][::-1].copy()
        self.holders[taken] = 1
        return taken

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or idle."""
        self.holders[page] += 1
        self._idle.pop(page, None)

    def release(self, pages: Pages) -> None:
        """One holder less for each of these different pages; those without holders are free, or idle with a key."""
        self.holders[pages] -= 1
        left = pages[self.holders[pages] == 0]
        if not self._key:
            self._push(left)
            return
        for page in left.tolist():
            if page in self._key:
                self._idle[page] = None
            else:
                self._push(np.array([page], np.int32))

    def publish(self, page: int, key: Key) -> None:
        """`page`, which someone holds, now has the block `key`, unless another page or another key came first."""
        if key not in self._page and page not in self._key:
            self._key[page], self._page[key] = key, page

    def find(self, key: Key) -> int | None:
        """The page that has the block `key`."""
        return self._page.get(key)

    def drop(self, page: int) -> None:
        """Forget what a page holds; it is free if nobody holds it."""
        self._forget(page)
        if page in self._idle:
            del self._idle[page]
            self._push(np.array([page], np.int32))

    def clear(self) -> None:
        """Forget what all pages hold."""
        for page in list(self._key):
            self.drop(page)

    def oldest_idle(self) -> Iterable[int]:
        """Idle pages, the longest unused first."""
        return iter(self._idle)

    def key_of(self, page: int) -> Key | None:
        """The block that a page has."""
        return self._key.get(page)

    def _forget(self, page: int) -> Key:
        key = self._key.pop(page)
        del self._page[key]
        return key

    def _push(self, pages: Pages) -> None:
        self._free[self._top : self._top + len(pages)] = pages[::-1]
        self._top += len(pages)


@dataclass(slots=True)
class Moves:
    """Pages to move in a step: (device, host), (host, device) and (device, device) pairs, in this order."""

    out: list[tuple[int, int]] = field(default_factory=list)
    back: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.out or self.back or self.copies)


class PagedCache:
    """The device's pages, with the host's behind them, and the disk's behind those."""

    def __init__(self, pages: int, page_size: int, host_pages: int = 0, disk: DiskTier | None = None) -> None:
        self.page_size, self.disk = page_size, disk
        self.device, self.host = PagePool(pages), PagePool(host_pages)
        self.parking = Parking(self._give_back, disk)
        self.moves = Moves()
        self._leaving: list[tuple[PagePool, Pages]] = []
        self._flying: Counter[int] = Counter()  # host pages that launched steps fill
        self._read: Counter[int] = Counter()  # and those that they read
        self._late: list[Pages] = []

    def take_moves(self) -> Moves:
        """The moves since the last call, for the next step; pages that they read may be given away from then on, but
        those of the host, to which a disk would write at once, only when the step has ended."""
        moves, self.moves = self.moves, Moves()
        for pool, pages in self._leaving:
            pool.release(pages)
        self._leaving = []
        self._flying.update(slot for _, slot in moves.out)
        self._read.update(slot for slot, _ in moves.back)
        if self.disk is None:
            self._returned(moves)
        return moves

    def landed(self, moves: Moves) -> None:
        """The step that took `moves` has ended; host pages that run short go on to disk."""
        self._flying -= Counter(slot for _, slot in moves.out)
        if self.disk is None:
            return
        self._returned(moves)
        late, self._late = self._late, []
        for slots in late:
            self._give_back(slots)
        self._settle(self.disk)
        self._store_idle(self.disk, self.host.pages // 4 - self.host.free - self.disk.writing)

    def _returned(self, moves: Moves) -> None:
        """Release the host pages that came back by these moves."""
        slots = Counter(slot for slot, _ in moves.back)
        self._read -= slots
        for slot in slots.elements():
            self.host.release(np.array([slot], np.int32))

    def _give_back(self, slots: Pages) -> None:
        """Release host pages as soon as no step is still to fill one of them."""
        if self.disk is not None and self._in_flight().intersection(slots.tolist()):
            self._late.append(slots)
        else:
            self.host.release(slots)

    def _store_idle(self, disk: DiskTier, count: int) -> None:
        """Begin to move the `count` longest unused idle blocks of the host to disk."""
        flying = self._in_flight()
        for slot in [s for s in self.host.oldest_idle() if s not in flying][: max(count, 0)]:
            key = self.host.key_of(slot)
            assert key is not None
            if key in disk:
                self.host.drop(slot)
            else:
                self.host.hold(slot)
                disk.store(slot, key)

    def _in_flight(self) -> set[int]:
        """Host pages that a step has yet to fill."""
        return {*self._flying, *(slot for _, slot in self.moves.out)}

    def allocate(self, count: int) -> Pages:
        """`count` pages of the device; idle blocks that must make room go to the host if it has room."""
        return self.device.allocate(count, self._spill)

    def release(self, pages: Pages) -> None:
        """Give back a sequence's hold of its pages."""
        self.device.release(pages)

    def fork(self, pages: Pages) -> Pages:
        """A second holder for all pages of a sequence; `writable` before it writes to one that it shares."""
        self.device.holders[pages] += 1
        return pages.copy()

    def writable(self, page: int) -> int:
        """`page`, or a copy of it in its place when it has other holders or a key (copy-on-write)."""
        if self.device.holders[page] == 1 and self.device.key_of(page) is None:
            return page
        (fresh,) = self.allocate(1).tolist()
        self.moves.copies.append((page, fresh))
        self._leaving.append((self.device, np.array([page], np.int32)))
        return int(fresh)

    def match(self, keys: Sequence[Key]) -> Pages:
        """Hold the pages of the longest known prefix of `keys`; those on the host come back in the next step."""
        pages: list[int] = []
        for key in keys:
            page = self.device.find(key)
            if page is not None:
                self.device.hold(page)
            else:
                page = self._fetch(key)
            if page is None:
                break
            pages.append(page)
        return np.array(pages, np.int32)

    def forget(self) -> None:
        """Forget every block but those on disk: a step has failed, and with it what it wrote and moved."""
        left = Counter(slot for slot, _ in self.moves.back) + self._read
        self.moves = Moves()
        self._flying.clear()
        self._read.clear()
        for slots in [*self._late, *(np.array([slot], np.int32) for slot in left.elements())]:
            self.host.release(slots)
        self._late = []
        self.device.clear()
        self.host.clear()

    def recall(self, keys: Sequence[Key]) -> None:
        """Begin to read what is on disk of the longest known prefix of `keys`, into half the host at most."""
        room = min(self.host.pages // 2, self._loadable()) if self.disk is not None else 0
        for key in keys:
            if self.device.find(key) is not None or self.host.find(key) is not None:
                continue
            if self.disk is None or key not in self.disk or not room:
                return
            if not self.disk.loading(key):
                self.disk.load(int(self.host.allocate(1)[0]), key)
                room -= 1

    def recalling(self, keys: Sequence[Key]) -> bool:
        """Whether a block of `keys` is on its way from disk."""
        if self.disk is None:
            return False
        self._settle(self.disk)
        return any(self.disk.loading(key) for key in keys)

    def settle(self) -> None:
        """Wait for a block that is on its way to or from disk, if there is one."""
        if self.disk is not None:
            self._settle(self.disk, wait=True)

    def _settle(self, disk: DiskTier, wait: bool = False) -> None:
        done = disk.finished(wait)
        for slot, key, good in done.read:
            if self.parking.settled(key, good):
                continue
            if good:
                self.host.publish(slot, key)
            self.host.release(np.array([slot], np.int32))
        for slot, key, good in done.written:
            if self.parking.settled(key, good):
                continue
            self.host.release(np.array([slot], np.int32))
            if not self.host.holders[slot]:  # else someone wants it back already
                self.host.drop(slot)

    def swap_out(self, pages: Pages) -> Parked | None:
        """Move a sequence's pages to the host and release them; None, and nothing done, when no tier has room."""
        if not self._make_room(len(pages)):
            return None
        slots = self.host.allocate(len(pages))
        self.moves.out += zip(pages.tolist(), slots.tolist(), strict=True)
        self.release(pages)
        return self.parking.park(slots)

    def room_later(self, count: int) -> bool:
        """Whether the host may have `count` pages when the steps that run have ended, though it has not now."""
        return self.disk is not None and count <= self.host.pages and bool(self._in_flight() or self._read)

    def _loadable(self) -> int:
        """Host pages that `allocate` gives and no step is still to fill, so that the disk may write to them."""
        flying, ready = self._in_flight(), 0
        for slot in self.host.oldest_idle():
            if slot in flying:
                break
            ready += 1
        return self.host.free + ready

    def swap_in(self, parked: Parked) -> Pages | None:
        """The device pages that a sequence comes back to; None when the device has no room, or the sequence is not on
        the host: then it is on its way there, or gone when no tier has room for it to pass."""
        count = len(parked.slots)
        if self.disk is not None and parked.place != HOST:
            self._settle(self.disk)
            if parked.place == DISK and self._make_room(count) and self._loadable() >= count:
                self.parking.read(parked, self.host.allocate(count))
            elif parked.place == DISK and not self.room_later(count):
                self.parking.drop(parked)
        if parked.place != HOST or self.device.available < count:
            return None
        pages = self.allocate(count)
        self.moves.back += zip(parked.slots.tolist(), pages.tolist(), strict=True)
        self.parking.leave(parked)
        return pages

    def _make_room(self, count: int) -> bool:
        """Whether the host can give `count` pages. The longest unused of it go to disk first, idle blocks and then
        parked sequences, and are waited for."""
        if self.disk is None or self.host.free >= count or self.host.pages < count:
            return self.host.available >= count
        self._settle(self.disk)
        while self.host.free < count:
            self._store_idle(self.disk, count - self.host.free - self.disk.writing)
            coming, flying = self.host.available + self.disk.writing, self._in_flight()
            while coming < count and (parked := self.parking.next_out(flying)):
                self.parking.write(parked)
                coming += len(parked.slots)
            if not self.disk.busy:
                break
            self._settle(self.disk, wait=True)
        return self.host.available >= count

    def _spill(self, page: int, key: Key) -> None:
        if self.host.find(key) is not None or not self.host.available:
            return
        (slot,) = self.host.allocate(1)
        self.moves.out.append((page, int(slot)))
        self.host.publish(int(slot), key)
        self._leaving.append((self.host, np.array([slot], np.int32)))

    def _fetch(self, key: Key) -> int | None:
        slot = self.host.find(key)
        if slot is None or not self.device.available:
            return None
        self.host.hold(slot)
        (page,) = self.allocate(1).tolist()
        self.moves.back.append((slot, page))
        self.device.publish(page, key)
        return int(page)
