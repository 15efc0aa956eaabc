"""The cuda backend on the virtual driver: random plans, the rules of CUDA, and the layers of a model.

What runs on the virtual GPU runs in a process of its own (`on_virtual`), for a process has one CUDA driver.
"""

import gc
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import taskgraph as tg
from benchmarks import capture, capture_rules
from taskgraph.errors import BackendUnavailable, CaptureMismatch, ExecutionError, GraphError, PlanError
from taskgraph.graph.op import Rows
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, Yarn, load_config
from taskgraph.models.llama import step_graph
from taskgraph.models.paged import Bucket, PageShape
from taskgraph.models.paged import step_graph as step_over_pages
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.gpu import driver, torch_ops, virtual
from taskgraph.runtime.gpu.arrays import DeviceArray, DeviceTensors
from taskgraph.runtime.gpu.captures import GraphFacts, NodeFacts
from taskgraph.runtime.gpu.collectives import collective
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.runtime.gpu.kinds import Buffer, Launch
from taskgraph.runtime.gpu.readback import compare
from taskgraph.runtime.gpu.standard import GPU_KINDS, launches
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import replay_times
from taskgraph.serving.session import Session, step_seconds
from taskgraph.tune.fill import fill
from taskgraph.tune.gpucheck import checks
from tests.conftest import Call, virtual_process
from tests.ops.test_experts import LATENT_TINY
from tests.paged_cases import keys_of, values_of
from tests.runtime.test_runtime import CASES, STATES, TOLERANCE, random_tensors, widened

DEVICE = capture.DEVICE
KERNELS = sorted(driver.kernel_folder().glob("*.cu"))
SMALL = replace(load_config("smollm2-135m"), layers=1, vocab_size=512)
"""A layer of SmolLM2 as it is, with a smaller vocabulary."""


# ------------------------------------------------------------------------------------------ random plans


@pytest.mark.parametrize("block", range(4))
def test_random_plans_are_captured_equal(on_virtual: Call, block: int) -> None:
    """Every node in its partition, the plan's order, outputs and states of the cpu backend, the evaluator's times."""
    results = on_virtual(check_plans, range(1000 + 5 * block, 1005 + 5 * block))
    assert [r.wrong for r in results] == [""] * 5
    assert max(r.time_error for r in results) < 0.01


def test_the_graph_of_a_plan_is_what_was_captured(on_virtual: Call) -> None:
    nodes, captured, again = on_virtual(handles)
    assert nodes == captured > 0
    assert again, "the same until a buffer moves"


def handles() -> tuple[int, int, bool]:
    """The virtual driver has no child graphs: only that the graph is there and whole."""
    from cuda.bindings import driver as cu

    b = tg.GraphBuilder("two")
    x = b.input("x", (4, 64), "f32")
    b.output(tg.ops.add(tg.ops.add(x, x), x))
    graph = b.build()
    with tg.compile(graph, tg.plan(graph, "h100_sxm"), "cuda", device="virtual:h100_sxm") as exe:
        assert isinstance(exe, CudaExecutable)
        handle = exe.graph_handle()
        _, _, count = cu.cuGraphGetNodes(cu.CUgraph(handle))
        assert exe.report is not None
        return int(count), exe.report.nodes, exe.graph_handle() == handle


def check_plans(seeds: range) -> list[capture.PlanResult]:
    return [capture.check_plan(seed) for seed in seeds]


def test_random_cases_reach_every_kind_views_and_geometries() -> None:
    graphs = [capture.random_graph(np.random.default_rng(seed)) for seed in range(1000, 1020)]
    kinds = {op.kind for graph in graphs for op in graph.ops}
    assert {"gemm", "rope_kv", "attention", "decode_attention", "concat_rows", "copy", "all_gather"} <= kinds
    views = [(op.kind, v.axis) for graph in graphs for op in graph.ops for v in op.views.values()]
    assert ("decode_attention", 1) in views and ("gemm", 0) in views
    plans = [
        capture.random_plan(np.random.default_rng(i), graph, virtual.spec_of(DEVICE)) for i, graph in enumerate(graphs)
    ]
    assert {len(p.geometries) for p in plans} == {1, 2}
    assert any(step.sms for p in plans for step in p.steps) and any(p.made_by.startswith("search") for p in plans)


