"""Runs the engine's batches on a GPU, real or virtual: captured steps over weights and pages that are on it once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

import taskgraph as tg
from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import PageShape
from taskgraph.serving.engine import Engine, paged_engine
from taskgraph.serving.options import KvMemory, Planner, Policy
from taskgraph.serving.runners.cpu import CpuRunner
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
        device: str | None = None,
        planner: str | Planner = "auto",
    ) -> None:
        self._run_on = device
        super().__init__(config, weights, shape, limits, device=tg.gpu.planning_device(device), planner=planner)

    def _placed(
        self, weights: Mapping[str, torch.Tensor], rooms: Mapping[str, tuple[int, ...]]
    ) -> tg.gpu.DeviceTensors:
        held = tg.gpu.DeviceTensors(weights, self._run_on)
        try:
            for name, shape in rooms.items():
                held.zeros(name, shape, self.dtype, pinned=name.rpartition("/")[2].startswith("host_"))
        except BaseException:
            held.close()
            raise
        return held

    def run(self, batch: Batch) -> tuple[Ints, float]:
        tg.gpu.Gpu.open(self._run_on)  # current in this thread
        return super().run(batch)

    def _give(self, executable: Any, write: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        inputs = executable.inputs
        host = {
            name: torch.empty(array.shape, dtype=tg.dtypes.torch_dtype(array.dtype)) for name, array in inputs.items()
        }
        write(host)
        for name, array in inputs.items():
            array.copy_(host[name])

    def _measured_s(self, begin_s: float) -> float | None:
        return None if tg.gpu.is_virtual(self._run_on) else super()._measured_s(begin_s)

    def _rows(self, executable: Any, name: str, rows: Ints) -> torch.Tensor:
        found: torch.Tensor = executable.outputs[name].rows(rows)
        return found

    def _entries(self, executable: Any, name: str, rows: Ints, columns: Ints) -> torch.Tensor:
        found: torch.Tensor = executable.outputs[name].entries(rows, columns)
        return found

    def _on_host(self, name: str) -> torch.Tensor:
        assert isinstance(self._bound, tg.gpu.DeviceTensors)
        return self._bound.on_host(name)

    def close(self) -> None:
        tg.gpu.Gpu.open(self._run_on)  # as above: an engine may be closed by another thread than it began in
        super().close()
        assert isinstance(self._bound, tg.gpu.DeviceTensors)
        self._bound.close()


def gpu_engine(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    limits: Limits,
    memory: KvMemory,
    *,
    device: str | None = None,
    planner: str | Planner = "auto",
    policy: Policy | None = None,
) -> Engine:
    """An engine on a GPU; see `GpuRunner`. `weights` are those of `llama.load_weights`, in bf16 or f32."""

    def make(shape: PageShape) -> GpuRunner:
        return GpuRunner(config, weights, shape, limits, device=device, planner=planner)

    return paged_engine(make, limits, memory, config.vocab_size, policy)
