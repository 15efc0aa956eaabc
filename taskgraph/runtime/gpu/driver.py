"""The door to cuda.core: what the driver can do, contexts of SM partitions, streams, memory, kernels. Captured graphs
have one of their own, `captures`.

Rules of green contexts that this module keeps: one split for all partitions of a geometry, counts read back; streams
from cuda.core's green contexts only, non-blocking; a green context is never made current to a thread.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from taskgraph import cache
from taskgraph.errors import BackendUnavailable, CaptureMismatch, CudaError, ExecutionError, PlanError
from taskgraph.graph.device import Geometry
from taskgraph.runtime.gpu import virtual
from taskgraph.runtime.gpu.ahead.cubins import Cubin, Specialisation, check_arguments, obtain
from taskgraph.runtime.gpu.division import divided
from taskgraph.runtime.gpu.kinds import Launch
from taskgraph.runtime.turns import forks

CAPTURE_INFO, GREEN_STREAMS, WORKQUEUES = 12030, 12050, 13010
"""Drivers that brought what we stand on: cuStreamGetCaptureInfo_v3 (12.3), by which a capture is read while it is made;
cuGreenCtxStreamCreate (12.5; the green contexts of 12.4 have streams only while they are current to a thread);
workqueues, and splits into groups of any sizes (13.1)."""
_TRITON_FROM = (8, 0)
_STATIC_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel may have without asking (CUDA Programming Guide, compute capabilities)."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What the cuda backend found, as data. `partitions` says whether there are any; `virtual` names the virtual
    device, whose times are simulated; `reason` says why there is no device."""

    device: str = ""
    driver_version: int = 0
    sm_count: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    partitions: bool = False
    workqueues: bool = False
    virtual: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        """Whether a device can be used."""
        return not self.reason

    @property
    def dependent(self) -> bool:
        """Whether a kernel can be launched while the kernel before it runs: from compute capability 9.0 on (CUDA
        Programming Guide, "Programmatic Dependent Launch"). 12.x is left out until it was tried: captures of it were
        seen to fail there (sgl-project/sglang, pull request 18596)."""
        return (9, 0) <= self.compute_capability < (12, 0)

    def describe(self) -> str:
        """One line for people and results."""
        if self.reason:
            return self.reason
        version = _version(self.driver_version)
        kind = "simulated" if self.virtual else "real"
        queues = "balanced workqueues" if self.workqueues else "no workqueues"
        ladder = "any partition" if self.partitions else "plain streams"
        return f"{self.device} ({kind}), {self.sm_count} SMs, driver {version}: {ladder}, {queues}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def probe() -> Capability:
    """What this process can use; never raises for what is merely absent."""
    try:
        metadata.version("cuda-core")
        from cuda.bindings import driver as cu
        from cuda.core import Device
    except (ImportError, metadata.PackageNotFoundError):
        return Capability(reason="cuda.core is not installed; pip install 'taskgraph-gpu[cuda]'")
    try:
        status, version = cu.cuDriverGetVersion()
    except Exception as error:  # cuda.pathfinder has no public type for "there is no driver"
        if type(error).__name__ != "DynamicLibNotFoundError":
            raise
        return Capability(reason="no NVIDIA driver on this machine")
    if int(status) or int(cu.cuInit(0)[0]):
        return Capability(reason="the NVIDIA driver does not start", driver_version=int(version))
    if version < CAPTURE_INFO:
        told = f"driver {_version(int(version))} is older than 12.3; update it"
        return Capability(reason=told, driver_version=int(version))
    status, count = cu.cuDeviceGetCount()
    if int(status) or not count:
        return Capability(reason="the driver sees no device", driver_version=int(version))
    device = Device(0)
    control = virtual.loaded()
    return Capability(
        device=device.name,
        driver_version=int(version),
        sm_count=device.properties.multiprocessor_count,
        compute_capability=tuple(device.compute_capability),
        partitions=version >= GREEN_STREAMS,
        workqueues=version >= WORKQUEUES,
        virtual=control.device.name if control else "",
        notes=tuple(_notes()),
    )


