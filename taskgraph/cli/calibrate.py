"""`taskgraph calibrate`: fit a device's coefficients to measurements, tell the errors, write the file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import taskgraph as tg
from taskgraph.cli.console import screen, stages
from taskgraph.errors import CalibrationError

if TYPE_CHECKING:
    from taskgraph.cost.calibrate import Errors
    from taskgraph.cost.fitted import Calibration


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(calibrate)


def calibrate(
    tables: Annotated[
        list[Path],
        typer.Argument(help="CSV, CSV.gz or Parquet files of measurements, their folder, or one gpu-check.json"),
    ],
    out: Annotated[Path, typer.Option(help="write the coefficient file here; of a gpu-check.json, the device")],
    device: Annotated[str, typer.Option(help="whose rows to fit, of tables; see `taskgraph devices`")] = "",
    version: Annotated[int, typer.Option(min=1, help="version of the coefficients")] = 1,
    source: Annotated[str, typer.Option(help="where the measurements come from")] = "not stated",
    licence: Annotated[str, typer.Option(help="their licence")] = "not stated",
) -> None:
    """Fit the cost model's coefficients to measured kernels; prints the errors on held-out shapes."""
    from taskgraph.cost.calibrate import calibrate as fit
    from taskgraph.cost.calibrate_gpu import calibrated, save
    from taskgraph.cost.measurements import read

    families: list[tuple[str, Errors, Errors]] = []

    def heard(name: str, plain: "Errors", corrected: "Errors") -> None:
        families.append((name, plain, corrected))

    with stages("fit") as staged, staged.stage("fit"):
        if len(tables) == 1 and tables[0].suffix == ".json":
            from taskgraph.tune.gpucheck.cases import named_case

            named, made = calibrated(tables[0], version, source, lambda name: named_case(name).graph, heard)
            device, written = named.name, f"device: {out} (--device {out}); coefficients: {save(named, made, out)}"
        elif not device:
            raise CalibrationError("tables hold several devices: say by --device whose rows to fit.")
        else:
            about, written = {"data": source, "licence": licence}, f"coefficients: {out}"
            made = fit(read(tables), tg.devices.get(device), about, version, heard)
            made.save(out)
    _show(device, made, families)
    screen.print(written, soft_wrap=True)


def _show(device: str, made: "Calibration", families: "list[tuple[str, Errors, Errors]]") -> None:
    """The held-out errors of (family, formula alone, with correction), and of the co-running model."""
    title = f"{device}: absolute percentage error on held-out shapes"
    columns = ("family", "rows", "formula median", "formula p90", "median", "mean", "p90")
    table = Table(*columns, title=title, title_justify="left")
    for name, plain, best in families:
        shown = (plain.median, plain.p90, best.median, best.mean, best.p90)
        table.add_row(name, f"{best.rows:,}", *(f"{100 * e:.1f} %" for e in shown))
    screen.print(table)
    for layout, errors in (made.co_running.held_out if made.co_running else {}).items():
        what = {"partition": "speed in a partition", "shared_sum": "sum of speeds on shared lanes"}[layout]
        shown_errors = f"{100 * errors['median']:.1f} % median, {100 * errors['p90']:.1f} % p90"
        screen.print(f"co-running, {what}: {shown_errors} on held-out pairs ({errors['rows']:.0f})")
