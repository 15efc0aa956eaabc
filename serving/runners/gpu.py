"""Runs the engine's batches on a GPU, real or virtual: captured steps over weights and pages that are on it once.

A step is one upload, one launch and one download. It draws its tokens itself and keeps them for the next one, which may
therefore be launched before the host knows them.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

import taskgraph as tg
from taskgraph.models import llama, paged
from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import Bucket, PageShape
from taskgraph.serving import sampling
from taskgraph.serving.engine import Engine, paged_engine
from taskgraph.serving.options import KvMemory, Planner, Policy
from taskgraph.serving.runners.buckets import clear, fill, fill_draws, sampled_rows
from taskgraph.serving.runners.cpu import CpuRunner
from taskgraph.serving.runners.runner import Ran
from taskgraph.serving.sampling import Draws
from taskgraph.serving.scheduler import Batch, Ints, Limits

_KEPT = "kept"


class _UnderWay(NamedTuple):
    """A step that was launched and not waited for."""

    executable: Any
    bucket: Bucket
    rows: Ints
    draws: Draws | None
    launched_s: float


class GpuRunner(CpuRunner):
    """A `CpuRunner` whose steps are captured on this machine's GPU, or on the virtual `device` ("virtual:h100_sxm").

    Pages of the host are pinned. Samples whose logits the host must see (biases, penalties, grammars, chances) come
    down as rows of logits and are drawn there."""

    backend = "cuda"
    ahead: ClassVar[bool] = True

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
        self._run_on, self._kept = device, limits.sequences + limits.chunks
        self.pipeline = tg.gpu.Pipeline(device)
        self._under_way: deque[_UnderWay] = deque()
        self._before: Ints = np.empty(0, np.int64)
        self._ended_s = 0.0
        super().__init__(config, weights, shape, limits, device=tg.gpu.planning_device(device), planner=planner)

    # -- captured steps ----------------------------------------------------------------------------

    def _placed(
        self, weights: Mapping[str, torch.Tensor], rooms: Mapping[str, tuple[int, ...]]
    ) -> tg.gpu.DeviceTensors:
        held = tg.gpu.DeviceTensors(weights, self._run_on)
        try:
            held.zeros(_KEPT, (self._kept,), "i64")
            for name, shape in rooms.items():
                held.zeros(name, shape, self.dtype, pinned=name.rpartition("/")[2].startswith("host_"))
        except BaseException:
            held.close()
            raise
        return held

    def _graph(self, bucket: Bucket) -> tg.Graph:
        return paged.step_graph(self.config, bucket, self.shape, self.dtype, self._kept)

    def _make(self, bucket: Bucket) -> tg.Executable:
        executable = super()._make(bucket)
        self.pipeline.add(executable, paged.DRAWN)
        return executable

    def _run_empty(self, executable: Any) -> None:
        executable.capture()
        clear(self.pipeline.inputs(executable))
        if not tg.gpu.is_virtual(self._run_on):  # a real driver has more to do before the first replay
            self.pipeline.launch(executable)
            self.pipeline.wait()

    # -- steps -------------------------------------------------------------------------------------

    def launch(self, batch: Batch) -> None:
        bucket = self.bucket(batch)
        executable: Any = self.bank[bucket]
        inputs, rows = self.pipeline.inputs(executable), sampled_rows(batch.decode, batch.chunks, bucket)
        fill(inputs, batch, bucket)
        fill_draws(inputs, batch, bucket, self._before)
        self.pipeline.launch(executable)
        self._before = rows
        self._under_way.append(_UnderWay(executable, bucket, rows, batch.draws, self.now()))

    def wait(self) -> tuple[Ints, float]:
        step = self._under_way.popleft()
        samples: Ints = self.pipeline.wait()[step.rows]
        begun_s, self._ended_s = max(step.launched_s, self._ended_s), self.now()
        self.last = Ran(step.bucket, None if tg.gpu.is_virtual(self._run_on) else self._ended_s - begun_s)
        self.chances = None
        if step.draws is not None and step.draws.on_host:
            which = step.draws.samples
            logits = self._logits(step.executable, step.rows[which])
            samples[which], self.chances = sampling.sample(logits, step.draws)
        return samples, self.now()

    def _logits(self, executable: Any, rows: Ints) -> torch.Tensor:
        found: torch.Tensor = executable.outputs[llama.LOGITS].rows(rows)
        return found

    def _on_host(self, name: str) -> torch.Tensor:
        assert isinstance(self._bound, tg.gpu.DeviceTensors)
        return self._bound.on_host(name)

    def close(self) -> None:
        tg.gpu.Gpu.open(self._run_on)  # an engine may be closed by another thread than it began in
        self.pipeline.sync()
        super().close()
        self.pipeline.close()
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
