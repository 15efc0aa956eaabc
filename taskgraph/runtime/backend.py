"""compile(): a Plan becomes an Executable on a backend."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.graph.graph import Graph
from taskgraph.plugins import Registry
from taskgraph.record import instance, shown
from taskgraph.runtime.cpu.ways import Ways
from taskgraph.runtime.executable import Executable, Options
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.sliced import sliced, verify

if TYPE_CHECKING:
    from taskgraph.runtime.distributed import Group

BACKENDS: Registry[type[Executable]] = Registry(
    "backend",
    "taskgraph.backends",
    {
        "cpu": "taskgraph.runtime.cpu.executable:CpuExecutable",
        "sim": "taskgraph.runtime.sim:SimExecutable",
        "cuda": "taskgraph.runtime.gpu.executable:CudaExecutable",
    },
    BackendUnavailable,
    fits=lambda found: isinstance(found, type) and issubclass(found, Executable),
    must="a class that derives from taskgraph.Executable",
)
"""The backends by name: Executable classes, which are made with the plan's graph, the plan and the options."""

_MEANS = {
    "device": "choice of device, as cuda has",
    "group": "collectives between ranks, as cpu and cuda have",
    "ways": "choice of how to multiply, as cpu has",
}
"""What each option that not every backend takes is for."""


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
    """An Executable of `plan` on `backend`, after the plan has passed `verify`.

    The backend is "cpu", "cuda" or "sim", or one that another package brings (entry points `taskgraph.backends`).

    `functions` gives Python functions for custom ops whose function cannot be imported by name. `device` is for the
    cuda backend: "virtual:h100_sxm" runs on the virtual driver, whose times are simulated. `group` are the ranks that
    collectives are between (see runtime.distributed); all of them must compile and replay alike. `ways` forces how
    the cpu backend multiplies, which the probe of this machine chooses otherwise. With `check` every replay is what
    `Executable.check` is, many times slower: for the development of custom ops.
    PlanError when plan and graph do not fit; BackendUnavailable for a backend that is not here.
    """
    verify(plan, graph)
    made = BACKENDS[backend]
    if functions is not None:
        instance("functions", functions, Mapping, PlanError, "It holds functions by their names in the graph.")
    if ways is not None:
        instance("ways", ways, Ways, PlanError)
    if device is not None and not isinstance(device, str):
        raise BackendUnavailable(f"device={shown(device)} must be a text, such as 'virtual:h100_sxm'.")
    options = Options(dict(functions or {}), device, group, ways, instance("check", check, bool, PlanError))
    for option, what in _MEANS.items():
        given = getattr(options, option)
        if given is not None and option not in made.takes:
            raise BackendUnavailable(f"{option}={shown(given)}: the {backend} backend has no {what}; leave it out.")
    return made(sliced(plan, graph), plan, options)
