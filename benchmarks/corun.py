"""The co-running model, the cost of products and the verdict, against what a GPU measured."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

import taskgraph as tg
from benchmarks import one_line, print_json
from taskgraph.cost.calibrate import Errors, calibrate, predictions
from taskgraph.cost.corunning_fit import Table, fit_corunning, fit_kept_grid
from taskgraph.cost.fitted import Calibration, model_of, shipped
from taskgraph.cost.gpu_report import GemmTime, KernelTime, PairTime, PlanTime
from taskgraph.cost.measurements import products
from taskgraph.cost.model import co_running
from taskgraph.errors import CalibrationError
from taskgraph.graph.graph import Graph
from taskgraph.record import convert
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import replayed
from taskgraph.tune.gpucheck.cases import named_case

EPILOG = """\
PATH is a folder of measurements of one GPU: corun.csv, gemm.csv, and plans.csv with the plans and graphs that it names,
in the columns that `taskgraph gpu-check` writes; a table that is missing is left out. Several folders are one set.

partition    each kernel's speed beside the other, relative to alone on the same SMs: |predicted / measured - 1|
shared_sum   the sum of both relative speeds on shared lanes; which of the two gets how much is not predicted
plans        predicted gain over the sequential plan of the same graph, less the measured gain
false_packed plans that would be called packed, and measured slower than the sequential one
gemm         |predicted / measured - 1| of products

--fit FILE writes a coefficient file: the co-running model and the products of PATH, also those of its
kernels_by_sms.csv, other families as they were.

examples:
  python -m benchmarks.corun benchmarks/reports/h200-2026-11-27 --json
  python -m benchmarks.corun benchmarks/reports/h200-* --fit taskgraph/cost/coefficients/h200_sxm.json
"""
PARTS = ("corun.csv", "gemm.csv", "plans.csv", "products.csv")


def rows_of(kind: type[Any], path: Path) -> list[Any]:
    """The rows of a table, columns beyond those of `kind` aside; CalibrationError naming file and line."""
    found = []
    wanted = {field.name: field for field in fields(kind)}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            body: dict[str, Any] = {key: None for key, field in wanted.items() if field.default is None}
            for key, value in row.items():
                if key in wanted and value not in ("", None):
                    body[key] = value if wanted[key].type is str else _number(value)
            try:
                found.append(convert(kind, body, CalibrationError, "row", "Measure again."))
            except CalibrationError as error:
                raise CalibrationError(f"{path}, line {number}: {error}") from None
    return found


def _number(text: str) -> int | float | str:
    """The number in a cell; the text where it is none, for the error that names it."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


@cache
def graph_of(name: str) -> Graph:
    """The kernel of a name as a graph of one op."""
    return named_case(name).graph


@dataclass(frozen=True)
class Measured:
    """What folders hold, of one device."""

    device: tg.Device
    pairs: list[PairTime]
    gemm: list[GemmTime]
    kernels: list[KernelTime]
    plans: list[tuple[PlanTime, Path]]

    @staticmethod
    def read(folders: Sequence[Path], device: tg.Device) -> "Measured":
        """CalibrationError where a folder has none of the tables."""
        made = Measured(device, [], [], [], [])
        for folder in folders:
            if not any((folder / name).is_file() for name in PARTS):
                raise CalibrationError(f"{folder}: there is none of {', '.join(PARTS)}. Give a folder of measurements.")
            if (folder / "kernels_by_sms.csv").is_file():
                made.kernels.extend(rows_of(KernelTime, folder / "kernels_by_sms.csv"))
            if (folder / "corun.csv").is_file():
                made.pairs.extend(rows_of(PairTime, folder / "corun.csv"))
            for name in ("gemm.csv", "products.csv"):
                if (folder / name).is_file():
                    made.gemm.extend(rows_of(GemmTime, folder / name))
            if (folder / "plans.csv").is_file():
                made.plans.extend((row, folder) for row in rows_of(PlanTime, folder / "plans.csv"))
        return made


def device_of(folders: Sequence[Path]) -> tg.Device:
    """The device that the folders' plans, or their names, say."""
    for folder in folders:
        for path in sorted(folder.glob("plans/*.plan.json")):
            return tg.devices.get(str(json.loads(path.read_text())["device"]["name"]))
        for name in tg.devices.names():
            if name.split("_")[0] in folder.resolve().name:
                return tg.devices.get(name)
    return tg.devices.get("h200_sxm")


def pair_errors(found: Measured) -> dict[str, dict[str, float]]:
    """Errors of both kinds of pairs under the device's co-running model."""
    table = Table(found.pairs, graph_of, found.device)
    speed, every = table.predicted(co_running(found.device)), np.ones(len(found.pairs), np.bool_)
    ratios = {"partition": table.partition_errors(speed, every), "shared_sum": table.shared_errors(speed, every)}
    rows = {"partition": int((~table.shared).sum()), "shared_sum": int(table.shared.sum())}
    return {name: {"rows": rows[name], **_summary(ratio)} for name, ratio in ratios.items()}


def _summary(ratio: np.ndarray) -> dict[str, float]:
    if not len(ratio):
        return {"median": 0.0, "p90": 0.0}
    errors = Errors.of(ratio, np.ones(len(ratio)))
    return {"median": errors.median, "p90": errors.p90}


