"""Simulated serving of LLaMA-2-70B on 8 A100s: throughput in tokens/s/GPU, as a fraction of the optimal bound."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import count, one_line, positive, print_json, whole
from benchmarks.nanoflow import OPTIMAL_FLOPS_PER_S, free_costs
from taskgraph.models.config import load_config
from taskgraph.schedule.planner import candidate
from taskgraph.schedule.problem import Budget
from taskgraph.serving.requests import Request
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.simulate.compare import Compared, Served, compared
from taskgraph.serving.simulate.runner import SimRunner, pages_of, simulated_engine
from taskgraph.serving.simulate.stepgrid import VARIANTS, GridSeconds, StepGrid, StepShape
from taskgraph.serving.simulate.traces import DATASETS, Lengths, poisson

EPILOG = """\
Whole traces go through the engine and its scheduler: continuous batching to 2048 tokens a step, decode first, paged
cache in what 90 % of the GPUs' memory leaves beside 16-bit weights. All requests are there at the start; the rate is
the tokens that steps take in, prompts' and generated, by the time that the steps take. Steps count from the end of the
first quarter of the requests to that of the third, or to the last prompt if that is sooner: requests always wait.

As no request comes later, the batches do not depend on how long steps take: a trace is replayed once, and its steps
are timed for every variant. A step takes the makespan of its plan on one rank of 8 (simulated, a100_sxm):
tg.plan(scheduler="search") at the corners of a grid over (tokens, share that decodes, keys that decode sees), linear
between them. The search's seconds go to the corners by how many steps they stand for.

optimal         1857 tokens/s/GPU (published, NanoFlow): flop/s over 2 x parameters; it means 260 TFLOP/s and 70e9
sequential      every step as one captured graph, op after op
nanobatch_only  every step in the slices of our plan, op after op
taskgraph       every step as planned: slices, SMs, order and lanes

Lengths of datasets are log-normal with the published mean and standard deviation, cut to the context of 4096. The
engine expects their mean of every request; those that it must pre-empt go to the host's memory over PCIe and back.

--thorough replays longer traces and searches longer; --seconds and --requests set either.

--tpot-ms MS serves the traces with that wanted time a token, mixed and as `serving.ways` chooses: tokens/s/GPU, ms a
token and steps of prompts that ran apart. Mixed steps are then as planned for a shorter search, or with --in-order op
after op, as steps apart are always.

--costs nanoflow takes NanoFlow's table 3 (published) for ops beside others, and elementwise ops cost nothing; the
default is the cost model, with every op and with bandwidth shared by who runs together.
"""
MODEL, DEVICE, RANKS = "llama-2-70b", "a100_sxm", 8
SHORT_S = 0.05
"""Seconds of search for the plan of a step with a wanted time a token, where far more steps are looked at."""
OPTIMAL = OPTIMAL_FLOPS_PER_S / (2 * 70e9)
"""Tokens a second and GPU: NanoFlow, section 3."""
COSTS = ("model", "nanoflow")


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
    """What all settings share: requests in a trace, tokens of a step at most, seconds of search for all plans."""

    requests: int = 8_000
    tokens: int = 2048
    context: int = 4096
    budget_s: float = 8.0
    seed: int = 0
    costs: str = "model"


THOROUGH = Options(requests=16_000, budget_s=120.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one variant: tokens a second and GPU, and percentiles of the time between a request's tokens."""

    tokens_per_s: float
    p50_s: float
    p99_s: float


