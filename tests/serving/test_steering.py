"""Requests beside each other: one whose logits are NaN ends alone, and biases, penalties and log-probabilities are
those of the definition, on every runner and through pre-emptions."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import KvMemory
from taskgraph.serving.requests import Chance, Completion, Request, Sampling
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.runners.gpu import gpu_engine
from taskgraph.serving.runners.parallel import ranks_engine
from taskgraph.serving.session import Session
from tests import steer_cases as cases
from tests.conftest import Call
from tests.engine_cases import told
from tests.runtime.gpu.test_cuda import DEVICE


def cpu(dtype: str = "f32", poisoned: bool = True, **options: Any) -> Engine:
    return cpu_engine(cases.config(), cases.weights(dtype, poisoned), cases.LIMITS, **told(**{"pages": 16, **options}))


# ------------------------------------------------------------------------------------- NaN ends alone


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_poison_ends_alone(dtype: str) -> None:
    """Also in bf16, where attention multiplies values two by two, so that what others left in a page might count."""
    with cpu(dtype) as one, cpu(dtype) as many:
        assert cases.beside_poison(many) == cases.alone(one)


@pytest.mark.slow
def test_poison_ends_alone_on_a_gpu(on_virtual: Call) -> None:
    with cpu() as one:
        wanted = cases.alone(one)
    assert on_virtual(gpu_beside_poison, "f32") == wanted


def gpu_beside_poison(dtype: str) -> list[tuple[Any, ...]]:
    memory = KvMemory(16)
    with gpu_engine(
        cases.config(), cases.weights(dtype), cases.LIMITS, memory, device=DEVICE, planner="list"
    ) as engine:
        return cases.beside_poison(engine)


@pytest.mark.slow
def test_poison_ends_alone_over_ranks() -> None:
    with cpu() as one:
        wanted = cases.alone(one)
    with ranks_engine(cases.config(), cases.load, cases.LIMITS, KvMemory(16), 1) as engine:
        assert cases.beside_poison(engine) == wanted


def test_poison_is_not_shared_by_its_prefix() -> None:
    """A page that a poisoned request computed is found by no later one."""
    prompt = [*range(30), cases.NAN_TOKEN, *range(40)]
    with cpu() as engine:
        with pytest.raises(tg.ExecutionError, match="all of 1 requests failed; the first: request 0: its logits"):
            engine.run([Request(prompt, 4)])
        assert engine.cache.device.free == engine.cache.device.pages, "nothing is findable"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_logit_that_is_no_finite_number_is_enough(dtype: str, value: float) -> None:
    """Of a vocabulary of 160, and neither the first nor the last; greedy, drawn, and told."""
    asks = [{}, {"sampling": Sampling(temperature=0.8, top_k=3, seed=1)}, {"logprobs": 2}]
    weights = cases.weights(dtype, poisoned=False)
    weights["lm_head"][77] = value
    if value == float("inf"):  # times hidden values of both signs it would be NaN
        weights["lm_head"][77] = 0.0
        weights["lm_head"][77, 0] = value
    with cpu_engine(cases.config(), weights, cases.LIMITS, KvMemory(16)) as engine:
        for ask in asks:
            for prompt in ([1, 2, 3], [9] * 40):
                try:
                    (done,) = engine.run([Request(prompt, 3, **ask)])
                except tg.ExecutionError as error:
                    assert "request" in str(error) and "no finite numbers" in str(error)
                else:  # minus infinity is a token that cannot be, and no error
                    assert value > 0 and 77 not in done.tokens
        assert engine.cache.device.held == 0


def test_a_session_says_it_too() -> None:
    with (
        Session(cases.config(), cases.weights(), cache=64) as session,
        pytest.raises(tg.ExecutionError, match="no finite numbers"),
    ):
        list(session.generate([1, cases.NAN_TOKEN], 4))


@pytest.mark.parametrize("sample", [-7, 160, 2**40])
def test_a_runner_that_gives_what_is_no_token_ends_that_request_alone(sample: int) -> None:
    with cpu(poisoned=False) as engine:
        wait, requests = engine.runner.wait, [Request([i, 5], 6) for i in range(3)]
        expected = [c.tokens for c in engine.run(requests)]

        def wrong() -> tuple[Any, float]:
            samples, at = wait()
            return np.where(np.arange(len(samples)) == 1, sample, samples), at

        engine.runner.wait = wrong  # type: ignore[method-assign]
        done = engine.run(requests)
        engine.runner.wait = wait  # type: ignore[method-assign]
    failed = [c for c in done if c.reason == "failed"]
    assert failed and len(failed) < len(done)
    for completion, tokens in zip(done, expected, strict=True):
        if completion.reason == "failed":
            assert "no token" in completion.error or "no finite numbers" in completion.error
            tokens = tokens[: len(completion.tokens)]
        assert completion.tokens == tokens
    assert engine.cache.device.held == 0


# --------------------------------------------------------------------------------- the definition


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with closing(Session(cases.config(), cases.weights(poisoned=False), cache=128)) as made:
        yield made


def logits_after(session: Session, tokens: list[int], first: int = 0) -> np.ndarray:
    """One token a step, so that all lengths take the same plan."""
    for place, token in enumerate(tokens, first):
        made = session.run([token], [place])
    found: np.ndarray = made[llama.LOGITS].reshape(-1).double().numpy().copy()
    return found


def by_hand(session: Session, request: Request) -> tuple[list[int], list[Chance]]:
    """Greedy tokens, one after another, by the definition of OpenAI: c the count of a token in the answer, its logit
    loses c * frequency_penalty + (c > 0) * presence_penalty and gains its bias."""
    how, answer, chances = request.sampling, [], []
    logits = logits_after(session, list(request.prompt))
    for place in range(len(request.prompt), len(request.prompt) + request.max_tokens):
        logs = torch.log_softmax(torch.from_numpy(logits.copy()), 0).numpy()
        edited = logits.copy()
        for token in set(answer):
            edited[token] -= answer.count(token) * how.frequency_penalty + how.presence_penalty
        for token, bias in how.biases:
            edited[token] += bias
        answer.append(int(edited.argmax()))
        best = np.argsort(-logs)[: request.logprobs or 0]
        chances.append(Chance(answer[-1], float(logs[answer[-1]]), tuple((int(t), float(logs[t])) for t in best)))
        logits = logits_after(session, [answer[-1]], place)
    return answer, chances


ASKS = [
    Sampling(),
    Sampling(presence_penalty=2.0),
    Sampling(frequency_penalty=0.9),
    Sampling(presence_penalty=-1.0, frequency_penalty=0.3),
    Sampling(logit_bias={5: 3.0, 17: -100.0}),
    Sampling(presence_penalty=0.5, frequency_penalty=0.5, logit_bias=[(9, 1.0)]),
]


@pytest.mark.parametrize(
    "room", [{"pages": 64}, {"pages": 6, "host_pages": 20}, {"pages": 6}], ids=["roomy", "to the host", "again"]
)
def test_answers_are_those_of_the_definition(session: Session, room: dict[str, int]) -> None:
    """With pages for all, with sequences that go to the host and come back, and with some that are computed again."""
    draw = np.random.default_rng(2)
    requests = [
        Request(draw.integers(0, 150, int(draw.integers(1, 40))).tolist(), 45, how, logprobs=i % 4)
        for i, how in enumerate(ASKS * 2)
    ]
    with cpu(poisoned=False, expected_output=None if room["pages"] > 6 else 1.0, **room) as engine:
        done = engine.run(requests)
        assert (engine.scheduler.preemptions > 0) is (room["pages"] == 6)
        assert engine.cache.device.held == 0
    for request, completion in zip(requests, done, strict=True):
        tokens, chances = by_hand(session, request)
        assert list(completion.tokens) == tokens
        same(completion, chances)


def same(completion: Completion, chances: list[Chance]) -> None:
    assert [c.token for c in completion.chances] == [c.token for c in chances]
    for got, wanted in zip(completion.chances, chances, strict=True):
        assert abs(got.logprob - wanted.logprob) < 1e-3
        assert [t for t, _ in got.top] == [t for t, _ in wanted.top]
        np.testing.assert_allclose([p for _, p in got.top], [p for _, p in wanted.top], atol=1e-3)


def test_drawn_tokens_are_told_with_the_models_own_chances(session: Session) -> None:
    request = Request([4, 5, 6], 10, Sampling(temperature=2.0, top_k=20, seed=1, presence_penalty=2.0), logprobs=1)
    with cpu(poisoned=False) as engine:
        (done,) = engine.run([request])
    context = [4, 5, 6]
    for token, chance in zip(done.tokens, done.chances, strict=True):
        logits = torch.from_numpy(logits_after(session, context))
        assert chance.token == token
        assert abs(chance.logprob - float(torch.log_softmax(logits, 0)[token])) < 1e-3
        assert chance.top[0][0] == int(logits.argmax())
        context.append(token)


def test_streamed_chances_are_those_of_the_completion() -> None:
    with cpu(poisoned=False) as engine:
        number = engine.submit(Request([1, 2], 6, logprobs=2))
        other = engine.submit(Request([3], 6))
        seen: dict[int, list[Chance]] = {number: [], other: []}
        done = []
        while engine.busy:
            output = engine.step()
            for row, chance in output.chances.items():
                assert int(output.tokens[row]) == chance.token
                seen[int(output.requests[row])].append(chance)
            done += output.finished
    by_number = {c.request: c for c in done}
    assert tuple(seen[number]) == by_number[number].chances and len(seen[number]) == 6
    assert seen[other] == [] and by_number[other].chances == ()


def test_requests_that_ask_for_nothing_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one row of logits is read for them."""
    with cpu(poisoned=False) as engine:
        read: list[int] = []
        rows = engine.runner._logits  # type: ignore[attr-defined]

        def counted(executable: Any, which: np.ndarray) -> torch.Tensor:
            read.append(len(which))
            found: torch.Tensor = rows(executable, which)
            return found

        monkeypatch.setattr(engine.runner, "_logits", counted)
        engine.run([Request([1, 2], 20), Request([3], 10, Sampling(temperature=1e-9))])
        assert read == []
        engine.run([Request([1, 2], 20), Request([3], 10, logprobs=0)])
        assert read == [1] * 10
