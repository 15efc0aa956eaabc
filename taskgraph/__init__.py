"""taskgraph: declare layers with their demands, plan them onto streams and SM partitions, capture, replay.

Names are loaded on first use, so importing the package imports neither torch nor numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taskgraph import moved

if TYPE_CHECKING:
    from taskgraph import cache as cache
    from taskgraph import embed as embed
    from taskgraph import observe as observe
    from taskgraph import ops as ops
    from taskgraph import record as record
    from taskgraph import rewrite as rewrite
    from taskgraph import units as units
    from taskgraph.cache import CacheWarning
    from taskgraph.cost.profiles import ProfileDB
    from taskgraph.embed.importer import from_torch
    from taskgraph.errors import (
        BackendUnavailable,
        CalibrationError,
        CaptureMismatch,
        ConfigError,
        CudaError,
        DemandError,
        DeviceError,
        ExecutionError,
        GraphError,
        KeyFileError,
        NetworkError,
        PlanError,
        ProfileError,
        RankLost,
        RequestError,
        TaskgraphError,
        WeightsError,
    )
    from taskgraph.graph import device as devices
    from taskgraph.graph.device import Device, Geometry, Partition
    from taskgraph.graph.functions import Splittable
    from taskgraph.graph.graph import Graph, GraphBuilder, Value
    from taskgraph.graph.op import Demand, Op, Tensor, Work, demand, spec
    from taskgraph.observe.explain import explain
    from taskgraph.observe.report import write_report
    from taskgraph.observe.trace import write_trace
    from taskgraph.observe.tuned import explain_tuned
    from taskgraph.runtime import distributed as distributed
    from taskgraph.runtime import dtypes as dtypes
    from taskgraph.runtime.backend import compile
    from taskgraph.runtime.bank import GraphBank
    from taskgraph.runtime.cpu import public as cpu
    from taskgraph.runtime.executable import Executable
    from taskgraph.runtime.gpu import public as gpu
    from taskgraph.schedule.audit import audit
    from taskgraph.schedule.beside import Side, beside, halves, plan_beside
    from taskgraph.schedule.choices import Chosen, plan_collectives
    from taskgraph.schedule.plan import Bounds, Lane, Period, Plan, Span, Step, Timeline, Verdict
    from taskgraph.schedule.planner import plan
    from taskgraph.schedule.sliced import verify
    from taskgraph.tune.autotune import Tuned, autotune, costs_known
    from taskgraph.tune.known import KnownPlans

__version__ = "0.1.0"

_HOME = {
    "taskgraph.cache": "CacheWarning",
    "taskgraph.cost.profiles": "ProfileDB",
    "taskgraph.embed.importer": "from_torch",
    "taskgraph.errors": (
        "BackendUnavailable CalibrationError CaptureMismatch ConfigError CudaError DemandError "
        "DeviceError ExecutionError GraphError KeyFileError NetworkError PlanError ProfileError RankLost "
        "RequestError TaskgraphError WeightsError"
    ),
    "taskgraph.graph.device": "Device Geometry Partition",
    "taskgraph.graph.functions": "Splittable",
    "taskgraph.graph.graph": "Graph GraphBuilder Value",
    "taskgraph.graph.op": "Demand Op Tensor Work demand spec",
    "taskgraph.schedule.audit": "audit",
    "taskgraph.schedule.beside": "Side beside halves plan_beside",
    "taskgraph.schedule.choices": "Chosen plan_collectives",
    "taskgraph.schedule.plan": "Bounds Lane Period Plan Span Step Timeline Verdict",
    "taskgraph.schedule.planner": "plan",
    "taskgraph.schedule.sliced": "verify",
    "taskgraph.observe.tuned": "explain_tuned",
    "taskgraph.runtime.backend": "compile",
    "taskgraph.runtime.bank": "GraphBank",
    "taskgraph.runtime.executable": "Executable",
    "taskgraph.tune.autotune": "Tuned autotune costs_known",
    "taskgraph.tune.known": "KnownPlans",
    "taskgraph.observe.explain": "explain",
    "taskgraph.observe.report": "write_report",
    "taskgraph.observe.trace": "write_trace",
}
_MODULES = {
    **{
        name: f"taskgraph.{name}"
        for name in ["cache", "embed", "network", "observe", "ops", "record", "rewrite", "units"]
    },
    "cpu": "taskgraph.runtime.cpu.public",
    "devices": "taskgraph.graph.device",
    "distributed": "taskgraph.runtime.distributed",
    "dtypes": "taskgraph.runtime.dtypes",
    "gpu": "taskgraph.runtime.gpu.public",
}
"""Public modules, by their public names. `models/` and `serving/` see these and the names of `_HOME`, nothing else."""
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(["__version__", *_WHERE, *_MODULES])  # noqa: PLE0605


moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _WHERE:
        raise AttributeError(f"module 'taskgraph' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
