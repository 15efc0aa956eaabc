"""`taskgraph bench-serve`: a trace of requests, replayed on this machine or on a simulated one."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import taskgraph as tg
from taskgraph.cli.console import paragraphs, screen, status
from taskgraph.cli.serve import known, limits_of, wanted_tpot
from taskgraph.cli.steps import ALGORITHM, NETWORK, ROUTING, TPOT_MS, Links
from taskgraph.errors import PlanError, RequestError

if TYPE_CHECKING:
    from taskgraph.serving.options import Hardware
    from taskgraph.serving.scheduler import Limits
    from taskgraph.serving.simulate.compare import Compared
    from taskgraph.serving.simulate.traces import Arrival, Percentiles, Replay
    from taskgraph.serving.ways import Choice


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("bench-serve", help=paragraphs(bench_serve))(bench_serve)


def bench_serve(
    model: Annotated[str, typer.Argument(help="a checkpoint as for `serve`; with --device a size as for `plan`")],
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV: arrival_s,input_tokens,output_tokens, then lines like 0.5,120,64; or JSON lines"),
    ] = None,
    dataset: Annotated[str, typer.Option(help="or lengths drawn like those of splitwise, lmsys or sharegpt")] = "",
    requests: Annotated[int, typer.Option(min=1, help="how many to draw")] = 1000,
    rate: Annotated[float, typer.Option(min=0, help="requests a second that are drawn; 0: all at once")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu runs the model (measured); others, see `devices`, simulate")] = "cpu",
    ranks: Annotated[
        int, typer.Option("--ranks", "--tensor-parallel", min=1, help="devices, or on the cpu processes")
    ] = 1,
    network: Annotated[str, NETWORK] = "",
    routing: Annotated[str, ROUTING] = "",
    algorithm: Annotated[str, ALGORITHM] = "",
    context: Annotated[int, typer.Option(min=1, help="most tokens of a request")] = 4096,
    sequences: Annotated[int, typer.Option(min=0, help="most sequences in a step; 0 chooses: cpu 32, else 1024")] = 0,
    step_tokens: Annotated[int, typer.Option(min=0, help="most tokens in a step; 0 chooses: cpu 256, else 2048")] = 0,
    variant: Annotated[str, typer.Option(help="simulated: taskgraph, sequential or nanobatch_only")] = "taskgraph",
    tpot_ms: Annotated[float, TPOT_MS] = 0.0,
    dtype: Annotated[str, typer.Option(help="measured: auto (the faster one here), bf16 or f32")] = "auto",
    plan_seconds: Annotated[float, typer.Option(help="simulated: search for the plan of a step")] = 0.5,
    seed: Annotated[int, typer.Option(help="of prompts, drawn lengths and arrivals")] = 0,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="use this plan for the step whose it is; may be repeated")
    ] = None,
    remembered: Annotated[
        bool, typer.Option("--remembered/--no-remembered", help="use the winners that `taskgraph tune` found here")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Replay a trace of requests offline and report throughput, TTFT, TPOT and latency.

    Give --trace or --dataset. TTFT is the time to a request's first token, TPOT the time of each one after it.

    \b
    taskgraph bench-serve smollm2 --trace trace.csv
    taskgraph bench-serve llama-2-70b --device a100_sxm --ranks 8 --dataset sharegpt --rate 20

    Prompts are random tokens, and every request gives all its output tokens. On the cpu the engine runs the model and
    times are measured; for another device steps take the time of their plans, and all times are simulated.

    \b
    taskgraph bench-serve llama-3-8b --device h200_sxm --dataset splitwise --tpot-ms 25

    With --tpot-ms a simulated trace is served twice: in mixed steps whose prefill leaves every token that time, and
    with decode steps and steps of prefill apart, in two partitions, wherever that is predicted to be better. The report
    shows both, and what was chosen for the loads that came most.
    """
    from taskgraph.serving.options import Hardware

    arrivals, target = _arrivals(trace, dataset, requests, rate, context, seed), Hardware(device, ranks)
    links, tpot_s = Links(network, routing, algorithm), wanted_tpot(tpot_ms, device)
    report: Replay | Compared
    if device == "cpu":
        if links != Links():
            raise PlanError("a network is simulated, and the cpu runs the model; give another --device.")
        limits = limits_of(sequences or 32, step_tokens or 256, context)
        report = _measured(model, arrivals, limits, target, dtype, known(plans, remembered, target), seed)
    else:
        if plans:
            raise PlanError("--plan is for steps that run; a simulated replay plans its own. Leave it out.")
        limits = limits_of(sequences or 1024, step_tokens or 2048, context)
        report = _simulated(model, arrivals, limits, target, links, variant, (plan_seconds, seed, tpot_s))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        here = "this machine" if ranks == 1 else f"{ranks} ranks of this machine"
        over = f" on {network}{f' by {routing}' if routing else ''}" if network else ""
        where = here if device == "cpu" else f"{ranks} x {device}{over}, {variant}"
        _show(report, f"{model} on {where}")


