"""Streams, events, memory and launches."""

import numpy as np
from cuda.bindings import driver as cu

from benchmarks.capture_rules.world import EVENTS, EXECUTION, GUIDE, MEMORY, STREAMS, N, World, rule
from taskgraph.runtime.gpu import driver


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
