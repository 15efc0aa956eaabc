"""Serving without a machine: the engine's batches take the time that a plan predicts, and give no tokens."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import taskgraph as tg
from taskgraph.errors import PlanError
from taskgraph.models.config import ModelConfig
from taskgraph.serving.batch import Batch
from taskgraph.serving.cache.pages import PagedCache
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import Policy
from taskgraph.serving.runners.runner import Tell
from taskgraph.serving.sampling import Ints
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.simulate.stepgrid import StepShape
from taskgraph.serving.ways import Order, Split, Ways


class SimRunner:
    """A runner whose clock is simulated: a step takes `seconds` of its shape, or as long as its pages take over PCIe.

    `host_s` is what the engine's own work takes; it hides behind a step that is longer. Samples are all token 0.
    `launched` keeps the shape of every step and the seconds of its copies. With `ways` prompts may run beside what
    decodes: two clocks, each step as long as it takes while the other side never stops.
    """

    planned = 0
    besides = 2

    def __init__(
        self,
        seconds: Callable[[StepShape], float],
        *,
        page_bytes: float = 0.0,
        copy_bytes_per_s: float = 25e9,
        host_s: float = 0.0,
        ways: Ways | None = None,
    ) -> None:
        self._seconds, self._host_s, self.ways = seconds, host_s, ways
        self._page_s = page_bytes / copy_bytes_per_s
        self._clock_s = self._ends_s = self.busy_s = 0.0
        self._samples: Ints = np.empty(0, np.int64)
        self._last = StepShape(0, 0, 0, 0, 0)
        self._order = Order[list[float]]()
        self._beside: deque[tuple[Ints, StepShape, float]] = deque()
        self.launched: list[tuple[StepShape, float]] = []

    def warm(self, within_s: float = math.inf, tell: Tell | None = None) -> None:
        """Nothing to plan."""

    def check(self) -> None:
        """Nothing can be lost."""

    def now(self) -> float:
        return self._clock_s

    def launch(self, batch: Batch) -> None:
        copies = max(len(batch.moves.out), len(batch.moves.back)) * self._page_s
        shape = StepShape.of(batch)
        self.launched.append((shape, copies))
        self._begin(batch, shape, max(self._seconds(shape) if len(batch.tokens) else 0.0, copies))

    def launch_in(self, batch: Batch, split: Split) -> None:
        shape = StepShape.of(batch)
        self.launched.append((shape, 0.0))
        self._begin(batch, shape, self._apart_s(split, shape, self._prompts)[0], split)

    def _begin(self, batch: Batch, shape: StepShape, seconds: float, split: Split | None = None) -> None:
        took = max(seconds, self._host_s)
        self.busy_s += took
        self._ends_s = self._after(0, split, self._clock_s, took)
        self._samples, self._last = np.zeros(len(batch.owner), np.int64), shape

    def wait(self) -> tuple[Ints, float]:
        self._clock_s = max(self._clock_s, self._ends_s)
        return self._samples, self._ends_s

    def launch_beside(self, batch: Batch, split: Split) -> None:
        shape = StepShape.of(batch)
        begin_s = max(self._clock_s, self._beside[-1][2] if self._beside else 0.0)
        ends_s = self._after(1, split, begin_s, self._apart_s(split, self._last, shape)[1])
        self._beside.append((np.zeros(len(batch.owner), np.int64), shape, ends_s))

    def _after(self, side: int, split: Split | None, begin_s: float, took_s: float) -> float:
        """When a batch ends that may begin then, and when the other side lets it."""
        ends = [begin_s + took_s]
        before = self._order.launched(side, split, ends)
        if before is not None:
            ends[0] = max(begin_s, before[0]) + took_s
        return ends[0]

    @property
    def _prompts(self) -> StepShape:
        """Of the prompts that run now, or ran last."""
        return self._beside[0][1] if self._beside else StepShape(0, 0, 1, 1, 0)

    def _apart_s(self, split: Split, decode: StepShape, prompts: StepShape) -> tuple[float, float]:
        assert self.ways is not None
        return self.ways.apart_s(split, decode.decode, decode.decode_context, prompts.prefill)

    def beside_ended(self) -> bool:
        return self._beside[0][2] <= self._clock_s

    def wait_beside(self) -> tuple[Ints, float]:
        samples, _, ends_s = self._beside.popleft()
        self._clock_s = max(self._clock_s, ends_s)
        return samples, ends_s

    def sleep_until(self, at_s: float) -> None:
        self._clock_s = max(self._clock_s, at_s)

    def close(self) -> None:
        """Nothing to free."""


def page_bytes(config: ModelConfig, page_size: int, itemsize: int = 2) -> int:
    """Keys and values, or latents, of one page, in every layer, of the whole model."""
    latent = config.latent
    each = latent.rank + latent.rotary if latent else 2 * config.kv_heads * config.head_dim
    return config.layers * each * page_size * itemsize


def pages_of(
    config: ModelConfig, device: str | tg.Device, *, tensor_parallel: int = 1, page_size: int = 16, share: float = 0.9
) -> int:
    """Pages that `share` of the ranks' memory holds beside the weights in 16 bits; PlanError if there is none.

    Where several ranks have the same key-value head, it is there several times."""
    config = replace(config, kv_heads=config.kv_heads * config.share(tensor_parallel).kv_copies)
    memory = share * tensor_parallel * tg.devices.get(device).memory_bytes - 2 * config.parameters
    pages = int(memory // page_bytes(config, page_size))
    if pages < 1:
        raise PlanError(f"{config.name} does not fit {tensor_parallel} ranks; give it more.")
    return pages


def simulated_engine(
    config: ModelConfig,
    seconds: Callable[[StepShape], float],
    *,
    pages: int,
    page_size: int = 16,
    host_pages: int = 0,
    limits: Limits | None = None,
    host_s: float = 0.0,
    expected_output: float | None = None,
    ways: Ways | None = None,
) -> Engine:
    """An engine over a SimRunner; it shares no prefixes, because its prompts are lengths and not texts."""
    limits = limits or Limits(sequences=1024, tokens=2048, chunks=64, context=config.max_context)
    runner = SimRunner(seconds, page_bytes=page_bytes(config, page_size), host_s=host_s, ways=ways)
    cache = PagedCache(pages, page_size, host_pages)
    return Engine(
        runner,
        cache,
        limits,
        vocabulary=config.vocab_size,
        policy=Policy(prefix_sharing=False, expected_output=expected_output),
    )
