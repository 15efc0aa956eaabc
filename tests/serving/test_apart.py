"""Prompts beside what decodes: whatever two batches under way do to each other's pages would change tokens here.

The runner of these tests keeps a token in every slot of the cache, as a GPU keeps its keys. A batch writes what it has
when it begins, and samples from all that its sequences see when it ends; batches of both sides begin and end in random
order, as far as splits allow.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.serving.batch import Batch
from taskgraph.serving.cache.pages import PagedCache
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import Policy
from taskgraph.serving.requests import Completion, Request
from taskgraph.serving.runners.runner import ApartRunner
from taskgraph.serving.sampling import Ints
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.ways import Load, Order, Split, Way

VOCABULARY, PAGE = 50, 4
SPLITS = (Split(8, 16), Split(16, 8))


def token_after(tokens: Ints) -> int:
    return int.from_bytes(hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=4).digest()) % VOCABULARY


def answer(request: Request) -> tuple[int, ...]:
    """What the request gives, alone."""
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append(token_after(np.array(tokens)))
        if tokens[-1] in request.stop:
            break
    return tuple(tokens[len(request.prompt) :])


class AnyWays:
    """Chooses at random, and says of nothing how long it takes."""

    step_tokens = 24

    def __init__(self, draw: np.random.Generator, apart: float) -> None:
        self._draw, self._apart = draw, apart

    def choose(self, load: Load, using: Split | None = None) -> Way:
        split = SPLITS[int(self._draw.integers(2))] if self._draw.random() < 0.2 else using or SPLITS[0]
        apart = load.decode and load.waiting and self._draw.random() < self._apart
        return Way(split if apart else None, int(self._draw.choice([2, 7, 24])), 1.0, 1.0, 1.0, 1.0)

    def apart_s(self, split: Split | None, decode: int, context: float, prefill: int) -> tuple[float, float]:
        return tuple(self._draw.random(2).tolist())  # type: ignore[return-value]


@dataclass
class Launched:
    batch: Batch
    split: Split | None
    after: "list[Launched]"
    begun: bool = False
    samples: Ints | None = None


@dataclass
class Slots:
    """The runner: two queues, `main` and `side`, of what is under way."""

    draw: np.random.Generator
    store: Ints
    ways: AnyWays
    ahead: bool
    besides: int = 2
    planned: int = 0
    queues: tuple[deque[Launched], deque[Launched]] = field(default_factory=lambda: (deque(), deque()))
    last: list[Launched | None] = field(default_factory=lambda: [None, None])
    order: Order[Launched] = field(default_factory=Order)
    both: int = 0

    def now(self) -> float:
        return 0.0

    def sleep_until(self, at_s: float) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...

    def warm(self, *_: object) -> None: ...

    def launch(self, batch: Batch) -> None:
        self._put(0, batch, None)

    def launch_in(self, batch: Batch, split: Split) -> None:
        assert not batch.chunks
        self._put(0, batch, split)

    def launch_beside(self, batch: Batch, split: Split) -> None:
        assert not batch.decode and batch.chunks and not len(batch.fed)
        self._put(1, batch, split)

    def _put(self, side: int, batch: Batch, split: Split | None) -> None:
        made, before = Launched(replace(batch, tokens=batch.tokens.copy()), split, []), self.last[side]
        made.after += [b for b in (before, self.order.launched(side, split, made)) if b is not None]
        if len(batch.fed):
            assert before is not None
        self.last[side] = made
        self.queues[side].append(made)
        self._some()

    def _some(self) -> None:
        """Let some of what is under way go on."""
        for _ in range(int(self.draw.integers(0, 4))):
            self._go(int(self.draw.integers(2)))

    def _go(self, side: int) -> None:
        """Begin or end the first batch of a side that has not ended, if it may."""
        first = next((b for b in self.queues[side] if b.samples is None), None)
        if first is None or any(b.samples is None for b in first.after):
            return
        batch = first.batch
        if not first.begun:
            first.begun = True
            if len(batch.fed):
                samples = first.after[0].samples
                assert samples is not None
                batch.tokens[batch.fed] = samples[batch.source]
            self.store[batch.slots] = batch.tokens
            self.both += any(b.begun and b.samples is None for b in self.queues[1 - side])
            return
        assert (self.store[batch.slots] == batch.tokens).all(), "another batch wrote where this one reads"
        found = []
        for blocks, length in zip(batch.blocks, batch.lengths, strict=True):
            at = np.arange(length)
            found.append(token_after(self.store[blocks[at // PAGE] * PAGE + at % PAGE]))
        first.samples = np.array(found, np.int64)

    def _wait(self, side: int) -> tuple[Ints, float]:
        first = self.queues[side][0]
        while first.samples is None:
            self._go(int(self.draw.integers(2)))
        self.queues[side].popleft()
        self._some()
        return first.samples, 0.0

    def wait(self) -> tuple[Ints, float]:
        return self._wait(0)

    def wait_beside(self) -> tuple[Ints, float]:
        return self._wait(1)

    def beside_ended(self) -> bool:
        self._some()
        return self.queues[1][0].samples is not None


def engine_of(seed: int, pages: int, apart: float, ahead: bool, expected: float | None = None) -> tuple[Engine, Slots]:
    draw = np.random.default_rng(seed)
    runner = Slots(draw, np.full(pages * PAGE, -1, np.int64), AnyWays(draw, apart), ahead)
    assert isinstance(runner, ApartRunner)
    limits = Limits(sequences=5, tokens=24, chunks=3, context=64)
    policy = Policy(expected_output=expected)
    return Engine(runner, PagedCache(pages, PAGE), limits, vocabulary=VOCABULARY, policy=policy), runner


def requests_of(draw: np.random.Generator, count: int) -> list[Request]:
    """Some begin alike, some are one token longer than whole pages, and some stop early."""
    common, made = draw.integers(0, VOCABULARY, 40), []
    for _ in range(count):
        shared = int(draw.choice([0, 4, 8, 16]))
        own = draw.integers(0, VOCABULARY, int(draw.choice([1, 1, 3, 12, 30])))
        prompt = [*common[:shared].tolist(), *own.tolist()]
        stop = frozenset(draw.integers(0, VOCABULARY, int(draw.choice([0, 0, 3]))).tolist())
        made.append(Request(prompt, int(draw.integers(1, 16)), stop=stop))
    return made


def served(engine: Engine, requests: list[Request], draw: np.random.Generator, cancels: float) -> dict[int, Completion]:
    coming, done, streamed = deque(requests), dict[int, Completion](), dict[int, list[int]]()
    while coming or engine.busy:
        while coming and draw.random() < 0.5:
            number = engine.submit(coming.popleft())
            if draw.random() < cancels:
                engine.cancel(number)
        output = engine.step()
        for request, token in zip(output.requests.tolist(), output.tokens.tolist(), strict=True):
            streamed.setdefault(request, []).append(token)
        done |= {c.request: c for c in output.finished}
        if done and draw.random() < cancels / 4:
            engine.cancel(int(draw.integers(len(requests))))
    for number, completion in done.items():
        assert tuple(streamed.get(number, ())) == completion.tokens
    return done


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([16, 24, 64]), st.sampled_from([0.5, 0.9, 1.0]), st.booleans(),
    st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_tokens_are_those_of_every_request_alone(
    seed: int, pages: int, apart: float, ahead: bool, cancels: float
) -> None:
    """Through joins, ends, stops, cancellations, shared prefixes, pre-emption, and changes of the way."""
    engine, _ = engine_of(seed, pages, apart, ahead, 1.0 if pages < 64 else None)
    draw = np.random.default_rng(seed + 1)
    requests = requests_of(draw, 12)
    done = served(engine, requests, draw, cancels)
    assert len(done) == len(requests)
    for number, request in enumerate(requests):
        wanted = answer(request)
        if done[number].reason == "cancelled":
            assert done[number].tokens == wanted[: len(done[number].tokens)]
        else:
            assert done[number].tokens == wanted
    assert engine.cache.device.held == 0
    assert not engine.apart.under_way


@pytest.mark.parametrize("ahead", [False, True])
def test_both_run_at_once_and_pre_emption_waits(ahead: bool) -> None:
    both = besides = preemptions = 0
    for seed in range(12):
        engine, runner = engine_of(seed, 16, 1.0, ahead, 1.0)
        draw = np.random.default_rng(seed)
        requests = [Request(draw.integers(0, VOCABULARY, 9).tolist(), 30) for _ in range(8)]
        done = served(engine, requests, draw, 0.0)
        assert [done[i].tokens for i in range(8)] == [answer(request) for request in requests]
        both, besides = both + runner.both, besides + engine.stats.beside
        preemptions += engine.scheduler.preemptions
        assert engine.cache.device.held == 0
    assert both > 20
    assert besides > 20
    assert preemptions > 5


def test_what_fails_beside_ends_all_and_abort_clears_up() -> None:
    engine, runner = engine_of(3, 64, 1.0, True)
    draw = np.random.default_rng(3)
    for request in requests_of(draw, 10):
        engine.submit(replace(request, max_tokens=15, stop=frozenset()))
    while not engine.apart.under_way:
        engine.step()
    healthy = runner.wait_beside

    def broken() -> tuple[Ints, float]:
        healthy()
        raise ZeroDivisionError

    runner.wait_beside = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.run()
    assert {c.reason for c in engine.abort()} == {"failed"}
    runner.wait_beside = healthy  # type: ignore[method-assign]
    assert engine.cache.device.held == 0
    assert not engine.apart.under_way
    requests = requests_of(draw, 5)
    assert [c.tokens for c in engine.run(requests)] == [answer(request) for request in requests]
