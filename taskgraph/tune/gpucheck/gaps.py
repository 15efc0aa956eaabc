"""Kernels in a chain on one lane: each begun at the end of the one before, or while that one runs, for which it waits
by itself (programmatic dependent launch). The cost model takes both for equal until this has measured them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from taskgraph.cost.gpu_report import GapTime
from taskgraph.graph.device import Device
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.ahead.products import gemm_launches
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.tune.gpucheck import cases
from taskgraph.tune.gpucheck.cases import Case, Scale
from taskgraph.tune.gpucheck.fast import Fast
from taskgraph.tune.gpucheck.rig import PartitionStream, Rig, Runner

if TYPE_CHECKING:
    from taskgraph.tune.gpucheck.run import Run


@dataclass(slots=True)
class Empty:
    """A kernel that does nothing but wait for the one before it."""

    kernel: Any
    device: Device
    dependent: bool = False
    name: str = "empty"

    def launch(self, lane: PartitionStream, turn: int) -> None:
        driver.launch_kernel(lane.stream, self.kernel, (lane.sms,), 32, (), dependent=self.dependent)

    def predicted_s(self, sms: int) -> float:
        return self.device.launch_seconds


def chained(scale: Scale, own_products: bool) -> list[Case]:
    """Small kernels of a step, each of whose launches follows the one before; products by our own kernel where a cubin
    of it can run."""
    rows = max(scale.rows // 16, 1)
    product = cases.gemm_case(f"gemm_{rows}x{scale.width}x{scale.width}", rows, scale.width, scale.width)
    kinds = [cases.elementwise_case(scale, kind, n) for kind in ("add", "rmsnorm", "swiglu") for n in (1, rows)]
    rope = replace(cases.rope_case(scale, rows), name=f"rope_{rows}")
    return [*kinds, rope, replace(product, rule=gemm_launches) if own_products else product]


@contextmanager
def runners(gpu: Gpu, device: Device, fast: Fast, case: Case | None) -> Iterator[list[Runner]]:
    """The kernel of a case, None for the empty one: launched after the end of the one before, and dependent."""
    if case is None:
        kernel = gpu.kernel("empty", "probes")
        yield [Empty(kernel, device), Empty(kernel, device, dependent=True)]
        return
    with cases.runner(case, gpu, device, fast) as plain, cases.runner(case, gpu, device, fast) as early:
        early.dependent = True
        yield [plain, early]


def timed(rig: Rig, device: Device, fast: Fast, case: Case | None) -> GapTime:
    """Seconds of a launch in a chain, both ways, in turns on one lane of the whole device."""
    gpu = rig.gpu
    with (
        runners(gpu, device, fast, case) as (plain, early),
        rig.lanes(gpu.capability.sm_count) as (lane,),
        rig.loop(plain, lane) as after,
        rig.loop(early, lane) as during,
    ):
        pairs = [(rig.alone_s(after), rig.alone_s(during)) for _ in range(1 if gpu.capability.virtual else 3)]
    return GapTime(plain.name, *(min(each) for each in zip(*pairs, strict=True)))


def chains(run: "Run") -> str:
    """Every small kernel in a chain, both ways."""
    if not run.gpu.capability.dependent:
        return "this device begins a kernel at the end of the one before"
    every = [None, *chained(run.scale, bool(run.gpu.ahead("gemm")))]
    rows: list[GapTime] = []
    for case in every:
        if run.clock.over:
            break
        made = run.tried(case.name if case else "empty", partial(timed, run.rig, run.device, run.fast, case))
        rows += [made] if made else []
    run.keep(replace(run.report, gaps=tuple(rows)))
    told = ", ".join(f"{row.kernel} {(row.after_end_s - row.dependent_s) * 1e6:.2f} us" for row in rows)
    return f"{len(rows)} of {len(every)} kernels; less a node, when it begins while the one before runs: {told}"
