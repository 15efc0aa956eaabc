"""The virtual driver from Python: build it, load it in place of NVIDIA's, talk to its control channel.

It is a `libcuda.so.1` of our own (`cuda/virtual/`). Loaded before anything asks for the driver, the unmodified
cuda.core runs on it: the dynamic linker hands out the library of that name that is there already. Everything it says
about time is simulated: durations come from this package's evaluator and cost formulas, never from C++.
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from taskgraph.cache import place as cache_place
from taskgraph.errors import BackendUnavailable, DeviceError
from taskgraph.graph.device import Device, get

PREFIX = "virtual:"
DRIVER_VERSION = 13050
"""What the virtual driver says it is unless told otherwise: CUDA 13.5."""

_COMPUTE_CAPABILITY = {
    "a100_sxm": (8, 0), "h100_sxm": (9, 0), "h200_sxm": (9, 0), "b200_sxm": (10, 0), "l40s": (8, 9), "rtx5090": (12, 0),
}  # fmt: skip
"""NVIDIA, "CUDA GPU compute capability"."""
_LEAST_GROUPS = {("h100_sxm", 132): 15, ("h200_sxm", 132): 15}
"""Device and its SMs -> how many groups of the least size it splits into, where that is less than their quotient: 15
groups of 8 and a rest of 12 were seen on an H200 (driver 13.0), for its clusters of SMs are not all alike."""

_FLAGS = ("-std=c++17", "-fPIC", "-pthread", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-fno-gnu-unique")
_KERNEL_FLAGS = ("-O2", "-ffp-contract=off", "-Wno-unknown-pragmas")
_DRIVER_FLAGS = ("-O1", "-fvisibility=hidden")


def is_virtual(device: str | Device | None) -> bool:
    """Whether the name asks for the virtual driver: "virtual:h100_sxm"."""
    return isinstance(device, str) and device.startswith(PREFIX)


def spec_of(device: str) -> Device:
    """The Device behind "virtual:NAME"; DeviceError for a name that is not a GPU."""
    spec = get(device.removeprefix(PREFIX))
    if spec.kind != "gpu":
        raise DeviceError(f"{device!r} is not a GPU; choose one that `taskgraph devices` lists.")
    return spec


def compute_capability(device: Device) -> tuple[int, int]:
    """That of a published device or of one made from it; else by the rule of its partitions (8 SMs: 9.0, else 8.0)."""
    names = (device.name, *(text.removeprefix("hypothetical, from ") for _, text in device.sources))
    known = next((_COMPUTE_CAPABILITY[name] for name in names if name in _COMPUTE_CAPABILITY), None)
    return known or ((9, 0) if device.sm_granularity >= 8 else (8, 0))


# --------------------------------------------------------------------------------------------- building


def sources() -> Path:
    """The folder `cuda/` of the package: kernels and the virtual driver's sources."""
    folder = resources.files("taskgraph") / "cuda"
    return Path(str(folder))


def _compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise BackendUnavailable("the virtual driver is built with g++, which is not here; install a C++17 compiler.")
    return found


