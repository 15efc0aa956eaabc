"""The serving engine over ranks: every one runs the same batches in its own process, and rank 0 gives the samples.

A batch is pickled once, without what only the scheduler reads. A thread sends it and waits for all ranks, so that the
engine forms the next batch meanwhile.
"""

import math
import pickle
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import taskgraph as tg
from taskgraph.errors import GraphError, RankLost
from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import Bucket, PageShape
from taskgraph.serving.batch import Batch
from taskgraph.serving.engine import Engine, paged_engine
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.ranks.processes import Ranks
from taskgraph.serving.runners.cpu import CpuRunner
from taskgraph.serving.runners.runner import Planned, Ran, Tell, prepare_in_time
from taskgraph.serving.sampling import Chances, Ints
from taskgraph.serving.scheduler import Limits

if TYPE_CHECKING:
    import torch

Load = Callable[["tg.distributed.Group"], Mapping[str, "torch.Tensor"]]
"""Gives the weights of the group's rank, in its process; can be pickled."""


class RanksRunner:
    """Runs batches on `ranks`, each with a `RankActor`; owns them. RankLost from `wait` or `check` when one is gone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._thread = ThreadPoolExecutor(1, "taskgraph-ranks")
        self._running: Future[list[Any]] | None = None
        self.chances: Chances | None = None
        self.last: Ran | None = None
        self.dtype = str(self._call("dtype")[0])

    @property
    def planned(self) -> int:
        return int(self._call("planned")[0])

    def warm(self, within_s: float = math.inf, tell: Tell | None = None) -> None:
        every: list[Bucket] = self._call("buckets")[0]
        one_by_one = partial(self._call, "prepare")  # a call each, so that no rank is late
        prepare_in_time(every, lambda bucket: all(one_by_one(bucket)), within_s, tell)
        self._call("be_warm")

    def check(self) -> None:
        self.ranks.check()

    def now(self) -> float:
        return time.perf_counter()

    def launch(self, batch: Batch) -> None:
        self._running = self._thread.submit(self.ranks.call, "run", packed(batch))

    def wait(self) -> tuple[Ints, float]:
        assert self._running is not None
        samples, self.chances, self.last = self._running.result()[0]
        return samples, self.now()

    def planned_step(self, bucket: Bucket) -> Planned | None:
        try:
            found: Planned | None = self._call("planned_step", bucket)[0]
        except (RankLost, RuntimeError):  # the ranks, or the thread that calls them, are gone: the engine says why
            return None
        return found

    def sleep_until(self, at_s: float) -> None:
        time.sleep(max(at_s - self.now(), 0.0))

    def read_page(self, page: int) -> bytes:
        return b"".join(self._call("read_page", page))

    def write_page(self, page: int, data: bytes) -> None:
        if len(data) % self.ranks.size:
            raise ValueError(f"{len(data)} bytes, which {self.ranks.size} ranks do not share")
        self._call("write_page", page, data)

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Between batches: one call at a time reaches the ranks."""
        return self._thread.submit(self.ranks.call, method, *args).result()

    def close(self) -> None:
        self._thread.shutdown()
        self.ranks.close()


def packed(batch: Batch) -> bytes:
    """What a rank needs of the batch."""
    nothing = np.empty(0, np.int64)
    kept = replace(batch, owner=nothing, place=nothing, epoch=nothing, fed=nothing, source=nothing)
    return pickle.dumps(kept, pickle.HIGHEST_PROTOCOL)


class RankActor:
    """One rank's runner, in its process."""

    def __init__(self, runner: CpuRunner, group: "tg.distributed.Group") -> None:
        self._runner, self._group = runner, group

    def run(self, batch: bytes) -> tuple[Ints, Chances | None, Ran | None] | None:
        """Execute a batch; the samples, their chances and the step are those of rank 0."""
        samples, _ = self._runner.run(pickle.loads(batch))
        return (samples, self._runner.chances, self._runner.last) if self._group.rank == 0 else None

    def planned_step(self, bucket: Bucket) -> Planned | None:
        return self._runner.planned_step(bucket) if self._group.rank == 0 else None

    def dtype(self) -> str:
        return self._runner.dtype

    def planned(self) -> int:
        return self._runner.planned

    def buckets(self) -> list[Bucket]:
        return self._runner.buckets()

    def prepare(self, bucket: Bucket) -> bool:
        return self._runner.prepare(bucket)

    def be_warm(self) -> None:
        self._runner.be_warm()

    def read_page(self, page: int) -> bytes:
        return self._runner.read_page(page)

    def write_page(self, page: int, data: bytes) -> None:
        """Take this rank's part."""
        size = len(data) // self._group.size
        self._runner.write_page(page, data[self._group.rank * size : (self._group.rank + 1) * size])


@dataclass(frozen=True, slots=True)
class _Make:
    """How a rank's process makes its actor; `config` is the whole model's."""

    config: ModelConfig
    load: Load
    limits: Limits
    shape: PageShape
    whole_experts: bool

    def __call__(self, group: "tg.distributed.Group") -> RankActor:
        share = self.config.share(group.size, group.rank if self.whole_experts else None)
        return RankActor(CpuRunner(share, self.load(group), self.shape, self.limits, group=group), group)


def ranks_engine(
    config: ModelConfig,
    load: Load,
    limits: Limits,
    memory: KvMemory,
    ranks: int,
    *,
    whole_experts: bool = False,
    timeout_s: float = 60.0,
    policy: Policy | None = None,
) -> Engine:
    """An engine over `ranks` processes on this machine; `config` is the whole model's, and `load(group)` gives a
    rank's weights there (`shards.load_shard`). With `whole_experts` ranks share out the experts of a layer, not the
    features of each. GraphError when the ranks cannot share the model; RankLost when one dies, or is later than
    `timeout_s`."""
    if whole_experts and config.experts is None:
        raise GraphError(f"{config.name} has no experts to share out; leave expert parallelism off.")
    config.share(ranks, 0 if whole_experts else None)

    def make(shape: PageShape) -> RanksRunner:
        return RanksRunner(Ranks(ranks, _Make(config, load, limits, shape, whole_experts), timeout_s=timeout_s))

    return paged_engine(make, limits, memory, config.vocab_size, policy)
