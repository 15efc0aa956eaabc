"""`taskgraph run`: text through captured plans, and how the plans did."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import taskgraph as tg
from taskgraph.cli.console import check_outputs, say, screen, stages
from taskgraph.cli.steps import named
from taskgraph.errors import BackendUnavailable
from taskgraph.units import format_quantity, format_seconds

if TYPE_CHECKING:
    from taskgraph.serving.session import CapturedStep, Session

_CACHE_STEP = 256
"""Tokens that a session's cache is a multiple of: the context of `taskgraph tune`, so that its winners fit."""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(run)


def run(
    model: Annotated[
        str, typer.Argument(help="smollm2, a .gguf or .safetensors file, a folder, or a hub id org/name")
    ] = "",
    torch: Annotated[
        str, typer.Option(help="package.module:function, which returns (module, example inputs): time that instead")
    ] = "",
    prompt: Annotated[str, typer.Option(help="the user's message")] = "Explain in two sentences why the sky is blue.",
    backend: Annotated[str, typer.Option(help="cpu or cuda (this machine)")] = "cpu",
    device: Annotated[str, typer.Option(help="with cuda: virtual:h100_sxm runs on the virtual driver (slow)")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="stop after this many tokens")] = 96,
    dtype: Annotated[str, typer.Option(help="auto (the faster one here), bf16 or f32")] = "auto",
    trace: Annotated[Path | None, typer.Option(help="write a Perfetto trace (predicted and measured) here")] = None,
    report: Annotated[Path | None, typer.Option(help="write the HTML report here")] = None,
    plan_out: Annotated[Path | None, typer.Option(help="write the decode plan as JSON here")] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="use this plan for the step whose it is; may be repeated")
    ] = None,
    remembered: Annotated[
        bool, typer.Option("--remembered/--no-remembered", help="use the winners that `taskgraph tune` found here")
    ] = True,
) -> None:
    """Generate text through captured plans, then say how the plans did against the sequential graph."""
    from taskgraph.observe.explain import remark
    from taskgraph.runtime.dtypes import pick

    model = named(model, torch)
    if torch:
        from taskgraph.cli.run_torch import run_torch

        run_torch(torch)
        return
    if backend not in ("cpu", "cuda"):
        raise BackendUnavailable(f"run works on the cpu and cuda backends; {backend!r} cannot generate text.")
    where = "this machine"
    if backend == "cuda":
        from taskgraph.runtime.gpu.driver import Gpu

        where = Gpu.open(device or None).capability.describe()
    check_outputs(trace, report, plan_out)
    known = tg.KnownPlans(plans or (), backend=backend, device=device or None, use_remembered=remembered, say=say)
    with stages("probe this machine", "load weights", "plan and capture prefill", "plan and capture decode") as staged:
        with staged.stage("probe this machine"):
            picked = pick(dtype, backend, device or None)
            dtype = picked.dtype
            if backend == "cpu":
                tg.devices.get("cpu")
        with staged.stage("load weights"):
            from taskgraph.models.llama import load_weights
            from taskgraph.models.weights import open_checkpoint

            with open_checkpoint(model) as checkpoint:
                config, tokenizer = checkpoint.config, checkpoint.tokenizer()
                weights = load_weights(config, checkpoint, dtype)
        from taskgraph.serving.session import Session

        ids = tokenizer.encode(tokenizer.chat(prompt))
        cache = min(config.max_context, -(-(len(ids) + max_new_tokens) // _CACHE_STEP) * _CACHE_STEP)
        on = "cpu" if backend == "cpu" else device or "gpu"
        session = Session(config, weights, cache=cache, device=on, planner=known)
        with staged.stage("plan and capture prefill"):
            session.run(ids, [0])  # warms kernels up; generate() starts over at the same place
        with staged.stage("plan and capture decode"):
            session.run(ids[-1:], [len(ids) - 1])
    with session:
        known.check_used()
        from taskgraph.serving.textstream import TextStream

        ends = frozenset(tokenizer.eos_ids)
        stream = TextStream(tokenizer, (), ends)
        begin, count = time.perf_counter(), 0
        for token in session.generate(ids, max_new_tokens, ends):
            count += 1
            screen.print(stream.push(token), end="", markup=False, soft_wrap=True)
        seconds = time.perf_counter() - begin
        screen.print(stream.flush(), "\n", sep="", markup=False, soft_wrap=True)
        rows, (prefill_s, decode_s) = _summary(session, ids, count, seconds)
        _print_summary(rows, f"{config.name}, {dtype}, on {where}")
        screen.print(f"dtype {dtype} ({picked.why})", markup=False, soft_wrap=True)
        decode, real = session.step(1), session.step(1).kind == "measured"
        if real and (said := remark(session.step(len(ids)).plan, prefill_s)):
            screen.print(f"note on prefill: {said}", markup=False, soft_wrap=True)
        screen.print(tg.explain(decode.plan, measured_s=decode_s if real else None), markup=False)
        if plan_out is not None:
            decode.plan.save(plan_out)
        _write_files(decode, rows, trace, report)


def _summary(
    session: "Session", ids: list[int], count: int, seconds: float
) -> tuple[list[tuple[str, str, str]], tuple[float, float]]:
    """Rows (what, prefill, decode): sizes, predicted (simulated) and measured times, and the verdicts; and the seconds
    of a prefill and of a decode step."""
    from taskgraph.serving.session import step_seconds

    prefill, decode = session.step(len(ids)), session.step(1)
    in_turn = [session.step(len(ids), planner="sequential"), session.step(1, planner="sequential")]
    for step, tokens, start in ((in_turn[0], ids, 0), (in_turn[1], ids[-1:], len(ids) - 1)):
        session.feed(step, tokens, [start])
        if step.kind == "measured":
            step.executable.launch()
    kind = decode.kind
    measured = [step_seconds(pair) for pair in ((prefill, in_turn[0]), (decode, in_turn[1]))]
    plans = (prefill.plan, decode.plan)

    def row(what: str, values: Iterator[str]) -> tuple[str, str, str]:
        first, second = values
        return (what, first, second)

    work, clocked = (len(ids), 1), f" in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
    rows = [
        row("tokens a step", (str(n) for n in work)),
        row("nodes", (str(len(p.steps)) for p in plans)),
        row("lanes", (str(len(p.lanes)) for p in plans)),
        row(
            "partitions (cores)" if session.backend == "cpu" else "partitions (SMs)",
            (" + ".join(map(str, p.geometries[0].sizes)) for p in plans),
        ),
        row("arena", (format_quantity(p.arena_bytes, "B") for p in plans)),
        row("step, predicted (simulated)", (format_seconds(p.makespan_s) for p in plans)),
        row(f"step, {kind}", (format_seconds(m[0]) for m in measured)),
        row(f"tokens/s of the plan, {kind}", (f"{n / m[0]:.1f}" for n, m in zip(work, measured, strict=True))),
        row(f"tokens/s sequential, {kind}", (f"{n / m[1]:.1f}" for n, m in zip(work, measured, strict=True))),
        row("lower bound (simulated)", (f"{format_seconds(p.bounds.best_s)} ({p.bounds.binding})" for p in plans)),
        row("verdict (simulated)", (f"{p.verdict.choice}, {p.verdict.gain:.2f}x" for p in plans)),
        ("tokens generated", "", f"{count}{clocked if kind == 'measured' else ''}"),
    ]
    captured = [step.executable.report for step in (prefill, decode) if hasattr(step.executable, "report")]
    if captured:  # on a GPU
        rows.insert(5, row("kinds of op run by", (made.runners for made in captured)))
        rows.insert(6, row("edges, of which dependent", (f"{made.edges}, {made.dependent}" for made in captured)))
    return rows, (measured[0][0], measured[1][0])


def _print_summary(rows: list[tuple[str, str, str]], title: str) -> None:
    table = Table("", "prefill", "decode", title=title, title_justify="left")
    for cells in rows:
        table.add_row(*cells)
    screen.print(table)


def _write_files(
    step: "CapturedStep", rows: list[tuple[str, str, str]], trace: Path | None, report: Path | None
) -> None:
    if trace is None and report is None:
        return
    from taskgraph.schedule.planner import utilisation

    timelines = {"predicted": step.plan.timeline, step.kind: step.executable.timeline()}
    if trace is not None:
        tg.write_trace(trace, timelines, step.plan)
        screen.print(f"trace: {trace} (open it at ui.perfetto.dev)", soft_wrap=True)
    if report is not None:
        facts = {what: value for what, _, value in rows}
        used = utilisation(step.graph, step.plan)
        tg.write_report(report, step.plan, timelines, facts, [("", "prefill", "decode"), *rows], used)
        screen.print(f"report: {report}", soft_wrap=True)
