"""Draws on a GPU: token by token those of the cpu backend, which are those of the definition."""

import re
import subprocess
import tempfile

import numpy as np
import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.runtime.gpu import driver
from tests.cases_sampling import drawn
from tests.conftest import Call

Tensors = dict[str, torch.Tensor]
DEVICE = "virtual:h100_sxm"


def draws(rows: int, columns: int, dtype: str) -> Graph:
    b = GraphBuilder("draws")
    x = b.input("x", (rows, columns), dtype)
    how = [b.input(n, (rows,), t) for n, t in (("heat", "f32"), ("top_k", "i32"), ("top_p", "f64"), ("uniform", "f64"))]
    kept = b.state("kept", (rows + 3,), "i64")
    b.output(ops.draw(x, ops.argmax(x), *how, kept, name="drawn"))
    return b.build()


def values(rows: int, columns: int, dtype: str, seed: int) -> Tensors:
    """Some rows with many equal entries, some with a NaN, infinities or entries without a chance."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, columns)) * draw.choice([0.1, 1.0, 6.0], (rows, 1))
    x = np.where(draw.random((rows, 1)) < 0.4, np.round(x), x)
    x[draw.random(x.shape) < 0.05] = -np.inf
    x[draw.integers(0, rows), draw.integers(0, columns)] = np.nan
    x[draw.integers(0, rows), draw.integers(0, columns)] = np.inf
    x[draw.integers(0, rows)] = -np.inf
    return {
        "x": torch.from_numpy(x).to({"f32": torch.float32, "bf16": torch.bfloat16}[dtype]),
        "heat": torch.from_numpy(draw.choice([0.0, 1e-6, 0.3, 1.0, 2.5, 90.0], rows)).float(),
        "top_k": torch.from_numpy(draw.choice([0, 1, 2, 7, 300, 10**6], rows)).int(),
        "top_p": torch.from_numpy(draw.choice([1e-9, 0.2, 0.9, 0.9999, 1.0], rows)),
        "uniform": torch.from_numpy(draw.choice([0.0, 0.5, 0.999999, np.nextafter(1, 0)], rows) * draw.random(rows)),
        "kept": torch.zeros(rows + 3, dtype=torch.int64),
    }


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("columns", [1, 31, 160, 2100, 5000])
def test_draws_on_a_gpu_are_those_of_the_cpu(on_virtual: Call, dtype: str, columns: int) -> None:
    graph, rows = draws(24, columns, dtype), 24
    given = values(rows, columns, dtype, columns)
    with tg.compile(graph, tg.plan(graph, "cpu", scheduler="list")) as exe:
        wanted = exe({**given, "kept": given["kept"].clone()})["drawn.out"]
    got, kept = on_virtual(on_gpu, graph, given)
    assert got.tolist() == wanted.tolist()
    assert kept.tolist() == [*wanted.tolist(), 0, 0, 0]
    if columns <= 160:
        each = [given[name].tolist() for name in ("x", "heat", "top_k", "top_p", "uniform")]
        assert got.tolist() == [drawn(*row) for row in zip(*each, strict=True)]


def on_gpu(graph: Graph, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    with tg.compile(graph, tg.plan(graph, DEVICE.partition(":")[2], scheduler="list"), "cuda", device=DEVICE) as exe:
        made = exe(given)["drawn.out"]
        return made, exe.state("kept").cpu()  # type: ignore[attr-defined]


def test_a_likeliest_token_that_does_not_exist_is_named(on_virtual: Call) -> None:
    on_virtual(wrong_places)


def wrong_places() -> None:
    b = GraphBuilder("feeds")
    tokens, sources, kept = b.input("t", (2,), "i64"), b.input("s", (2,), "i32"), b.state("k", (3,), "i64")
    b.output(ops.feed(tokens, sources, kept, vocabulary=10, name="fed"))
    graph = b.build()
    with tg.compile(graph, tg.plan(graph, "h100_sxm", scheduler="list"), "cuda", device=DEVICE) as exe:
        kept_now = torch.tensor([7, -1, 99])
        two = [torch.tensor([5, 6]), torch.tensor([1, 2], dtype=torch.int32)]
        assert exe(t=two[0], s=two[1], k=kept_now)["fed.out"].tolist() == [0, 9]
        with pytest.raises(tg.ExecutionError, match=r"'fed' was given the index 3"):
            exe(t=two[0], s=torch.tensor([-1, 3], dtype=torch.int32), k=kept_now)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_block_of_drawers_fits_the_registers_of_an_sm(arch: str) -> None:
    """512 threads of the 65,536 registers (CUDA Programming Guide, compute capabilities), none of them spilled; a
    division may be a call, with a few bytes of stack."""
    knobs = pytest.importorskip("triton").knobs  # which brings cuobjdump
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(driver.compiled(driver.kernel_folder() / "sampling.cu", arch))
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function draw_\w+:\s+REG:(\d+) STACK:(\d+)", text)
    assert len(found) == 2
    for registers, stack in found:
        assert 512 * int(registers) <= 65536
        assert int(stack) <= 16
