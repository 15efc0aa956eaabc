"""Kernels that may start while the kernel before them runs: programmatic dependent launch in captured graphs."""

from typing import Any

from cuda.bindings import driver as cu

from benchmarks.capture_rules.world import UPDATE, World, rule

DEPENDENT = "CUDA Programming Guide, Programmatic Dependent Launch: use in CUDA Graphs"
EDGES = "CUDA driver API, CUgraphEdgeData"
PROGRAMMATIC = int(cu.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)


def _edges(w: World, graph: Any) -> list[tuple[int, int]]:
    """Type and port of every edge."""
    *_, count = w.ok("cuGraphGetEdges", graph)
    data = w.ok("cuGraphGetEdges", graph, count)[2] if count else []
    return [(each.type, each.from_port) for each in data[:count]]


def _chain(w: World, *dependent: bool) -> Any:
    """A graph of launches in a row, some of them dependent."""
    a = w.stream()
    w.begin(a)
    for each in dependent:
        w.launch(a, count=0, dependent=each)
    return w.end(a)


@rule(DEPENDENT)
def a_dependent_launch_gets_a_programmatic_edge(w: World) -> None:
    assert _edges(w, _chain(w, True, True, False)) == [(PROGRAMMATIC, 1), (0, 0)]


@rule(EDGES)
def after_a_copy_the_edge_is_full(w: World) -> None:
    a, data = w.stream(), w.memory()
    w.begin(a)
    w.ok("cuMemsetD8Async", data, 0, 16, a)
    w.launch(a, count=0, dependent=True)
    assert _edges(w, w.end(a)) == [(0, 0)]


@rule("CUDA driver API, cuGraphNodeGetDependencies")
def a_node_says_how_it_depends(w: World) -> None:
    node = w.nodes(_chain(w, False, True))[1]
    assert w.ok("cuGraphNodeGetDependencies", node, 1)[1][0].type == PROGRAMMATIC


@rule(UPDATE)
def an_update_may_not_change_what_an_edge_is(w: World) -> None:
    exe = w.instantiated(_chain(w, False, True))
    w.ok("cuGraphExecUpdate", exe, _chain(w, False, True))
    w.expect("ERROR_GRAPH_EXEC_UPDATE_FAILURE", "cuGraphExecUpdate", exe, _chain(w, False, False))


@rule(DEPENDENT)
def a_dependent_launch_that_waits_for_two_is_not_offered(w: World) -> None:
    """What such edges become is not written; the backend makes none."""
    a, b, fork, join = w.stream(), w.stream(), w.event(), w.event()
    w.begin(a)
    w.launch(a, count=0)
    w.ok("cuEventRecord", fork, a)
    w.ok("cuStreamWaitEvent", b, fork, 0)
    w.launch(b, count=0)
    w.launch(a, count=0)
    w.ok("cuEventRecord", join, b)
    w.ok("cuStreamWaitEvent", a, join, 0)
    w.launch(a, count=0, dependent=True, code="ERROR_NOT_SUPPORTED")
    w.end(a)