def _notes() -> Iterator[str]:
    """Settings of the environment under which partitions mean less (CUDA driver API, "Green Contexts")."""
    share = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    if share not in (None, "100"):
        yield f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is {share}: kernels may use SMs outside their partition; unset it"
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ:
        yield "CUDA_DEVICE_MAX_CONNECTIONS is not set: with more than 8 lanes some share a connection; set it to 32"


# ------------------------------------------------------------------------------------------------ errors


@contextmanager
def driver_errors(what: str) -> Iterator[None]:
    """Give errors of cuda.core our type, with what the virtual driver says about them."""
    try:
        yield
    except Exception as error:
        raise_typed(what, error)


def is_driver_error(error: Exception) -> bool:
    """Whether it is one of cuda.core."""
    return type(error).__name__ in ("CUDAError", "NVRTCError")


def typed(what: str, error: Exception) -> CudaError:
    """An error of cuda.core as ours."""
    return cuda_error(what, str(error))


def raise_typed(what: str, error: Exception) -> NoReturn:
    """Raise an error of cuda.core as ours; any other as it is."""
    if not is_driver_error(error):
        raise error
    raise typed(what, error) from error


def check(what: str, result: Sequence[Any]) -> Any:
    """The value of a cuda.bindings call, or CudaError."""
    status, *values = result
    if int(status):
        raise cuda_error(what, status.name)
    return values[0] if len(values) == 1 else values


def cuda_error(what: str, text: str) -> CudaError:
    """Our error for what the driver calls `text`, with what the virtual driver says about it."""
    code = text.split(":")[0].split("\n")[0].strip()
    control = virtual.loaded()
    detail = f" ({control.report().last_refusal})" if control else ""
    return CudaError(f"{what}: {code}{detail}.", code)


# ------------------------------------------------------------------------------------------------ memory


class Memory:
    """Bytes on the device, or pinned on the host where `pinned`; its owner closes it."""

    def __init__(self, nbytes: int, pinned: bool = False) -> None:
        from cuda.bindings import driver as cu

        self.nbytes, self.pinned, self._born = nbytes, pinned, forks()
        if pinned:
            self.address = int(check(f"pin {nbytes} bytes", cu.cuMemHostAlloc(nbytes, 0)))
        else:
            self.address = int(check(f"allocate {nbytes} bytes", cu.cuMemAlloc(nbytes)))

    def close(self) -> None:
        """Free it; a second call does nothing. A device that was lost has nothing to free, nor a forked child."""
        from cuda.bindings import driver as cu

        address, self.address = self.address, 0
        if address and self._born == forks():
            (cu.cuMemFreeHost if self.pinned else cu.cuMemFree)(address)


def clear(memory: Memory) -> None:
    """Fill it with zeros."""
    from cuda.bindings import driver as cu

    check(f"clear {memory.nbytes} bytes", cu.cuMemsetD8(memory.address, 0, memory.nbytes))


def upload(address: int, host: int, nbytes: int) -> None:
    """Copy from host memory; returns when it is done."""
    from cuda.bindings import driver as cu

    check(f"copy {nbytes} bytes to the device", cu.cuMemcpyHtoD(address, host, nbytes))


def download(host: int, address: int, nbytes: int) -> None:
    """Copy to host memory; returns when it is done."""
    from cuda.bindings import driver as cu

    check(f"copy {nbytes} bytes to the host", cu.cuMemcpyDtoH(host, address, nbytes))


def copy_on(stream: Any, target: int, source: int, nbytes: int) -> None:
    """Copy in stream order, by a copy engine."""
    from cuda.bindings import driver as cu

    check(f"copy {nbytes} bytes", cu.cuMemcpyAsync(target, source, nbytes, stream.handle))


