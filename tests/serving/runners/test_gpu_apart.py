"""Prompts beside what decodes on the virtual GPU: two graphs in flight in disjoint partitions, with the cpu's tokens.

The virtual driver runs what is in flight in a random order that keeps the dependencies that it was told, so that one
that is missing shows as another token."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.models.llama import step_graph
from taskgraph.runtime.gpu import driver, virtual
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.requests import Request
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.runners.gpu import GpuRunner, gpu_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.ways import Load, Split, Way
from tests.conftest import Call
from tests.runtime.gpu.test_cuda import DEVICE, held, model_tensors
from tests.serving.runners.test_gpu_runner import TINY
from tests.serving.runners.test_gpu_steps import Trace, Weights, calls, replayed, trace_of

LIMITS = Limits(sequences=4, tokens=24, chunks=2, context=96)
SPLITS = (Split(48, 80), Split(64, 64))


@pytest.fixture(scope="module")
def weights() -> Weights:
    """In memory that processes share: to give them to another one would move them there, away from what is bound."""
    made = model_tensors(step_graph(TINY, batch=1, tokens=1, cache=64, dtype="f32"), 1, roles=("weight",))
    return {name: tensor.share_memory_() for name, tensor in made.items()}


class Drawn:
    """Ways that are drawn: apart where that can be, in a split that changes now and then."""

    step_tokens = LIMITS.tokens
    splits = SPLITS

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)

    def choose(self, load: Load, using: Split | None = None) -> Way:
        split = SPLITS[int(self.draw.integers(2))] if self.draw.random() < 0.1 else using or SPLITS[0]
        apart = load.decode and load.waiting and self.draw.random() < 0.95
        return Way(split if apart else None, int(self.draw.choice([7, 16, 24])), 1.0, 1.0, 1.0, 1.0)

    def apart_s(self, split: Split | None, decode: int, context: float, prefill: int) -> tuple[float, float]:
        return tuple(self.draw.random(2).tolist())  # type: ignore[return-value]

    def prepare(self, context: int) -> None: ...


class Always(Drawn):
    """Apart wherever both kinds of work are there."""

    def choose(self, load: Load, using: Split | None = None) -> Way:
        return Way(SPLITS[0] if load.decode and load.waiting else None, 16, 1.0, 1.0, 1.0, 1.0)

    def apart_s(self, split: Split | None, decode: int, context: float, prefill: int) -> tuple[float, float]:
        return 0.0, 0.0


def engine_of(weights: Weights, pages: int, expected: float | None = None, seed: int = 0) -> tuple[Engine, GpuRunner]:
    engine = gpu_engine(
        TINY, weights, LIMITS, KvMemory(pages), device=DEVICE, planner="list", policy=Policy(expected_output=expected)
    )
    runner = engine.runner
    assert isinstance(runner, GpuRunner)
    runner.ways = Drawn(seed)  # type: ignore[assignment]
    return engine, runner


# ------------------------------------------------------------------------------------------- tokens

_KEPT: dict[str, Engine] = {}


def on_gpu(weights: Weights, trace: Trace, seed: int) -> tuple[list[tuple[int, ...]], list[str], int, int]:
    if "gpu" not in _KEPT:
        _KEPT["gpu"], _ = engine_of(weights, 5, 1.0)
    engine = _KEPT["gpu"]
    engine.runner.ways = Drawn(seed)  # type: ignore[attr-defined]
    tokens, reasons = replayed(engine, trace)
    return tokens, reasons, engine.stats.beside, engine.scheduler.preemptions


def ended() -> None:
    _KEPT.pop("gpu").close()


@pytest.fixture(scope="module")
def both(on_virtual: Call, weights: Weights) -> Iterator[tuple[Engine, Call]]:
    with cpu_engine(TINY, weights, LIMITS, KvMemory(64)) as engine:
        yield engine, lambda trace, seed: on_virtual(on_gpu, weights, trace, seed)
    on_virtual(ended)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_tokens_are_those_of_the_cpu(both: tuple[Engine, Call], seed: int) -> None:
    """Under random arrivals, cancellations, stop tokens and pre-emptions; drawn, steered and greedy side by side."""
    engine, gpu = both
    whole = [c.tokens for c in engine.run(trace_of(seed).requests)]
    trace = trace_of(seed, whole)
    wanted = [c.tokens for c in engine.run(trace.requests)]
    got, reasons, *_ = gpu(trace, seed)
    for tokens, reason, alone in zip(got, reasons, wanted, strict=True):
        assert tokens == (alone[: len(tokens)] if reason == "cancelled" else alone)


def test_prompts_run_beside_and_sequences_are_pre_empted(both: tuple[Engine, Call]) -> None:
    engine, gpu = both
    draw = np.random.default_rng(1)
    requests = tuple(Request(draw.integers(0, TINY.vocab_size, 28).tolist(), 45) for _ in range(6))
    got, _, beside, preemptions = gpu(Trace(requests, (0, 0, 2, 5, 9, 9)), 3)
    assert got == [c.tokens for c in engine.run(requests)]
    assert beside > 5
    assert preemptions > 0


# ------------------------------------------------------------------------------- what the driver saw


def test_both_graphs_are_in_flight_on_disjoint_sms(on_virtual: Call, weights: Weights) -> None:
    on_virtual(in_flight, weights)


def in_flight(weights: Weights) -> None:
    """The partitions of both sides are those of one split; their launches overlap in the driver's time; and a step of a
    side waits for the other side's only where the way changes."""
    control = virtual.loaded()
    assert control is not None
    engine, runner = engine_of(weights, 64)
    with engine:
        runner.ways = Always(0)  # type: ignore[assignment]
        for _ in range(2):  # the first time steps are captured
            waits, overlapped = 0, 0
            engine.submit(Request([1, 2, 3], 40))
            for _ in range(4):
                engine.step()
            for i in range(3):
                engine.submit(Request([(7 * i + j) % TINY.vocab_size for j in range(60)], 4))
            while engine.busy:
                before = calls()["cuStreamWaitEvent"]
                engine.step()
                if engine.apart.under_way and runner.pipeline.under_way:
                    overlapped += 1
                    waits += calls()["cuStreamWaitEvent"] - before
            engine.cache.device.clear()  # no prefix is found again
        assert overlapped > 4
        spans = control.report().graph_spans
        at_once = 0
        for i, (begin, end, split, *sms) in enumerate(spans):
            for other_begin, other_end, other_split, *others in spans[:i]:
                if begin < other_end - 1e-12 and other_begin < end - 1e-12:
                    at_once += 1
                    assert split == other_split > 0, "partitions of one split, and none has the whole device"
                    assert sorted((tuple(sms), tuple(others))) == [(0, 48), (48, 128)], "which are disjoint"
        assert at_once > 4
        assert waits < overlapped / 2, "a step waits for the other side's only where the way changes"


