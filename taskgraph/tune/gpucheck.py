"""gpu-check: one run that says what a GPU can do and whether the cuda backend is right on it, as one report.

Probes, checks (each against the cpu backend or the plan), calibration by two probe kernels and copies, and overlap
verdicts by autotune. On a virtual device the same code runs; its report says that all times are simulated.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import taskgraph.ops as ops
from taskgraph.cache import write_atomically
from taskgraph.cost.profiles import ProfileDB
from taskgraph.errors import TaskgraphError
from taskgraph.graph.device import Device, Geometry, make
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Work, demand, spec
from taskgraph.rewrite import split_batch
from taskgraph.runtime.backend import compile
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.arrays import DeviceArray
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.runtime.gpu.spec import planning_device
from taskgraph.schedule.evaluate import Layout
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan, plan_from
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve.lists import pack
from taskgraph.tune.autotune import SAME, autotune
from taskgraph.tune.fill import fill
from taskgraph.tune.measure import on_partition

SCHEMA = 2
TOLERANCE = {"f32": 2e-4, "bf16": 5e-2}
"""Largest difference from the cpu backend, relative to the largest entry: the orders of summation differ."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large probes and pairs are: a real device needs work that lasts, a virtual one runs it on the host."""

    rows: int
    stream_bytes: int
    cycles: int
    rounds: int
    pair_budget_s: float


REAL = Sizes(rows=2048, stream_bytes=1 << 30, cycles=2_000_000, rounds=5, pair_budget_s=10.0)
VIRTUAL = Sizes(rows=64, stream_bytes=1 << 20, cycles=1000, rounds=1, pair_budget_s=1.0)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it says, whether it holds, and what was seen. One that this driver cannot be `asked` neither
    holds nor fails."""

    name: str
    passed: bool
    seen: str
    asked: bool = True


class NotAsked(Exception):  # noqa: N818 - no error: the device has not what the check is about
    """Raised by a check that has nothing to look at here; says why."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Whether two ops gain from running together, as autotune saw it; seconds are of the report's kind where plans of
    the pair were `compared`, else they are predictions."""

    pair: str
    compared: bool
    choice: str
    packed_s: float
    sequential_s: float
    error_band: float
    reason: str


@dataclass(frozen=True, slots=True)
class GpuReport:
    """All that a run found. `kind` says what every time and rate in it is: "measured" or "simulated"."""

    kind: str
    capability: str
    driver_version: int
    compute_capability: tuple[int, int]
    notes: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    calibration: tuple[tuple[str, float], ...]
    overlaps: tuple[Overlap, ...]
    seconds: float
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether every check that was asked holds."""
        return all(check.passed for check in self.checks if check.asked)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {**asdict(self), "versions": dict(self.versions), "calibration": dict(self.calibration)}


def run(device: str | None = None, *, database: Path | None = None, say: Say = lambda text: None) -> GpuReport:
    """The report on this machine's GPU, or on the virtual one that `device` names. BackendUnavailable without one.

    Op times that are measured go into the profile database; simulated ones do not."""
    begin = time.perf_counter()
    gpu = Gpu.open(device)
    sizes, target = (VIRTUAL if gpu.capability.virtual else REAL), planning_device(device)
    bench = _Bench(gpu, target, device, sizes)
    checks = tuple(_checked(name, check, bench, say) for name, check in CHECKS.items())
    say("calibrating")
    calibration = tuple(_calibrate(bench))
    return GpuReport(
        kind="simulated" if gpu.capability.virtual else "measured",
        capability=gpu.capability.describe(),
        driver_version=gpu.capability.driver_version,
        compute_capability=gpu.capability.compute_capability,
        notes=gpu.capability.notes,
        versions=tuple(_versions()),
        checks=checks,
        calibration=calibration,
        overlaps=tuple(_overlap(name, graph, bench, database, say) for name, graph in _pairs(sizes)),
        seconds=time.perf_counter() - begin,
    )


