"""The scheduler over a model that answers by all that it reads from its pages: a wrong page, place, length, draw or
edit gives another answer. What batches are made of, and who is let in, by hand."""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.errors import RequestError
from taskgraph.serving.batch import Batch
from taskgraph.serving.cache.disk import DiskTier
from taskgraph.serving.cache.pages import PagedCache, block_keys
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import Policy
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.sampling import NO_TOKEN, NONE_LEFT, uniforms
from taskgraph.serving.scheduler import DROPPED, FREE, RUNNING, SWAPPED, Limits, Scheduler, Waiting
from taskgraph.serving.steering import Steer

SIZE, VOCABULARY = 4, 50


def answer_to(prefix: Sequence[int], how: Sampling, uniform: float, taken: Mapping[int, float], logprobs: int) -> int:
    """The token that the model gives after `prefix`, by all that a draw may depend on; `taken` are the edits."""
    drawn = how.temperature >= 1e-5
    said = (
        list(map(int, prefix)),
        [how.temperature, min(how.top_k, 2**31), how.top_p, uniform] if drawn else None,
        sorted((token, round(value, 4)) for token, value in taken.items() if value),
        logprobs,
    )
    return hashlib.blake2b(repr(said).encode(), digest_size=4).digest()[0] % VOCABULARY


def edits_after(how: Sampling, answer: Sequence[int]) -> dict[int, float]:
    taken = dict(how.biases)
    for token, times in Counter(map(int, answer)).items():
        taken[token] = taken.get(token, 0.0) - times * how.frequency_penalty - how.presence_penalty
    return taken


def expected(request: Request) -> tuple[tuple[int, ...], str]:
    """The answer to a request that is alone in the world, and why it ends."""
    prefix, answer = list(map(int, request.prompt)), list[int]()
    how = request.sampling
    logprobs = -1 if request.logprobs is None else request.logprobs
    while len(answer) < request.max_tokens:
        chance = float(uniforms(np.array([how.seed], np.uint64), np.array([len(prefix)]))[0])
        answer.append(answer_to(prefix, how, chance, edits_after(how, answer), logprobs))
        prefix.append(answer[-1])
        if answer[-1] in request.stop:
            return tuple(answer), "stop"
    return tuple(answer), "length"


class Reading:
    """A runner whose pages hold (token, position); it checks what it is given, and answers by what it reads."""

    chances = None

    def __init__(self, limits: Limits, pages: int, host_pages: int) -> None:
        self.limits = limits
        self.device = np.full((pages, SIZE, 2), -1)
        self.host = np.full((max(host_pages, 1), SIZE, 2), -1)
        self.batches: list[Batch] = []
        self.planned = 0

    def read_page(self, page: int) -> bytes:
        return self.host[page].tobytes()

    def write_page(self, page: int, content: bytes) -> None:
        self.host[page] = np.frombuffer(content, self.host.dtype).reshape(SIZE, 2)

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, at_s: float) -> None: ...

    def warm(self) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...

    def launch(self, batch: Batch) -> None:
        assert batch.decode <= self.limits.sequences
        assert len(batch.tokens) <= self.limits.tokens
        assert batch.chunks <= self.limits.chunks
        assert batch.prefill == len(batch.tokens) - batch.decode == batch.starts[-1]
        assert batch.decode + batch.chunks == len(batch.lengths) == len(batch.blocks) == len(batch.owner)
        assert len(set(batch.slots.tolist())) == len(batch.slots)
        self.batches.append(batch)

    def wait(self) -> tuple[Any, float]:
        b = self.batches[-1]
        for source, target in b.moves.out:
            self.host[target] = self.device[source]
        for source, target in b.moves.back:
            self.device[target] = self.host[source]
        for source, target in b.moves.copies:
            self.device[target] = self.device[source]
        self.device.reshape(-1, 2)[b.slots] = np.stack([b.tokens, b.positions], axis=1)
        last = [*range(b.decode), *(b.decode + b.starts[1:] - 1).tolist()]
        samples = [self.sample(b, i, last[i]) for i in range(len(last))]
        return np.array(samples, np.int64), self.now()

    def sample(self, b: Batch, i: int, row: int) -> int:
        length = int(b.lengths[i])
        read = self.device[b.blocks[i]].reshape(-1, 2)[:length]
        assert read[:, 1].tolist() == list(range(length))
        assert b.positions[row] == length - 1 and b.place[i] == length
        how, uniform, logprobs, taken = Sampling(), 0.0, -1, Counter[int]()
        draws = b.draws
        if draws is not None and i in draws.samples:
            k = draws.samples.tolist().index(i)
            how = Sampling(float(draws.temperature[k]), int(draws.top_k[k]), float(draws.top_p[k]))
            uniform, logprobs = float(draws.uniform[k]), int(draws.logprobs[k])
            if draws.edits is not None:
                mine = draws.edits.rows == k
                for token, value in zip(
                    draws.edits.tokens[mine].tolist(), draws.edits.values[mine].tolist(), strict=True
                ):
                    taken[token] += value
        return answer_to(read[:, 0].tolist(), how, uniform, taken, logprobs)


