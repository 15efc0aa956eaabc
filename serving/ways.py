"""Two ways to run decode and prefill at the same time, and which of them a load is given.

*Mixed*: one step takes a token of every sequence that decodes and a chunk of prefill, on the whole device. *Apart*: the
decode step and steps of prefill run beside each other, each as a graph of its own in one partition of a split of the
device, each at its own pace; what decodes does not wait for a chunk (what DuetServe, Bullet and SGLang's pdmux do by
hand). Which is better depends on the load, so both are predicted, and the better one under the wanted time per output
token is taken.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Generic, TypeVar

import taskgraph as tg
from taskgraph.errors import RequestError
from taskgraph.serving.requests import number, whole
from taskgraph.serving.simulate.stepgrid import CONTEXT, StepGrid, StepShape, between

T = TypeVar("T")

LEAST_GAIN = 1.02
"""Two graphs must be predicted this much faster than one to be taken: the planner's own margin."""
ALIKE = 0.02
"""Works that differ by less are taken for equal."""
DECODES = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
PREFILLS = (16, 128, 512, 1024, 2048, 8192)
"""Points between which the times of steps apart are taken as linear, as those of mixed steps are."""
SIZES = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
"""Tokens that a step of prefill may have."""
MOST_SPLITS = 8
_NEARLY = 1.03
_PACE = 2.0
"""Steps of decode that a step of prefill lasts, at most: what waits behind a longer one waits too long."""
_KEYS, _MOST_STEPS = 64, 4
"""Loads whose sequences see as many keys, to a multiple of the first, are given the same way, and so are those with
prompts for as many steps, or for more than the second."""


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """SMs of the partition that decodes, and of the one that prefills."""

    decode_sms: int
    prefill_sms: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.decode_sms, self.prefill_sms


