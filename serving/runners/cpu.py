"""Runs the engine's batches on this machine's cores: captured steps by bucket."""

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

import taskgraph as tg
from taskgraph.models import llama, paged
from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import Bucket, PageShape
from taskgraph.models.shards import check_share
from taskgraph.serving import sampling
from taskgraph.serving.batch import Batch
from taskgraph.serving.engine import Engine, paged_engine
from taskgraph.serving.options import KvMemory, Planner, Policy, planner_of
from taskgraph.serving.runners.buckets import Buckets, clear, fill, holding, sampled_rows
from taskgraph.serving.runners.runner import Planned, Ran, Tell, prepare_in_time
from taskgraph.serving.sampling import Chances, Ints
from taskgraph.serving.scheduler import Limits

if TYPE_CHECKING:
    import torch


BUDGET_BYTES = 2e9
"""The most bytes of their own that a runner's executables hold together."""


class CpuRunner:
    """Runs batches on this machine: a captured plan a bucket, from the graph bank, launched from a thread. `GpuRunner`
    does the same on a GPU.

    `weights` are those of `llama.load_weights`, in bf16 or f32, which is the dtype of pages and products; `device` is
    "cpu" unless told, or one like it with fewer cores. Executables together hold at most BUDGET_BYTES of their own.
    Steps are planned by `planner`, the name of a scheduler or a function like `tg.KnownPlans`.

    With a `group` this is one rank's runner: `config` is its share of the model (`ModelConfig.share`), `weights` are
    that share's (`shards.load_shard`), and `device` has the link that the ranks measure. All ranks must be given the
    same batches; rank 0 alone draws.
    """

    backend: ClassVar[str] = "cpu"
    _run_on: str | None = None

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, "torch.Tensor"],
        shape: PageShape,
        limits: Limits,
        *,
        device: "str | tg.Device | None" = None,
        planner: str | Planner = "auto",
        group: "tg.distributed.Group | None" = None,
    ) -> None:
        check_share(config, group)
        self._planner, self._group = planner_of(planner), group
        self.config, self.shape, self.dtype = config, shape, tg.dtypes.dtype_of(weights)
        self.device = device or ("cpu" if group is None else tg.distributed.rank_device(group))
        self.bank: tg.GraphBank[Bucket] = tg.GraphBank(self._make, BUDGET_BYTES)
        self._bound = self._placed(weights, self._rooms())
        self._buckets = Buckets(limits, moves=shape.host_pages > 0)
        self._every = self._buckets.every()
        self._warm: list[Bucket] = []
        self._thread = ThreadPoolExecutor(1, "taskgraph-runner")
        self._running: Future[tuple[Ints, float]] | None = None
        self.chances: Chances | None = None
        self.last: Ran | None = None
        self._plans: dict[Bucket, tg.Plan] = {}

    # -- captured steps ----------------------------------------------------------------------------

    def _rooms(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the pages of every layer, on the device and on the host ("host_...")."""
        pools = {"": self.shape.pages}
        if self.shape.host_pages:
            pools["host_"] = self.shape.host_pages
        return {
            f"{mark}{prefix}{name}": room
            for prefix, pages in pools.items()
            for mark in llama.layer_pattern(self.config).marks()
            for name, room in self.shape.room(self.config, pages).items()
        }

    def _placed(self, weights: "Mapping[str, torch.Tensor]", rooms: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
        """Weights, and pages of zeros, where steps bind them."""
        import torch

        kind = {"bf16": torch.bfloat16, "f32": torch.float32}[self.dtype]
        return {**weights, **{name: torch.zeros(shape, dtype=kind) for name, shape in rooms.items()}}

    def _make(self, bucket: Bucket) -> tg.Executable:
        graph = self._graph(bucket)
        plan = tg.distributed.one_plan(graph, self._group, lambda: self._planner(graph, self.device))
        self._plans[bucket] = plan
        return self._compiled(graph, plan, self._bound)

    def _compiled(self, graph: tg.Graph, plan: tg.Plan, bound: Mapping[str, Any]) -> tg.Executable:
        executable = tg.compile(graph, plan, self.backend, device=self._run_on, group=self._group)
        wanted = {t.name for t in graph.flat().with_role("weight", "state")}
        executable.bind({name: t for name, t in bound.items() if name in wanted})
        return executable

    def _graph(self, bucket: Bucket) -> tg.Graph:
        return paged.step_graph(self.config, bucket, self.shape, self.dtype)

    def planned_step(self, bucket: Bucket) -> Planned | None:
        plan = self._plans.get(bucket)
        if plan is None:
            return None
        return Planned(plan, {op.name: op.kind for op in tg.rewrite.apply(self._graph(bucket), plan.split).flat().ops})

    def bucket(self, batch: Batch) -> Bucket:
        """The smallest bucket that holds the batch; once the runner is warm, of those that are captured."""
        wanted = self._buckets.of(batch)
        if not self._warm or wanted in self.bank:
            return wanted
        return holding(wanted, [bucket for bucket in self._warm if bucket in self.bank]) or wanted

    def buckets(self) -> list[Bucket]:
        """Every bucket that a step can have, the most needed first."""
        return self._every

    @property
    def planned(self) -> int:
        return self.bank.made

    def warm(self, within_s: float = math.inf, tell: Tell | None = None) -> None:
        prepare_in_time(self.buckets(), self.prepare, within_s, tell)
        self.be_warm()

    def be_warm(self) -> None:
        """From now on steps take the buckets that are captured."""
        self._warm = [bucket for bucket in self._every if bucket in self.bank]

    def prepare(self, bucket: Bucket) -> bool:
        """Plan and capture the steps of a bucket now, and run one of no tokens; whether there is room for more. Where
        there is none, those that are needed most have stayed."""
        for needed in reversed(self._every):
            if needed in self.bank:
                _ = self.bank[needed]  # used last, so kept longest
        self._run_empty(self.bank[bucket])
        return self.bank.evicted == 0

    def _run_empty(self, executable: Any) -> None:
        """Capture, and one step of no tokens."""
        clear({name: tensor.numpy() for name, tensor in executable.inputs.items()})
        executable.launch()

    # -- steps -------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.perf_counter()

    def check(self) -> None:
        """This process has all that it needs."""

    def launch(self, batch: Batch) -> None:
        tg.cpu.release_threads()  # of the engine's own thread: a pool there would slow the lanes' pools down
        self._running = self._thread.submit(self.run, batch)

    def wait(self) -> tuple[Ints, float]:
        assert self._running is not None
        return self._running.result()

    def sleep_until(self, at_s: float) -> None:
        time.sleep(max(at_s - self.now(), 0.0))

    def run(self, batch: Batch) -> tuple[Ints, float]:
        """Execute a batch in this thread: its samples, and when it ended."""
        bucket = self.bucket(batch)
        executable: Any = self.bank[bucket]
        fill({name: tensor.numpy() for name, tensor in executable.inputs.items()}, batch, bucket)
        begin_s = self.now()
        executable.launch()
        rows, made = sampled_rows(batch.decode, batch.chunks, bucket), executable.outputs
        samples: Ints = made[llama.NEXT][rows].numpy()
        self.last = Ran(bucket, self.now() - begin_s)
        self.chances = None
        if self._group is None or self._group.rank == 0:
            samples = np.clip(samples, 0, self.config.vocab_size - 1)
            samples = sampling.likeliest(samples, made[llama.LOGITS][rows, samples])
            if batch.draws is not None:
                logits = self._logits(executable, rows[batch.draws.samples])
                samples[batch.draws.samples], self.chances = sampling.sample(logits, batch.draws)
        return samples, self.now()

    def _logits(self, executable: Any, rows: Ints) -> "torch.Tensor":
        """Those rows of the logits of the step launched last."""
        found: torch.Tensor = executable.outputs[llama.LOGITS][rows]
        return found

    def read_page(self, page: int) -> bytes:
        return b"".join(part.tobytes() for part in self._host_page(page))

    def write_page(self, page: int, data: bytes) -> None:
        parts = self._host_page(page)
        size = parts[0].nbytes
        if len(data) != size * len(parts):
            raise ValueError(f"{len(data)} bytes where a page has {size * len(parts)}")
        for i, part in enumerate(parts):
            part[:] = np.frombuffer(data, np.uint8, size, i * size)

    def _host_page(self, page: int) -> list[npt.NDArray[np.uint8]]:
        import torch

        pools = (self._on_host(name) for name in self._bound if name.rpartition("/")[2].startswith("host_"))
        return [pool[page].view(torch.uint8).numpy().reshape(-1) for pool in pools]

    def _on_host(self, name: str) -> "torch.Tensor":
        """The host pages of that name, in place."""
        found: torch.Tensor = self._bound[name]
        return found

    def close(self) -> None:
        self._thread.shutdown()
        self.bank.close()


def cpu_engine(
    config: ModelConfig,
    weights: "Mapping[str, torch.Tensor]",
    limits: Limits,
    memory: KvMemory,
    *,
    device: "str | tg.Device" = "cpu",
    planner: str | Planner = "auto",
    policy: Policy | None = None,
) -> Engine:
    """An engine on this machine's cores; see `CpuRunner`. `weights` are those of `llama.load_weights`."""

    def make(shape: PageShape) -> CpuRunner:
        return CpuRunner(config, weights, shape, limits, device=device, planner=planner)

    return paged_engine(make, limits, memory, config.vocab_size, policy)
