"""The profile database: measured op times, and how they win over the formulas.

A time belongs to a `Platform` (device, machine, driver, library versions, backend) and to an `OpKey` (kind, shapes,
dtypes); times of different platforms are never mixed. Planning reads those of a platform once, into a dict, and
interpolates there.
"""

import math
import os
import sqlite3
import time
import uuid
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from taskgraph import cache
from taskgraph.cost.model import Costs, OpTable, op_table
from taskgraph.errors import ProfileError, TaskgraphError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import ROWS, Op, Tensor, seen_inputs
from taskgraph.record import Typed, as_path, instance

Points = tuple[tuple[int, float, float], ...]
"""(SMs, median seconds, spread in seconds), SMs rising. Seconds are of the op alone, launch included."""

_SHORTEST_S = 1e-9
"""What is left, at least, of a measured time after the device's launch is taken off."""

TIMELESS = frozenset({"eps", "theta", "out_dtype", ROWS})
"""Attributes that do not change an op's time, or that its shapes and dtypes say; so are those that begin "scaling_"."""


class Measured(Protocol):
    """Seconds of an op alone on `sms` SMs, launch included; None where nothing near it was measured."""

    def __call__(self, op: Op, tensors: Mapping[str, Tensor], sms: int) -> float | None: ...


class OpKey(NamedTuple):
    """Ops of equal keys take equal times: kind, shapes with the attributes that matter, dtypes."""

    kind: str
    shape: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Platform(Typed, error=ProfileError):
    """Where op times were measured. `machine` is a fingerprint of the hardware, `driver` "none" for a CPU."""

    device: str
    machine: str
    driver: str
    versions: str
    backend: str


@dataclass(frozen=True, slots=True)
class OpTime(Typed, error=ProfileError):
    """`count` repeats of an op alone on `sms` SMs; `spread_s` is half their interquartile range."""

    key: OpKey
    sms: int
    median_s: float
    spread_s: float
    count: int

    def _check(self) -> None:
        good = math.isfinite(self.median_s) and self.median_s > 0 and math.isfinite(self.spread_s)
        if not good or self.spread_s < 0 or self.sms < 1 or self.count < 1:
            raise ProfileError(
                f"{self.key.kind} {self.key.shape}: {self.count} repeats on {self.sms} SMs with median "
                f"{self.median_s} s and spread {self.spread_s} s is no measurement; times are finite and positive."
            )


def shape_key(op: Op, tensors: Mapping[str, Tensor]) -> OpKey:
    """The key of an op: "64x576 w576x1536 -> 64x1536 transpose_w=True"; a w marks a weight, which backends may pack."""
    ins, outs = seen_inputs(op, tensors), [tensors[n] for n in op.outputs]
    attrs = [f"{k}={v}" for k, v in op.attrs if k not in TIMELESS and not k.startswith("scaling_")]
    if op.kind == "call":  # a custom op may do anything: its declared work tells apart what its shapes do not
        attrs.append("work=" + ",".join(f"{x:g}" for x in op.work.vector))
    shape = " ".join([*map(_shape, ins), "->", *map(_shape, outs), *attrs])
    return OpKey(op.kind, shape, f"{','.join(t.dtype for t in ins)}->{','.join(t.dtype for t in outs)}")


def _shape(tensor: Tensor) -> str:
    return ("w" if tensor.role == "weight" else "") + ("x".join(map(str, tensor.shape)) or "scalar")


# ------------------------------------------------------------------------------------ interpolation


def interpolate(points: Points, sms: int) -> float | None:
    """Seconds on `sms` SMs between measured points, None outside them.

    Linear in the logarithms: between two points t = c * sms**-a, which is exact for work that scales with its SMs
    (a = 1) and for work that does not (a = 0), passes through every point and is monotone between neighbours.
    """
    at = bisect_left(points, sms, key=lambda point: point[0])
    if at == len(points):
        return None
    high_sms, high_s, _ = points[at]
    if high_sms == sms:
        return high_s
    if at == 0:
        return None
    low_sms, low_s, _ = points[at - 1]
    part = math.log(sms / low_sms) / math.log(high_sms / low_sms)
    return low_s * math.pow(high_s / low_s, part)


def points_of(times: Iterable[OpTime]) -> dict[OpKey, Points]:
    """The times of each op as points."""
    found: dict[OpKey, dict[int, tuple[int, float, float]]] = {}
    for row in times:
        found.setdefault(row.key, {})[row.sms] = (row.sms, row.median_s, row.spread_s)
    return {key: tuple(points[sms] for sms in sorted(points)) for key, points in found.items()}


