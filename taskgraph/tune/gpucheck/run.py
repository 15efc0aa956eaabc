"""The run of gpu-check: sections one after another, each on its own, the report written after each of them.

The time is shared among the sections by weight, the most telling first; what one leaves goes to those behind it. A
section that fails is recorded with its error, and the next one begins.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from taskgraph.cache import write_atomically
from taskgraph.cost.gpu_report import GpuReport, Section
from taskgraph.errors import DeviceError
from taskgraph.graph.device import Device, get, make
from taskgraph.graph.graph import Graph
from taskgraph.runtime.gpu.driver import Capability, Gpu
from taskgraph.runtime.gpu.spec import planning_device
from taskgraph.tune.gpucheck import cases, gaps, overlaps, rates, tables
from taskgraph.tune.gpucheck.checks import CHECKS, Bench, checked
from taskgraph.tune.gpucheck.fast import REFERENCES, Fast
from taskgraph.tune.gpucheck.plans import Planning
from taskgraph.tune.gpucheck.power import Meter
from taskgraph.tune.gpucheck.rig import Rig

T = TypeVar("T")
Say = Callable[[str], None]
MINUTES = 4.0
"""What a run takes at most unless told otherwise."""
_NEAREST = {8: "a100_sxm", 9: "h100_sxm", 10: "b200_sxm", 12: "rtx5090"}
"""Compute capability, major -> the published device whose rates stand in for one that is not published."""


class Clock:
    """Seconds that are left of the run, and of the section that is under way."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds
        self._until = self._end

    @property
    def left_s(self) -> float:
        """Seconds left of the run; none below 0."""
        return max(self._end - self._now(), 0.0)

    def give(self, share: float) -> float:
        """Give the next section `share` of what is left; its seconds."""
        self._until = self._now() + self.left_s * share
        return self._until - self._now()

    @property
    def section_s(self) -> float:
        """Seconds left of the section."""
        return max(self._until - self._now(), 0.0)

    @property
    def over(self) -> bool:
        """Whether the section's time is over."""
        return self._now() >= self._until


@dataclass(slots=True)
class Run:
    """A run under way: the device, the report so far, and where it is written."""

    gpu: Gpu
    device: Device
    name: str | None
    out: Path
    say: Say
    clock: Clock
    graphs: Mapping[str, Graph]
    report: GpuReport
    rig: Rig = field(init=False)
    bench: Bench = field(init=False)
    planning: Planning = field(init=False)
    fast: Fast = field(default_factory=Fast)
    lost: list[str] = field(default_factory=list)
    """What failed in the section that is under way, while the rest of it went on."""

    def __post_init__(self) -> None:
        virtual = bool(self.gpu.capability.virtual)
        meter = None if virtual else Meter.find(str(self.gpu.device.pci_bus_id))
        self.rig, self.bench = Rig(self.gpu, meter), Bench(self.gpu, self.device, self.name)
        self.planning = Planning(self.graphs, self.device)

    @property
    def scale(self) -> cases.Scale:
        """How large the kernels are."""
        return cases.SMALL if self.gpu.capability.virtual else cases.LARGE

    def keep(self, report: GpuReport) -> None:
        """Take the report as it is by now and write it, with its tables."""
        self.report = report
        write_atomically(self.out, self.report.to_json())
        for name, text in self.report.tables().items():
            write_atomically(self.out.parent / name, text)

    def tried(self, what: str, body: Callable[[], T]) -> T | None:
        """What `body` gives; None where it fails, which the section tells."""
        try:
            return body()
        except Exception as error:
            self.lost.append(f"{what}: {' '.join(f'{type(error).__name__}: {error}'.split())}")
            self.say(self.lost[-1])
            return None

    def section(self, name: str, body: Callable[["Run"], str], share: float) -> None:
        """Run one section with its share of the time, whatever happens in it."""
        given = self.clock.give(share)
        self.say(f"{name} ({given:.0f} s)")
        begin = time.monotonic()
        self.lost.clear()
        try:
            text = body(self)
            state = "partly" if self.clock.over or self.lost else "done"
            text += f"; {len(self.lost)} failed, the first: {self.lost[0]}" if self.lost else ""
        except Exception as error:
            state, text = "failed", " ".join(f"{type(error).__name__}: {error}".split())
        made = Section(name, state, text, round(time.monotonic() - begin, 3))
        self.say(f"{name}: {state}, {text}")
        self.keep(replace(self.report, sections=(*self.report.sections, made)))


def _checks(run: Run) -> str:
    for name, check in CHECKS.items():
        run.say(name)
        run.keep(replace(run.report, checks=(*run.report.checks, checked(name, check, run.bench))))
    held, asked = (sum(getattr(c, what) for c in run.report.checks if c.asked) for what in ("passed", "asked"))
    return f"{held} of {asked} hold"


def _rates(run: Run) -> str:
    sizes = rates.VIRTUAL if run.gpu.capability.virtual else rates.REAL
    for name, rate in rates.rates(run.bench, sizes):
        run.keep(replace(run.report, calibration={**(run.report.calibration or {}), name: rate}))
        if run.clock.over:
            break
    return f"{len(run.report.calibration or {})} rates"