def test_every_standard_kind_has_launches() -> None:
    torchs = {kind for kind in tg.ops.KINDS if kind.partition(".")[0] == "aten"}  # of imported modules: on the CPU
    assert set(tg.ops.KINDS) - torchs == set(GPU_KINDS)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("copy_pages", "experts")])
def test_outputs_and_states_equal_torch_eager(on_virtual: Call, case: str, dtype: str) -> None:
    """The cases of the cpu backend. Pages lie in plain order on a GPU, and copies of them are compared in the serving
    steps; rows that go to more than top_k experts, as in the case of experts, have no room there."""
    make, reference = CASES[case]
    b = tg.GraphBuilder(case)
    b.output(make(b, dtype))
    graph = b.build()
    given = random_tensors(graph)
    expected = widened(given)
    wanted = reference(expected)
    for name, read in (("pages_k", keys_of), ("pages_v", values_of)):
        if name in given:
            given[name] = read(given[name]).contiguous()
    states = tuple(name for name in STATES if name in given and graph.tensor[name].role == "state")
    got = on_virtual(run_plan, graph, tg.plan(graph, "h100_sxm", "sequential"), given, states)
    near = {"rtol": 2 * TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype]}
    torch.testing.assert_close(got[graph.outputs[0]].float(), wanted.float(), **near)
    for name in states:
        torch.testing.assert_close(got[name].float(), expected[name].float(), **near)


@pytest.mark.parametrize("sms", [8, 64, 132])
def test_launches_keep_to_the_sms_of_their_step(sms: int) -> None:
    """No op but a copy by an engine launches more threads than its SMs hold at a time, and small ops launch fewer."""
    graph = checks.every_kind("bf16", rows=4096)
    site, full = FakeSite(sms), 0
    for op in graph.ops:
        tensors = [[graph.tensor[name] for name in names] for names in (op.inputs, op.outputs)]
        ins, outs = ([Buffer(4096, t.shape, t.dtype) for t in side] for side in tensors)
        for launch in launches(op, ins, outs, site):
            if isinstance(launch, Launch):
                assert launch.grid[0] * launch.block <= 2048 * sms, op.name
                full += launch.grid[0] * launch.block == 2048 * sms
    assert full >= 8, "large ops fill them"


@dataclass(frozen=True)
class FakeSite:
    """A lane of so many SMs."""

    sm_count: int
    arch: str = ""

    def scratch(self, nbytes: int) -> int:
        return 0

    def fault(self) -> int:
        return 0

    def constant(self, values: Any) -> int:
        return 0


def test_a_part_of_a_buffer_is_where_torch_says() -> None:
    whole = torch.arange(2 * 5 * 3 * 4, dtype=torch.float32).view(2, 5, 3, 4)
    made = Buffer(whole.data_ptr(), tuple(whole.shape), "f32")
    for axis, start, stop in ((0, 1, 2), (1, 2, 4), (2, 0, 1)):
        part, view = made.part(Rows(axis, start, stop)), whole.narrow(axis, start, stop - start)
        assert (part.address, part.shape) == (view.data_ptr(), tuple(view.shape))
        assert part.strides == (None if axis == 0 else view.stride())
        again, deeper = part.part(Rows(1, 0, 1)), view.narrow(1, 0, 1)
        assert again.address == deeper.data_ptr() and again.strides in (None, deeper.stride())


# ----------------------------------------------------------------------------------------------- rules


@pytest.fixture(scope="module")
def rules() -> dict[str, str]:
    """In a process of its own: what a rule makes in vain (a descriptor of no context) nothing can free."""
    with virtual_process() as call:
        result: dict[str, str] = call(all_rules)
    return result


def all_rules() -> dict[str, str]:
    control = virtual.loaded()
    assert control is not None
    return capture_rules.check_rules(control)


@pytest.mark.parametrize("rule", capture_rules.RULES, ids=lambda rule: rule.name)
def test_the_virtual_driver_enforces(rules: dict[str, str], rule: capture_rules.Rule) -> None:
    assert rule.source
    assert rules[rule.name] == "", rule.source


def test_there_are_rules_enough() -> None:
    assert len({rule.name for rule in capture_rules.RULES}) == len(capture_rules.RULES) >= 40


