"""Prompts beside what decodes: when an engine takes its two kinds of work apart, and the batches of prompts that are
under way then.

The engine's own batches go on as ever, without prompts; batches of prompts run beside them, on the other partition of
the split, some of them ahead in a queue. A sequence whose prompt has ended joins the engine's batches when its first
token is known. The split changes, and all goes on together, only when no batch of prompts is under way.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from taskgraph.serving.batch import Batch
from taskgraph.serving.runners.runner import ApartRunner, Runner
from taskgraph.serving.sampling import Chances, Ints
from taskgraph.serving.scheduler import RUNNING, TOGETHER, Scheduler
from taskgraph.serving.ways import Load, Split


class Prompts(NamedTuple):
    """A batch of prompts that has ended."""

    batch: Batch
    samples: Ints
    chances: Chances | None


class Apart:
    """Takes the work of a scheduler apart where its runner can run two batches at once and predicts that it pays."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner if isinstance(runner, ApartRunner) else None
        self._scheduler = scheduler
        self.split: Split | None = None
        """The split in use."""
        self._size, self._until_s = 0, 0.0
        self._under_way: deque[Batch] = deque()
        self._go = self._steered = self._stuck = False
        self.launched = self.ended = 0
        """Batches of prompts so far."""

    @property
    def under_way(self) -> bool:
        """Whether a batch of prompts was launched and not waited for."""
        return bool(self._under_way)

    def choose(self) -> int | None:
        """Decide how the next batches run. The most tokens of prefill in a batch of both kinds; None: no limit."""
        runner, scheduler = self._runner, self._scheduler
        if runner is None or runner.ways is None:
            return None
        load = self.load(runner.ways.step_tokens)
        way = runner.ways.choose(load, self.split)
        wanted = way.split if scheduler.can_part and not self._stuck else None
        self._go = wanted is not None
        if wanted != self.split and self._under_way and self._waits_longer(load):
            self._go = False
        elif wanted is None:
            scheduler.together()
            self.split = None
        else:
            scheduler.apart, self.split, self._size = True, wanted, way.prefill
        self._stuck = False
        return way.prefill

    def _waits_longer(self, load: Load) -> bool:
        """Whether a decode step on its part of the device ends sooner than one on the whole of it that begins when the
        prompts under way have ended, by prediction."""
        runner = self._runner
        assert runner is not None and runner.ways is not None
        if not load.decode or self._scheduler.crowded:
            return False
        part_s, _ = runner.ways.apart_s(self.split, load.decode, load.context, self._size)
        whole_s, _ = runner.ways.apart_s(None, load.decode, load.context, self._size)
        return part_s < whole_s + max(self._until_s - runner.now() - part_s, 0.0)  # a step runs now

    def load(self, step_tokens: int) -> Load:
        """What decodes and what waits."""
        s = self._scheduler
        here = (s.state == RUNNING) & (s.side == TOGETHER) & (s.known - s.computed == 1) & (s.known < s.limit)
        count = int(np.count_nonzero(here))
        return Load(count, float(s.known[here].mean()) if count else 0.0, s.waiting_tokens(4 * step_tokens))

    def launch(self) -> None:
        """Launch the batches of prompts that may be under way now."""
        runner, scheduler = self._runner, self._scheduler
        if runner is None or not self._go or self.split is None:
            return
        while len(self._under_way) < runner.besides and not self._steered:
            batch = scheduler.form_beside(self._size)
            if batch is None:
                self._stuck = not self._under_way  # no page is left for them: only pre-emption makes room
                return
            self._steered = scheduler.steers_any(batch)  # the host draws, from what the next batch would overwrite
            runner.launch_beside(scheduler.steer(batch), self.split)
            self._under_way.append(batch)
            self.launched += 1
            self._until_s = max(self._until_s, runner.now()) + self._seconds(batch)

    def _seconds(self, batch: Batch) -> float:
        """What a batch of prompts is predicted to take."""
        runner = self._runner
        assert runner is not None and runner.ways is not None
        load = self.load(0)
        return runner.ways.apart_s(self.split, load.decode, load.context, batch.prefill)[1]

    def finished(self, wait: bool) -> Iterator[Prompts]:
        """The batches of prompts that have ended; with `wait` at least one, if there is one."""
        runner = self._runner
        while runner is not None and self._under_way and (wait or runner.beside_ended()):
            wait = False
            batch = self._under_way.popleft()  # also when it failed
            self._steered = False
            samples, _ = runner.wait_beside()
            self.ended += 1
            yield Prompts(batch, samples, getattr(runner, "chances", None))
