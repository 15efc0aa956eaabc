"""Predicted against measured kernel times: the errors of the shipped model, by system and family."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import machine, nanoflow_table, one_line, print_json
from benchmarks.interference import table_errors
from taskgraph.cost.calibrate import Errors, predictions
from taskgraph.cost.fitted import model_of
from taskgraph.cost.measurements import Measurements, read
from taskgraph.cost.model import predict
from taskgraph.errors import CalibrationError

EPILOG = """\
DIR holds tables of measurements (CSV, CSV.gz or Parquet), told apart by their columns; `system` names the device.
Errors are |predicted / measured - 1|. A system without coefficients of its own (h200_sxm) is predicted with those of
its nearest relation. If DIR holds the shapes that the shipped coefficients were fitted on, these are errors in sample:
the held-out errors are in the coefficient files and in docs/predict.md.

example:
  python -m benchmarks.cost_model kernels/ --json
"""


def errors_of(tables: Sequence[Measurements]) -> dict[str, dict[str, dict[str, float]]]:
    """system -> family -> rows, median, mean, p90. Systems that are no known device are left out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for table in tables:
        for system in np.unique(table.systems):
            if system in tg.devices.names():
                mine = table.where(table.systems == system)
                model = model_of(tg.devices.get(str(system)))
                errors = Errors.of(predictions(model, mine), mine.seconds)
                found.setdefault(str(system), {})[table.family.name] = asdict(errors)
    return {system: dict(sorted(rows.items())) for system, rows in sorted(found.items())}


def plot(tables: Sequence[Measurements], folder: Path) -> None:
    """Predicted against measured times, one picture a family, the systems side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for table in tables:
        systems = [str(s) for s in np.unique(table.systems) if s in tg.devices.names()]
        figure, axes = pyplot.subplots(1, len(systems), figsize=(4 * len(systems), 3.6), squeeze=False)
        for system, axis in zip(systems, axes[0], strict=True):
            mine = table.where(table.systems == system)
            axis.loglog(1e6 * mine.seconds, 1e6 * predictions(model_of(tg.devices.get(system)), mine), ",", alpha=0.5)
            axis.axline((1, 1), (10, 10), color="black", linewidth=0.5)
            axis.set(xlabel="measured, us", ylabel="predicted, us", title=f"{table.family.name}, {system}")
        figure.tight_layout()
        figure.savefig(folder / f"predict_{table.family.name}.png", dpi=80)
        pyplot.close(figure)


def speed() -> dict[str, float]:
    """Seconds of a million vectorised GEMM predictions, and microseconds of one from Python, measured here."""
    model = model_of(tg.devices.get("h100_sxm"))
    spec, gemm = model.spec(), model.family("gemm")
    whole = np.array([spec.sms])
    draw = np.random.default_rng(0)
    shapes = np.column_stack([*(2.0 ** draw.integers(5, 14, (3, 1_000_000))), np.full(1_000_000, 2.0)])
    gemm.seconds(shapes[:10], spec, whole)
    begin = time.perf_counter()
    gemm.seconds(shapes, spec, whole)
    million = time.perf_counter() - begin
    graph = _one_gemm()
    predict(graph.ops[0], graph, model.device)
    begin = time.perf_counter()
    for _ in range(1000):
        predict(graph.ops[0], graph, model.device)
    return {"million_s": million, "from_python_us": (time.perf_counter() - begin) * 1e3}


def _one_gemm() -> tg.Graph:
    builder = tg.GraphBuilder("one")
    x, w = builder.input("x", (2048, 4096), "bf16"), builder.weight("w", (4096, 4096), "bf16")
    builder.output(tg.ops.gemm(x, w))
    return builder.build()


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_model",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="folder of tables")
    parser.add_argument("--json", action="store_true", help="print the errors as JSON on the last line")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a picture a family here (needs matplotlib)")
    options = parser.parse_args(argv)
    tables = read(options.directory)
    found = errors_of(tables)
    if options.plots and not options.plots.is_dir():
        raise CalibrationError(f"--plots {str(options.plots)!r} is no folder; make it first.")
    screen = Console(highlight=False)
    screen.print(_table(found))
    for row in table_errors():
        screen.print(
            f"R -> P, {row.resource}, {row.table} (published): mean |dP| {row.mean:.3f}, largest {row.largest:.3f}"
        )
    screen.print(nanoflow_table.table(nanoflow_table.rows()))
    if options.plots:
        plot(tables, options.plots)
    fast = speed()
    screen.print(
        f"a million GEMM predictions {fast['million_s']:.2f} s, one from Python {fast['from_python_us']:.0f} us "
        f"(measured, {machine()})"
    )
    if options.json:
        print_json(found)
    return 0


def _table(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table(title="predicted against measured: absolute percentage error", title_justify="left")
    for column in ("system", "family", "coefficients", "rows", "median", "mean", "p90"):
        table.add_column(column)
    for system, families in found.items():
        source = model_of(tg.devices.get(system)).family("gemm").source
        for family, e in families.items():
            shown = (f"{100 * e[key]:.1f} %" for key in ("median", "mean", "p90"))
            table.add_row(system, family, source, f"{e['rows']:,}", *shown)
    return table


if __name__ == "__main__":
    sys.exit(main())
