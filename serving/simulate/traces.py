"""Request traces: when requests come and how long they are, read from files or drawn, replayed and summed up."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from taskgraph.errors import RequestError
from taskgraph.record import parse, read_text, shown
from taskgraph.serving.engine import Engine
from taskgraph.serving.requests import Completion, Request

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
MOST_TOKENS = 1 << 31
"""Tokens of a prompt or of an answer, at most."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace: when it comes, the tokens of its prompt, and those that it generates."""

    arrival_s: float
    input_tokens: int
    output_tokens: int

    @property
    def computed_tokens(self) -> int:
        """Tokens that steps take in for it: all but the last generated one, which nothing follows."""
        return self.input_tokens + self.output_tokens - 1


# ------------------------------------------------------------------------------------------- files


def read_trace(path: Path) -> list[Arrival]:
    """The requests of a CSV file with a header, or of a file of JSON lines (.jsonl, .json), in order of arrival.

    Columns or keys are COLUMNS. RequestError names the line that cannot be read."""
    text = io.StringIO(read_text(path, RequestError, "trace"), newline="")
    try:
        rows = list(_json_rows(text, path.name) if path.suffix in (".jsonl", ".json") else _csv_rows(text))
    except csv.Error as error:
        raise RequestError(f"cannot read the trace {str(path)!r}: {error}.") from error
    if not rows:
        raise RequestError(f"the trace {str(path)!r} has no requests; each has {', '.join(COLUMNS)}.")
    arrivals = [_arrival(row, f"{path.name}, line {line}") for line, row in rows]
    return sorted(arrivals, key=lambda a: a.arrival_s)


