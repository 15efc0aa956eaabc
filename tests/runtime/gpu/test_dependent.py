"""Kernels that are launched while the kernel before them runs: where, what waits, and that a wrong one is caught."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import CaptureMismatch
from taskgraph.graph.device import Geometry
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.runtime.gpu.ahead.cubins import waits_first
from taskgraph.runtime.gpu.captures import GraphFacts
from taskgraph.runtime.gpu.driver import Capability, Gpu, kernel_folder
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches
from taskgraph.runtime.gpu.readback import compare
from taskgraph.schedule.evaluate import Layout
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan_from
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve.lists import pack
from taskgraph.tune.fill import fill
from taskgraph.tune.gpucheck import checks
from tests.conftest import Call, virtual_process
from tests.runtime.gpu.test_readback import CONTEXTS, EDGES, NODES, OWNERS
from tests.schedule.test_verify import packed

DEVICE = "virtual:h100_sxm"


def chain() -> Graph:
    """Four kernels, a copy home, and a kernel behind it that does not need it."""
    b = GraphBuilder("chain")
    x = b.input("x", (16, 64), "f32")
    one = ops.add(x, x, name="one")
    two = ops.rmsnorm(one, b.weight("w", (64,), "f32"), name="two")
    home = ops.copy(two, direction="d2h", name="home")
    b.output(home, ops.add(ops.add(two, one, name="three"), x, name="four"))
    return b.build()


def run(
    graph: Graph, plan: Plan, dependent: bool = True, device: str = DEVICE
) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Edges that are dependent, edges, and outputs."""
    gpu = Gpu.open(device)
    gpu.dependent = dependent and gpu.capability.dependent
    try:
        with tg.compile(graph, plan, "cuda", device=device) as exe:
            assert isinstance(exe, CudaExecutable)
            got = exe(fill(graph.flat(), {}, seed=3))
            return exe.report.dependent, exe.report.edges, got
    finally:
        gpu.dependent = gpu.capability.dependent


def layouts() -> dict[str, tuple[int, int]]:
    """Dependent edges and edges of one graph on one lane, in two partitions and on lanes that share the device."""
    graph, device = checks.every_kind("f32"), tg.devices.get("h100_sxm")
    problem = make_problem(graph, device, [64, 132])
    plans = {"one lane": tg.plan(graph, "h100_sxm", "sequential")}
    for name, layout in (("apart", Layout.isolated(Geometry.of(64, 64))), ("shared", Layout.shared(132, 2))):
        made = pack(problem, layout)
        assert made is not None
        plans[name] = plan_from(problem, made)
    wanted = run(graph, plans["one lane"], dependent=False)
    assert wanted[0] == 0
    found = {}
    for name, plan in plans.items():
        early, edges, got = run(graph, plan)
        assert all(torch.equal(got[out], value) for out, value in wanted[2].items()), name
        found[name] = early, edges
    return found


def test_kernels_follow_each_other_on_a_lane_that_has_its_partition_alone(on_virtual: Call) -> None:
    found = on_virtual(layouts)
    early, edges = found["one lane"]
    assert early == edges - 1, "all but the copy home"
    assert 0 < found["apart"][0] < found["apart"][1], "joins of lanes wait for the end"
    assert found["shared"][0] == 0, "blocks that wait would hold room that the other lane could use"


def across_a_copy() -> int:
    graph = chain()
    return run(graph, tg.plan(graph, "h100_sxm", "sequential"))[0]


def test_what_follows_a_copy_waits_for_its_end(on_virtual: Call) -> None:
    assert 1 <= on_virtual(across_a_copy) <= 2, "one of four kernels is the first, and one or two are behind the copy"


def on_ampere() -> tuple[int, int]:
    graph = chain()
    early, edges, _ = run(graph, tg.plan(graph, "a100_sxm", "sequential"), device="virtual:a100_sxm")
    return early, edges


@pytest.mark.slow
def test_older_devices_have_none() -> None:
    with virtual_process("virtual:a100_sxm") as call:
        assert call(on_ampere)[0] == 0


def test_devices_that_can() -> None:
    can = [c for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)) if Capability(compute_capability=c).dependent]
    assert can == [(9, 0), (10, 0), (10, 3)]


# ------------------------------------------------------------------------------------------ wrong kernels

BODIES = {
    "waits": "follow(); out[threadIdx.x] = x[threadIdx.x];",
    "waits_late": "float early = x[threadIdx.x]; follow(); out[threadIdx.x] = early;",
    "waits_never": "out[threadIdx.x] = x[threadIdx.x];",
    "waits_partly": "if (threadIdx.x == 3) out[3] = x[3]; else { follow(); out[threadIdx.x] = x[threadIdx.x]; }",
    "does_nothing": "",
}
KERNEL = 'extern "C" __global__ void {name}(const float* x, float* out) {{ {body} }}\nEXPORT({name})\n'