# ------------------------------------------------------------------------------------------- real layers


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 7], ids=["decode", "prefill"])
def test_layers_of_smollm2_equal_the_cpu_backend(on_virtual: Call, dtype: str, tokens: int) -> None:
    graph = step_graph(SMALL, batch=2, tokens=tokens, cache=32, dtype=dtype)
    given = model_tensors(graph, tokens)
    expected = {name: t.clone() for name, t in given.items()}
    with tg.compile(graph, tg.plan(graph, "cpu", "sequential"), "cpu") as exe:
        wanted = exe(expected)
    states = [t.name for t in graph.flat().with_role("state")]
    wanted |= {name: expected[name] for name in states}
    plan = tg.plan(graph, "h100_sxm", "list")
    got = on_virtual(run_plan, graph, plan, given, tuple(states))
    for name, value in wanted.items():
        if value.dtype.is_floating_point:
            tolerance = 2e-5 if dtype == "f32" else 3e-2
            scale = float(value.float().abs().max())
            assert float((got[name].float() - value.float()).abs().max()) <= tolerance * max(scale, 1.0), name
        else:
            assert torch.equal(got[name], value) or dtype == "bf16", name


STRETCH = Yarn(8.0, 1.0, 3.0, 1.2, 1.0)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (replace(SMALL, rope_scaling=STRETCH), "f32"),
        (SMALL, "bf16"),
        (replace(LATENT_TINY, vocab_size=512, rope_scaling=STRETCH), "f32"),
    ],
    ids=["yarn", "bf16", "latent"],
)
def test_serving_steps_over_pages_equal_the_cpu_backend(on_virtual: Call, config: ModelConfig, dtype: str) -> None:
    """A prefill of two chunks, then decode rows with a chunk and pages that move, each backend on its own pages."""
    shape = PageShape(pages=8, page_size=32, context=96, host_pages=4)
    steps = [(Bucket(0, 40, 2), first_batch()), (Bucket(3, 8, 1, moves=True), second_batch())]
    graphs = [step_over_pages(config, bucket, shape, dtype) for bucket, _ in steps]
    weights = model_tensors(graphs[1], 1, roles=("weight",))
    kind = TORCH_DTYPE[dtype]
    pages = {t.name: torch.zeros(t.shape, dtype=kind) for t in graphs[1].flat().with_role("state")}
    wanted = []
    for graph, (_, batch) in zip(graphs, steps, strict=True):
        with tg.compile(graph, tg.plan(graph, "cpu", "sequential"), "cpu") as exe:
            exe.bind({t.name: {**weights, **pages}[t.name] for t in graph.flat().with_role("weight", "state")})
            wanted.append(exe(batch))
    got = on_virtual(run_steps, graphs, [batch for _, batch in steps], weights, kind)
    used = [[0, 1], [0, 1, 3]]  # the sampled rows of sequences
    for mine, theirs, rows in zip(got, wanted, used, strict=True):
        a, b = (out[llama.LOGITS][rows].float() for out in (mine, theirs))
        assert float((a - b).abs().max()) <= (1e-4 if dtype == "f32" else 5e-2) * float(b.abs().max())


def first_batch() -> dict[str, torch.Tensor]:
    """Sequence a has 25 tokens in page 5, b has 12 in page 2; three rows stand for nothing."""
    positions = [*range(25), *range(12), 0, 0, 0]
    slots = [*(5 * 32 + i for i in range(25)), *(2 * 32 + i for i in range(12)), -1, -1, -1]
    return {
        "tokens": torch.arange(40) * 7 % SMALL.vocab_size,
        **ints(positions=positions, slots=slots, prefill_starts=[0, 25, 37], prefill_lengths=[25, 12]),
        **ints(prefill_blocks=[[5, 0, 0], [2, 0, 0]]),
        "samples": torch.tensor([24, 36]),
    }


def second_batch() -> dict[str, torch.Tensor]:
    """a and b decode, b from page 6, to which its page is copied before; c has a first chunk of 7 tokens in page 1."""
    nowhere = [[-1, -1]] * 7
    return {
        "tokens": torch.arange(11) * 5 % SMALL.vocab_size,
        **ints(
            positions=[25, 12, 0, *range(7), 0], slots=[5 * 32 + 25, 6 * 32 + 12, -1, *(32 + i for i in range(7)), -1]
        ),
        **ints(decode_lengths=[26, 13, 0], decode_blocks=[[5, 0, 0], [6, 0, 0], [0, 0, 0]]),
        **ints(prefill_starts=[0, 7], prefill_lengths=[7], prefill_blocks=[[1, 0, 0]]),
        **ints(page_out=[[2, 3], *nowhere], page_in=[[3, 4], *nowhere], page_copy=[[4, 6], *nowhere]),
        "samples": torch.tensor([0, 1, 2, 9]),
    }


