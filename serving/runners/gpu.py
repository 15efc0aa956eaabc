"""Runs the engine's batches on a GPU, real or virtual: captured steps over weights and pages that are on it once.

A step is one upload, one launch and one download. It draws its tokens itself and keeps them for the next one, which may
therefore be launched before the host knows them. With a wanted time a token steps of prompts may run beside steps that
decode, each a graph of its own in one partition of a split, with its own stream and memory.
"""

import math
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
from taskgraph.serving.batch import Batch
from taskgraph.serving.engine import Engine, paged_engine
from taskgraph.serving.options import KvMemory, Planner, Policy
from taskgraph.serving.runners.buckets import Part, clear, fill, fill_draws, holding, sampled_rows
from taskgraph.serving.runners.cpu import BUDGET_BYTES, CpuRunner
from taskgraph.serving.runners.runner import Ran, Tell, prepare_in_time
from taskgraph.serving.sampling import Draws, Ints
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.simulate.stepgrid import StepGrid, StepShape
from taskgraph.serving.ways import Order, Room, Split, Ways

_KEPT, _KEPT_BESIDE = "kept", "kept_beside"
_SPLITS = 2
"""Splits that steps are captured for: each has its own, and a change of the split costs a pause."""


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
    down as rows of logits and are drawn there. With `tpot_s`, wanted seconds a token, `ways` says what runs apart."""

    backend = "cuda"
    ahead: ClassVar[bool] = True
    besides = 2

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        shape: PageShape,
        limits: Limits,
        *,
        device: str | None = None,
        planner: str | Planner = "auto",
        tpot_s: float | None = None,
    ) -> None:
        self._run_on, self._kept = device, limits.sequences + limits.chunks
        self.pipeline = tg.gpu.Pipeline(device)
        self.beside = tg.gpu.Pipeline(device, self.besides, self.pipeline)
        """Where steps of prompts run apart."""
        self.parts: tg.GraphBank[Part] = tg.GraphBank(self._make_part, BUDGET_BYTES)
        self.ways: Ways | None = None
        self._order = Order[int]()
        self._under_way: deque[_UnderWay] = deque()
        self._prompts: deque[_UnderWay] = deque()
        self._before: Ints = np.empty(0, np.int64)
        self._ended_s, self._context = 0.0, limits.context
        super().__init__(config, weights, shape, limits, device=tg.gpu.planning_device(device), planner=planner)
        if tpot_s is not None:
            self.ways = self._ways(limits, tpot_s)

    def _ways(self, limits: Limits, tpot_s: float) -> Ways:
        """What chooses, between mixed steps and steps in the splits that are predicted to gain most."""
        grid = StepGrid(self.config, self.device, prompt_tokens=limits.tokens / 2)
        sequential_s, room = grid.of("sequential"), Room(limits.sequences, self.shape.pages * self.shape.page_size)

        def mixed_s(shape: StepShape) -> float:
            """As planned, where the step is: so much sooner than op after op."""
            wanted = Bucket(shape.decode, shape.prefill, min(shape.prefill, 1))
            plan = self._plans.get(holding(wanted, self._plans) or wanted)
            gain = 1.0 if plan is None else plan.makespan_s / plan.verdict.sequential_s
            return sequential_s(shape) * gain

        made = Ways(grid, mixed_s, tpot_s, step_tokens=limits.tokens, room=room, sizes=self._buckets.prefills)
        if not tg.gpu.Gpu.open(self._run_on).capability.partitions or self.shape.host_pages:
            made.splits = ()  # pages that move between device and host are both sides'
        else:
            made.splits = made.best_splits(limits.context, _SPLITS)
        return made

    # -- captured steps ----------------------------------------------------------------------------

    def _placed(
        self, weights: Mapping[str, torch.Tensor], rooms: Mapping[str, tuple[int, ...]]
    ) -> tg.gpu.DeviceTensors:
        held = tg.gpu.DeviceTensors(weights, self._run_on)
        try:
            for name in (_KEPT, _KEPT_BESIDE):
                held.zeros(name, (self._kept,), "i64")
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

    def _make_part(self, part: Part) -> tg.Executable:
        """A step that feeds and keeps its tokens on its own side."""
        graph, (line, kept) = self._graph(part.bucket), ((self.pipeline, _KEPT), (self.beside, _KEPT_BESIDE))[part.side]
        plan = tg.plan_beside(graph, self.device, part.split.sizes, part.side)
        executable = self._compiled(graph, plan, {**self._bound, _KEPT: self._bound[kept]})
        line.add(executable, paged.DRAWN)
        return executable

    def _run_empty(self, executable: Any, line: "tg.gpu.Pipeline | None" = None) -> None:
        line = line or self.pipeline
        executable.capture()
        clear(line.inputs(executable))
        if not tg.gpu.is_virtual(self._run_on):  # a real driver has more to do before the first replay
            line.launch(executable)
            line.wait()

    @property
    def planned(self) -> int:
        return self.bank.made + self.parts.made

    def warm(self, within_s: float = math.inf, tell: Tell | None = None) -> None:
        """Also steps of the splits that may be chosen, behind those that decode on the whole device."""
        every = self.buckets()
        parts = [] if self.ways is None else self._buckets.parts(self.ways.splits)
        plain = [bucket for bucket in every[1:] if not bucket.prefill and not bucket.moves]
        order: list[Bucket | Part] = [every[0], *plain, *parts, *(b for b in every[1:] if b not in plain)]
        prepare_in_time(order, self._prepare, within_s, tell)
        self.be_warm()
        if self.ways is not None:
            largest = {part for split in self.ways.splits for part in self._buckets.parts([split])[:2]}
            there = {split for split in self.ways.splits if {p for p in largest if p.split == split} <= {*self.parts}}
            self.ways.splits = tuple(split for split in self.ways.splits if split in there)
            self.ways.prepare(self._context)

    def _prepare(self, shapes: Bucket | Part) -> bool:
        if isinstance(shapes, Bucket):
            return self.prepare(shapes)
        self._run_empty(self.parts[shapes], self.beside if shapes.side else self.pipeline)
        return True

    # -- steps -------------------------------------------------------------------------------------

    def launch(self, batch: Batch) -> None:
        bucket = self.bucket(batch)
        self._launch(batch, self.bank[bucket], bucket, None)

    def launch_in(self, batch: Batch, split: Split) -> None:
        part = self._part(batch, split, 0)
        self._launch(batch, self.parts[part], part.bucket, split)

    def _launch(self, batch: Batch, executable: Any, bucket: Bucket, split: Split | None) -> None:
        self._under_way.append(self._sent(batch, executable, bucket, self._before, (0, split)))
        self._before = self._under_way[-1].rows

    def launch_beside(self, batch: Batch, split: Split) -> None:
        part = self._part(batch, split, 1)
        nothing = np.empty(0, np.int64)
        self._prompts.append(self._sent(batch, self.parts[part], part.bucket, nothing, (1, split)))

    def _part(self, batch: Batch, split: Split, side: int) -> Part:
        """The smallest step on a side of a split that holds the batch; once the runner is warm, of those captured."""
        wanted = Part(self._buckets.of(batch), split, side)
        if not self._warm or wanted in self.parts:
            return wanted
        there = [part.bucket for part in self.parts if (part.split, part.side) == (split, side)]
        return Part(holding(wanted.bucket, there) or wanted.bucket, split, side)

    def _sent(
        self, batch: Batch, executable: Any, bucket: Bucket, before: Ints, where: tuple[int, Split | None]
    ) -> _UnderWay:
        side, split = where
        line, other = (self.pipeline, self.beside)[:: 1 - 2 * side]
        inputs, rows = line.inputs(executable), sampled_rows(batch.decode, batch.chunks, bucket)
        fill(inputs, batch, bucket)
        fill_draws(inputs, batch, bucket, before)
        after = self._order.launched(side, split, line.launched)
        if after is not None:
            line.behind(other, after)
        line.launch(executable)
        return _UnderWay(executable, bucket, rows, batch.draws, self.now())

    def wait(self) -> tuple[Ints, float]:
        step = self._under_way.popleft()
        samples = self._samples(step, self.pipeline)
        begun_s, self._ended_s = max(step.launched_s, self._ended_s), self.now()
        self.last = Ran(step.bucket, None if tg.gpu.is_virtual(self._run_on) else self._ended_s - begun_s)
        return samples, self._ended_s

    def beside_ended(self) -> bool:
        return self.beside.ended

    def wait_beside(self) -> tuple[Ints, float]:
        return self._samples(self._prompts.popleft(), self.beside), self.now()

    def _samples(self, step: _UnderWay, line: "tg.gpu.Pipeline") -> Ints:
        """The samples of the step launched first on a pipeline, when it has ended, and their chances."""
        samples: Ints = line.wait()[step.rows]
        self.chances = None
        if step.draws is not None and step.draws.on_host:
            which = step.draws.samples
            logits = self._logits(step.executable, step.rows[which])
            samples[which], self.chances = sampling.sample(logits, step.draws)
        return samples

    def _logits(self, executable: Any, rows: Ints) -> torch.Tensor:
        found: torch.Tensor = executable.outputs[llama.LOGITS].rows(rows)
        return found

    def _on_host(self, name: str) -> torch.Tensor:
        assert isinstance(self._bound, tg.gpu.DeviceTensors)
        return self._bound.on_host(name)

    def close(self) -> None:
        tg.gpu.Gpu.open(self._run_on)  # an engine may be closed by another thread than it began in
        for line in (self.beside, self.pipeline):
            line.sync()
        self.parts.close()
        super().close()
        self.beside.close()
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
    tpot_s: float | None = None,
) -> Engine:
    """An engine on a GPU; see `GpuRunner`. `weights` are those of `llama.load_weights`, in bf16 or f32."""

    def make(shape: PageShape) -> GpuRunner:
        return GpuRunner(config, weights, shape, limits, device=device, planner=planner, tpot_s=tpot_s)

    return paged_engine(make, limits, memory, config.vocab_size, policy)
