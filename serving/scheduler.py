"""Continuous batching (Yu et al. 2022, "Orca") with chunked prefill (Agrawal et al. 2024, "Sarathi-Serve").

Sequences are entries of arrays, so that forming a batch costs a handful of numpy calls however many decode. A batch is
formed while the one before it runs: tokens that are still being computed are fed to it when they are known, and every
sequence is taken to go on, so one that ends by a stop token has a token too many in the batch after.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from taskgraph.errors import RequestError
from taskgraph.serving import sampling
from taskgraph.serving.batch import Batch, Taken
from taskgraph.serving.cache.pages import Key, Moves, PagedCache, Pages, block_keys
from taskgraph.serving.cache.parking import GONE, Parked
from taskgraph.serving.requests import MOST_STOPS, Request, whole
from taskgraph.serving.sampling import GREEDY_BELOW, Draws, Ints, uniforms
from taskgraph.serving.steering import Steer, edits_of

log = logging.getLogger("taskgraph.serve")
_WHY = {
    sampling.NO_TOKEN: "its logits are no finite numbers (NaN or infinity); check the weights, or compute in f32",
    sampling.NONE_LEFT: "its grammar and its biases leave no token that the model gives a chance",
}
FREE, RUNNING, SWAPPED, DROPPED = range(4)
"""States of an entry: no sequence, one on the device, one whose pages are parked, one that must be recomputed."""
TOGETHER, BESIDE, LAST = range(3)
"""Where a sequence is computed: in the batches of `form`; its prompt in those of `form_beside`; there too, and its last
chunk is under way, so that its next token is not known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a batch: sequences, tokens (decode first, the rest prefill), chunks of prefill; and the context."""

    sequences: int = 64
    tokens: int = 256
    chunks: int = 16
    context: int = 2048

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens", "chunks", "context"):
            whole(name, getattr(self, name))
        if min(self.sequences, self.chunks, self.context) < 1 or self.tokens <= self.sequences:
            raise RequestError(f"{self} leaves no room for prefill; tokens must exceed sequences, all at least 1.")


@dataclass(slots=True)
class Waiting:
    """A request that is not admitted yet."""

    number: int
    request: Request
    prompt: npt.NDArray[np.int32]
    arrival_s: float
    keys: list[Key] = field(default_factory=list)
    recalled: bool = False
    steer: Steer | None = None


class Scheduler:
    """The sequences that wait and that run, and the batches that they make."""

    def __init__(
        self, limits: Limits, cache: PagedCache, *, prefix_sharing: bool = True, expected_output: float | None = None
    ) -> None:
        self.limits, self.cache, self.prefix_sharing = limits, cache, prefix_sharing
        self.expected_output = expected_output
        n, blocks = limits.sequences, -(-limits.context // cache.page_size)
        self.waiting: deque[Waiting] = deque()
        """Requests that are not let in yet, the first to come first."""
        self.refused: list[tuple[Waiting, str]] = []
        """Requests that could not begin since the engine last looked, and why."""

        # One entry a sequence in all that follows, n = limits.sequences of them; `seq` is an index of them.
        self.requests: list[Waiting | None] = [None] * n
        """(n,) what each was let in for; None where there is no sequence."""
        self.state = np.full(n, FREE, np.int8)
        """(n,) int8: FREE, RUNNING, SWAPPED or DROPPED."""
        self.number = np.zeros(n, np.int64)
        """(n,) int64: the engine's number of its request."""
        self.order = np.zeros(n, np.int64)
        """(n,) int64: how many were let in before it; the last let in is the first to be pre-empted."""
        self.epoch = np.zeros(n, np.int64)
        """(n,) int64: sequences that had this index before, by which samples of an ended one are told."""
        self.tokens = np.zeros((n, limits.context + 1), np.int32)
        """(n, context + 1) int32: the prompt, then the answer."""
        self.prompt = np.zeros(n, np.int64)
        """(n,) int64, tokens: the length of the prompt."""
        self.limit = np.zeros(n, np.int64)
        """(n,) int64, tokens: the length of the prompt and max_tokens."""
        self.given = np.zeros(n, np.int64)
        """(n,) int64, tokens: the prompt and the answer as far as samples have come back; `tokens` holds these."""
        self.known = np.zeros(n, np.int64)
        """(n,) int64, tokens: the same with the sample of the batch that is formed or runs, which is yet to come."""
        self.computed = np.zeros(n, np.int64)
        """(n,) int64, tokens: those whose keys and values are in pages when the batches so far have run."""
        self.pending = np.full(n, -1, np.int64)
        """(n,) int64: which sample of the batch that was formed last is its next token; -1 for none."""
        self.blocks = np.zeros((n, blocks), np.int32)
        """(n, pages of a context) int32: its pages on the device, the first `held` entries."""
        self.held = np.zeros(n, np.int64)
        """(n,) int64, pages: how many it holds on the device."""
        self.keys: list[list[Key]] = [[] for _ in range(n)]
        """(n,) the keys of the full pages of its prompt, by which others find them; none without prefix sharing."""
        self.parked: list[Parked | None] = [None] * n
        """(n,) its pages on the host or on disk while it is SWAPPED."""
        self.stops = np.full((n, MOST_STOPS), -1, np.int64)
        """(n, MOST_STOPS) int64: the tokens that end it; -1 where there are fewer."""
        self.temperature = np.zeros(n)
        """(n,) float64: what logits are divided by; 0 draws the likeliest token."""
        self.top_p = np.zeros(n)
        """(n,) float64, a share of 1: tokens are cut to the fewest that have it together."""
        self.top_k = np.zeros(n, np.int64)
        """(n,) int64: tokens are cut to so many likeliest; 0 to none."""
        self.seed = np.zeros(n, np.uint64)
        """(n,) uint64: of its draws."""
        self.steers: list[Steer | None] = [None] * n
        """(n,) its biases, penalties, grammar and chances; None where it asks for none of them."""
        self.steered = np.zeros(n, bool)
        """(n,) bool: whether it has a Steer."""
        self.logprobs = np.full(n, -1, np.int64)
        """(n,) int64: how many likeliest tokens it is told the chances of with each token; -1 not even its own."""

        self.apart = False
        """Whether prompts are computed beside what decodes, in batches of their own (`form_beside`)."""
        self.side = np.full(n, TOGETHER, np.int8)
        """(n,) int8: TOGETHER, BESIDE or LAST."""
        self.crowded = False
        """Whether a sequence found no page while `apart`: pre-emption waits until all is together again."""
        self.launched = (0, 0)
        """Batches of `form` and of `form_beside` that were launched so far."""
        self._ended = self._parted = (0, 0)
        self._leaving: deque[tuple[tuple[int, int], Callable[[], None]]] = deque()

        self.preemptions = self.recomputed = 0
        self._admitted = 0

    # -- a batch ---------------------------------------------------------------------------------

    def form(self, prefill: int | None = None) -> Batch | None:
        """The next batch, as if the one before had ended, with at most so many tokens of prefill (None: as many as the
        limits allow), and none while `apart`; None when there is nothing to do."""
        pending = self.pending.copy()
        self.pending[:] = -1
        decoding = self._decoding()
        if self.apart:
            return self._batch(decoding, [], pending, Moves()) if len(decoding) else None
        budget = self.limits.tokens - len(decoding)
        chunks = self._chunks(budget if prefill is None else min(budget, max(prefill, 1)))
        moves = self.cache.take_moves()
        if not len(decoding) and not chunks and not moves:
            stuck = self.state == RUNNING
            if (pending >= 0).any() or not (stuck & (self.known - self.computed > 1)).any():
                return None
            # prompts hold every page and need more
            return self.form(prefill) if self._preempt() else None
        return self._batch(decoding, chunks, pending, moves)

    def form_beside(self, prefill: int) -> Batch | None:
        """The next batch of prompts alone, of at most so many tokens, to run beside what decodes; None when there are
        none, or no room for them. Its sequences decode when its samples are taken (`join`)."""
        chunks = self._chunks(min(prefill, self.limits.tokens))
        nothing = np.empty(0, np.int64)
        return self._batch(nothing, chunks, np.full_like(self.pending, -1), Moves()) if chunks else None

    def join(self, batch: Batch) -> None:
        """The samples of a batch of `form_beside` are known: those sequences whose prompts are done decode now."""
        mine = batch.owner[(batch.owner >= 0) & (self.epoch[batch.owner] == batch.epoch)]
        self.side[mine] = TOGETHER

    def together(self) -> None:
        """`form` takes all sequences from now on: its batches run when those of `form_beside` so far have ended."""
        if self.apart:
            self._parted = self.launched
        self.apart = self.crowded = False
        self.side[self.side == BESIDE] = TOGETHER

    def ended(self, batches: tuple[int, int]) -> None:
        """So many batches of `form` and of `form_beside` have ended: what left before they were launched, and only they
        may have read or written, is free."""
        self._ended = batches
        while self._leaving and _reached(batches, self._leaving[0][0]):
            self._leaving.popleft()[1]()

    @property
    def can_part(self) -> bool:
        """Whether prompts may be computed beside what decodes: no page has to move, which batches of both would do."""
        return not self.cache.host.pages and not self.cache.moves and not self.crowded

    def waiting_tokens(self, most: int) -> int:
        """Tokens of prompts that could be computed now, counted up to about `most`."""
        beside = self.side == BESIDE
        running = (self.state == RUNNING) & (beside | (self.known - self.computed > 1)) & (self.side != LAST)
        found = int((self.known - self.computed)[running].sum())
        room = self.limits.sequences - int(np.count_nonzero(self.state == RUNNING))
        away = (self.state == SWAPPED) | (self.state == DROPPED)
        if room and away.any():
            return found + int(self.known[away].min())
        for waiting in itertools.islice(self.waiting, room):
            if found >= most or not self._fits(waiting):
                break
            found += len(waiting.prompt)
        return found

    def _decoding(self) -> Ints:
        """Sequences with one token to compute, each with a page for it, if need be from those let in last. Those that
        have to wait for room on the host are left out."""
        while True:
            ready = (self.state == RUNNING) & (self.known - self.computed == 1) & (self.known < self.limit)
            seqs = np.flatnonzero(ready & (self.side == TOGETHER))
            short = seqs[self.computed[seqs] // self.cache.page_size >= self.held[seqs]]
            room = self.cache.device.available
            if len(short) <= room:
                break
            self.crowded = self.apart
            if self.apart or not self._preempt():
                seqs, short = np.setdiff1d(seqs, short[room:]), short[:room]
                break
        if len(short):
            self.blocks[short, self.held[short]] = self.cache.allocate(len(short))
            self.held[short] += 1
        return seqs

    def _chunks(self, budget: int) -> list[tuple[int, int, int]]:
        """(sequence, first, count) of the prompts' next tokens: of running ones, then of those that can be let in."""
        chunks: list[tuple[int, int, int]] = []
        beside = (self.side == BESIDE) & (self.known > self.computed)
        seqs = np.flatnonzero((self.state == RUNNING) & (beside | (self.known - self.computed > 1)))
        for seq in seqs[np.argsort(self.order[seqs])].tolist():
            budget -= self._chunk(seq, budget, chunks)
        while budget > 0 and len(chunks) < self.limits.chunks:
            seq = self._admit()
            if seq is None:
                break
            self.side[seq] = BESIDE if self.apart else TOGETHER
            budget -= self._chunk(seq, budget, chunks)
        return chunks

    def _chunk(self, seq: int, budget: int, chunks: list[tuple[int, int, int]]) -> int:
        """Append the next chunk of a sequence if it fits; returns its tokens."""
        size, first = self.cache.page_size, int(self.computed[seq])
        room = (int(self.held[seq]) + self.cache.device.available) * size - first
        count = min(int(self.known[seq]) - first, budget, room)
        if count <= 0 or len(chunks) == self.limits.chunks or self.state[seq] != RUNNING:
            return 0
        need = -(-(first + count) // size) - int(self.held[seq])
        if need > 0:
            self.blocks[seq, self.held[seq] : self.held[seq] + need] = self.cache.allocate(need)
            self.held[seq] += need
        chunks.append((seq, first, count))
        self._publish(seq, first // size, (first + count) // size)
        return count

    def _batch(self, seqs: Ints, chunks: list[tuple[int, int, int]], pending: Ints, moves: Moves) -> Batch:
        size, decode = self.cache.page_size, len(seqs)
        places = np.concatenate([self.computed[seqs], *(np.arange(f, f + n) for _, f, n in chunks)])
        owners = np.concatenate([seqs, *(np.full(n, seq) for seq, _, n in chunks)]).astype(np.int64)
        counts = np.array([n for _, _, n in chunks], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        last = np.concatenate([np.arange(decode), decode + starts[1:] - 1]).astype(np.int64)
        sequences = owners[last]
        lengths = places[last] + 1
        self.computed[sequences] = lengths
        whole = lengths == self.known[sequences]
        owner = np.where(whole, sequences, -1)
        self.known[sequences[whole]] += 1
        if self.apart and not decode:
            self.side[sequences] = np.where(whole, LAST, BESIDE)
        else:
            self.pending[sequences[whole]] = np.flatnonzero(whole)
        source = pending[sequences]
        feed = np.flatnonzero(whole & (source >= 0))
        return Batch(
            tokens=self.tokens[owners, places].astype(np.int64),
            positions=places.astype(np.int32),
            slots=(self.blocks[owners, places // size] * size + places % size).astype(np.int32),
            decode=decode,
            lengths=lengths.astype(np.int32),
            blocks=self.blocks[:, : int(self.held[sequences].max(initial=0))][sequences],
            starts=starts,
            owner=owner,
            place=lengths,
            epoch=self.epoch[sequences],
            fed=last[feed],
            source=source[feed],
            draws=self._draws(owner, lengths),
            moves=moves,
        )

    def _draws(self, owner: Ints, place: Ints) -> Draws | None:
        which = np.flatnonzero((owner >= 0) & ((self.temperature[owner] >= GREEDY_BELOW) | self.steered[owner]))
        if not len(which):
            return None
        seqs = owner[which]
        chance = uniforms(self.seed[seqs], place[which])
        return Draws(which, self.temperature[seqs], self.top_k[seqs], self.top_p[seqs], chance, self.logprobs[seqs])

    def steers_any(self, batch: Batch) -> bool:
        """Whether what a sequence of the batch draws depends on its answer so far, or its chances are asked for."""
        return batch.draws is not None and bool(self.steered[batch.owner[batch.draws.samples]].any())

    def steer(self, batch: Batch) -> Batch:
        """The batch, now that the tokens that it is fed are known, with the edits that its answers so far ask for."""
        if batch.draws is None or not self.steered.any():
            return batch
        last = np.concatenate([np.arange(batch.decode), batch.decode + batch.starts[1:] - 1]).astype(np.int64)
        steered = []
        for i, sample in enumerate(batch.draws.samples.tolist()):
            seq = int(batch.owner[sample])
            steer = self.steers[seq]
            if steer is not None:
                answer = self.tokens[seq, self.prompt[seq] : batch.place[sample]].copy()
                if len(answer):
                    answer[-1] = batch.tokens[last[sample]]
                steered.append((i, steer, answer))
        return replace(batch, draws=replace(batch.draws, edits=edits_of(steered))) if steered else batch

    # -- admission and pre-emption -----------------------------------------------------------------

    def _admit(self) -> int | None:
        """Let in the next sequence: one that was pre-empted, else the first that waits, if it fits."""
        if np.count_nonzero(self.state == RUNNING) >= self.limits.sequences:
            return None
        away = np.flatnonzero((self.state == SWAPPED) | (self.state == DROPPED))
        if len(away):
            return self._resume(int(away[np.argmin(self.order[away])]))
        if not self.waiting or not self._fits(first := self.waiting[0]):
            return None
        if not first.recalled:
            first.recalled = True
            self.cache.recall(first.keys)
        if self.cache.recalling(first.keys):
            return None
        self.waiting.popleft()
        try:
            return self._start(first)
        except Exception as error:  # what only this request can have caused: it ends, and the others go on
            log.exception("request %d cannot begin", first.number)
            self.refused.append((first, f"request {first.number} cannot begin: {type(error).__name__}: {error}"))
            return None

    def _fits(self, candidate: Waiting) -> bool:
        """Whether the device holds the predicted peak with the candidate let in (as in LightLLM's past-future
        scheduler, Gong et al. 2025): sequences end in the order of their predicted ends, and the peak is just before
        one of those."""
        seqs = np.flatnonzero(self.state == RUNNING)
        size = self.cache.page_size
        now = np.append(self.known[seqs], len(candidate.prompt))
        ends = np.append(self.limit[seqs], len(candidate.prompt) + candidate.request.max_tokens)
        begun = np.append(self.prompt[seqs], len(candidate.prompt))
        slack = size - 1  # the last page of each counts whole, or half when ends are guesses anyway
        if self.expected_output is not None:
            slack = size // 2
            ends = np.minimum(ends, np.maximum(begun + round(self.expected_output), now + 1))
        left = np.maximum(ends - now, 0)
        order = np.argsort(-left)
        growing = np.arange(1, len(order) + 1)
        tokens = np.cumsum(now[order]) + growing * (left[order] + slack)
        return bool(tokens.max() <= self.cache.device.pages * size or len(seqs) == 0)

    def _start(self, candidate: Waiting) -> int:
        seq = int(np.flatnonzero(self.state == FREE)[0])
        prompt, request = candidate.prompt, candidate.request
        length = len(prompt)
        self.tokens[seq, :length] = prompt
        self.known[seq], self.prompt[seq], self.given[seq] = length, length, length
        self.limit[seq], self.number[seq] = length + request.max_tokens, candidate.number
        self.stops[seq] = -1
        self.stops[seq, : len(request.stop)] = sorted(request.stop)
        how = request.sampling
        self.temperature[seq], self.top_p[seq], self.seed[seq] = how.temperature, how.top_p, how.seed
        self.top_k[seq] = min(how.top_k, 2**31)  # more than any vocabulary
        self.steers[seq], self.steered[seq] = candidate.steer, candidate.steer is not None
        self.logprobs[seq] = -1 if candidate.steer is None else candidate.steer.logprobs
        self.order[seq], self._admitted = self._admitted, self._admitted + 1
        self.requests[seq], self.keys[seq] = candidate, candidate.keys
        shared = self.cache.match(candidate.keys[: (length - 1) // self.cache.page_size])
        self.blocks[seq, : len(shared)] = shared
        self.held[seq], self.computed[seq] = len(shared), len(shared) * self.cache.page_size
        self.state[seq] = RUNNING
        return seq

    def _resume(self, seq: int) -> int | None:
        """Bring a pre-empted sequence back when it and one more page for each that runs fit."""
        spare = int(np.count_nonzero(self.state == RUNNING))
        need = -(-int(self.known[seq]) // self.cache.page_size)
        if self.cache.device.available < need + spare:
            return None
        parked = self.parked[seq]
        if parked is not None:
            pages = self.cache.swap_in(parked)
            if pages is not None:
                self.blocks[seq, : len(pages)], self.parked[seq] = pages, None
            elif parked.place != GONE:
                return None
            else:
                self.parked[seq] = None
                self._recompute(seq)
        self.state[seq] = RUNNING
        return seq

    def _preempt(self) -> bool:
        """Take the pages of the sequence that was let in last: to the host, or to be computed again. False, and nothing
        done, when the host has room as soon as what runs has ended."""
        seqs = np.flatnonzero((self.state == RUNNING) & (self.known < self.limit) & (self.side != LAST))
        seq = int(seqs[np.argmax(self.order[seqs])])
        pages = self.blocks[seq, : self.held[seq]].copy()
        parked = self.cache.swap_out(pages)
        if parked is None and self.cache.room_later(len(pages)):
            return False
        self.preemptions += 1
        if parked is not None:
            self.parked[seq], self.state[seq] = parked, SWAPPED
            return True
        self.cache.release(pages)
        self.state[seq] = DROPPED
        self._recompute(seq)
        return True

    def _recompute(self, seq: int) -> None:
        self.recomputed += 1
        log.warning("no tier has room for the pages of request %d; they are computed again.", self.number[seq])
        self.held[seq], self.computed[seq] = 0, 0

    # -- what a step gave --------------------------------------------------------------------------

    def take(self, batch: Batch, samples: Ints, vocabulary: int) -> Taken:
        """Give every sequence its sample. One that is no token of the vocabulary ends its sequence with an error."""
        mine = np.flatnonzero((batch.owner >= 0) & (self.epoch[batch.owner] == batch.epoch))
        good = (samples[mine] >= 0) & (samples[mine] < vocabulary)
        failed = {int(batch.owner[i]): self._no_token(int(batch.owner[i]), int(samples[i])) for i in mine[~good]}
        mine = mine[good]
        seqs, tokens, place = batch.owner[mine], samples[mine], batch.place[mine]
        self.tokens[seqs, place], self.given[seqs] = tokens, place + 1
        stops = (self.stops[seqs] == tokens[:, None]).any(axis=1)
        for i in np.flatnonzero(self.steered[seqs]).tolist():
            seq = int(seqs[i])
            steer = self.steers[seq]
            assert steer is not None
            steer.follow(self.tokens[seq, self.prompt[seq] : place[i] + 1])
            stops[i] |= steer.ended
            if steer.error and not stops[i]:
                failed[seq] = f"request {self.number[seq]}: {steer.error}"
        over = np.isin(seqs, list(failed)) if failed else np.zeros(len(seqs), bool)
        full = (place + 1 >= self.limit[seqs]) & ~stops & ~over
        return Taken(seqs, tokens, mine, seqs[full].tolist(), seqs[stops].tolist(), failed)

    def _no_token(self, seq: int, sample: int) -> str:
        steer, place = self.steers[seq], int(self.given[seq] - self.prompt[seq])
        why = steer.error if steer is not None else ""
        said = _WHY.get(sample, f"the model gave {sample}, which is no token of its vocabulary")
        return f"request {self.number[seq]}: {why or said} (token {place} of its answer)."

    def retire(self, seq: int, length: int, *, tainted: bool = False) -> Waiting:
        """End a sequence and free its pages, at once or, while two batches may run beside each other, when those that
        are launched have ended (`ended`); the pages of its first `length` tokens stay findable, or with `tainted` none
        of its pages."""
        waiting = self.requests[seq]
        assert waiting is not None
        parked = self.parked[seq]
        if parked is not None:
            self.cache.parking.drop(parked)
        elif self.held[seq]:
            pages, keys = self.blocks[seq, : self.held[seq]].copy(), list[Key]()
            if tainted:
                for page in pages.tolist():
                    if self.cache.device.key_of(page) is not None:
                        self.cache.device.drop(page)
            elif self.prefix_sharing:
                done = min(length, int(self.computed[seq]))
                keys = block_keys(
                    self.tokens[seq, :done], self.cache.page_size, self.keys[seq][: done // self.cache.page_size]
                )
            self._leave(pages, keys)
        self.side[seq] = TOGETHER
        self.parked[seq], self.requests[seq], self.keys[seq] = None, None, []
        self.steers[seq], self.steered[seq], self.logprobs[seq] = None, False, -1
        self.state[seq], self.held[seq], self.computed[seq], self.known[seq] = FREE, 0, 0, 0
        self.epoch[seq] += 1
        self.pending[seq] = -1
        return waiting

    def _leave(self, pages: Pages, keys: list[Key]) -> None:
        """Release pages, the first of which hold the blocks `keys`."""

        def leave() -> None:
            for page, key in zip(pages[: len(keys)].tolist(), keys, strict=True):
                self.cache.device.publish(page, key)
            self.cache.release(pages)

        if self.apart or not _reached(self._ended, self._parted):
            self._leaving.append((self.launched, leave))
        else:
            leave()

    def learn(self, length: int) -> None:
        """Let later predictions know that a request gave `length` tokens, where predictions go by experience."""
        if self.expected_output is not None:
            self.expected_output += 0.05 * (length - self.expected_output)

    def _publish(self, seq: int, first: int, last: int) -> None:
        """Prompt pages first to last may be shared from now on, in the very batch that fills them: a layer writes the
        keys of all seqs before any attention reads them."""
        for block in range(first, min(last, len(self.keys[seq]))):
            self.cache.device.publish(int(self.blocks[seq, block]), self.keys[seq][block])


def _reached(ended: tuple[int, int], launched: tuple[int, int]) -> bool:
    return ended[0] >= launched[0] and ended[1] >= launched[1]
