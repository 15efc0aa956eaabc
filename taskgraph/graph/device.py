"""Devices: published specs with a source for every number, hypothetical ones, and this machine's CPU."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from taskgraph.errors import DeviceError
from taskgraph.network.cluster import Network, network
from taskgraph.record import Typed, convert, decode, integer, read_text, shown, text

KINDS = ("gpu", "cpu")
LEAST_SHARE = 1e-6
MOST_SMS = 1 << 16
"""SMs or cores of a device, at most."""
LEAST_RATE, MOST_RATE, MOST_SECONDS = 1e-3, 1e30, 1e6
"""Rates and sizes, and the longest launch, so that times and their sums are finite."""


@dataclass(frozen=True, slots=True)
class Partition(Typed, error=DeviceError):
    """A contiguous set of SMs (or cores): [first_sm, first_sm + sm_count)."""

    first_sm: int
    sm_count: int

    @property
    def end_sm(self) -> int:
        return self.first_sm + self.sm_count


@dataclass(frozen=True, slots=True)
class Geometry(Typed, error=DeviceError):
    """Disjoint partitions that exist at the same time."""

    partitions: tuple[Partition, ...]

    @staticmethod
    def of(*sizes: int) -> "Geometry":
        """Partitions of the given sizes, laid side by side; DeviceError for a size below 1."""
        sizes = tuple(integer("the size of a partition", size, DeviceError, 1, MOST_SMS) for size in sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return Geometry(tuple(Partition(start, size) for start, size in zip(starts, sizes, strict=True)))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(p.sm_count for p in self.partitions)


@dataclass(frozen=True, slots=True)
class Device(Typed, error=DeviceError):
    """A real, hypothetical or host device.

    `sm_count` SMs (cores of a CPU) that are split in multiples of `sm_granularity`, at least `sm_min`
    to a partition. `flops_per_s` is dense peak FLOP/s of the whole device by dtype; "f32" also rates
    the non-tensor ops. `sm_hbm_bytes_per_s` is what one SM can draw at most. Copy and link rates are
    bytes/s in one direction; 0 means the device has none. `launch_seconds` is the cost of one node
    in a replayed graph, `switch_seconds` of a change of geometry within a plan. `compute_scaling[k-1]`
    is the measured share of the full compute rate on k SMs; empty means linear. `calibration` names the
    fitted coefficients that the cost model uses, those of the device or of its nearest relation, or is the path
    of a file of them (NAME.json); empty is a plain roofline. `l2_bytes` is the last-level cache, 0 if unknown.
    `network` is what collectives run over; None prices them by `link_bytes_per_s` alone.
    DeviceError, naming the field, for what is no such number, contradicts another one, or lies beyond every device
    (MOST_SMS, MOST_RATE).
    """

    name: str
    kind: str
    sm_count: int
    sm_granularity: int
    sm_min: int
    flops_per_s: tuple[tuple[str, float], ...]
    hbm_bytes_per_s: float
    sm_hbm_bytes_per_s: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    link_bytes_per_s: float
    memory_bytes: int
    launch_seconds: float
    switch_seconds: float
    compute_scaling: tuple[float, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    l2_bytes: int = 0
    calibration: str = ""
    network: Network | None = field(default=None, repr=False)

    _LATER: ClassVar[frozenset[str]] = frozenset({"l2_bytes", "calibration", "network"})

    def _check(self) -> None:
        if not self.name or self.kind not in KINDS:
            raise DeviceError(
                f"device {self.name!r}: needs a name and a kind, {' or '.join(KINDS)}; got {self.kind!r}."
            )
        if not 1 <= self.sm_min <= self.sm_count <= MOST_SMS or not 1 <= self.sm_granularity <= MOST_SMS:
            raise DeviceError(
                f"device {self.name!r}: needs 1 <= sm_min <= sm_count <= {MOST_SMS} and sm_granularity >= 1; got "
                f"{self.sm_min}, {self.sm_count} and {self.sm_granularity}."
            )
        flops = dict(self.flops_per_s)
        if len(flops) < len(self.flops_per_s) or len(dict(self.sources)) < len(self.sources):
            raise DeviceError(f"device {self.name!r}: a dtype of flops_per_s or a name of sources stands twice.")
        positive = [self.hbm_bytes_per_s, self.sm_hbm_bytes_per_s, self.memory_bytes, *flops.values()]
        if not all(LEAST_RATE <= x <= MOST_RATE for x in positive) or "f32" not in flops:
            raise DeviceError(
                f"device {self.name!r}: compute rates (f32 among them), bandwidths and memory must be > 0, from "
                f"{LEAST_RATE:g} to {MOST_RATE:g}."
            )
        for name in ("h2d_bytes_per_s", "d2h_bytes_per_s", "link_bytes_per_s", "l2_bytes"):
            if not (getattr(self, name) == 0 or LEAST_RATE <= getattr(self, name) <= MOST_RATE):
                raise DeviceError(f"device {self.name!r}: {name} is {getattr(self, name)}; it must be finite and >= 0.")
        for name in ("launch_seconds", "switch_seconds"):
            if not 0 <= getattr(self, name) <= MOST_SECONDS:
                raise DeviceError(
                    f"device {self.name!r}: {name} is {getattr(self, name)}; it must be from 0 to {MOST_SECONDS:g}."
                )
        if self.network is not None and not self.link_bytes_per_s:
            raise DeviceError(f"device {self.name!r} is on a network; link_bytes_per_s must be what it sends there.")
        if self.compute_scaling and len(self.compute_scaling) != self.sm_count:
            raise DeviceError(f"device {self.name!r}: compute_scaling needs one entry an SM, {self.sm_count} in all.")
        if not all(LEAST_SHARE <= share <= 1 for share in self.compute_scaling):
            raise DeviceError(f"device {self.name!r}: compute_scaling holds shares from {LEAST_SHARE:g} to 1.")

    def rate(self, dtype: str) -> float:
        """Dense FLOP/s of the whole device for `dtype`, or for f32 where the device lists none for it."""
        rates = dict(self.flops_per_s)
        return rates.get(text("a dtype", dtype, DeviceError), rates["f32"])

    def compute_share(self, sms: int) -> float:
        """The share of the device's compute rate that `sms` SMs have; DeviceError for more than there are."""
        sms = integer("the number of SMs", sms, DeviceError, 1, self.sm_count)
        if self.compute_scaling:
            return self.compute_scaling[sms - 1]
        return sms / self.sm_count

    def partition_sizes(self) -> tuple[int, ...]:
        """Every legal partition size, the whole device last."""
        step = self.sm_granularity
        first = -(-self.sm_min // step) * step
        return (*range(first, self.sm_count, step), self.sm_count)

    def splits(self) -> tuple[Geometry, ...]:
        """Geometries of the whole device and of two and four legal partitions (equal and unequal)."""
        sizes = self.partition_sizes()[:-1]
        halves = [s for s in sizes if 2 * s <= self.sm_count]
        found = [Geometry.of(self.sm_count)]
        for small in sorted({halves[int(i * (len(halves) - 1) / 3)] for i in range(4)} if halves else ()):
            large = max(s for s in sizes if small + s <= self.sm_count)
            found.append(Geometry.of(large, small))
        quarters = [s for s in sizes if 4 * s <= self.sm_count]
        return (*found, *([Geometry.of(*[quarters[-1]] * 4)] if quarters else []))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_json(text: str) -> "Device":
        """The device in the JSON of what `to_dict` gave; DeviceError, with the place in the document, if it is none."""
        return decode(Device, text, DeviceError, "device file", "Write Device.to_dict() as JSON.")

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> "Device":
        """The device that `to_dict` wrote; DeviceError when a field is missing (other than those that came later) or
        unknown."""
        return convert(Device, body, DeviceError, "device", "Write it with Device.to_dict().")


# -------------------------------------------------------------------------------- published devices


@dataclass(frozen=True, slots=True)
class _Gpu:
    """An entry of datasheets.toml, which says what its fields are."""

    source: str
    driver_names: tuple[str, ...]
    sm_count: int
    tflops: Mapping[str, float]
    hbm_gb_per_s: float
    pcie_gb_per_s: float
    link_gb_per_s: float
    memory_gb: float
    l2_mb: float
    partitions: str
    calibration: str


@dataclass(frozen=True, slots=True)
class _Partitions:
    sm_granularity: int
    sm_min: int
    source: str


@dataclass(frozen=True, slots=True)
class _Assumed:
    saturating_share: float
    launch_seconds: float
    switch_seconds: float


@dataclass(frozen=True, slots=True)
class _Datasheets:
    gpu: Mapping[str, _Gpu]
    partitions: Mapping[str, _Partitions]
    assumed: _Assumed
    sources: Mapping[str, str]

    def _check(self) -> None:
        lost = next((gpu.partitions for gpu in self.gpu.values() if gpu.partitions not in self.partitions), None)
        if lost is not None:
            raise DeviceError(f"no partitions {lost!r}; there are {', '.join(self.partitions)}.")

    def device(self, name: str) -> Device:
        """The entry of that name in SI units."""
        gpu, assumed = self.gpu[name], self.assumed
        rule = self.partitions[gpu.partitions]
        told = {field: text.format(sheet=gpu.source, partitions=rule.source) for field, text in self.sources.items()}
        return Device(
            name=name,
            kind="gpu",
            sm_count=gpu.sm_count,
            sm_granularity=rule.sm_granularity,
            sm_min=rule.sm_min,
            flops_per_s=tuple(sorted((dtype, rate * 1e12) for dtype, rate in gpu.tflops.items())),
            hbm_bytes_per_s=gpu.hbm_gb_per_s * 1e9,
            sm_hbm_bytes_per_s=gpu.hbm_gb_per_s * 1e9 / (gpu.sm_count * assumed.saturating_share),
            h2d_bytes_per_s=gpu.pcie_gb_per_s * 1e9,
            d2h_bytes_per_s=gpu.pcie_gb_per_s * 1e9,
            link_bytes_per_s=gpu.link_gb_per_s * 1e9,
            memory_bytes=int(gpu.memory_gb * 1e9),
            launch_seconds=assumed.launch_seconds,
            switch_seconds=assumed.switch_seconds,
            sources=tuple(sorted(told.items())),
            l2_bytes=int(gpu.l2_mb * 1e6),
            calibration=gpu.calibration,
        )


def read_datasheets(text: str) -> dict[str, Device]:
    """The devices of a file like datasheets.toml, by name; DeviceError, with the place in it, if it is none."""
    sheets = _datasheets(text)
    return {name: sheets.device(name) for name in sheets.gpu}


def _datasheets(text: str) -> _Datasheets:
    import tomllib  # most that import this module ask for no published device

    way_out = "See the head of datasheets.toml."
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"not a datasheet file: {error}. {way_out}") from error
    return convert(_Datasheets, body, DeviceError, "datasheet file", way_out)


