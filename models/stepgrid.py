"""Simulated seconds of any serving step, interpolated between steps that were planned.

A step is a point (tokens, share of them that decode, keys that a decoding sequence sees). Corners of the grid cell
around it are planned when they are first needed; between them time is taken as linear in each, which for a time that
is a maximum of linear ones errs to the slow side.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.cost.model import op_table
from taskgraph.models.config import ModelConfig
from taskgraph.models.parallel import mixed_step
from taskgraph.models.simulate import StepShape
from taskgraph.schedule.nanobatch import UNSPLIT, Split, apply
from taskgraph.schedule.problem import Costs

TOKENS = (1, 64, 256, 1024, 2048, 4096, 8192)
DECODE = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
CONTEXT = (1, 256, 512, 768, 1024, 1280, 1536, 2048, 4096, 8192, 32768, 131072)
FIRST_SLICES = (4, 3)
"""Eighths of the tokens that are in the first of two slices; NanoFlow's are 768 and 640 of 2048."""
CHUNKS = (128, 512, 1024)
"""Tokens of a prompt's chunk, and keys that its last token sees: the nearest to the prompts' mean stands for all."""


VARIANTS = ("sequential", "nanobatch_only", "taskgraph")
"""A step as one graph op after op, in our plan's slices op after op, and as planned."""


Corner = tuple[int, float, int]
"""Tokens of a step, the share of them that decode, and the keys that each of those sees (0: none decodes)."""


class StepGrid:
    """Times of the steps of one rank of `model`, planned by search for `budget_s` seconds at every corner.

    `prompt_tokens` is the prompts' mean length; `costs` prices the ops (default: the cost model)."""

    def __init__(
        self,
        config: ModelConfig,
        device: str | tg.Device,
        *,
        tensor_parallel: int = 1,
        prompt_tokens: float = 512,
        budget_s: float = 0.5,
        seed: int = 0,
        costs: Costs = op_table,
        collectives: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.device, self.tensor_parallel = config, tg.devices.get(device), tensor_parallel
        self.chunk = min(CHUNKS, key=lambda n: abs(n - prompt_tokens))
        self._budget_s, self._seed, self._costs, self._collectives = budget_s, seed, costs, collectives
        self.planned: dict[Corner, tuple[tg.Graph, tg.Plan]] = {}
        self._seconds: dict[tuple[str, Corner], float] = {}

    def of(self, variant: str) -> "GridSeconds":
        """Seconds of one of VARIANTS, as the simulated engine wants them."""
        if variant not in VARIANTS:
            raise tg.PlanError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}.")
        return GridSeconds(self, variant)

    def corner(self, variant: str, tokens: int, share: float, context: int) -> float:
        """Seconds of the planned step at a point of the grid."""
        key = (tokens, share, context if share else 0)
        if (variant, key) not in self._seconds:
            graph = self.graph(round(tokens * share), context, tokens - round(tokens * share))
            self._seconds[variant, key] = self._variant(variant, key, graph)
        return self._seconds[variant, key]

    def _variant(self, variant: str, key: Corner, graph: tg.Graph) -> float:
        if variant == "sequential":
            return self._in_turn(graph)
        if key not in self.planned:
            candidates = self._candidates(key[0], graph)
            self.planned[key] = min(candidates, key=lambda pair: pair[1].makespan_s)
        sliced, plan = self.planned[key]
        return plan.makespan_s if variant == "taskgraph" else self._in_turn(sliced)

    def _candidates(self, tokens: int, graph: tg.Graph) -> Iterator[tuple[tg.Graph, tg.Plan]]:
        """Plans, with the graphs whose ops they run: one whose slices are searched for too, and, for large steps, some
        in two given slices, for which a short search finds more."""

        def search(given: tg.Graph, share: float, slices: bool) -> tg.Plan:
            budget_s = share * self._budget_s * min(tokens / 1024, 1.0) + 0.05  # a small step has little to overlap
            return tg.plan(
                given, self.device, "search", budget_s=budget_s, seed=self._seed, nano_batches=slices, costs=self._costs
            )

        plan = search(graph, 1.0, True)
        yield apply(graph, plan.split or UNSPLIT), plan
        for eighths in FIRST_SLICES if tokens >= 1024 else ():
            first = tokens * eighths // 8
            halved = apply(graph, Split.of((first, tokens - first)))
            yield halved, search(halved, 0.5, False)

    def _in_turn(self, graph: tg.Graph) -> float:
        return tg.plan(graph, self.device, "sequential", costs=self._costs).makespan_s

    def graph(self, decode: int, context: int, prefill: int) -> tg.Graph:
        """One rank's step: `decode` sequences that see `context` keys, and `prefill` tokens in chunks."""
        chunks = max(prefill // self.chunk, 1)
        while prefill % chunks:
            chunks -= 1
        return mixed_step(
            self.config, tensor_parallel=self.tensor_parallel, decode_tokens=decode, decode_context=context,
            prefill_tokens=prefill, prefill_sequences=chunks,
            prefill_context=max(self.chunk, prefill // chunks), collectives=self._collectives,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GridSeconds:
    """Seconds of a step in one variant."""

    grid: StepGrid
    variant: str

    def __call__(self, shape: StepShape) -> float:
        tokens = shape.decode + shape.prefill
        if not tokens:
            return 0.0
        cells = (
            between(TOKENS, tokens),
            between(DECODE, shape.decode / tokens),
            between(CONTEXT, max(shape.decode_context, 1)),
        )
        total = 0.0
        for (rows, a), (share, b), (context, c) in itertools.product(*cells):
            if a * b * c:
                total += a * b * c * self.grid.corner(self.variant, int(rows), share, int(context))
        return total


def between(points: Sequence[float], x: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The points around x and their weights; beyond the last, the last two go on in a straight line."""
    i = min(bisect_right(points, x), len(points) - 1)
    low, high = points[i - 1], points[i]
    weight = (x - low) / (high - low)
    return (low, 1.0 - weight), (high, weight)
