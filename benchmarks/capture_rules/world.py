"""What checks of rules work with: the table, driver calls that insist on a status, and what they clean up."""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as cu

from taskgraph.runtime.gpu import driver, virtual

GUIDE = "CUDA Programming Guide"
CAPTURE = f"{GUIDE}, CUDA Graphs: stream capture"
GREEN = "CUDA driver API, Green Contexts"
ALIGNMENT = f"{GUIDE} 4.6, green contexts: alignment by compute capability"
MODES = "CUDA driver API, cuThreadExchangeStreamCaptureMode"
UPDATE = "CUDA driver API, cuGraphExecUpdate"
MEMORY = "CUDA driver API, Memory Management; NVIDIA Compute Sanitizer, memcheck"
EVENTS = "CUDA driver API, Event Management"
STREAMS = "CUDA driver API, Stream Management; Programming Guide, implicit synchronization"
EXECUTION = "CUDA driver API, Execution Control"

GLOBAL, THREAD_LOCAL, RELAXED = (
    cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL,
    cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED,
)
SM = cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
QUEUE = cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG
N = 256


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it says, where it is written, and the check."""

    name: str
    source: str
    check: Callable[["World"], None]


RULES: list[Rule] = []


def rule(source: str) -> Callable[[Callable[["World"], None]], Callable[["World"], None]]:
    """Register a check; its name is the rule."""

    def register(check: Callable[["World"], None]) -> Callable[["World"], None]:
        RULES.append(Rule(check.__name__, source, check))
        return check

    return register


@dataclass
class World:
    """What checks work with; `close` frees it all."""

    gpu: driver.Gpu
    control: virtual.Control
    closers: list[Callable[[], object]] = field(default_factory=list)

    def expect(self, code: str, call: str, *args: Any) -> Any:
        """Call a driver function, insist on its status, give its values."""
        status, *values = getattr(cu, call)(*args)
        assert status.name.removeprefix("CUDA_") == code, f"{call} gave {status.name}, the rule wants {code}"
        return values[0] if len(values) == 1 else values

    def ok(self, call: str, *args: Any) -> Any:
        return self.expect("SUCCESS", call, *args)

    def stream(self, nonblocking: bool = True) -> Any:
        made = self.ok("cuStreamCreate", int(nonblocking))
        self.closers.append(lambda: cu.cuStreamDestroy(made))
        return made

    def event(self, flags: int = 2) -> Any:
        made = self.ok("cuEventCreate", flags)
        self.closers.append(lambda: cu.cuEventDestroy(made))
        return made

    def memory(self, nbytes: int = 4 * N) -> Any:
        made = self.ok("cuMemAlloc", nbytes)
        self.closers.append(lambda: cu.cuMemFree(made))
        return made

    def whole(self) -> Any:
        """The SM resource of the device."""
        return self.ok("cuDeviceGetDevResource", 0, SM)

    def green(self, count: int = 16, split: Any = None) -> Any:
        """A green context of `count` SMs."""
        if split is None:
            split = self.ok("cuDevSmResourceSplitByCount", 1, self.whole(), 0, count)[0][0]
        desc = self.ok("cuDevResourceGenerateDesc", [split], 1)
        made = self.ok("cuGreenCtxCreate", desc, 0, 1)
        self.closers.append(lambda: cu.cuGreenCtxDestroy(made))
        return made

    def green_stream(self, green: Any) -> Any:
        made = self.ok("cuGreenCtxStreamCreate", green, 1, 0)
        self.closers.append(lambda: cu.cuStreamDestroy(made))
        return made

    def launch(
        self, stream: Any, a: int = 0, out: int = 0, count: int = N, code: str = "SUCCESS", **config: int
    ) -> None:
        """out = a + a over `count` floats."""
        kernel = self.gpu.kernel("add_f32", "elementwise").handle
        c = cu.CUlaunchConfig()
        c.gridDimX, c.gridDimY, c.gridDimZ = config.get("grid", 1), config.get("grid_y", 1), 1
        c.blockDimX, c.blockDimY, c.blockDimZ = config.get("block", 256), 1, 1
        c.sharedMemBytes = config.get("shared", 0)
        c.hStream = stream
        if config.get("dependent"):
            early = cu.CUlaunchAttribute()
            early.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            c.attrs, c.numAttrs = [early], 1
        values = (a, a, out, count)
        kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong)
        function = cu.CUfunction(int(kernel))
        self.expect(code, "cuLaunchKernelEx", c, function, (values, kinds), 0)

    def begin(self, stream: Any, mode: Any = THREAD_LOCAL) -> None:
        self.ok("cuStreamBeginCapture", stream, mode)

    def end(self, stream: Any, code: str = "SUCCESS") -> Any:
        graph = self.expect(code, "cuStreamEndCapture", stream)
        if code == "SUCCESS":
            self.closers.append(lambda: cu.cuGraphDestroy(graph))
        return graph

    def captured(self, stream: Any, launches: int = 1) -> Any:
        """A graph of launches in a row."""
        a, out = int(self.memory()), int(self.memory())
        self.begin(stream)
        for _ in range(launches):
            self.launch(stream, a, out, 0)
        return self.end(stream)

    def instantiated(self, graph: Any, code: str = "SUCCESS") -> Any:
        made = self.expect(code, "cuGraphInstantiate", graph, 0)
        if code == "SUCCESS":
            self.closers.append(lambda: cu.cuGraphExecDestroy(made))
        return made

    def nodes(self, graph: Any) -> list[Any]:
        count = self.ok("cuGraphGetNodes", graph)[1]
        return list(self.ok("cuGraphGetNodes", graph, count)[0][:count]) if count else []

    def logged(self, text: str) -> None:
        """The sanitizer's log has a line with `text`."""
        lines = [line for _, line in self.control.report().log]
        assert any(text in line for line in lines), f"nothing about {text!r} in {lines}"

    def close(self) -> None:
        for closer in reversed(self.closers):
            closer()
        self.closers.clear()


def elsewhere(run: Callable[[], None]) -> None:
    """Run in another thread; its error is raised here."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