@cache
def _published() -> _Datasheets:
    return _datasheets((Path(__file__).parent / "datasheets.toml").read_text(encoding="utf-8"))


@cache
def _spec(name: str) -> Device:
    return _published().device(name)


def names() -> tuple[str, ...]:
    """Every device name that `get` takes."""
    return (*_published().gpu, "cpu")


def reported_as(name: str) -> Device | None:
    """The published device whose driver reports this name ("NVIDIA H100 80GB HBM3"); None for any other."""
    words = f" {name}"
    for spec, gpu in _published().gpu.items():
        if any(f" {known}" in words for known in gpu.driver_names):
            return _spec(spec)
    return None


def get(device: "str | Device") -> Device:
    """The device of that name; "cpu" is this machine, probed once and cached. A Device is returned as it is,
    "virtual:NAME", on which the cuda backend can run, is the spec of NAME, and NAME.json is read from that file."""
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise DeviceError(f"a device is a name or a Device; got {shown(device)}. Names are {', '.join(names())}.")
    device = device.removeprefix("virtual:")
    if device == "cpu":
        return _this_machine()
    if device.endswith(".json"):
        return read_device(device)
    if device not in _published().gpu:
        raise DeviceError(
            f"unknown device {shown(device)}; choose one of {', '.join(names())} or make one with devices.make()."
        )
    return _spec(device)


