"""What gpu-check holds the cuda backend to: checks against the cpu backend, the plan and the driver."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

import taskgraph.ops as ops
from taskgraph.cost.gpu_report import Check
from taskgraph.graph.device import Device, Geometry, make
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.rewrite import split_batch
from taskgraph.runtime.backend import compile
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.runtime.gpu.torch_memory import held_bytes
from taskgraph.schedule.evaluate import Layout
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan, plan_from
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve.lists import pack
from taskgraph.tune.fill import fill

TOLERANCE = {"f32": 2e-4, "bf16": 5e-2}
"""Largest difference from the cpu backend, relative to the largest entry: the orders of summation differ."""
_LEAK = 2 << 20
"""Bytes that a driver may keep of its own."""
Say = Callable[[str], None]


class NotAsked(Exception):  # noqa: N818 - no error: the device has not what the check is about
    """Raised by a check that has nothing to look at here; says why."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The device under test, and how plans are run on it."""

    gpu: Gpu
    device: Device
    name: str | None

    def open(self, graph: Graph, made: Plan) -> CudaExecutable:
        executable = compile(graph, made, "cuda", device=self.name)
        assert isinstance(executable, CudaExecutable)
        return executable

    @contextmanager
    def launching(self, dependent: bool) -> Iterator[None]:
        """Within the block kernels that can are launched while the kernel before them runs, or none is."""
        before, self.gpu.dependent = self.gpu.dependent, dependent and self.gpu.capability.dependent
        try:
            yield
        finally:
            self.gpu.dependent = before

    def isolated(self, graph: Graph, *sizes: int) -> Plan | None:
        """A list schedule on partitions of these sizes."""
        problem = make_problem(graph, self.device, sorted(set(sizes)))
        packed = pack(problem, Layout.isolated(Geometry.of(*sizes)))
        if packed is None:
            return None
        return plan_from(problem, replace(packed, made_by="gpu-check"))


CHECKS: dict[str, Callable[[Bench], str]] = {}
"""What is checked -> the check, which gives what it saw and raises what is wrong."""


def check(name: str) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Register a check."""

    def register(function: Callable[[Bench], str]) -> Callable[[Bench], str]:
        CHECKS[name] = function
        return function

    return register


def checked(name: str, function: Callable[[Bench], str], bench: Bench) -> Check:
    """The check's outcome, whatever it raises: one that breaks must not end the run."""
    try:
        return Check(name, True, function(bench))
    except NotAsked as why:
        return Check(name, False, f"not asked: {why}", asked=False)
    except Exception as error:
        return Check(name, False, " ".join(f"{type(error).__name__}: {error}".split()))


@check("every kernel source compiles for this device")
def sources_compile(bench: Bench) -> str:
    paths = sorted(driver.kernel_folder().glob("*.cu"))
    total = sum(len(driver.compiled(path, bench.gpu.arch)) for path in paths)
    return f"{len(paths)} sources, {total} bytes for {bench.gpu.arch}"


def every_kind(dtype: str, rows: int = 32) -> Graph:
    """A graph with an op of every dense kind."""
    b = GraphBuilder(f"every-kind-{dtype}")
    width, heads, dim = 64, 4, 16
    tokens, places = b.input("tokens", (rows,), "i64"), b.input("places", (2,), "i64")
    caches = [b.state(name, (2, 2, rows + 32, dim), dtype) for name in ("keys", "values")]
    table, norm = b.weight("table", (128, width), dtype), b.weight("norm", (width,), dtype)
    x = ops.rmsnorm(ops.embedding(tokens, table, name="embed"), norm, name="normed")
    qkv = ops.gemm(x, b.weight("w_qkv", (width, 2 * heads * dim), dtype), b.weight("bias", (2 * heads * dim,), dtype))
    q = ops.rope_kv(qkv, places, caches[0], caches[1], spec=ops.RopeSpec(heads), name="rope_kv")
    mixed = ops.gemm(ops.attention(q, places, *caches), b.weight("w_out", (width, heads * dim), dtype),
                     residual=x, transpose_w=True, name="mixed")  # fmt: skip
    up = ops.swiglu(ops.gemm(mixed, b.weight("w_up", (width, 2 * width), dtype)), name="up")
    turned = ops.rope(b.input("query", (rows, heads, dim), dtype), b.input("at", (rows,), "i64"))
    old = ops.decode_attention(turned, b.state("kv", (2, rows, 24, 2, dim), dtype), name="old")
    both = ops.concat_rows([ops.slice_rows(up, 0, rows, 2), ops.slice_rows(up, 1, rows, 2)], name="both")
    summed = ops.all_reduce(ops.add(both, mixed), ranks=1, name="summed")
    b.output(ops.argmax(summed, name="best"), ops.copy(summed, direction="d2h", name="home"), old)
    return b.build()


