"""Rules of CUDA that the virtual driver enforces: a table of checks, each with the source of its rule.

Every check makes calls of the driver API by cuda.bindings and looks at what comes back. The table runs in a process
whose driver is the virtual one: `python -m benchmarks.capture --json`.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import driver as cu

from taskgraph.runtime import driver, virtual

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

    def green(self, count: int = 16, split: Any = None) -> Any:
        """A green context of `count` SMs."""
        if split is None:
            whole = self.ok("cuDeviceGetDevResource", 0, SM)
            split = self.ok("cuDevSmResourceSplitByCount", 1, whole, 0, count)[0][0]
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


# ----------------------------------------------------------------------------------------- stream capture


@rule(CAPTURE)
def a_fork_joins_by_events(w: World) -> None:
    a, b, fork, join = w.stream(), w.stream(), w.event(), w.event()
    w.begin(a)
    w.launch(a, count=0)
    w.ok("cuEventRecord", fork, a)
    w.ok("cuStreamWaitEvent", b, fork, 0)
    w.launch(b, count=0)
    w.ok("cuEventRecord", join, b)
    w.ok("cuStreamWaitEvent", a, join, 0)
    w.launch(a, count=0)
    assert len(w.nodes(w.end(a))) == 3


@rule(CAPTURE)
def work_that_is_not_joined_is_refused(w: World) -> None:
    a, b, fork = w.stream(), w.stream(), w.event()
    w.begin(a)
    w.launch(a, count=0)
    w.ok("cuEventRecord", fork, a)
    w.ok("cuStreamWaitEvent", b, fork, 0)
    w.launch(b, count=0)
    w.end(a, "ERROR_STREAM_CAPTURE_UNJOINED")


@rule(CAPTURE)
def a_fork_without_work_needs_no_join(w: World) -> None:
    a, b, fork = w.stream(), w.stream(), w.event()
    w.begin(a)
    w.launch(a, count=0)
    w.ok("cuEventRecord", fork, a)
    w.ok("cuStreamWaitEvent", b, fork, 0)
    assert len(w.nodes(w.end(a))) == 1


@rule(CAPTURE)
def waiting_for_an_event_outside_the_capture_is_refused(w: World) -> None:
    a, outside = w.stream(), w.event()
    w.ok("cuEventRecord", outside, w.stream())
    w.begin(a)
    w.expect("ERROR_STREAM_CAPTURE_ISOLATION", "cuStreamWaitEvent", a, outside, 0)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def two_captures_do_not_merge(w: World) -> None:
    a, b, event = w.stream(), w.stream(), w.event()
    w.begin(a)
    w.begin(b)
    w.launch(a, count=0)
    w.ok("cuEventRecord", event, a)
    w.expect("ERROR_STREAM_CAPTURE_MERGE", "cuStreamWaitEvent", b, event, 0)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")
    w.end(b, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def a_capture_ends_on_the_stream_it_began_on(w: World) -> None:
    a, b, fork = w.stream(), w.stream(), w.event()
    w.begin(a)
    w.ok("cuEventRecord", fork, a)
    w.ok("cuStreamWaitEvent", b, fork, 0)
    w.expect("ERROR_STREAM_CAPTURE_UNMATCHED", "cuStreamEndCapture", b)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def ending_what_was_not_begun_is_refused(w: World) -> None:
    w.expect("ERROR_ILLEGAL_STATE", "cuStreamEndCapture", w.stream())


@rule(CAPTURE)
def a_stream_captures_once_at_a_time(w: World) -> None:
    a = w.stream()
    w.begin(a)
    w.expect("ERROR_ILLEGAL_STATE", "cuStreamBeginCapture", a, RELAXED)
    w.end(a)


@rule(CAPTURE)
def the_legacy_stream_cannot_capture(w: World) -> None:
    w.expect("ERROR_STREAM_CAPTURE_UNSUPPORTED", "cuStreamBeginCapture", cu.CUstream(0), RELAXED)


@rule(CAPTURE)
def synchronising_a_capturing_stream_invalidates_the_capture(w: World) -> None:
    a = w.stream()
    w.begin(a)
    w.expect("ERROR_STREAM_CAPTURE_UNSUPPORTED", "cuStreamSynchronize", a)
    w.launch(a, count=0, code="ERROR_STREAM_CAPTURE_INVALIDATED")
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def querying_a_capturing_stream_invalidates_the_capture(w: World) -> None:
    a = w.stream()
    w.begin(a)
    w.expect("ERROR_STREAM_CAPTURE_UNSUPPORTED", "cuStreamQuery", a)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def synchronising_the_context_invalidates_the_capture(w: World) -> None:
    a = w.stream()
    w.begin(a, RELAXED)
    w.expect("ERROR_STREAM_CAPTURE_UNSUPPORTED", "cuCtxSynchronize")
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def a_captured_event_cannot_be_synchronised(w: World) -> None:
    a, event = w.stream(), w.event()
    w.begin(a)
    w.ok("cuEventRecord", event, a)
    w.expect("ERROR_CAPTURED_EVENT", "cuEventSynchronize", event)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(CAPTURE)
def a_captured_event_cannot_be_queried_later(w: World) -> None:
    a, event = w.stream(), w.event()
    w.begin(a)
    w.ok("cuEventRecord", event, a)
    w.end(a)
    w.expect("ERROR_CAPTURED_EVENT", "cuEventQuery", event)


@rule(CAPTURE)
def a_legacy_launch_beside_a_blocking_capture_is_refused(w: World) -> None:
    a = w.stream(nonblocking=False)
    w.begin(a, RELAXED)
    w.launch(cu.CUstream(0), count=0, code="ERROR_STREAM_CAPTURE_IMPLICIT")
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule("github.com/thu-ml/SageAttention/issues/371; " + CAPTURE)
def a_legacy_launch_escapes_a_nonblocking_capture(w: World) -> None:
    a = w.stream()
    w.begin(a)
    w.launch(cu.CUstream(0), count=0)
    w.launch(a, count=0)
    assert len(w.nodes(w.end(a))) == 1
    w.logged("not part of the graph")


@rule(CAPTURE)
def destroying_a_capturing_stream_ends_its_capture(w: World) -> None:
    made = w.ok("cuStreamCreate", 1)
    w.begin(made)
    w.ok("cuStreamDestroy", made)
    w.ok("cuMemFree", w.ok("cuMemAlloc", 64))  # no capture forbids it any more
    w.expect("ERROR_INVALID_HANDLE", "cuStreamEndCapture", made)


@rule(CAPTURE)
def captured_work_does_not_run(w: World) -> None:
    a, data, out = w.stream(), w.memory(), w.memory()
    ones, host = np.ones(N, np.float32), np.zeros(N, np.float32)
    w.ok("cuMemcpyHtoD", data, ones.ctypes.data, ones.nbytes)
    w.ok("cuMemcpyHtoD", out, host.ctypes.data, host.nbytes)
    w.begin(a)
    w.launch(a, int(data), int(out))
    graph = w.end(a)
    w.ok("cuMemcpyDtoH", host.ctypes.data, out, host.nbytes)
    assert not host.any()
    exe = w.instantiated(graph)
    w.ok("cuGraphLaunch", exe, a)
    w.ok("cuStreamSynchronize", a)
    w.ok("cuMemcpyDtoH", host.ctypes.data, out, host.nbytes)
    assert (host == 2).all()


@rule(CAPTURE)
def an_event_of_an_ended_capture_joins_nothing(w: World) -> None:
    a, event = w.stream(), w.event()
    w.begin(a)
    w.ok("cuEventRecord", event, a)
    w.end(a)
    w.expect("ERROR_CAPTURED_EVENT", "cuStreamWaitEvent", w.stream(), event, 0)


@rule("CUDA driver API, cuStreamBeginCaptureToGraph (12.3)")
def a_capture_can_add_to_a_graph(w: World) -> None:
    a, graph = w.stream(), w.ok("cuGraphCreate", 0)
    w.closers.append(lambda: cu.cuGraphDestroy(graph))
    node = w.ok("cuGraphAddEmptyNode", graph, None, 0)
    w.ok("cuStreamBeginCaptureToGraph", a, graph, [node], None, 1, THREAD_LOCAL)
    w.launch(a, count=0)
    w.ok("cuStreamEndCapture", a)
    assert len(w.nodes(graph)) == 2


# ------------------------------------------------------------------------------------------- capture modes


@rule(MODES)
def allocating_in_a_thread_local_capture_invalidates_it(w: World) -> None:
    a = w.stream()
    w.begin(a, THREAD_LOCAL)
    w.expect("ERROR_STREAM_CAPTURE_UNSUPPORTED", "cuMemAlloc", 64)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(MODES)
def a_relaxed_capture_permits_allocation(w: World) -> None:
    a = w.stream()
    w.begin(a, RELAXED)
    w.memory()
    w.end(a)


@rule(MODES)
def a_global_capture_forbids_other_threads_too(w: World) -> None:
    a = w.stream()
    w.begin(a, GLOBAL)

    def other() -> None:
        w.gpu.device.set_current()
        w.expect("ERROR_STREAM_CAPTURE_UNSUPPORTED", "cuMemAlloc", 64)

    elsewhere(other)
    w.end(a, "ERROR_STREAM_CAPTURE_INVALIDATED")


@rule(MODES)
def a_thread_local_capture_leaves_other_threads_free(w: World) -> None:
    a = w.stream()
    w.begin(a, THREAD_LOCAL)

    def other() -> None:
        w.gpu.device.set_current()
        w.ok("cuMemFree", w.ok("cuMemAlloc", 64))

    elsewhere(other)
    w.end(a)


@rule(MODES)
def a_thread_may_exempt_itself_from_global_captures(w: World) -> None:
    a = w.stream()
    w.begin(a, GLOBAL)

    def other() -> None:
        w.gpu.device.set_current()
        before = w.ok("cuThreadExchangeStreamCaptureMode", RELAXED)
        w.ok("cuMemFree", w.ok("cuMemAlloc", 64))
        w.ok("cuThreadExchangeStreamCaptureMode", before)

    elsewhere(other)
    w.end(a)


@rule(MODES)
def a_thread_local_capture_ends_in_its_thread(w: World) -> None:
    a = w.stream()
    w.begin(a, THREAD_LOCAL)

    def other() -> None:
        w.gpu.device.set_current()
        w.expect("ERROR_STREAM_CAPTURE_WRONG_THREAD", "cuStreamEndCapture", a)

    elsewhere(other)
    w.end(a)


@rule(MODES)
def a_relaxed_capture_may_end_in_another_thread(w: World) -> None:
    a = w.stream()
    w.begin(a, RELAXED)

    def other() -> None:
        w.gpu.device.set_current()
        w.end(a)

    elsewhere(other)


# ------------------------------------------------------------------------------------------ green contexts


def _whole(w: World) -> Any:
    return w.ok("cuDeviceGetDevResource", 0, SM)


@rule(ALIGNMENT)
def split_by_count_rounds_up(w: World) -> None:
    groups, count, rest = w.ok("cuDevSmResourceSplitByCount", 6, _whole(w), 0, 11)
    assert ([g.sm.smCount for g in groups[:count]], rest.sm.smCount) == ([16] * 6, 36)


@rule(ALIGNMENT)
def split_by_count_without_coscheduling_rounds_to_two(w: World) -> None:
    groups, count, _ = w.ok("cuDevSmResourceSplitByCount", 6, _whole(w), 1, 11)
    assert [g.sm.smCount for g in groups[:count]] == [12] * 6


@rule(ALIGNMENT)
def split_by_count_may_give_fewer_groups(w: World) -> None:
    _, count, rest = w.ok("cuDevSmResourceSplitByCount", 2, _whole(w), 0, 72)
    assert (count, rest.sm.smCount) == (1, 60)


@rule(GREEN)
def split_by_count_of_more_than_there_is_fails(w: World) -> None:
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplitByCount", 1, _whole(w), 0, 133)


@rule(GREEN)
def minimum_and_alignment_are_read_at_run_time(w: World) -> None:
    whole = _whole(w)
    assert (whole.sm.minSmPartitionSize, whole.sm.smCoscheduledAlignment) == (8, 8)


def _groups(*rows: tuple[int, int, int]) -> list[Any]:
    groups = []
    for count, coscheduled, flags in rows:
        group = cu.CU_DEV_SM_RESOURCE_GROUP_PARAMS()
        group.smCount, group.coscheduledSmCount, group.flags = count, coscheduled, flags
        groups.append(group)
    return groups


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_gives_what_was_asked_for(w: World) -> None:
    groups, rest = w.ok("cuDevSmResourceSplit", 2, _whole(w), 0, _groups((88, 0, 0), (40, 0, 0)))
    assert ([g.sm.smCount for g in groups], rest.sm.smCount) == ([88, 40], 4)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_does_not_round(w: World) -> None:
    args = (1, _whole(w), 0, _groups((12, 0, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_is_finer_with_smaller_coscheduling(w: World) -> None:
    groups, _ = w.ok("cuDevSmResourceSplit", 1, _whole(w), 0, _groups((12, 2, 0)))
    assert groups[0].sm.smCount == 12


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_refuses_odd_counts(w: World) -> None:
    args = (1, _whole(w), 0, _groups((13, 2, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_bounds_coscheduling(w: World) -> None:
    args = (1, _whole(w), 0, _groups((64, 64, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def backfill_permits_counts_off_the_grid(w: World) -> None:
    groups, _ = w.ok("cuDevSmResourceSplit", 1, _whole(w), 0, _groups((12, 8, 1)))
    assert groups[0].sm.smCount == 12


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def groups_are_filled_in_order(w: World) -> None:
    args = (2, _whole(w), 0, _groups((128, 0, 0), (8, 0, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule(GREEN)
def the_result_of_a_split_is_not_split_again(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, _whole(w), 0, 64)[0][0]
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplitByCount", 2, part, 0, 16)


@rule(GREEN)
def the_resource_of_a_green_context_is_split_again(w: World) -> None:
    inside = w.ok("cuGreenCtxGetDevResource", w.green(64), SM)
    _, count, _ = w.ok("cuDevSmResourceSplitByCount", 2, inside, 0, 32)
    assert count == 2


@rule(GREEN)
def separate_splits_overlap(w: World) -> None:
    w.green(64)
    w.green(64)
    w.logged("share SMs")


@rule(GREEN)
def one_descriptor_takes_sms_of_one_split(w: World) -> None:
    parts = [w.ok("cuDevSmResourceSplitByCount", 1, _whole(w), 0, 16)[0][0] for _ in range(2)]
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevResourceGenerateDesc", parts, 2)


@rule("github.com/NVIDIA/TensorRT-LLM green_context.py; " + GREEN)
def a_workqueue_comes_from_the_device_as_the_sms_do(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, _whole(w), 0, 16)[0][0]
    context = w.ok("cuCtxGetCurrent")
    queue = w.ok("cuCtxGetDevResource", context, QUEUE)
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevResourceGenerateDesc", [part, queue], 2)
    w.ok("cuDevResourceGenerateDesc", [part, w.ok("cuDeviceGetDevResource", 0, QUEUE)], 2)


@rule(GREEN)
def a_green_context_needs_its_flag(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, _whole(w), 0, 16)[0][0]
    desc = w.ok("cuDevResourceGenerateDesc", [part], 1)
    w.expect("ERROR_INVALID_VALUE", "cuGreenCtxCreate", desc, 0, 0)


@rule(GREEN)
def a_stream_of_a_green_context_is_nonblocking(w: World) -> None:
    w.expect("ERROR_INVALID_VALUE", "cuGreenCtxStreamCreate", w.green(), 0, 0)


@rule("CUDA driver API, cuCtxFromGreenCtx")
def a_green_context_is_current_to_one_thread(w: World) -> None:
    context = w.ok("cuCtxFromGreenCtx", w.green())
    w.ok("cuCtxPushCurrent", context)
    elsewhere(lambda: w.expect("ERROR_CONTEXT_ALREADY_IN_USE", "cuCtxPushCurrent", context))
    w.ok("cuCtxPopCurrent")


@rule(f"{GUIDE} 4.6.5, green contexts with graphs")
def a_node_runs_in_the_context_of_its_capture_stream(w: World) -> None:
    green = w.green(16)
    origin, inside, fork, join = w.stream(), w.green_stream(green), w.event(), w.event()
    w.begin(origin)
    w.launch(origin, count=0)
    w.ok("cuEventRecord", fork, origin)
    w.ok("cuStreamWaitEvent", inside, fork, 0)
    w.launch(inside, count=0)
    w.ok("cuEventRecord", join, inside)
    w.ok("cuStreamWaitEvent", origin, join, 0)
    first, second = w.nodes(w.end(origin))
    own = w.ok("cuCtxFromGreenCtx", green)
    contexts = [int(w.ok("cuGraphKernelNodeGetParams", node).ctx) for node in (first, second)]
    assert contexts == [int(w.ok("cuCtxGetCurrent")), int(own)]


@rule(GREEN)
def a_destroyed_green_context_has_no_streams(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, _whole(w), 0, 16)[0][0]
    green = w.ok("cuGreenCtxCreate", w.ok("cuDevResourceGenerateDesc", [part], 1), 0, 1)
    stream = w.green_stream(green)
    w.ok("cuGreenCtxDestroy", green)
    w.launch(stream, count=0, code="ERROR_CONTEXT_IS_DESTROYED")


# ------------------------------------------------------------------------------------------- graph updates


def _two_partitions(w: World) -> tuple[Any, Any]:
    whole = _whole(w)
    parts = w.ok("cuDevSmResourceSplitByCount", 2, whole, 0, 16)[0]
    return w.green_stream(w.green(split=parts[0])), w.green_stream(w.green(split=parts[1]))


@rule(UPDATE)
def an_update_may_change_pointers(w: World) -> None:
    a = w.stream()
    exe, fresh = w.instantiated(w.captured(a, 2)), w.captured(a, 2)
    w.ok("cuGraphExecUpdate", exe, fresh)


@rule(UPDATE)
def an_update_may_not_change_the_partition(w: World) -> None:
    a, b = _two_partitions(w)
    exe, fresh = w.instantiated(w.captured(a)), w.captured(b)
    w.expect("ERROR_GRAPH_EXEC_UPDATE_FAILURE", "cuGraphExecUpdate", exe, fresh)


@rule(UPDATE)
def an_update_may_not_change_the_topology(w: World) -> None:
    a = w.stream()
    exe, fresh = w.instantiated(w.captured(a, 2)), w.captured(a, 3)
    w.expect("ERROR_GRAPH_EXEC_UPDATE_FAILURE", "cuGraphExecUpdate", exe, fresh)


@rule(UPDATE)
def an_update_may_not_change_a_nodes_type(w: World) -> None:
    a, data = w.stream(), w.memory()
    exe = w.instantiated(w.captured(a))
    w.begin(a)
    w.ok("cuMemsetD8Async", data, 0, 16, a)
    w.expect("ERROR_GRAPH_EXEC_UPDATE_FAILURE", "cuGraphExecUpdate", exe, w.end(a))


@rule("CUDA driver API, cuGraphExecKernelNodeSetParams")
def a_nodes_parameters_keep_its_context(w: World) -> None:
    a, b = _two_partitions(w)
    graph = w.captured(a)
    (node,), exe = w.nodes(graph), w.instantiated(graph)
    params = w.ok("cuGraphKernelNodeGetParams", node)
    w.ok("cuGraphExecKernelNodeSetParams", exe, node, params)
    params.ctx = w.ok("cuCtxFromGreenCtx", w.ok("cuStreamGetGreenCtx", b))
    w.expect("ERROR_INVALID_VALUE", "cuGraphExecKernelNodeSetParams", exe, node, params)


@rule("CUDA driver API, cuGraphNodeSetEnabled")
def a_disabled_node_does_nothing(w: World) -> None:
    a, data = w.stream(), w.memory()
    host = np.zeros(N, np.float32)
    w.ok("cuMemcpyHtoD", data, host.ctypes.data, host.nbytes)
    w.begin(a)
    w.ok("cuMemsetD8Async", data, 255, 4 * N, a)
    graph = w.end(a)
    exe = w.instantiated(graph)
    w.ok("cuGraphNodeSetEnabled", exe, w.nodes(graph)[0], 0)
    w.ok("cuGraphLaunch", exe, a)
    w.ok("cuStreamSynchronize", a)
    w.ok("cuMemcpyDtoH", host.ctypes.data, data, host.nbytes)
    assert not host.any()


@rule("CUDA driver API, cuGraphInstantiate")
def a_graph_of_a_destroyed_partition_is_not_instantiated(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, _whole(w), 0, 16)[0][0]
    green = w.ok("cuGreenCtxCreate", w.ok("cuDevResourceGenerateDesc", [part], 1), 0, 1)
    graph = w.captured(w.green_stream(green))
    w.ok("cuGreenCtxDestroy", green)
    w.instantiated(graph, "ERROR_CONTEXT_IS_DESTROYED")


@rule("CUDA driver API, cuGraphDestroy")
def a_destroyed_graph_is_refused(w: World) -> None:
    graph = w.ok("cuGraphCreate", 0)
    w.ok("cuGraphDestroy", graph)
    w.instantiated(graph, "ERROR_INVALID_HANDLE")
    w.logged("use of a destroyed graph")


# ---------------------------------------------------------------------------------------- streams and events


@rule(STREAMS)
def the_legacy_stream_waits_for_blocking_streams(w: World) -> None:
    """Under any order of execution: the executor takes a random one that the rules permit."""
    data, host = w.memory(), np.empty(N, np.uint8)
    for _ in range(20):
        w.ok("cuMemsetD8Async", data, 1, 4 * N, w.stream(nonblocking=False))
        w.ok("cuMemsetD8Async", data, 2, 4 * N, cu.CUstream(0))
        w.ok("cuMemcpyDtoH", host.ctypes.data, data, N)
        assert (host == 2).all()


@rule(STREAMS)
def streams_without_a_wait_have_no_order(w: World) -> None:
    data, host, seen = w.memory(), np.empty(N, np.uint8), set()
    a, b = w.stream(), w.stream()
    for _ in range(64):
        w.ok("cuMemsetD8Async", data, 1, 4 * N, a)
        w.ok("cuMemsetD8Async", data, 2, 4 * N, b)
        w.ok("cuCtxSynchronize")
        w.ok("cuMemcpyDtoH", host.ctypes.data, data, N)
        seen.add(int(host[0]))
    assert seen == {1, 2}


@rule(STREAMS)
def a_wait_orders_two_streams(w: World) -> None:
    data, host, event = w.memory(), np.empty(N, np.uint8), w.event()
    a, b = w.stream(), w.stream()
    for _ in range(64):
        w.ok("cuMemsetD8Async", data, 1, 4 * N, a)
        w.ok("cuEventRecord", event, a)
        w.ok("cuStreamWaitEvent", b, event, 0)
        w.ok("cuMemsetD8Async", data, 2, 4 * N, b)
        w.ok("cuCtxSynchronize")
        w.ok("cuMemcpyDtoH", host.ctypes.data, data, N)
        assert host[0] == 2


@rule(EVENTS)
def elapsed_time_needs_timing(w: World) -> None:
    a, first, second = w.stream(), w.event(2), w.event(0)
    for event in (first, second):
        w.ok("cuEventRecord", event, a)
    w.ok("cuStreamSynchronize", a)
    w.expect("ERROR_INVALID_HANDLE", "cuEventElapsedTime", first, second)


@rule(EVENTS)
def elapsed_time_needs_both_events_reached(w: World) -> None:
    a, first, second = w.stream(), w.event(0), w.event(0)
    w.ok("cuEventRecord", first, a)
    w.expect("ERROR_INVALID_HANDLE", "cuEventElapsedTime", first, second)
    w.ok("cuEventRecord", second, a)
    w.expect("ERROR_NOT_READY", "cuEventElapsedTime", first, second)


@rule(EVENTS)
def elapsed_time_is_the_time_told(w: World) -> None:
    a, first, second = w.stream(), w.event(0), w.event(0)
    w.ok("cuEventRecord", first, a)
    with w.control.launches_take(3e-3):
        w.launch(a, count=0)
        w.launch(a, count=0)
    w.ok("cuEventRecord", second, a)
    w.ok("cuStreamSynchronize", a)
    assert abs(w.ok("cuEventElapsedTime", first, second) - 6.0) < 1e-4


# --------------------------------------------------------------------------------------------------- memory


@rule(MEMORY)
def memory_is_not_freed_twice(w: World) -> None:
    data = w.ok("cuMemAlloc", 64)
    w.ok("cuMemFree", data)
    w.expect("ERROR_INVALID_VALUE", "cuMemFree", data)
    w.logged("freed twice")


@rule(MEMORY)
def a_copy_stays_in_its_allocation(w: World) -> None:
    host, data = np.zeros(4096, np.uint8), w.memory(100)
    w.expect("ERROR_ILLEGAL_ADDRESS", "cuMemcpyHtoD", data, host.ctypes.data, 101)


@rule(MEMORY)
def a_copy_does_not_touch_freed_memory(w: World) -> None:
    host, data = np.zeros(64, np.uint8), w.ok("cuMemAlloc", 64)
    w.ok("cuMemFree", data)
    w.expect("ERROR_ILLEGAL_ADDRESS", "cuMemcpyDtoH", host.ctypes.data, data, 64)


@rule(MEMORY)
def an_allocation_of_nothing_is_refused(w: World) -> None:
    w.expect("ERROR_INVALID_VALUE", "cuMemAlloc", 0)


@rule(MEMORY)
def memory_runs_out(w: World) -> None:
    w.expect("ERROR_OUT_OF_MEMORY", "cuMemAlloc", 1 << 37)


@rule(MEMORY)
def fresh_memory_reads_as_nan(w: World) -> None:
    host, data = np.zeros(N, np.float32), w.memory()
    w.ok("cuMemcpyDtoH", host.ctypes.data, data, host.nbytes)
    assert np.isnan(host).all()


@rule(GUIDE + ", device memory: alignment")
def allocations_are_aligned(w: World) -> None:
    assert all(int(w.memory(size)) % 256 == 0 for size in (1, 100, 5000))


# ------------------------------------------------------------------------------------------------ launches


@rule(EXECUTION)
def a_block_has_at_most_1024_threads(w: World) -> None:
    w.launch(w.stream(), count=0, block=1025, code="ERROR_INVALID_VALUE")


@rule(EXECUTION)
def an_empty_grid_is_refused(w: World) -> None:
    w.launch(w.stream(), count=0, grid=0, code="ERROR_INVALID_VALUE")


@rule(EXECUTION)
def a_grid_is_bounded_in_y(w: World) -> None:
    w.launch(w.stream(), count=0, grid_y=65536, code="ERROR_INVALID_VALUE")


@rule(EXECUTION)
def dynamic_shared_memory_is_bounded(w: World) -> None:
    w.launch(w.stream(), count=0, shared=49153, code="ERROR_INVALID_VALUE")


@rule("CUDA driver API, cuLibraryGetKernel")
def a_kernel_that_is_not_in_the_image_is_not_found(w: World) -> None:
    library = w.ok(
        "cuLibraryLoadData", driver.compiled(driver.kernel_folder() / "pages.cu", "sm_90"), None, None, 0, None, None, 0
    )
    w.expect("ERROR_NOT_FOUND", "cuLibraryGetKernel", library, b"add_f32")
    w.ok("cuLibraryUnload", library)


@rule("CUDA driver API, cuLibraryLoadData; binary compatibility")
def a_cubin_of_another_architecture_is_refused(w: World) -> None:
    code = driver.compiled(driver.kernel_folder() / "pages.cu", "sm_80")
    w.expect("ERROR_NO_BINARY_FOR_GPU", "cuLibraryLoadData", code, None, None, 0, None, None, 0)


@rule("CUDA driver API, cuGetProcAddress")
def an_entry_point_that_is_missing_says_its_name(w: World) -> None:
    status = cu.cuCtxResetPersistingL2Cache()[0]
    assert status.name == "CUDA_ERROR_NOT_SUPPORTED"
    assert "cuCtxResetPersistingL2Cache" in w.control.report().last_refusal


def check_rules(control: virtual.Control) -> dict[str, str]:
    """Run the table; rule -> "" or what went wrong."""
    gpu = driver.Gpu.open()
    gpu.kernel("add_f32", "elementwise")  # compiled before any capture
    results: dict[str, str] = {}
    for each in RULES:
        control.clear_log()
        world = World(gpu, control)
        try:
            each.check(world)
            results[each.name] = ""
        except Exception as error:  # any failure of a check is a result
            results[each.name] = f"{type(error).__name__}: {error}"
        finally:
            world.close()
    return results


def main() -> None:
    """Print the rules that fail."""
    control = virtual.load("virtual:h100_sxm")
    results = check_rules(control)
    for name, text in results.items():
        print("ok  " if not text else "FAIL", name, text)
    print(len(results), sum(not t for t in results.values()))


if __name__ == "__main__":
    main()