def engine_of(limits: Limits, pages: int, host_pages: int = 0, disk: Path | None = None, **policy: Any) -> Engine:
    runner: Any = Reading(limits, pages, host_pages)
    tier = DiskTier(disk, 6, runner.read_page, runner.write_page) if disk is not None else None
    cache = PagedCache(pages, SIZE, host_pages, tier)
    return Engine(runner, cache, limits, vocabulary=VOCABULARY, policy=Policy(**policy))


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Up to twelve requests, many of whose prompts begin alike, greedy and drawn, with stops, biases and penalties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    common = rng.integers(0, VOCABULARY, 14)
    made = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = np.concatenate([common[: rng.integers(0, 15)], rng.integers(0, VOCABULARY, rng.integers(1, 12))])
        how = Sampling()
        if rng.random() < 0.5:
            how = Sampling(
                float(rng.choice([0.0, 1e-6, 0.7])), int(rng.choice([0, 3, 2**40])), float(rng.choice([0.5, 1.0])),
                int(rng.integers(2**40)), float(rng.choice([0.0, 0.5])), float(rng.choice([0.0, -0.25])),
                {int(t): 1.5 for t in rng.integers(0, VOCABULARY, rng.integers(0, 3))},
            )  # fmt: skip
        stop = frozenset(rng.integers(0, VOCABULARY, rng.integers(0, 4)).tolist())
        made.append(Request(prompt, int(rng.integers(1, 20)), how, stop))
    return made


