"""Exact sparse Cholesky as a task graph, against its one-lane run, SuperLU and CHOLMOD: measured on this machine."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
import scipy.sparse as sp
from rich.table import Table
from scipy.sparse.linalg import splu

import taskgraph as tg
from benchmarks import count, interleaved, machine, measured_main, one_line, positive
from examples.cholesky import Factor, fill_reducing, grid_dissection
from examples.cholesky.problems import poisson
from taskgraph.cost.profiles import Costs, Profile, measured_costs, shape_key
from taskgraph.graph.functions import find_function
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.planner import replay_times
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve.found import in_sequence
from taskgraph.tune.measure import on_partition

EPILOG = """\
Problems: 2d, 3d (Poisson), skewed (2d, one axis weighted 1000), band (a grid 8 points wide in its natural order: its
tree is a chain). The order is METIS's where pymetis is installed, else nested dissection by geometry. SuperLU has the
order that it makes itself, CHOLMOD (of cvxopt, where that is installed) has ours. Rounds of the planned graph, its
sequential plan and the others are interleaved; figures are medians. "tree" is the work of the tree over that of its
longest path. "simulated" is what the plan gains, and "at most" what any plan could on these cores, by the planner's
clock with the CPU seconds of the ops on one core; plans are made with these prices, or with --tune by autotune. With
--quiet only rounds count before and after which two plain threads gained 1.8x over one, so that no other program had a
core. It waits for them so many seconds a problem, and says how many there were.

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
        turns = list(runs.items())
        turns = turns[::-1] if len(quiet["graph"]) % 2 else turns  # none always comes after the same neighbour
        row = interleaved(dict(turns), rounds=1, warmup=0, lead=1)  # each finds its own caches
        after = plain_threads_gain(1)
        kept = quiet if min(before, after) >= QUIET else loud
        for name, seconds in row.items():
            kept[name] += seconds
        before = after
        say(f"two threads gained {after:.2f}x; {len(quiet['graph'])} quiet rounds")
    found = len(quiet["graph"])
    return (quiet if found else loud), found


def cpu_seconds(factor: Factor, rounds: int = 3) -> dict[str, float]:
    """CPU seconds of each op on one core, by name: the least of some replays. Other programs hardly change them."""
    graph, one_lane = factor.graph, tg.plan(factor.graph, "cpu", scheduler="sequential")
    name_of = {factor.tensors[op.inputs[1]].ctypes.data: op.name for op in graph.ops}
    least: dict[str, float] = {}

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def run(values: Any, guide: Any, *tensors: Any) -> None:
            begin = time.thread_time()
            function(values, guide, *tensors)
            took = time.thread_time() - begin
            name = name_of[guide.data_ptr()]
            least[name] = min(least.get(name, took), took)

        return run

    functions = {key: timed(find_function(key)) for key in {str(op.attr("function")) for op in graph.ops}}
    with tg.compile(graph, on_partition(one_lane, graph, 1), backend="cpu", functions=functions) as timing:
        timing.bind(factor.tensors)
        for _ in range(rounds):
            timing.launch()
    return least


def cpu_costs(factor: Factor, took: Mapping[str, float]) -> Costs:
    """Prices by `cpu_seconds`. Ops that may use all cores are taken to be as many times faster there, which is the best
    that BLAS could do, and so the best case of one lane: what lanes gain over it is no less."""
    graph, cores = factor.graph, factor.plan.device.sm_count
    found: dict[Any, list[float]] = {}
    wide: dict[Any, float] = {}
    for op in graph.ops:
        key = shape_key(op, graph.tensor)
        found.setdefault(key, []).append(took[op.name])
        wide[key] = 1.0 if op.demand.sm == (1, 1) else float(cores)
    times = {key: (statistics.median(row), wide[key]) for key, row in found.items()}
    points = {key: tuple((c, s if c == 1 else s / w, 0.0) for c in sorted({1, cores})) for key, (s, w) in times.items()}
    return measured_costs(Profile(points))


def one_core_seconds(factor: Factor) -> float:
    """CPU seconds of a replay on one core."""
    one_lane = tg.plan(factor.graph, "cpu", scheduler="sequential")
    with tg.compile(factor.graph, on_partition(one_lane, factor.graph, 1), backend="cpu") as exe:
        exe.bind(factor.tensors)
        exe.launch()
        return cpu_of(exe.launch)


OTHERS = ("superlu", "cholmod")


def cpu_of(run: Callable[[], Any]) -> float:
    """CPU seconds of this process in a run, the least of three."""
    took = []
    for _ in range(3):
        begin = time.process_time()
        run()
        took.append(time.process_time() - begin)
    return min(took)


def simulated(graph: tg.Graph, plan: tg.Plan, costs: Costs) -> dict[str, float]:
    """By these prices: the gain of the plan over one lane, and the most that any plan could gain."""
    problem = make_problem(graph, plan.device, None, costs)
    one_lane = in_sequence(problem).makespan_s
    return {
        "gain": one_lane / replay_times(graph, plan, costs).makespan_s,
        "bound": one_lane / lower_bounds(problem).best_s,
    }


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
        alone.refactor(matrix)
        took = cpu_seconds(alone)
        costs = cpu_costs(alone, took)
        if not args.tune:
            factor.replan(tg.plan(factor.graph, "cpu", costs=costs))
        factor.refactor(matrix)
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
            "by_cpu_seconds": simulated(factor.graph, factor.plan, costs),
            "cpu_s": {"ours": one_core_seconds(alone), **{name: cpu_of(runs[name]) for name in runs if name in OTHERS}},
            "plan": factor.plan.made_by,
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
    heads = ["ops / fronts", "GFLOP", "lanes", "graph s", "one lane s", "SuperLU s", "CHOLMOD s"]
    table.add_column("problem")
    for head in (*heads, "gain", "threads", "simulated", "at most", "tree"):
        table.add_column(head, justify="right")
    table.add_column("residual", justify="right")
    for name, row in result["problems"].items():
        s = row["seconds"]
        shown = (f"{s[key]:.3g}" if key in s else "-" for key in ("graph", "one_lane", "superlu", "cholmod"))
        cpu = row["by_cpu_seconds"]
        gains = (row["parallel_gain"], row["plain_threads_gain"], cpu["gain"], cpu["bound"], row["tree_bound"])
        table.add_row(
            name, f"{row['ops']} / {row['fronts']}", f"{row['gflop']:.3g}", str(row["lanes"]), *shown,
            *(f"{gain:.2f}" for gain in gains), f"{row['residual']:.1e}",
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
