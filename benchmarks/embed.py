"""Torch modules through taskgraph: how many ops are recognised, whether results are eager torch's, and the time of a
call against eager torch, torch.compile's default, and torch.compile with a backend that does nothing."""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn

import taskgraph as tg
from benchmarks import count, interleaved, machine, measured_main, one_line, seconds_of
from benchmarks.embed_models import BY_COMPILE, MODELS
from taskgraph.embed import FallbackWarning
from taskgraph.embed.explain import recognised_share, shares
from taskgraph.embed.variants import MOST_TRIAL_CALLS

DEVICE = "h100_sxm"
EPILOG = """\
Modules have small random weights, so that calls are mostly overhead, as decoding one sequence is. Ours is
tg.embed.wrap(module), "compiled" torch.compile(module, backend="taskgraph"), their trial calls done. "nothing" is
torch.compile(module, backend="eager"), which runs torch's own operators: what it takes beyond eager torch is Dynamo's
own time, which no backend can save and which wrap does without.
Rounds are interleaved; figures are quotients of medians, measured on this machine. "fastest_us" of the JSON has the
fastest round of each, which on a machine with other work is nearer to what the calls take alone. The predicted time is
that of the plan on h100_sxm (simulated).

example:
  python -m benchmarks.embed --models llama bert vit --no-inductor --json
"""


def difference(got: Any, want: Any) -> float:
    """The largest difference of an element, by the largest element that is wanted."""
    most = float(want.abs().max())
    return float((got - want).abs().max()) / (most or 1.0)


def measure_one(name: str, rounds: int, inductor: bool) -> dict[str, Any]:
    """The figures of one module."""
    torch._dynamo.reset()
    module, inputs = MODELS[name]()
    row: dict[str, Any] = {"ops": 0, "recognised_share": 0.0, "import_s": None, f"{DEVICE}_us": None, "calls": None}
    with torch.no_grad():
        want = module(**inputs)
        worst = 0.0
        if name not in BY_COMPILE:
            begin = time.perf_counter()
            imported = tg.from_torch(module, inputs)
            row["import_s"] = time.perf_counter() - begin
            plan = tg.plan(imported.graph, DEVICE)
            row |= {
                "ops": len(imported.graph.ops),
                "calls": sum(len(made.calls) for made in imported.recognised),
                "recognised": sum(s.count for s in shares(imported, DEVICE) if s.recognised),
                "recognised_share": recognised_share(imported, DEVICE),
                f"{DEVICE}_us": 1e6 * plan.makespan_s,
            }
            with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
                exe.bind(imported.tensors)
                worst = difference(imported.call(exe, **inputs), want)
        fast = torch.compile(module, backend=tg.embed.backend, options={"quiet": True})
        wrapped = tg.embed.wrap(module, quiet=True)
        nothing = torch.compile(module, backend="eager")
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: wrapped(**inputs),
            "compiled": lambda: fast(**inputs),
            "eager": lambda: module(**inputs),
            "nothing": lambda: nothing(**inputs),
        }
        if inductor:
            runs["inductor"] = _inductor(module, inputs)
        for key in ("ours", "compiled", "nothing"):  # what they compile, before anything is timed
            worst = max(worst, difference(runs[key](), want))
        more, seconds = _timed(runs, want, rounds)
        worst = max(worst, more)
        took = {key: statistics.median(t) for key, t in seconds.items()}
        for key, run in (("way", wrapped), ("compiled_way", fast)):
            row[key] = "/".join(sorted({p.way for p in tg.embed.report(run).pieces}))
    return row | {
        "max_rel_diff": worst,
        "over_eager": took["eager"] / took["ours"],
        "over_inductor": took["inductor"] / took["ours"] if "inductor" in took else None,
        "compiled_over_eager": took["eager"] / took["compiled"],
        "compiled_over_nothing": took["nothing"] / took["compiled"],
        "compiled_over_inductor": took["inductor"] / took["compiled"] if "inductor" in took else None,
        "nothing_over_eager": took["eager"] / took["nothing"],
        "fastest_us": {key: 1e6 * min(t) for key, t in seconds.items()},
        "eager_us": 1e6 * took["eager"],
        "ours_us": 1e6 * took["ours"],
        "compiled_us": 1e6 * took["compiled"],
        "nothing_us": 1e6 * took["nothing"],
        "inductor_us": 1e6 * took["inductor"] if "inductor" in took else None,
    }


