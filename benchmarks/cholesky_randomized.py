"""Randomized Cholesky as a preconditioner, against incomplete LU and algebraic multigrid: measured on this machine."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.sparse as sp
from rich.table import Table
from scipy.sparse.linalg import spilu

from benchmarks import count, machine, measured_main, one_line, positive
from benchmarks.cholesky import problem
from examples.cholesky import Randomized, conjugate_gradients

EPILOG = """\
Conjugate gradients to a relative residual of 1e-8, preconditioned by randomized Cholesky (a graph, replayed), SciPy's
spilu (symmetric mode, minimum degree, fill at most 20), smoothed aggregation and Ruge-Stueben of pyamg where that is
installed. Seconds are wall clock and CPU seconds of the process, which other programs change less. Setup is from
a matrix and its order to a preconditioner; of the graph, a replay for new values is a column of its own.

example:
  python -m benchmarks.cholesky_randomized --unknowns 100000 --problems 2d 3d skewed --json
"""
PROBLEMS = ("2d", "3d", "skewed")
Preconditioner = Callable[[np.ndarray], np.ndarray]


def clocked(run: Callable[[], Any]) -> tuple[Any, list[float]]:
    """(what it returns, [wall, CPU] seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = run()
    return made, [time.perf_counter() - wall, time.process_time() - cpu]


def incomplete(matrix: sp.csc_array, drop: float) -> Preconditioner:
    """Incomplete LU of SuperLU in symmetric mode: of an SPD matrix about an incomplete Cholesky."""
    options = {"SymmetricMode": True}
    made = spilu(
        matrix, drop_tol=drop, fill_factor=20, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options
    )
    return made.solve  # type: ignore[no-any-return]


def multigrid(matrix: sp.csc_array, kind: str) -> Preconditioner:
    """A V-cycle of pyamg."""
    import pyamg

    made = getattr(pyamg, kind)(sp.csr_matrix(matrix))
    cycle = made.aspreconditioner(cycle="V")
    return lambda r: cycle @ r


def solved(
    matrix: sp.csc_array, rhs: np.ndarray, setup_s: list[float], precondition: Preconditioner, most: int
) -> dict[str, Any]:
    """Iterations and seconds of conjugate gradients."""
    rows = sp.csr_array(matrix)
    found, solve_s = clocked(lambda: conjugate_gradients(rows, rhs, precondition, most=most))
    residual = float(np.linalg.norm(rows @ found.x - rhs) / np.linalg.norm(rhs))
    return {
        "iterations": len(found.residuals),
        "converged": found.converged,
        "residual": residual,
        "setup_s": setup_s,
        "solve_s": solve_s,
    }


def measured(kind: str, unknowns: int, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """One problem with every preconditioner."""
    matrix, order = problem(kind, unknowns)
    rhs = np.random.default_rng(0).standard_normal(matrix.shape[0])
    result: dict[str, Any] = {"unknowns": matrix.shape[0]}

    def factor() -> Randomized:
        made = Randomized(matrix, order, scheduler=args.scheduler)
        made.refactor(matrix)
        return made

    made, setup_s = clocked(factor)
    with made:
        row = solved(matrix, rhs, setup_s, made.apply, args.most)
        replays = [clocked(made.replay)[1] for _ in range(5)]
        row |= {
            "replay_s": np.median(replays, axis=0).tolist(),
            "fill": len(made.entries) / ((matrix.nnz + matrix.shape[0]) / 2),
            "ops": len(made.graph.ops),
            "lanes": len(made.plan.lanes),
        }
    result["randomized"] = row
    say(f"randomized: {row['iterations']} iterations")
    others: dict[str, Callable[[], Preconditioner]] = {
        f"spilu {drop:g}": lambda drop=drop: incomplete(matrix, drop)  # type: ignore[misc]
        for drop in args.drop
    }
    if find_spec("pyamg"):
        others |= {
            "smoothed aggregation": lambda: multigrid(matrix, "smoothed_aggregation_solver"),
            "Ruge-Stueben": lambda: multigrid(matrix, "ruge_stuben_solver"),
        }
    for name, make in others.items():
        precondition, setup_s = clocked(make)
        result[name] = solved(matrix, rhs, setup_s, precondition, args.most)
        say(f"{name}: {result[name]['iterations']} iterations")
    return result


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Every problem at every size."""
    rows: dict[str, Any] = {}
    problem_of_none, _ = problem("2d", 100)
    with Randomized(problem_of_none, np.arange(100)) as compiled:  # numba compiles outside the figures
        compiled.refactor(problem_of_none)
        conjugate_gradients(problem_of_none, np.ones(100), compiled.apply)
    for kind in args.problems:
        for unknowns in args.unknowns:
            say(f"{kind}, {unknowns} unknowns")
            rows[f"{kind}-{unknowns}"] = measured(kind, unknowns, args, say)
    return {"machine": machine(), "problems": rows}


def table_of(result: dict[str, Any]) -> Table:
    """The figures as a table."""
    table = Table(title=f"conjugate gradients to 1e-8, measured on {result['machine']}; seconds: wall (CPU)")
    table.add_column("problem")
    table.add_column("preconditioner")
    for head in ("iterations", "setup s", "solve s", "replay s", "residual"):
        table.add_column(head, justify="right")
    for name, row in result["problems"].items():
        for kind, found in row.items():
            if isinstance(found, dict):
                times = [
                    f"{found[t][0]:.3g} ({found[t][1]:.3g})" if t in found else "-"
                    for t in ("setup_s", "solve_s", "replay_s")
                ]
                more = "" if found["converged"] else " at most"
                table.add_row(name, kind, f"{found['iterations']}{more}", *times, f"{found['residual']:.1e}")
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.cholesky_randomized", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--unknowns", nargs="+", type=count, default=[10_000], help="about how many (default: 10000)")
    parser.add_argument("--scheduler", default="auto", help="of the graph: as in tg.plan, or autotune (default: auto)")
    parser.add_argument(
        "--drop", type=positive, nargs="*", default=[1e-2, 1e-3], help="drop tolerances of spilu (default: 1e-2 1e-3)"
    )
    parser.add_argument("--most", type=count, default=500, help="iterations at most (default: 500)")
    return measured_main(parser, argv, measure, table_of, 120)


if __name__ == "__main__":
    sys.exit(main())
