"""The serving engine: what it gives equals one-at-a-time generation, whatever joins, ends and is pre-empted beside."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import taskgraph as tg
from taskgraph.errors import RequestError
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.models.weights import open_checkpoint
from taskgraph.serving.cache.pages import PagedCache
from taskgraph.serving.engine import Engine
from taskgraph.serving.http.protocol import CompletionBody, requests_of
from taskgraph.serving.options import Policy
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.runners.buckets import ladder
from taskgraph.serving.runners.cpu import CpuRunner, cpu_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.session import Session
from taskgraph.serving.simulate.runner import SimRunner, simulated_engine
from tests.engine_cases import told

SIZE = 32
Make = Callable[..., Engine]


def maker(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Iterator[Make]:
    """A function that makes engines on this machine's cores."""
    made: list[Engine] = []

    def make(
        sequences: int = 4, tokens: int = 48, pages: int = 40, host_pages: int = 0, context: int = 128, **options: Any
    ) -> Engine:
        limits = Limits(sequences=sequences, tokens=tokens, chunks=8, context=context)
        made.append(cpu_engine(config, weights, limits, **told(pages=pages, host_pages=host_pages, **options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    """A model of random weights that is small enough for every test."""
    from taskgraph.models.config import from_hf

    body = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 160, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    return from_hf(body, "tiny")


class Drawn:
    """A TensorSource of random weights."""

    def __init__(self, config: ModelConfig) -> None:
        c, self._draw = config, torch.Generator().manual_seed(0)
        kv = c.kv_heads * c.head_dim
        self._shapes = {
            "embed_tokens": (c.vocab_size, c.hidden_size), "q_proj": (c.hidden_size, c.hidden_size),
            "k_proj": (kv, c.hidden_size), "v_proj": (kv, c.hidden_size), "o_proj": (c.hidden_size, c.hidden_size),
            "gate_proj": (c.intermediate_size, c.hidden_size), "up_proj": (c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size),
        }  # fmt: skip
        self._hidden = c.hidden_size

    def tensor(self, name: str) -> torch.Tensor:
        shape = self._shapes.get(name.split(".")[-2], (self._hidden,))
        spread = 0.3 if len(shape) == 2 else 0.1
        return torch.randn(shape, generator=self._draw) * spread + (1.0 if len(shape) == 1 else 0.0)


@pytest.fixture(scope="module")
def weights(tiny: ModelConfig) -> dict[str, torch.Tensor]:
    return llama.load_weights(tiny, Drawn(tiny), "f32")


@pytest.fixture
def engines(tiny: ModelConfig, weights: dict[str, torch.Tensor]) -> Iterator[Make]:
    yield from maker(tiny, weights)


def prompts(seed: int, count: int, most: int, vocabulary: int = 160, least: int = 1) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocabulary, int(draw.integers(least, most + 1))).tolist() for _ in range(count)]


def empty(engine: Engine) -> bool:
    """Nothing is held, on the device and on the host."""
    return (engine.cache.device.held, engine.cache.host.held, engine.busy) == (0, 0, False)


# ------------------------------------------------------------------------------- SmolLM2, for real


_LONG = [0.15] * 6 + [0.1]
"""Most outputs are short; a tenth is longer than the engine expects, so that sequences must make room."""


@pytest.mark.model
@pytest.mark.slow
def test_a_hundred_requests_at_once_equal_one_at_a_time(smollm2_gguf: Path) -> None:
    """Exactly, in bf16: up to 64 rows every product sums a row in the same order, whatever stands beside it."""
    with open_checkpoint(smollm2_gguf) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer()
        loaded = llama.load_weights(config, checkpoint, "bf16")
    made = maker(config, loaded)
    make = next(made)
    draw = np.random.default_rng(0)
    lengths, outputs = (
        draw.choice([2, 12, 28, 30, 31, 32, 32, 39], 100),
        draw.choice([1, 2, 3, 4, 5, 6, 20], 100, p=_LONG),
    )
    text = tokenizer.encode((Path(__file__).parents[2] / "README.md").read_text())
    starts = draw.integers(0, len(text) - 40, 100)
    requests = [Request(text[s : s + n], int(o)) for s, n, o in zip(starts, lengths, outputs, strict=True)]
    core = replace(tg.devices.get("cpu"), name="one core", sm_count=1, compute_scaling=())  # two wait for each other
    alone = make(sequences=1, tokens=48, pages=4, prefix_sharing=False, device=core)
    expected = [alone.run([request])[0].tokens for request in requests]
    many = make(sequences=20, tokens=48, pages=12, host_pages=3, device=core, expected_output=1.0)
    for request in requests[:60]:
        many.submit(request)
    got = [c for _ in range(12) for c in many.step().finished]  # the others join while these run
    got += many.run(requests[60:])
    assert [c.tokens for c in sorted(got, key=lambda c: c.request)] == expected
    assert many.scheduler.preemptions > 0
    assert empty(many)
    next(made, None)


# ------------------------------------------------------------------------------------- equality, tiny


@pytest.mark.parametrize("seed", range(3))
def test_outputs_equal_a_static_session(
    engines: Make, tiny: ModelConfig, weights: dict[str, torch.Tensor], seed: int
) -> None:
    """Another cache, other kernels, one sequence at a time: the same greedy tokens in f32."""
    draw = np.random.default_rng(seed)
    requests = [Request(p, int(draw.integers(1, 40))) for p in prompts(seed, 12, 60)]
    done = engines(sequences=5, tokens=24).run(requests)
    with Session(tiny, weights, cache=128) as session:
        assert [c.tokens for c in done] == [tuple(session.generate(r.prompt, r.max_tokens)) for r in requests]
    assert {c.reason for c in done} == {"length"}


@pytest.mark.parametrize("host_pages", [0, 3, 30])
def test_preempted_sequences_go_on_where_they_were(engines: Make, host_pages: int) -> None:
    requests = [Request(p, 60) for p in prompts(1, 10, 40)]
    expected = [c.tokens for c in engines(pages=64).run(requests)]
    small = engines(sequences=8, pages=8, host_pages=host_pages, expected_output=1.0)
    assert [c.tokens for c in small.run(requests)] == expected
    assert small.scheduler.preemptions > 0
    assert (small.scheduler.recomputed == 0) is (host_pages == 30)
    assert (small.scheduler.recomputed == small.scheduler.preemptions) is (host_pages == 0)
    assert empty(small)


def test_without_experience_nothing_is_preempted(engines: Make) -> None:
    engine = engines(sequences=8, pages=8)
    engine.run([Request(p, 60) for p in prompts(1, 10, 40)])
    assert engine.scheduler.preemptions == 0
    assert empty(engine)


def test_a_stop_token_ends_a_request_one_step_late_and_frees_its_pages(engines: Make) -> None:
    (prompt,) = prompts(4, 1, 20)
    engine = engines()
    (whole,) = engine.run([Request(prompt, 30)])
    stop = whole.tokens[7]
    steps = engine.stats.steps
    (cut,) = engine.run([Request(prompt, 30, stop=frozenset({stop}))])
    assert cut.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert cut.reason == "stop"
    assert engine.stats.steps - steps == len(cut.tokens) + 1
    assert empty(engine)


def test_a_row_that_a_stop_token_frees_feeds_nothing_to_the_next_sequence(engines: Make) -> None:
    """The sequence that ends has one more token under way when its row goes to the next one."""
    given = [Request(p, 40) for p in prompts(15, 24, 20)]
    whole = [c.tokens for c in engines(sequences=1).run(given)]
    stopping = [
        Request(r.prompt, 40, stop=frozenset({w[3 + i % 5]})) for i, (r, w) in enumerate(zip(given, whole, strict=True))
    ]
    wanted = [w[: w.index(next(iter(r.stop))) + 1] for r, w in zip(stopping, whole, strict=True)]
    for sequences in (1, 3):
        engine = engines(sequences=sequences, tokens=60)
        assert [c.tokens for c in engine.run(stopping)] == wanted
        assert empty(engine)


def test_a_conversation_finds_its_earlier_rounds(engines: Make) -> None:
    """The pages of a round are reused by the next one, from the device and, when others took their place, the host."""
    (first,) = prompts(5, 1, 40, least=40)
    expected = engines().run([Request(first, 30)])[0].tokens
    follow = [*first, *expected, 3, 1, 4]
    wanted = engines().run([Request(follow, 20)])[0].tokens
    for others in (0, 6):
        engine = engines(pages=5, host_pages=24)
        assert engine.run([Request(first, 30)])[0].tokens == expected
        engine.run([Request(p, 30) for p in prompts(6, others, 60, least=40)])
        before = engine.stats.prompt_tokens
        assert engine.run([Request(follow, 20)])[0].tokens == wanted
        computed = engine.stats.prompt_tokens - before
        assert computed == len(follow) - 2 * SIZE  # two of its pages were full when the first round ended
        assert empty(engine)


def test_equal_prompts_share_pages_while_they_run(engines: Make) -> None:
    (prompt,) = prompts(7, 1, 70, least=70)
    engine = engines(sequences=4, tokens=100)
    done = engine.run([Request(prompt, 8) for _ in range(4)])
    assert len({c.tokens for c in done}) == 1
    assert engine.stats.prompt_tokens == 70 + 3 * 6


def test_drawn_tokens_depend_on_the_seed_alone(engines: Make) -> None:
    (prompt,) = prompts(8, 1, 20)
    hot = [Request(prompt, 20, Sampling(temperature=1.5, seed=seed)) for seed in range(6)]
    alone = [engines(sequences=1).run([r])[0].tokens for r in hot]
    mixed = engines(sequences=8).run([*hot, *(Request(p, 9) for p in prompts(9, 5, 30))])
    assert [c.tokens for c in mixed[:6]] == alone
    assert len(set(alone)) > 1
    greedy = engines().run([Request(prompt, 20)])[0].tokens
    assert engines().run([Request(prompt, 20, Sampling(temperature=1.0, top_k=1))])[0].tokens == greedy


def test_the_choices_of_a_body_draw_each_their_own_and_share_the_prompt(engines: Make) -> None:
    (prompt,) = prompts(16, 1, 70, least=70)
    body = CompletionBody(model="tiny", prompt=prompt, n=4, temperature=1.5, seed=7, max_tokens=12)
    requests = requests_of(body, [prompt], 128, frozenset())
    engine = engines(sequences=4, tokens=100)
    done = [c.tokens for c in engine.run(requests)]
    assert len(set(done)) == 4
    assert done == [engines(sequences=1).run([r])[0].tokens for r in requests]
    assert engine.stats.prompt_tokens == 70 + 3 * 6  # two full pages are computed once
    assert empty(engine)
    unseeded = requests_of(body.model_copy(update={"seed": None}), [prompt, prompt], 128, frozenset())
    assert len({r.sampling.seed for r in unseeded}) == 8


# --------------------------------------------------------------------------------- steps and clients


def test_cancelled_requests_give_back_their_pages(engines: Make) -> None:
    engine = engines(sequences=2)
    numbers = [engine.submit(Request(p, 50)) for p in prompts(10, 4, 40)]
    given: dict[int, int] = {}
    for _ in range(6):
        output = engine.step()
        for number in output.requests.tolist():
            given[number] = given.get(number, 0) + 1
    for number in (numbers[0], numbers[3], 99):
        engine.cancel(number)
    done = {c.request: c for c in engine.run()}
    assert (done[numbers[0]].reason, done[numbers[3]].reason) == ("cancelled", "cancelled")
    assert 0 < len(done[numbers[0]].tokens) < 50
    assert done[numbers[3]].tokens == ()
    assert [len(done[n].tokens) for n in numbers[1:3]] == [50, 50]
    assert empty(engine)


def test_step_outputs_add_up_to_the_completions(engines: Make) -> None:
    engine = engines()
    for prompt in prompts(11, 6, 40):
        engine.submit(Request(prompt, 15))
    streamed: dict[int, list[int]] = {}
    done = []
    while engine.busy:
        output = engine.step()
        for number, token in zip(output.requests.tolist(), output.tokens.tolist(), strict=True):
            streamed.setdefault(number, []).append(token)
        done += output.finished
    assert {c.request: list(c.tokens) for c in done} == streamed
    assert all(c.arrival_s <= c.first_s <= c.end_s for c in done)


def test_no_step_plans_once_its_buckets_are_warm(engines: Make) -> None:
    engine = engines()
    requests = [Request(p, 10) for p in prompts(12, 8, 40)]
    runner = engine.runner
    assert isinstance(runner, CpuRunner)
    runner.warm()
    made = runner.bank.made
    engine.run(requests)
    assert runner.bank.made == made


def test_the_host_works_while_a_step_runs(engines: Make) -> None:
    engine = engines(sequences=8)
    engine.run([Request(p, 30) for p in prompts(13, 16, 40)])
    assert 0.3 * engine.stats.host_s < engine.stats.hidden_s <= engine.stats.host_s


def test_an_op_that_fails_reaches_the_caller(engines: Make) -> None:
    engine = engines()
    engine.submit(Request([1, 2, 3], 4))
    engine.step()
    assert engine._running is not None
    engine.runner.wait()
    engine._running.tokens[:] = 1000  # outside the vocabulary, behind the engine's back
    engine.runner.launch(engine._running)
    engine.submit(Request([4, 5], 4))
    with pytest.raises(tg.ExecutionError, match="embedding"):
        engine.step()
    with pytest.raises(tg.ExecutionError, match=r"a step has failed .*embedding"):
        engine.run([])
    assert [(c.request, c.tokens, c.reason) for c in engine.abort()] == [(0, (), "failed"), (1, (), "failed")]
    assert empty(engine)
    assert len(engine.run([Request([1, 2, 3], 4)])[0].tokens) == 4


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "says"),
    [
        ([1] * 120, 9, "exceed the context of 128"),
        ([1] * 1000, 1, "exceed the context of 128"),
        ([1], 10**9, "exceed the context of 128"),
        ([1], 0, "max_tokens is 0"),
        ([1], -5, "max_tokens is -5"),
        ([1], 1.5, "max_tokens is 1.5"),
        ([1], True, "max_tokens is True"),
        ([], 4, "at least one"),
        ([0.5], 4, "token numbers"),
        ([[1]], 4, "token numbers"),
        ([160], 4, "token 160 is outside the vocabulary of 160"),
        ([3, -1], 4, "token -1 is outside"),
        ([1] * 90, 30, "need 4 pages; the cache has 3"),
    ],
)
def test_requests_that_cannot_be_served(engines: Make, prompt: list[Any], max_tokens: Any, says: str) -> None:
    engine = engines(pages=3)
    with pytest.raises(RequestError, match=says):
        engine.submit(Request(prompt, max_tokens))
    assert not engine.busy


