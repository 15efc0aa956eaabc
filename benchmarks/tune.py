"""What autotune finds on this machine: a graph that packing speeds up, and a decode step that it cannot."""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import taskgraph as tg
from benchmarks import count, interleaved, machine, one_line, positive, print_json, spread
from taskgraph.jit import njit
from taskgraph.models import llama
from taskgraph.models.config import load_config
from taskgraph.tune.fill import fill

if TYPE_CHECKING:
    import numpy as np
    import torch

EPILOG = """\
"chains" are independent chains of small ops that keep one core busy each (a recurrence, which no core can share), so
the sequential graph leaves the other cores idle and packing should win. "decode" is one step of a Llama model at
batch 1 with random weights, a chain of ops that use every core, where it should not. Both are tuned from nothing, in
a database of their own. Then, outside autotune, the winner and every other candidate run again in interleaved rounds:
"winner_is_best" says whether none of them is faster than the winner by more than both spreads.

example:
  python -m benchmarks.tune --budget 15 --json
"""
MODEL, CONTEXT = "smollm2-135m", 512
ELEMENTS, TURNS = 512, 256


@njit
def _recur(x: "np.ndarray", out: "np.ndarray", turns: int) -> None:
    for i in range(len(x)):
        y = x[i]
        for _ in range(turns):
            y = y * 0.999 + 0.001
        out[i] = y


def recur(x: "torch.Tensor", out: "torch.Tensor") -> None:
    """A recurrence on every element, on one core."""
    _recur(x.numpy(), out.numpy(), TURNS)


def chains(width: int, depth: int) -> tg.Graph:
    """`width` independent chains of `depth` single-core ops."""
    builder = tg.GraphBuilder(f"chains-{width}x{depth}")
    work = tg.Work(flops=2.0 * ELEMENTS * TURNS, hbm_bytes=8.0 * ELEMENTS)
    for i in range(width):
        x = builder.input(f"x{i}", (ELEMENTS,), "f32")
        for level in range(depth):
            out = [tg.spec(f"y{i}_{level}", (ELEMENTS,), "f32")]
            x = builder.call(recur, [x], out, work=work, name=f"n{i}_{level}")
        builder.output(x)
    return builder.build()


def decode() -> tg.Graph:
    """One decode step at batch 1."""
    return llama.step_graph(load_config(MODEL), batch=1, tokens=1, cache=CONTEXT)


def check(graph: tg.Graph, tuned: tg.Tuned, rounds: int) -> dict[str, list[float]]:
    """Seconds of the winner and of every distinct candidate, measured apart from autotune."""
    from taskgraph.tune.autotune import candidates

    plans = {plan.made_by: plan for plan in candidates(graph, tuned.plan.device, 1.0, 0)}
    plans["winner"] = tuned.plan
    values = fill(graph.flat(), {}, 0)
    executables = {name: tg.compile(graph, plan) for name, plan in plans.items()}
    try:
        for executable in executables.values():
            executable.bind(values)
        return interleaved({name: e.launch for name, e in executables.items()}, rounds=rounds, warmup=3)
    finally:
        for executable in executables.values():
            executable.close()


def row_of(graph: tg.Graph, budget_s: float, rounds: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune one graph from nothing, ask again, and measure winner and candidates anew."""
    database = folder / "profiles.sqlite3"

    def progress(what: str, share: float) -> None:
        say(f"{graph.name}: {what} ({share:.0%} of the budget)")

    tuned = tg.autotune(graph, "cpu", budget_s, database=database, fresh=True, progress=progress)
    say(tg.explain_tuned(tuned))
    again = tg.autotune(graph, "cpu", budget_s, database=database)
    seconds = check(graph, tuned, rounds)
    median = {name: statistics.median(row) for name, row in seconds.items()}
    noise = {name: spread(row) for name, row in seconds.items()}
    best = min(median, key=lambda name: median[name])
    beaten = median["winner"] > median[best] * (1 + noise["winner"] + noise[best])
    return {
        "choice": tuned.verdict.choice,
        "sequential_s": tuned.verdict.sequential_s,
        "packed_s": tuned.verdict.packed_s,
        "gain": tuned.verdict.gain,
        "noise": tuned.verdict.error_band,
        "predicted_s": tuned.plan.makespan_s,
        "kind": tuned.kind,
        "op_times": tuned.op_times,
        "seconds": tuned.seconds,
        "remembered": again.remembered,
        "checked_s": median,
        "winner_is_best": not beaten,
        "reason": tuned.reason,
    }


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.tune", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=positive, default=15.0, help="seconds of autotune for each graph (default 15)")
    parser.add_argument("--rounds", type=count, default=21, help="rounds of the check afterwards (default 21)")
    parser.add_argument("--graphs", nargs="+", choices=("chains", "decode"), default=["chains", "decode"])
    parser.add_argument("--width", type=count, default=2, help="independent chains (default 2)")
    parser.add_argument("--depth", type=count, default=8, help="ops of a chain (default 8)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    if args.budget <= 0 or min(args.rounds, args.width, args.depth) < 1:
        parser.error("--budget is above 0; --rounds, --width and --depth are at least 1.")
    status = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        status.print(text, markup=False)

    make = {"chains": lambda: chains(args.width, args.depth), "decode": decode}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.graphs:
            result[name] = row_of(make[name](), args.budget, args.rounds, Path(folder), say)
    for name, row in result.items():
        print(f"{name}: {row['reason']} Winner best when checked apart: {row['winner_is_best']}.")
    if args.json:
        print_json({**result, "machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
