"""What an engine or a session may be told, as frozen values: its memory, its policy, where it runs, who plans."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import taskgraph as tg
from taskgraph.errors import PlanError, RequestError
from taskgraph.models.paged import COLUMNS
from taskgraph.serving.requests import number, whole

Planner = Callable[[tg.Graph, "str | tg.Device"], tg.Plan]
"""(graph, device) -> its plan; a `tg.KnownPlans` is one."""


def planner_of(planner: str | Planner) -> Planner:
    """The planner itself, or `tg.plan` with the scheduler of that name."""
    return partial(tg.plan, scheduler=planner) if isinstance(planner, str) else planner


@dataclass(frozen=True, slots=True)
class KvMemory:
    """The pages of an engine's KV cache, each of `page_size` tokens: `pages` on the device, and the tiers behind it,
    `host_pages` and `disk_pages` in the folder `disk`. RequestError when they contradict each other."""

    pages: int
    host_pages: int = 0
    disk: Path | None = None
    disk_pages: int = 0
    page_size: int = 32

    def __post_init__(self) -> None:
        for name in ("pages", "host_pages", "disk_pages", "page_size"):
            whole(name, getattr(self, name))
        good = self.pages >= 1 and self.host_pages >= 0 and (self.disk is None) == (self.disk_pages < 1)
        if not good or self.page_size < 1 or self.page_size % COLUMNS:
            raise RequestError(
                f"{self.pages} pages of {self.page_size} tokens, {self.host_pages} on the host, {self.disk_pages} in "
                f"{self.disk}: give at least one page, a multiple of {COLUMNS} tokens, and a folder if and only if "
                "there are pages on disk."
            )


@dataclass(frozen=True, slots=True)
class Policy:
    """Which requests an engine lets in, and when.

    `expected_output` is how many tokens a request gives, to begin with; the engine goes on to learn it. Without it a
    request is let in when there is room for its max_tokens, so that none is ever pre-empted. With `prefix_sharing`
    prompts that begin alike share pages. `most_waiting` requests may wait; one more is refused.
    """

    prefix_sharing: bool = True
    expected_output: float | None = None
    most_waiting: int = 100_000

    def __post_init__(self) -> None:
        if self.expected_output is not None:
            number("expected_output", self.expected_output, 0.0, 1e12, "how many tokens a request gives")
        whole("most_waiting", self.most_waiting, 0)


@dataclass(frozen=True, slots=True)
class Warm:
    """How an engine is made ready: steps are planned and captured for about `within_s` seconds, and for one that holds
    any batch however long that takes. `tell` hears how many are ready, of how many."""

    within_s: float = math.inf
    tell: Callable[[int, int], None] | None = None


WARM = Warm()
"""All steps, however long they take."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a model runs: `device` is "cpu", "gpu" for this machine's, or a virtual one ("virtual:h100_sxm"), which
    computes on the CPU what a GPU would. With several `ranks` each is a process that holds its share of every layer, or
    with `whole_experts` whole experts."""

    device: str = "cpu"
    ranks: int = 1
    whole_experts: bool = False

    def __post_init__(self) -> None:
        whole("ranks", self.ranks, 1)
        if self.whole_experts and self.ranks < 2:
            raise PlanError("experts are shared out between ranks, and there is one; choose 2 ranks or more.")

    @property
    def backend(self) -> str:
        """The backend, as for `tg.compile`."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def run_on(self) -> str | None:
        """The device, as for `tg.compile`: None for this machine's own."""
        return None if self.device in ("cpu", "gpu") else self.device