class Order(Generic[T]):
    """Which batch of the other side a batch must wait for: the last one that ran in another split than it does. Sides
    are 0 and 1; a batch in no split has the whole device."""

    def __init__(self) -> None:
        self._last: list[tuple[Split | None, T] | None] = [None, None]
        self._turned: list[T | None] = [None, None]

    def launched(self, side: int, split: Split | None, batch: T) -> T | None:
        """The one to wait for, if there is any, by the time that `batch` is launched; it may have ended long since."""
        before, other = self._last[side], self._last[1 - side]
        if before is not None and before[0] != split:
            self._turned[side] = before[1]
        self._last[side] = split, batch
        if other is None:
            return None
        return self._turned[1 - side] if other[0] == split else other[1]


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that decode, the keys that each sees on average, and the tokens of prompts that wait. RequestError for
    what is no such number."""

    decode: int
    context: float
    waiting: int

    def __post_init__(self) -> None:
        whole("decode", self.decode, 0)
        whole("waiting", self.waiting, 0)
        number("context", self.context, 0.0, 1e12, "keys that a sequence sees")


@dataclass(frozen=True, slots=True)
class Room:
    """The most sequences of a step, and the keys that the cache holds."""

    sequences: int
    keys: int

    def of(self, context: float) -> int:
        """Sequences that can decode at once where each sees so many keys."""
        return max(min(self.sequences, int(self.keys / max(context, 1.0))), 1)


@dataclass(frozen=True, slots=True)
class Way:
    """How a load is run, and what is predicted of it (simulated): mixed, or with a `split` apart.

    A step of prefill has at most `prefill` tokens. `token_s` is from one token of a sequence to its next one;
    `output_per_s` and `prefill_per_s` are tokens a second. `work` is the throughput that ways are compared by: both
    kinds of tokens a second, each counted by the seconds that it takes on the whole device in the most efficient steps
    of its kind alone: as many sequences as there is room for, and the best chunk. So a full batch and its prompts, one
    after the other, reach 1.0; apart it is what is left after LEAST_GAIN. `met`: whether `token_s` is within the wanted
    one; where no way is, the one with the least `token_s` is taken."""

    split: Split | None
    prefill: int
    token_s: float
    output_per_s: float
    prefill_per_s: float
    work: float
    met: bool = True

    @property
    def rank(self) -> int:
        """The class of its work."""
        return int(self.work / ALIKE)


def chosen(ways: Sequence[Way], tpot_s: float) -> Way:
    """The way with the most work of those within `tpot_s` seconds a token. Works of one class of ALIKE count as equal:
    of those mixed is taken, and then the most tokens of prefill. If no way is within it, the one that is fastest a
    token, which says so."""
    met = [way for way in ways if way.token_s <= tpot_s]
    if met:
        return max(met, key=lambda way: (way.rank, way.split is None, way.prefill, -way.token_s))
    return replace(min(ways, key=lambda way: (way.token_s, -way.work)), met=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """A load that decoded and prefilled, how often one like it came, and the way that it was given."""

    load: Load
    times: int
    way: Way


class Ways:
    """Chooses for every load on one device, at `tpot_s` seconds a token. It predicts mixed steps by `mixed_s` and steps
    apart by `grid`'s model and device: each op at the speed that its SMs, the bandwidth that both sides draw and their
    power leave it (`tg.beside`)."""

    def __init__(
        self,
        grid: StepGrid,
        mixed_s: Callable[[StepShape], float],
        tpot_s: float,
        *,
        step_tokens: int,
        room: Room,
        splits: Sequence[Split] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.tpot_s = number("tpot_s", tpot_s, 1e-9, 1e9, "seconds a token")
        self.step_tokens = whole("step_tokens", step_tokens, 1)
        self.room = room
        self.splits = splits_of(grid.device) if splits is None else tuple(splits)
        self.sizes = tuple(sizes or (*(n for n in SIZES if n < step_tokens), step_tokens))
        """Tokens that a step of prefill may have, rising."""
        self._grid, self._mixed_s = grid, mixed_s
        self._sides: dict[tuple[int, int, int], tg.Side] = {}
        self._asked = Counter[tuple[int, int, int, Split | None]]()
        self._chosen: dict[tuple[int, int, int, Split | None], Way] = {}
        self._corners: dict[tuple[Split | None, int, int, int], tuple[float, float]] = {}

    # -- what steps take ---------------------------------------------------------------------------

    def mixed_s(self, decode: int, context: float, prefill: int) -> float:
        """Seconds of a mixed step."""
        return self._mixed_s(StepShape(decode, round(context), prefill, 1 if prefill else 0, 0))

    def apart_s(self, split: Split | None, decode: int, context: float, prefill: int) -> tuple[float, float]:
        """Seconds of a decode step and of a step of prefill while the other never stops; without a split those of each
        alone on the whole device."""
        cells = between(DECODES, decode), between(CONTEXT, max(context, 1)), between(PREFILLS, max(prefill, 1))
        found = [0.0, 0.0]
        for (rows, a), (keys, b), (tokens, c) in product(*cells):
            if weight := a * b * c:
                for side, seconds in enumerate(self._corner(split, int(rows), int(keys), int(tokens))):
                    found[side] += weight * seconds
        return max(found[0], 1e-9), max(found[1], 1e-9)

    def _corner(self, split: Split | None, decode: int, context: int, prefill: int) -> tuple[float, float]:
        key = (split, decode, context, prefill)
        if key not in self._corners:
            sides = self._side(decode, context, 0), self._side(0, 0, prefill)
            self._corners[key] = (
                (sides[0].alone_s(), sides[1].alone_s()) if split is None else tg.beside(*sides, split.sizes)
            )
        return self._corners[key]

    def _side(self, decode: int, context: int, prefill: int) -> "tg.Side":
        key = (decode, context, prefill)
        if key not in self._sides:
            self._sides[key] = tg.Side.of(self._grid.graph(decode, context, prefill), self._grid.device)
        return self._sides[key]

    def prepare(self, context: int) -> None:
        """Predict now what choices of loads of up to `context` keys a sequence need, so that none costs time later."""
        points = [
            [p for p, before in zip(points, (0, *points), strict=False) if before < most]
            for points, most in ((DECODES, self.room.sequences), (CONTEXT, context), (PREFILLS, self.step_tokens))
        ]
        for decode, keys, tokens in product(*points):
            for split in (None, *self.splits):
                self._corner(split, decode, keys, tokens)
        for decode, keys, tokens in product(points[0], points[1], self.sizes):
            self.mixed_s(decode, keys, tokens)

    def best_splits(self, context: int, most: int) -> tuple[Split, ...]:
        """The splits, `most` of them, that gain most over loads of all sizes whose prompts wait, by prediction."""
        gains = defaultdict[Split, float](float)
        for share, keys in product((1.0, 0.5, 0.25, 0.125), (0.125, 0.5, 1.0)):
            load = Load(max(round(self.room.sequences * share), 1), context * keys, _MOST_STEPS * self.step_tokens)
            every = [*self.every(load)]
            best, mixed = chosen(every, self.tpot_s), chosen([w for w in every if w.split is None], self.tpot_s)
            if best.split is not None:
                gains[best.split] += best.work / mixed.work
        return tuple(sorted(sorted(gains, key=lambda split: -gains[split])[:most]))

    # -- the choice --------------------------------------------------------------------------------

    def every(self, load: Load) -> Iterator[Way]:
        """All ways to run a load that decodes and prefills, with what is predicted of each."""
        most = max(load.decode, self.room.of(load.context))
        output_s = self.apart_s(None, most, load.context, self.sizes[-1])[0] / most
        token_s = min(self.apart_s(None, load.decode, load.context, n)[1] / n for n in self.sizes)

        def way(split: Split | None, size: int, step_s: float, rates: tuple[float, float]) -> Way:
            """Steps of decode and tokens of prefill a second."""
            work = (rates[0] * load.decode * output_s + rates[1] * token_s) / (LEAST_GAIN if split else 1.0)
            return Way(split, size, step_s, load.decode * rates[0], rates[1], work)

        for size in self.sizes:
            tokens = min(size, load.waiting, max(self.step_tokens - load.decode, 1))
            step_s = self.mixed_s(load.decode, load.context, tokens)
            yield way(None, size, step_s, (1.0 / step_s, tokens / step_s))
            tokens = min(size, load.waiting)
            for split in self.splits:
                each_s, prefill_s = self.apart_s(split, load.decode, load.context, tokens)
                if size == self.sizes[0] or prefill_s <= _PACE * each_s:
                    yield way(split, size, each_s, episode(each_s, prefill_s * load.waiting / tokens, load.waiting))
            if size >= load.waiting:
                return

    def choose(self, load: Load, using: Split | None = None) -> Way:
        """The way for a load. What only decodes or only prefills has the whole device, in steps as large as they are.

        `using` is the split in use, which stays while it meets the time a token as the best does, and its work is
        nearly the best: to change it costs a pause."""
        keys = -(-round(load.context) // _KEYS) * _KEYS if load.decode else 0
        steps = min(-(-load.waiting // self.step_tokens), _MOST_STEPS)
        tokens = min((n for n in self.sizes if n >= load.waiting), default=steps * self.step_tokens)
        key = (load.decode, keys, tokens if load.waiting else 0, using)
        if key not in self._chosen:
            self._chosen[key] = self._choose(Load(*key[:3]), using)
        self._asked[key] += 1
        return self._chosen[key]

    def choices(self, most: int = 8) -> tuple[Choice, ...]:
        """What was chosen for the loads that came most, of those that decoded and prefilled; alike are those between
        the same points of the grid."""
        cells = defaultdict[tuple[float, ...], list[tuple[int, Load, Way]]](list)
        for key, times in self._asked.items():
            decode, context, waiting, _ = key
            if decode and waiting:
                at = (DECODES, decode), (CONTEXT, context), (PREFILLS, waiting)
                cell = tuple(between(points, x)[1][0] for points, x in at)
                cells[cell].append((times, Load(decode, context, waiting), self._chosen[key]))
        found = []
        for alike in cells.values():
            _, load, way = max(alike, key=lambda one: one[0])
            found.append(Choice(load, sum(times for times, *_ in alike), way))
        return tuple(sorted(found, key=lambda choice: -choice.times)[:most])

    def _choose(self, load: Load, using: Split | None) -> Way:
        if load.decode and load.waiting:
            every = [*self.every(load)]
            best = chosen(every, self.tpot_s)
            mine = [way for way in every if way.split == using is not None]
            stays = chosen(mine, self.tpot_s) if mine else best
            return stays if stays.met == best.met and stays.work * _NEARLY >= best.work else best
        tokens = min(load.waiting, self.step_tokens)
        step_s = self.mixed_s(load.decode, load.context, tokens) if load.decode or tokens else 0.0
        rate = 1.0 / step_s if step_s else 0.0
        met = not load.decode or step_s <= self.tpot_s
        return Way(None, self.step_tokens, step_s, load.decode * rate, tokens * rate, 1.0, met)


def episode(decode_s: float, prefill_s: float, waiting: int) -> tuple[float, float]:
    """Steps of decode and tokens of prefill a second, from when the prompts that wait are begun, `prefill_s` of work,
    until the device is whole again: when the step of `decode_s` ends in which they do, or when they have and those
    steps that ended before."""
    steps = int(prefill_s / decode_s)
    until_s = (steps + 1) * decode_s
    return max(
        ((steps + 1) / until_s, waiting / until_s),
        (steps / prefill_s, waiting / prefill_s),
        key=lambda rates: rates[0] * decode_s + rates[1] * prefill_s / waiting,
    )


def splits_of(device: tg.Device, most: int = MOST_SPLITS) -> tuple[Split, ...]:
    """Legal splits of a device, `most` of them that are spread over those that give each side an eighth or more; none
    where it cannot be split."""
    every = [Split(*sizes) for sizes in tg.halves(device) if min(sizes) * 8 >= device.sm_count]
    if not every:
        return ()
    count = min(most, len(every))
    places = {round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)}
    return tuple(every[i] for i in sorted(places))


def tpot_of(milliseconds: float) -> float | None:
    """Seconds of `--tpot-ms`, None for 0: no wish. RequestError for what is no time."""
    if not 0.0 <= milliseconds < math.inf:
        raise RequestError(f"--tpot-ms is {milliseconds:g}; give milliseconds a token, or 0 for no wish.", "tpot_ms")
    return milliseconds / 1e3 or None
