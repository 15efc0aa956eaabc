"""A product in a partition runs by our own kernel where its cost says so and the kernel can be had."""

import pytest

import taskgraph as tg
from taskgraph.graph.graph import Graph
from taskgraph.runtime.gpu import executable, torch_ops
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.runtime.gpu.kinds import Buffer
from taskgraph.tune.measure import on_partition

SOURCE = 1 << 20


def product() -> Graph:
    b = tg.GraphBuilder("product")
    b.output(tg.ops.gemm(b.input("x", (64, 64), "bf16"), b.weight("w", (64, 64), "bf16"), transpose_w=True, name="up"))
    return b.build()


@pytest.mark.parametrize("sms", [64, 132])
@pytest.mark.parametrize(("pays", "there"), [(True, True), (True, False), (False, True)])
def test_who_runs_a_product(monkeypatch: pytest.MonkeyPatch, sms: int, pays: bool, there: bool) -> None:
    """As a real GPU with torch's CUDA would choose: the choice is asked for, nothing is launched."""
    graph = product()
    plan = on_partition(tg.plan(graph, "h100_sxm", "sequential"), graph, sms)
    asked: list[int] = []

    def costs(op: tg.Op, tensors: object, device: tg.Device, size: int) -> bool:
        asked.append(size)
        return pays and size < device.sm_count

    monkeypatch.setattr(executable, "own_product_pays", costs)
    monkeypatch.setattr(executable, "runs_ahead", lambda *_: there)
    with tg.compile(graph, plan, "cuda", device="virtual:h100_sxm") as exe:
        assert isinstance(exe, CudaExecutable)
        (op,) = graph.ops
        sides = [[Buffer(SOURCE, graph.tensor[n].shape, "bf16") for n in names] for names in (op.inputs, op.outputs)]
        assert not exe._own_product(0, op, *sides), "a virtual device runs no cubins"
        monkeypatch.setattr(type(exe._gpu), "ahead", lambda self, kind: "sm_90")
        assert exe._own_product(0, op, *sides) is (pays and there and sms < 132)
        assert asked == [sms, sms] and op.kind in torch_ops.TORCH_OPS
