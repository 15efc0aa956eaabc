"""compile(): a Plan becomes an Executable on a backend."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol, Self

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.graph import Graph
from taskgraph.schedule.plan import Plan, Timeline
from taskgraph.schedule.verify import verify

BACKENDS = {"cpu": "taskgraph.runtime.cpu:CpuExecutable", "sim": "taskgraph.runtime.sim:SimExecutable"}


class Executable(Protocol):
    """A captured plan on a backend. `close()` frees its threads and memory; a `with` block does it for you."""

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The output buffers by tensor name; each replay overwrites them."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes that it holds itself: arena, inputs and outputs, not what is bound."""
        ...

    def bind(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Use these tensors in place, without a copy, from the next replay on."""
        ...

    def __call__(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> dict[str, Any]:
        """Copy the given inputs into their buffers, bind weights and states, replay, return copies of the outputs."""
        ...

    def launch(self, stream: object = None) -> None:
        """Replay once with what is bound."""
        ...

    def timeline(self) -> Timeline:
        """Replay once with a clock around every op."""
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def compile(
    graph: Graph, plan: Plan, backend: str = "cpu", functions: Mapping[str, Callable[..., Any]] | None = None
) -> Executable:
    """An Executable of `plan` on `backend` ("cpu" or "sim"), after the plan has passed `verify`.

    `functions` gives Python functions for custom ops whose function cannot be imported by name.
    PlanError when plan and graph do not fit; BackendUnavailable for a backend that is not here.
    """
    verify(plan, graph)
    if backend not in BACKENDS:
        hint = " The cuda backend is not part of this version." if backend == "cuda" else ""
        raise BackendUnavailable(f"no backend {backend!r}; use one of {', '.join(BACKENDS)}.{hint}")
    module, _, name = BACKENDS[backend].partition(":")
    made: Executable = getattr(import_module(module), name)(graph, plan, functions or {})
    return made