def main(device: str | None, out: Path, say: Say) -> GpuReport:
    """Run, write the report to `out`, give it back."""
    report = run(device, say=say)
    write_atomically(out, json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def summary(report: GpuReport) -> str:
    """The report for people."""
    lines = [report.capability]
    lines += [f"{_mark(c)} {c.name}: {c.seen}" for c in report.checks]
    lines += [f"{name}: {value:.4g} ({report.kind})" for name, value in report.calibration]
    lines += [f"{o.pair}: {'' if o.compared else 'NOT COMPARED, '}{o.reason}" for o in report.overlaps]
    return "\n".join([*lines, f"{tally(report)}; all times and rates are {report.kind}."])


def _mark(check: Check) -> str:
    return "--  " if not check.asked else "ok  " if check.passed else "FAIL"


def tally(report: GpuReport) -> str:
    """How many checks hold of those that were asked, and how many pairs were compared of those that were to be."""
    asked = [c for c in report.checks if c.asked]
    held, skipped = sum(c.passed for c in asked), len(report.checks) - len(asked)
    compared, pairs = sum(o.compared for o in report.overlaps), len(report.overlaps)
    return (
        f"{held} of {len(asked)} checks hold{f', {skipped} not asked' if skipped else ''}; "
        f"{compared} of {pairs} pairs were compared"
    )


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "taskgraph", metadata.version("taskgraph-gpu")
    for package in ("cuda-core", "cuda-bindings", "torch", "numpy"):
        yield package, metadata.version(package)


@dataclass(frozen=True, slots=True)
class _Bench:
    """The device under test, and how plans are run on it."""

    gpu: Gpu
    device: Device
    name: str | None
    sizes: Sizes

    def open(self, graph: Graph, made: Plan) -> CudaExecutable:
        executable = compile(graph, made, "cuda", device=self.name)
        assert isinstance(executable, CudaExecutable)
        return executable

    def isolated(self, graph: Graph, *sizes: int) -> Plan | None:
        """A list schedule on partitions of these sizes."""
        problem = make_problem(graph.flat(), self.device, sorted(set(sizes)))
        packed = pack(problem, Layout.isolated(Geometry.of(*sizes)))
        if packed is None:
            return None
        return plan_from(graph, self.device, problem, packed, "gpu-check")


# ------------------------------------------------------------------------------------------------ checks

CHECKS: dict[str, Callable[[_Bench], str]] = {}
"""What is checked -> the check, which gives what it saw and raises what is wrong."""


def check(name: str) -> Callable[[Callable[[_Bench], str]], Callable[[_Bench], str]]:
    """Register a check."""

    def register(function: Callable[[_Bench], str]) -> Callable[[_Bench], str]:
        CHECKS[name] = function
        return function

    return register


def _checked(name: str, function: Callable[[_Bench], str], bench: _Bench, say: Say) -> Check:
    say(name)
    try:
        return Check(name, True, function(bench))
    except NotAsked as why:
        return Check(name, False, f"not asked: {why}", asked=False)
    except (TaskgraphError, AssertionError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


@check("every kernel source compiles for this device")
def _(bench: _Bench) -> str:
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


def _equal(bench: _Bench, graph: Graph, made: Plan) -> str:
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
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6))


@check("every op kind, f32, equals the cpu backend")
def _(bench: _Bench) -> str:
    graph = every_kind("f32")
    return _equal(bench, graph, plan(graph, bench.device, "sequential"))


@check("every op kind, bf16, equals the cpu backend")
def _(bench: _Bench) -> str:
    graph = every_kind("bf16")
    return _equal(bench, graph, plan(graph, bench.device, "sequential"))


@check("lanes that share the device: the captured graph is the plan")
def _(bench: _Bench) -> str:
    graph = every_kind("f32")
    return _equal(bench, graph, plan(graph, bench.device, "list"))


@check("nano-batches read and write rows in place")
def _(bench: _Bench) -> str:
    graph = split_batch(every_kind("f32"), (16, 16))
    return _equal(bench, graph, plan(graph, bench.device, "list"))


