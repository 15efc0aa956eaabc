"""Timing kernels on a GPU: launches captured on a lane, replayed between events, alone or while another never stops."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from taskgraph.errors import ExecutionError
from taskgraph.graph.device import Geometry
from taskgraph.runtime.gpu import captures, driver, virtual
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.torch_memory import TorchPool
from taskgraph.tune.gpucheck.power import Meter

SAMPLE_S, MOST_LAUNCHES = 4e-3, 400
"""One captured graph repeats its kernel for about this long, and at most so often."""
REPEATS = 5
_STARVED_S = 3.0
"""A kernel that has not had its turns by then beside a neighbour does not get them."""
_AHEAD = 2
"""Graphs of the neighbour that wait behind the one that runs, so that it never stops."""


@dataclass(frozen=True, slots=True)
class PartitionStream:
    """A stream of a partition that has `sms` SMs."""

    stream: Any
    sms: int


class Runner(Protocol):
    """A kernel with its buffers."""

    name: str

    def launch(self, lane: PartitionStream, turn: int) -> None:
        """Launch it once; buffers that must not be in the cache change with `turn`."""
        ...

    def predicted_s(self, sms: int) -> float:
        """What the cost model says, which is what a virtual device takes."""
        ...


@dataclass(slots=True)
class Loop:
    """A captured graph of `count` launches of one kernel on one lane."""

    runner: Runner
    lane: PartitionStream
    count: int
    exec: Any
    pool: TorchPool

    def replay(self) -> None:
        """Enqueue it once."""
        with driver.driver_errors(f"replay {self.runner.name}"):
            self.exec.launch(self.lane.stream)

    def close(self) -> None:
        """Free the graph, then the memory in it."""
        self.exec.close()
        self.pool.close()


@dataclass(frozen=True, slots=True)
class Reading:
    """Watts of the device and MHz of its SMs while work ran; None where they cannot be read."""

    watts: float | None = None
    sm_mhz: float | None = None


class Rig:
    """The device under test with what timing needs. On a virtual one all times are the cost model's."""

    def __init__(self, gpu: Gpu, meter: Meter | None = None) -> None:
        self.gpu, self.meter = gpu, meter
        self._control = virtual.loaded()
        self._sms = gpu.capability.sm_count
        self.sample_s, self.repeats = (1e-4, 1) if self._control else (SAMPLE_S, REPEATS)

    @contextmanager
    def lanes(self, *sizes: int) -> Iterator[list[PartitionStream]]:
        """A lane in a partition of each size, or, for sizes that are all the whole device, streams that share it."""
        with ExitStack() as stack:
            if all(size == self._sms for size in sizes):
                contexts, counts = list[Any]([None] * len(sizes)), list(sizes)
            else:
                made = self.gpu.partition(Geometry.of(*sizes))
                contexts, counts = list(made.contexts), list(made.sm_counts)
            for context in contexts:
                if context is not None:
                    stack.callback(context.close)
            streams = [self.gpu.stream(context) for context in contexts]
            for stream in streams:
                stack.callback(stream.close)
            yield [PartitionStream(stream, count) for stream, count in zip(streams, counts, strict=True)]
            self.gpu.sync()

    @contextmanager
    def loop(self, runner: Runner, lane: PartitionStream) -> Iterator[Loop]:
        """The kernel captured so often that one replay takes about SAMPLE_S."""
        pool = TorchPool()
        with self._dry(), self._takes(runner, lane):
            runner.launch(lane, 0)  # libraries get their workspace for this stream, which outlives the pool
            with pool.used():
                runner.launch(lane, 1)
            with driver.driver_errors(f"run {runner.name}"):
                lane.stream.sync()
        first = self._captured(runner, lane, 2, pool)
        each = self._once(first) / first.count
        count = max(1, min(MOST_LAUNCHES, math.ceil(self.sample_s / max(each, 1e-9))))
        made = first
        if count > first.count:
            first.exec.close()
            made = self._captured(runner, lane, count, pool)
        try:
            yield made
        finally:
            self.gpu.sync()
            made.close()

    def _captured(self, runner: Runner, lane: PartitionStream, count: int, pool: TorchPool) -> Loop:
        capture = captures.Capture(lane.stream)
        try:
            with pool.used():
                for turn in range(count):
                    runner.launch(lane, turn)
            nodes = captures.captured_handles(lane.stream)
            capture.end()
            if self._control is not None:
                each = runner.predicted_s(lane.sms) * count / len(nodes)
                self._control.node_seconds(nodes, [each] * len(nodes))
            return Loop(runner, lane, count, capture.instantiate(), pool)
        finally:
            capture.close()

    def _dry(self) -> Any:
        return self._control.dry() if self._control else nullcontext()

    def _takes(self, runner: Runner, lane: PartitionStream) -> Any:
        return self._control.launches_take(runner.predicted_s(lane.sms)) if self._control else nullcontext()

    def _marks(self, count: int) -> list[Any]:
        return [self.gpu.event(timing=True) for _ in range(count)]

    def _record(self, mark: Any, loop: Loop) -> None:
        with driver.driver_errors("record an event"):
            loop.lane.stream.record(mark)

    def _once(self, loop: Loop) -> float:
        return self._spans(loop, 1, before=1)[0] * loop.count

    def _spans(self, loop: Loop, repeats: int, before: int = 0) -> list[float]:
        """Seconds of one launch in each of `repeats` replays, after some that do not count."""
        marks = self._marks(repeats + 1)
        with self._dry():
            for _ in range(before):
                loop.replay()
            self._enqueue(loop, marks)
            with driver.driver_errors(f"run {loop.runner.name}"):
                loop.lane.stream.sync()
        return self._read(loop, marks)

    def _enqueue(self, loop: Loop, marks: Sequence[Any]) -> None:
        self._record(marks[0], loop)
        for mark in marks[1:]:
            loop.replay()
            self._record(mark, loop)

    def _read(self, loop: Loop, marks: Sequence[Any]) -> list[float]:
        return [driver.seconds_between(a, b) / loop.count for a, b in pairwise(marks)]

    # -- what is measured ------------------------------------------------------------------------

    def alone_s(self, loop: Loop) -> float:
        """Seconds of one launch with nothing beside it: the median over replays."""
        return statistics.median(self._spans(loop, self.repeats, before=1))

    def beside_s(self, loop: Loop, other: Loop) -> float:
        """Seconds of one launch while `other` never stops: the median over replays.

        The neighbour is seen to run before the first replay, and is given more whenever fewer than _AHEAD of its graphs
        wait, until the last replay is over."""
        marks = self._marks(self.repeats + 1)
        with self._dry():
            with self._busy(other) as feed:
                self._enqueue(loop, marks)
                begin = time.monotonic()
                while self._control is None and not marks[-1].is_done:
                    feed()
                    if time.monotonic() - begin > _STARVED_S:
                        raise ExecutionError(
                            f"{loop.runner.name} did not end in {_STARVED_S:g} s beside {other.runner.name}.", op=""
                        )
            self.gpu.sync()
        return statistics.median(self._read(loop, marks))

    @contextmanager
    def _busy(self, loop: Loop) -> Iterator[Callable[[], None]]:
        """Within the block the loop runs; what is given feeds it."""
        waiting: list[Any] = []

        def feed() -> None:
            while waiting and waiting[0].is_done:
                waiting.pop(0)
            while len(waiting) <= _AHEAD:
                loop.replay()
                mark = self.gpu.event()
                self._record(mark, loop)
                waiting.append(mark)

        feed()
        if self._control is None:
            with driver.driver_errors(f"run {loop.runner.name}"):
                waiting[0].sync()
        feed()
        yield feed

    def power(self, loops: Sequence[Loop], seconds: float) -> Reading:
        """Watts and SM clock while all `loops` run without a break for `seconds`; nothing where no meter is there."""
        if self.meter is None or self._control is not None:
            return Reading()
        with ExitStack() as stack:
            feeds = [stack.enter_context(self._busy(loop)) for loop in loops]
            reading = self.meter.watch(seconds, lambda: [feed() for feed in feeds])
        self.gpu.sync()
        return Reading(*reading)