# ------------------------------------------------------------------------------------------------ kernels


def kernel_folder() -> Path:
    """The .cu files of the package."""
    return virtual.sources() / "kernels"


def compiled(source: Path, arch: str) -> bytes:
    """The cubin of one .cu file by NVRTC, from the cache where it was compiled before; a file may include those beside
    it and our own headers."""
    from cuda.core import Program, ProgramOptions

    folders = list(dict.fromkeys((source.parent, kernel_folder())))
    headers = sorted(path for folder in folders for path in folder.glob("*.cuh"))
    digest = hashlib.blake2b(repr((arch, metadata.version("cuda-core"), _nvrtc_version())).encode(), digest_size=12)
    for path in (source, *headers):
        digest.update(path.read_bytes())
    target = cache.place("cubin", f"{source.stem}-{digest.hexdigest()}.cubin")
    if target.exists():
        return target.read_bytes()
    options = ProgramOptions(arch=arch, std="c++17", include_path=[*map(str, folders)], name=source.name)
    with driver_errors(f"compile {source.name} for {arch}"):
        code = bytes(Program(source.read_text(), "c++", options).compile("cubin").code)
    with cache.keeping("compiled kernels", target):
        cache.write_atomically(target, code)
    return code


def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return int(major), int(minor)


# -------------------------------------------------------------------------------------------------- device


@dataclass(frozen=True, slots=True)
class Partitioned:
    """The contexts of a geometry, one a partition, and the SMs that each has: at least those that were asked for.
    `exact` is False where some has more, and where the driver cannot partition."""

    contexts: tuple[Any, ...]
    sm_counts: tuple[int, ...]
    exact: bool


