"""Plan, Timeline, Bounds, Verdict: the values that the plan stage hands on. They carry no callables."""

import gc
import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

from taskgraph.cache import write_atomically
from taskgraph.errors import DeviceError, PlanError
from taskgraph.graph.device import Device, Geometry, Partition
from taskgraph.graph.graph import Graph
from taskgraph.schedule.nanobatch import UNSPLIT, Split, apply

SCHEMA = 3
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Lane:
    """One stream in partition `partition` of geometry `geometry`; its steps run in order."""

    geometry: int
    partition: int


@dataclass(frozen=True, slots=True)
class Step:
    """Run `op` on lane number `lane` when its lane is free and the steps numbered in `waits` have ended.

    `waits` holds earlier steps of other lanes; order within a lane needs no wait. `sms` is the number of SMs that
    the op is launched on, at most those of the lane's partition; 0 means all of them.
    """

    op: str
    lane: int
    waits: tuple[int, ...] = ()
    sms: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """One op on one lane from `start_s` to `end_s`."""

    op: str
    lane: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans with where they come from. `kind` is "simulated", "measured" or "published"; `origin` names
    the device and calibration, the machine, or the source."""

    kind: str
    origin: str
    spans: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        return max((s.end_s for s in self.spans), default=0.0) - min((s.start_s for s in self.spans), default=0.0)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds on the makespan of any plan, in seconds, by what binds.

    `proved_s` is what the exact scheduler proves about all plans of the graph together; 0 where it did not run."""

    chain_s: float
    sm_s: float
    hbm_s: float
    h2d_s: float
    d2h_s: float
    link_s: float
    proved_s: float = 0.0

    @property
    def best_s(self) -> float:
        soft_s = max(self.hbm_s, self.h2d_s, self.d2h_s, self.link_s)
        return max(self.chain_s, self.sm_s, soft_s, self.proved_s)

    @property
    def binding(self) -> str:
        """The name of the largest bound: chain, sm, hbm, h2d, d2h, link or proved."""
        return max(asdict(self).items(), key=lambda item: item[1])[0].removesuffix("_s")


@dataclass(frozen=True, slots=True)
class Period:
    """A repeated body as a loop: `count` iterations end `seconds` after each other on average.

    prologue_s is the end of the first iteration and epilogue_s what follows the end of the last, so that
    prologue_s + (count - 1) * seconds + epilogue_s is the makespan. `overlap` is how many iterations are under way
    at a time in the middle: 1.0 when each starts as the one before it ends.
    """

    count: int
    seconds: float
    prologue_s: float
    epilogue_s: float
    overlap: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Packed or sequential, and by how much. `error_band` is relative: a gain inside it is no win."""

    choice: str
    packed_s: float
    sequential_s: float
    error_band: float
    kind: str = "simulated"

    @property
    def gain(self) -> float:
        """Sequential over packed time."""
        return self.sequential_s / self.packed_s if self.packed_s else 1.0


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an activation lives in the arena, in bytes."""

    tensor: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule of one graph on one device. `graph` is the fingerprint of the graph it was made for;
    steps name the ops of that graph, split by `split`, written out (`Graph.flat()`), in an order that respects every
    wait. `period` is there when the graph repeats a body."""

    graph: str
    graph_name: str
    device: Device
    geometries: tuple[Geometry, ...]
    lanes: tuple[Lane, ...]
    steps: tuple[Step, ...]
    arena: tuple[Slot, ...]
    arena_bytes: int
    timeline: Timeline
    bounds: Bounds
    verdict: Verdict
    made_by: str
    split: Split = UNSPLIT
    period: Period | None = None
    schema: int = SCHEMA

    @property
    def makespan_s(self) -> float:
        return self.timeline.makespan_s

    @property
    def gap(self) -> float:
        """Makespan over the best lower bound; 1.0 is proven optimal."""
        return self.makespan_s / self.bounds.best_s

    def sliced(self, graph: Graph) -> Graph:
        """The graph whose ops the steps name, from the one that the plan was made for."""
        return apply(graph, self.split) if self.split.parts and graph.fingerprint == self.graph else graph

    def partition(self, lane: int) -> Partition:
        """The partition that lane number `lane` is bound to."""
        where = self.lanes[lane]
        return self.geometries[where.geometry].partitions[where.partition]

    def sms(self, step: int) -> int:
        """The SMs that step number `step` is launched on."""
        return self.steps[step].sms or self.partition(self.steps[step].lane).sm_count

    def to_json(self) -> str:
        """Text that `Plan.from_json` reads back into an equal plan."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote; PlanError if it is not one or has another schema version."""
        try:
            body = json.loads(text)
            if body.get("schema") != SCHEMA:
                raise PlanError(
                    f"plan file has schema {body.get('schema')!r}; this version reads {SCHEMA}. Plan again."
                )
            return _plan_from_json(body)
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, DeviceError) as error:
            raise PlanError(f"not a plan file: {error!r}. Write it with Plan.save().") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan that `save` wrote; PlanError names the file when it cannot be read."""
        try:
            return Plan.from_json(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"cannot read plan file {str(path)!r}: {error.strerror}.") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's cycle collector rests: what planning makes and drops has no cycles, and a large graph's millions of
    objects would be walked again and again for nothing."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def rows(kind: type[R], count: int, *columns: Iterable[Any]) -> tuple[R, ...]:
    """`count` values of a frozen slotted dataclass from its columns: what a million calls of it make, ten times faster,
    because slots are filled a column at a time and no line of Python runs for a row."""
    made = tuple(map(kind.__new__, repeat(kind, count)))
    for field, column in zip(fields(kind), columns, strict=True):  # type: ignore[arg-type]
        deque(map(getattr(kind, field.name).__set__, made, column), maxlen=0)
    return made


def _plan_from_json(body: dict[str, Any]) -> Plan:
    timeline = body["timeline"]
    return Plan(
        graph=body["graph"],
        graph_name=body["graph_name"],
        device=Device.from_dict(body["device"]),
        geometries=tuple(Geometry(tuple(Partition(**p) for p in g["partitions"])) for g in body["geometries"]),
        lanes=tuple(Lane(**lane) for lane in body["lanes"]),
        steps=tuple(Step(s["op"], s["lane"], tuple(s["waits"]), s["sms"]) for s in body["steps"]),
        arena=tuple(Slot(**slot) for slot in body["arena"]),
        arena_bytes=body["arena_bytes"],
        timeline=Timeline(timeline["kind"], timeline["origin"], tuple(Span(**s) for s in timeline["spans"])),
        bounds=Bounds(**body["bounds"]),
        verdict=Verdict(**body["verdict"]),
        made_by=body["made_by"],
        split=Split.from_json(body["split"]["parts"]),
        period=Period(**body["period"]) if body["period"] else None,
    )