def steady_steps(lengths: Lengths, options: Options) -> list[tuple[StepShape, float]]:
    """The steps of a replay while requests wait, each with the seconds of its page copies."""
    config = load_config(MODEL)
    limits = Limits(options.tokens - 1, options.tokens, chunks=64, context=options.context)
    pages = pages_of(config, DEVICE, tensor_parallel=RANKS)
    drawn = lengths.draw(options.requests, options.context, options.seed)
    requests = [Request(np.ones(given, np.int32), wanted) for given, wanted in drawn]
    with simulated_engine(
        config, lambda shape: 1.0, pages=pages, host_pages=pages, limits=limits, expected_output=lengths.output_mean
    ) as engine:
        done = engine.run(requests)  # a step takes a second of this clock
        if engine.cache.device.held or engine.cache.host.held:
            raise RuntimeError(f"{engine.cache.device.held} pages are held after the last request; none should be.")
        assert isinstance(engine.runner, SimRunner)
        steps = engine.runner.launched
    first, last = np.percentile([c.end_s for c in done], (25, 75), method="nearest").astype(int)
    prompts = [i for i, (shape, _) in enumerate(steps) if shape.prefill]
    return steps[first : min(int(last), prompts[-1])] or steps


def figures_of(steps: Sequence[tuple[StepShape, float]], seconds: GridSeconds) -> Figures:
    """What the steps give in the time that one variant takes."""
    known = {shape: seconds(shape) for shape in {shape for shape, _ in steps}}
    took = np.array([max(known[shape], copies) for shape, copies in steps])
    tokens, decode = (np.array(n) for n in zip(*((s.decode + s.prefill, s.decode) for s, _ in steps), strict=True))
    order = np.argsort(took)
    share = np.cumsum(decode[order]) / max(decode.sum(), 1)
    p50, p99 = (float(np.interp(q, share, took[order])) for q in (0.5, 0.99))
    return Figures(float(tokens.sum() / took.sum()) / RANKS, p50, p99)


def found_by_table(
    graph: tg.Graph, device: tg.Device, scheduler: str, *, budget_s: float, seed: int, nano_batches: bool
) -> tg.Plan:
    """What a scheduler finds with NanoFlow's table, taken as it is: a published table has no held-out error that a gain
    could be compared with."""
    return candidate(graph, device, scheduler, Budget(budget_s, seed, nano_batches), free_costs)


def run(
    names: Sequence[str], options: Options, say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Figures]]:
    """Figures by setting and variant."""
    begin = time.perf_counter()
    steps = {name: steady_steps(SETTINGS[name], options) for name in names}
    say(f"{len(steps)} traces replayed: {time.perf_counter() - begin:.0f} s")
    grids, members = dict[int, StepGrid](), dict[int, list[str]]()
    for name in names:
        grid = StepGrid(
            load_config(MODEL).share(RANKS), DEVICE, prompt_tokens=SETTINGS[name].input_mean, seed=options.seed,
            plan=tg.plan if options.costs == "model" else found_by_table,
        )  # fmt: skip
        grids.setdefault(grid.chunk, grid)
        members.setdefault(grid.chunk, []).append(name)
    found: dict[str, dict[str, Figures]] = {}
    for chunk, grid in grids.items():
        mine = members[chunk]
        grid.prepare([[shape for shape, _ in steps[name]] for name in mine], options.budget_s * len(mine) / len(names))
        say(f"{', '.join(mine)}: {len(grid.planned)} steps planned: {time.perf_counter() - begin:.0f} s")
        found |= {name: {v: figures_of(steps[name], grid.of(v)) for v in VARIANTS} for name in mine}
    return {name: found[name] for name in names}


def both_ways(name: str, options: Options, tpot_s: float, variant: str) -> Compared:
    """A setting served in mixed steps, and apart where that is predicted to be better, at a wanted time a token."""
    config, lengths = load_config(MODEL), SETTINGS[name]
    grid = StepGrid(config.share(RANKS), DEVICE, prompt_tokens=lengths.input_mean, budget_s=SHORT_S, seed=options.seed)
    pages = pages_of(config, DEVICE, tensor_parallel=RANKS)
    limits = Limits(min(1024, options.tokens - 1), options.tokens, chunks=64, context=options.context)
    trace = poisson(lengths.draw(options.requests, options.context, options.seed))
    return compared(Served(config, grid.of(variant), pages, limits), grid, trace, tpot_s)


