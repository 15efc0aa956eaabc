"""Plan, Timeline, Bounds, Verdict: the values that the plan stage hands on. They carry no callables."""

import gc
import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

from taskgraph.cache import write_atomically
from taskgraph.errors import PlanError
from taskgraph.graph.device import Device, Geometry, Partition
from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.record import Typed, as_path, decode, read_text, shown

SCHEMA = 3
KINDS = ("simulated", "measured", "published")
"""Where times come from."""
CHOICES = ("packed", "sequential")
TUNED = "autotune: "
"""How `made_by` begins where the verdict compares runs, and not the plan's own timeline."""


@dataclass(frozen=True, slots=True)
class Lane(Typed, error=PlanError):
    """One stream in partition `partition` of geometry `geometry`; its steps run in order."""

    geometry: int
    partition: int


@dataclass(frozen=True, slots=True)
class Step(Typed, error=PlanError):
    """Run `op` on lane number `lane` when its lane is free and the steps numbered in `waits` have ended.

    `waits` holds earlier steps of other lanes; order within a lane needs no wait. `sms` is the number of SMs that
    the op is launched on, at most those of the lane's partition; 0 means all of them.
    """

    op: str
    lane: int
    waits: tuple[int, ...] = ()
    sms: int = 0


@dataclass(frozen=True, slots=True)
class Span(Typed, error=PlanError):
    """One op on one lane from `start_s` to `end_s`."""

    op: str
    lane: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline(Typed, error=PlanError):
    """Spans with where they come from. `kind` is "simulated", "measured" or "published"; `origin` names
    the device and calibration, the machine, or the source."""

    kind: str
    origin: str
    spans: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        return max((s.end_s for s in self.spans), default=0.0) - min((s.start_s for s in self.spans), default=0.0)


@dataclass(frozen=True, slots=True)
class Bounds(Typed, error=PlanError):
    """Lower bounds on the makespan of any plan, in seconds, by what binds.

    `proved_s` is what the exact scheduler proves about all plans of the graph together; 0 where it did not run.
    `power_s` is what the best of the others takes at the clocks that the device's power leaves it; 0 where it leaves it
    full clocks."""

    chain_s: float
    sm_s: float
    hbm_s: float
    h2d_s: float
    d2h_s: float
    link_s: float
    proved_s: float = 0.0
    power_s: float = 0.0

    _LATER: ClassVar[frozenset[str]] = frozenset({"proved_s", "power_s"})

    @property
    def best_s(self) -> float:
        soft_s = max(self.hbm_s, self.h2d_s, self.d2h_s, self.link_s)
        return max(self.chain_s, self.sm_s, soft_s, self.proved_s, self.power_s)

    @property
    def binding(self) -> str:
        """The name of the largest bound: chain, sm, hbm, h2d, d2h, link, proved or power."""
        return max(asdict(self).items(), key=lambda item: item[1])[0].removesuffix("_s")


@dataclass(frozen=True, slots=True)
class Period(Typed, error=PlanError):
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
class Verdict(Typed, error=PlanError):
    """Packed or sequential, and by how much. `error_band` is the relative error of a time, `gain_band` that of the
    gain: a gain inside it is no win. None in plans from before it, whose error_band said both."""

    choice: str
    packed_s: float
    sequential_s: float
    error_band: float
    kind: str = "simulated"
    gain_band: float | None = None

    _LATER: ClassVar[frozenset[str]] = frozenset({"gain_band"})

    @property
    def band(self) -> float:
        """The relative error of the gain."""
        return self.error_band if self.gain_band is None else self.gain_band

    @property
    def sure_gain(self) -> float:
        """The gain at the lower edge of its band."""
        return self.gain / (1.0 + self.band)

    @property
    def gain(self) -> float:
        """Sequential over packed time."""
        return self.sequential_s / self.packed_s if self.packed_s else 1.0


@dataclass(frozen=True, slots=True)
class Slot(Typed, error=PlanError):
    """Where an activation lives in the arena, in bytes."""

    tensor: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Collective(Typed, error=PlanError):
    """The collective `op` goes over the network of the plan's device by `algorithm`."""

    op: str
    algorithm: str