@dataclass(slots=True)
class Gpu:
    """Device 0 of this process, opened once and shared by all executables."""

    capability: Capability
    device: Any
    _kernels: dict[tuple[Path, str], Any] = field(default_factory=dict)
    _modules: dict[Path, Any] = field(default_factory=dict)
    _cubins: dict[Specialisation, tuple[Any, Cubin]] = field(default_factory=dict)
    dependent: bool = False
    """Whether kernels that wait for the kernel before them by themselves are launched while it runs, in captures from
    now on: where the device can, unless someone says False."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Kinds that do not run by Triton functions on this device, and why not: what a comparison there found wrong."""
    _threads: threading.local = field(default_factory=threading.local)
    _born: int = field(default_factory=forks)
    _open: ClassVar["Gpu | None"] = None

    @classmethod
    def open(cls, device: str | None = None) -> "Gpu":
        """The device: a real one, or the virtual one that `device` names. BackendUnavailable when there is none."""
        if cls._open is not None and cls._open._born != forks():
            raise BackendUnavailable(
                "this process was forked from one that uses CUDA, and a CUDA context does not survive a fork; start "
                'processes by multiprocessing.get_context("spawn").'
            )
        if virtual.is_virtual(device) and device is not None:
            virtual.load(device)
        if cls._open is None:
            found = probe()
            if not found.available:
                raise BackendUnavailable(
                    f'the cuda backend: {found.reason}. Try device="virtual:h100_sxm" (simulated), or backend="sim".'
                )
            from cuda.core import Device

            cls._open = cls(found, Device(0), dependent=found.dependent)
        gpu = cls._open
        if gpu.capability.virtual and not virtual.is_virtual(device) and device is not None:
            raise BackendUnavailable(
                f"this process runs on the virtual device {gpu.capability.virtual!r}, not {device!r}."
            )
        gpu.use()
        return gpu

    def use(self) -> None:
        """Make the device current to this thread, once."""
        if not getattr(self._threads, "current", False):
            with driver_errors("make the device current"):
                self.device.set_current()
            self._threads.current = True

    @classmethod
    def reset(cls) -> None:
        """Forget the device after it was lost: its primary context is destroyed and retained again, so that the next
        `open` starts afresh. All executables must be closed; a device that the system lost stays lost."""
        from cuda.bindings import driver as cu

        cls._open = None
        check("reset the device", cu.cuDevicePrimaryCtxReset(0))
        check("retain the device", cu.cuDevicePrimaryCtxRetain(0))

    @property
    def arch(self) -> str:
        """What NVRTC compiles for."""
        major, minor = self.capability.compute_capability
        return f"sm_{major}{minor}"

    def kernel(self, name: str, source: str | Path) -> Any:
        """The kernel of that name from a .cu file (a stem of the package's, or a path); compiled at first use."""
        path = source if isinstance(source, Path) else kernel_folder() / f"{source}.cu"
        if (path, name) not in self._kernels:
            if path not in self._modules:
                from cuda.core import ObjectCode

                control = virtual.loaded()
                if control is not None and path.parent != kernel_folder():
                    control.add_kernels(path)
                self._modules[path] = ObjectCode.from_cubin(compiled(path, self.arch))
            with driver_errors(f"load kernel {name} of {path.name}"):
                self._kernels[path, name] = self._modules[path].get_kernel(name)
        return self._kernels[path, name]

    def ahead(self, kind: str) -> str:
        """The architecture whose cubins ops of a kind may run by; "" on a virtual device, which has none, on one
        that Triton does not know, and for a kind that is left out."""
        old = self.capability.compute_capability < _TRITON_FROM
        return "" if self.capability.virtual or old or kind in self.left_out else self.arch

    def cubin(self, spec: Specialisation) -> tuple[Any, Cubin]:
        """The kernel of a Triton function, compiled or read from the cache and loaded at first use, and its facts."""
        if spec not in self._cubins:
            from cuda.core import ObjectCode

            made = obtain(spec, self.arch)
            with driver_errors(f"load kernel {spec.describe()}"):
                kernel = ObjectCode.from_cubin(made.code).get_kernel(made.name)
            if made.shared_bytes > _STATIC_SHARED_BYTES:
                _allow_shared(kernel, made.shared_bytes)
            self._cubins[spec] = kernel, made
        return self._cubins[spec]

    def load(self, launch: Launch) -> None:
        """Compile and load what a launch needs, which must be done before a capture; BackendUnavailable when the
        launch does not fit its kernel."""
        if isinstance(launch.source, Specialisation):
            check_arguments(launch.source, self.cubin(launch.source)[1], launch.args)
        else:
            self.kernel(launch.kernel, launch.source)

    def follows(self, launch: Launch) -> bool:
        """Whether its kernel waits by itself, before it touches memory, for the kernel before it."""
        if isinstance(launch.source, Specialisation):
            return self.cubin(launch.source)[1].dependent
        return launch.dependent

    def send(self, stream: Any, launch: Launch, dependent: bool = False) -> None:
        """Launch or capture it; `dependent`: while the kernel before it may still run."""
        if isinstance(launch.source, Specialisation):
            kernel, made = self.cubin(launch.source)
            args = (*launch.args, launch.scratch, 0)  # Triton's own: global scratch, and that of its profiler
            launch_kernel(stream, kernel, launch.grid, launch.block, args, made.shared_bytes, dependent)
        else:
            kernel = self.kernel(launch.kernel, launch.source)
            launch_kernel(stream, kernel, launch.grid, launch.block, launch.args, dependent=dependent)

    def stream(self, context: Any = None) -> Any:
        """A non-blocking stream of a context (default: the whole device)."""
        from cuda.core import StreamOptions

        options = StreamOptions(nonblocking=True)
        with driver_errors("create a stream"):
            return self.device.create_stream(options=options) if context is None else context.create_stream(options)

    def foreign(self, stream: Any) -> Any:
        """A stream of another library, by its `__cuda_stream__`; that library keeps owning it."""
        if not hasattr(stream, "__cuda_stream__"):
            raise ExecutionError(f"a {type(stream).__name__} is no stream: it has no `__cuda_stream__`.", op="")
        return self.device.create_stream(stream)

    def event(self, timing: bool = False) -> Any:
        """An event; with `timing` its time can be read."""
        from cuda.core import EventOptions

        with driver_errors("create an event"):
            return self.device.create_event(EventOptions(timing_enabled=timing))

    def partition(self, geometry: Geometry) -> Partitioned:
        """Contexts of the partitions of `geometry`; None stands for the whole device.

        PlanError when the device does not divide so; CaptureMismatch when the driver makes others than asked for."""
        sizes = geometry.sizes
        if sum(sizes) > self.capability.sm_count:
            raise PlanError(
                f"the plan has {' + '.join(map(str, sizes))} SMs; {self.capability.device} has "
                f"{self.capability.sm_count}. Plan for this device."
            )
        if sizes == (self.capability.sm_count,) or not self.capability.partitions:
            whole = (self.capability.sm_count,) * len(sizes)
            return Partitioned((None,) * len(sizes), whole, exact=whole == sizes)
        with driver_errors(f"split {self.capability.sm_count} SMs into {' + '.join(map(str, sizes))}"):
            shares = divided(self.device.resources.sm, sizes, self.capability)
        contexts = tuple(self._green(share, len(sizes)) for share in shares)
        counts = tuple(int(context.resources.sm.sm_count) for context in contexts)
        if any(made < size for made, size in zip(counts, sizes, strict=True)):
            raise CaptureMismatch(f"the driver made partitions of {counts} SMs; the plan has {sizes}.", "partitions")
        return Partitioned(contexts, counts, exact=counts == sizes)

    def _green(self, share: Sequence[Any], lanes: int) -> Any:
        """A green context over several groups of SMs of one split."""
        from cuda.core import ContextOptions, WorkqueueResourceOptions

        resources = list(share)
        with driver_errors(f"create a green context of {sum(group.sm_count for group in share)} SMs"):
            if self.capability.workqueues:
                queue = self.device.resources.workqueue
                queue.configure(WorkqueueResourceOptions("green_ctx_balanced", lanes))
                resources.append(queue)
            return self.device.create_context(ContextOptions(resources=resources))

    def memory_bytes(self, free: bool = False) -> int:
        """Bytes of the device's memory; with `free`, those that nobody holds."""
        from cuda.bindings import driver as cu

        left, whole = check("ask for the memory", cu.cuMemGetInfo())
        return int(left if free else whole)

    def sync(self) -> None:
        """Wait for everything; the errors of the work show here."""
        from cuda.bindings import driver as cu

        check("wait for the device", cu.cuCtxSynchronize())


# -------------------------------------------------------------------------------------------------- work


def _allow_shared(kernel: Any, nbytes: int) -> None:
    """Let launches of a kernel have so much dynamic shared memory a block; cuda.core can only read that."""
    from cuda.bindings import driver as cu

    attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(f"allow {nbytes} bytes of shared memory", cu.cuKernelSetAttribute(attribute, nbytes, kernel.handle, 0))


def launch_kernel(
    stream: Any,
    kernel: Any,
    grid: tuple[int, ...],
    block: int,
    args: Sequence[Any],
    shared_bytes: int = 0,
    dependent: bool = False,
) -> None:
    """Launch or capture one kernel, with so much dynamic shared memory a block. `dependent`: it may start while the
    kernel before it on the stream still runs, and must wait for it by itself before it touches memory."""
    from cuda.core import LaunchConfig, launch

    with driver_errors("launch a kernel"):
        config = LaunchConfig(
            grid=grid, block=block, shmem_size=shared_bytes, programmatic_stream_serialization=dependent
        )
        launch(stream, config, kernel, *args)


def seconds_between(first: Any, second: Any) -> float:
    """Seconds between two recorded events with timing."""
    with driver_errors("read an event"):
        return float(second - first) / 1e3
