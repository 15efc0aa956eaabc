"""Captures of streams, and what the driver says about the graphs that they give."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from taskgraph.runtime.gpu.driver import check, cuda_error, driver_errors


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the driver says about a captured node: its kind ("kernel", "memcpy", ...), its kernel's name and the
    context it will run in (0: not told)."""

    handle: int
    kind: str
    kernel: str = ""
    context: int = 0


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """A captured graph as the driver gives it back. `dependent` are those of the `edges` whose kernel may start while
    the kernel before it runs (programmatic dependent launch)."""

    nodes: tuple[NodeFacts, ...]
    edges: tuple[tuple[int, int], ...]
    dependent: frozenset[tuple[int, int]] = frozenset()


class Capture:
    """A stream capture in thread-local mode that starts on `origin`; `graph` is there after `end`."""

    def __init__(self, origin: Any) -> None:
        with driver_errors("begin the capture"):
            self.builder = origin.create_graph_builder()
            self.builder.begin_building("thread_local")
        self.closed = False
        self._origin = origin

    def end(self) -> None:
        """End it; CudaError when the driver refuses, for instance for a lane that was not joined."""
        self.closed = True
        with driver_errors("end the capture"):
            self.builder.end_building()

    def abandon(self) -> None:
        """End it whatever state it is in, after an error."""
        from cuda.bindings import driver as cu

        if self.closed:
            return
        self.closed = True
        status, graph = cu.cuStreamEndCapture(self._origin.handle)  # the builder refuses to end an invalid capture
        if not int(status) and int(graph):
            cu.cuGraphDestroy(graph)

    @property
    def handle(self) -> Any:
        """The CUgraph."""
        return self.builder.graph_definition.handle

    def instantiate(self) -> Any:
        """The executable graph."""
        with driver_errors("instantiate the graph"):
            return self.builder.complete()

    def close(self) -> None:
        """Free the captured graph; executables made from it live on."""
        self.abandon()
        with _ignored():
            self.builder.close()


@contextmanager
def _ignored() -> Iterator[None]:
    """Errors of the driver while cleaning up after an error."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("CUDAError", "RuntimeError"):
            raise


def last_nodes(stream: Any) -> tuple[int, ...]:
    """The nodes that the next node captured on `stream` will follow."""
    from cuda.bindings import driver as cu

    _, _, _, nodes, _, count = check("read the capture", cu.cuStreamGetCaptureInfo(stream.handle))
    return tuple(int(node) for node in nodes[:count])


def capturing(stream: Any) -> bool:
    """Whether a capture that `stream` belongs to is going on and still valid."""
    from cuda.bindings import driver as cu

    code, state, *_ = cu.cuStreamGetCaptureInfo(stream.handle)
    return not int(code) and int(state) == int(cu.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE)


def captured_handles(stream: Any) -> tuple[int, ...]:
    """All nodes captured so far by the capture that `stream` belongs to; CudaError when there is none any more."""
    from cuda.bindings import driver as cu

    state, _, graph, _, _, _ = check("read the capture", cu.cuStreamGetCaptureInfo(stream.handle))
    if int(state) != int(cu.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE):
        raise cuda_error("read the capture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
    return tuple(int(node) for node in _listed(cu.cuGraphGetNodes, graph))


def _listed(call: Callable[..., Any], handle: Any) -> list[Any]:
    _, count = check("count", call(handle))
    if not count:
        return []
    values, count = check("list", call(handle, count))
    return list(values[:count])


def read_graph(handle: Any) -> GraphFacts:
    """Nodes with their kernels and contexts, and edges."""
    from cuda.bindings import driver as cu

    kernels: dict[int, str] = {}

    def facts(node: Any) -> NodeFacts:
        kind = _kind(node)
        if kind != "kernel":
            return NodeFacts(int(node), kind)
        params = check("node parameters", cu.cuGraphKernelNodeGetParams(node))
        kernel = int(params.kern) or int(params.func)
        if kernel not in kernels:
            named = cu.cuKernelGetName(params.kern) if int(params.kern) else cu.cuFuncGetName(params.func)
            kernels[kernel] = check("kernel name", named).decode()
        return NodeFacts(int(node), kind, kernels[kernel], int(params.ctx))

    nodes = tuple(facts(node) for node in _listed(cu.cuGraphGetNodes, handle))
    *_, count = check("count edges", cu.cuGraphGetEdges(handle))
    if not count:
        return GraphFacts(nodes, ())
    begins, ends, data, count = check("list edges", cu.cuGraphGetEdges(handle, count))
    edges = tuple((int(a), int(b)) for a, b in zip(begins[:count], ends[:count], strict=True))
    early = int(cu.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
    dependent = frozenset(edge for edge, told in zip(edges, data[:count], strict=True) if told.type == early)
    return GraphFacts(nodes, edges, dependent)


def _kind(node: Any) -> str:
    from cuda.bindings import driver as cu

    return str(check("node type", cu.cuGraphNodeGetType(node)).name.rpartition("TYPE_")[2].lower())


def is_kernel(node: int) -> bool:
    """Whether a captured node is a kernel's."""
    from cuda.bindings import driver as cu

    return _kind(cu.CUgraphNode(node)) == "kernel"


def record_external(event: Any, stream: Any) -> None:
    """Capture a node that records `event` at every launch of the graph."""
    from cuda.bindings import driver as cu

    flag = cu.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
    check("record an event", cu.cuEventRecordWithFlags(event.handle, stream.handle, int(flag)))