def _overlaps(run: Run) -> str:
    """Each pair gets what is left, shared by the pairs that are left."""
    found = list(overlaps.pairs(run.scale.rows))
    budgets = 1.0 if run.gpu.capability.virtual else None
    for i, (name, graph) in enumerate(found):
        run.say(name)
        left_s = run.clock.left_s / (len(found) - i)
        made = overlaps.overlap(name, graph, run.bench, budgets or min(left_s, 10.0))
        run.keep(replace(run.report, overlaps=(*run.report.overlaps, made)))
    return f"{sum(o.compared for o in run.report.overlaps)} of {len(found)} pairs were compared"


def _kernels(run: Run) -> str:
    """Which implementations are right on this device; the virtual one runs our own."""
    run.fast = cases.verified(run.gpu, run.device)
    if run.gpu.capability.virtual:
        return "our own kernels"
    told = "".join(f"; left out {why}" for why in run.fast.left_out)
    return ", ".join(f"{k} by {run.fast.name_of(k, run.gpu.ahead(k))}" for k in ("gemm", *REFERENCES)) + told


SECTIONS: tuple[tuple[str, Callable[[Run], str], float], ...] = (
    ("kernels to time", _kernels, 8.0),
    ("products", tables.products, 15.0),
    ("kernels by SMs", tables.kernels_by_sms, 30.0),
    ("pairs in partitions", tables.partition_pairs, 45.0),
    ("pairs on shared lanes", tables.shared_pairs, 12.0),
    ("whole plans", tables.whole_plans, 40.0),
    ("power", tables.power, 35.0),
    ("checks", _checks, 25.0),
    ("kernels of a layer", tables.layer_kernels, 8.0),
    ("rates", _rates, 8.0),
    ("kernels in a chain", gaps.chains, 4.0),
    ("overlap by autotune", _overlaps, 20.0),
)
"""Name, body, and seconds in a run of four minutes: the weights by which time is shared."""


def run(
    device: str | None = None,
    out: Path = Path("gpu-check.json"),
    *,
    minutes: float = MINUTES,
    graphs: Mapping[str, Graph] | None = None,
    say: Say = lambda text: None,
) -> GpuReport:
    """The report on this machine's GPU, or on the virtual one that `device` names, in at most `minutes`; it is at `out`
    after every section, with CSV tables beside it. BackendUnavailable without a GPU.

    `graphs` are the steps, by name, whose whole plans are measured."""
    begin = time.monotonic()
    gpu = Gpu.open(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    started = GpuReport(
        kind="simulated" if gpu.capability.virtual else "measured",
        device=planning_target(gpu, device),
        capability=gpu.capability.describe(),
        driver_version=gpu.capability.driver_version,
        compute_capability=gpu.capability.compute_capability,
        notes=gpu.capability.notes,
        versions=dict(_versions()),
    )
    made = Run(gpu, started.device, device, out, say, Clock(60.0 * minutes), graphs or {}, started)
    made.keep(started)
    with made.planning:
        for i, (name, body, weight) in enumerate(SECTIONS):
            rest = sum(w for _, _, w in SECTIONS[i:])
            made.section(name, body, weight / rest)
    made.keep(replace(made.report, seconds=round(time.monotonic() - begin, 3)))
    return made.report


def planning_target(gpu: Gpu, device: str | None) -> Device:
    """The device to plan for: the published one of that name, else the nearest with what the driver says."""
    try:
        return planning_device(device)
    except DeviceError:
        found = gpu.capability
        return _unpublished(found, gpu.memory_bytes())


def _unpublished(found: Capability, memory_bytes: int) -> Device:
    base = get("l40s" if found.compute_capability == (8, 9) else _NEAREST.get(found.compute_capability[0], "a100_sxm"))
    name = "_".join("".join(c if c.isalnum() else " " for c in found.device.lower()).split())
    return make(base, name, sm_count=found.sm_count, memory_bytes=memory_bytes)


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "taskgraph", metadata.version("taskgraph-gpu")
    for package in ("cuda-core", "cuda-bindings", "torch", "triton", "numpy"):
        with _absent():
            yield package, metadata.version(package)


@contextmanager
def _absent() -> Iterator[None]:
    """A package that is not installed has no version."""
    try:
        yield
    except metadata.PackageNotFoundError:
        return


def summary(report: GpuReport) -> str:
    """The report for people."""
    lines = [report.capability]
    lines += [f"{s.state:<6} {s.name}: {s.text} ({s.seconds:.1f} s)" for s in report.sections]
    lines += [f"{_mark(c.asked, c.passed)} {c.name}: {c.seen}" for c in report.checks]
    lines += [f"{name}: {value:.4g} ({report.kind})" for name, value in (report.calibration or {}).items()]
    lines += [f"{o.pair}: {'' if o.compared else 'NOT COMPARED, '}{o.reason}" for o in report.overlaps]
    return "\n".join([*lines, f"{tally(report)}; all times and rates are {report.kind}."])


def _mark(asked: bool, passed: bool) -> str:
    return "--  " if not asked else "ok  " if passed else "FAIL"


def tally(report: GpuReport) -> str:
    """How many checks hold of those that were asked, how many pairs were compared of those that were to be, and which
    sections failed."""
    asked = [c for c in report.checks if c.asked]
    held, skipped = sum(c.passed for c in asked), len(report.checks) - len(asked)
    compared, pairs = sum(o.compared for o in report.overlaps), len(report.overlaps)
    failed = [s.name for s in report.sections if s.state == "failed"]
    broken = f"; failed: {', '.join(failed)}" if failed else ""
    return (
        f"{held} of {len(asked)} checks hold{f', {skipped} not asked' if skipped else ''}; "
        f"{compared} of {pairs} pairs were compared{broken}"
    )
