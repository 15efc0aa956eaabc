"""Runs the engine's batches on a GPU, real or virtual: captured steps over weights and pages that are on it once."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch

from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import PageShape
from taskgraph.runtime.cpu.dense import TORCH_DTYPE
from taskgraph.runtime.dtypes import dtype_of
from taskgraph.runtime.gpu.arrays import DeviceTensors
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.spec import planning_device
from taskgraph.runtime.gpu.virtual import is_virtual
from taskgraph.serving.engine import Engine, Options, paged_engine
from taskgraph.serving.known_plans import Planner
from taskgraph.serving.runners.planned import CpuRunner
from taskgraph.serving.scheduler import Batch, Ints, Limits


class GpuRunner(CpuRunner):
    """A `CpuRunner` whose steps are captured on this machine's GPU, or on the virtual `device` ("virtual:h100_sxm").

    Pages of the host are pinned. A step's inputs are written on the host and uploaded before its launch; of its outputs
    only the rows that are sampled come back."""

    backend = "cuda"

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        shape: PageShape,
        limits: Limits,
        *,
        dtype: str = "bf16",
        device: str | None = None,
        scheduler: str = "auto",
        budget_bytes: float = 2e9,
        planner: Planner | None = None,
    ) -> None:
        self._run_on = device
        super().__init__(
            config, weights, shape, limits, dtype=dtype, device=planning_device(device), scheduler=scheduler,
            budget_bytes=budget_bytes, planner=planner,
        )  # fmt: skip

    def _placed(self, weights: Mapping[str, torch.Tensor], rooms: Mapping[str, tuple[int, ...]]) -> DeviceTensors:
        held = DeviceTensors(weights, self._run_on)
        try:
            for name, shape in rooms.items():
                held.zeros(name, shape, self.dtype, pinned=name.rpartition("/")[2].startswith("host_"))
        except BaseException:
            held.close()
            raise
        return held

    def run(self, batch: Batch) -> tuple[Ints, float]:
        Gpu.open(self._run_on)  # current in this thread
        return super().run(batch)

    def _give(self, executable: Any, write: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        inputs = executable.inputs
        host = {name: torch.empty(array.shape, dtype=TORCH_DTYPE[array.dtype]) for name, array in inputs.items()}
        write(host)
        for name, array in inputs.items():
            array.copy_(host[name])

    def _measured_s(self, begin_s: float) -> float | None:
        return None if is_virtual(self._run_on) else super()._measured_s(begin_s)

    def _rows(self, executable: Any, name: str, rows: Ints) -> torch.Tensor:
        found: torch.Tensor = executable.outputs[name].rows(rows)
        return found

    def _entries(self, executable: Any, name: str, rows: Ints, columns: Ints) -> torch.Tensor:
        found: torch.Tensor = executable.outputs[name].entries(rows, columns)
        return found

    def _on_host(self, name: str) -> torch.Tensor:
        assert isinstance(self._bound, DeviceTensors)
        return self._bound.on_host(name)

    def close(self) -> None:
        Gpu.open(self._run_on)  # as above: an engine may be closed by another thread than it began in
        super().close()
        assert isinstance(self._bound, DeviceTensors)
        self._bound.close()


def gpu_engine(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    limits: Limits,
    *,
    dtype: str = "auto",
    device: str | None = None,
    scheduler: str = "auto",
    planner: Planner | None = None,
    **options: Unpack[Options],
) -> Engine:
    """An engine on a GPU. `weights` are those of `llama.load_weights` in `dtype` ("auto": theirs); see `GpuRunner`."""
    dtype = dtype_of(weights, dtype)
    return paged_engine(
        lambda shape: GpuRunner(
            config, weights, shape, limits, dtype=dtype, device=device, scheduler=scheduler, planner=planner
        ),
        limits,
        config.vocab_size,
        **options,
    )
