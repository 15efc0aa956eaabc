"""A kind of op in one file outside the package, that of docs/extend.md, with a kernel of its own, on both backends."""

import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from tests.conftest import Call, virtual_process
from tests.test_docs import ROOT, fenced, run_page

PAGE = ROOT / "docs" / "extend.md"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process on the virtual H100 that has the kind of the page: registered there, and nowhere else."""
    folder = tmp_path_factory.mktemp("outside")
    with virtual_process() as call:
        call(enter, folder)
        yield call


def enter(folder: Path) -> None:
    """Go where the page's files are: its kernel, and everything before "Used as any other op" as a module."""
    os.chdir(folder)
    page = PAGE.read_text()
    Path("softcap.cu").write_text(fenced(page, "cuda"))
    Path("softcap_kind.py").write_text(fenced(page.partition("## Used as any other op")[0], "python"))
    assert run_page(PAGE) > 0


def graph(rows: int, columns: int, dtype: str, cap: float) -> tg.Graph:
    """Two products, each capped, and their sum."""
    b = tg.GraphBuilder("capped")
    x, w = b.input("x", (rows, columns), dtype), b.weight("w", (columns, 24), dtype)
    caps = [ops.apply("softcap", [ops.gemm(x, w, name=f"mm{i}")], {"cap": cap + i}, name=f"cap{i}") for i in range(2)]
    b.output(ops.add(*caps, name="sum"))
    return b.build()


@pytest.mark.parametrize(("rows", "columns", "dtype", "cap"), [(37, 16, "f32", 2.5), (64, 40, "bf16", 30.0)])
def test_a_kind_from_outside_is_planned_sliced_and_run_on_both_backends(
    outside: Call, rows: int, columns: int, dtype: str, cap: float
) -> None:
    outside(check_kind, rows, columns, dtype, cap)


