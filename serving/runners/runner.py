"""What executes the engine's batches: the one seam between the engine and a backend."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import taskgraph as tg
from taskgraph.models.paged import Bucket
from taskgraph.serving.batch import Batch
from taskgraph.serving.sampling import Ints

if TYPE_CHECKING:
    from taskgraph.serving.ways import Split, Ways

T = TypeVar("T")
Tell = Callable[[int, int], None]


class Runner(Protocol):
    """Executes one batch at a time, in the order of `launch`.

    One that has logits also has `chances`, the `sampling.Chances` of the batch that was waited for last, or None. One
    with a true `ahead` feeds samples to the next batch by itself: a batch whose `fed` tokens are samples of the one
    launched last may be launched before that one is waited for, where none of both is steered."""

    @property
    def planned(self) -> int:
        """Steps planned and captured so far; more of them while serving mean buckets that were not warm."""
        ...

    def warm(self, within_s: float = math.inf, tell: Tell | None = None) -> None:
        """Plan and capture now what batches will need, and no more of it later: after about so many seconds batches
        make do with what there is. `tell` hears how many steps are ready, of how many."""
        ...

    def check(self) -> None:
        """Raise, while no batch runs, if none can run any more."""
        ...

    def now(self) -> float:
        """Seconds on the runner's clock: this machine's, or a simulated one."""
        ...

    def launch(self, batch: Batch) -> None:
        """Start a batch and return at once."""
        ...

    def wait(self) -> tuple[Ints, float]:
        """The samples of the batch launched first of those not waited for, and when it ended; -1 where logits have no
        likeliest."""
        ...

    def sleep_until(self, at_s: float) -> None:
        """Let the clock reach `at_s`; there is nothing to run before it."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@runtime_checkable
class ApartRunner(Protocol):
    """A runner that can run a batch of prompts beside a batch that decodes, each in its partition of a split.

    A batch of one side that is launched in another split than the last one of the other side, or in none (`launch`),
    begins when that one has ended."""

    ways: "Ways | None"
    """What chooses how a load runs; None where all batches are of both kinds."""
    besides: int
    """Batches of prompts that may be under way."""

    def launch_beside(self, batch: Batch, split: "Split") -> None:
        """Start a batch of prompts in its partition, behind those that were started before, and return at once. What
        decodes is launched in the other partition of the same split meanwhile (`launch_in`)."""
        ...

    def launch_in(self, batch: Batch, split: "Split") -> None:
        """As `launch`, in the partition that decodes."""
        ...

    def now(self) -> float:
        """As of `Runner`."""
        ...

    def beside_ended(self) -> bool:
        """Whether the batch of prompts launched first of those not waited for has ended, without waiting."""
        ...

    def wait_beside(self) -> tuple[Ints, float]:
        """As `wait`, for batches of prompts."""
        ...


class PagedRunner(Runner, Protocol):
    """A runner with host pages that a disk tier can read and write, also while a batch runs."""

    def read_page(self, page: int) -> bytes:
        """The bytes of a host page in every layer."""
        ...

    def write_page(self, page: int, data: bytes) -> None:
        """Give a host page these bytes; ValueError if they are not as many as a page has."""
        ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that ended: its bucket, and the measured seconds from its launch until its samples were known; None where
    a clock says nothing, as on a virtual device."""

    bucket: Bucket
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of a bucket's steps, and the kind of every op in it."""

    plan: tg.Plan
    kinds: Mapping[str, str]


@runtime_checkable
class PlanRunner(Protocol):
    """A runner whose steps are plans, and that tells which."""

    dtype: str
    last: Ran | None

    def planned_step(self, bucket: Bucket) -> Planned | None:
        """The plan of the bucket's steps, also while one runs; None if it cannot be had any more."""
        ...


def prepare_in_time(buckets: Sequence[T], prepare: Callable[[T], bool], within_s: float, tell: Tell | None) -> None:
    """Prepare the first of them, and others in their order while it looks as if there is time for one more, and
    `prepare` says that there is room."""
    begin_s = time.perf_counter()
    for i, bucket in enumerate(buckets):
        if i and (time.perf_counter() - begin_s) * (i + 1) / i > within_s:
            break
        room = prepare(bucket)
        if tell is not None:
            tell(i + 1, len(buckets))
        if not room:
            break
