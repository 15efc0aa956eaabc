"""Benchmarks: `python -m benchmarks.NAME --json` from the repository root. Measured, unless it says otherwise."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from taskgraph.errors import ConfigError, TaskgraphError
from taskgraph.record import integer, number

T = TypeVar("T")


def machine() -> str:
    """One line that names this machine: a measured number is worth nothing without it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return f"{model or platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


def one_line(main: Callable[..., int]) -> Callable[..., int]:
    """A benchmark's `main` whose TaskgraphErrors (a damaged file, a wrong flag) are one line on stderr and exit 2."""

    @wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except TaskgraphError as error:
            print(f"{main.__module__.removeprefix('benchmarks.')}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return guarded


def count(text: str) -> int:
    """An argument that is an integer of at least 1."""
    return _argument(lambda: integer("it", _number_of(text, int), ConfigError, 1))


def whole(text: str) -> int:
    """An argument that is an integer of at least 0."""
    return _argument(lambda: integer("it", _number_of(text, int), ConfigError, 0))


def positive(text: str) -> float:
    """An argument that is a finite number above 0."""
    return _argument(lambda: number("it", _number_of(text, float), ConfigError, 0, above=True))


def _argument(read: Callable[[], T]) -> T:
    try:
        return read()
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number_of(text: str, kind: type[T]) -> T | str:
    try:
        return kind(text)  # type: ignore[call-arg]
    except ValueError:
        return text


def print_json(result: Mapping[str, Any]) -> None:
    """The result on one line; the last thing that a benchmark prints."""
    print(json.dumps(result), flush=True)


def measured_main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measure: Callable[[argparse.Namespace, Callable[[str], None]], dict[str, Any]],
    table_of: Callable[[dict[str, Any]], Table],
    width: int,
) -> int:
    """Parse, measure while stderr says how far it is, and show the result: a table, and JSON if asked for."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.1f} s] {text}", file=sys.stderr, flush=True)

    result = measure(args, say)
    Console(width=max(Console().width, width)).print(table_of(result))
    if args.json:
        print_json(result)
    return 0


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    budget_s: float = float("inf"),
    pause_s: float = 0.0,
    lead: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every round of every run, one of each in turn, so that a disturbance meets all of them alike.

    Stops after `rounds`, or after the first round that ends beyond `budget_s`, but not before the third. `pause_s`
    lets the worker threads of the run before fall asleep; `lead` untimed runs come straight before each timed one,
    so that it finds its own caches and threads warm, and not those of its neighbour.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in range(1, rounds + 1):
        for name, run in runs.items():
            time.sleep(pause_s)
            for _ in range(lead):
                run()
            seconds[name].append(seconds_of(run))
        if done >= 3 and time.perf_counter() - begin > budget_s:
            break
    return seconds


def spread(seconds: Sequence[float]) -> float:
    """Half the interquartile range over the median; half the range for fewer than three rounds."""
    if len(seconds) < 3:
        return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2 / middle
