"""`taskgraph.models.engine` of version 0.1 under its old name, with the arguments that its callers give."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

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
    unknown = next((name for name in options if name not in (*_MEMORY, *_POLICY)), None)
    if unknown is not None:
        raise TypeError(f"cpu_engine() got an unexpected keyword argument {unknown!r}")
    memory = KvMemory(**{name: options[name] for name in _MEMORY if name in options})  # type: ignore[literal-required]
    policy = Policy(**{name: options[name] for name in _POLICY if name in options})  # type: ignore[literal-required]
    return cpu.cpu_engine(
        config, weights, limits, memory, device=device, planner="auto" if planner is None else planner, policy=policy
    )