@check("kernels that loop over more blocks than they launch, on the smallest partition")
def _(bench: _Bench) -> str:
    graph, (small, *_) = every_kind("f32", rows=320), bench.device.partition_sizes()
    made = bench.isolated(graph, small)
    assert made is not None
    return f"{small} SMs; {_equal(bench, graph, made)}"


def _halves(device: Device) -> int:
    return max(size for size in device.partition_sizes() if 2 * size <= device.sm_count)


@check("two equal partitions: every kernel is in its own")
def _(bench: _Bench) -> str:
    graph, half = every_kind("f32"), _halves(bench.device)
    made = bench.isolated(graph, half, half)
    assert made is not None
    return f"{half} + {half} SMs; {_equal(bench, graph, made)}"


@check("two unequal partitions: every kernel is in its own")
def _(bench: _Bench) -> str:
    if not bench.gpu.capability.partitions:
        raise NotAsked("this driver has no partitions")
    graph, (small, *_) = every_kind("f32"), bench.device.partition_sizes()
    large = max(size for size in bench.device.partition_sizes() if small + size <= bench.device.sm_count)
    made = bench.isolated(graph, large, small)
    assert made is not None
    return f"{large} + {small} SMs; {_equal(bench, graph, made)}"


@check("a bind to other memory updates the graph in place; closing frees everything")
def _(bench: _Bench) -> str:
    free = bench.gpu.memory_bytes(free=True)
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
    left = free - bench.gpu.memory_bytes(free=True)
    assert left <= 2 << 20, f"{left} bytes of device memory were not freed"
    return "updated in place, all memory freed"


# ------------------------------------------------------------------------------------------- calibration


def _calibrate(bench: _Bench) -> Iterator[tuple[str, float]]:
    """Rates by what was run, in SI units; a partition's name says its SMs."""
    device = bench.device
    steps = sorted({device.sm_min, *(_near(device, share) for share in (0.25, 0.5, 0.75)), device.sm_count})
    for sms in steps:
        yield f"hbm_read_bytes_per_s on {sms} SMs", _read_rate(bench, sms)
    for sms in steps:
        yield f"fma_flops_per_s on {sms} SMs", _fma_rate(bench, sms)
    for direction in ("h2d", "d2h"):
        yield f"{direction}_bytes_per_s", _copy_rate(bench, direction)
    yield "graph_node_s", _node_seconds(bench)


def _near(device: Device, share: float) -> int:
    return min(device.partition_sizes(), key=lambda size: abs(size - share * device.sm_count))


