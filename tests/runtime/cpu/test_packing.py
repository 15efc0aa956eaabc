"""Executables bound to the same weights share what is packed of them, and say how much memory is their own."""

import pytest
import torch

import taskgraph as tg
from taskgraph.graph import device as specs
from taskgraph.runtime.cpu import products
from taskgraph.runtime.cpu.executable import CpuExecutable

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)


def multiply(rows: int) -> CpuExecutable:
    b = tg.GraphBuilder(f"product-{rows}")
    b.output(tg.ops.gemm(b.input("x", (rows, 64), "bf16"), b.weight("w", (96, 64), "bf16"), transpose_w=True, name="y"))
    graph = b.build()
    made = tg.compile(graph, tg.plan(graph, CPU))
    assert isinstance(made, CpuExecutable)
    return made


def packings(w: torch.Tensor) -> int:
    """Of this weight alone: what other tests left behind goes whenever it is collected."""
    return sum(packed.weight.data_ptr() == w.data_ptr() for packed in list(products._PACKED.values()))


@pytest.mark.parametrize("sizes", [(1, 8), (96, 200)], ids=["few rows", "many rows"])
def test_executables_share_a_packed_weight_until_it_changes(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(96, 64).bfloat16()
    with multiply(sizes[0]) as one, multiply(sizes[1]) as two:
        for exe in (one, two):
            x = torch.randn(exe.inputs["x"].shape).bfloat16()
            torch.testing.assert_close(exe(x=x, w=w)["y.out"].float(), x.float() @ w.float().t(), rtol=2e-2, atol=0.1)
        assert packings(w) == 1
        w.mul_(-2.0)
        with multiply(sizes[0]) as three:
            x = torch.randn(sizes[0], 64).bfloat16()
            torch.testing.assert_close(three(x=x, w=w)["y.out"].float(), x.float() @ w.float().t(), rtol=2e-2, atol=0.2)
    assert packings(w) == 0


def test_memory_bytes_are_those_of_arena_inputs_and_outputs() -> None:
    with multiply(8) as exe:
        assert exe.memory_bytes == 2 * 8 * (64 + 96)
        exe.bind(x=torch.zeros(8, 64, dtype=torch.bfloat16))
        assert exe.memory_bytes == 2 * 8 * 96
