"""The body of `taskgraph calibrate`: fit, tell the errors, write the file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from taskgraph.cost.calibrate import Errors, calibrate
from taskgraph.cost.fitted import Calibration
from taskgraph.cost.interference import TableError, table_errors
from taskgraph.cost.measurements import read
from taskgraph.graph.device import get


@dataclass(frozen=True, slots=True)
class Report:
    """What a calibration found. `families` holds (name, formula alone, with correction), errors on held-out shapes."""

    calibration: Calibration
    families: tuple[tuple[str, Errors, Errors], ...]
    interference: tuple[TableError, ...]


def run(
    tables: list[Path], device: str, out: Path, version: int, source: str, licence: str, progress: Callable[[str], None]
) -> Report:
    """Calibrate `device` from tables and write its coefficient file; CalibrationError or DeviceError when it cannot."""
    seen: list[tuple[str, Errors, Errors]] = []

    def heard(name: str, plain: Errors, corrected: Errors) -> None:
        progress(name)
        seen.append((name, plain, corrected))

    made = calibrate(read(tables), get(device), {"data": source, "licence": licence}, version, heard)
    made.save(out)
    return Report(made, tuple(seen), tuple(table_errors(made.response.by_resource())))
