"""Measuring plans and ops on a backend: interleaved repeats under a budget, and the noise of the machine."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from taskgraph.cost.profiles import OpKey, OpTime, shape_key
from taskgraph.graph.device import Geometry
from taskgraph.graph.graph import Graph
from taskgraph.runtime.backend import compile
from taskgraph.runtime.cpu import probe
from taskgraph.runtime.executable import Executable
from taskgraph.schedule.plan import Lane, Plan, Step

ROUNDS, LEAST_ROUNDS = 31, 7
"""Interleaved repeats of a session, and the fewest that decide anything."""
SAMPLE_S = 2e-3
"""A repeat launches as often as fills this time, so that the clock and the wake of the lanes do not count."""
REPLAYS = 7
LEAST_GAIN = 0.005
"""No gain below this is called one, however quiet the machine."""


class Countdown:
    """Seconds of wall-clock time that are left; `part` is a share of them that ends earlier."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.seconds = clock, seconds
        self.begin = clock()

    @property
    def spent_s(self) -> float:
        return self.clock() - self.begin

    def allows(self, seconds: float) -> bool:
        """Whether something that takes `seconds` ends within the budget."""
        return self.spent_s + seconds <= self.seconds

    def part(self, share: float) -> "Countdown":
        """A budget of `share` of what is left."""
        return Countdown(max(self.seconds - self.spent_s, 0.0) * share, self.clock)


def noise_floor(*runs: Sequence[float], seed: int = 0) -> float:
    """The relative difference of medians that repeats of one and the same plan show by chance (A/A).

    The larger of what separates the medians of the `runs` and, over random halvings of all of their repeats, the 99th
    percentile of the difference between the halves' medians.
    """
    pooled = np.concatenate([np.asarray(run) for run in runs])
    if len(pooled) < 2:
        return 0.0
    order = np.random.default_rng(seed).permuted(np.tile(pooled, (500, 1)), axis=1)
    half = len(pooled) // 2
    apart = np.abs(np.median(order[:, :half], axis=1) - np.median(order[:, half:], axis=1))
    medians = [statistics.median(run) for run in runs]
    return float(max(np.quantile(apart, 0.99), max(medians) - min(medians)) / np.median(pooled))


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of every repeat: of the two copies of the sequential plan together, and of each candidate."""

    sequential: list[float]
    candidates: list[list[float]]
    floor: list[float]


@runtime_checkable
class _Timed(Protocol):
    """An executable that times its own replays."""

    def replay_seconds(self, launches: int = 1) -> float: ...


class PlanRuns:
    """Captures and runs plans of one graph on one backend, all on the same tensors."""

    def __init__(
        self,
        graph: Graph,
        backend: str,
        functions: Mapping[str, Callable[..., Any]],
        given: Mapping[str, Any],
        seed: int,
        device: str | None = None,
    ) -> None:
        self.graph, self.backend, self.functions, self.seed = graph, backend, functions, seed
        self._device = device
        self.kind, self.origin = "simulated", ""
        self._given = given
        self._tensors: dict[str, Any] | None = None
        self._looked = False

    def open(self, plan: Plan) -> Executable:
        """The plan captured, bound and warm."""
        executable = compile(self.graph, plan, self.backend, self.functions, self._device)
        try:
            executable.bind(self._values())
            self._look(executable)
            executable.launch()
            timeline = executable.timeline()
        except BaseException:
            executable.close()
            raise
        self.kind = timeline.kind
        here = machine() if self.backend == "cpu" else timeline.origin
        self.origin = here if timeline.kind == "measured" else timeline.origin
        return executable

    def _look(self, executable: Executable) -> None:
        """See once what custom ops do: in a plan that packs, what one must not do would change another's result."""
        if not self._looked and any(op.kind == "call" for op in self.graph.ops):
            executable.check({"call"})
        self._looked = True

    def _values(self) -> dict[str, Any]:
        if self._tensors is None:
            self._tensors = {}
            if self.backend != "sim":
                from taskgraph.tune.fill import fill

                self._tensors = fill(self.graph.flat(), self._given, self.seed)
        return self._tensors

    def session(self, sequential: Plan, plans: Sequence[Plan], budget: Countdown) -> Timings | None:
        """Interleaved repeats of the sequential plan, twice, and of `plans`; None if the budget holds too few."""
        with ExitStack() as stack:
            runs = [stack.enter_context(self.open(each)) for each in (sequential, sequential, *plans)]
            seconds, rounds = self._repeat(runs, budget)
        if rounds < (LEAST_ROUNDS if self.kind == "measured" else 1):
            return None
        first, second, *others = seconds
        base = noise_floor(first, second, seed=self.seed)
        floor = [max(base, noise_floor(row, seed=self.seed), LEAST_GAIN) for row in others]
        return Timings([*first, *second], others, floor)

    def _repeat(self, runs: Sequence[Executable], budget: Countdown) -> tuple[list[list[float]], int]:
        seconds: list[list[float]] = [[] for _ in runs]
        begin = budget.clock()
        real = self.kind == "measured"
        each = max(1, math.ceil(SAMPLE_S / max(sample(runs[0], 1), 1e-9))) if real else 1
        round_s = (budget.clock() - begin) * each * len(runs)
        rounds = 0
        while rounds < (ROUNDS if real else 1) and budget.allows(round_s):
            begin = budget.clock()
            for i in range(len(runs))[:: -1 if rounds % 2 else 1]:
                seconds[i].append(sample(runs[i], each))
            round_s = budget.clock() - begin
            rounds += 1
        return seconds, rounds

    def op_times(self, sequential: Plan, sizes: Iterable[int], budget: Countdown) -> list[OpTime]:
        """Every op alone on each of `sizes` SMs, over all ops of one key and several replays, as far as time allows."""
        flat = self.graph.flat()
        key = {op.name: shape_key(op, flat.tensor) for op in flat.ops}
        seconds: dict[tuple[OpKey, int], list[float]] = {}
        replay_s = 0.0
        for size in sizes:
            if not budget.allows(2 * replay_s):
                break
            narrow = on_partition(sequential, self.graph, size)
            with self.open(narrow) as executable:
                for _ in range(REPLAYS):
                    if not budget.allows(replay_s):
                        break
                    begin = budget.clock()
                    spans = executable.timeline().spans
                    replay_s = budget.clock() - begin
                    for i, span in enumerate(spans):
                        row = seconds.setdefault((key[span.op], narrow.sms(i)), [])
                        row.append(max(span.end_s - span.start_s, 1e-9))
        return [OpTime(k, sms, *_middle(row), len(row)) for (k, sms), row in seconds.items()]