def _alone_seconds(bench: _Bench, graph: Graph, sms: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Median seconds of the only op of `graph` on `sms` SMs, and its outputs."""
    made = on_partition(plan(graph, bench.device, "sequential"), graph, sms)
    with bench.open(graph, made) as executable:
        outputs = executable(fill(graph.flat(), {}, seed=3))
        spans = [executable.timeline().spans[0] for _ in range(bench.sizes.rounds)]
    return statistics.median(span.end_s - span.start_s for span in spans), outputs


def _read_rate(bench: _Bench, sms: int) -> float:
    nbytes, threads, rounds = bench.sizes.stream_bytes, 1024, 4
    kernel = bench.gpu.kernel("bandwidth_probe", "probes")  # loaded here: a capture permits no loading

    def read(data: DeviceArray, out: DeviceArray, stream: Any) -> None:
        args = (data.buffer.address, out.buffer.address, np.int64(nbytes // 16), np.int32(rounds))
        driver.launch_kernel(stream, kernel, (2 * sms,), threads, args)

    b = GraphBuilder("read")
    work, out = Work(hbm_bytes=float(rounds * nbytes)), spec("sums", (2 * sms * threads,), "f32")
    b.output(b.call(read, [b.input("data", (nbytes // 4,), "f32")], [out], work=work, demand=demand(sm=(1, sms))))
    return rounds * nbytes / _alone_seconds(bench, b.build(), sms)[0]


def _fma_rate(bench: _Bench, sms: int) -> float:
    """Multiplies and adds of every thread over the time of the kernel. A virtual device has no clock in its SMs: there
    the flops are the declared ones."""
    threads, cycles = 1024, bench.sizes.cycles
    declared = bench.device.rate("f32") * 1e-3
    kernel = bench.gpu.kernel("fma_probe", "probes")

    def burn(out: DeviceArray, steps: DeviceArray, stream: Any) -> None:
        args = (out.buffer.address, steps.buffer.address, np.int64(cycles))
        driver.launch_kernel(stream, kernel, (sms,), threads, args)

    b = GraphBuilder("burn")
    outs = [spec("values", (sms * threads,), "f32"), spec("steps", (sms * threads,), "i64")]
    b.output(*b.call(burn, [], outs, work=Work(flops=declared), demand=demand(sm=(1, sms))))
    seconds, outputs = _alone_seconds(bench, b.build(), sms)
    done = declared if bench.gpu.capability.virtual else 2.0 * float(outputs["steps"].sum())
    return done / seconds


def _copy_rate(bench: _Bench, direction: str) -> float:
    nbytes = bench.sizes.stream_bytes // 4
    b = GraphBuilder(direction)
    b.output(ops.copy(b.input("bytes", (nbytes,), "u8"), direction=direction, name="moved"))
    return nbytes / _alone_seconds(bench, b.build(), bench.device.sm_count)[0]


def _node_seconds(bench: _Bench, nodes: int = 200) -> float:
    """Seconds of one of a chain of small kernels."""
    b = GraphBuilder("chain")
    x = b.input("x", (8, 8), "f32")
    for i in range(nodes):
        x = ops.add(x, x, name=f"n{i}")
    b.output(x)
    graph = b.build()
    with bench.open(graph, plan(graph, bench.device, "sequential")) as executable:
        executable(x=torch.zeros(8, 8))
        return executable.replay_seconds(bench.sizes.rounds) / nodes


# ---------------------------------------------------------------------------------------------- overlaps


def _pairs(sizes: Sizes) -> Iterator[tuple[str, Graph]]:
    """Two independent ops that use different parts of a device."""
    rows = sizes.rows
    for name in ("decode attention", "a copy from the host", "an elementwise op"):
        b = GraphBuilder(f"gemm-{name.rpartition(' ')[2]}")
        x, w = b.input("x", (rows, rows), "bf16"), b.weight("w", (rows, rows), "bf16")
        product = ops.gemm(x, w, name="product")
        if name == "decode attention":
            cache = b.state("kv", (2, rows // 16, rows, 2, 64), "bf16")
            other = ops.decode_attention(b.input("q", (rows // 16, 8, 64), "bf16"), cache, name="attention")
        elif name == "an elementwise op":
            large = b.input("y", (8 * rows, rows), "bf16")
            other = ops.add(large, large, name="twice")
        else:
            other = ops.copy(b.input("page", (rows, rows), "f32"), direction="h2d", name="page_in")
        b.output(product, other)
        yield f"gemm beside {name}", b.build()


@contextmanager
def _store(path: Path | None, keep: bool) -> Iterator[ProfileDB]:
    """The profile database for measured times; a throw-away one where nothing is measured."""
    if keep:
        yield ProfileDB(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield ProfileDB(Path(folder) / "profiles.sqlite")


def _overlap(name: str, graph: Graph, bench: _Bench, database: Path | None, say: Say) -> Overlap:
    say(name)
    with _store(database, not bench.gpu.capability.virtual) as store:
        device = bench.name or bench.device
        tuned = autotune(graph, "cuda", bench.sizes.pair_budget_s, device=device, database=store, fresh=True)
    v = tuned.verdict
    compared = any(trial.measured_s is not None and trial.session != SAME for trial in tuned.trials)
    return Overlap(name, compared, v.choice, v.packed_s, v.sequential_s, v.error_band, tuned.reason)
