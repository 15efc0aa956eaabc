"""The serving engine: requests in, tokens out, whatever runs the batches.

A step forms the next batch while the one before runs, then waits for that one, feeds its tokens to the next, launches
it, and hands out the tokens while it runs. A runner that feeds tokens by itself is given the next batch before that
wait, so that the device never waits for the host. So the host's work hides behind the device's; a sequence that ends by
a stop token is noticed one step late, which costs one token. Where it pays, prompts run beside (see `apart`).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace

import numpy as np

from taskgraph.errors import ExecutionError, RequestError
from taskgraph.models.paged import PageShape
from taskgraph.serving.apart import Apart
from taskgraph.serving.batch import Batch, Taken
from taskgraph.serving.cache.disk import DiskTier
from taskgraph.serving.cache.pages import PagedCache, block_keys
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.requests import (
    CANCELLED,
    FAILED,
    LENGTH,
    STOP,
    Chance,
    Completion,
    Request,
    StepOutput,
    checked,
    number,
    whole,
)
from taskgraph.serving.runners.runner import ApartRunner, PagedRunner, Runner
from taskgraph.serving.sampling import Chances, Ints
from taskgraph.serving.scheduler import FREE, Limits, Scheduler, Waiting
from taskgraph.serving.steering import Steer

_NONE = np.empty(0, np.int64)
_NOTHING = StepOutput(_NONE, _NONE)
_STEP_RAISED = "a step raised; the engine dropped what it had."


@dataclass(slots=True)
class Stats:
    """Counts and seconds since the engine began, on its runner's clock; `ahead` steps were launched before the samples
    of the one before were known, `beside` are those of prompts alone that ran beside others, and `hidden_s` is the part
    of the host's work `host_s` that ran beside a step."""

    steps: int = 0
    beside: int = 0
    ahead: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    host_s: float = 0.0
    hidden_s: float = 0.0


