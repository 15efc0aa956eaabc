"""Pages by hand, tier by tier: what is free, held and idle; what moves in which step; what a disk has to wait for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from taskgraph.serving.cache.disk import Done
from taskgraph.serving.cache.pages import Moves, PagedCache, PagePool, block_keys
from taskgraph.serving.cache.parking import DISK, GONE, HOST, READING, WRITING

SIZE = 4


class Slow:
    """A disk of `pages` blocks that does nothing until `finished` is called: then what was begun first, or with
    `ready` = 0 only if it is waited for."""

    def __init__(self, pages: int = 8, ready: int = 99) -> None:
        self.pages, self.ready = pages, ready
        self.kept: set[bytes] = set()
        self.pinned: set[bytes] = set()
        self.writes: list[tuple[int, bytes]] = []
        self.reads: list[tuple[int, bytes]] = []
        self.good = True
        self.asked: list[bool] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self.kept

    @property
    def writing(self) -> int:
        return len(self.writes)

    @property
    def busy(self) -> bool:
        return bool(self.writes or self.reads)

    @property
    def room(self) -> int:
        return self.pages - len(self.pinned)

    def loading(self, key: bytes) -> bool:
        return key in [k for _, k in self.reads]

    def store(self, page: int, key: bytes, *, pinned: bool = False) -> None:
        self.writes.append((page, key))
        if pinned:
            self.pinned.add(key)

    def load(self, page: int, key: bytes) -> None:
        self.reads.append((page, key))

    def finished(self, wait: bool = False) -> Done:
        self.asked.append(wait)
        done = Done()
        count = self.ready or int(wait)
        for pages, told in ((self.writes, done.written), (self.reads, done.read)):
            while pages and count:
                page, key = pages.pop(0)
                told.append((page, key, self.good))
                count -= 1
                if self.good and told is done.written:
                    self.kept.add(key)
        return done

    def forget(self, key: bytes) -> None:
        self.kept.discard(key)
        self.pinned.discard(key)


def keys_of(count: int, first: int = 0) -> list[bytes]:
    return block_keys(np.arange(first, first + count * SIZE, dtype=np.int32), SIZE)


def published(cache: PagedCache, keys: Sequence[bytes]) -> list[int]:
    """Pages of the device with these blocks, idle, the first the longest unused."""
    pages = cache.allocate(len(keys))
    for page, key in zip(pages.tolist(), keys, strict=True):
        cache.device.publish(page, key)
    for page in pages.tolist():
        cache.release(np.array([page], np.int32))
    found: list[int] = pages.tolist()
    return found


def on_host(cache: PagedCache, keys: Sequence[bytes]) -> list[int]:
    """Idle pages of the host with these blocks."""
    slots = cache.host.allocate(len(keys))
    for slot, key in zip(slots.tolist(), keys, strict=True):
        cache.host.publish(slot, key)
    for slot in slots.tolist():
        cache.host.release(np.array([slot], np.int32))
    found: list[int] = slots.tolist()
    return found


def with_disk(pages: int = 4, host: int = 4, ready: int = 99) -> tuple[PagedCache, Slow]:
    disk = Slow(ready=ready)
    tier: Any = disk
    return PagedCache(pages, SIZE, host, tier), disk


# ---------------------------------------------------------------------------------------------- keys


def test_keys_are_those_of_full_pages_and_go_on_from_known_ones() -> None:
    tokens = np.arange(20, dtype=np.int64)
    keys = block_keys(tokens, SIZE)
    assert len(keys) == 5 and {len(key) for key in keys} == {16}
    assert [len(block_keys(tokens[:n], SIZE)) for n in (0, 3, 4, 5, 7, 8)] == [0, 0, 1, 1, 1, 2]
    assert block_keys(tokens, SIZE, keys[:2]) == keys
    assert block_keys(tokens[:4], SIZE, keys[:3]) == keys[:3]
    assert block_keys(tokens[4:8], SIZE) != keys[1:2]
    assert block_keys(tokens.astype(np.int32), SIZE) == keys


# ---------------------------------------------------------------------------------------------- a pool


def test_a_pool_gives_its_pages_once_and_takes_them_back() -> None:
    pool = PagePool(4)
    assert (pool.free, pool.available, pool.held) == (4, 4, 0)
    taken = pool.allocate(3)
    assert taken.tolist() == [2, 1, 0] or taken.tolist() == [0, 1, 2]
    assert pool.holders.tolist() == [1, 1, 1, 0]
    assert (pool.free, pool.available, pool.held) == (1, 1, 3)
    assert pool.allocate(0).tolist() == [] and pool.free == 1
    with pytest.raises(RuntimeError, match="2 pages wanted, 1 available"):
        pool.allocate(2)
    pool.hold(int(taken[0]))
    pool.release(taken)
    assert (pool.free, pool.held, pool.holders[taken[0]]) == (3, 1, 1)
    pool.release(taken[:1])
    assert sorted(pool.allocate(4).tolist()) == [0, 1, 2, 3]


def test_a_block_is_that_of_the_first_page_that_has_it() -> None:
    pool = PagePool(3)
    a, b, c = pool.allocate(3).tolist()
    pool.publish(a, b"x")
    pool.publish(b, b"x")  # another page came first
    pool.publish(a, b"y")  # another key came first
    assert (pool.find(b"x"), pool.find(b"y")) == (a, None)
    assert (pool.key_of(a), pool.key_of(b)) == (b"x", None)
    pool.release(np.array([a, b, c], np.int32))
    assert (pool.free, pool.available, list(pool.oldest_idle())) == (2, 3, [a])
    pool.hold(a)
    assert (pool.held, list(pool.oldest_idle())) == (1, [])
    pool.drop(a)  # held: not free yet
    assert (pool.find(b"x"), pool.held, pool.free) == (None, 1, 2)
    pool.release(np.array([a], np.int32))
    assert pool.free == 3


def test_clearing_forgets_all_and_frees_the_idle() -> None:
    pool = PagePool(3)
    a, b, _ = pool.allocate(3).tolist()
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    pool.release(np.array([a], np.int32))
    pool.clear()
    assert (pool.free, pool.held, pool.find(b"a"), pool.find(b"b")) == (1, 2, None, None)


def test_idle_pages_are_evicted_when_free_ones_run_out_and_no_sooner() -> None:
    pool = PagePool(3)
    a, b, c = pool.allocate(3).tolist()
    for page, key in ((a, b"a"), (b, b"b")):
        pool.publish(page, key)
    for page in (b, a, c):
        pool.release(np.array([page], np.int32))
    gone: list[tuple[int, bytes]] = []
    assert pool.allocate(2, lambda page, key: gone.append((page, key))).tolist() in ([b, c], [c, b])
    assert gone == [(b, b"b")]
    assert pool.allocate(1).tolist() == [a]
    assert pool.find(b"a") is None


# ------------------------------------------------------------------------------- device and host


def test_moves_are_something_if_any_is() -> None:
    assert not Moves()
    assert Moves(out=[(0, 1)]) and Moves(back=[(0, 1)]) and Moves(copies=[(0, 1)])


def test_a_page_is_written_in_place_only_by_its_sole_holder() -> None:
    cache = PagedCache(4, SIZE)
    (page,) = cache.allocate(1).tolist()
    assert cache.writable(page) == page and not cache.moves
    twin = cache.fork(np.array([page], np.int32))
    assert twin.tolist() == [page] and cache.device.holders[page] == 2
    fresh = cache.writable(page)
    assert fresh != page and cache.moves.copies == [(page, fresh)]
    assert cache.device.holders[[page, fresh]].tolist() == [2, 1]  # the copy still reads it
    assert cache.take_moves().copies == [(page, fresh)]
    assert cache.device.holders[[page, fresh]].tolist() == [1, 1] and not cache.moves
    cache.device.publish(page, b"key")
    again = cache.writable(page)  # a page that others may find is not written to either
    assert again not in (page, fresh) and cache.moves.copies == [(page, again)]


def test_idle_blocks_go_to_the_host_and_come_back() -> None:
    cache = PagedCache(2, SIZE, host_pages=2)
    keys = keys_of(2)
    pages = published(cache, keys)
    (taken,) = cache.allocate(1).tolist()
    assert taken == pages[0]
    ((source, slot),) = cache.moves.out
    assert source == taken and cache.host.find(keys[0]) == slot and cache.device.find(keys[0]) is None
    assert cache.host.held == 1  # until the step takes its moves
    cache.take_moves()
    assert (cache.host.held, cache.host.available) == (0, 2)
    cache.release(np.array([taken], np.int32))
    found = cache.match(keys)
    assert found.tolist() == [taken, pages[1]]
    assert cache.moves.back == [(slot, taken)] and cache.device.find(keys[0]) == taken
    assert cache.device.holders[found].tolist() == [1, 1] and cache.host.holders[slot] == 1
    cache.take_moves()
    assert cache.host.holders[slot] == 0  # without a disk the host's page may be reused at once


def test_a_block_that_the_host_has_or_has_no_room_for_is_not_moved() -> None:
    cache = PagedCache(2, SIZE, host_pages=1)
    keys = keys_of(2)
    published(cache, keys)
    on_host(cache, keys[:1])
    cache.allocate(1)
    assert not cache.moves  # it is there already
    cache.host.hold(0)
    cache.allocate(1)
    assert not cache.moves and cache.device.find(keys[1]) is None


def test_the_longest_known_prefix_is_matched_and_no_block_behind_a_gap() -> None:
    cache = PagedCache(6, SIZE, host_pages=4)
    keys = keys_of(4)
    pages = published(cache, [keys[0], keys[3]])
    on_host(cache, keys[1:2])
    found = cache.match(keys)
    assert len(found) == 2 and found[0] == pages[0]
    assert cache.match(keys_of(2, first=99)).tolist() == []
    full = PagedCache(1, SIZE, host_pages=2)
    on_host(full, keys[:1])
    full.allocate(1)
    assert full.match(keys).tolist() == []  # no page to come back to


def test_a_sequence_goes_to_the_host_and_comes_back_whole() -> None:
    cache = PagedCache(4, SIZE, host_pages=3)
    pages = cache.allocate(3)
    parked = cache.swap_out(pages)
    assert parked is not None and parked.place == HOST
    assert cache.moves.out == list(zip(pages.tolist(), parked.slots.tolist(), strict=True))
    assert (cache.device.held, cache.host.held, len(cache.parking)) == (0, 3, 1)
    assert cache.swap_out(cache.allocate(1)) is None  # the host is full
    cache.take_moves()
    others = cache.allocate(1)
    assert cache.swap_in(parked) is None  # the device has two
    cache.release(others)
    back = cache.swap_in(parked)
    assert back is not None
    assert cache.moves.back == list(zip(parked.slots.tolist(), back.tolist(), strict=True))
    assert (len(cache.parking), parked.place) == (0, GONE)
    cache.take_moves()
    assert cache.host.held == 0
    assert not cache.room_later(1)  # that is for disks


def test_forgetting_frees_what_nobody_holds_and_moves_nothing() -> None:
    cache = PagedCache(4, SIZE, host_pages=4)
    keys = keys_of(3)
    published(cache, keys[:1])
    on_host(cache, keys[1:])
    held = cache.match(keys)
    cache.forget()
    assert not cache.moves
    assert [cache.device.find(k) or cache.host.find(k) for k in keys] == [None] * 3
    assert cache.host.held == 0 and cache.device.held == 3
    cache.release(held)
    assert (cache.device.free, cache.host.free) == (4, 4)


# --------------------------------------------------------------------------------------- with a disk


def test_host_pages_that_a_step_reads_or_fills_wait_for_its_end() -> None:
    cache, _ = with_disk()
    keys = keys_of(2)
    (slot, _other) = on_host(cache, keys)
    cache.match(keys[:1])
    moves = cache.take_moves()
    assert moves.back[0][0] == slot and cache.host.holders[slot] == 1
    assert cache.room_later(4) and not cache.room_later(5)
    cache.landed(moves)
    assert cache.host.holders[slot] == 0
    assert not cache.room_later(1)
    parked = cache.swap_out(cache.allocate(2))
    assert parked is not None and cache.room_later(1)
    moves = cache.take_moves()
    assert cache.room_later(1)
    cache.parking.drop(parked)
    assert cache.host.held == 2  # its pages are still being filled
    cache.landed(moves)
    assert cache.host.held == 0 and not cache.room_later(1)


def test_the_host_keeps_a_quarter_free_by_storing_what_is_longest_unused() -> None:
    cache, disk = with_disk(pages=4, host=8, ready=0)
    keys = keys_of(8)
    slots = on_host(cache, keys)
    cache.landed(Moves())
    assert disk.writes == [(slots[0], keys[0]), (slots[1], keys[1])]
    assert cache.host.holders[slots[:3]].tolist() == [1, 1, 0]
    cache.landed(Moves())
    assert disk.writing == 2  # two are on their way, and that is enough
    disk.ready = 99
    cache.settle()
    assert disk.asked[-1] is True
    assert cache.host.free == 2 and [cache.host.find(k) is None for k in keys[:3]] == [True, True, False]
    cache.landed(Moves())
    assert not disk.writes


def test_a_block_that_the_disk_has_is_dropped_and_one_in_flight_stays() -> None:
    cache, disk = with_disk(pages=4, host=4, ready=0)
    keys = keys_of(4)
    slots = on_host(cache, keys)
    disk.kept = {keys[1]}
    cache._flying.update([slots[0]])
    cache._store_idle(disk, 2)  # type: ignore[arg-type]
    assert cache.host.find(keys[1]) is None and disk.writes == [(slots[2], keys[2])]
    cache._store_idle(disk, -1)  # type: ignore[arg-type]
    assert disk.writing == 1


def test_a_block_that_cannot_be_written_leaves_the_host_all_the_same() -> None:
    cache, disk = with_disk(pages=4, host=4, ready=0)
    keys = keys_of(4)
    (first, *_) = on_host(cache, keys)
    cache.landed(Moves())
    assert disk.writes == [(first, keys[0])]
    cache.match(keys[:1])  # someone wants it back meanwhile
    disk.ready = 99
    cache.settle()
    assert cache.host.find(keys[0]) == first and cache.host.holders[first] == 1


def test_a_prefix_on_disk_is_recalled_into_half_the_host() -> None:
    cache, disk = with_disk(pages=8, host=4, ready=0)
    keys = keys_of(6)
    published(cache, keys[:1])
    disk.kept = set(keys[1:5])
    cache.recall(keys)
    assert [key for _, key in disk.reads] == keys[1:3]
    assert cache.host.held == 2 and cache.recalling(keys)
    assert disk.asked[-1] is False
    cache.recall(keys)
    assert disk.reads[2:] == [] or [key for _, key in disk.reads] == keys[1:5]
    disk.reads = disk.reads[:2]
    disk.ready = 99
    assert not cache.recalling(keys)
    assert [cache.host.find(k) is not None for k in keys] == [False, True, True, False, False, False]
    assert cache.match(keys[:3]).tolist()[0] == 0 or len(cache.match(keys[:3])) == 3


def test_nothing_is_recalled_behind_a_gap_without_room_or_without_a_disk() -> None:
    cache, disk = with_disk(pages=8, host=4, ready=0)
    keys = keys_of(4)
    disk.kept = {keys[1]}
    cache.recall(keys)
    assert not disk.reads and not cache.recalling(keys)
    small, tier = with_disk(pages=8, host=1, ready=0)
    tier.kept = set(keys)
    small.recall(keys)
    assert not tier.reads
    bare = PagedCache(4, SIZE, host_pages=4)
    bare.recall(keys)
    bare.settle()
    assert not bare.recalling(keys) and bare.host.held == 0


@pytest.mark.parametrize(("flying", "read"), [(None, 2), (0, 0), (1, 1), (3, 2)])
def test_idle_blocks_make_room_for_what_is_recalled_up_to_one_that_a_step_fills(flying: int | None, read: int) -> None:
    cache, disk = with_disk(pages=8, host=4, ready=0)
    slots = on_host(cache, keys_of(4, first=100))
    disk.kept = set(keys_of(3))
    if flying is not None:
        cache._flying.update([slots[flying]])
    cache.recall(keys_of(3))
    assert [slot for slot, _ in disk.reads] == slots[:read]


def test_a_block_that_cannot_be_read_is_not_found() -> None:
    cache, disk = with_disk(pages=8, host=4, ready=0)
    keys = keys_of(1)
    disk.kept = set(keys)
    cache.recall(keys)
    disk.good, disk.ready = False, 99
    assert not cache.recalling(keys)
    assert (cache.host.find(keys[0]), cache.host.free) == (None, 4)


def test_a_full_host_sends_idle_blocks_and_then_sequences_to_disk() -> None:
    cache, disk = with_disk(pages=8, host=4)
    first = cache.swap_out(cache.allocate(2))
    cache.landed(cache.take_moves())
    on_host(cache, keys_of(2))
    assert first is not None and cache.host.free == 0
    second = cache.swap_out(cache.allocate(3))
    assert second is not None and second.place == HOST
    assert first.place == DISK and len(disk.kept) == 4 and disk.pinned <= disk.kept
    assert cache.host.held == 3
    cache.landed(cache.take_moves())
    assert cache.swap_in(first) is None and first.place in (READING, DISK)
    cache.settle()
    for _ in range(4):
        pages = cache.swap_in(first)
        if pages is not None:
            break
        cache.settle()
    assert pages is not None and len(pages) == 2
    assert first.place == GONE and disk.pinned == set(second.keys)


def test_one_idle_block_more_is_enough_where_one_page_is_missing() -> None:
    cache, disk = with_disk(pages=8, host=4)
    keys = keys_of(3)
    on_host(cache, keys)
    parked = cache.swap_out(cache.allocate(2))
    assert parked is not None and disk.kept == {keys[0]}
    assert [cache.host.find(k) is not None for k in keys] == [False, True, True]


def test_a_sequence_larger_than_the_host_stays() -> None:
    cache, disk = with_disk(pages=8, host=2)
    pages = cache.allocate(3)
    assert cache.swap_out(pages) is None
    assert (cache.device.held, cache.host.held, disk.asked) == (3, 0, [])


def test_what_comes_from_disk_waits_for_pages_that_no_step_fills() -> None:
    cache, disk = with_disk(pages=8, host=4)
    parked = cache.swap_out(cache.allocate(3))
    assert parked is not None
    cache.landed(cache.take_moves())
    cache.parking.write(parked)
    cache.settle()
    assert parked.place == DISK and cache.host.free == 4
    filling = cache.swap_out(cache.allocate(2))  # two of the four are filled by the next step
    moves = cache.take_moves()
    assert filling is not None and cache.swap_in(parked) is None and parked.place == DISK
    cache.parking.drop(filling)
    assert cache.swap_in(parked) is None and parked.place == DISK
    cache.landed(moves)
    assert cache.swap_in(parked) is None and parked.place == READING
    assert [slot for slot, _ in disk.reads] == parked.slots.tolist()
    pages = cache.swap_in(parked)
    assert pages is not None and len(pages) == 3
    assert parked.place == GONE and not disk.kept
    cache.landed(cache.take_moves())
    assert cache.host.held == 0


def test_a_sequence_for_which_no_tier_will_have_room_is_given_up() -> None:
    cache, disk = with_disk(pages=8, host=4)
    parked = cache.swap_out(cache.allocate(3))
    assert parked is not None
    cache.landed(cache.take_moves())
    cache.parking.write(parked)
    cache.settle()
    cache.host.allocate(2)  # someone else's for ever
    assert cache.swap_in(parked) is None
    assert parked.place == GONE and not disk.kept and not disk.pinned


def test_a_write_is_waited_for_only_when_asked() -> None:
    cache, disk = with_disk(pages=8, host=4, ready=0)
    parked = cache.swap_out(cache.allocate(4))
    assert parked is not None
    cache.landed(cache.take_moves())
    cache.parking.write(parked)
    assert parked.place == WRITING and cache.swap_in(parked) is None
    assert disk.asked[-1] is False
    second = cache.swap_out(cache.allocate(1))
    assert second is not None and parked.place == DISK and disk.asked[-1] is True