def _built(
    name: str, inputs: Sequence[Path], flags: Sequence[Sequence[str]], link: Sequence[str], extra: Sequence[Path]
) -> Path:
    """The cached shared library of `inputs`, built if no process has; keyed by compiler, flags and every source."""
    compiler = _compiler()
    version = subprocess.run([compiler, "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=True)
    digest = hashlib.blake2b(repr((version.stdout, flags, link)).encode(), digest_size=12)
    for path in sorted({*inputs, *extra}):
        digest.update(path.name.encode() + path.read_bytes())
    target = cache_place("virtual", digest.hexdigest(), name)
    if not target.exists():
        try:
            _build(target, compiler, inputs, flags, link)
        except OSError as error:
            place = str(target.parent)
            raise BackendUnavailable(
                f"the virtual driver cannot be built in {place!r}: {error.strerror or error}. Free space, or set "
                "XDG_CACHE_HOME to a folder that can be written."
            ) from error
    return target


def _build(
    target: Path, compiler: str, inputs: Sequence[Path], flags: Sequence[Sequence[str]], link: Sequence[str]
) -> None:
    """Compile and link `inputs` beside `target`, and move the library there in one step."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{path.name}.o" for path in inputs]
        jobs = [
            [compiler, *mine, "-c", str(source), "-o", str(made)]
            for mine, source, made in zip(flags, inputs, objects, strict=True)
        ]
        _run_all(jobs, len(os.sched_getaffinity(0)))
        made = Path(folder) / target.name
        _run_all([[compiler, "-shared", "-pthread", *map(str, objects), *link, "-ldl", "-o", str(made)]], 1)
        made.replace(target)


def _run_all(commands: Sequence[Sequence[str]], at_once: int) -> None:
    """Run compilers side by side; BackendUnavailable with the first message of one that fails."""
    waiting, running = list(reversed(commands)), list[subprocess.Popen[str]]()
    failed = ""
    while waiting or running:
        while waiting and len(running) < at_once and not failed:
            running.append(subprocess.Popen(waiting.pop(), stderr=subprocess.PIPE, text=True))
        if not running:
            break
        process = running.pop(0)
        _, message = process.communicate()
        if process.returncode:
            failed = failed or message
    if failed:
        raise BackendUnavailable(f"building the virtual driver failed: {failed.strip().splitlines()[0]}")


def driver_library() -> Path:
    """The virtual `libcuda.so.1`, built on first use."""
    folder = sources() / "virtual"
    inputs = sorted(path for path in folder.glob("*.cpp") if path.name != "host_table.cpp")
    exports = folder / "exports.map"
    link = ["-Wl,-soname,libcuda.so.1", f"-Wl,--version-script={exports}"]
    flags = [[*_FLAGS, *_DRIVER_FLAGS]] * len(inputs)
    return _built("libcuda.so.1", inputs, flags, link, [*folder.glob("*.h"), exports])


def kernel_library(kernels: Sequence[Path] | None = None) -> Path:
    """Kernels compiled for the host: those of the package, or the given .cu files."""
    folder = sources() / "virtual"
    inputs = sorted((sources() / "kernels").glob("*.cu")) if kernels is None else list(kernels)
    beside = {path.parent for path in inputs} | {sources() / "kernels"}
    shared = [*folder.glob("*.h"), *(header for place in beside for header in place.glob("*.cuh"))]
    include = ["-include", str(folder / "host.h"), "-I", str(folder), "-I", str(sources() / "kernels")]
    flags = [*([*_FLAGS, *_KERNEL_FLAGS, *include, "-x", "c++"] for _ in inputs), [*_FLAGS, "-I", str(folder)]]
    link = [f"-Wl,--version-script={folder / 'exports.map'}"]
    return _built("libtaskgraph_kernels.so", [*inputs, folder / "host_table.cpp"], flags, link, shared)


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, slots=True)
class Settings:
    """What the virtual device is and which faults it injects. `fail_alloc`, `fail_launch` and `lose_device` count:
    the n-th allocation, kernel or piece of work from now on fails; 0 is never."""

    device: Device
    driver_version: int = DRIVER_VERSION
    seed: int = 1
    fail_alloc: int = 0
    fail_launch: int = 0
    lose_device: int = 0
    host_kernels: tuple[Path, ...] = field(default=())

    def lines(self) -> str:
        """The control file."""
        d = self.device
        major, minor = compute_capability(d)
        values: dict[str, object] = {
            "device": d.name, "sm_count": d.sm_count, "sm_min": d.sm_min, "sm_align": d.sm_granularity,
            "sm_groups": _LEAST_GROUPS.get((d.name, d.sm_count), 0),
            "cc_major": major, "cc_minor": minor, "memory_bytes": d.memory_bytes,
            "driver_version": self.driver_version, "seed": self.seed, "fail_alloc": self.fail_alloc,
            "fail_launch": self.fail_launch, "lose_device": self.lose_device,
        }  # fmt: skip
        rows = [f"{key} {value}" for key, value in values.items()]
        return "\n".join([*rows, *(f"host_kernels {path}" for path in self.host_kernels), ""])


def settings(device: str | Device, **changes: Any) -> Settings:
    """Settings for "virtual:NAME" or a Device with our kernels; `changes` are other fields of Settings."""
    spec = spec_of(device) if isinstance(device, str) else device
    more: tuple[Path, ...] = changes.pop("host_kernels", ())
    return Settings(spec, host_kernels=(kernel_library(), *more), **changes)


def folder_for(chosen: Settings, folder: Path) -> Path:
    """Make `folder` one to put on the library path: the driver and its control file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "control").write_text(chosen.lines())
    link = folder / "libcuda.so.1"
    link.unlink(missing_ok=True)
    link.symlink_to(driver_library())
    return folder


# ------------------------------------------------------------------------------------------ control channel

_CLOCK = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_int, ctypes.c_double)


