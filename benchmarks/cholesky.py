"""Exact sparse Cholesky as a task graph, against its own one-lane run and SciPy's SuperLU. Measured on this machine."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import scipy.sparse as sp
from rich.table import Table
from scipy.sparse.linalg import splu

from benchmarks import count, interleaved, machine, measured_main, one_line, positive
from examples.cholesky import Factor, grid_dissection
from examples.cholesky.problems import poisson

EPILOG = """\
Problems: 2d, 3d (Poisson), skewed (2d, one axis weighted 1000), band (a grid 8 points wide in its natural order: its
tree is a chain). The order is nested dissection by geometry, SuperLU has the order that it makes itself. Rounds of the
planned graph, its sequential plan and SuperLU are interleaved; figures are medians. Bounds: the work of the tree over
that of its longest path.

example:
  python -m benchmarks.cholesky --unknowns 10000 100000 --problems 2d 3d --json
"""
PROBLEMS = ("2d", "3d", "skewed", "band")


def problem(kind: str, unknowns: int) -> tuple[sp.csc_array, np.ndarray]:
    """(matrix, order) of about that many unknowns."""
    if kind == "band":
        length = max(1, unknowns // 8)
        return poisson((length, 8)), np.arange(8 * length)
    axes = 3 if kind == "3d" else 2
    shape = (max(2, round(unknowns ** (1 / axes))),) * axes
    return poisson(shape, (1.0, 1000.0) if kind == "skewed" else None), grid_dissection(shape)


def tree_bound(factor: Factor) -> float:
    """Flops of all ops over the flops of the longest path of ops: what any number of lanes could gain at most."""
    work = [op.work.flops for op in factor.graph.ops]
    ends: list[float] = []
    for mine, before in zip(work, factor.graph.predecessors(), strict=True):
        ends.append(mine + max((ends[p] for p in before), default=0.0))
    return sum(work) / max(ends)


@numba.njit(nogil=True)
def spin(turns: int) -> float:
    """Work that touches no memory."""
    total = 0.0
    for i in range(turns):
        total += np.sqrt(float(i))
    return total


def plain_threads_gain(rounds: int = 5) -> float:
    """What two plain threads gain now over one: near 2 on two free cores, near 1 where others have one of them."""
    turns = 5_000_000
    spin(1)
    with ThreadPoolExecutor(2) as pool:
        times = interleaved(
            {"one": lambda: (spin(turns), spin(turns)), "two": lambda: list(pool.map(spin, (turns, turns)))},
            rounds=rounds,
        )
    return statistics.median(a / b for a, b in zip(times["one"], times["two"], strict=True))


def measured(kind: str, args: argparse.Namespace, unknowns: int) -> dict[str, Any]:
    """One problem: seconds, residuals, lanes and counts."""
    matrix, order = problem(kind, unknowns)
    rhs = np.random.default_rng(0).standard_normal(matrix.shape[0])
    begin = time.perf_counter()
    with (
        Factor(matrix, order, grain_flops=args.grain) as factor,
        Factor(matrix, order, grain_flops=args.grain, scheduler="sequential") as alone,
    ):
        declared = (time.perf_counter() - begin) / 2
        factor.refactor(matrix)
        alone.refactor(matrix)
        found: list[Any] = []
        runs: dict[str, Callable[[], Any]] = {"graph": factor.replay, "one_lane": alone.replay}
        if not args.no_superlu:
            runs["superlu"] = lambda: found.__setitem__(slice(None), [splu(matrix)])
        times = interleaved(runs, rounds=args.rounds)
        x = factor.solve(rhs)
        result: dict[str, Any] = {
            "unknowns": matrix.shape[0],
            "ops": len(factor.graph.ops),
            "fronts": len(factor.symbolic.flops),
            "lanes": len(factor.plan.lanes),
            "gflop": float(factor.symbolic.flops.sum()) / 1e9,
            "factor_entries": len(factor.factor),
            "tree_bound": tree_bound(factor),
            "declare_plan_capture_s": declared,
            "seconds": {name: statistics.median(row) for name, row in times.items()},
            "residual": float(np.linalg.norm(matrix @ x - rhs) / np.linalg.norm(rhs)),
        }
    result["plain_threads_gain"] = plain_threads_gain()
    result["parallel_gain"] = statistics.median(b / a for a, b in zip(times["graph"], times["one_lane"], strict=True))
    if found:
        result["superlu_entries"] = int(found[-1].nnz)
        y = found[-1].solve(rhs)
        result["superlu_residual"] = float(np.linalg.norm(matrix @ y - rhs) / np.linalg.norm(rhs))
        result["over_superlu"] = statistics.median(b / a for a, b in zip(times["graph"], times["superlu"], strict=True))
    return result


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Every problem at every size."""
    rows: dict[str, dict[str, Any]] = {}
    for kind in args.problems:
        for unknowns in args.unknowns:
            say(f"{kind}, {unknowns} unknowns")
            rows[f"{kind}-{unknowns}"] = measured(kind, args, unknowns)
    return {"machine": machine(), "problems": rows}


def table_of(result: dict[str, Any]) -> Table:
    """The figures as a table."""
    table = Table(title=f"sparse Cholesky, measured on {result['machine']}")
    for head in (
        "problem",
        "ops / fronts",
        "GFLOP",
        "lanes",
        "graph s",
        "one lane s",
        "gain",
        "threads",
        "bound",
        "SuperLU s",
    ):
        table.add_column(head, justify="left" if head == "problem" else "right")
    table.add_column("residual", justify="right")
    for name, row in result["problems"].items():
        s = row["seconds"]
        table.add_row(
            name, f"{row['ops']} / {row['fronts']}", f"{row['gflop']:.3g}", str(row["lanes"]), f"{s['graph']:.4g}",
            f"{s['one_lane']:.4g}", f"{row['parallel_gain']:.2f}", f"{row['plain_threads_gain']:.2f}",
            f"{row['tree_bound']:.2f}", f"{s['superlu']:.4g}" if "superlu" in s else "-", f"{row['residual']:.1e}",
        )  # fmt: skip
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.cholesky", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--unknowns", nargs="+", type=count, default=[10_000], help="about how many (default: 10000)")
    parser.add_argument(
        "--grain", type=positive, help="flops of the largest subtree that is one op (default: by the matrix)"
    )
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--no-superlu", action="store_true", help="leave SuperLU out (3d fills in under its own order)")
    return measured_main(parser, argv, measure, table_of, 130)


if __name__ == "__main__":
    sys.exit(main())