class Engine(AbstractContextManager["Engine"]):
    """Serves requests by continuous batching over a runner and a paged cache."""

    def __init__(
        self,
        runner: Runner,
        cache: PagedCache,
        limits: Limits,
        *,
        vocabulary: int,
        policy: Policy | None = None,
    ) -> None:
        self.runner, self.cache, self.limits, self.policy = runner, cache, limits, policy or Policy()
        self.scheduler = Scheduler(
            limits, cache, prefix_sharing=self.policy.prefix_sharing, expected_output=self.policy.expected_output
        )
        self.stats = Stats()
        self.apart = Apart(runner, self.scheduler)
        self.vocabulary = vocabulary
        self._numbers = itertools.count()
        self._arrived: deque[Waiting] = deque()
        self._cancelled: deque[int] = deque()
        self._running: Batch | None = None
        self._steered = False
        """Whether the batch formed last has sequences that are steered."""
        self._under_way = 0
        """Batches that were launched and not waited for."""
        self._failed = ""
        self._first_s = np.full(limits.sequences, np.nan)

    @property
    def most_tokens(self) -> int:
        """The most tokens of a prompt and its answer that can be served: the context's, or all of a smaller cache."""
        return min(self.limits.context, self.cache.device.pages * self.cache.page_size)

    @property
    def running(self) -> int:
        """Requests that have a sequence, on the device or parked."""
        return int((self.scheduler.state != FREE).sum())

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._arrived) + len(self.scheduler.waiting)

    # -- for clients, from any thread ----------------------------------------------------------------

    def submit(self, request: Request, arrival_s: float | None = None) -> int:
        """Queue a request; returns its number. RequestError when it can never be served, or too many wait."""
        request = checked(request, self.limits.context, self.vocabulary)
        prompt = np.asarray(request.prompt)
        need = -(-(len(prompt) + request.max_tokens) // self.cache.page_size)
        if need > self.cache.device.pages:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens {request.max_tokens} need {need} pages; the cache has "
                f"{self.cache.device.pages}. Lower max_tokens or give the engine more pages.",
                "max_tokens",
            )
        if request.logprobs is not None and not hasattr(self.runner, "chances"):
            kind = type(self.runner).__name__
            raise RequestError(f"logprobs is not supported by this engine: a {kind} has no logits.", "logprobs")
        if self.waiting >= self.policy.most_waiting:
            raise RequestError(f"{self.policy.most_waiting} requests wait already; try again later.")
        keys = block_keys(prompt, self.cache.page_size) if self.scheduler.prefix_sharing else []
        arrival = self.runner.now() if arrival_s is None else number("arrival_s", arrival_s, -1e18, 1e18, "seconds")
        waiting = Waiting(next(self._numbers), request, prompt, arrival, keys, steer=Steer.of(request))
        self._arrived.append(waiting)
        return waiting.number

    def cancel(self, number: int) -> None:
        """End a request in the next step; nothing happens if it has ended."""
        self._cancelled.append(whole("the number of a request", number))

    # -- the loop ------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        scheduler = self.scheduler
        waits = self._arrived or scheduler.waiting or scheduler.refused
        return bool(waits or self._running or self.apart.under_way or (scheduler.state != FREE).any())

    def step(self) -> StepOutput:
        """Launch the next batch, and hand out what the one before gave.

        What the runner raises is raised here, and what was under way is lost: until `abort` every later step is an
        ExecutionError."""
        if self._failed:
            raise ExecutionError(f"a step has failed ({self._failed}); abort() ends its requests and clears up.")
        try:
            return self._step()
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            raise

    def _step(self) -> StepOutput:
        begin = self.runner.now()
        ended = self._admit()
        given = self._joined(wait=False)
        batch = self.scheduler.form(self.apart.choose())
        before, ahead = self._running, self._ahead(batch)
        if batch is not None and ahead:
            self._launch(batch)
            self.stats.ahead += 1
        self._launch_beside()
        waited = self.runner.now()
        samples, chances = None, None
        if before is not None:
            self._running = None  # also when it failed
            self._under_way -= 1
            samples, ended_s = self.runner.wait()
            chances = getattr(self.runner, "chances", None)
            self.cache.landed(before.moves)
            self.stats.hidden_s += max(min(waited, ended_s) - begin, 0.0)
        launched = self.runner.now()
        if batch is not None and not ahead:
            if samples is not None:
                # a sequence that got none has ended, as will be noticed when this batch runs
                batch.tokens[batch.fed] = np.clip(samples[batch.source], 0, self.vocabulary - 1)
                batch = replace(batch, fed=_NONE, source=_NONE)
            batch = self.scheduler.steer(batch)
            self._launch(batch)
        elif batch is None and before is None:
            given += self._joined(wait=True)
            self.cache.settle()  # nothing runs: all that waits, waits for the disk
        self._running = batch
        if before is not None and samples is not None:
            given.append(self._take(before, samples, chances))
            self.scheduler.ended((self.stats.steps - self._under_way, self.apart.ended))
        done = self.runner.now()
        self.stats.host_s += waited - begin + done - launched
        self.stats.hidden_s += done - launched if batch is not None else 0.0
        output = together(given)
        return replace(output, finished=(*ended, *output.finished)) if ended else output

    def _joined(self, wait: bool) -> list[StepOutput]:
        """Take what batches of prompts gave that have ended, and let their sequences decode."""
        given = []
        for batch, samples, chances in self.apart.finished(wait):
            self.scheduler.join(batch)
            given.append(self._take(batch, samples, chances))
            self.scheduler.ended((self.stats.steps - self._under_way, self.apart.ended))
        return given

    def _launch_beside(self) -> None:
        self.apart.launch()
        self.stats.beside = self.apart.launched
        self.scheduler.launched = (self.stats.steps, self.apart.launched)

    def _ahead(self, batch: Batch | None) -> bool:
        """Whether the batch may be launched before the samples of the one that runs are known."""
        steered, self._steered = self._steered, batch is not None and self.scheduler.steers_any(batch)
        return self._running is not None and not steered and not self._steered and getattr(self.runner, "ahead", False)

    def _launch(self, batch: Batch) -> None:
        split, runner = self.apart.split, self.runner
        if split is not None and isinstance(runner, ApartRunner):
            runner.launch_in(batch, split)
        else:
            runner.launch(batch)
        self._under_way += 1
        self.stats.steps += 1
        self.scheduler.launched = (self.stats.steps, self.apart.launched)

    def run(self, requests: Iterable[Request] = ()) -> list[Completion]:
        """Serve `requests`, and all that was submitted before, to the end; completions by request number.

        One that fails has the reason "failed" and says why in `error`; ExecutionError, with the first of these, when
        not one request came to its end."""
        for request in requests:
            self.submit(request)
        finished: list[Completion] = []
        while self.busy:
            finished += self.step().finished
        finished.sort(key=lambda c: c.request)
        if finished and all(c.reason == FAILED for c in finished):
            raise ExecutionError(f"all of {len(finished)} requests failed; the first: {finished[0].error}")
        return finished

    def replay(self, trace: Sequence[tuple[float, Request]]) -> list[Completion]:
        """Serve (arrival, request) pairs in the order of arrival, each submitted when the clock reaches it."""
        finished: list[Completion] = []
        begin, coming = self.runner.now(), deque(sorted(trace, key=lambda pair: pair[0]))
        while coming or self.busy:
            while coming and begin + coming[0][0] <= self.runner.now():
                arrival, request = coming.popleft()
                self.submit(request, begin + arrival)
            if self.busy:
                finished += self.step().finished
            else:
                self.runner.sleep_until(begin + coming[0][0])
        return sorted(finished, key=lambda c: c.request)

    def abort(self) -> list[Completion]:
        """End every request with what it has and the reason "failed"; what clears up after a step that raised."""
        self._running, self._failed = None, ""
        while self._under_way:
            self._under_way -= 1
            with suppress(Exception):  # the step that raised has told its error, or will be followed by one that does
                self.runner.wait()
        self._drop_beside(quietly=True)
        seqs = np.flatnonzero(self.scheduler.state != FREE)
        ended = [self._end(seq, FAILED, _STEP_RAISED) for seq in seqs.tolist()]
        self.cache.forget()
        waiting, now = [*self.scheduler.waiting, *self._arrived], self.runner.now()
        self.scheduler.waiting.clear()
        self._arrived.clear()
        return ended + [Completion(w.number, (), FAILED, w.arrival_s, now, now, _STEP_RAISED) for w in waiting]

    # -- parts of a step -------------------------------------------------------------------------------

    def _admit(self) -> list[Completion]:
        """Take in what clients did since the last step; returns the requests that they cancelled."""
        while self._arrived:
            self.scheduler.waiting.append(self._arrived.popleft())
        now = self.runner.now()
        ended = [Completion(w.number, (), FAILED, w.arrival_s, now, now, error) for w, error in self.scheduler.refused]
        self.scheduler.refused.clear()
        while self._cancelled:
            number = self._cancelled.popleft()
            seqs = np.flatnonzero((self.scheduler.state != FREE) & (self.scheduler.number == number))
            if len(seqs):
                ended.append(self._end(int(seqs[0]), CANCELLED))
            for waiting in [w for w in self.scheduler.waiting if w.number == number]:
                self.scheduler.waiting.remove(waiting)
                ended.append(Completion(number, (), CANCELLED, waiting.arrival_s, now, now))
        return ended

    def _take(self, batch: Batch, samples: Ints, chances: Chances | None) -> StepOutput:
        scheduler = self.scheduler
        taken = scheduler.take(batch, samples, self.vocabulary)
        numbers = scheduler.number[taken.seqs]
        now = self.runner.now()
        fresh = taken.seqs[np.isnan(self._first_s[taken.seqs])]
        self._first_s[fresh] = now
        self.stats.tokens += len(taken.seqs)
        self.stats.prompt_tokens += batch.prefill
        told = {} if chances is None else self._told(taken, chances)
        ended = [self._end(seq, LENGTH) for seq in taken.full] + [self._end(seq, STOP) for seq in taken.stopped]
        ended += [self._end(seq, FAILED, error) for seq, error in taken.failed.items()]
        return StepOutput(numbers, taken.tokens, tuple(ended), told)

    def _told(self, taken: Taken, chances: Chances) -> dict[int, Chance]:
        """The chances of the tokens of a step's output, by their place in it; their sequences keep them too."""
        place = {sample: i for i, sample in enumerate(taken.samples.tolist())}
        told = {}
        for i, sample in enumerate(chances.samples.tolist()):
            at = place.get(sample)
            steer = None if at is None else self.scheduler.steers[int(taken.seqs[at])]
            if at is None or steer is None or steer.logprobs < 0:
                continue  # its sequence has ended
            top = zip(
                chances.top_tokens[i, : steer.logprobs].tolist(),
                chances.top_logprobs[i, : steer.logprobs].tolist(),
                strict=True,
            )
            told[at] = Chance(int(taken.tokens[at]), float(chances.logprobs[i]), tuple(top))
            steer.chances.append(told[at])
        return told

    def _end(self, seq: int, reason: str, error: str = "") -> Completion:
        """End a sequence, with the tokens that are known. The pages of one that failed are no other's to find."""
        scheduler, length = self.scheduler, int(self.scheduler.given[seq])
        tokens = tuple(scheduler.tokens[seq, scheduler.prompt[seq] : length].tolist())
        now, first_s = self.runner.now(), float(self._first_s[seq])
        self._first_s[seq] = np.nan
        steer = scheduler.steers[seq]
        waiting = scheduler.retire(seq, length, tainted=reason == FAILED)
        if reason in (LENGTH, STOP):
            scheduler.learn(len(tokens))
        return Completion(
            waiting.number, tokens, reason, waiting.arrival_s, now if np.isnan(first_s) else first_s, now, error,
            tuple(steer.chances) if steer is not None else (),
        )  # fmt: skip

    # -- life ------------------------------------------------------------------------------------------

    def _drop_beside(self, quietly: bool) -> None:
        """Wait for the batches of prompts under way, and go on together."""
        while self.apart.under_way:
            with suppress(Exception) if quietly else nullcontext():
                deque(self.apart.finished(wait=True), 0)
        self.scheduler.ended(self.scheduler.launched)
        self.scheduler.together()

    def close(self) -> None:
        """Wait for the batches that run and free everything; requests that have not ended are dropped."""
        self._running = None
        try:
            while self._under_way:
                self._under_way -= 1
                with suppress(Exception) if self._failed else nullcontext():  # a step has told its error already
                    self.runner.wait()
            self._drop_beside(quietly=bool(self._failed))
        finally:
            if self.cache.disk is not None:
                self.cache.disk.close()
            self.runner.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def together(outputs: Sequence[StepOutput]) -> StepOutput:
    """What several batches gave, as one."""
    if len(outputs) < 2:
        return outputs[0] if outputs else _NOTHING
    starts = np.cumsum([0, *(len(one.tokens) for one in outputs)]).tolist()
    return StepOutput(
        np.concatenate([one.requests for one in outputs]),
        np.concatenate([one.tokens for one in outputs]),
        tuple(c for one in outputs for c in one.finished),
        {first + i: chance for first, one in zip(starts, outputs, strict=False) for i, chance in one.chances.items()},
    )


def paged_engine(
    make: Callable[[PageShape], PagedRunner],
    limits: Limits,
    memory: KvMemory,
    vocabulary: int,
    policy: Policy | None = None,
) -> Engine:
    """An engine over the runner that `make` gives for these pages."""
    runner = make(PageShape(memory.pages, memory.page_size, limits.context, memory.host_pages))
    tier = None
    if memory.disk is not None:
        tier = DiskTier(memory.disk, memory.disk_pages, runner.read_page, runner.write_page)
    cache = PagedCache(memory.pages, memory.page_size, memory.host_pages, tier)
    return Engine(runner, cache, limits, vocabulary=vocabulary, policy=policy)