@dataclass(frozen=True, slots=True)
class DriverReport:
    """What the virtual driver has seen: live objects by kind, allocations, untimed work, calls by entry point, and its
    log of (level, text) with level "refused", "warning" or "error". `graph_spans` are the latest graph launches: when
    each begins and ends (simulated), and the SMs of its kernels, [first, end) by the numbers of split `split`, 0 for
    the device itself: (begin_s, end_s, split, first, end)."""

    device: str
    host_s: float
    launches: int
    graph_launches: int
    untimed: int
    pending: int
    allocations: int
    allocated_bytes: int
    live: Mapping[str, int]
    calls: Mapping[str, int]
    log: tuple[tuple[str, str], ...]
    graph_spans: tuple[tuple[float, float, int, int, int], ...]
    last_refusal: str

    def texts(self, level: str) -> list[str]:
        """The log's texts of one level."""
        return [text for kind, text in self.log if kind == level]


class Control:
    """The virtual driver's functions beside CUDA's, in this process."""

    def __init__(self, library: ctypes.CDLL, device: Device) -> None:
        self._library, self.device = library, device
        self._added: set[Path] = set()
        library.tgv_report.restype = ctypes.c_size_t
        library.tgv_node_seconds.restype = ctypes.c_size_t
        library.tgv_simulated_s.restype = ctypes.c_double
        self._clock = _CLOCK(self._copy_seconds)  # kept: the driver calls it
        library.tgv_clock(self._clock)

    def _copy_seconds(self, kind: int, nbytes: float) -> float:
        """Seconds of a free-standing copy: launch and transfer, the latency-bandwidth model (Hockney 1994)."""
        rates = {"h": self.device.h2d_bytes_per_s, "d": self.device.d2h_bytes_per_s}
        rate = rates.get(chr(kind), self.device.hbm_bytes_per_s / 2)  # within the device: one read, one write
        return self.device.launch_seconds + nbytes / rate

    def set(self, **values: int) -> None:
        """Change settings, for instance faults: `set(fail_alloc=3)`."""
        self._library.tgv_control("\n".join(f"{key} {value}" for key, value in values.items()).encode())

    def add_kernels(self, source: Path) -> None:
        """Build the kernels of a .cu file for the host and make them known. BackendUnavailable when the compiler
        refuses the file, or another file has a kernel of the same name: here they are told apart by name alone."""
        library = kernel_library([source])
        if library in self._added:  # before the device was reset
            return
        text = ctypes.create_string_buffer(4096)
        if self._library.tgv_add_kernels(str(library).encode(), text, ctypes.c_size_t(len(text))):
            raise BackendUnavailable(f"the kernels of {str(source)!r} cannot be used here: {text.value.decode()}.")
        self._added.add(library)

    @contextmanager
    def dry(self) -> Iterator[None]:
        """Within the block work takes its simulated time and computes nothing; what is pending is done before."""
        self._library.tgv_dry(1)
        try:
            yield
        finally:
            self._library.tgv_dry(0)

    def node_seconds(self, nodes: Sequence[int], seconds: Sequence[float]) -> None:
        """Tell how long nodes of a graph take, before it is instantiated."""
        count = len(nodes)
        handles, times = (ctypes.c_void_p * count)(*nodes), (ctypes.c_double * count)(*seconds)
        strange = self._library.tgv_node_seconds(handles, times, ctypes.c_size_t(count))
        if strange:
            raise BackendUnavailable(f"{strange} of {count} handles are no graph nodes of the virtual driver.")

    @contextmanager
    def launches_take(self, seconds: float) -> Iterator[None]:
        """Within the block every launch, fill and copy of this thread takes `seconds`."""
        self._library.tgv_next_seconds(ctypes.c_double(seconds))
        try:
            yield
        finally:
            self._library.tgv_next_seconds(ctypes.c_double(-1.0))

    def report(self) -> DriverReport:
        """The report as it stands."""
        size = self._library.tgv_report(None, ctypes.c_size_t(0))
        buffer = ctypes.create_string_buffer(size + 4096)
        self._library.tgv_report(buffer, ctypes.c_size_t(len(buffer)))
        body = json.loads(buffer.value.decode())
        return DriverReport(
            **{**body, "log": tuple(map(tuple, body["log"])), "graph_spans": tuple(map(tuple, body["graph_spans"]))}
        )

    def clear_log(self) -> None:
        """Forget the log."""
        self._library.tgv_clear_log()


