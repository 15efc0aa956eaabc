"""The graph bank: executables by key within a budget, on the cpu backend and on the virtual GPU."""

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

import taskgraph as tg
from taskgraph.runtime.bank import GraphBank
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.arrays import DeviceTensors
from taskgraph.runtime.gpu.executable import CudaExecutable
from tests.conftest import Call

FEATURES = 16
WEIGHT = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(3))


def graph(batch: int) -> tg.Graph:
    b = tg.GraphBuilder(f"batch-{batch}")
    x, w = b.input("x", (batch, FEATURES), "f32"), b.weight("w", (FEATURES, FEATURES), "f32")
    b.output(tg.ops.add(tg.ops.gemm(x, w, name="product"), x, name="sum"))
    return b.build()


def on_cpu(batch: int) -> Any:
    exe = tg.compile(graph(batch), tg.plan(graph(batch), "cpu"), "cpu")
    exe.bind(w=WEIGHT)
    return exe


def check(bank: GraphBank[int], batch: int) -> None:
    x = torch.randn(batch, FEATURES)
    torch.testing.assert_close(bank[batch](x=x)["sum.out"], x @ WEIGHT + x, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=20), st.integers(1, 5))
def test_the_least_recently_used_go_first(keys: list[int], room: int) -> None:
    """Against a list that holds the keys in order of their last use."""
    kept: list[int] = []
    made = 0
    with GraphBank(Fake, 100 * room) as bank:
        for key in keys:
            made += key not in kept
            kept = [*(k for k in kept if k != key), key][-room:]
            assert bank[key].key == key  # type: ignore[attr-defined]
            assert [k for k in range(1, 9) if k in bank] == sorted(kept)
            assert (bank.made, len(bank), bank.memory_bytes) == (made, len(kept), 100 * len(kept))
        open_ones = [bank[k] for k in kept]
    assert all(exe.closed for exe in open_ones) and len(bank) == 0  # type: ignore[attr-defined]


class Fake:
    """An executable of 100 bytes."""

    def __init__(self, key: int) -> None:
        self.key, self.closed, self.memory_bytes = key, False, 100

    def close(self) -> None:
        self.closed = True


def test_batches_on_the_cpu() -> None:
    with GraphBank(on_cpu) as bank:
        for batch in (1, 4, 1, 8, 4):
            check(bank, batch)
        assert bank.made == 3
        sizes = [bank[batch].memory_bytes for batch in (1, 4, 8)]
        assert all(a < b for a, b in pairwise(sizes))


def test_batches_share_weights_on_the_virtual_gpu(on_virtual: Call) -> None:
    on_virtual(batches_on_virtual)


def batches_on_virtual() -> None:
    with DeviceTensors({"w": WEIGHT}, "virtual:h100_sxm") as weights:

        def make(batch: int) -> Any:
            plan = tg.plan(graph(batch), "h100_sxm", "sequential")
            exe = tg.compile(graph(batch), plan, "cuda", device="virtual:h100_sxm")
            exe.bind(weights)
            return exe

        assert weights.memory_bytes == WEIGHT.nbytes
        with GraphBank(make, 10_000) as bank:
            for batch in (1, 4, 1, 64, 4, 1):
                check(bank, batch)
            assert bank.evicted >= 2 and bank.memory_bytes <= 10_000
            tensors, reports = 3 * 4 * FEATURES * 4, 2 * 8
            assert bank[4].memory_bytes == tensors + reports, "input, output, arena, a word an op; not the weight"


def test_a_bind_to_other_memory_updates_the_graph_in_place(on_virtual: Call) -> None:
    on_virtual(update_in_place)


def update_in_place() -> None:
    exe = tg.compile(graph(4), tg.plan(graph(4), "h100_sxm", "sequential"), "cuda", device="virtual:h100_sxm")
    assert isinstance(exe, CudaExecutable)
    other, x = torch.randn(FEATURES, FEATURES), torch.randn(4, FEATURES)
    with exe, DeviceTensors({"w": WEIGHT}) as first, DeviceTensors({"w": other}) as second:
        torch.testing.assert_close(exe(first, x=x)["sum.out"], x @ WEIGHT + x, rtol=1e-4, atol=1e-4)
        assert not exe.report.updated
        held = exe.memory_bytes
        torch.testing.assert_close(exe(second, x=x)["sum.out"], x @ other + x, rtol=1e-4, atol=1e-4)
        assert exe.report.updated, "pointers changed, the graph did not"
        assert exe.memory_bytes == held
        exe.bind(w=2 * other)  # a host tensor goes into memory of the executable's own, not into what it used
        torch.testing.assert_close(exe(x=x)["sum.out"], 2 * x @ other + x, rtol=1e-4, atol=1e-4)
        assert torch.equal(second["w"].cpu(), other) and exe.memory_bytes == held + other.nbytes
    driver.Gpu.open().sync()
