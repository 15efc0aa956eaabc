"""Resource-constrained project scheduling: our schedulers on PSPLIB's single-mode instances, or on generated ones."""

import argparse
import csv
import io
import math
import random
import re
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import count, machine, one_line, positive, print_json, progen, whole
from benchmarks.rcpsp_list import solve_list
from taskgraph.errors import PlanError, TaskgraphError
from taskgraph.record import read_text
from taskgraph.schedule.bounds import longest_path
from taskgraph.schedule.rcpsp import exact
from taskgraph.schedule.rcpsp.evolve import solve_auto
from taskgraph.schedule.rcpsp.project import Project, Schedule, check, make_project

EPILOG = """\
PATH is a folder or a zip that holds .sm files and, where optima are known, optimum/optimum.csv. Instances are solved
one after the other, each in at most --seconds on two cores; every schedule is checked. Without --all and --limit a
seeded sample of instances is solved. Gaps are means over the instances; a gap to the optimum needs known optima. Where
optimum.csv has bounds (82..87), an instance is `open`: its gap counts to the lower bound, as mean_gap_lower_pct.
--generate 30, 60 or 120 solves our own instances with the parameters of PSPLIB's sets instead.

example:
  python -m benchmarks.rcpsp j30.zip --seconds 1 --json
"""
SAMPLE_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class Instance:
    """A project with its name and, where known, bounds of its least makespan: `low` and `high`, equal where it is
    known exactly."""

    name: str
    project: Project
    low: float | None = None
    high: float | None = None

    @property
    def optimum(self) -> float | None:
        """The least makespan; None where only bounds are known."""
        return self.low if self.low == self.high else None


def read_instances(path: Path) -> list[Instance]:
    """The instances in a folder or zip, in natural order of their names; PlanError names the file and the line of what
    cannot be read."""
    if path.is_file():
        try:
            with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as packed:
                packed.extractall(folder)
                return read_instances(Path(folder))
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
            if isinstance(error, TaskgraphError):
                raise
            raise PlanError(f"{path} is no folder and no zip that can be read: {error}.") from error
    known: dict[str, tuple[float, float]] = {}
    for file in sorted(path.rglob("optimum.csv")):
        known |= read_optima(file)
    found = (file for file in path.rglob("*.sm") if file.is_file())
    files = sorted(found, key=lambda file: [int(part) for part in _numbers(file.stem)])
    return [Instance(file.stem, read_project(file), *known.get(file.stem, (None, None))) for file in files]


def read_optima(file: Path) -> dict[str, tuple[float, float]]:
    """Bounds of the least makespan by instance: a line `j301_1.sm,43` knows it, `j9010_5.sm,82..87` that it is from 82
    to 87, and one without a number says nothing. PlanError names the line that says neither."""
    rows = csv.DictReader(io.StringIO(read_text(file, PlanError, "table of optima")))
    if not {"problem", "optimum"} <= {*(rows.fieldnames or ())}:
        raise PlanError(f"{file.name}: the header is {rows.fieldnames}; it needs the columns problem and optimum.")
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        text, name = (row["optimum"] or "").strip(), (row["problem"] or "").strip()
        low, _, high = text.partition("..")
        try:
            bounds = (float(low), float(high or low)) if text else None
        except ValueError:
            bounds = (math.nan, math.nan)
        if not name or (bounds is not None and not 0 < bounds[0] <= bounds[1] < math.inf):
            raise PlanError(
                f"{file.name}, line {rows.line_num}: the optimum of {name!r} is {text!r}; it is a number above 0, or "
                "two such as 82..87, the lower first."
            )
        if bounds is not None:
            found[name.removesuffix(".sm")] = bounds
    return found


def _numbers(name: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in name).split()


def read_project(file: Path) -> Project:
    """A Project from a PSPLIB file; activities keep the file's numbers, which are in topological order."""
    from psplib import parse

    text = read_text(file, PlanError, "project file")
    try:
        read = parse(file)
    except (ValueError, IndexError, TypeError) as error:  # what the parser lets out for a damaged file
        wrong = re.search(r"'([^']*)'", str(error))
        lines = (n for n, line in enumerate(text.splitlines(), 1) if wrong and wrong[1] and wrong[1] in line)
        where = f", line {line}" if (line := next(lines, 0)) else ""
        raise PlanError(f"{file.name}{where}: no project of PSPLIB: {error or type(error).__name__}.") from error
    if not read.activities or not all(activity.modes for activity in read.activities):
        raise PlanError(f"{file.name}: an activity has no mode, or there is none at all.")
    if any(not 0 <= j < len(read.activities) for activity in read.activities for j in activity.successors):
        raise PlanError(f"{file.name}: an activity has a successor that is not among the {len(read.activities)} there.")
    predecessors: list[list[int]] = [[] for _ in read.activities]
    for i, activity in enumerate(read.activities):
        for j in activity.successors:
            predecessors[j].append(i)
    modes = max(len(activity.modes) for activity in read.activities)
    seconds = np.full((len(read.activities), modes), np.inf)
    use = np.zeros((*seconds.shape, len(read.resources)))
    for i, activity in enumerate(read.activities):
        for k, mode in enumerate(activity.modes):
            seconds[i, k], use[i, k] = mode.duration, mode.demands
    if not all(resource.renewable for resource in read.resources):
        raise PlanError(f"{file.name} has resources that do not renew; give a project whose resources all renew.")
    capacity = np.array([resource.capacity for resource in read.resources])
    try:
        return make_project(seconds, use, capacity, predecessors)
    except TaskgraphError as error:
        raise PlanError(f"{file.name}: {error}") from error