@settings(max_examples=60)
@given(
    requests(), st.sampled_from([Limits(1, 2, 1, 48), Limits(3, 8, 2, 48), Limits(8, 40, 8, 48)]),
    st.sampled_from([12, 15, 40]), st.sampled_from([0, 5, 30]), st.booleans(), st.sampled_from([None, 0.0, 3.0]),
    st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_every_request_is_answered_as_if_it_were_alone(
    given: list[Request], limits: Limits, pages: int, host: int, disk: bool, guess: float | None, sharing: bool,
    cancelled: int,
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if disk and host else None
        with engine_of(limits, pages, host, place, expected_output=guess, prefix_sharing=sharing) as engine:
            first = len(given) // 2
            numbers = [engine.submit(request) for request in given[:first]]
            done = [c for _ in range(4) for c in engine.step().finished]
            for number in numbers[:cancelled]:
                engine.cancel(number)
            done += engine.run(given[first:])
            assert sorted(c.request for c in done) == list(range(len(given)))
            for c in done:
                tokens, reason = expected(given[c.request])
                if c.reason == "cancelled":
                    assert c.request < cancelled and c.tokens == tokens[: len(c.tokens)]
                else:
                    assert (c.tokens, c.reason) == (tokens, reason)
            while engine.cache.disk is not None and engine.cache.disk.busy:
                engine.cache.settle()  # a block on its way to disk holds its page until then
            assert (engine.cache.device.held, engine.cache.host.held) == (0, 0)
            assert (engine.scheduler.state == FREE).all() and (engine.scheduler.pending == -1).all()
            if guess is None:
                assert engine.scheduler.preemptions == 0
            assert engine.scheduler.recomputed <= engine.scheduler.preemptions


# --------------------------------------------------------------------------------- batches by hand


def scheduler(limits: Limits, pages: int = 64, host: int = 0, **options: Any) -> Scheduler:
    return Scheduler(limits, PagedCache(pages, SIZE, host), **options)


def add(made: Scheduler, length: int, most: int = 8, first: int = 0, **more: Any) -> Waiting:
    prompt = np.arange(first, first + length, dtype=np.int32) % VOCABULARY
    request = Request(prompt, most, **more)
    keys = block_keys(prompt, SIZE) if made.prefix_sharing else []
    number = len(made.waiting) + 100 * first
    made.waiting.append(Waiting(number, request, prompt, 0.0, keys, steer=Steer.of(request)))
    return made.waiting[-1]


def form(made: Scheduler) -> Batch:
    batch = made.form()
    assert batch is not None
    return batch


def shape(batch: Batch) -> tuple[int, list[int]]:
    """Rows that decode, and the tokens of the chunks."""
    return batch.decode, np.diff(batch.starts).tolist()


def test_a_prompt_is_read_in_chunks_and_what_decodes_comes_first() -> None:
    made = scheduler(Limits(sequences=3, tokens=10, chunks=2, context=40))
    add(made, 13)
    first = form(made)
    assert shape(first) == (0, [10])
    assert (first.owner.tolist(), first.place.tolist(), first.draws) == ([-1], [10], None)
    assert first.tokens.tolist() == first.positions.tolist() == list(range(10))
    add(made, 5, first=20)
    add(made, 9, first=30)
    second = form(made)
    assert shape(second) == (0, [3, 5])  # two chunks at most
    assert (second.owner.tolist(), second.place.tolist()) == ([0, 1], [13, 5])
    assert (second.fed.tolist(), second.source.tolist()) == ([], [])
    third = form(made)
    assert shape(third) == (2, [8])  # ten tokens at most, two of which decode
    assert (third.owner.tolist(), third.place.tolist()) == ([0, 1, -1], [14, 6, 8])
    assert (third.fed.tolist(), third.source.tolist()) == ([0, 1], [0, 1])
    assert third.lengths.tolist() == [14, 6, 8] and third.positions.tolist() == [13, 5, *range(8)]
    taken = made.take(second, np.array([41, 42]), VOCABULARY)
    assert (taken.seqs.tolist(), taken.tokens.tolist(), taken.samples.tolist()) == ([0, 1], [41, 42], [0, 1])
    assert (made.tokens[0, 13], made.tokens[1, 5], made.given[:2].tolist()) == (41, 42, [14, 6])
    fourth = form(made)
    assert shape(fourth) == (3, [])  # the last token of a prompt is read like one that decodes
    assert fourth.fed.tolist() == [0, 1] and fourth.source.tolist() == [0, 1]


def test_only_as_many_run_as_may() -> None:
    made = scheduler(Limits(sequences=2, tokens=40, chunks=8, context=40))
    for i in range(3):
        add(made, 4, first=10 * i)
    assert shape(form(made)) == (0, [4, 4])
    assert (made.state == RUNNING).sum() == 2 and len(made.waiting) == 1
    assert shape(form(made)) == (2, [])


def test_equal_prompts_share_their_full_pages_but_read_their_last_token() -> None:
    for length, shared in ((9, 2), (8, 1), (4, 0), (5, 1)):
        made = scheduler(Limits(sequences=2, tokens=40, chunks=8, context=40))
        add(made, length)
        add(made, length)
        assert shape(form(made)) == (0, [length, length - 4 * shared])
        assert made.blocks[0, :shared].tolist() == made.blocks[1, :shared].tolist()
        assert made.held[:2].tolist() == [-(-length // SIZE)] * 2
    alone = scheduler(Limits(sequences=2, tokens=40, chunks=8, context=40), prefix_sharing=False)
    add(alone, 9)
    add(alone, 9)
    assert shape(form(alone)) == (0, [9, 9])


def test_nothing_to_do_is_no_batch() -> None:
    made = scheduler(Limits(sequences=2, tokens=10, chunks=2, context=40))
    assert made.form() is None
    add(made, 4, most=1)
    batch = form(made)
    assert made.form() is None  # its one token is on its way
    taken = made.take(batch, np.array([7]), VOCABULARY)
    assert (taken.full, taken.stopped, taken.failed) == ([0], [], {})
    made.retire(0, 5)
    assert made.form() is None


def test_a_step_takes_no_more_tokens_than_the_limit_and_no_page_too_many() -> None:
    made = scheduler(Limits(sequences=4, tokens=12, chunks=4, context=40), pages=10)
    add(made, 4, most=4)
    form(made)
    assert made.held[0] == 1
    form(made)
    assert made.held[0] == 2  # token 5 begins a page
    for _ in range(2):
        form(made)
    assert (made.held[0], made.known[0], made.computed[0]) == (2, 8, 7)
    assert made.form() is None  # its last token is not computed
    assert made.cache.device.available == 8


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"sequences": 0}, "no room"), ({"chunks": 0}, "no room"), ({"context": 0}, "no room"),
        ({"sequences": 8, "tokens": 8}, "no room"), ({"tokens": 1.5}, "tokens"), ({"sequences": "3"}, "sequences"),
    ],
)  # fmt: skip
def test_limits_leave_room(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Limits(**bad)
    assert Limits(1, 2, 1, 1) == Limits(sequences=1, tokens=2, chunks=1, context=1)
    assert Limits() == Limits(64, 256, 16, 2048)


# ------------------------------------------------------------------------------------- who is let in


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9), st.integers(1, 12)), max_size=4), st.integers(1, 12),
    st.integers(1, 12), st.sampled_from([None, 0.0, 2.5, 6.0]), st.integers(1, 30),
)  # fmt: skip
def test_a_sequence_is_let_in_where_the_predicted_peak_fits(
    running: list[tuple[int, int, int]], prompt: int, most: int, guess: float | None, pages: int
) -> None:
    """Step by step: those that have not ended grow by a token, and the last page of each is counted whole or half."""
    made = scheduler(Limits(sequences=8, tokens=40, chunks=8, context=64), pages=pages, expected_output=guess)
    now, ends = [], []
    for row, (length, so_far, left) in enumerate(running):
        made.state[row] = RUNNING
        made.prompt[row], made.known[row], made.limit[row] = length, length + so_far, length + so_far + left
        now.append(length + so_far)
        most_likely = length + so_far + left
        ends.append(most_likely if guess is None else min(most_likely, max(length + round(guess), now[-1] + 1)))
    now.append(prompt)
    ends.append(prompt + most if guess is None else min(prompt + most, max(prompt + round(guess), prompt + 1)))
    slack = SIZE - 1 if guess is None else SIZE // 2
    peak = max(
        sum(n + t + slack for n, end in zip(now, ends, strict=True) if n + t <= end)
        for t in range(max(e - n for n, e in zip(now, ends, strict=True)) + 1)
    )
    candidate = add(made, prompt, most)
    assert made._fits(candidate) == (peak <= pages * SIZE or not running)