_loaded: Control | None = None


def loaded() -> Control | None:
    """The control channel, if this process runs on the virtual driver."""
    return _loaded if _loaded is not None else _adopted()


@cache
def _adopted() -> Control | None:
    """The virtual driver that this process found on its library path, if it did."""
    for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        control, library = Path(part) / "control", Path(part) / "libcuda.so.1"
        if part and control.is_file() and library.exists():
            values = dict(line.split(" ", 1) for line in control.read_text().splitlines() if line)
            return Control(ctypes.CDLL(str(library)), _device_of(values))
    return None


def _device_of(values: Mapping[str, str]) -> Device:
    """The Device of a control file: a published one, with the numbers that the file changes."""
    base = get(values["device"].rstrip("*")) if values["device"].rstrip("*") in _COMPUTE_CAPABILITY else get("h100_sxm")
    return replace(
        base,
        name=values["device"],
        sm_count=int(values["sm_count"]),
        sm_min=int(values["sm_min"]),
        sm_granularity=int(values["sm_align"]),
        memory_bytes=int(values["memory_bytes"]),
    )


def load(device: str | Device, **changes: Any) -> Control:
    """Make the virtual driver this process's CUDA driver.

    BackendUnavailable when the process has another driver or another virtual device already."""
    global _loaded
    name, present = device.removeprefix(PREFIX) if isinstance(device, str) else device.name, loaded()
    if present is not None:
        if present.device.name == name and not changes:
            return present
        raise BackendUnavailable(
            f"this process runs on the virtual device {present.device.name!r}; start another process for {name!r}."
        )
    spec = spec_of(device) if isinstance(device, str) else device
    if _driver_is_mapped():
        raise BackendUnavailable("this process has loaded a CUDA driver; start another process for the virtual one.")
    folder = _new_folder()
    try:
        folder_for(settings(spec, **changes), folder)
        library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        library.tgv_simulated_s()
        version = ctypes.c_int()
        library.cuDriverGetVersion(ctypes.byref(version))  # reads the control file
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _loaded = Control(library, spec)
    return _loaded


def _new_folder() -> Path:
    """A temporary folder for what a process loads; BackendUnavailable where there can be none."""
    try:
        return Path(tempfile.mkdtemp(prefix="taskgraph-virtual-"))
    except OSError as error:
        raise BackendUnavailable(
            f"the virtual driver needs a temporary folder ({error.strerror or error}); set TMPDIR to one that can be "
            "written."
        ) from error


def _driver_is_mapped() -> bool:
    if platform.system() != "Linux":
        raise BackendUnavailable("the virtual driver runs on Linux.")
    return any("/libcuda.so" in line for line in Path("/proc/self/maps").read_text().splitlines())
