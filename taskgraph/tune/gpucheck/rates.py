"""Rates of a device from probes of our own: memory and arithmetic on several partitions, copies, the cost of a node."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import taskgraph.ops as ops
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Work, demand, spec
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.arrays import DeviceArray
from taskgraph.schedule.planner import plan
from taskgraph.tune.fill import fill
from taskgraph.tune.gpucheck.checks import Bench
from taskgraph.tune.measure import on_partition


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large probes are: a real device needs work that lasts, a virtual one runs it on the host."""

    stream_bytes: int
    cycles: int
    rounds: int


REAL = Sizes(stream_bytes=1 << 28, cycles=2_000_000, rounds=5)
VIRTUAL = Sizes(stream_bytes=1 << 20, cycles=1000, rounds=1)


def rates(bench: Bench, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Rates by what was run, in SI units; a partition's name says its SMs."""
    device = bench.device
    steps = sorted({device.sm_min, *(_near(device, share) for share in (0.25, 0.5, 0.75)), device.sm_count})
    for sms in steps:
        yield f"hbm_read_bytes_per_s on {sms} SMs", _read_rate(bench, sizes, sms)
    for sms in steps:
        yield f"fma_flops_per_s on {sms} SMs", _fma_rate(bench, sizes, sms)
    for direction in ("h2d", "d2h"):
        yield f"{direction}_bytes_per_s", _copy_rate(bench, sizes, direction)
    for name, dependent in (("graph_node_s", False), ("dependent_node_s", True)):
        if not dependent or bench.gpu.capability.dependent:
            with bench.launching(dependent):
                yield name, _node_seconds(bench, sizes)


def _near(device: Device, share: float) -> int:
    return min(device.partition_sizes(), key=lambda size: abs(size - share * device.sm_count))


def _alone_seconds(bench: Bench, sizes: Sizes, graph: Graph, sms: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Median seconds of the only op of `graph` on `sms` SMs, and its outputs."""
    made = on_partition(plan(graph, bench.device, "sequential"), graph, sms)
    with bench.open(graph, made) as executable:
        outputs = executable(fill(graph.flat(), {}, seed=3))
        spans = [executable.timeline().spans[0] for _ in range(sizes.rounds)]
    return statistics.median(span.end_s - span.start_s for span in spans), outputs


def _read_rate(bench: Bench, sizes: Sizes, sms: int) -> float:
    nbytes, threads, rounds = sizes.stream_bytes, 1024, 4
    kernel = bench.gpu.kernel("bandwidth_probe", "probes")  # loaded here: a capture permits no loading

    def read(data: DeviceArray, out: DeviceArray, stream: Any) -> None:
        args = (data.buffer.address, out.buffer.address, np.int64(nbytes // 16), np.int32(rounds))
        driver.launch_kernel(stream, kernel, (2 * sms,), threads, args)

    b = GraphBuilder("read")
    work, out = Work(hbm_bytes=float(rounds * nbytes)), spec("sums", (2 * sms * threads,), "f32")
    b.output(b.call(read, [b.input("data", (nbytes // 4,), "f32")], [out], work=work, demand=demand(sm=(1, sms))))
    return rounds * nbytes / _alone_seconds(bench, sizes, b.build(), sms)[0]


def _fma_rate(bench: Bench, sizes: Sizes, sms: int) -> float:
    """Multiplies and adds of every thread over the time of the kernel. A virtual device has no clock in its SMs: there
    the flops are the declared ones."""
    threads, cycles = 1024, sizes.cycles
    declared = bench.device.rate("f32") * 1e-3
    kernel = bench.gpu.kernel("fma_probe", "probes")

    def burn(out: DeviceArray, steps: DeviceArray, stream: Any) -> None:
        args = (out.buffer.address, steps.buffer.address, np.int64(cycles))
        driver.launch_kernel(stream, kernel, (sms,), threads, args)

    b = GraphBuilder("burn")
    outs = [spec("values", (sms * threads,), "f32"), spec("steps", (sms * threads,), "i64")]
    b.output(*b.call(burn, [], outs, work=Work(flops=declared), demand=demand(sm=(1, sms))))
    seconds, outputs = _alone_seconds(bench, sizes, b.build(), sms)
    done = declared if bench.gpu.capability.virtual else 2.0 * float(outputs["steps"].sum())
    return done / seconds


def _copy_rate(bench: Bench, sizes: Sizes, direction: str) -> float:
    nbytes = sizes.stream_bytes // 4
    b = GraphBuilder(direction)
    b.output(ops.copy(b.input("bytes", (nbytes,), "u8"), direction=direction, name="moved"))
    return nbytes / _alone_seconds(bench, sizes, b.build(), bench.device.sm_count)[0]


def _node_seconds(bench: Bench, sizes: Sizes, nodes: int = 200) -> float:
    """Seconds of one of a chain of small kernels."""
    b = GraphBuilder("chain")
    x = b.input("x", (8, 8), "f32")
    for i in range(nodes):
        x = ops.add(x, x, name=f"n{i}")
    b.output(x)
    graph = b.build()
    with bench.open(graph, plan(graph, bench.device, "sequential")) as executable:
        executable(x=torch.zeros(8, 8))
        return executable.replay_seconds(sizes.rounds) / nodes
