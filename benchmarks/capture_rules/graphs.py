"""Updates of executable graphs."""

from typing import Any

import numpy as np

from benchmarks.capture_rules.world import UPDATE, N, World, rule


def _two_partitions(w: World) -> tuple[Any, Any]:
    whole = w.whole()
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
    part = w.ok("cuDevSmResourceSplitByCount", 1, w.whole(), 0, 16)[0][0]
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
