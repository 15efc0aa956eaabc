"""What `taskgraph gpu-check` found on one GPU: the rows of its tables, its file, and the same rows as CSV.

The tables have the columns of the measurements that the co-running model was made from; `watts` and `sm_mhz` stand at
the end, empty where no energy counter was read. All times are seconds; `kind` says whether they are measured.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from taskgraph.errors import CalibrationError
from taskgraph.graph.device import Device
from taskgraph.record import decode, read_text

SCHEMA = 3
WHAT, WAY_OUT = "gpu-check report", "Run `taskgraph gpu-check` again."
_LONGEST_S, _SHORTEST_S = 1e3, 1e-7
"""No kernel and no step takes longer or shorter: such a number is in another unit."""


class _Row:
    """A row of a table: its integers count something, and its times are those of kernels and steps."""

    __slots__: tuple[str, ...] = ()

    def _check(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise CalibrationError(f"{name} is {value}; it must be at least 1")
            if _is_time(name) and not _SHORTEST_S <= value <= _LONGEST_S:
                raise CalibrationError(f"{name} is {value}; it must be seconds from {_SHORTEST_S:g} to {_LONGEST_S:g}")


def _is_time(name: str) -> bool:
    return name.endswith("_s") or name == "seconds"


@dataclass(frozen=True, slots=True)
class GemmTime(_Row):
    """A product of (m, k) and (n, k) transposed, weights from beyond the L2."""

    m: int
    n: int
    k: int
    seconds: float
    watts: float | None = None
    sm_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class KernelTime(_Row):
    """One kernel alone in a partition of `sms` SMs."""

    kernel: str
    sms: int
    seconds: float
    watts: float | None = None
    sm_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class PairTime(_Row):
    """Two kernels at once: on two streams of the whole device (`mode` "shared"), or in two partitions ("partition").
    `a_beside_b_s` is the time of a while b never stops."""

    a: str
    b: str
    mode: str
    sms_a: int
    sms_b: int
    a_alone_s: float
    b_alone_s: float
    a_beside_b_s: float
    b_beside_a_s: float
    watts: float | None = None
    sm_mhz: float | None = None

    def _check(self) -> None:
        if self.mode not in ("shared", "partition"):
            raise CalibrationError(f"mode is {self.mode!r}; it is shared or partition")
        _Row._check(self)


@dataclass(frozen=True, slots=True)
class GapTime(_Row):
    """One launch in a chain of one kernel's on a lane: begun at the end of the launch before, and begun while that
    runs, for which it waits by itself (programmatic dependent launch)."""

    kernel: str
    after_end_s: float
    dependent_s: float


@dataclass(frozen=True, slots=True)
class KernelRate(_Row):
    """One kernel on the whole device, how it was run (`choice`), and its rate in words."""

    kernel: str
    shape: str
    choice: str
    seconds: float
    rate: str
    watts: float | None = None
    sm_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class PlanTime(_Row):
    """A whole plan, predicted and measured; `plan` and `graph` name its files beside the tables."""

    plan: str
    graph: str
    made_by: str
    partitions: str
    lanes: int
    predicted_s: float
    measured_s: float
    watts: float | None = None
    sm_mhz: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it says, whether it holds, and what was seen. One that this driver cannot be `asked` neither
    holds nor fails."""

    name: str
    passed: bool
    seen: str
    asked: bool = True


@dataclass(frozen=True, slots=True)
class Overlap:
    """Whether two ops gain from running together, as autotune saw it; seconds are of the report's kind where plans of
    the pair were `compared`, else they are predictions."""

    pair: str
    compared: bool
    choice: str
    packed_s: float
    sequential_s: float
    error_band: float
    reason: str


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a run: "done", "partly" when its time was over, "failed" with the error's text, or "to do"."""

    name: str
    state: str
    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class GpuReport:
    """All that a run found. `kind` says what every time and rate in it is: "measured" or "simulated"."""

    kind: str
    device: Device
    capability: str
    driver_version: int
    compute_capability: tuple[int, int]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    sections: tuple[Section, ...] = ()
    checks: tuple[Check, ...] = ()
    calibration: Mapping[str, float] | None = None
    gemm: tuple[GemmTime, ...] = ()
    kernels_by_sms: tuple[KernelTime, ...] = ()
    corun: tuple[PairTime, ...] = ()
    kernels: tuple[KernelRate, ...] = ()
    plans: tuple[PlanTime, ...] = ()
    gaps: tuple[GapTime, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    seconds: float = 0.0

    _LATER: ClassVar[frozenset[str]] = frozenset({"gaps"})
    TABLES: ClassVar[tuple[str, ...]] = ("gemm", "kernels_by_sms", "corun", "kernels", "plans", "gaps")

    def _check(self) -> None:
        if self.kind not in ("measured", "simulated"):
            raise CalibrationError(f"kind is {self.kind!r}; it is measured or simulated")
        for name, rate in (self.calibration or {}).items():
            if not 0 < rate < math.inf:
                raise CalibrationError(f"calibration {name!r} is {rate}; it must be finite and above 0")

    @property
    def passed(self) -> bool:
        """Whether no section failed and every check that was asked holds."""
        return all(c.passed for c in self.checks if c.asked) and all(s.state != "failed" for s in self.sections)

    def to_json(self) -> str:
        """The text of the file, a row a line."""
        body = {"schema": SCHEMA, **asdict(self)}
        lines = [f" {json.dumps(key)}: {_lines(value)}" for key, value in body.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def tables(self) -> Mapping[str, str]:
        """File name -> its CSV text, for every table that has rows."""
        return {f"{name}.csv": table_text(getattr(self, name)) for name in self.TABLES if getattr(self, name)}


def _lines(value: Any) -> str:
    """JSON with the entries of a list on a line each."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def table_text(rows: Sequence[Any]) -> str:
    """CSV of rows of one kind; seconds with five digits, what is not known empty."""
    names = [f.name for f in fields(rows[0])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(name, getattr(row, name)) for name in names] for row in rows)
    return text.getvalue()


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if _is_time(name):
        return f"{value:.4e}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def read_report(path: str | Path) -> GpuReport:
    """The report in a file; CalibrationError, with file, line and way out, when it is none: cut off, of another schema,
    or with a number that no measurement gives."""
    text = read_text(path, CalibrationError, WHAT)
    try:
        return decode(GpuReport, text, CalibrationError, WHAT, WAY_OUT, SCHEMA)
    except CalibrationError as error:
        line = _line_of(text, str(error))
        raise CalibrationError(f"{path}{f', line {line}' if line else ''}: {error}") from None


def _line_of(text: str, error: str) -> int:
    """The line of the entry that an error of `decode` names by its path, in a file as `to_json` writes it; 0 in others,
    or where it names none, or the line itself."""
    table, *inner = error.removeprefix(f"not a {WHAT}: ").split(" ")[0].split(".")
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith(f' "{table}": ')), -1)
    if inner and inner[0].isdecimal() and at >= 0 and lines[at].endswith("["):
        at += 1 + int(inner[0])
        at = at if at < len(lines) and lines[at].startswith("  {") and lines[at].endswith(("}", "},")) else -1
    return at + 1