def standard_ops(dtype: str, rows: int = 48) -> Graph:
    """A graph of pointwise ops, norms, products, reductions and moves along axes."""
    b = GraphBuilder(f"standard-{dtype}")
    x, y = b.input("x", (rows, 8, 40), dtype), b.input("y", (rows, 8, 40), dtype)
    weight, index = b.weight("weight", (40,), dtype), b.input("index", (24,), "i64")
    gate = ops.elementwise("mul x0 x2; silu s0; mul s1 x1; gelu s2", [x, y, weight], name="gate")
    normed = ops.layer_norm(ops.add(gate, x), weight, weight, name="normed")
    scores = ops.softmax(ops.matmul(normed, y, transpose_b=True), name="scores")
    mixed = ops.matmul(scores, ops.transpose(ops.permute(y, (0, 2, 1))), name="mixed")
    wide = ops.concat([mixed, ops.slice_axis(mixed, 2, 0, 40, 2)], 2, name="wide")
    picked = ops.index_select(wide, index, 2, name="picked")
    mean = ops.expand(ops.reduce_mean(picked, 1, keep_axes=True), (rows, 8, 24), name="mean")
    b.output(ops.sub(picked, mean), ops.reduce_max(ops.reshape(wide, (rows * 4, 120)), 1), ops.reduce_sum(x, (0, 2)))
    return b.build()