def read_device(path: str | Path) -> Device:
    """The device in a file of `taskgraph calibrate` or of Device.to_dict(); coefficients that it names by a file lie
    beside it. DeviceError, with the file's name, when it is none."""
    try:
        made = Device.from_json(read_text(path, DeviceError, "device file"))
    except DeviceError as error:
        raise error if str(path) in str(error) else DeviceError(f"{path}: {error}") from None
    if made.calibration.endswith(".json"):
        return replace(made, calibration=str((Path(path).parent / made.calibration).resolve()))
    return made


def make(base: str | Device, name: str | None = None, **changes: Any) -> Device:
    """A hypothetical device: `make("h100_sxm", sm_count=144, hbm_bytes_per_s=4e12)`; the rest is as in `base`.

    Rates by dtype may be a dict, `network` a text as for `networked`. DeviceError for a field that a device has not, or
    a value that it cannot have."""
    origin = get(base)
    if name is not None:
        text("the name of a device", name, DeviceError)
    unknown = set(changes) - {f.name for f in fields(Device)}
    if unknown:
        raise DeviceError(f"a device has no {', '.join(sorted(unknown))}.")
    changes = {key: tuple(value.items()) if isinstance(value, dict) else value for key, value in changes.items()}
    if changes.get("network") is not None:
        origin = networked(origin, changes.pop("network"))
    given = dict(origin.sources) | dict.fromkeys(sorted(changes), f"hypothetical, from {origin.name}")
    sources = tuple(given.items())
    return replace(origin, name=name or f"{origin.name}*", **{"sources": sources, "compute_scaling": (), **changes})


def networked(device: str | Device, value: "str | Network", routing: str = "", algorithm: str = "") -> Device:
    """The device on a network, whose times collectives take then: `networked("h100_sxm", "torus:4x4x4", "goal")`. A
    text is as for `taskgraph.network.network`; without rates in it the device's link is shared out to its links there.
    `link_bytes_per_s` becomes what all of them send. NetworkError for what is no network."""
    origin = get(device)
    made = network(value, routing, algorithm, origin.link_bytes_per_s)
    told = {**dict(origin.sources), "network": f"hypothetical: {made.name}"}
    return replace(
        origin,
        network=made,
        link_bytes_per_s=made.topology.injection_bytes_per_s(),
        sources=tuple(told.items()),
    )


def iter_specs() -> Iterator[Device]:
    """The built-in GPU specs."""
    return map(_spec, _published().gpu)


@cache
def _this_machine() -> Device:
    """The CPU as the probe measured it. The probe needs torch and quiet threads, so it is a process of its own."""
    command = [sys.executable, "-m", "taskgraph.runtime.cpu.probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.home())
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DeviceError(f"probing this machine failed: {tail[0]}. Run `{' '.join(command)}` to see why.")
    return Device.from_json(done.stdout.strip().splitlines()[-1])
