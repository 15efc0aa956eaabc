"""The pages of a KV cache under churn: nothing leaks, nothing is given twice, prefixes and copies are what they say."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from taskgraph.serving.cache.pages import PagedCache, PagePool, Pages, block_keys
from taskgraph.serving.cache.parking import Parked

SIZE = 4


class Churn(RuleBasedStateMachine):
    """Sequences come, grow, share, fork, go to the host, come back and end, in any order, in few pages.

    `content` says what a page holds, as the moves would copy it; every sequence must find its own tokens again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedCache(12, SIZE, host_pages=7)
        self.live: list[tuple[Pages, list[int]]] = []
        self.away: list[tuple[Parked, list[int]]] = []
        self.device: dict[int, tuple[int, ...]] = {}
        self.host: dict[int, tuple[int, ...]] = {}

    def move(self) -> None:
        """Do the moves of a step: out, back, copies."""
        moves = self.cache.take_moves()
        for source, target in moves.out:
            self.host[target] = self.device.get(source, ())
        for source, target in moves.back:
            self.device[target] = self.host[source]
        for source, target in moves.copies:
            self.device[target] = self.device[source]

    def write(self, pages: Pages, tokens: list[int]) -> None:
        for i, page in enumerate(pages.tolist()):
            self.device[page] = tuple(tokens[i * SIZE : (i + 1) * SIZE])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5 * SIZE))
    def start(self, tokens: list[int]) -> None:
        keys = block_keys(np.array(tokens, np.int32), SIZE)
        shared = self.cache.match(keys)
        need = -(-len(tokens) // SIZE) - len(shared)
        if need > self.cache.device.available:
            self.cache.release(shared)
            self.move()
            return
        pages = np.concatenate([shared, self.cache.allocate(need)]).astype(np.int32)
        self.move()
        assert [self.device[p] for p in shared.tolist()] == [
            tuple(tokens[i * SIZE : (i + 1) * SIZE]) for i in range(len(shared))
        ]
        self.write(pages, tokens)
        for page, key in zip(pages.tolist(), keys, strict=False):
            self.cache.device.publish(page, key)
        self.live.append((pages, tokens))

    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        if not self.live or not self.cache.device.available:
            return
        i = data.draw(st.integers(0, len(self.live) - 1))
        pages, tokens = self.live[i]
        if len(tokens) % SIZE == 0:
            pages = np.append(pages, self.cache.allocate(1)).astype(np.int32)
        else:
            pages[-1] = self.cache.writable(int(pages[-1]))
        self.move()
        tokens = [*tokens, token]
        self.device[int(pages[-1])] = tuple(tokens[(len(tokens) - 1) // SIZE * SIZE :])
        self.live[i] = (pages, tokens)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if self.live:
            pages, tokens = data.draw(st.sampled_from(self.live))
            self.live.append((self.cache.fork(pages), tokens))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.live:
            pages, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
            self.cache.release(pages)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if not self.live:
            return
        i = data.draw(st.integers(0, len(self.live) - 1))
        before = (self.cache.device.available, self.cache.host.available)
        parked = self.cache.swap_out(self.live[i][0])
        if parked is None:
            assert (self.cache.device.available, self.cache.host.available) == before
            return
        self.away.append((parked, self.live.pop(i)[1]))
        if data.draw(st.booleans()):  # else something else happens within the same step
            self.move()

    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        if not self.away:
            return
        i = data.draw(st.integers(0, len(self.away) - 1))
        pages = self.cache.swap_in(self.away[i][0])
        if pages is not None:
            self.live.append((pages, self.away.pop(i)[1]))
        self.move()

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        pool = self.cache.device
        wanted = Counter(p for pages, _ in self.live for p in pages.tolist())
        pending = Counter(p for p, _ in self.cache.moves.copies)
        assert {p: int(pool.holders[p]) for p in range(pool.pages) if pool.holders[p]} == dict(wanted + pending)
        assert pool.held == len(wanted)
        assert pool.available + pool.held == pool.pages
        assert self.cache.host.held >= sum(len(parked.slots) for parked, _ in self.away)

    @invariant()
    def sequences_find_their_tokens(self) -> None:
        if self.cache.moves:
            return
        away = [(parked.slots, tokens) for parked, tokens in self.away]
        for where, rows in ((self.device, self.live), (self.host, away)):
            for pages, tokens in rows:
                held = [token for page in pages.tolist() for token in where[page]]
                assert held == tokens

    def teardown(self) -> None:
        for pages, _ in self.live:
            self.cache.release(pages)
        self.move()
        while self.away:
            pages = self.cache.swap_in(self.away.pop()[0])
            assert pages is not None
            self.move()
            self.cache.release(pages)
        assert (self.cache.device.held, self.cache.host.held) == (0, 0)


TestChurn = Churn.TestCase
TestChurn.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_keys_depend_on_every_token_before() -> None:
    tokens = np.arange(12, dtype=np.int32)
    keys = block_keys(tokens, SIZE)
    assert len(keys) == len(set(keys)) == 3
    assert block_keys(tokens[:11], SIZE) == keys[:2]
    assert block_keys(tokens, SIZE, before=keys[:1]) == keys
    for place in (0, 5, 11):
        other = tokens.copy()
        other[place] += 1
        changed = block_keys(other, SIZE)
        assert changed[: place // SIZE] == keys[: place // SIZE]
        assert not set(changed[place // SIZE :]) & set(keys)


def test_idle_pages_go_the_longest_unused_first_and_free_ones_before() -> None:
    pool = PagePool(3)
    a, b, c = pool.allocate(3).tolist()
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    for page in (a, b, c):
        pool.release(np.array([page], np.int32))
    gone: list[tuple[int, bytes]] = []
    assert pool.allocate(1, lambda page, key: gone.append((page, key))).tolist() == [c]
    pool.hold(a)
    assert pool.allocate(1, lambda page, key: gone.append((page, key))).tolist() == [b]
    assert gone == [(b, b"b")]
    assert (pool.find(b"a"), pool.find(b"b"), pool.available) == (a, None, 0)
    with pytest.raises(RuntimeError, match="1 pages wanted, 0 available"):
        pool.allocate(1)
