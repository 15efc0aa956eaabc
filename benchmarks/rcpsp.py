"""Resource-constrained project scheduling: our schedulers on PSPLIB's single-mode instances, or on generated ones."""

import argparse
import csv
import io
import random
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine, print_json, progen
from taskgraph.errors import PlanError
from taskgraph.schedule import exact
from taskgraph.schedule.evolve import solve_auto
from taskgraph.schedule.passes import solve_list
from taskgraph.schedule.project import Project, Schedule, chain_bound, check, make_project

EPILOG = """\
PATH is a folder or a zip that holds .sm files and, where optima are known, optimum/optimum.csv. Instances are solved
one after the other, each in at most --seconds on two cores; every schedule is checked. Without --all and --limit a
seeded sample of instances is solved. Gaps are means over the instances; a gap to the optimum needs known optima.
--generate 30, 60 or 120 solves our own instances with the parameters of PSPLIB's sets instead.

example:
  python -m benchmarks.rcpsp j30.zip --seconds 1 --json
"""
SAMPLE_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class Instance:
    """A project with its name and, where known, its least makespan."""

    name: str
    project: Project
    optimum: float | None


def read_instances(path: Path) -> list[Instance]:
    """The instances in a folder or zip, in natural order of their names."""
    if path.is_file() and zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as packed:
            packed.extractall(folder)
            return read_instances(Path(folder))
    known = [row for file in path.rglob("optimum.csv") for row in csv.DictReader(io.StringIO(file.read_text()))]
    optima = {row["problem"].removesuffix(".sm"): float(row["optimum"]) for row in known}
    found = (file for file in path.rglob("*.sm") if file.is_file())
    files = sorted(found, key=lambda file: [int(part) for part in _numbers(file.stem)])
    return [Instance(file.stem, read_project(file), optima.get(file.stem)) for file in files]


def _numbers(name: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in name).split()


def read_project(file: Path) -> Project:
    """A Project from a PSPLIB file; activities keep the file's numbers, which are in topological order."""
    from psplib import parse

    read = parse(file)
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
    return make_project(seconds, use, np.array([resource.capacity for resource in read.resources]), predecessors)


def generated(activities: int) -> list[Instance]:
    """Ten instances for each cell of the parameter grid, as PSPLIB has them."""
    return [Instance(f"g{activities}_{i}", p, None) for i, p in enumerate(progen.grid(activities, 10))]


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
    return {
        "instances": len(instances),
        "optimal": optimal if gaps else None,
        "mean_gap_pct": statistics.fmean(gaps) if gaps else None,
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.rcpsp", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, help="folder or zip of .sm files")
    parser.add_argument("--generate", type=int, choices=sorted(progen.GRID), help="our own instances of this size")
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of an instance (default 1)")
    parser.add_argument("--scheduler", choices=("auto", "list"), default="auto", help="(default auto)")
    parser.add_argument("--limit", type=int, help="solve a seeded sample of so many instances")
    parser.add_argument("--all", action="store_true", help="solve all instances, whatever the time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the search and of the sample (default 0)")
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
        print_json({key: result[key] for key in KEYS})
    return 0


if __name__ == "__main__":
    sys.exit(main())
