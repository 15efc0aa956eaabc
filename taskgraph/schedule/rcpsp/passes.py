"""Many quick passes over a project: priority rules, biased random sampling, both generation schemes, justification."""

from typing import NamedTuple

import numpy as np

from taskgraph.jit import njit
from taskgraph.schedule.bounds import longest_path, longest_tail
from taskgraph.schedule.rcpsp.project import Project
from taskgraph.schedule.rcpsp.sgs import (
    Tables,
)

CALL_S = 6e-4
"""Seconds outside the passes: tables, bounds and the value that is returned."""
FEW = 2048
"""Up to so many activities the successors of each are counted."""


class Chains(NamedTuple):
    """Longest chains in ticks: `head` before each activity and `tail` from its start to the end of the project."""

    head: np.ndarray
    tail: np.ndarray


def chains(tables: Tables) -> Chains:
    """Chains of the shortest allowed times, in ticks."""
    took = np.where(tables.took < 0, np.inf, tables.took).min(axis=1)
    head = longest_path(took, tables.pred_ptr, tables.pred) - took
    tail = longest_tail(took, tables.succ_ptr, tables.succ)
    return Chains(head.astype(np.int64), tail.astype(np.int64))


def ticks_bound(tables: Tables, chain: Chains) -> int:
    """A lower bound on the makespan in ticks: the area of any resource between the heads and tails of its users.

    For every head h and tail q, what starts at h or later and has q or more after its own end needs at least its area
    over the capacity in between (the preemptive one-machine bound of Carlier 1982, for areas). The chain is the case
    of one activity.
    """
    took = np.where(tables.took < 0, np.iinfo(np.int64).max, tables.took)
    shortest = took.min(axis=1)
    best = int((chain.head + chain.tail).max())
    words = len(tables.free)
    need = tables.need.reshape(*tables.took.shape, words)
    for w, shift, mask in _fields(tables):
        capacity = int(tables.free[w]) >> shift & mask
        amount = (need[:, :, w] >> np.uint64(shift) & np.uint64(mask)).astype(np.float64)
        area = np.where(tables.took < 0, np.inf, amount * took).min(axis=1)
        best = max(best, _area_bound(chain.head, chain.tail - shortest, area, float(capacity)))
    return best


def _fields(tables: Tables) -> list[tuple[int, int, int]]:
    """(word, shift, mask) of each packed resource."""
    found = []
    for w, guard in enumerate(tables.guard.tolist()):
        low = 0
        for bit in range(64):
            if guard >> bit & 1:
                found.append((w, low, (1 << (bit - low)) - 1))
                low = bit + 1
    return found


@njit
def _area_bound(head: np.ndarray, tail: np.ndarray, area: np.ndarray, capacity: float) -> int:
    """max over h, q of h + ceil(area of {head >= h and tail >= q} / capacity) + q; O(n) for each different head."""
    n = len(head)
    by_tail = np.argsort(tail)
    best = 0
    last = -1
    for h in np.sort(head):
        if h == last:
            continue
        last = h
        total = 0.0
        for k in range(n - 1, -1, -1):
            i = by_tail[k]
            if head[i] >= h and area[i] > 0.0:
                total += area[i]
                best = max(best, h + tail[i] + np.int64(np.ceil(total / capacity * (1.0 - 1e-12))))
    return best


def priorities(project: Project, tables: Tables, chain: Chains) -> np.ndarray:
    """(rules, n): latest finish time, latest start time, most total successors, greatest rank positional weight
    (Kolisch 1996), and the upward rank of time weighted by the scarcest resource. Smallest first."""
    took = np.where(tables.took < 0, np.iinfo(np.int64).max, tables.took).min(axis=1)
    after = [tables.succ[tables.succ_ptr[i] : tables.succ_ptr[i + 1]] for i in range(project.n)]
    rank = took + np.array([took[row].sum() for row in after])
    share = 1.0 + (project.use / project.capacity).max(axis=2).min(axis=1)
    scarce = longest_tail(took * share, tables.succ_ptr, tables.succ).astype(np.int64)
    rules = [took - chain.tail, -chain.tail, -rank, -scarce]
    if project.n <= FEW:
        below = [0] * project.n
        for i in range(project.n - 1, -1, -1):
            for j in after[i].tolist():
                below[i] |= below[j] | 1 << j
        rules.append(-np.array([mask.bit_count() for mask in below]))
    return np.stack(rules)


def extreme_modes(project: Project) -> np.ndarray:
    """(2, n): the fastest mode of each activity, and the one that takes the least area of its scarcest resource."""
    allowed = np.isfinite(project.seconds)
    seconds = np.where(allowed, project.seconds, 0.0)
    area = seconds * (project.use / project.capacity).max(axis=2)
    pairs = [(project.seconds, area), (np.where(allowed, area, np.inf), seconds)]
    return np.stack([np.lexsort((second, first), axis=1)[:, 0] for first, second in pairs])


@njit
def draw(rng: np.ndarray, below: int) -> int:
    """A whole number from 0 to below - 1 (xorshift64; Marsaglia 2003)."""
    x = rng[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    rng[0] = x
    return int(np.int64(((x >> np.uint64(32)) * np.uint64(below)) >> np.uint64(32)))


def seeded(seed: int, stream: int) -> np.ndarray:
    """A state for `draw`, never 0."""
    return np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64) | np.uint64(1)


@njit
def sample(
    t: Tables, key: np.ndarray, rng: np.ndarray, order: np.ndarray, ready: np.ndarray, missing: np.ndarray
) -> None:
    """A random topological order: of what is ready, the next is drawn in proportion to its regret, the distance from
    the worst key, plus one (Kolisch and Drexl 1996)."""
    n, count = len(key), 0
    for i in range(n):
        missing[i] = t.pred_ptr[i + 1] - t.pred_ptr[i]
        if missing[i] == 0:
            ready[count] = i
            count += 1
    for k in range(n):
        worst, total = key[ready[0]], 0
        for c in range(count):
            worst = max(worst, key[ready[c]])
            total -= key[ready[c]]
        left = draw(rng, total + count * (worst + 1))
        c = 0
        while left >= worst - key[ready[c]] + 1:
            left -= worst - key[ready[c]] + 1
            c += 1
        i = order[k] = ready[c]
        count -= 1
        ready[c] = ready[count]
        for e in range(t.succ_ptr[i], t.succ_ptr[i + 1]):
            j = t.succ[e]
            missing[j] -= 1
            if missing[j] == 0:
                ready[count] = j
                count += 1


@njit
def mix_modes(extremes: np.ndarray, rng: np.ndarray, mode: np.ndarray) -> None:
    """Each activity in its fastest or its thriftiest mode, by a coin whose bias is drawn first."""
    bias = draw(rng, 5)
    for i in range(len(mode)):
        mode[i] = extremes[1 if draw(rng, 4) < bias else 0, i]