def ints(**values: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}


def test_a_session_generates_the_tokens_of_the_cpu(on_virtual: Call) -> None:
    weights = model_tensors(step_graph(SMALL, batch=1, tokens=1, cache=64, dtype="f32"), 1, roles=("weight",))
    prompt = [3, 99, 256, 7, 41]
    with Session(SMALL, weights, cache=64) as session:
        wanted = list(session.generate(prompt, 4))
    assert on_virtual(generate, weights, prompt) == wanted


def generate(weights: dict[str, torch.Tensor], prompt: list[int]) -> list[int]:
    control = virtual.loaded()
    assert control is not None
    driver.Gpu.open()
    before = held(control)
    with Session(SMALL, weights, cache=64, device=DEVICE or "gpu") as session:
        tokens = list(session.generate(prompt, 4))
        step = session.step(1)
        assert step.kind == "simulated"
        (seconds,) = step_seconds([step])
        assert abs(seconds / step.plan.makespan_s - 1) < 0.01, f"{seconds} s, planned {step.plan.makespan_s} s"
        assert list(session.generate(prompt, 4)) == tokens, "timing leaves no trace"
    kept = {**held(control), "kernel": 0, "library": 0}
    assert kept == {**before, "kernel": 0, "library": 0}, f"{kept} against {before}"
    return tokens


def run_steps(graphs: list[tg.Graph], batches: list[Any], weights: dict[str, Any], kind: torch.dtype) -> list[Any]:
    plans = [tg.plan(graph, "h100_sxm", "list") for graph in graphs]
    states = {t.name: torch.zeros(t.shape, dtype=kind) for t in graphs[1].flat().with_role("state")}
    got = []
    with DeviceTensors({**weights, **states}, DEVICE) as held:
        for graph, plan, batch in zip(graphs, plans, batches, strict=True):
            with tg.compile(graph, plan, "cuda", device=DEVICE) as exe:
                exe.bind({t.name: held[t.name] for t in graph.flat().with_role("weight", "state")})
                got.append(exe(batch))
    return got


def model_tensors(
    graph: tg.Graph, tokens: int, roles: tuple[str, ...] = ("input", "weight", "state")
) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(7)
    result = {}
    for t in graph.flat().with_role(*roles):
        if t.dtype == "i64":
            values = rng.integers(0, SMALL.vocab_size, t.shape) if t.name == "tokens" else rng.integers(0, 20, t.shape)
            result[t.name] = torch.from_numpy(values)
        else:
            scale = 0.5 if t.role == "state" else t.shape[-1] ** -0.5
            values = rng.standard_normal(t.shape, np.float32) * scale + (1.0 if len(t.shape) == 1 else 0.0)
            result[t.name] = torch.from_numpy(values).to(TORCH_DTYPE[t.dtype])
    return result


def run_plan(graph: tg.Graph, plan: Plan, given: dict[str, Any], states: tuple[str, ...] = ()) -> dict[str, Any]:
    with tg.compile(graph, plan, "cuda", device=DEVICE) as exe:
        assert isinstance(exe, CudaExecutable)
        got: dict[str, Any] = exe(given)
        return got | {name: exe.state(name).cpu() for name in states}


# --------------------------------------------------------------------------------------------- executable


def small_graph() -> tg.Graph:
    b = tg.GraphBuilder("small")
    x, w = b.input("x", (16, 16), "f32"), b.weight("w", (16, 16), "f32")
    left, right = tg.ops.gemm(x, w, name="left"), tg.ops.add(x, x, name="right")
    b.output(tg.ops.add(left, right, name="sum"))
    return b.build()


def held(control: virtual.Control) -> dict[str, int]:
    """What is alive in the driver."""
    gc.collect()
    report = control.report()
    return {**report.live, "bytes": report.allocated_bytes, "allocations": report.allocations}


def test_an_executable_replays_rebinds_and_frees_everything(on_virtual: Call) -> None:
    on_virtual(replay_rebind_free)