def _timed(runs: dict[str, Callable[[], Any]], want: Any, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Trial calls and their largest difference, then the seconds of calls by each way."""
    worst = 0.0
    for key in ("compiled", "ours"):
        for _ in range(3 * MOST_TRIAL_CALLS):
            worst = max(worst, difference(runs[key](), want))
    return worst, interleaved(runs, rounds=rounds, warmup=3, lead=2)


def _inductor(module: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    made = torch.compile(module)
    made(**inputs)
    return lambda: made(**inputs)


def overhead_us(rounds: int) -> dict[str, float]:
    """Median microseconds of a call of a small module, compiled and wrapped, eager, and of a replay of its plan."""
    torch._dynamo.reset()
    module, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(1, 64)
    from taskgraph.embed.dynamo import ALL

    with torch.no_grad():
        before = {*ALL}
        fast = torch.compile(module, backend=tg.embed.backend, options={"verdict": "plan"})
        fast(x)
        fast(x)
        (made,) = {*ALL} - before
        (variant,) = made.variants.values()
        assert variant.captured is not None
        launch = variant.captured.launch
        wrapped = tg.embed.wrap(module, verdict="plan")
        wrapped(x)
        runs = {"wrapped": lambda: wrapped(x), "call": lambda: fast(x), "replay": launch, "eager": lambda: module(x)}
        took = {}
        for key, run in runs.items():  # each on its own: a replay ends the caller's team of threads
            took[key] = 1e6 * statistics.median(seconds_of(run) for _ in range(max(10 * rounds, 500)))
    over = {"over_replay": took["call"] - took["replay"], "wrapped_over_replay": took["wrapped"] - took["replay"]}
    return {**took, **over}


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    models = {}
    torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", FallbackWarning)
        for name in args.models:
            say(name)
            models[name] = measure_one(name, args.rounds, args.inductor)
        return {"models": models, "overhead_us": overhead_us(args.rounds), "machine": machine()}


def table_of(result: dict[str, Any]) -> Table:
    """A row a module."""
    table = Table(title="torch modules (measured, but for the simulated column)", caption=result["machine"])
    columns = (
        "calls", "ops", "recognised", "of the time", f"{DEVICE}, simulated", "import", "eager", "nothing", "compiled",
        "ours", "over eager", "over inductor", "way", "compiled over eager", "over nothing", "difference",
    )  # fmt: skip
    for name in ("module", *columns):
        table.add_column(name, justify="left" if name == "module" else "right")
    for name, row in result["models"].items():
        simulated, inductor = row[f"{DEVICE}_us"], row["over_inductor"]
        table.add_row(
            name,
            str(row["calls"] or ""),
            str(row["ops"]),
            str(row.get("recognised", "")),
            f"{row['recognised_share']:.0%}",
            "" if simulated is None else f"{simulated:.0f} us",
            "" if row["import_s"] is None else f"{row['import_s']:.1f} s",
            f"{row['eager_us']:.0f} us",
            f"{row['nothing_us']:.0f} us",
            f"{row['compiled_us']:.0f} us",
            f"{row['ours_us']:.0f} us",
            f"{row['over_eager']:.2f}",
            "" if inductor is None else f"{inductor:.2f}",
            row["way"],
            f"{row['compiled_over_eager']:.2f}",
            f"{row['compiled_over_nothing']:.2f}",
            f"{row['max_rel_diff']:.0e}",
        )
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.embed", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS], help="default: all")
    parser.add_argument("--rounds", type=count, default=21, help="interleaved rounds (default 21)")
    parser.add_argument("--threads", type=count, default=1, help="threads of eager torch and Inductor (default 1)")
    parser.add_argument(
        "--no-inductor", dest="inductor", action="store_false", help="leave torch.compile's default out"
    )
    return measured_main(parser, argv, measure, table_of, 180)


if __name__ == "__main__":
    sys.exit(main())