@dataclass(frozen=True)
class PlanGain:
    """A plan beside the sequential one of its graph."""

    name: str
    partitions: str
    predicted: float
    measured: float
    band: float

    @property
    def packed(self) -> bool:
        """Whether it would be called packed: its gain survives the band."""
        return self.predicted > 1.0 + self.band

    @property
    def false(self) -> bool:
        return self.packed and self.measured < 1.0


def plan_gains(found: Measured) -> Iterator[PlanGain]:
    """Every plan but the sequential ones, on the device with its present coefficients."""
    times: dict[tuple[Path, str], list[tuple[PlanTime, float, float]]] = {}
    for row, folder in found.plans:
        graph = Graph.from_json((folder / row.graph).read_text())
        plan = replace(Plan.from_json((folder / row.plan).read_text()), device=found.device)
        replay = replayed(graph, plan)
        times.setdefault((folder, row.graph), []).append((row, replay.makespan_s, replay.gain_band()))
    for rows in times.values():
        alone = next((row for row in rows if row[0].made_by.startswith("sequential")), None)
        if alone is None:
            raise CalibrationError(f"plans.csv has no sequential plan of {rows[0][0].graph}. Measure it too.")
        for row, predicted_s, band in rows:
            if row is not alone[0]:
                gain, measured = alone[1] / predicted_s, alone[0].measured_s / row.measured_s
                yield PlanGain(row.made_by, row.partitions, gain, measured, band)


def gemm_errors(found: Measured) -> dict[str, float]:
    """Errors of the products."""
    if not found.gemm:
        return {"median": 0.0, "p90": 0.0}
    shapes = [(row.m, row.n, row.k) for row in found.gemm]
    table = products(found.device.name, shapes, [row.seconds for row in found.gemm])
    errors = Errors.of(predictions(model_of(found.device), table), table.seconds)
    return {"median": errors.median, "p90": errors.p90}


def judged(found: Measured) -> tuple[dict[str, Any], list[PlanGain]]:
    """The result, and the plans one by one."""
    gains = list(plan_gains(found))
    body = {
        **pair_errors(found),
        "plans": len(gains),
        "gain_error_max": max((abs(g.predicted - g.measured) for g in gains), default=0.0),
        "false_packed": sum(g.false for g in gains),
        "gemm": gemm_errors(found),
    }
    return body, gains


def fitted(found: Measured, version: int) -> Calibration:
    """The coefficients of the device: its products and its pairs, other families as they are now."""
    device = found.device
    shapes = [(row.m, row.n, row.k) for row in found.gemm]
    table = products(device.name, shapes, [row.seconds for row in found.gemm])
    about = {
        "data": "products and pairs of kernels measured on the device: benchmarks/reports",
        "licence": "this project's own measurements",
    }
    now, model = shipped(device.calibration), fit_corunning(found.pairs, graph_of, device)
    if now.device == device.name and now.families["gemm"].held_out["rows"] > len(found.gemm):
        made = now  # fitted to more products than these
    else:
        made = calibrate([table], replace(device, calibration=""), about, version)
        theirs = {name: replace(fit, fitted_on=fit.fitted_on or now.device) for name, fit in now.families.items()}
        made = replace(made, families={**theirs, **made.families})
    return fit_kept_grid(found.kernels, graph_of, device, replace(made, co_running=model))


def shown(body: dict[str, Any], gains: Sequence[PlanGain], device: tg.Device) -> None:
    """The result for people."""
    console = Console()
    grid = Grid(title=f"{device.name}: predicted against measured", title_justify="left")
    for column in ("", "rows", "median", "p90"):
        grid.add_column(column)
    for name in ("partition", "shared_sum", "gemm"):
        part = body[name]
        grid.add_row(name, str(part.get("rows", "")), f"{100 * part['median']:.1f} %", f"{100 * part['p90']:.1f} %")
    console.print(grid)
    plans = Grid(title="Plans: gain over the sequential one", title_justify="left")
    for column in ("plan", "SMs", "predicted", "measured", "band", "called"):
        plans.add_column(column)
    for g in gains:
        called = "packed" if g.packed else "sequential"
        row = (g.name, g.partitions, f"{g.predicted:.3f}", f"{g.measured:.3f}", f"±{100 * g.band:.0f} %", called)
        plans.add_row(*row)
    console.print(plans)
    console.print(f"largest error of a gain {body['gain_error_max']:.3f}; {body['false_packed']} falsely packed")


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corun", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("path", type=Path, nargs="+", metavar="PATH", help="folder of measurements")
    parser.add_argument("--device", help="the device that was measured (default: the one that the folder names)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="write a coefficient file fitted to PATH")
    parser.add_argument("--version", type=int, default=1, help="version of the coefficients that --fit writes")
    chosen = parser.parse_args(arguments)
    device = tg.devices.get(chosen.device) if chosen.device else device_of(chosen.path)
    found = Measured.read(chosen.path, device)
    if chosen.fit:
        fitted(found, chosen.version).save(chosen.fit)
        print(f"coefficients: {chosen.fit}", file=sys.stderr)
    body, gains = judged(found)
    if chosen.json:
        print_json(body)
    else:
        shown(body, gains, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