@dataclass(frozen=True, slots=True)
class Plan(Typed, error=PlanError):
    """A schedule of one graph on one device. `graph` is the fingerprint of the graph it was made for;
    steps name the ops of that graph, split by `split`, written out (`Graph.flat()`), in an order that respects every
    wait. `period` is there when the graph repeats a body. `collectives` says of each collective between ranks, in the
    steps' order, how it goes over the network that the device names; () where it names none. `seal` is what `sealed`
    puts there; a plan that is made by hand may do without."""

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
    seal: str = ""
    collectives: tuple[Collective, ...] = ()

    _LATER: ClassVar[frozenset[str]] = frozenset({"schema", "seal", "collectives"})

    @property
    def makespan_s(self) -> float:
        return self.timeline.makespan_s

    @property
    def gap(self) -> float:
        """Makespan over the best lower bound; 1.0 is proven optimal, and what a plan without bounds has."""
        return self.makespan_s / self.bounds.best_s if self.bounds.best_s else 1.0

    @property
    def ran(self) -> bool:
        """Whether its verdict compares runs of plans; else it compares what the cost model says."""
        return self.verdict.kind != "simulated" or self.made_by.startswith(TUNED)

    def partition(self, lane: int) -> Partition:
        """The partition that lane number `lane` is bound to."""
        try:
            where = self.lanes[lane]
            return self.geometries[where.geometry].partitions[where.partition]
        except (IndexError, TypeError) as error:
            raise PlanError(f"the plan has no lane {shown(lane)} in a partition; it has {len(self.lanes)}.") from error

    def sms(self, step: int) -> int:
        """The SMs that step number `step` is launched on."""
        try:
            here = self.steps[step]
        except (IndexError, TypeError) as error:
            raise PlanError(f"the plan has no step {shown(step)}; it has {len(self.steps)}.") from error
        return here.sms or self.partition(here.lane).sm_count

    def to_json(self) -> str:
        """Text that `Plan.from_json` reads back into an equal plan."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote; PlanError if it is not one or has another schema version."""
        return decode(Plan, text, PlanError, "plan file", "Plan again.", SCHEMA)

    def digest(self) -> str:
        """A digest of all that the plan says, but for the seal."""
        made = hashlib.blake2b(digest_size=12)
        spans = self.timeline.spans
        if self.device.network is not None:
            made.update(repr((self.device.network, self.collectives)).encode())
        for part in (
            (self.graph, self.graph_name, self.device, self.geometries, self.lanes, self.arena_bytes, self.schema),
            (
                self.timeline.kind,
                self.timeline.origin,
                self.bounds,
                self.verdict,
                self.made_by,
                self.split,
                self.period,
            ),
            *(list(map(attrgetter(column), self.steps)) for column in ("op", "lane", "waits", "sms")),
            *(list(map(attrgetter(column), self.arena)) for column in ("tensor", "offset", "nbytes")),
            *(list(map(attrgetter(column), spans)) for column in ("op", "lane")),
        ):
            made.update(repr(part).encode())
        for column in ("start_s", "end_s"):
            made.update(array("d", map(attrgetter(column), spans)).tobytes())
        return made.hexdigest()

    def sealed(self) -> "Plan":
        """The plan with a seal, its digest: whoever makes a plan, or changes one on purpose, seals it, and `verify`
        refuses a plan that changed since."""
        return replace(self, seal=self.digest())

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all; PlanError when it cannot be written."""
        with writing(path) as place:
            write_atomically(place, self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan that `save` wrote; PlanError names the file when it cannot be read."""
        text = read_text(path, PlanError, "plan file")
        try:
            return Plan.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


@contextmanager
def writing(path: object) -> Iterator[Path]:
    """PlanError for what goes wrong while a file is written; what stood there before is still there."""
    place = as_path(path, PlanError, "file to write")
    try:
        yield place
    except OSError as error:
        raise PlanError(f"cannot write {str(place)!r}: {error.strerror}. Choose another place.") from error
    except ValueError as error:  # a path with a NUL
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"cannot write {str(place)!r}: {error}. Choose another place.") from error


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
