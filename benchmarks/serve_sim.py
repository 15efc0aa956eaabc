"""Simulated serving of LLaMA-2-70B on 8 A100s: throughput in tokens/s/GPU, as a fraction of the optimal bound."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks import print_json
from benchmarks.nanoflow import OPTIMAL_FLOPS_PER_S, free_costs
from taskgraph.cost.model import op_table
from taskgraph.models.config import load_config
from taskgraph.models.scheduler import Limits
from taskgraph.models.simulate import pages_of, simulated_engine
from taskgraph.models.stepgrid import VARIANTS, StepGrid
from taskgraph.models.traces import DATASETS, Lengths, Report, poisson, replay

EPILOG = """\
Whole traces go through the engine and its scheduler: continuous batching to 2048 tokens a step, decode first, paged
cache in what 90 % of the GPUs' memory leaves beside 16-bit weights. All requests are there at the start; the rate is
that of the requests that end in the middle half. A request counts its prompt and its generated tokens but the last,
which no step takes in.

A step takes the makespan of its plan on one rank of 8 (simulated, a100_sxm): tg.plan(scheduler="search") at the corners
of a grid over (tokens, share that decodes, keys that decode sees), linear between them.

optimal         1857 tokens/s/GPU (published, NanoFlow): flop/s over 2 x parameters; it means 260 TFLOP/s and 70e9
sequential      every step as one captured graph, op after op
nanobatch_only  every step in the slices of our plan, op after op
taskgraph       every step as planned: slices, SMs, order and lanes

Lengths of datasets are log-normal with the published mean and standard deviation, cut to the context of 4096. The
engine expects their mean of every request; those that it must pre-empt go to the host's memory over PCIe and back.

--costs nanoflow takes NanoFlow's table 3 (published) for ops beside others, and elementwise ops cost nothing; the
default is the cost model, with every op and with bandwidth shared by who runs together.
"""
MODEL, DEVICE, RANKS = "llama-2-70b", "a100_sxm", 8
OPTIMAL = OPTIMAL_FLOPS_PER_S / (2 * 70e9)
"""Tokens a second and GPU: NanoFlow, section 3."""
COSTS = {"model": op_table, "nanoflow": free_costs}


def _constant(given: int, wanted: int) -> Lengths:
    return Lengths(given, 0, wanted, 0)


SETTINGS: Mapping[str, Lengths] = {
    "512-512": _constant(512, 512),
    "1024-512": _constant(1024, 512),
    "512-1024": _constant(512, 1024),
    **DATASETS,
    "prefill_only_512": _constant(512, 1),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What all settings share."""

    requests: int = 12_000
    tokens: int = 2048
    context: int = 4096
    budget_s: float = 0.5
    seed: int = 0
    costs: str = "model"


def serve(lengths: Lengths, grid: StepGrid, variant: str, options: Options) -> Report:
    """One variant's replay of requests of these lengths."""
    config = load_config(MODEL)
    limits = Limits(options.tokens - 1, options.tokens, chunks=64, context=options.context)
    pages = pages_of(config, DEVICE, tensor_parallel=RANKS)
    trace = poisson(lengths.draw(options.requests, options.context, options.seed))
    with simulated_engine(
        config, grid.of(variant), pages=pages, host_pages=pages, limits=limits, expected_output=lengths.output_mean
    ) as engine:
        report = replay(engine, trace, "simulated", vocabulary=config.vocab_size)
        if engine.cache.device.held or engine.cache.host.held:
            raise RuntimeError(f"{engine.cache.device.held} pages are held after the last request; none should be.")
    return report


def run(
    names: Sequence[str], options: Options, say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Report]]:
    """Reports by setting and variant."""
    grids: dict[int, StepGrid] = {}
    found: dict[str, dict[str, Report]] = {}
    for name in names:
        lengths, begin = SETTINGS[name], time.perf_counter()
        grid = StepGrid(
            load_config(MODEL), DEVICE, tensor_parallel=RANKS, prompt_tokens=lengths.input_mean,
            budget_s=options.budget_s, seed=options.seed, costs=COSTS[options.costs],
        )  # fmt: skip
        grid = grids.setdefault(grid.chunk, grid)
        found[name] = {variant: serve(lengths, grid, variant, options) for variant in VARIANTS}
        best = found[name]["taskgraph"].steady_tokens_per_s / RANKS
        seconds = time.perf_counter() - begin
        say(
            f"{name}: {best:.0f} tokens/s/GPU, {best / OPTIMAL:.3f} of the bound (simulated); "
            f"{seconds:.0f} s, {len(grid.planned)} steps planned"
        )
    return found


def figures(found: Mapping[str, Mapping[str, Report]]) -> dict[str, dict[str, float]]:
    """Tokens a second and GPU, by setting and variant, beside the bound."""
    return {
        name: {"optimal": OPTIMAL, **{variant: r.steady_tokens_per_s / RANKS for variant, r in row.items()}}
        for name, row in found.items()
    }


# ------------------------------------------------------------------------------------------- output


def _table(found: Mapping[str, Mapping[str, Report]]) -> Table:
    shown = Table(title=f"{MODEL}, {RANKS} x {DEVICE}: tokens/s/GPU (simulated; optimal is published)")
    columns = ("", "optimal", *VARIANTS, "of optimal", "over sequential", "whole trace", "TPOT p50, p99 ms")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, row in figures(found).items():
        mine, best = row["taskgraph"], found[name]["taskgraph"]
        tpot = f"{best.tpot.p50_s * 1e3:.0f}, {best.tpot.p99_s * 1e3:.0f}" if best.tpot else ""
        shown.add_row(
            name, *(f"{value:.0f}" for value in row.values()), f"{mine / OPTIMAL:.3f}",
            f"{mine / row['sequential']:.2f}x", f"{best.tokens_per_s / RANKS:.0f}", tpot,
        )  # fmt: skip
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_sim",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="only this one; may be repeated")
    parser.add_argument("--requests", type=int, default=default.requests, help=f"in a trace ({default.requests})")
    parser.add_argument("--tokens", type=int, default=default.tokens, help=f"a step at most ({default.tokens})")
    parser.add_argument("--seconds", type=float, default=default.budget_s, help=f"search a plan ({default.budget_s})")
    parser.add_argument("--costs", choices=COSTS, default=default.costs, help="what prices the ops (model)")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    given = parser.parse_args(argv)
    console = Console(highlight=False, width=max(Console().width, 120))
    console.print(
        f"optimal {OPTIMAL:.0f} tokens/s/GPU (published): {OPTIMAL_FLOPS_PER_S / 1e12:.0f} TFLOP/s / (2 x 70e9)"
    )
    options = Options(given.requests, given.tokens, default.context, given.seconds, given.seed, given.costs)
    found = run(given.setting or list(SETTINGS), options, lambda text: console.print(f"[dim]{text}[/dim]"))
    console.print(_table(found))
    if given.json:
        print_json(figures(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
