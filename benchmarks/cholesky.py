"""Exact sparse Cholesky as a task graph, against its one-lane run, SuperLU and CHOLMOD: measured on this machine."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
import scipy.sparse as sp
from rich.table import Table
from scipy.sparse.linalg import splu

from benchmarks import count, interleaved, machine, measured_main, one_line, positive
from examples.cholesky import Factor, fill_reducing, grid_dissection
from examples.cholesky.problems import poisson

EPILOG = """\
Problems: 2d, 3d (Poisson), skewed (2d, one axis weighted 1000), band (a grid 8 points wide in its natural order: its
tree is a chain). The order is METIS's where pymetis is installed, else nested dissection by geometry. SuperLU has the
order that it makes itself, CHOLMOD (of cvxopt, where that is installed) has ours. Rounds of the planned graph, its
sequential plan and the others are interleaved; figures are medians. Bounds: the work of the tree over that of its
longest path. With --quiet only rounds count before and after which two plain threads gained 1.8x over one, so that no
other program had a core. It waits for them so many seconds a problem, and says how many there were.

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
    matrix = poisson(shape, (1.0, 1000.0) if kind == "skewed" else None)
    return matrix, fill_reducing(matrix) if find_spec("pymetis") else grid_dissection(shape)


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


QUIET = 1.8
"""What two plain threads gain at least where nobody else has a core."""


def quiet_rounds(
    runs: dict[str, Callable[[], Any]], rounds: int, wait_s: float, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], int]:
    """(seconds of each run in each round, how many of them were quiet): quiet rounds where there are any."""
    loud: dict[str, list[float]] = {name: [] for name in runs}
    quiet: dict[str, list[float]] = {name: [] for name in runs}
    begin, before = time.perf_counter(), 0.0
    while len(quiet["graph"]) < rounds:
        over = time.perf_counter() - begin > wait_s
        if over and len(quiet["graph"]) + len(loud["graph"]) >= rounds:
            break
        before = before or plain_threads_gain(1)
        if before < QUIET and not over:
            time.sleep(1.0)
            before = 0.0
            continue
        row = interleaved(runs, rounds=1, warmup=0)
        after = plain_threads_gain(1)
        kept = quiet if min(before, after) >= QUIET else loud
        for name, seconds in row.items():
            kept[name] += seconds
        before = after
        say(f"two threads gained {after:.2f}x; {len(quiet['graph'])} quiet rounds")
    found = len(quiet["graph"])
    return (quiet if found else loud), found


def cholmod_run(matrix: sp.csc_array, order: np.ndarray) -> Callable[[], Any]:
    """A numeric supernodal factorisation by CHOLMOD in our order; the analysis is done."""
    from cvxopt import cholmod, spmatrix
    from cvxopt import matrix as dense

    found = sp.coo_array(matrix)
    made = spmatrix(found.data.tolist(), found.row.tolist(), found.col.tolist(), matrix.shape)
    cholmod.options["supernodal"] = 2
    factor = cholmod.symbolic(made, dense(order.tolist()))
    return lambda: cholmod.numeric(made, factor)


def measured(kind: str, args: argparse.Namespace, unknowns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One problem: seconds, residuals, lanes and counts."""
    matrix, order = problem(kind, unknowns)
    rhs = np.random.default_rng(0).standard_normal(matrix.shape[0])
    begin = time.perf_counter()
    with (
        Factor(
            matrix,
            order,
            grain_flops=args.grain,
            scheduler="autotune" if args.tune else "auto",
            tune_s=args.tune or 1.0,
        ) as factor,
        Factor(matrix, order, grain_flops=args.grain, scheduler="sequential") as alone,
    ):
        declared = (time.perf_counter() - begin) / 2
        factor.refactor(matrix)
        alone.refactor(matrix)
        found: list[Any] = []
        runs: dict[str, Callable[[], Any]] = {"graph": factor.replay, "one_lane": alone.replay}
        if not args.no_superlu:
            runs["superlu"] = lambda: found.__setitem__(slice(None), [splu(matrix)])
        if find_spec("cvxopt") and not args.no_cholmod:
            runs["cholmod"] = cholmod_run(matrix, order)
        for run in runs.values():
            run()
        times, quiet = quiet_rounds(runs, args.rounds, args.quiet, say)
        x = factor.solve(rhs)
        result: dict[str, Any] = {
            "unknowns": matrix.shape[0],
            "ops": len(factor.graph.ops),
            "fronts": len(factor.symbolic.flops),
            "lanes": len(factor.plan.lanes),
            "quiet_rounds": quiet,
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
            rows[f"{kind}-{unknowns}"] = measured(kind, args, unknowns, say)
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
        "CHOLMOD s",
    ):
        table.add_column(head, justify="left" if head == "problem" else "right")
    table.add_column("residual", justify="right")
    for name, row in result["problems"].items():
        s = row["seconds"]
        table.add_row(
            name, f"{row['ops']} / {row['fronts']}", f"{row['gflop']:.3g}", str(row["lanes"]), f"{s['graph']:.4g}",
            f"{s['one_lane']:.4g}", f"{row['parallel_gain']:.2f}", f"{row['plain_threads_gain']:.2f}",
            f"{row['tree_bound']:.2f}", f"{s['superlu']:.4g}" if "superlu" in s else "-",
            f"{s['cholmod']:.4g}" if "cholmod" in s else "-", f"{row['residual']:.1e}",
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
    parser.add_argument("--no-cholmod", action="store_true", help="leave CHOLMOD out")
    parser.add_argument("--tune", type=positive, metavar="S", help="autotune the plan for up to so many seconds")
    parser.add_argument("--quiet", type=positive, default=1e-9, metavar="S", help="wait so long for quiet rounds")
    return measured_main(parser, argv, measure, table_of, 140)


if __name__ == "__main__":
    sys.exit(main())
