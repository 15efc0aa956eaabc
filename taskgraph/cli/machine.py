"""`taskgraph devices`, `doctor` and `gpu-check`: known devices, and what this machine is and can."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

import taskgraph as tg
from taskgraph.cli.console import check_outputs, say, screen, show
from taskgraph.errors import DeviceError
from taskgraph.units import format_quantity, format_seconds


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(devices)
    app.command()(doctor)
    app.command("gpu-check")(gpu_check)


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
    screen.print(table)
    for d in tg.devices.iter_specs():
        screen.print(f"{d.name:>9}: {dict(d.sources)['hbm_bytes_per_s']}", soft_wrap=True)
    screen.print("also: cpu, this machine as probed (`taskgraph doctor` shows it)")


def doctor(
    probe: Annotated[bool, typer.Option("--probe", help="measure this machine again, e.g. after it was busy")] = False,
    device: Annotated[str, typer.Option(help="virtual:h100_sxm, say, to look at a virtual GPU")] = "",
    arch: Annotated[
        str,
        typer.Option("--compile", metavar="ARCH", help="compile a model's Triton kernels for sm_90, say, and no more"),
    ] = "",
    model: Annotated[
        str, typer.Option(help="whose kernels --compile compiles: a size, a config.json or its folder")
    ] = ("llama-3-8b"),
) -> None:
    """What this machine can run, and what its CPU measured.

    With --compile ARCH: the kernels that steps of a model need on a GPU of that architecture, compiled and kept. That
    needs Triton and no GPU."""
    from importlib import metadata

    if arch:
        from taskgraph.cli.ahead import compile_ahead

        screen.print(compile_ahead(arch, model))
        return

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
    screen.print(table)
    screen.print(_ways_table())


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


def gpu_check(
    device: Annotated[str, typer.Option(help="virtual:h100_sxm runs it on the virtual driver (simulated)")] = "",
    out: Annotated[Path, typer.Option(help="write the report as JSON here, its tables beside it")] = Path(
        "gpu-check/gpu-check.json"
    ),
    minutes: Annotated[float, typer.Option(min=0.05, help="it takes at most about this long")] = 4.0,
) -> None:
    """Check the cuda backend on this machine's GPU and measure it: kernels, pairs, whole plans; a folder to send."""
    from taskgraph.cli.gpu_check import steps
    from taskgraph.tune.gpucheck.run import run, summary

    check_outputs(out)
    report = run(device or None, out, minutes=minutes, graphs=steps(bool(device)), say=say)
    show(summary(report))
    screen.print(f"report: {out}", soft_wrap=True)
    if not report.passed:
        sys.exit(1)