def replay_rebind_free() -> None:
    control = virtual.loaded()
    assert control is not None
    graph = small_graph()
    plan = tg.plan(graph, "h100_sxm", "list")
    x, w, v = (torch.randn(16, 16) for _ in range(3))
    run_plan(graph, plan, {"x": x, "w": w})  # kernels are loaded once and stay
    control.clear_log()
    before = held(control)
    with tg.compile(graph, plan, "cuda", device=DEVICE) as exe:
        assert isinstance(exe, CudaExecutable)
        with pytest.raises(GraphError, match=r"'x'.*never given"):
            exe(w=w)
        torch.testing.assert_close(exe(x=x, w=w)["sum.out"], x @ w + 2 * x)
        first = exe.report
        assert first.capability.startswith("taskgraph virtual h100_sxm (simulated), 132 SMs, driver 13.5")
        assert dict(first.by)["gemm"] == "cuda/kernels"
        assert {by for _, by in first.by} == {"cuda/kernels"}, "a virtual device cannot run cubins"
        torch.testing.assert_close(exe(x=v)["sum.out"], v @ w + 2 * v)
        assert exe.report is first, "new values of inputs need no new capture"
        exe.bind(w=v)  # the same buffer: uploaded, not captured again
        torch.testing.assert_close(exe(x=x)["sum.out"], x @ v + 2 * x)
        assert exe.report is first
        with tg.compile(graph, plan, "cuda", device=DEVICE) as other:
            other.bind(x=exe.inputs["x"])  # type: ignore[attr-defined]
            with pytest.raises(GraphError, match=r"'w'.*bind"):
                other.launch()
            other.bind(w=exe.state("w"))
            other.launch()
            torch.testing.assert_close(other.outputs["sum.out"].cpu(), x @ v + 2 * x)
        exe.launch(exe.origin)
        exe.origin.sync()
        assert exe.timeline().kind == "simulated"
        wanted = replay_times(graph, plan).spans
        for a, b in zip(exe.timeline().spans, wanted, strict=True):
            assert a.end_s - a.start_s == pytest.approx(b.end_s - b.start_s, rel=1e-6)
        with pytest.raises(GraphError, match=r"f32\[16, 16\]"):
            exe.bind(w=torch.randn(16, 8))
    assert held(control) == before, f"{held(control)} against {before}"
    assert not control.report().texts("error")


def test_custom_ops_launch_on_their_lane(on_virtual: Call) -> None:
    on_virtual(run_custom_op)


def run_custom_op() -> None:
    def twice(x: Any, out: Any, stream: Any) -> None:
        kernel = driver.Gpu.open().kernel("add_f32", "elementwise")
        driver.launch_kernel(stream, kernel, (1,), 256, (x.buffer.address,) * 2 + (out.buffer.address, np.int64(64)))

    def escapes(x: Any, out: Any, stream: Any) -> None:
        pass

    def deaf(x: Any, out: Any) -> None:
        pass

    def compiled(function: Any) -> Any:
        b = tg.GraphBuilder("custom")
        x = b.input("x", (64,), "f32")
        b.output(
            b.call(
                function, [x], [tg.spec("y", (64,), "f32")], work=tg.Work(hbm_bytes=512), name="mine",
                demand=tg.demand(sm=8),
            )
        )  # fmt: skip
        graph = b.build()
        return tg.compile(graph, tg.plan(graph, "h100_sxm", "list"), "cuda", device=DEVICE)

    x = torch.randn(64)
    with compiled(twice) as exe:
        torch.testing.assert_close(exe(x=x)["y"], 2 * x)
    with compiled(escapes) as exe, pytest.raises(CaptureMismatch, match="'mine' left no node"):
        exe(x=x)
    with compiled(deaf) as exe, pytest.raises(BackendUnavailable, match="`stream`"):
        exe(x=x)