def generated(activities: int) -> list[Instance]:
    """Ten instances for each cell of the parameter grid, as PSPLIB has them."""
    return [Instance(f"g{activities}_{i}", p) for i, p in enumerate(progen.grid(activities, 10))]


def chain_bound(project: Project) -> float:
    """Seconds of the longest chain of fastest modes: the critical-path bound of the field."""
    return float(longest_path(project.seconds.min(axis=1), project.pred_ptr, project.pred).max())


def solver(scheduler: str, seconds: float, seed: int) -> Callable[[Project], Schedule]:
    """The scheduler by name, with its budget."""
    if scheduler == "list":
        return lambda project: solve_list(project, seconds, seed)
    return lambda project: solve_auto(project, seconds, seed)


def measure(instances: Sequence[Instance], solve: Callable[[Project], Schedule]) -> dict[str, Any]:
    """Figures over all instances; a first solve outside the clock compiles and loads libraries."""
    first = solve(instances[0].project)
    if exact.available():
        exact.solve(instances[0].project, 0.2, first)
    optimal, invalid, proven, schedules, longest, total = 0, 0, 0, 0, 0.0, 0.0
    gaps: list[float] = []
    low_gaps: list[float] = []
    open_instances = 0
    cp_gaps: list[float] = []
    for instance in instances:
        begin = time.perf_counter()
        schedule = solve(instance.project)
        took = time.perf_counter() - begin
        total, longest = total + took, max(longest, took)
        schedules += schedule.schedules
        try:
            check(instance.project, schedule)
        except PlanError as error:
            print(f"{instance.name}: {error}", file=sys.stderr)
            invalid += 1
            continue
        proven += schedule.proven
        cp_gaps.append(100.0 * (schedule.makespan / chain_bound(instance.project) - 1.0))
        if instance.optimum is not None:
            gaps.append(100.0 * (schedule.makespan / instance.optimum - 1.0))
            optimal += schedule.makespan == instance.optimum
        elif instance.low is not None:
            open_instances += 1
        if instance.low is not None:
            low_gaps.append(100.0 * (schedule.makespan / instance.low - 1.0))
    return {
        "instances": len(instances),
        "optimal": optimal if gaps else None,
        "mean_gap_pct": statistics.fmean(gaps) if gaps else None,
        "mean_gap_lower_pct": statistics.fmean(low_gaps) if open_instances else None,
        "open": open_instances,
        "mean_gap_cp_pct": statistics.fmean(cp_gaps) if cp_gaps else None,
        "seconds": total,
        "invalid": invalid,
        "proven": proven,
        "longest_seconds": longest,
        "schedules_per_second": schedules / total,
    }


KEYS = ("instances", "optimal", "mean_gap_pct", "mean_gap_cp_pct", "seconds", "invalid")


def table_of(result: dict[str, Any], title: str) -> Table:
    """Every figure with its name."""
    table = Table(title=f"{title} (measured)", caption=machine())
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(
            name, "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        )
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.rcpsp", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, help="folder or zip of .sm files")
    parser.add_argument("--generate", type=int, choices=sorted(progen.GRID), help="our own instances of this size")
    parser.add_argument("--seconds", type=positive, default=1.0, help="budget of an instance (default 1)")
    parser.add_argument("--scheduler", choices=("auto", "list"), default="auto", help="(default auto)")
    parser.add_argument("--limit", type=count, help="solve a seeded sample of so many instances")
    parser.add_argument("--all", action="store_true", help="solve all instances, whatever the time")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the search and of the sample (default 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    if (args.path is None) == (args.generate is None):
        parser.error("Give either PATH or --generate.")
    if args.seconds <= 0 or (args.limit is not None and args.limit < 1):
        parser.error("--seconds is above 0 and --limit at least 1.")
    if args.path is not None and not args.path.exists():
        parser.error(f"{args.path} does not exist; give a folder or zip of .sm files.")
    instances = generated(args.generate) if args.generate else read_instances(args.path)
    if not instances:
        parser.error(f"{args.path} holds no .sm file.")
    limit = args.limit or (len(instances) if args.all else max(1, int(SAMPLE_SECONDS / args.seconds)))
    if limit < len(instances):
        picked = random.Random(args.seed).sample(range(len(instances)), limit)
        instances = [instances[i] for i in sorted(picked)]
    result = measure(instances, solver(args.scheduler, args.seconds, args.seed))
    title = f"{args.scheduler}, {args.seconds:g} s an instance, {args.path.name if args.path else 'generated'}"
    Console().print(table_of(result, title))
    if args.json:
        extra = ("open", "mean_gap_lower_pct") if result["open"] else ()
        print_json({key: result[key] for key in (*KEYS, *extra)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
