"""Tables of kernel measurements: CSV (plain or gzipped) or Parquet, one row a shape; checked, then shape rows.

A table is known by its columns, not by its file name. `milliseconds` is the median time of one kernel launch,
`system` the device; the rest are the columns of a Family.
"""

import csv
import gzip
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taskgraph.cost.families import FAMILIES
from taskgraph.cost.family import Column, Family
from taskgraph.errors import CalibrationError

_LONGEST_MS, _SHORTEST_MS = 1e6, 1e-4
_TIME = Column("milliseconds")
_SUFFIXES = (".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Measurements:
    """Measured kernels of one family: `systems` (n,) device names, `shapes` (n, fields of the family's `shape`),
    `seconds` (n,), and `keys` (n,), a hash of the shape in [0, 1), the same on every device."""

    family: Family
    systems: np.ndarray
    shapes: np.ndarray
    seconds: np.ndarray
    keys: np.ndarray

    def where(self, mask: np.ndarray) -> "Measurements":
        """The rows that `mask` picks."""
        return Measurements(self.family, self.systems[mask], self.shapes[mask], self.seconds[mask], self.keys[mask])


def read(paths: str | Path | Iterable[str | Path]) -> tuple[Measurements, ...]:
    """Every table under `paths` (files or folders), one Measurements a family; CalibrationError when one is bad."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files = [file for path in given for file in _files(Path(path))]
    if not files:
        raise CalibrationError(f"no table in {', '.join(map(str, given))}; give {', '.join(_SUFFIXES)} files.")
    found: dict[str, list[Measurements]] = {}
    for file in files:
        table = read_table(file)
        found.setdefault(table.family.name, []).append(table)
    return tuple(_joined(tables) for tables in found.values())


def products(system: str, shapes: Sequence[tuple[int, int, int]], seconds: Sequence[float]) -> Measurements:
    """Products of bf16 by their (m, n, k) as the table of their family."""
    rows = np.array([(*shape, 2.0) for shape in shapes], dtype=np.float64).reshape(-1, 4)
    keys = np.array([_hash(row) for row in rows.tolist()])
    systems = np.array([system] * len(rows))
    return Measurements(FAMILIES["gemm"], systems, rows, np.asarray(seconds, dtype=np.float64), keys)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES))
    if not path.is_file():
        raise CalibrationError(f"there is no table {str(path)!r}.")
    return [path]


def _joined(tables: Sequence[Measurements]) -> Measurements:
    parts = [(t.systems, t.shapes, t.seconds, t.keys) for t in tables]
    return Measurements(tables[0].family, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def read_table(path: Path) -> Measurements:
    """One table; CalibrationError with the row and the column of what is wrong with it."""
    columns = _columns(path)
    family = _family(path, columns)
    checked = {column.name: _checked(path, column, columns[column.name]) for column in (*family.columns, _TIME)}
    _check_time(path, checked[_TIME.name])
    shapes = family.shapes_of(checked)
    keys = np.array([_hash(shape) for shape in shapes.tolist()])
    systems = np.array([str(cell) for cell in columns["system"]])
    return Measurements(family, systems, shapes, checked[_TIME.name] * 1e-3, keys)


def _columns(path: Path) -> Mapping[str, list[object]]:
    try:
        if path.name.endswith(".parquet"):
            return _parquet(path)
        with gzip.open(path, "rt", newline="") if path.name.endswith(".gz") else path.open(newline="") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error, EOFError) as error:
        raise CalibrationError(f"{path.name}: cannot be read as a table: {error}.") from error
    if len(rows) < 2:
        raise CalibrationError(f"{path.name}: the table is empty; it needs a header and at least one row.")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise CalibrationError(
                f"{path.name}: row {number} has {len(row)} cells, but the header names {len(rows[0])} columns."
            )
    return {name: list(cells) for name, cells in zip(rows[0], zip(*rows[1:], strict=True), strict=True)}


def _parquet(path: Path) -> Mapping[str, list[object]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path.name}: Parquet needs pyarrow: pip install 'taskgraph-gpu[calibrate]'."
        ) from error
    try:
        columns: Mapping[str, list[object]] = parquet.read_table(path).to_pydict()
    except ArrowInvalid as error:
        raise CalibrationError(f"{path.name}: cannot be read as a table: {error}.") from error
    if not columns or not next(iter(columns.values())):
        raise CalibrationError(f"{path.name}: the table is empty; it needs at least one row.")
    return columns


def _family(path: Path, columns: Mapping[str, object]) -> Family:
    measured = {name: {column.name for column in family.columns} for name, family in FAMILIES.items() if family.columns}
    for name, wanted in measured.items():
        if wanted <= set(columns):
            if lacking := {"system", "milliseconds"} - set(columns):
                raise CalibrationError(f"{path.name}: column {sorted(lacking)[0]!r} is missing.")
            return FAMILIES[name]
    near = max(measured, key=lambda name: len(measured[name] & set(columns)))
    missing = sorted(measured[near] - set(columns))
    raise CalibrationError(
        f"{path.name}: no known table has these columns; as {near} it lacks column {missing[0]!r} "
        f"(it needs {', '.join(column.name for column in FAMILIES[near].columns)}, system, milliseconds)."
    )


def _checked(path: Path, column: Column, cells: Sequence[object]) -> np.ndarray:
    """The numbers of a column; CalibrationError names the first cell that is none of them."""
    if column.word is not None:
        return np.array([_word(path, column, row, str(cell)) for row, cell in enumerate(cells)])
    try:
        numbers = np.array(cells, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array([_number(cell) for cell in cells])
    low = 0.0 if column.zero else np.nextafter(0.0, 1.0)
    wrong = ~(np.isfinite(numbers) & (numbers >= low))
    if wrong.any():
        row = int(wrong.argmax())
        need = "a number >= 0" if column.zero else "a positive number"
        raise CalibrationError(
            f"{path.name}: row {row + 2}, column {column.name!r} is {cells[row]!r}; it must be {need}."
        )
    return numbers


def _word(path: Path, column: Column, row: int, word: str) -> float:
    made = None if column.word is None else column.word(word)
    if made is None:
        raise CalibrationError(f"{path.name}: row {row + 2}, column {column.name!r} is {word!r}; it is {column.words}.")
    return made


def _number(cell: object) -> float:
    try:
        return float(str(cell))
    except ValueError:
        return math.nan


def _check_time(path: Path, milliseconds: np.ndarray) -> None:
    """No kernel takes under 100 ns or over 1000 s: such a number was not in milliseconds."""
    wrong = (milliseconds < _SHORTEST_MS) | (milliseconds > _LONGEST_MS)
    if wrong.any():
        row = int(wrong.argmax())
        raise CalibrationError(
            f"{path.name}: row {row + 2}, column 'milliseconds' is {milliseconds[row]:g}; a kernel takes "
            f"{_SHORTEST_MS:g} to {_LONGEST_MS:g} ms. Are the units mixed?"
        )


def _hash(shape: Sequence[float]) -> float:
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32