def _ways(found: Mapping[str, Compared]) -> Table:
    shown = Table(title=f"{MODEL}, {RANKS} x {DEVICE}, at a wanted time a token (simulated)")
    columns = ("", "mixed tokens/s/GPU", "as chosen", "mixed ms a token: mean, p99", "as chosen", "prompts apart")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, made in found.items():
        rates = (f"{each.tokens_per_s / RANKS:.0f}" for each in (made.mixed, made.chosen))
        times = (
            f"{each.tpot.mean_s * 1e3:.1f}, {each.tpot.p99_s * 1e3:.1f}" if each.tpot else ""
            for each in (made.mixed, made.chosen)
        )
        shown.add_row(name, *rates, *times, f"{made.beside:,} steps")
    return shown


def figures(found: Mapping[str, Mapping[str, Figures]]) -> dict[str, dict[str, float]]:
    """Tokens a second and GPU, by setting and variant, beside the bound."""
    return {
        name: {"optimal": OPTIMAL, **{variant: f.tokens_per_s for variant, f in row.items()}}
        for name, row in found.items()
    }


# ------------------------------------------------------------------------------------------- output


def _table(found: Mapping[str, Mapping[str, Figures]]) -> Table:
    shown = Table(title=f"{MODEL}, {RANKS} x {DEVICE}: tokens/s/GPU (simulated; optimal is published)")
    columns = ("", "optimal", *VARIANTS, "of optimal", "over sequential", "ms a token p50, p99")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, row in figures(found).items():
        mine, best = row["taskgraph"], found[name]["taskgraph"]
        shown.add_row(
            name, *(f"{value:.0f}" for value in row.values()), f"{mine / OPTIMAL:.3f}",
            f"{mine / row['sequential']:.2f}x", f"{best.p50_s * 1e3:.0f}, {best.p99_s * 1e3:.0f}",
        )  # fmt: skip
    return shown


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_sim",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="only this one; may be repeated")
    parser.add_argument("--thorough", action="store_true", help="minutes instead of one")
    parser.add_argument(
        "--requests", type=count, help=f"in a trace ({default.requests}; thorough: {THOROUGH.requests})"
    )
    parser.add_argument("--tokens", type=count, default=default.tokens, help=f"a step at most ({default.tokens})")
    parser.add_argument(
        "--seconds",
        type=positive,
        help=f"of search for all plans ({default.budget_s:g}; thorough: {THOROUGH.budget_s:g})",
    )
    parser.add_argument("--costs", choices=COSTS, default=default.costs, help="what prices the ops (model)")
    parser.add_argument("--tpot-ms", type=positive, help="a wanted time a token: mixed steps beside steps apart")
    parser.add_argument("--in-order", action="store_true", help="with it: mixed steps op after op")
    parser.add_argument("--seed", type=whole, default=default.seed)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    given = parser.parse_args(argv)
    console = Console(highlight=False, width=max(Console().width, 120))
    console.print(
        f"optimal {OPTIMAL:.0f} tokens/s/GPU (published): {OPTIMAL_FLOPS_PER_S / 1e12:.0f} TFLOP/s / (2 x 70e9)"
    )
    base = THOROUGH if given.thorough else default
    options = replace(
        base, requests=given.requests or base.requests, budget_s=given.seconds or base.budget_s, tokens=given.tokens,
        seed=given.seed, costs=given.costs,
    )  # fmt: skip
    if given.tpot_ms:
        variant, names = "sequential" if given.in_order else "taskgraph", given.setting or list(DATASETS)
        ways = {name: both_ways(name, options, given.tpot_ms / 1e3, variant) for name in names}
        console.print(_ways(ways))
        if given.json:
            print_json({name: asdict(made) for name, made in ways.items()})
        return 0
    found = run(given.setting or list(SETTINGS), options, lambda text: console.print(f"[dim]{text}[/dim]"))
    console.print(_table(found))
    if given.json:
        print_json(figures(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
