"""Modules that moved: their names of version 0.1 go on to work, with a warning that says the new one.

The finder is asked only for names that no module has, so it costs an import nothing.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_SERVING = {
    **{name: name for name in (
        "guides", "local", "requests", "sampling", "scheduler", "service", "session", "steering",
        "textstream",
    )},
    **{name: f"http.{name}" for name in ("access", "answers", "keys", "metrics", "page", "protocol", "status")},
    "engine": "earlier", "serve": "http.app",
    "chances": "http.logprobs", "kv_cache": "cache.pages", "parking": "cache.parking",
    "disk": "cache.disk", "runner": "runners.cpu", "gpu_runner": "runners.gpu", "ranks_runner": "runners.parallel",
    "ranks": "ranks.processes", "replicas": "ranks.replicas", "simulate": "simulate.runner",
    "stepgrid": "simulate.stepgrid", "traces": "simulate.traces",
}  # fmt: skip
_RUNTIME = {
    **{name: f"runtime.gpu.{name}" for name in ("arrays", "driver", "interop", "readback", "virtual")},
    **{name: f"runtime.cpu.{name}" for name in ("choose", "kernels", "lanes", "probe", "products", "tile", "ways")},
    "cuda": "runtime.gpu.executable", "gpu_spec": "runtime.gpu.spec", "tune": "tune.autotune",
    "measure": "tune.measure", "fill": "tune.fill", "gpucheck": "tune.gpucheck",
}  # fmt: skip
_SCHEDULE = {
    **{name: f"rewrite.{name}" for name in ("batch", "collectives", "nanobatch", "offload", "rebuild")},
    **{name: f"schedule.solve.{name}" for name in ("explore", "lists", "proof", "rules")},
    **{name: f"schedule.rcpsp.{name}" for name in ("evolve", "exact", "passes", "project", "sgs")},
    "rewrite": "rewrite", "search": "schedule.solve.annealing", "periodic": "schedule.solve.cycles",
}  # fmt: skip
MOVED: Mapping[str, str] = {
    **{f"taskgraph.models.{old}": f"taskgraph.serving.{new}" for old, new in _SERVING.items() if old != "keys"},
    "taskgraph.models.chat": "taskgraph.models.text.chat",
    "taskgraph.models.tokenizer": "taskgraph.models.text.tokenizer",
    "taskgraph.models.gguf_config": "taskgraph.models.gguf.config",
    "taskgraph.models.gguf_file": "taskgraph.models.gguf.file",
    "taskgraph.models.gguf_tokenizer": "taskgraph.models.gguf.tokenizer",
    "taskgraph.models.dtypes": "taskgraph.runtime.dtypes",
    "taskgraph.models.known_plans": "taskgraph.tune.known",
    **{f"taskgraph.runtime.{old}": f"taskgraph.{new}" for old, new in _RUNTIME.items()},
    **{f"taskgraph.schedule.{old}": f"taskgraph.{new}" for old, new in _SCHEDULE.items()},
}
"""Module of version 0.1 -> where its names are now."""


class _Forward:
    """Gives the module at its new place under its old name too."""

    def __init__(self, new: str) -> None:
        self._new = new
        self._own: ModuleSpec | None = None

    def create_module(self, spec: "ModuleSpec") -> "ModuleType":
        """The module at its new place."""
        made = import_module(self._new)
        self._own = made.__spec__
        return made

    def exec_module(self, module: "ModuleType") -> None:
        """Nothing: it is loaded."""
        module.__spec__ = self._own  # the import system set that of the old name


class _Finder:
    """What `sys.meta_path` asks last."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Where a moved module is, and a warning that it has moved."""
        new = MOVED.get(fullname)
        if new is None:
            return None
        import warnings
        from importlib.machinery import ModuleSpec

        warnings.warn(f"{fullname} is {new} now; the old name goes with version 0.3.", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Forward(new))  # type: ignore[arg-type]  # importlib.abc would cost every import


def install() -> None:
    """Let old names be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