def check_kind(rows: int, columns: int, dtype: str, cap: float) -> None:
    made = graph(rows, columns, dtype, cap)
    op = next(op for op in made.ops if op.kind == "softcap")
    itemsize = 4 if dtype == "f32" else 2
    assert op.work == tg.Work(flops=3.0 * rows * 24, hbm_bytes=2.0 * itemsize * rows * 24)
    assert tg.Graph.from_json(made.to_json()) == made
    torch.manual_seed(rows)
    kind = torch.float32 if dtype == "f32" else torch.bfloat16
    values = {"x": torch.randn(rows, columns).to(kind), "w": torch.randn(columns, 24).to(kind)}
    product = values["x"].float() @ values["w"].float()
    wanted = sum((cap + i) * torch.tanh(product / (cap + i)) for i in range(2))
    near = {"rtol": 1e-3, "atol": 1e-3} if dtype == "f32" else {"rtol": 5e-2, "atol": 0.2}
    sliced = tg.rewrite.split_batch(made, (rows // 3, rows - rows // 3))
    assert sum(op.kind == "softcap" for op in sliced.ops) == 4
    for one in (made, sliced):
        for device, backend in (("cpu", "cpu"), ("virtual:h100_sxm", "cuda")):
            plan = tg.plan(one, device.removeprefix("virtual:"), "list")
            tg.verify(plan, one)
            with tg.compile(one, plan, backend, device=device if backend == "cuda" else None) as exe:
                (got,) = exe(values).values()
                exe.check()
            torch.testing.assert_close(got.float(), wanted, **near)


def test_the_file_alone_registers_the_kind(outside: Call) -> None:
    """What a package would ship: importing it is enough, and importing it under another name is refused."""
    outside(check_module)


def check_module() -> None:
    with pytest.raises(tg.GraphError, match="'softcap' is registered already"):
        runpy.run_path("softcap_kind.py")
    assert "softcap" in ops.KINDS and "softcap" in tg.cpu.CPU_KINDS and "softcap" in tg.gpu.GPU_KINDS


def test_contributing_adds_a_kind(outside: Call) -> None:
    outside(check_contributing)


def check_contributing() -> None:
    """The code of its section, as one module, and what step by step says where the parts stand."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.partition("## How to add an op kind")[2].partition("\n## ")[0]
    for path in re.findall(r"`((?:taskgraph|cuda|tests)/[\w/.]+)`", section):
        assert (ROOT / path).exists(), path
    names: dict[str, Any] = {}
    exec(compile(fenced(section, "python"), "CONTRIBUTING.md", "exec"), names)
    b = tg.GraphBuilder("primer")
    x = b.input("x", (12, 8), "f32")
    b.output(names["relu2"](ops.add(x, x, name="twice"), name="made"))
    made = b.build()
    assert made.ops[-1].work == tg.Work(flops=192.0, hbm_bytes=8.0 * 96)
    given = torch.randn(12, 8)
    for one in (made, tg.rewrite.split_batch(made, (5, 7))):
        plan = tg.plan(one, "cpu", "list")
        tg.verify(plan, one)
        with tg.compile(one, plan) as exe:
            (got,) = exe(x=given).values()
        torch.testing.assert_close(got, (2 * given).relu().square())


BROKEN = '#include "common.cuh"\nextern "C" __global__ void {name}(float* x) {{ {body} }}\n{export}\n'


@pytest.mark.parametrize(
    ("name", "body", "export", "said"),
    [
        ("add_f32", "x[0] = 1;", "EXPORT(add_f32)", "another file has a kernel add_f32"),
        ("broken", "x[0] = nothing;", "EXPORT(broken)", "broken.cu"),
        ("quiet", "x[0] = 1;", "", "EXPORT"),
    ],
)
def test_kernels_that_cannot_be_used_are_refused(outside: Call, name: str, body: str, export: str, said: str) -> None:
    outside(check_refused, name, BROKEN.format(name=name, body=body, export=export), said)


def check_refused(name: str, source: str, said: str) -> None:
    kind, path = f"op_{name}", Path(f"{name}.cu")
    path.write_text(source)
    ops.register(ops.Kind(kind, ops.Signature("1"), lambda ins, attrs: (ins[0].shape, "f32"), work))
    tg.gpu.register(kind, lambda op, ins, outs, site: [tg.gpu.Launch(name, (1,), 1, (outs[0].address,))], path)
    b = tg.GraphBuilder(kind)
    b.output(ops.apply(kind, [b.input("x", (4,), "f32")]))
    made = b.build()
    plan = tg.plan(made, "h100_sxm", "sequential")
    with (
        tg.compile(made, plan, "cuda", device="virtual:h100_sxm") as exe,
        pytest.raises((tg.BackendUnavailable, tg.CudaError), match=said) as raised,
    ):
        exe(x=torch.randn(4))
    assert "\n" not in str(raised.value)


def work(ins: ops.Shapes, outs: ops.Shapes, attrs: ops.Attrs) -> tg.Work:
    return tg.Work(hbm_bytes=ops.moved([*ins, *outs]))


def test_what_is_no_kind_is_refused() -> None:
    add = ops.KINDS["add"]
    assert ops.register(add) is add
    with pytest.raises(tg.GraphError, match="'call' is registered already"):
        ops.register(ops.Kind("call", add.takes, add.shape, add.work))
    with pytest.raises(tg.GraphError, match="unknown op kind 'nothing'"):
        tg.gpu.register("nothing", tg.gpu.GPU_KINDS["add"].launches, tg.gpu.GPU_KINDS["add"].source)
    with pytest.raises(tg.GraphError, match="'add' has code for the cpu backend already"):
        tg.cpu.register("add", tg.cpu.CPU_KINDS["argmax"].bind)
    with pytest.raises(tg.GraphError, match="'add' has kernels for the cuda backend already"):
        tg.gpu.register("add", tg.gpu.GPU_KINDS["argmax"].launches, tg.gpu.GPU_KINDS["add"].source)
    two = ops.Kind("two", ops.Signature("11"), add.shape, add.work, split=(0,))
    b = tg.GraphBuilder("g")
    x = b.input("x", (4,), "f32").tensor
    with pytest.raises(tg.GraphError, match="split of two says 1 axes; the op has 2 inputs"):
        two.axes([x, x], ops.Attrs())