def test_those_that_were_let_in_last_are_pre_empted_and_come_back_first() -> None:
    """Two sequences of two pages each in five: when both want a third, the second goes to the host, whole."""
    made = scheduler(Limits(sequences=2, tokens=20, chunks=4, context=40), pages=5, host=4, expected_output=0.0)
    add(made, 7, first=0)
    add(made, 7, first=20)
    first = form(made)
    assert shape(first) == (0, [7, 7])
    form(made)  # tokens 8
    third = form(made)  # token 9 of both want a page
    assert (third.decode, made.state[:2].tolist()) == (1, [RUNNING, SWAPPED])
    assert len(third.moves.out) == 2 and made.preemptions == 1 and made.recomputed == 0
    assert shape(form(made)) == (1, []) and made.state[1] == SWAPPED  # three pages and one for the other are not there
    waiting = add(made, 4, first=40)
    made.retire(0, 10)
    back = form(made)
    assert made.state[1] == RUNNING and len(back.moves.back) == 2
    assert shape(back)[1][0] == 1 and back.lengths[0] == 9  # as if nothing had been
    assert list(made.waiting) in ([], [waiting])


def test_without_a_host_the_pages_are_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    made = scheduler(Limits(sequences=2, tokens=20, chunks=4, context=40), pages=5, expected_output=0.0)
    add(made, 7, first=0)
    add(made, 7, first=20)
    form(made)
    form(made)
    third = form(made)
    assert (third.decode, made.state[:2].tolist()) == (1, [RUNNING, DROPPED])
    assert (made.preemptions, made.recomputed, made.held[1], made.computed[1]) == (1, 1, 0, 0)
    assert f"room for the pages of request {made.number[1]}; they are computed again" in caplog.text
    made.retire(0, 10)
    assert shape(form(made)) == (0, [9])
    assert made.state[1] == RUNNING


def test_a_prompt_that_holds_all_pages_and_needs_more_gives_them_up() -> None:
    made = scheduler(Limits(sequences=2, tokens=6, chunks=4, context=40), pages=8, expected_output=0.0)
    add(made, 20)
    assert shape(form(made)) == (0, [6])
    made.cache.allocate(made.cache.device.available)  # as others' answers would
    assert shape(form(made)) == (0, [2])  # what its two pages have room for
    assert made.form() is None
    assert (made.state[0], made.preemptions, made.recomputed) == (DROPPED, 1, 1)
    assert made.cache.device.available == 2