def test_a_graph_that_is_not_the_plan_is_a_mismatch() -> None:
    """Every way in which a captured graph may differ, each with its word."""
    graph = small_graph()
    plan = tg.plan(graph, "h100_sxm", "list")
    names = [step.op for step in plan.steps]
    nodes = tuple(NodeFacts(100 + i, "kernel", name, 7 + plan.steps[i].lane) for i, name in enumerate(names))
    total, parts = names.index("sum"), [names.index("left"), names.index("right")]
    edges = tuple((100 + i, 100 + total) for i in parts)
    owners, contexts = [[100], [101], [102]], [7 + i for i in range(len(plan.lanes))]
    assert len(plan.lanes) == 2
    compare(plan, GraphFacts(nodes, edges), owners, contexts)
    extra = NodeFacts(200, "memcpy")
    moved = (replace(nodes[0], context=1), *nodes[1:])
    for facts, mine, what in (
        (GraphFacts(nodes, edges), [[100], [], [102]], "nodes"),
        (GraphFacts((*nodes, extra), edges), owners, "nodes"),
        (GraphFacts((*nodes[:2], extra), edges), owners, "nodes"),
        (GraphFacts(moved, edges), owners, "partition"),
        (GraphFacts(nodes, edges[:1]), owners, "order"),
        (GraphFacts(nodes, (*edges, (100, 101))), owners, "order"),
        (GraphFacts(nodes, (*edges, (102, 100))), owners, "order"),
    ):
        with pytest.raises(CaptureMismatch) as caught:
            compare(plan, facts, mine, contexts)
        assert caught.value.what == what


def test_plans_for_other_devices_are_refused(on_virtual: Call) -> None:
    on_virtual(refuse_plans)


def refuse_plans() -> None:
    graph = small_graph()
    with pytest.raises(PlanError, match="no GPU"):
        tg.compile(graph, tg.plan(graph, "cpu"), "cuda", device=DEVICE)
    with pytest.raises(PlanError, match=r"148 SMs.*132"):
        tg.compile(graph, tg.plan(graph, "b200_sxm", "sequential"), "cuda", device=DEVICE)
    with pytest.raises(BackendUnavailable, match="another process"):
        tg.compile(graph, tg.plan(graph, "a100_sxm", "sequential"), "cuda", device="virtual:a100_sxm")


def test_without_a_driver_the_reason_and_the_way_out_are_said() -> None:
    found = driver.probe()
    if found.available:
        pytest.skip("this machine has a GPU")
    graph = small_graph()
    with pytest.raises(BackendUnavailable, match="virtual:h100_sxm"):
        tg.compile(graph, tg.plan(graph, "h100_sxm"), "cuda")


# -------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize(("arch", "level"), [("sm_80", "-O0"), ("sm_90", "-O3")])
def test_nvcc_compiles_all_kernels_without_a_warning(arch: str, level: str, tmp_path: Path) -> None:
    """All files as one, for nvcc reads its headers for seconds; optimised code for one architecture. The sources tell
    those before sm_90 from the others, and nothing else."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if arch not in known:
        pytest.skip(f"this nvcc does not know {arch}")
    together = tmp_path / "all.cu"
    inside = 'namespace {} {{\n#include "{}"\n}}\n#undef OF_TYPE\n'
    files = "".join(inside.format(path.stem, path) for path in KERNELS)
    together.write_text(f'#include "common.cuh"\n{files}')
    flags = ["-std=c++17", "-Werror", "all-warnings", "-Xptxas", level, f"-arch={arch}", "-cubin"]
    command = [nvcc, *flags, "-I", str(driver.kernel_folder()), "-o", str(tmp_path / "out"), str(together)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_nvrtc_compiles_beside_the_virtual_driver(on_virtual: Call, arch: str) -> None:
    assert all(size > 1000 for size in on_virtual(nvrtc_sizes, arch))


def nvrtc_sizes(arch: str) -> list[int]:
    return [len(driver.compiled(path, arch)) for path in KERNELS]


# ---------------------------------------------------------------------------------------- other libraries


def test_other_libraries_hand_over_streams_and_memory(on_virtual: Call) -> None:
    on_virtual(hand_over)


class ForeignStream:
    """A stream of another library."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


class ForeignArray:
    """A tensor of another library."""

    def __init__(self, array: DeviceArray, **changes: Any) -> None:
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


