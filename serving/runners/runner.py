"""What executes the engine's batches: the one seam between the engine and a backend."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import taskgraph as tg
from taskgraph.models.paged import Bucket
from taskgraph.serving.scheduler import Batch, Ints


class Runner(Protocol):
    """Executes one batch at a time, in the order of `launch`.

    One that has logits also has `chances`, the `sampling.Chances` of the batch that was waited for last, or None."""

    @property
    def planned(self) -> int:
        """Steps planned and captured so far; more of them while serving mean buckets that were not warm."""
        ...

    def warm(self) -> None:
        """Plan and capture now what batches will need."""
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
        """The samples of the batch launched last, and when it ended; -1 where logits have no likeliest."""
        ...

    def sleep_until(self, at_s: float) -> None:
        """Let the clock reach `at_s`; there is nothing to run before it."""
        ...

    def close(self) -> None:
        """Free everything."""
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


def ladder(most: int) -> tuple[int, ...]:
    """Bucket sizes up to `most`: powers of two and, from 16 on, the halves between them."""
    sizes = [0, *(2**i for i in range(5)), *(n for i in range(4, 24) for n in (3 << (i - 1), 1 << (i + 1)))]
    return (*(n for n in sizes if n < most), most)