def _equal(bench: Bench, graph: Graph, made: Plan) -> str:
    """Run `made` and the cpu backend on the same values; AssertionError where they differ."""
    given = fill(graph.flat(), {}, seed=1)
    expected = {name: value.clone() for name, value in given.items()}
    host = make(bench.device, name="reference", kind="cpu", sm_count=1, sm_granularity=1, sm_min=1)
    with compile(graph, plan(graph, host, "sequential"), "cpu") as reference:
        wanted = reference(expected)
    with bench.open(graph, made) as executable:
        got = executable(given)
        nodes = executable.report.nodes
    worst = max(_difference(got[name], value) for name, value in wanted.items() if value.is_floating_point())
    kind = next(t.dtype for t in graph.flat().tensors if t.dtype in TOLERANCE)
    assert worst <= TOLERANCE[kind], f"outputs differ from the cpu backend by {worst:.1e} of their largest entry"
    return f"{nodes} nodes on {len(made.lanes)} lanes; largest relative difference {worst:.1e}"


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the largest entry; infinite for a NaN, which no comparison of numbers would find."""
    worst = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6)
    return math.inf if worst.isnan() else float(worst)


@check("every op kind, f32, equals the cpu backend")
def f32_is_right(bench: Bench) -> str:
    graph = every_kind("f32")
    return _equal(bench, graph, plan(graph, bench.device, "sequential"))


@check("every op kind, bf16, equals the cpu backend")
def bf16_is_right(bench: Bench) -> str:
    graph = every_kind("bf16")
    return _equal(bench, graph, plan(graph, bench.device, "sequential"))


@check("pointwise ops, norms and moves along axes, f32, equal the cpu backend")
def f32_standard_ops(bench: Bench) -> str:
    graph = standard_ops("f32")
    return _equal(bench, graph, plan(graph, bench.device, "sequential"))


@check("pointwise ops, norms and moves along axes, bf16, equal the cpu backend")
def bf16_standard_ops(bench: Bench) -> str:
    graph = standard_ops("bf16")
    return _equal(bench, graph, plan(graph, bench.device, "sequential"))


@check("lanes that share the device: the captured graph is the plan")
def shared_lanes(bench: Bench) -> str:
    graph = every_kind("f32")
    return _equal(bench, graph, plan(graph, bench.device, "list"))


@check("kernels that begin while the one before runs give what they give after its end")
def dependent_launches(bench: Bench) -> str:
    """Bit by bit, some replays of each: a kernel that did not wait would read what is not there yet."""
    if not bench.gpu.capability.dependent:
        raise NotAsked("this device begins a kernel at the end of the one before")
    graph = every_kind("bf16")
    made, given = plan(graph, bench.device, "sequential"), fill(graph.flat(), {}, seed=4)
    found, edges = [], []
    for dependent in (False, True):
        with bench.launching(dependent), bench.open(graph, made) as executable:
            fresh = {name: value.clone() for name, value in given.items()}
            found += [executable(fresh), *(executable() for _ in range(3))]
            edges.append(executable.report.dependent)
    assert edges[0] == 0 and edges[1] > 0, f"{edges[1]} edges are dependent; some were asked for"
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found), f"output {name!r} differs"
    return f"{edges[1]} edges are dependent; outputs equal bit by bit"


@check("nano-batches read and write rows in place")
def nano_batches(bench: Bench) -> str:
    graph = split_batch(every_kind("f32"), (16, 16))
    return _equal(bench, graph, plan(graph, bench.device, "list"))


@check("kernels that loop over more blocks than they launch, on the smallest partition")
def blocks_loop(bench: Bench) -> str:
    graph, (small, *_) = every_kind("f32", rows=320), bench.device.partition_sizes()
    made = bench.isolated(graph, small)
    assert made is not None
    return f"{small} SMs; {_equal(bench, graph, made)}"


def _halves(device: Device) -> int:
    return max(size for size in device.partition_sizes() if 2 * size <= device.sm_count)


@check("two equal partitions: every kernel is in its own")
def equal_partitions(bench: Bench) -> str:
    graph, half = every_kind("f32"), _halves(bench.device)
    made = bench.isolated(graph, half, half)
    assert made is not None
    return f"{half} + {half} SMs; {_equal(bench, graph, made)}"


@check("two unequal partitions: every kernel is in its own")
def unequal_partitions(bench: Bench) -> str:
    if not bench.gpu.capability.partitions:
        raise NotAsked("this driver has no partitions")
    graph, (small, *_) = every_kind("f32"), bench.device.partition_sizes()
    large = max(size for size in bench.device.partition_sizes() if small + size <= bench.device.sm_count)
    made = bench.isolated(graph, large, small)
    assert made is not None
    return f"{large} + {small} SMs; {_equal(bench, graph, made)}"


@check("a bind to other memory updates the graph in place; closing frees everything")
def bind_and_close(bench: Bench) -> str:
    """Twice: what libraries load at first use is no leak. What torch's allocator holds in the end, the workspaces of
    cuBLAS among it, is counted as held and not as lost."""
    _bind_and_close(bench)
    free, held = bench.gpu.memory_bytes(free=True), held_bytes()
    _bind_and_close(bench)
    kept = held_bytes() - held
    left = free - bench.gpu.memory_bytes(free=True) - kept
    assert left <= _LEAK, f"{left} bytes of device memory were not freed, beside {kept} that torch's allocator holds"
    return f"updated in place, all memory freed; torch's allocator holds {max(kept, 0)} bytes more"


def _bind_and_close(bench: Bench) -> None:
    graph = every_kind("f32")
    values = fill(graph.flat(), {}, seed=2)
    with bench.open(graph, plan(graph, bench.device, "sequential")) as executable:
        executable(values)
        with bench.open(graph, plan(graph, bench.device, "sequential")) as other:
            other(values)
            executable.bind(table=other.state("table"))
            executable.launch()
            updated = executable.report.updated
    assert updated, "the executable graph was instantiated again"