def hand_over() -> None:
    graph, x, w = small_graph(), torch.randn(16, 16), torch.randn(16, 16)
    stream = driver.Gpu.open().stream()
    with DeviceTensors({"x": x, "w": w}) as given:
        exe = tg.compile(graph, tg.plan(graph, "h100_sxm", "list"), "cuda", device=DEVICE)
        assert isinstance(exe, CudaExecutable)
        with exe:
            exe.bind({name: ForeignArray(a) for name, a in given.items()})
            exe.launch(ForeignStream(int(stream.handle)))
            stream.sync()
            torch.testing.assert_close(exe.outputs["sum.out"].cpu(), x @ w + 2 * x)
            with pytest.raises(ExecutionError, match="__cuda_stream__"):
                exe.launch(object())
            with pytest.raises(GraphError, match="contiguous"):
                exe.bind(x=ForeignArray(given["x"], strides=(4, 64)))
            with pytest.raises(BackendUnavailable, match="no CUDA device"):
                given["x"].torch()
            assert exe.replay_seconds(3) == pytest.approx(exe.timeline().makespan_s, rel=0.2)


def test_ranks_need_a_process_group(on_virtual: Call) -> None:
    on_virtual(without_a_group)


@dataclass(frozen=True)
class FakeGroup:
    """Two ranks of some backend."""

    backend: str
    size: int = 2


def without_a_group() -> None:
    b = tg.GraphBuilder("ranks")
    x = b.input("x", (4, 6), "f32")
    b.output(tg.ops.all_reduce(x, ranks=2, name="exchange"), tg.ops.all_gather(x, ranks=2, axis=1, name="join"))
    graph = b.build()
    plan = tg.plan(graph, "h100_sxm", "sequential")
    with pytest.raises(BackendUnavailable, match=r"exchange.*all_reduce over 2 ranks.*compile\(group=...\)"):
        tg.compile(graph, plan, "cuda", device=DEVICE)
    with DeviceTensors({"x": torch.ones(4, 6)}, DEVICE) as held_tensors:
        for backend in ("gloo", "cpu:gloo,cuda:nccl"):  # NCCL is there, a GPU for torch is not
            with pytest.raises(BackendUnavailable, match=r"exchange.*needs NCCL on a GPU.*connect"):
                collective(graph.ops[0], held_tensors["x"], held_tensors["x"], FakeGroup(backend))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("bf16", "bf16"), ("f32", "bf16")])
@pytest.mark.parametrize("extras", [(), ("bias",), ("residual",), ("bias", "residual")])
def test_products_by_torch_are_those_of_the_op(dtypes: tuple[str, str], extras: tuple[str, ...]) -> None:
    b = tg.GraphBuilder("product")
    x, w = b.input("x", (6, 8), dtypes[0]), b.input("w", (5, 8), dtypes[1])
    more = {name: b.input(name, (5,) if name == "bias" else (6, 5), dtypes[0]) for name in extras}
    b.output(tg.ops.gemm(x, w, **more, transpose_w=True, name="product"))  # type: ignore[arg-type]
    graph = b.build()
    given = fill(graph, {}, seed=4)
    out = torch.empty(6, 5, dtype=TORCH_DTYPE[dtypes[0]])
    torch_ops.TORCH_OPS["gemm"](graph.ops[0], [given[name] for name in graph.ops[0].inputs], out)
    wanted = given["x"].double() @ given["w"].double().t() + sum(given[name].double() for name in extras)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")])
def test_batched_products_by_torch_are_those_of_the_op(dtype: str, out_dtype: str, transposed: bool) -> None:
    b = tg.GraphBuilder("product")
    x, y = b.input("x", (3, 2, 6, 8), dtype), b.input("y", (2, 5, 8) if transposed else (2, 8, 5), dtype)
    b.output(tg.ops.matmul(x, y, transpose_b=transposed, out_dtype=out_dtype, name="product"))
    graph = b.build()
    given = fill(graph, {}, seed=4)
    out = torch.empty(3, 2, 6, 5, dtype=TORCH_DTYPE[out_dtype])
    torch_ops.TORCH_OPS["matmul"](graph.ops[0], [given["x"], given["y"]], out)
    right = given["y"].double()
    wanted = given["x"].double() @ (right.transpose(-1, -2) if transposed else right)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=3e-2)


def test_torch_ops_say_when_torch_has_no_cuda(on_virtual: Call) -> None:
    on_virtual(torch_without_cuda)


def torch_without_cuda() -> None:
    assert not torch_ops.available()
    graph = small_graph()
    stream = driver.Gpu.open().stream()
    with DeviceTensors({"x": torch.ones(16, 16), "w": torch.ones(16, 16)}, DEVICE) as held_tensors:
        arrays = [*held_tensors.values()]
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            torch_ops.bound(graph.ops[0], arrays, arrays[:1], stream)