@dataclass(frozen=True, slots=True)
class Profile:
    """The measured times of one platform, in memory. It is a `Measured`."""

    times: Mapping[OpKey, Points]

    def points(self, op: Op, tensors: Mapping[str, Tensor]) -> Points:
        """What was measured for an op like this one."""
        return self.times.get(shape_key(op, tensors), ())

    def __call__(self, op: Op, tensors: Mapping[str, Tensor], sms: int) -> float | None:
        return interpolate(self.points(op, tensors), sms)


def measured_costs(profile: Profile, base: Costs = op_table) -> Costs:
    """Price every op and SM count by `profile` where it has points around it, by `base` elsewhere.

    The price of an op on some SMs depends on nothing else that is asked for, so that plans, replays and bounds agree.
    `sources` says "measured" where all of an op's prices are, and names both where some are. An op that takes longer
    than `base` says keeps its SMs for longer, it does not leave them idle; one that is faster than its traffic allows
    had part of it from a cache, so it draws what the device has and no more.
    """

    def costs(graph: Graph, device: Device, sizes: Sequence[int]) -> OpTable:
        table = base(graph, device, sizes)
        if not profile.times:
            return table
        seconds, rates, band, sources = table.seconds.copy(), table.rates.copy(), table.band.copy(), [*table.sources]
        most = (device.hbm_bytes_per_s, device.h2d_bytes_per_s, device.d2h_bytes_per_s, device.link_bytes_per_s)
        tensors = graph.tensor
        for i, op in enumerate(graph.ops):
            points = profile.points(op, tensors)
            found = [interpolate(points, size) for size in sizes] if points else []
            priced = np.array([t is not None for t in found], bool)
            if not priced.any():
                continue
            known = seconds[i].copy()
            times = np.array([t for t in found if t is not None])
            known[priced] = np.maximum(times - device.launch_seconds, _SHORTEST_S)
            rates[i, priced] = np.minimum(rates[i, priced] * (seconds[i] / known)[priced, None], most)
            seconds[i] = known
            spread = max(spread_s / median_s for _, median_s, spread_s in points)
            band[i] = spread if priced.all() else max(spread, band[i])
            sources[i] = "measured" if priced.all() else f"measured and {sources[i]}"
        return replace(table, seconds=seconds, rates=rates, band=band, sources=tuple(sources))

    return costs


# ----------------------------------------------------------------------------------------- database

_APPLICATION_ID = 0x7467_7072  # "tgpr": tells our files from other SQLite databases
_BUSY_S = 30.0

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE op_times (
        device TEXT NOT NULL, machine TEXT NOT NULL, driver TEXT NOT NULL, versions TEXT NOT NULL,
        backend TEXT NOT NULL, kind TEXT NOT NULL, shape TEXT NOT NULL, dtype TEXT NOT NULL, sms INTEGER NOT NULL,
        count INTEGER NOT NULL, median_s REAL NOT NULL, spread_s REAL NOT NULL, measured_at REAL NOT NULL,
        PRIMARY KEY (device, machine, driver, versions, backend, kind, shape, dtype, sms)
    ) WITHOUT ROWID
    """,
)
"""Statement i brings a file from schema i to i + 1; the schema is the file's user_version."""

_FILE = "profiles.sqlite3"
_PLATFORM = "device = ? AND machine = ? AND driver = ? AND versions = ? AND backend = ?"


