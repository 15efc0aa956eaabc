"""`taskgraph.models.engine` of version 0.1 under its old name, with the arguments that its callers give."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import taskgraph as tg
from taskgraph.models.config import ModelConfig
from taskgraph.serving.engine import Engine, Stats
from taskgraph.serving.options import KvMemory, Planner, Policy
from taskgraph.serving.runners import cpu
from taskgraph.serving.scheduler import Limits

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "Stats", "cpu_engine"]

_MEMORY = ("pages", "host_pages", "disk", "disk_pages", "page_size")
_POLICY = ("prefix_sharing", "expected_output", "most_waiting")


class Options(TypedDict, total=False):
    """The fields of `KvMemory` and of `Policy`."""

    pages: int
    page_size: int
    host_pages: int
    disk: Path | None
    disk_pages: int
    prefix_sharing: bool
    expected_output: float | None
    most_waiting: int


def cpu_engine(
    config: ModelConfig,
    weights: "Mapping[str, torch.Tensor]",
    limits: Limits,
    *,
    dtype: str = "auto",
    device: "str | tg.Device" = "cpu",
    planner: str | Planner | None = None,
    **options: Unpack[Options],
) -> Engine:
    """`serving.runners.cpu.cpu_engine` with its memory and its policy field by field; PlanError for a `dtype` that is
    neither "auto" nor that of the weights."""
    mine = tg.dtypes.dtype_of(weights)
    if dtype not in ("auto", mine):
        raise tg.PlanError(f"the weights are {mine}; load them as {dtype!r} instead of asking the engine for it.")
    given: dict[str, Any] = dict(options)
    memory, policy = ({name: given.pop(name) for name in names if name in given} for names in (_MEMORY, _POLICY))
    if given:
        raise TypeError(f"cpu_engine() got an unexpected keyword argument {next(iter(given))!r}")
    return cpu.cpu_engine(
        config, weights, limits, KvMemory(**memory), device=device, planner=planner or "auto", policy=Policy(**policy)
    )
