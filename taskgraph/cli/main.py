"""The command line: run, plan, devices, doctor. Errors are one line and exit code 2."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import taskgraph as tg
from taskgraph import compiling
from taskgraph.cli import serve, tune
from taskgraph.errors import BackendUnavailable, DeviceError, TaskgraphError
from taskgraph.units import format_quantity, format_seconds

if TYPE_CHECKING:
    from taskgraph.serving.session import CapturedStep, Session

app = typer.Typer(
    help="Declare LLM layers as a task graph, plan them onto streams and SM partitions, capture, replay.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_screen = Console(highlight=False, emoji=False)
_status = Console(stderr=True, highlight=False, emoji=False)


def main() -> None:
    """Entry point: a TaskgraphError becomes one line on stderr and exit code 2; a warning about the cache one line."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning(warnings.showwarning)
        before = compiling.listen(_first_compilation)
        try:
            _command()
        finally:
            compiling.listen(before)


def _command() -> None:
    try:
        app()
    except TaskgraphError as error:
        _status.print(f"taskgraph: {' '.join(str(error).split())}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


def _show_warning(others: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning about the cache in one line, and leaves `others` as they are."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, tg.CacheWarning):
            _say(f"taskgraph: warning: {message}")
        else:
            others(message, category, *where, **more)

    return show


def _first_compilation(name: str, before: int) -> None:
    if not before:
        _say("compiling functions for this processor, once: about a minute in all")


def _check_outputs(*paths: Path | None) -> None:
    """PlanError, before any work is done, for a file that cannot be written."""
    for path in filter(None, paths):
        standing = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
            raise tg.PlanError(f"cannot write {str(path)!r}: a folder, or in no folder that can be written.")


def _say(line: str) -> None:
    """A line about what happens, beside the results."""
    _status.print(line, markup=False, soft_wrap=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """PlanError for what goes wrong while `path` is written; what stood there before is still there."""
    try:
        yield
    except OSError as error:
        raise tg.PlanError(f"cannot write {str(path)!r}: {error.strerror}. Choose another place.") from error


@contextmanager
def _stages(*names: str) -> Iterator["_Stages"]:
    """A progress line a stage on stderr; where that is no terminal, a line for each that has ended."""
    columns = (SpinnerColumn(finished_text="[green]ok"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_status, disable=not _status.is_terminal) as progress:
        yield _Stages(progress, names)


class _Stages:
    def __init__(self, progress: Progress, names: tuple[str, ...]) -> None:
        self._progress = progress
        self._tasks = {name: progress.add_task(name, total=1, start=False, visible=False) for name in names}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        task = self._tasks[name]
        self._progress.update(task, visible=True)
        self._progress.start_task(task)

        def compiled(function: str, before: int) -> None:
            if others is not None:
                others(function, before)
            self._progress.update(task, description=f"{name} (compiling function {before + 1}: {function})")

        others, begin = compiling.listen(compiled), time.perf_counter()
        try:
            yield
        finally:
            compiling.listen(others)
        self._progress.update(task, completed=1, description=name)
        if self._progress.disable:
            _say(f"{name}: {time.perf_counter() - begin:.1f} s")


# ---------------------------------------------------------------------------------------------- run


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="smollm2, a .gguf or .safetensors file, a folder, or a hub id org/name")],
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

    if backend not in ("cpu", "cuda"):
        raise BackendUnavailable(f"run works on the cpu and cuda backends; {backend!r} cannot generate text.")
    where = "this machine"
    if backend == "cuda":
        from taskgraph.runtime.gpu.driver import Gpu

        where = Gpu.open(device or None).capability.describe()
    _check_outputs(trace, report, plan_out)
    from taskgraph.serving.known_plans import KnownPlans

    known = KnownPlans(plans or (), backend=backend, run_on=device or None, use_remembered=remembered, say=_say)
    with _stages("probe this machine", "load weights", "plan and capture prefill", "plan and capture decode") as stages:
        with stages.stage("probe this machine"):
            picked = pick(dtype, backend, device or None)
            dtype = picked.dtype
            if backend == "cpu":
                tg.devices.get("cpu")
        with stages.stage("load weights"):
            from taskgraph.models.llama import load_weights
            from taskgraph.models.weights import open_checkpoint

            with open_checkpoint(model) as checkpoint:
                config, tokenizer = checkpoint.config, checkpoint.tokenizer()
                weights = load_weights(config, checkpoint, dtype)
        from taskgraph.serving.session import Session

        ids = tokenizer.encode(tokenizer.chat(prompt))
        cache = min(config.max_context, -(-(len(ids) + max_new_tokens) // _CACHE_STEP) * _CACHE_STEP)
        session = Session(
            config, weights, dtype=dtype, cache=cache, backend=backend, device=device or None, planner=known
        )
        with stages.stage("plan and capture prefill"):
            session.run(ids, [0])  # warms kernels up; generate() starts over at the same place
        with stages.stage("plan and capture decode"):
            session.run(ids[-1:], [len(ids) - 1])
    with session:
        known.check_used()
        from taskgraph.serving.textstream import TextStream

        ends = frozenset(tokenizer.eos_ids)
        stream = TextStream(tokenizer, (), ends)
        begin, count = time.perf_counter(), 0
        for token in session.generate(ids, max_new_tokens, ends):
            count += 1
            _screen.print(stream.push(token), end="", markup=False, soft_wrap=True)
        seconds = time.perf_counter() - begin
        _screen.print(stream.flush(), "\n", sep="", markup=False, soft_wrap=True)
        rows, (prefill_s, decode_s) = _summary(session, ids, count, seconds)
        _print_summary(rows, f"{config.name}, {dtype}, on {where}")
        _screen.print(f"dtype {dtype} ({picked.why})", markup=False, soft_wrap=True)
        decode, real = session.step(1), session.step(1).kind == "measured"
        if real and (said := remark(session.step(len(ids)).plan, prefill_s)):
            _screen.print(f"note on prefill: {said}", markup=False, soft_wrap=True)
        _screen.print(tg.explain(decode.plan, measured_s=decode_s if real else None), markup=False)
        if plan_out is not None:
            with _writing(plan_out):
                decode.plan.save(plan_out)
        _write_files(decode, rows, trace, report)


_CACHE_STEP = 256
"""Tokens that a session's cache is a multiple of: the context of `taskgraph tune`, so that its winners fit."""

_UNITS = {"cpu": "cores", "cuda": "SMs"}


def _summary(
    session: "Session", ids: list[int], count: int, seconds: float
) -> tuple[list[tuple[str, str, str]], tuple[float, float]]:
    """Rows (what, prefill, decode): sizes, predicted (simulated) and measured times, and the verdicts; and the seconds
    of a prefill and of a decode step."""
    from taskgraph.serving.session import step_seconds

    prefill, decode = session.step(len(ids)), session.step(1)
    in_turn = [session.step(len(ids), scheduler="sequential"), session.step(1, scheduler="sequential")]
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
    return rows, (measured[0][0], measured[1][0])


def _print_summary(rows: list[tuple[str, str, str]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "prefill", "decode"):
        table.add_column(column)
    for cells in rows:
        table.add_row(*cells)
    _screen.print(table)


def _write_files(
    step: "CapturedStep", rows: list[tuple[str, str, str]], trace: Path | None, report: Path | None
) -> None:
    if trace is None and report is None:
        return
    from taskgraph.schedule.planner import utilisation

    timelines = {"predicted": step.plan.timeline, step.kind: step.executable.timeline()}
    if trace is not None:
        with _writing(trace):
            tg.write_trace(trace, timelines, step.plan)
        _screen.print(f"trace: {trace} (open it at ui.perfetto.dev)", soft_wrap=True)
    if report is not None:
        facts = {what: value for what, _, value in rows}
        used = utilisation(step.graph, step.plan)
        with _writing(report):
            tg.write_report(report, step.plan, timelines, facts, [("", "prefill", "decode"), *rows], used)
        _screen.print(f"report: {report}", soft_wrap=True)


# --------------------------------------------------------------------------------------------- plan


_PLAN_EPILOG = """
taskgraph plan llama-3-70b --ranks 8 --batch 256 --context 1024

taskgraph plan llama-3-8b --device a100_sxm --tokens 512 --context 512 --batch 4 --dtype f16

taskgraph plan smollm2 --device cpu --batch 1 --context 256 --out decode.json

taskgraph run smollm2 --plan decode.json

With --ranks the plan is that of one rank of a tensor-parallel group: its share of heads, features, vocabulary and
cache, and the collectives between them. What it keeps is compared with one device's memory.
"""


@app.command(epilog=_PLAN_EPILOG)
def plan(
    model: Annotated[str, typer.Argument(help="a known size such as llama-3-70b, a config.json, or its folder")],
    device: Annotated[str, typer.Option(help="see `taskgraph devices`")] = "h100_sxm",
    batch: Annotated[int, typer.Option(min=1, help="sequences in the step")] = 256,
    context: Annotated[int, typer.Option(min=1, help="tokens that each sequence has in its cache")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens a sequence: 1 is decode, more is prefill")] = 1,
    dtype: Annotated[
        str, typer.Option(help="of weights, cache and products: bf16, f16, f32, or auto: bf16, on cpu the faster here")
    ] = "auto",
    ranks: Annotated[int, typer.Option(min=1, help="devices that share every layer (tensor parallel)")] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="ranks hold whole experts, not a part of each")
    ] = False,
    scheduler: Annotated[str, typer.Option(help="auto, sequential, list, search or exact")] = "auto",
    out: Annotated[Path | None, typer.Option(help="write the plan as JSON here")] = None,
    trace: Annotated[Path | None, typer.Option(help="write a Perfetto trace here")] = None,
    report: Annotated[Path | None, typer.Option(help="write the HTML report here")] = None,
) -> None:
    """Plan one step of a model on any device: no weights, no GPU; all times are simulated."""
    from taskgraph.schedule.planner import utilisation
    from taskgraph.schedule.verify import resident_bytes

    _check_outputs(out, trace, report)
    if dtype == "auto":
        from taskgraph.runtime.dtypes import pick

        dtype = pick("auto").dtype if device == "cpu" else "bf16"
    size = tune.StepSize(batch, context, tokens, dtype, ranks, expert_parallel)
    begin = time.perf_counter()
    graph = tune.graph_of(model, size)
    made = tg.plan(graph, device, scheduler)
    seconds = time.perf_counter() - begin
    tg.verify(made, graph, memory=False)
    _screen.print(tg.explain(made), markup=False)
    rate = batch * tokens / made.makespan_s
    on = f"one {made.device.name}" if ranks == 1 else f"{ranks} x {made.device.name}"
    _screen.print(f"{rate:,.0f} tokens/s (simulated, {on}); planned and verified in {seconds:.2f} s")
    held, room = resident_bytes(made, graph), made.device.memory_bytes
    each = "the step" if ranks == 1 else f"each of {ranks} ranks"
    if held > room:
        _screen.print(
            f"note: {each} keeps {held / 1e9:.0f} GB and one {made.device.name} has {room / 1e9:.0f} GB; the times are "
            f"those of devices with enough memory.{tune.advice(model, size, -(-held * ranks // room))}",
            soft_wrap=True,
        )
    elif ranks > 1:
        _screen.print(f"{each} keeps {held / 1e9:.0f} GB of the {room / 1e9:.0f} GB that one {made.device.name} has")
    if out is not None:
        with _writing(out):
            made.save(out)
    if trace is not None:
        with _writing(trace):
            tg.write_trace(trace, {"predicted": made.timeline}, made)
    if report is not None:
        with _writing(report):
            tg.write_report(report, made, {"predicted": made.timeline}, utilisation=utilisation(graph, made))


# ----------------------------------------------------------------------------------- devices, doctor


@app.command()
def devices() -> None:
    """The built-in device specs, with where their numbers come from."""
    table = Table(
        title="devices (published specs; dense rates)", title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True
    )
    for column in ("name", "SMs", "split", "bf16", "HBM", "PCIe", "link", "memory"):
        table.add_column(column, no_wrap=True)
    for d in tg.devices.iter_specs():
        table.add_row(
            d.name,
            str(d.sm_count),
            f"{d.sm_min}+, x{d.sm_granularity}",
            format_quantity(d.rate("bf16"), "FLOP/s"),
            format_quantity(d.hbm_bytes_per_s, "B/s"),
            format_quantity(d.h2d_bytes_per_s, "B/s"),
            format_quantity(d.link_bytes_per_s, "B/s") if d.link_bytes_per_s else "none",
            format_quantity(d.memory_bytes, "B"),
        )
    _screen.print(table)
    for d in tg.devices.iter_specs():
        _screen.print(f"{d.name:>9}: {dict(d.sources)['hbm_bytes_per_s']}", soft_wrap=True)
    _screen.print("also: cpu, this machine as probed (`taskgraph doctor` shows it)")


@app.command()
def doctor(
    probe: Annotated[bool, typer.Option("--probe", help="measure this machine again, e.g. after it was busy")] = False,
    device: Annotated[str, typer.Option(help="virtual:h100_sxm, say, to look at a virtual GPU")] = "",
) -> None:
    """What this machine can run, and what its CPU measured."""
    from importlib import metadata

    from taskgraph.runtime.cpu import choose, survey
    from taskgraph.runtime.cpu.probe import PROBE_AGAIN, cache_path, disturbance, probed_when

    if probe:
        cache_path().unlink(missing_ok=True)
        choose.kept_at().unlink(missing_ok=True)

    table = Table(title="taskgraph doctor", title_justify="left", show_header=False)
    table.add_row("python", sys.version.split()[0])
    for package in ("torch", "numba", "numpy"):
        table.add_row(package, metadata.version(package))
    try:
        cpu = tg.devices.get("cpu")
        table.add_row("cpu backend", f"ready, {cpu.sm_count} cores")
        for dtype, rate in cpu.flops_per_s:
            table.add_row(f"  GEMM {dtype} (measured)", format_quantity(rate, "FLOP/s"))
        table.add_row("  read, all cores (measured)", format_quantity(cpu.hbm_bytes_per_s, "B/s"))
        table.add_row("  read, one core (measured)", format_quantity(cpu.sm_hbm_bytes_per_s, "B/s"))
        table.add_row("  dispatch of an op (measured)", format_seconds(cpu.launch_seconds))
        disturbed = disturbance(cpu)
        table.add_row("  probe", f"{disturbed}; {PROBE_AGAIN} when it is quiet" if disturbed else probed_when())
        table.add_row("  kernels compiled for", survey.compiled_for())
    except DeviceError as error:
        table.add_row("cpu backend", str(error))
    table.add_row("sim backend", "ready, any device spec (simulated)")
    from taskgraph.runtime.gpu.driver import probe as probe_gpu

    if device:
        from taskgraph.runtime.gpu.virtual import load

        load(device)
    gpu = probe_gpu()
    table.add_row("cuda backend", gpu.describe())
    for text in gpu.notes:
        table.add_row("  note", text)
    _screen.print(table)
    _screen.print(_ways_table())


def _ways_table() -> Table:
    """Which way each op kind runs on this machine's CPU, and why."""
    from taskgraph.runtime.cpu import choose, products, survey
    from taskgraph.runtime.cpu.ways import WAYS

    meaning = "; ".join(f"{way}: {WAYS[way]}" for way in products.able())
    table = Table(title="op kinds on this CPU", title_justify="left", caption=meaning, caption_justify="left")
    for column in ("op kinds", "dtype", "way", "why"):
        table.add_column(column, overflow="fold")
    for row in survey.told(choose.here()):
        table.add_row(row.kinds, row.dtype, row.way, row.why)
    return table


@app.command("gpu-check")
def gpu_check(
    device: Annotated[str, typer.Option(help="virtual:h100_sxm runs it on the virtual driver (simulated)")] = "",
    out: Annotated[Path, typer.Option(help="write the report as JSON here")] = Path("gpu-check.json"),
) -> None:
    """Check the cuda backend on this machine's GPU, calibrate it, see which ops overlap; one report file to send."""
    from taskgraph.tune import gpucheck

    _check_outputs(out)
    with _writing(out):
        report = gpucheck.main(device or None, out, _status.print)
    _screen.print(gpucheck.summary(report), markup=False, soft_wrap=True)
    _screen.print(f"report: {out}", soft_wrap=True)
    if not report.passed:
        sys.exit(1)


tune.add_to(app, lambda text: _screen.print(text, markup=False, soft_wrap=True), lambda text: _status.print(text))


# ------------------------------------------------------------------------------- calibrate, what-if


@app.command()
def calibrate(
    tables: Annotated[list[Path], typer.Argument(help="CSV, CSV.gz or Parquet files of measurements, or their folder")],
    device: Annotated[str, typer.Option(help="whose rows to fit; see `taskgraph devices`")],
    out: Annotated[Path, typer.Option(help="write the coefficient file here")],
    version: Annotated[int, typer.Option(min=1, help="version of the coefficients")] = 1,
    source: Annotated[str, typer.Option(help="where the measurements come from")] = "not stated",
    licence: Annotated[str, typer.Option(help="their licence")] = "not stated",
) -> None:
    """Fit the cost model's coefficients to measured kernels; prints the errors on held-out shapes."""
    from taskgraph.cli import calibrate

    with _stages("fit") as stages, stages.stage("fit"):
        made = calibrate.run(tables, device, out, version, source, licence, lambda name: None)
    table = Table(title=f"{device}: absolute percentage error on held-out shapes", title_justify="left")
    for column in ("family", "rows", "formula median", "formula p90", "median", "mean", "p90"):
        table.add_column(column)
    for name, plain, best in made.families:
        shown = (plain.median, plain.p90, best.median, best.mean, best.p90)
        table.add_row(name, f"{best.rows:,}", *(f"{100 * e:.1f} %" for e in shown))
    _screen.print(table)
    for row in made.interference:
        _screen.print(
            f"R -> P, {row.resource}, {row.table} (published): |dP| {row.mean:.3f} mean, {row.largest:.3f} largest"
        )
    _screen.print(f"coefficients: {out}", soft_wrap=True)


@app.command()
def whatif(
    model: Annotated[str, typer.Argument(help="a known size such as llama-3-70b, a config.json, or its folder")],
    device: Annotated[str, typer.Option(help="the device to start from")] = "h100_sxm",
    sm: Annotated[str, typer.Option(help="SMs (and their arithmetic), as x0.5")] = "x1",
    flops: Annotated[str, typer.Option(help="arithmetic of every SM")] = "x1",
    hbm: Annotated[str, typer.Option(help="memory bandwidth, as x1.5")] = "x1",
    link: Annotated[str, typer.Option(help="bandwidth between devices")] = "x1",
    pcie: Annotated[str, typer.Option(help="bandwidth to the host")] = "x1",
    batch: Annotated[int, typer.Option(min=1, help="sequences in the step")] = 256,
    context: Annotated[int, typer.Option(min=1, help="tokens that each sequence has in its cache")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens a sequence")] = 1,
    scheduler: Annotated[str, typer.Option(help="as for `plan`")] = "auto",
) -> None:
    """How the best plan of a step and its bounds move on a device with more or less of something (simulated)."""
    from taskgraph.cli.whatif import Outcome, parse_factor, what_if

    given = {"sm": sm, "flops": flops, "hbm": hbm, "link": link, "pcie": pcie}
    factors = {name: factor for name, text in given.items() if (factor := parse_factor(text)) != 1.0}
    sizes = {"batch": batch, "context": context, "tokens": tokens}
    pair = what_if(model, tg.devices.get(device), factors, **sizes, scheduler=scheduler)
    table = Table(title=f"{model}, {batch} x {tokens} tokens, context {context} (simulated)", title_justify="left")
    for column in ("", *(outcome.device.name for outcome in pair), "change"):
        table.add_column(column, overflow="fold")

    def row(what: str, number: Callable[[Outcome], float], show: Callable[[float], str]) -> None:
        before, after = (number(outcome) for outcome in pair)
        table.add_row(what, show(before), show(after), f"x{after / before:.3f}" if before else "")

    row("step", lambda o: o.plan.makespan_s, format_seconds)
    row("tokens/s", lambda o: o.tokens_per_s, "{:,.0f}".format)
    row("sequential step", lambda o: o.plan.verdict.sequential_s, format_seconds)
    row("lower bound", lambda o: o.plan.bounds.best_s, format_seconds)
    table.add_row("binding bound", *(o.plan.bounds.binding for o in pair), "")
    table.add_row("verdict", *(f"{o.plan.verdict.choice}, {o.plan.verdict.gain:.2f}x" for o in pair), "")
    table.add_row("error band", *(f"±{100 * o.plan.verdict.error_band:.0f} %" for o in pair), "")
    _screen.print(table)


serve.register(app)  # serve, bench-serve


if __name__ == "__main__":
    main()
