"""Simulated seconds of any serving step, interpolated between steps that were planned.

A step is a point (tokens, share of them that decode, keys that a decoding sequence sees). Corners of the grid cell
around it are planned when they are first needed, or before, by `StepGrid.prepare`; between them time is taken as linear
in each, which for a time that is a maximum of linear ones errs to the slow side.
"""

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models.config import ModelConfig
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.rewrite import UNSPLIT, Split, apply
from taskgraph.serving.batch import Batch

TOKENS = (1, 64, 256, 1024, 2048, 4096, 8192)
DECODE = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
CONTEXT = (1, 256, 512, 768, 1024, 1280, 1536, 2048, 4096, 8192, 32768, 131072)
CHUNKS = (128, 512, 1024)
"""Tokens of a prompt's chunk, and keys that its last token sees: the nearest to the prompts' mean stands for all."""
LEAST_S = 0.05
"""The shortest search."""
SELDOM, OFTEN = 0.01, 0.15
"""Shares of the steps: a corner below the first is packed by lists, and slices are searched for from the second on."""
FIRST_EIGHTHS = 3
"""How many eighths of the tokens go to the first of two slices, as in NanoFlow's 768 + 1280: a short search finds more
in given slices."""

VARIANTS = ("sequential", "nanobatch_only", "taskgraph")
"""A step as one graph op after op, in our plan's slices op after op, and as planned."""


Corner = tuple[int, float, int]
"""Tokens of a step, the share of them that decode, and the keys that each of those sees (0: none decodes)."""


@dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """What a step's time depends on: sequences that decode and the keys each sees on average, tokens of prefill, their
    chunks, and the keys that a chunk's last token sees on average."""

    decode: int
    decode_context: int
    prefill: int
    chunks: int
    prefill_context: int

    @staticmethod
    def of(batch: Batch) -> "StepShape":
        """The shape of a batch."""
        seen, d = batch.lengths, batch.decode
        decode_context = int(seen[:d].mean()) if d else 0
        return StepShape(d, decode_context, batch.prefill, batch.chunks, int(seen[d:].mean()) if batch.chunks else 0)


