"""compile(): a Plan becomes an Executable on a backend."""

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.graph.graph import Graph
from taskgraph.record import instance, shown
from taskgraph.runtime.cpu.ways import Ways
from taskgraph.schedule.plan import Plan, Timeline
from taskgraph.schedule.sliced import sliced, verify

if TYPE_CHECKING:
    from taskgraph.runtime.distributed import Group

BACKENDS = {
    "cpu": "taskgraph.runtime.cpu.executable:CpuExecutable",
    "sim": "taskgraph.runtime.sim:SimExecutable",
    "cuda": "taskgraph.runtime.gpu.executable:CudaExecutable",
}

_WITH_RANKS = ("cpu", "cuda")


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

    def check(self, kinds: Collection[str] | None = None) -> None:
        """Replay once, op by op, and look at what each op does (of these kinds; None: all).

        ExecutionError, which names the op, for one that changes anything but its outputs and the states that it names
        in `writes`, leaves a part of an output unwritten, or makes NaN out of inputs without any. Ops run twice.
        """
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def compile(
    graph: Graph,
    plan: Plan,
    backend: str = "cpu",
    functions: Mapping[str, Callable[..., Any]] | None = None,
    device: str | None = None,
    group: "Group | None" = None,
    ways: Ways | None = None,
    check: bool = False,
) -> Executable:
    """An Executable of `plan` on `backend` ("cpu", "cuda" or "sim"), after the plan has passed `verify`.

    `functions` gives Python functions for custom ops whose function cannot be imported by name. `device` is for the
    cuda backend: "virtual:h100_sxm" runs on the virtual driver, whose times are simulated. `group` are the ranks that
    collectives are between (see runtime.distributed); all of them must compile and replay alike. `ways` forces how
    the cpu backend multiplies, which the probe of this machine chooses otherwise. With `check` every replay is what
    `Executable.check` is, many times slower: for the development of custom ops.
    PlanError when plan and graph do not fit; BackendUnavailable for a backend that is not here.
    """
    verify(plan, graph)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise BackendUnavailable(f"no backend {shown(backend)}; use one of {', '.join(BACKENDS)}.")
    if functions is not None:
        instance("functions", functions, Mapping, PlanError, "It holds functions by their names in the graph.")
    if device is not None and (backend != "cuda" or not isinstance(device, str)):
        raise BackendUnavailable(
            f"device={shown(device)} is for the cuda backend; the {backend} backend takes the plan's."
        )
    module, _, name = BACKENDS[backend].partition(":")
    if group is not None and backend not in _WITH_RANKS:
        raise BackendUnavailable(f"the {backend} backend has no collectives between ranks; leave group= out.")
    if ways is not None:
        instance("ways", ways, Ways, PlanError)
    if ways is not None and backend != "cpu":
        raise BackendUnavailable(f"ways= is for the cpu backend; the {backend} backend has one way to multiply.")
    checked = instance("check", check, bool, PlanError) or None
    given = (("device", device), ("group", group), ("ways", ways), ("check", checked))
    extra = {key: value for key, value in given if value is not None}
    made: Executable = getattr(import_module(module), name)(sliced(plan, graph), plan, functions or {}, **extra)
    return made
