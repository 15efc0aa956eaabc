"""The serving engine on the virtual GPU: what the CPU serves, token by token, and nothing left behind."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from taskgraph.models.config import load_config
from taskgraph.models.llama import step_graph
from taskgraph.runtime.gpu import driver, virtual
from taskgraph.runtime.gpu.arrays import DeviceTensors
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.runners.gpu import gpu_engine
from taskgraph.serving.scheduler import Limits
from tests.conftest import Call
from tests.runtime.gpu.test_cuda import DEVICE, held, model_tensors

TINY = replace(
    load_config("smollm2-135m"), hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=96,
    vocab_size=160,
)  # fmt: skip
LIMITS = Limits(sequences=4, tokens=24, chunks=4, context=96)


def requests() -> list[Request]:
    """Some longer than a page and some drawn, two of them with the same first page."""
    draw = np.random.default_rng(5)
    prompts = [draw.integers(0, TINY.vocab_size, int(n)).tolist() for n in (3, 38, 11, 30, 20)]
    prompts.append([*prompts[1][:33], 7])
    drawn = Sampling(temperature=0.8, top_k=20, seed=3)
    return [Request(p, 20, sampling=drawn if i == 2 else Sampling()) for i, p in enumerate(prompts)]


def test_the_engine_serves_on_the_gpu_what_it_serves_on_the_cpu(on_virtual: Call, tmp_path: Path) -> None:
    weights = model_tensors(step_graph(TINY, batch=1, tokens=1, cache=64, dtype="f32"), 1, roles=("weight",))
    with cpu_engine(TINY, weights, LIMITS, KvMemory(32)) as engine:
        wanted = [c.tokens for c in engine.run(requests())]
    assert on_virtual(served, weights, tmp_path) == wanted


def served(weights: dict[str, torch.Tensor], folder: Path) -> list[tuple[int, ...]]:
    """With so few pages that sequences go to the host, and finished prompts to the disk, and come back."""
    control = virtual.loaded()
    assert control is not None
    driver.Gpu.open()
    before = held(control)
    memory, policy = KvMemory(5, 3, folder, 16), Policy(expected_output=1.0)
    with gpu_engine(TINY, weights, LIMITS, memory, device=DEVICE, planner="list", policy=policy) as engine:
        done = engine.run(requests())
        planned = engine.runner.planned
        again = engine.run(requests())
        assert engine.scheduler.preemptions > 0
        assert engine.runner.planned <= planned + 4
        assert engine.cache.device.held == engine.cache.host.held == 0
        assert [c.tokens for c in again] == [c.tokens for c in done]
        assert engine.stats.hidden_s > 0.5 * engine.stats.host_s
    kept = {**held(control), "kernel": 0, "library": 0}
    assert kept == {**before, "kernel": 0, "library": 0}
    return [c.tokens for c in done]


def test_rows_and_entries_of_a_device_array(on_virtual: Call) -> None:
    on_virtual(rows_and_entries)


def rows_and_entries() -> None:
    """Rows one after another, apart, twice and backwards, and none; entries anywhere."""
    made = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    with DeviceTensors({"x": made}, DEVICE) as held_there:
        array = held_there["x"]
        for rows in ([0, 1, 2, 5, 6, 8], [3, 3, 2, 1], [8], [], [0, 8, 0, 1]):
            assert torch.equal(array.rows(np.array(rows, np.int64)), made[rows])
        rows, columns = np.array([8, 0, 3, 3]), np.array([4, 0, 1, 2])
        assert torch.equal(array.entries(rows, columns), made[rows, columns])