class StepGrid:
    """Times of the steps of `config`, a model or one rank's share of it, planned by search for `budget_s` seconds at
    every corner.

    `prompt_tokens` is the prompts' mean length. `plan` is `tg.plan`, or like it with other costs."""

    def __init__(
        self,
        config: ModelConfig,
        device: str | tg.Device,
        *,
        prompt_tokens: float = 512,
        budget_s: float = 0.5,
        seed: int = 0,
        plan: Callable[..., tg.Plan] = tg.plan,
        collectives: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.device = config, tg.devices.get(device)
        self.chunk = min(CHUNKS, key=lambda n: abs(n - prompt_tokens))
        self._budget_s, self._seed, self._plan_by, self._collectives = budget_s, seed, plan, collectives
        self.planned: dict[Corner, tuple[tg.Graph, tg.Plan]] = {}
        self._split: dict[Corner, Split] = {}
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
            self._seconds[variant, key] = self._variant(variant, key)
        return self._seconds[variant, key]

    def prepare(self, runs: Iterable[Sequence[StepShape]], budget_s: float) -> None:
        """Plan what the steps of some runs need, `budget_s` seconds of search in all, each corner by its part of them.

        Runs count alike, however long. The corners that stand for most steps come first: others take slices from them.
        """
        shares = [visited(shapes) for shapes in runs]
        part, most = defaultdict[Corner, float](float), defaultdict[Corner, float](float)
        for corner, share in itertools.chain.from_iterable(each.items() for each in shares):
            part[corner] += share / len(shares)
            most[corner] = max(most[corner], share)
        for corner in sorted(part, key=lambda c: -part[c]):
            if corner not in self.planned:
                self._plan(corner, budget_s * part[corner], most[corner])

    def _variant(self, variant: str, key: Corner) -> float:
        if variant == "sequential":
            return self._sequential(self._graph_of(key))
        if key not in self.planned:
            self._plan(key, self._budget_s * min(key[0] / 1024, 1.0), 1.0)  # a small step has little to overlap
        sliced, plan = self.planned[key]
        return plan.makespan_s if variant == "taskgraph" else self._sequential(sliced)

    def _plan(self, key: Corner, budget_s: float, share: float) -> None:
        """Keep the best plan of a corner, and the graph whose ops it runs."""
        split, graph, plan = min(self._candidates(key, budget_s, share), key=lambda found: found[2].makespan_s)
        self.planned[key], self._split[key] = (graph, plan), split

    def _candidates(self, key: Corner, budget_s: float, share: float) -> Iterator[tuple[Split, tg.Graph, tg.Plan]]:
        """Slices, the graphs that they make, and plans of those: for the slices to try, and, of a corner that is met
        OFTEN, for some that the search finds."""
        graph, given = self._graph_of(key), self._slices(key)
        searched = share >= OFTEN or not given

        def make(sliced: tg.Graph, nano_batches: bool) -> tg.Plan:
            seconds = max(budget_s / (len(given) + searched), LEAST_S)
            return self._plan_by(
                sliced, self.device, "list" if share < SELDOM else "search", budget_s=seconds, seed=self._seed,
                nano_batches=nano_batches,
            )  # fmt: skip

        for split in given:
            sliced = apply(graph, split)
            yield split, sliced, make(sliced, False)
        if searched:
            plan = make(graph, True)
            split = plan.split or UNSPLIT
            yield split, apply(graph, split), plan

    def _slices(self, key: Corner) -> list[Split]:
        """Slices to try for a large step: NanoFlow's, and those of the planned corner that is nearest."""
        tokens, share, context = key
        if tokens < 1024:
            return []
        first = tokens * FIRST_EIGHTHS // 8
        near = min(
            (c for c in self.planned if c[0] == tokens),
            key=lambda c: abs(c[1] - share) + abs(c[2] - context) / CONTEXT[4],
            default=None,
        )
        common = () if near is None else self._split[near].parts[:1]  # single ops' slices may not fit another share
        splits = [Split.of((first, tokens - first)), *([Split(common)] if common else [])]
        return list(dict.fromkeys(splits))

    def _graph_of(self, key: Corner) -> tg.Graph:
        tokens, share, context = key
        decode = round(tokens * share)
        return self.graph(decode, context, tokens - decode)

    def _sequential(self, graph: tg.Graph) -> float:
        return self._plan_by(graph, self.device, "sequential").makespan_s

    def graph(self, decode: int, context: int, prefill: int) -> tg.Graph:
        """One rank's step: `decode` sequences that see `context` keys, and `prefill` tokens in chunks."""
        chunks = max(prefill // self.chunk, 1)
        while prefill % chunks:
            chunks -= 1
        return mixed_step(
            self.config, Decode(decode, context), Prefill(prefill, max(self.chunk, prefill // chunks), chunks),
            collectives=self._collectives,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GridSeconds:
    """Seconds of a step in one variant."""

    grid: StepGrid
    variant: str

    def __call__(self, shape: StepShape) -> float:
        return sum(weight * self.grid.corner(self.variant, *corner) for corner, weight in corners(shape))


def corners(shape: StepShape) -> Iterator[tuple[Corner, float]]:
    """The corners around a step with their weights, where those are not 0."""
    tokens = shape.decode + shape.prefill
    if tokens:
        cells = (
            between(TOKENS, tokens),
            between(DECODE, shape.decode / tokens),
            between(CONTEXT, max(shape.decode_context, 1)),
        )
        for (rows, a), (share, b), (context, c) in itertools.product(*cells):
            if a * b * c:
                yield (int(rows), share, int(context) if share else 0), a * b * c


def visited(shapes: Sequence[StepShape]) -> dict[Corner, float]:
    """The share of the steps that each corner stands for."""
    found = defaultdict[Corner, float](float)
    for shape, times in Counter(shapes).items():
        for corner, weight in corners(shape):
            found[corner] += weight * times / len(shapes)
    return found


def between(points: Sequence[float], x: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The points around x and their weights; beyond the last, the last two go on in a straight line."""
    i = min(bisect_right(points, x), len(points) - 1)
    low, high = points[i - 1], points[i]
    weight = (x - low) / (high - low)
    return (low, 1.0 - weight), (high, weight)
