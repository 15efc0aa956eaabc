"""`taskgraph calibrate`: fit a device's coefficients to measurements, tell the errors, write the file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from taskgraph.cli.console import screen, stages
from taskgraph.errors import CalibrationError

if TYPE_CHECKING:
    from taskgraph.cost.calibrate import Errors
    from taskgraph.cost.fitted import Calibration
    from taskgraph.cost.interference import TableError


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
    written = f"coefficients: {out}"
    with stages("fit") as staged, staged.stage("fit"):
        if len(tables) == 1 and tables[0].suffix == ".json":
            made, device, beside = from_report(tables[0], out, version, source)
            written = f"device: {out} (--device {out}); coefficients: {beside}"
        elif not device:
            raise CalibrationError("tables hold several devices: say by --device whose rows to fit.")
        else:
            made = fitted(tables, device, out, version, source, licence)
    table = Table(title=f"{device}: absolute percentage error on held-out shapes", title_justify="left")
    for column in ("family", "rows", "formula median", "formula p90", "median", "mean", "p90"):
        table.add_column(column)
    for name, plain, best in made.families:
        shown = (plain.median, plain.p90, best.median, best.mean, best.p90)
        table.add_row(name, f"{best.rows:,}", *(f"{100 * e:.1f} %" for e in shown))
    screen.print(table)
    pairs = made.calibration.co_running
    for layout, errors in (pairs.held_out if pairs else {}).items():
        what = {"partition": "speed in a partition", "shared_sum": "sum of speeds on shared lanes"}[layout]
        shown_errors = f"{100 * errors['median']:.1f} % median, {100 * errors['p90']:.1f} % p90"
        screen.print(f"co-running, {what}: {shown_errors} on held-out pairs ({errors['rows']:.0f})")
    for row in made.interference:
        screen.print(
            f"R -> P, {row.resource}, {row.table} (published): |dP| {row.mean:.3f} mean, {row.largest:.3f} largest"
        )
    screen.print(written, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a calibration found. `families` holds (name, formula alone, with correction), errors on held-out shapes."""

    calibration: "Calibration"
    families: "tuple[tuple[str, Errors, Errors], ...]"
    interference: "tuple[TableError, ...]"


def from_report(report: Path, out: Path, version: int, source: str) -> tuple[Findings, str, Path]:
    """Make a device of a gpu-check report and write it, its coefficients beside it: what was found, its name, and the
    file of its coefficients. CalibrationError when it cannot."""
    from taskgraph.cost.calibrate_gpu import calibrated, save
    from taskgraph.cost.interference import table_errors
    from taskgraph.tune.gpucheck.cases import named_case

    seen: list[tuple[str, Errors, Errors]] = []

    def heard(name: str, plain: "Errors", corrected: "Errors") -> None:
        seen.append((name, plain, corrected))

    device, made = calibrated(report, version, source, lambda name: named_case(name).graph, heard)
    beside = save(device, made, out)
    return Findings(made, tuple(seen), tuple(table_errors(made.response.by_resource()))), device.name, beside


def fitted(tables: list[Path], device: str, out: Path, version: int, source: str, licence: str) -> Findings:
    """Calibrate `device` from tables and write its coefficient file; CalibrationError or DeviceError when it cannot."""
    from taskgraph.cost.calibrate import calibrate
    from taskgraph.cost.interference import table_errors
    from taskgraph.cost.measurements import read
    from taskgraph.graph.device import get

    seen: list[tuple[str, Errors, Errors]] = []

    def heard(name: str, plain: "Errors", corrected: "Errors") -> None:
        seen.append((name, plain, corrected))

    made = calibrate(read(tables), get(device), {"data": source, "licence": licence}, version, heard)
    made.save(out)
    return Findings(made, tuple(seen), tuple(table_errors(made.response.by_resource())))