class ProfileDB:
    """Measured op times in one SQLite file, by default in the user's data folder.

    Every call opens and closes its own connection, so a ProfileDB may be shared by threads and survive a fork, and
    any number of processes may write at once: the file is in WAL mode and a batch is one transaction, all or nothing.
    ProfileError when the file is damaged, foreign, of a newer version, or cannot be written. The default one is in
    memory where no folder can be written at all.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = _default_path() if path is None else as_path(path, ProfileError, "profile database")
        self._default = path is None
        self._memory = ""
        if self._default and not os.access(self.path.parent, os.W_OK):
            self._memory = f"file:taskgraph-{uuid.uuid4().hex}?mode=memory&cache=shared"
            held = sqlite3.connect(self._memory, uri=True, check_same_thread=False)
            weakref.finalize(self, held.close)  # it is there as long as this

    def beside(self, *parts: str) -> Path:
        """The path of another file of the same home."""
        return cache.place(*parts, data=True) if self._default else self.path.parent.joinpath(*parts)

    def record(self, platform: Platform, rows: Iterable[OpTime]) -> int:
        """Store a batch; of two times of an op on a platform and as many SMs the newer stays. Returns its size."""
        now = time.time()
        home = _home(platform)
        rows = list(rows) if isinstance(rows, Iterable) else [rows]
        for row in rows:
            instance("a row of record()", row, OpTime, ProfileError)
        batch = [(*home, *r.key, r.sms, r.count, r.median_s, r.spread_s, now) for r in rows]
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(f"INSERT OR REPLACE INTO op_times VALUES ({', '.join('?' * 13)})", batch)
            connection.execute("COMMIT")
        return len(batch)

    def table(self, platform: Platform) -> dict[OpKey, Points]:
        """All times of a platform in one read, by op; for `Profile`."""
        query = f"SELECT kind, shape, dtype, sms, median_s, spread_s FROM op_times WHERE {_PLATFORM} ORDER BY sms"
        home = _home(platform)
        found: dict[OpKey, list[tuple[int, float, float]]] = {}
        with self._connection() as connection:
            for kind, shape, dtype, sms, median_s, spread_s in connection.execute(query, home):
                try:
                    row = OpTime(OpKey(kind, shape, dtype), sms, median_s, spread_s, 1)
                except ProfileError as error:
                    text = f"profile database {str(self.path)!r} is damaged: {error}"
                    raise ProfileError(f"{text} Move it away; times will be measured anew.") from None
                found.setdefault(row.key, []).append((row.sms, row.median_s, row.spread_s))
        return {key: tuple(points) for key, points in found.items()}

    def platforms(self) -> tuple[Platform, ...]:
        """Every platform that has times here."""
        query = "SELECT DISTINCT device, machine, driver, versions, backend FROM op_times ORDER BY 1, 2, 3, 4, 5"
        with self._connection() as connection:
            return tuple(Platform(*row) for row in connection.execute(query))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection to a file of our schema, made or brought up to date if need be; its errors are ProfileErrors."""
        try:
            if not self._memory:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            file, named = self._memory or self.path, bool(self._memory)
            connection = sqlite3.connect(file, timeout=_BUSY_S, isolation_level=None, uri=named)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                self._bring_up_to_date(connection)
                yield connection
            finally:
                connection.close()
        except sqlite3.OperationalError as error:
            raise ProfileError(
                f"profile database {str(self.path)!r} cannot be used: {_said(error)}. Make it writable, or "
                "give another path."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ProfileError(
                f"profile database {str(self.path)!r} is damaged: {_said(error)}. Move it away; times will "
                "be measured anew."
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            if isinstance(error, TaskgraphError):
                raise
            why = getattr(error, "strerror", None) or error
            raise ProfileError(
                f"profile database {str(self.path)!r} cannot be opened: {why}. Give another path."
            ) from error

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        if _schema(connection) == len(_MIGRATIONS):
            return
        connection.execute("BEGIN IMMEDIATE")  # one process migrates, the others wait here and find it done
        found = _schema(connection)
        if found > len(_MIGRATIONS):
            raise ProfileError(
                f"profile database {str(self.path)!r} has schema {found}; this version knows {len(_MIGRATIONS)}. "
                "Upgrade taskgraph, or give another path."
            )
        if found == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ProfileError(f"{str(self.path)!r} is a database, but not one of profiles. Give another path.")
        for step in _MIGRATIONS[found:]:
            connection.execute(step)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        connection.execute("COMMIT")


def _default_path() -> Path:
    """The file in the user's data folder; where it cannot be written, a copy of it that can."""
    own, path = cache.user_folder(data=True) / _FILE, cache.place(_FILE, data=True, change=True)
    if path != own and not path.exists() and os.access(own, os.R_OK):
        with cache.keeping("profiles", path):
            cache.write_atomically(path, own.read_bytes())
    return path


def _said(error: sqlite3.Error) -> str:
    """What SQLite said, in one line: it quotes the statement that it found."""
    return " ".join(ascii(str(error))[1:-1].replace("\\n", " ").split())[:200]


def _home(platform: Platform) -> tuple[str, str, str, str, str]:
    instance("the platform", platform, Platform, ProfileError)
    return (platform.device, platform.machine, platform.driver, platform.versions, platform.backend)


def _schema(connection: sqlite3.Connection) -> int:
    """The file's schema; 0 when it is new or not ours."""
    ours = connection.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID
    return int(connection.execute("PRAGMA user_version").fetchone()[0]) if ours else 0