def _csv_rows(file: Iterable[str]) -> Iterable[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def _json_rows(file: Iterable[str], name: str) -> Iterable[tuple[int, Mapping[str, object]]]:
    for line, text in enumerate(file, 1):
        if text.strip():
            row = parse(text, RequestError, f"request ({name}, line {line})", "Write one object a line.")
            yield line, row if isinstance(row, dict) else {}


def _arrival(row: Mapping[str, object], where: str) -> Arrival:
    missing = [name for name in COLUMNS if row.get(name) in (None, "")]
    if missing:
        raise RequestError(f"{where}: no {missing[0]}; a request has {', '.join(COLUMNS)}.")
    try:
        arrival, given, wanted = (float(str(row[name])) for name in COLUMNS)
    except ValueError:
        values = ", ".join(f"{name} {shown(row[name])}" for name in COLUMNS)
        raise RequestError(f"{where}: {values}; {', '.join(COLUMNS)} are numbers.") from None
    tokens = (given, wanted)
    if not (0 <= arrival < math.inf and all(1 <= n <= MOST_TOKENS and n == int(n) for n in tokens)):
        raise RequestError(
            f"{where}: arrival {arrival:g}, {given:g} input and {wanted:g} output tokens; arrivals are seconds from 0 "
            f"on, tokens are whole, from 1 to {MOST_TOKENS}."
        )
    return Arrival(arrival, int(given), int(wanted))


# ------------------------------------------------------------------------------------ drawn lengths


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long requests are: mean and standard deviation of prompts and of outputs; 0 means all alike."""

    input_mean: float
    input_std: float
    output_mean: float
    output_std: float

    def draw(self, count: int, context: int, seed: int = 0) -> list[tuple[int, int]]:
        """(input, output) tokens of `count` requests, that together fit the `context`.

        Log-normal with these moments, as lengths are positive and their tails long. Outputs are cut to half the
        context and prompts to what is left, which takes a little from the means."""
        random = np.random.default_rng(seed)
        outputs = _log_normal(random, self.output_mean, self.output_std, count)
        inputs = _log_normal(random, self.input_mean, self.input_std, count)
        outputs = np.clip(outputs, 1, context // 2)
        inputs = np.clip(inputs, 1, context - outputs)
        return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def _log_normal(random: np.random.Generator, mean: float, std: float, count: int) -> npt.NDArray[np.int64]:
    if not std:
        return np.full(count, round(mean), np.int64)
    variance = math.log1p((std / mean) ** 2)
    drawn = random.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    rounded: npt.NDArray[np.int64] = np.rint(drawn).astype(np.int64)
    return rounded


DATASETS: Mapping[str, Lengths] = {
    "splitwise": Lengths(1155, 1109, 211, 163),
    "lmsys": Lengths(102, 169, 222, 210),
    "sharegpt": Lengths(246, 547, 322, 244),
}
"""Lengths of published datasets by mean and standard deviation (published: Zhu et al. 2025, NanoFlow, table 4)."""


def poisson(lengths: Sequence[tuple[int, int]], per_s: float = math.inf, seed: int = 0) -> list[Arrival]:
    """Requests that come at random, `per_s` a second on average; all at once when it is infinite."""
    gaps = (
        np.random.default_rng(seed).exponential(1 / per_s, len(lengths)) if per_s < math.inf else np.zeros(len(lengths))
    )
    return [Arrival(at, *pair) for at, pair in zip(np.cumsum(gaps).tolist(), lengths, strict=True)]


# ------------------------------------------------------------------------------------------ a replay


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Mean and percentiles of a time, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Percentiles | None":
        """None when there is nothing to sum up."""
        if not len(seconds):
            return None
        return Percentiles(float(np.mean(seconds)), *(float(v) for v in np.percentile(seconds, (50, 90, 99))))


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay gave. `kind` says whose seconds these are: measured, or simulated.

    `steady_tokens_per_s` counts the tokens of the requests that ended in the middle half of all, by the time between;
    TTFT is from arrival to first token, TPOT the mean time between a request's tokens, latency from arrival to end."""

    kind: str
    requests: int
    steps: int
    seconds: float
    tokens_per_s: float
    output_tokens_per_s: float
    steady_tokens_per_s: float
    requests_per_s: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    latency: Percentiles | None


def replay(engine: Engine, trace: Sequence[Arrival], kind: str, *, vocabulary: int, seed: int = 0) -> Replay:
    """Serve the trace on the engine, with prompts of random tokens, and sum up."""
    check(engine, trace)
    arrivals = sorted(trace, key=lambda a: a.arrival_s)
    text = np.random.default_rng(seed).integers(0, vocabulary, engine.limits.context).astype(np.int32)
    before = engine.stats.steps
    begin = engine.runner.now()
    requests = [
        (a.arrival_s, Request(np.roll(text, i)[: a.input_tokens], a.output_tokens)) for i, a in enumerate(arrivals)
    ]
    done = engine.replay(requests)
    return summed_up(arrivals, done, begin, engine.stats.steps - before, kind)


def check(engine: Engine, trace: Sequence[Arrival]) -> None:
    """RequestError for a request that the engine can never serve, before any is."""
    room = engine.cache.device.pages * engine.cache.page_size
    most = min(engine.limits.context, room)
    for arrival in trace:
        if arrival.input_tokens + arrival.output_tokens > most:
            raise RequestError(
                f"the request at {arrival.arrival_s:g} s has {arrival.input_tokens} + {arrival.output_tokens} tokens; "
                f"the engine takes {most}. Take it out of the trace or give the engine a longer context or more pages."
            )


def summed_up(arrivals: Sequence[Arrival], done: Sequence[Completion], begin_s: float, steps: int, kind: str) -> Replay:
    """What was given, of completions that belong to the arrivals one by one."""
    ends = np.array([c.end_s for c in done])
    seconds = float(ends.max() - begin_s)
    tokens = np.array([a.computed_tokens for a in arrivals])
    output = sum(len(c.tokens) for c in done)
    return Replay(
        kind=kind,
        requests=len(done),
        steps=steps,
        seconds=seconds,
        tokens_per_s=float(tokens.sum()) / seconds,
        output_tokens_per_s=output / seconds,
        steady_tokens_per_s=_steady(ends, tokens),
        requests_per_s=len(done) / seconds,
        ttft=Percentiles.of([c.first_s - c.arrival_s for c in done]),
        tpot=Percentiles.of([(c.end_s - c.first_s) / (len(c.tokens) - 1) for c in done if len(c.tokens) > 1]),
        latency=Percentiles.of([c.end_s - c.arrival_s for c in done]),
    )


def _steady(ends: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]) -> float:
    """Tokens a second of the requests that ended between the first and the third quarter of all ends."""
    first, last = np.percentile(ends, (25, 75), method="nearest")
    counted = int(tokens[(ends > first) & (ends <= last)].sum())
    return counted / float(last - first) if last > first else float(tokens.sum()) / max(float(ends.max()), 1e-12)
