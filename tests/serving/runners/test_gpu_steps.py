"""What a step on a GPU costs the host, and that running ahead changes nothing: driver calls are counted, plans and
captures too, and random traces give the tokens of the cpu backend."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.models.llama import step_graph
from taskgraph.runtime.gpu import driver, virtual
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.runners.buckets import Buckets, coarse_first, holding
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.runners.gpu import GpuRunner, gpu_engine
from taskgraph.serving.scheduler import Limits
from tests.conftest import Call
from tests.runtime.gpu.test_cuda import DEVICE, held, model_tensors
from tests.serving.runners.test_gpu_runner import LIMITS, TINY

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """In memory that processes share: to give them to another one would move them there, away from what is bound."""
    made = model_tensors(step_graph(TINY, batch=1, tokens=1, cache=64, dtype="f32"), 1, roles=("weight",))
    return {name: tensor.share_memory_() for name, tensor in made.items()}


# ------------------------------------------------------------------------------------ calls of a step


def calls() -> Counter[str]:
    control = virtual.loaded()
    assert control is not None
    return Counter(control.report().calls)


def test_a_steady_step_takes_five_calls_of_the_driver(on_virtual: Call, weights: Weights) -> None:
    """Whatever it samples, and however many sequences decode."""
    for sequences, sampling in ((2, Sampling()), (8, Sampling(temperature=0.9, top_k=9, top_p=0.8))):
        found = on_virtual(steady, weights, sequences, sampling)
        assert found == {
            "cuMemcpyAsync": 2, "cuGraphLaunch": 1, "cuEventRecord": 1, "cuEventSynchronize": 1,
        }  # fmt: skip


def steady(weights: Weights, sequences: int, sampling: Sampling) -> dict[str, float]:
    """Driver calls of a step, the mean of some."""
    limits = Limits(sequences=8, tokens=24, chunks=4, context=96)
    with gpu_engine(TINY, weights, limits, KvMemory(32), device=DEVICE, planner="list") as engine:
        for i in range(sequences):
            engine.submit(Request([i + 1, 2, 3], 40, sampling=sampling))
        for _ in range(12):
            engine.step()
        before, steps = calls(), 16
        for _ in range(steps):
            assert len(engine.step().tokens) == sequences
        return {name: count / steps for name, count in (calls() - before).items()}


# ------------------------------------------------------------------------------------- random traces


@dataclass(frozen=True)
class Trace:
    """Requests, the step in which each is submitted, and those in which some are cancelled."""

    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    cancelled: dict[int, int] = field(default_factory=dict)


SMALL = KvMemory(5, 3), Policy(expected_output=1.0)
"""So few pages that sequences are pre-empted."""


def trace_of(seed: int, answers: "list[tuple[int, ...]] | None" = None) -> Trace:
    """A random trace; with the answers that its requests give without stop tokens, some of them stop."""
    draw = np.random.default_rng(seed)
    count, requests = int(draw.integers(3, 9)), []
    for i in range(count):
        prompt = draw.integers(0, TINY.vocab_size, int(draw.choice([1, 3, 20, 40]))).tolist()
        how = Sampling()
        if draw.random() < 0.3:
            how = Sampling(
                temperature=0.8, top_k=int(draw.choice([0, 12])), top_p=float(draw.choice([0.9, 1.0])), seed=i
            )
        if draw.random() < 0.15:
            how = Sampling(frequency_penalty=0.7)
        most, stops, place = int(draw.integers(1, 50)), draw.random() < 0.4, int(draw.integers(0, 50))
        stop = frozenset({answers[i][min(place, most - 1)]}) if answers is not None and stops else frozenset[int]()
        logprobs = 1 if draw.random() < 0.1 else None
        requests.append(Request(prompt, most, sampling=how, stop=stop, logprobs=logprobs))
    arrivals = np.sort(draw.integers(0, 9, count)).tolist()
    cancelled = {i: int(draw.integers(0, 50)) for i in range(count) if draw.random() < 0.2}
    return Trace(tuple(requests), tuple(arrivals), cancelled)


def replayed(engine: Engine, trace: Trace) -> tuple[list[tuple[int, ...]], list[str]]:
    """The tokens of every request, and why it ended."""
    numbers: list[int] = []
    done, step = {}, 0
    if engine.scheduler.expected_output is not None:
        engine.scheduler.expected_output = 1.0  # what it has learnt would keep it from pre-empting
    while engine.busy or len(numbers) < len(trace.requests) or step <= max(trace.cancelled.values(), default=-1):
        numbers += [engine.submit(r) for r, at in zip(trace.requests, trace.arrivals, strict=True) if at == step]
        for i, at in trace.cancelled.items():
            if at == step and i < len(numbers):
                engine.cancel(numbers[i])
        output = engine.step()
        done |= {c.request: c for c in output.finished}
        step += 1
    assert engine.cache.device.held == engine.cache.host.held == 0
    return [done[n].tokens for n in numbers], [done[n].reason for n in numbers]


_ENGINES: dict[str, Engine] = {}


def in_virtual(weights: Weights, trace: Trace) -> tuple[list[tuple[int, ...]], list[str]]:
    if "gpu" not in _ENGINES:
        memory, policy = SMALL
        _ENGINES["gpu"] = gpu_engine(TINY, weights, LIMITS, memory, device=DEVICE, planner="list", policy=policy)
    return replayed(_ENGINES["gpu"], trace)


def counted() -> tuple[int, int]:
    """Pre-emptions, and how many steps were launched before the one before had ended."""
    engine = _ENGINES["gpu"]
    return engine.scheduler.preemptions, engine.stats.ahead


def ended() -> None:
    _ENGINES.pop("gpu").close()


@pytest.fixture(scope="module")
def both(on_virtual: Call, weights: Weights) -> Iterator[tuple[Engine, Call]]:
    """An engine on the CPU, and what replays a trace on the virtual GPU."""
    with cpu_engine(TINY, weights, LIMITS, KvMemory(64)) as engine:
        yield engine, lambda trace: on_virtual(in_virtual, weights, trace)
    on_virtual(ended)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_steps_that_run_ahead_give_the_tokens_of_the_cpu(both: tuple[Engine, Call], seed: int) -> None:
    """Under random arrivals, cancellations, stop tokens and pre-emptions; drawn, steered and greedy side by side."""
    engine, on_gpu = both
    whole = [c.tokens for c in engine.run(trace_of(seed).requests)]
    trace = trace_of(seed, whole)
    wanted = [c.tokens for c in engine.run(trace.requests)]
    got, reasons = on_gpu(trace)
    for i, (tokens, reason, alone) in enumerate(zip(got, reasons, wanted, strict=True)):
        if reason == "cancelled":
            assert i in trace.cancelled
            assert tokens == alone[: len(tokens)]
        else:
            assert tokens == alone
            assert reason == ("stop" if trace.requests[i].stop & {alone[-1]} else "length")


def test_pre_empted_sequences_go_on_while_steps_run_ahead(both: tuple[Engine, Call], on_virtual: Call) -> None:
    engine, on_gpu = both
    draw = np.random.default_rng(1)
    requests = [Request(draw.integers(0, TINY.vocab_size, 28).tolist(), 45) for _ in range(6)]
    got, _ = on_gpu(Trace(tuple(requests), (0,) * 6))
    assert got == [c.tokens for c in engine.run(requests)]
    preemptions, ahead = on_virtual(counted)
    assert preemptions > 0
    assert ahead > 100


def test_a_step_that_raises_takes_what_runs_ahead_with_it(on_virtual: Call, weights: Weights) -> None:
    on_virtual(raising, weights)


def raising(weights: Weights) -> None:
    """Another step is under way when one raises; after `abort` requests are served as before."""
    with gpu_engine(TINY, weights, LIMITS, KvMemory(32), device=DEVICE, planner="list") as engine:
        (wanted,) = engine.run([Request([1, 2, 3], 12)])
        number = engine.submit(Request([1, 2, 3], 12))
        for _ in range(4):
            engine.step()
        engine.submit(Request([4, 5], 4))
        waiting = engine.scheduler.waiting
        engine._admit()
        waiting[0].prompt[:] = 1000  # outside the vocabulary, behind the engine's back
        with pytest.raises(tg.ExecutionError, match="embedding"):
            engine.run()
        runner = engine.runner
        assert isinstance(runner, GpuRunner)
        assert {c.reason for c in engine.abort()} <= {"failed"}
        assert runner.pipeline.under_way == 0
        assert engine.cache.device.held == 0
        assert engine.run([Request([1, 2, 3], 12)])[0].tokens == wanted.tokens
        assert number == 1
        engine.submit(Request([1, 2, 3], 12))
        for _ in range(4):
            engine.step()  # closed with a step under way


# ---------------------------------------------------------------------------------------- warm engines


def test_a_warm_engine_plans_and_captures_nothing(on_virtual: Call, weights: Weights) -> None:
    for within_s in (math.inf, 0.0):
        held_bytes, asked_bytes, steps = on_virtual(warm_and_serve, weights, within_s)
        if within_s:
            assert held_bytes < asked_bytes / 10, "the executables share what they work in"
            assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
        else:
            assert [done for done, _ in steps] == [1]
            assert steps[0][1] > 10


def warm_and_serve(weights: Weights, within_s: float) -> tuple[int, int, list[tuple[int, int]]]:
    """With all buckets, and with the one that holds any batch."""
    control = virtual.loaded()
    assert control is not None
    driver.Gpu.open()
    before, plans, told = held(control), [], list[tuple[int, int]]()

    def planner(graph: tg.Graph, device: "str | tg.Device") -> tg.Plan:
        plans.append(graph.name)
        return tg.plan(graph, device, scheduler="list")

    memory, policy = SMALL
    limits = Limits(sequences=2, tokens=18, chunks=2, context=96)
    with gpu_engine(TINY, weights, limits, memory, device=DEVICE, planner=planner, policy=policy) as engine:
        runner = engine.runner
        assert isinstance(runner, GpuRunner)
        runner.warm(within_s, lambda done, most: told.append((done, most)))
        assert len(plans) == len(told) == runner.planned
        counted, seen = len(plans), calls()
        for seed in range(2):
            replayed(engine, trace_of(seed))
        engine.run([Request([i] * 40, 50) for i in range(3)])
        assert engine.scheduler.preemptions > 0
        made = calls() - seen
        assert len(plans) == counted == runner.planned
        assert not {name for name in made if "Capture" in name or "Instantiate" in name or "ExecUpdate" in name}
        shared = runner.pipeline.memory
        found = shared.memory_bytes, shared.asked_bytes
    assert {**held(control), "kernel": 0, "library": 0} == {**before, "kernel": 0, "library": 0}
    return *found, told


@given(st.lists(st.integers(), unique=True, min_size=1, max_size=40), st.integers(1, 40))
def test_coarse_first_is_an_order_whose_beginnings_are_spread(values: list[int], few: int) -> None:
    order = coarse_first(values)
    assert sorted(order) == sorted(values)
    assert order[0] == values[-1]
    places = sorted({values.index(v) for v in order[:few]} | {-1})
    gaps = np.diff(places)
    assert gaps.max() <= 2 * math.ceil(len(values) / max(len(places) - 1, 1)) + 1


@given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 20), st.booleans())
def test_buckets_hold_every_batch_whatever_is_captured(sequences: int, more: int, chunks: int, moves: bool) -> None:
    every = Buckets(Limits(sequences, sequences + more, chunks, 512), moves).every()
    assert len(set(every)) == len(every)
    assert holding(every[0], every[:1]) == every[0]
    for bucket in every[:: max(len(every) // 20, 1)]:
        assert holding(bucket, every) == bucket
        large = holding(bucket, every[:1])
        assert large is not None
        assert (large.decode, large.prefill, large.moves) >= (bucket.decode, bucket.prefill, bucket.moves)


# ------------------------------------------------------------------------------------------ pipelines


def test_a_pipeline_says_what_is_wrong(on_virtual: Call) -> None:
    on_virtual(pipelines)


def pipelines() -> None:
    b = tg.GraphBuilder("fed")
    tokens, sources, kept = b.input("t", (3,), "i64"), b.input("s", (3,), "i32"), b.state("k", (4,), "i64")
    fed = tg.ops.feed(tokens, sources, kept, vocabulary=50, name="feed")
    b.output(fed)
    graph = b.build()
    plan = tg.plan(graph, "h100_sxm", scheduler="list")
    with (
        tg.gpu.Pipeline(DEVICE) as line,
        tg.compile(graph, plan, "cuda", device=DEVICE) as exe,
        tg.compile(graph, plan, "cuda", device=DEVICE) as other,
    ):
        for made in (exe, other):
            line.add(made, "feed.out")
            made.bind(k=torch.tensor([7, 8, 9, 10]))
        with pytest.raises(tg.GraphError, match="share memory before"):
            line.add(exe, "feed.out")
        for at, (made, source) in enumerate(((exe, 0), (other, 1), (exe, 2))):
            if at == 2:
                with pytest.raises(tg.ExecutionError, match="2 replays are under way"):
                    line.inputs(made)
                assert line.wait().tolist() == [7, 5, 7]
            given_now = line.inputs(made)
            given_now["t"][:], given_now["s"][:] = 5, [source, -1, source]
            line.launch(made)
        assert [line.wait().tolist() for _ in range(2)] == [[8, 5, 8], [9, 5, 9]]
        with pytest.raises(tg.ExecutionError, match="no replay is under way"):
            line.wait()
        line.inputs(exe)["s"][:] = 4
        line.launch(exe)
        with pytest.raises(tg.ExecutionError, match=r"'feed' was given the index 4"):
            line.wait()
        assert line.under_way == 0
        with (
            tg.compile(graph, tg.plan(graph, "cpu", scheduler="list")) as elsewhere,
            pytest.raises(tg.GraphError, match="compile the plan for cuda"),
        ):
            line.add(elsewhere, "feed.out")