def test_too_many_waiting_and_too_many_stops(engines: Make) -> None:
    engine = engines(most_waiting=2)
    for _ in range(2):
        engine.submit(Request([1], 1))
    with pytest.raises(RequestError, match="2 requests wait"):
        engine.submit(Request([1], 1))
    with pytest.raises(RequestError, match="9 stop tokens"):
        engines().submit(Request([1], 1, stop=frozenset(range(9))))


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_that_means_nothing(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [{"pages": 0}, {"page_size": 16}, {"host_pages": -1}, {"disk_pages": 3}])
def test_tiers_that_contradict_each_other(engines: Make, bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="give at least one page"):
        engines(**bad)


@pytest.mark.parametrize("name", ["pages", "page_size", "host_pages", "expected_output"])
@pytest.mark.parametrize("value", ["8", 1.5j, [8], float("nan")])
def test_tiers_of_the_wrong_kind(engines: Make, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        engines(**{name: value})


@pytest.mark.parametrize("name", ["sequences", "tokens", "chunks", "context"])
@pytest.mark.parametrize("value", [None, "8", 1.5, True, [8], -1, 0])
def test_limits_of_the_wrong_kind(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        Limits(**{name: value})


def test_limits_that_leave_no_room() -> None:
    with pytest.raises(RequestError, match="prefill"):
        Limits(sequences=64, tokens=64)


def test_a_full_cache_makes_requests_wait(engines: Make) -> None:
    engine = engines(sequences=4, pages=4)
    for prompt in prompts(14, 6, 90, least=70):
        engine.submit(Request(prompt, 20))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, int(np.count_nonzero(engine.scheduler.state)))
        assert engine.cache.device.held <= 4
    assert most == 1
    assert empty(engine)


# ------------------------------------------------------------------------------------------ simulated


def test_ten_thousand_simulated_requests_leave_no_page() -> None:
    config, draw = load_config("llama-2-70b"), np.random.default_rng(0)
    engine = simulated_engine(
        config, lambda shape: 1e-3 * (1 + shape.decode + shape.prefill), pages=250, host_pages=60,
        limits=Limits(sequences=256, tokens=512, chunks=16, context=1024), expected_output=8.0,
    )  # fmt: skip
    lengths = zip(draw.integers(1, 200, 10_000).tolist(), draw.integers(1, 60, 10_000).tolist(), strict=True)
    done = engine.run(Request(np.ones(p, np.int32), o) for p, o in lengths)
    assert len(done) == 10_000
    assert engine.stats.tokens == sum(len(c.tokens) for c in done)
    assert engine.scheduler.preemptions > 0
    assert empty(engine)


def test_a_trace_is_replayed_on_the_simulated_clock() -> None:
    config = load_config("llama-2-70b")
    engine = simulated_engine(config, lambda shape: 0.5, pages=1000)
    # the last comes while the first step runs and the second is formed already, so it is in the third
    trace = [(10.0, Request([1] * 20, 3)), (0.0, Request([1] * 5, 2)), (10.1, Request([1] * 5, 1))]
    done = engine.replay(trace)
    assert [(c.arrival_s, c.first_s, c.end_s) for c in done] == [
        (0.0, 0.5, 1.0),
        (10.0, 10.5, 11.5),
        (10.1, 11.5, 11.5),
    ]
    assert engine.runner.now() == 11.5


def test_moved_pages_take_their_time_in_a_simulation() -> None:
    runner = SimRunner(lambda shape: 1.0, page_bytes=25e9, copy_bytes_per_s=25e9 / 3)
    engine = Engine(runner, PagedCache(3, SIZE, 8), Limits(2, 64, 2, 96), vocabulary=9, policy=Policy(False, 1.0))
    done = engine.run([Request([1] * 31, 40), Request([1] * 31, 20)])
    assert engine.scheduler.preemptions == 1
    assert max(c.end_s for c in done) > 60


def test_ladder() -> None:
    assert ladder(100) == (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert ladder(64) == (0, 1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert ladder(3) == (0, 1, 2, 3)


def test_a_bank_that_is_full_keeps_the_steps_that_are_needed_most(
    engines: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warming ends there, and whatever comes runs in what there is."""
    engine = engines(sequences=4, tokens=48)
    runner = engine.runner
    assert isinstance(runner, CpuRunner)
    every = runner.buckets()
    runner.prepare(every[0])
    monkeypatch.setattr(runner.bank, "_budget_bytes", 2.5 * runner.bank.memory_bytes)
    told: list[int] = []
    runner.warm(tell=lambda done, of: told.append(of - done))
    assert runner.bank.evicted > 0
    assert 0 < told[-1] < len(every) - 1
    made = runner.bank.made
    assert made == len(told) and len(runner.bank) == made - runner.bank.evicted
    assert every[0] in runner.bank
    done = engine.run([Request(p, 10) for p in prompts(18, 8, 40)])
    assert runner.bank.made == made
    assert [c.tokens for c in done] == [c.tokens for c in engines().run([Request(p, 10) for p in prompts(18, 8, 40)])]