def _arrivals(trace: Path | None, dataset: str, requests: int, rate: float, context: int, seed: int) -> "list[Arrival]":
    from taskgraph.serving.simulate.traces import DATASETS, poisson, read_trace

    if (trace is None) == (not dataset):
        raise RequestError("give --trace FILE or --dataset NAME, one of them.")
    if trace is not None:
        return read_trace(trace)
    if dataset not in DATASETS:
        raise RequestError(f"no dataset {dataset!r}; there are {', '.join(DATASETS)}.")
    return poisson(DATASETS[dataset].draw(requests, context, seed), rate or math.inf, seed)


def _measured(
    model: str, arrivals: "list[Arrival]", limits: "Limits", target: "Hardware", dtype: str, planner: "tg.KnownPlans",
    seed: int,
) -> "Replay":  # fmt: skip
    from taskgraph.serving.local import open_local
    from taskgraph.serving.simulate.traces import replay

    with status.status("load weights, plan and capture steps"):
        local = open_local(model, limits, target, dtype=dtype, planner=planner)
    status.print(f"dtype {local.picked.dtype} ({local.picked.why})", soft_wrap=True)
    with local.engine as engine, status.status("replay"):
        return replay(engine, arrivals, "measured", vocabulary=local.vocabulary, seed=seed)


def _simulated(
    model: str, arrivals: "list[Arrival]", limits: "Limits", target: "Hardware", links: Links, variant: str,
    search: tuple[float, int, float | None],
) -> "Replay | Compared":  # fmt: skip
    from taskgraph.models.config import load_config
    from taskgraph.serving.simulate.compare import Served, compared
    from taskgraph.serving.simulate.runner import pages_of
    from taskgraph.serving.simulate.stepgrid import StepGrid

    config = load_config(model)
    limits = dataclasses.replace(limits, chunks=64, context=min(limits.context, config.max_context))
    mean = sum(a.input_tokens for a in arrivals) / len(arrivals)
    share = config.share(target.ranks)
    device, (plan_seconds, seed, tpot_s) = links.of(tg.devices.get(target.device), target.ranks), search
    grid = StepGrid(share, device, prompt_tokens=mean, budget_s=plan_seconds, seed=seed)
    pages = pages_of(config, device, tensor_parallel=target.ranks)
    served = Served(config, grid.of(variant), pages, limits)
    with status.status("plan and replay"):
        if tpot_s is None:
            return served.replay(arrivals, seed=seed)[0]
        return compared(served, grid, arrivals, tpot_s, seed)


def _show(report: "Replay | Compared", where: str) -> None:
    from taskgraph.serving.simulate.compare import Compared

    if not isinstance(report, Compared):
        screen.print(_table(report, f"{where} ({report.kind})"))
        return
    wanted = f"{where}, at most {1e3 * report.tpot_s:g} ms a token (simulated)"
    screen.print(_table(report.mixed, f"{wanted}: mixed steps"))
    screen.print(_table(report.chosen, f"{wanted}: as chosen, {report.beside:,} steps of prefill apart"))
    screen.print(_choices(report.choices))


def _choices(choices: "Sequence[Choice]") -> Table:
    table = Table(title="chosen for the loads that came most (predicted)", title_justify="left")
    for column in ("times", "decoding", "keys each", "prompt tokens waiting", "way", "ms a token", "prefill/s", "work"):
        table.add_column(column, justify="right")
    for choice in choices:
        load, way = choice.load, choice.way
        told = "mixed" if way.split is None else "{} + {} SMs".format(*way.split.sizes)
        table.add_row(
            f"{choice.times:,}", f"{load.decode:,}", f"{load.context:,.0f}", f"{load.waiting:,}", told,
            f"{1e3 * way.token_s:.1f}{'' if way.met else ' (over)'}", f"{way.prefill_per_s:,.0f}", f"{way.work:.2f}",
        )  # fmt: skip
    return table


def _table(report: "Replay", title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right" if column else "left")

    def times(what: str, p: "Percentiles | None") -> None:
        cells = [] if p is None else [p.mean_s, p.p50_s, p.p90_s, p.p99_s]
        table.add_row(what, *(f"{1e3 * cell:,.1f} ms" for cell in cells))

    table.add_row("requests", f"{report.requests:,} in {report.seconds:,.1f} s")
    table.add_row("requests/s", f"{report.requests_per_s:,.2f}")
    table.add_row("tokens/s", f"{report.tokens_per_s:,.0f}")
    table.add_row("tokens/s, middle half", f"{report.steady_tokens_per_s:,.0f}")
    table.add_row("output tokens/s", f"{report.output_tokens_per_s:,.0f}")
    table.add_row("steps", f"{report.steps:,}")
    times("TTFT", report.ttft)
    times("TPOT", report.tpot)
    times("latency", report.latency)
    return table
