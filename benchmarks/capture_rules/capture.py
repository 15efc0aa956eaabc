"""Stream capture and its modes."""

import numpy as np
from cuda.bindings import driver as cu

from benchmarks.capture_rules.world import CAPTURE, GLOBAL, MODES, RELAXED, THREAD_LOCAL, N, World, elsewhere, rule


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