def run_kernel(name: str, path: Path, dependent: bool) -> int:
    """A kernel between two others: how many edges are dependent, after a replay."""

    def launches(op: tg.Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
        return [tg.gpu.Launch(name, (1,), 8, (ins[0].address, outs[0].address))]

    kind = f"op_{name}_{dependent}"
    ops.register(ops.Kind(kind, ops.Signature("1"), lambda ins, attrs: (ins[0].shape, "f32"), _work))
    tg.gpu.register(kind, launches, path, dependent=dependent)
    b = GraphBuilder(kind)
    x = b.input("x", (8,), "f32")
    y = ops.apply(kind, [ops.add(x, x)], name="mine")
    b.output(ops.add(y, y))
    graph = b.build()
    try:
        early, _, got = run(graph, tg.plan(graph, "h100_sxm", "sequential"))
        assert all(torch.equal(out, 4 * fill(graph, {}, seed=3)["x"]) for out in got.values())
        return early
    finally:
        Gpu.reset()


def _work(ins: ops.Shapes, outs: ops.Shapes, attrs: ops.Attrs) -> tg.Work:
    return tg.Work(hbm_bytes=ops.moved([*ins, *outs]))


@pytest.mark.slow
def test_a_kernel_that_does_not_wait_first_is_caught(tmp_path: Path) -> None:
    """The virtual driver runs what comes before the wait while no memory may be touched."""
    path = tmp_path / "kernels.cu"
    path.write_text('#include "common.cuh"\n' + "".join(KERNEL.format(name=n, body=b) for n, b in BODIES.items()))
    with virtual_process() as call:
        assert call(run_kernel, "waits", path, True) == 2
        assert call(run_kernel, "waits_never", path, False) == 1, "launched after the end of the one before"
        for name in ("waits_late", "waits_never", "waits_partly"):
            with pytest.raises(tg.CudaError, match="LAUNCH_FAILED") as caught:
                call(run_kernel, name, path, True)
            assert f"{name}, launched dependent, touches byte" in str(caught.value)
        with pytest.raises(tg.CudaError, match="never waits"):
            call(run_kernel, "does_nothing", path, True)


def test_a_dependent_edge_that_nobody_waits_for_is_a_mismatch() -> None:
    facts = GraphFacts(NODES, EDGES, frozenset({(10, 11), (13, 14)}))
    compare(packed(), facts, OWNERS, CONTEXTS, {11, 14})
    for early, says in (({14}, "'left' may start before 'a'"), ({11}, "'last' may start before 'join'")):
        with pytest.raises(CaptureMismatch, match=says) as caught:
            compare(packed(), facts, OWNERS, CONTEXTS, early)
        assert caught.value.what == "order"


# ------------------------------------------------------------------------------------------ compiled code

HEAD = ".visible .entry k(\n.param .u64 .ptr .global .align 1 k_param_0\n)\n{\n.reg .b32 %r<5>;\n$L__func_begin0:\n"
WAIT = "\tgriddepcontrol.wait ;\n"
LOAD = "\t@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];\n"


@pytest.mark.parametrize(
    ("before", "waits"),
    [
        ("", True),
        ("\tld.param.b64 %rd1, [k_param_0];\n\tmov.u32 %r1, %ctaid.x;\n\tst.shared.b32 [%r2], %r1;\n", True),
        (LOAD, False),
        ("\tst.global.b32 [ %rd1 + 0 ], { %r1 };\n", False),
        ("\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;\n", False),
        ("\t@%p1 bra $L__BB0_2;\n", False),
        ("\tatom.global.add.u32 %r1, [%rd1], 1;\n", False),
        ("\tld.b32 %r1, [%rd1];\n", False),
        ("\t@!%p1 ret;\n", False),
    ],
)
def test_code_that_touches_memory_before_it_waits_is_not_dependent(before: str, waits: bool) -> None:
    assert waits_first(HEAD + before + WAIT + LOAD + "}\n") is waits
    assert not waits_first(HEAD + before + LOAD + "}\n"), "it does not wait at all"


def ptx_of(names: Sequence[str], arch: str) -> dict[str, str]:
    from cuda.core import Program, ProgramOptions

    found = {}
    for path in (kernel_folder() / name for name in names):
        options = ProgramOptions(arch=arch, std="c++17", include_path=[str(path.parent)], name=path.name)
        text = bytes(Program(path.read_text(), "c++", options).compile("ptx").code).decode()
        for part in text.split(".visible .entry ")[1:]:
            found[part.partition("(")[0]] = ".entry " + part
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_code_of_kernels_waits_first_where_it_can(on_virtual: Call, arch: str) -> None:
    found = on_virtual(ptx_of, ["pages.cu", "elementwise.cu"], arch)
    assert len(found) > 15
    assert {waits_first(ptx) for ptx in found.values()} == {arch == "sm_90"}
    assert {"griddepcontrol.launch_dependents" in ptx for ptx in found.values()} == {arch == "sm_90"}


def test_every_kernel_of_the_package_begins_with_the_wait() -> None:
    """Those that are launched by other tests are caught by the virtual driver too."""
    count = 0
    for path in kernel_folder().glob("*.cu"):
        text = path.read_text().replace("\\\n", "\n")
        bodies = re.findall(r"__global__ [^{;]*\{\s*(\w+)\(", text)
        assert set(bodies) <= {"follow", "each_block"}, path.name
        assert len(bodies) == text.count("__global__")
        count += len(bodies)
    assert count >= 43