def test_nothing_is_given_up_while_a_token_that_is_on_its_way_may_free_pages() -> None:
    made = scheduler(Limits(sequences=2, tokens=7, chunks=4, context=40), pages=12, expected_output=0.0)
    add(made, 3, most=1)
    add(made, 20, first=20)
    batch = form(made)
    assert shape(batch) == (0, [3, 4])
    made.cache.allocate(made.cache.device.available)
    assert made.form() is None and made.preemptions == 0
    assert made.take(batch, np.array([7, 8]), VOCABULARY).full == [0]
    made.retire(0, 4)
    assert shape(form(made)) == (0, [4])


class Course:
    """A grammar of two tokens, the second of which must not be 9."""

    def __init__(self) -> None:
        self.told: list[int] = []

    @property
    def ended(self) -> bool:
        return len(self.told) == 2

    def advance(self, token: int) -> str:
        self.told.append(token)
        return "no 9 here" if self.ended and token == 9 else ""

    def allowed(self) -> np.ndarray:
        return np.full(-(-VOCABULARY // 32), -1, np.int32)


class Guide:
    """Its beginning."""

    vocabulary = VOCABULARY

    def begin(self) -> Course:
        return Course()


def test_a_grammar_follows_every_token_as_it_comes() -> None:
    guide: Any = Guide()
    made = scheduler(Limits(sequences=3, tokens=40, chunks=8, context=40))
    for i in range(3):
        add(made, 3, most=2 + (i == 0), first=10 * i, guide=guide)
    taken = made.take(form(made), np.array([9, 9, 4]), VOCABULARY)
    assert (taken.full, taken.stopped, taken.failed) == ([], [], {})
    courses: list[Any] = [steer.course for steer in made.steers if steer is not None]
    assert [course.told for course in courses] == [[9], [9], [4]]
    number = int(made.number[1])
    taken = made.take(form(made), np.array([5, 9, 6]), VOCABULARY)
    assert [course.told for course in courses] == [[9, 5], [9, 9], [4, 6]]
    assert (taken.full, taken.stopped) == ([], [0, 2])
    assert taken.failed == {1: f"request {number}: no 9 here"}


def test_what_a_grammar_cannot_go_on_from_is_the_reason_of_a_missing_token() -> None:
    guide: Any = Guide()
    made = scheduler(Limits(sequences=1, tokens=40, chunks=8, context=40))
    add(made, 3, guide=guide)
    made.take(form(made), np.array([4]), VOCABULARY)
    steer = made.steers[0]
    assert steer is not None
    steer.error = "it is too large"
    failed = made.take(form(made), np.array([NONE_LEFT]), VOCABULARY).failed
    assert failed == {0: f"request {made.number[0]}: it is too large (token 1 of its answer)."}


def test_experience_is_a_moving_mean() -> None:
    made = scheduler(Limits(), expected_output=10.0)
    made.learn(30)
    assert made.expected_output == pytest.approx(11.0)
    made.learn(1)
    assert made.expected_output == pytest.approx(10.5)
    none = scheduler(Limits())
    none.learn(30)
    assert none.expected_output is None


# -------------------------------------------------------------------------------- what a step gave


def test_samples_that_are_no_tokens_fail_their_sequence_alone() -> None:
    made = scheduler(Limits(sequences=4, tokens=40, chunks=8, context=40))
    for i in range(4):
        add(made, 3, first=10 * i)
    numbers = [w.number for w in made.waiting]
    batch = form(made)
    taken = made.take(batch, np.array([VOCABULARY - 1, VOCABULARY, NO_TOKEN, NONE_LEFT]), VOCABULARY)
    assert (taken.seqs.tolist(), taken.tokens.tolist()) == ([0], [VOCABULARY - 1])
    assert set(taken.failed) == {1, 2, 3} and taken.full == taken.stopped == []
    why = f"the model gave {VOCABULARY}, which is no token of its vocabulary"
    assert taken.failed[1] == f"request {numbers[1]}: {why} (token 0 of its answer)."
    assert "its logits are no finite numbers" in taken.failed[2]
    assert "leave no token that the model gives a chance (token 0 of its answer)" in taken.failed[3]


def test_a_sequence_ends_by_its_last_token_or_by_a_stop_token() -> None:
    made = scheduler(Limits(sequences=4, tokens=40, chunks=8, context=40))
    add(made, 3, most=1)
    add(made, 3, most=1, first=10, stop=frozenset({7, 9}))
    add(made, 3, most=2, first=20, stop=frozenset(range(8)))
    add(made, 3, most=2, first=30)
    taken = made.take(form(made), np.array([7, 9, 0, 7]), VOCABULARY)
    assert (taken.full, taken.stopped, taken.failed) == ([0], [1, 2], {})


def test_a_sample_of_a_row_that_was_freed_is_nobodys() -> None:
    made = scheduler(Limits(sequences=1, tokens=8, chunks=2, context=40))
    add(made, 3)
    batch = form(made)
    gone = made.retire(0, 3)
    assert gone.prompt.tolist() == [0, 1, 2]
    add(made, 3, first=20)
    form(made)
    taken = made.take(batch, np.array([5]), VOCABULARY)
    assert taken.seqs.tolist() == [] and made.given[0] == 3


@pytest.mark.parametrize(("tainted", "sharing", "found"), [(False, True, 2), (True, True, 0), (False, False, 0)])
def test_the_pages_of_one_that_ended_can_be_found_unless_it_failed(tainted: bool, sharing: bool, found: int) -> None:
    made = scheduler(Limits(sequences=2, tokens=20, chunks=2, context=40), prefix_sharing=sharing)
    add(made, 6)
    batch = form(made)
    made.take(batch, np.array([6]), VOCABULARY)
    batch = form(made)
    made.take(batch, np.array([7]), VOCABULARY)
    form(made)  # token 8 is computed, and not given yet: tokens 0 to 7 fill two pages
    made.retire(0, 8, tainted=tainted)
    keys = block_keys(np.arange(8, dtype=np.int32), SIZE)
    assert sum(made.cache.device.find(key) is not None for key in keys) == found
    assert made.cache.device.held == 0
    assert (made.state[0], made.held[0], made.computed[0], made.known[0]) == (FREE, 0, 0, 0)
    assert (made.epoch[0], made.pending[0], made.keys[0], made.requests[0]) == (1, -1, [], None)


def test_only_whole_pages_that_were_given_can_be_found() -> None:
    made = scheduler(Limits(sequences=2, tokens=20, chunks=2, context=40))
    add(made, 6)
    for token in (6, 7):
        made.take(form(made), np.array([token]), VOCABULARY)
    made.retire(0, 7)
    keys = block_keys(np.arange(8, dtype=np.int32), SIZE)
    assert [made.cache.device.find(key) is not None for key in keys] == [True, False]


def test_a_request_that_cannot_begin_is_refused_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler(Limits(sequences=2, tokens=20, chunks=2, context=40))
    bad = add(made, 4)
    add(made, 4, first=20)
    start = Scheduler._start

    def fails(self: Scheduler, candidate: Waiting) -> int:
        if candidate is bad:
            raise ValueError("no grammar")
        return start(self, candidate)

    monkeypatch.setattr(Scheduler, "_start", fails)
    assert made.form() is None
    assert [(w, text) for w, text in made.refused] == [
        (bad, f"request {bad.number} cannot begin: ValueError: no grammar")
    ]
    assert shape(form(made)) == (0, [4])


def test_what_is_drawn_is_what_the_request_says() -> None:
    made = scheduler(Limits(sequences=4, tokens=40, chunks=8, context=40))
    add(made, 3, sampling=Sampling(0.0))
    add(made, 3, first=10, sampling=Sampling(1e-5, 5, 0.5, 77), stop=frozenset({3}))
    add(made, 3, first=20, logprobs=2)
    add(made, 3, first=30, sampling=Sampling(0.9, 2**40, 1.0, 78))
    draws = form(made).draws
    assert draws is not None
    assert draws.samples.tolist() == [1, 2, 3]
    assert draws.temperature.tolist() == [1e-5, 0.0, 0.9]
    assert draws.top_k.tolist() == [5, 0, 2**31] and draws.top_p.tolist() == [0.5, 1.0, 1.0]
    assert draws.logprobs.tolist() == [-1, 2, -1]
    wanted = uniforms(np.array([77, 0, 78], np.uint64), np.array([3, 3, 3]))
    assert draws.uniform.tolist() == wanted.tolist()
    assert made.stops[1].tolist() == [3, *[-1] * 7] and (made.stops[0] == -1).all()