def test_a_step_beside_takes_the_calls_of_a_step(on_virtual: Call, weights: Weights) -> None:
    """And one to ask whether the prompts have ended: six."""
    found = on_virtual(steady, weights)
    assert sum(found.values()) <= 6
    assert found["cuGraphLaunch"] == 1


def steady(weights: Weights) -> dict[str, float]:
    engine, _ = engine_of(weights, 64)
    with engine:
        for i in range(3):
            engine.submit(Request([i + 1, 2, 3], 60))
        for _ in range(12):
            engine.step()
        before, steps = calls(), 16
        for _ in range(steps):
            assert len(engine.step().tokens) == 3
        return {name: count / steps for name, count in (calls() - before).items()}


# ---------------------------------------------------------------------------------------- warm engines


def test_a_warm_engine_plans_and_captures_nothing(on_virtual: Call, weights: Weights) -> None:
    on_virtual(warm_and_serve, weights)


def warm_and_serve(weights: Weights) -> None:
    control = virtual.loaded()
    assert control is not None
    driver.Gpu.open()
    before = held(control)
    engine, runner = engine_of(weights, 64)
    with engine:
        told: list[tuple[int, int]] = []
        runner.warm(tell=lambda done, of: told.append((done, of)))
        assert told[-1][0] == told[-1][1] == runner.planned
        assert len(runner.parts) == 10
        planned, seen = runner.planned, calls()
        for seed in range(2):
            replayed(engine, trace_of(seed))
        assert engine.stats.beside > 0
        made = calls() - seen
        assert runner.planned == planned
        assert not {name for name in made if "Capture" in name or "Instantiate" in name or "ExecUpdate" in name}
        for memory in (runner.pipeline.memory, runner.beside.memory):
            assert memory.memory_bytes < memory.asked_bytes / 2, "the executables of a side share what they work in"
        assert not {*addresses(runner.pipeline)} & {*addresses(runner.beside)}
    assert {**held(control), "kernel": 0, "library": 0} == {**before, "kernel": 0, "library": 0}


def addresses(line: object) -> list[int]:
    return [slab.address for slab in line.memory._slabs]  # type: ignore[attr-defined]


def test_a_wanted_time_a_token_chooses_by_prediction(on_virtual: Call, weights: Weights) -> None:
    on_virtual(wished, weights)


def wished(weights: Weights) -> None:
    """A tiny model gains nothing apart, and stays mixed; its tokens are the same."""
    requests = [Request([i] * 20, 6) for i in range(5)]
    found = []
    for tpot_s in (None, 1e-3):
        with gpu_engine(TINY, weights, LIMITS, KvMemory(64), device=DEVICE, planner="list", tpot_s=tpot_s) as engine:
            found.append([c.tokens for c in engine.run(requests)])
            assert isinstance(engine.runner, GpuRunner)
            assert (engine.runner.ways is None) == (tpot_s is None)
    assert found[0] == found[1]
