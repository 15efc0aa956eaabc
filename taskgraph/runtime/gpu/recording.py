"""The capture of a plan: from an origin stream it forks to every lane by events, runs each op on its lane, and joins
all lanes.

A kernel that waits by itself for the kernel before it on its lane may be launched while that one runs (programmatic
dependent launch): its wait ends when that one has ended and its memory is seen. As that one waited for the kernel
before it, and ended only then, all that precedes it has ended too. What follows anything else, an event of another lane
or a copy, starts after its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from taskgraph.runtime.gpu import captures, driver
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.kinds import CopyLaunch, Launch, Launches
from taskgraph.runtime.gpu.on_stream import named_error
from taskgraph.runtime.gpu.torch_memory import TorchPool
from taskgraph.runtime.turns import in_op
from taskgraph.schedule.plan import Plan

Entry = Launches | Callable[[Any], None]
"""What a step runs: launches that are made already, or a function of the lane's stream."""
Marks = Sequence[tuple[Any, Any]]
"""Events before and behind every step."""


@dataclass(slots=True)
class Recorded:
    """A capture that has ended: the nodes of each step, and those that may start before the kernel before them has
    ended, by our choice or, in a step that is a function, by that of its library."""

    capture: captures.Capture
    owners: list[list[int]] = field(default_factory=list)
    early: set[int] = field(default_factory=set)


class Recorder:
    """Records plans on the lanes of an executable."""

    def __init__(self, gpu: Gpu, plan: Plan, origin: Any, pool: TorchPool) -> None:
        self._gpu, self._plan, self._origin, self._pool = gpu, plan, origin, pool

    def record(self, streams: Sequence[Any], bound: Sequence[Entry], marks: Marks | None = None) -> Recorded:
        """Capture all steps, each on its lane's stream, with events around every step where there are `marks`."""
        steps = self._plan.steps
        wanted = {wait for step in steps for wait in step.waits}
        done: dict[int, Any] = {}
        made = Recorded(captures.Capture(self._origin))
        dependent = self._alone(bound) if self._gpu.dependent else set()
        try:
            fork = self._mark(self._origin)
            entered: dict[int, Sequence[int]] = {}
            for i, (step, entry) in enumerate(zip(steps, bound, strict=True)):
                stream = streams[step.lane]
                if step.lane not in entered:
                    self._wait(stream, fork)
                for wait in step.waits:
                    self._wait(stream, done[wait])
                if marks:
                    captures.record_external(marks[i][0], stream)
                before = entered.get(step.lane, ()) if step.lane in dependent else None
                made.owners.append(self._run(step.op, entry, stream, before, made.early))
                entered[step.lane] = made.owners[-1]
                if marks:
                    captures.record_external(marks[i][1], stream)
                if i in wanted:
                    done[i] = self._mark(stream)
            for lane in sorted(entered):
                self._wait(self._origin, self._mark(streams[lane]))
            made.capture.end()
        except BaseException:
            made.capture.close()
            raise
        return made

    def _alone(self, bound: Sequence[Entry]) -> set[int]:
        """The lanes with no other lane of kernels in their partition: blocks that wait hold room, which those others
        could use."""
        lanes = {
            step.lane
            for step, entry in zip(self._plan.steps, bound, strict=True)
            if callable(entry) or not all(isinstance(one, CopyLaunch) for one in entry)
        }
        places = {lane: (self._plan.lanes[lane].geometry, self._plan.lanes[lane].partition) for lane in lanes}
        return {lane for lane, place in places.items() if list(places.values()).count(place) == 1}

    def _mark(self, stream: Any) -> Any:
        event = self._gpu.event()
        with driver.driver_errors("record an event"):
            stream.record(event)
        return event

    def _wait(self, stream: Any, event: Any) -> None:
        with driver.driver_errors("wait for an event"):
            stream.wait(event)

    def _run(self, op: str, entry: Entry, stream: Any, before: Sequence[int] | None, early: set[int]) -> list[int]:
        """Launch one step; the nodes it became, of which some go to `early`. `before` are the nodes of the step before
        on the lane; None where none may start early."""
        try:
            if callable(entry):
                known = set(captures.captured_handles(stream))
                with in_op(), self._pool.used():
                    entry(stream)
                made = [node for node in captures.captured_handles(stream) if node not in known]
                early.update(made)
                return made
            return self._launched(entry, stream, before, early)
        except Exception as error:
            raise named_error(op, error, stream) from error

    def _launched(self, entry: Launches, stream: Any, before: Sequence[int] | None, early: set[int]) -> list[int]:
        """The nodes of launches, of which each may start early that waits for one kernel of its lane alone."""
        nodes: list[int] = []
        last = captures.last_nodes(stream) if before else ()
        kernel = len(last) == 1 and last[0] in (before or ()) and captures.is_kernel(last[0])
        for launch in entry:
            follows = kernel and isinstance(launch, Launch) and self._gpu.follows(launch)
            send(self._gpu, launch, stream, follows)
            last = captures.last_nodes(stream)
            early.update(last if follows else ())
            nodes += last
            kernel = before is not None and isinstance(launch, Launch)
        return nodes


def send(gpu: Gpu, launch: Launch | CopyLaunch, stream: Any, dependent: bool = False) -> None:
    """Launch or capture one of a step's launches."""
    if isinstance(launch, CopyLaunch):
        driver.copy_on(stream, launch.target, launch.source, launch.nbytes)
    else:
        gpu.send(stream, launch, dependent)


def run_now(gpu: Gpu, op: str, entry: Entry, stream: Any, pool: TorchPool, faults: Callable[[], None]) -> None:
    """Run one step outside any capture, wait for it, and look at its `faults`."""
    try:
        if callable(entry):
            with in_op(), pool.used():
                entry(stream)
        else:
            for launch in entry:
                send(gpu, launch, stream)
        stream.sync()
        faults()
    except Exception as error:
        raise named_error(op, error, None) from error