def sample(executable: Executable, launches: int) -> float:
    """Seconds of one launch, the mean of `launches`; a simulated executable tells its own time, a GPU its events'."""
    if isinstance(executable, _Timed):
        return executable.replay_seconds(launches)
    clock = _clock_of(executable)
    begin = clock()
    for _ in range(launches):
        executable.launch()
    return (clock() - begin) / launches


def _clock_of(executable: Any) -> Callable[[], float]:
    return (lambda: float(executable.elapsed_s)) if hasattr(executable, "elapsed_s") else time.perf_counter


def _middle(row: Sequence[float]) -> tuple[float, float]:
    """Median and half the interquartile range."""
    low, high = np.quantile(row, (0.25, 0.75))
    return statistics.median(row), float(high - low) / 2


def machine() -> str:
    """This machine in words, for people: a measured number is worth nothing without it."""
    return f"{probe.processor()}, {probe.cores()} cores, {platform.system()}, Python {platform.python_version()}"


def on_partition(sequential: Plan, graph: Graph, sms: int) -> Plan:
    """The sequential plan with every op that may run on `sms` SMs moved there; the others stay on the whole device."""
    if sms == sequential.device.sm_count:
        return sequential
    need = {op.name: op.demand.sm[0] for op in graph.flat().ops if op.demand.sm}
    lane = [0 if need.get(step.op, 1) <= sms else 1 for step in sequential.steps]
    steps = tuple(
        Step(step.op, here, (i - 1,) if i and lane[i - 1] != here else ())
        for i, (step, here) in enumerate(zip(sequential.steps, lane, strict=True))
    )
    spans = tuple(replace(s, lane=here) for s, here in zip(sequential.timeline.spans, lane, strict=True))
    geometries = (Geometry.of(sms), *sequential.geometries)[: 1 + max(lane)]
    lanes = tuple(Lane(i, 0) for i in range(len(geometries)))
    timeline = replace(sequential.timeline, spans=spans)
    return replace(sequential, geometries=geometries, lanes=lanes, steps=steps, timeline=timeline).sealed()
