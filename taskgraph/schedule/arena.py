"""The arena: where every activation lives, so that tensors share bytes only when no run can use both at once.

Lifetimes come from reachability over lanes and waits, not from list positions: tensor B may take bytes of tensor A
only if every op that makes or reads A has surely ended when B's producer starts. Vector clocks (Fidge 1988) tell.

Offsets come from two heuristics, the better of which is kept: greedy by size with the smallest gap that fits
(Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference", algorithm 3), quadratic in the
number of tensors and so left out above GREEDY_LIMIT; and a linear scan in step order over a best-fit free list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.graph.graph import Graph
from taskgraph.jit import njit
from taskgraph.schedule.plan import Slot

ALIGNMENT = 64
GREEDY_LIMIT = 8192


@dataclass(frozen=True, slots=True)
class _Lifetimes:
    """The n arena tensors in order of production: nbytes (n,) rounded up, made (n,) producing step, last (n,) last
    using step, and users (steps of use) in compressed rows of `user_ptr`."""

    names: list[str]
    nbytes: np.ndarray
    made: np.ndarray
    last: np.ndarray
    user_ptr: np.ndarray
    user: np.ndarray


def assign(
    graph: Graph, lanes: Sequence[int], waits: Sequence[tuple[int, ...]], order: Sequence[int]
) -> tuple[tuple[Slot, ...], int]:
    """Slots of the activations of `graph`, written out, and the bytes of the arena that holds them.

    Step i runs the flat graph's op number order[i] on lane lanes[i] after the steps in waits[i], which are earlier.
    Graph outputs have no slot: they live outside the arena, like inputs, weights and states.
    """
    flat = graph.flat()
    life = _lifetimes(flat, order)
    if not life.names:
        return (), 0
    lane = np.array(lanes, np.int64)
    wait_ptr = np.zeros(len(waits) + 1, np.int64)
    np.cumsum([len(row) for row in waits], out=wait_ptr[1:])
    clock = _clocks(lane, wait_ptr, np.array([w for row in waits for w in row], np.int64), int(lane.max()) + 1)
    last_use = _last_use(life.user_ptr, life.user, lane, clock.shape[1])
    by_end = np.argsort(life.last, kind="stable")
    offset, peak = _linear_scan(life.nbytes, life.made, life.last, by_end, last_use, clock)
    if len(life.names) <= GREEDY_LIMIT:
        by_size = np.argsort(-life.nbytes, kind="stable")
        greedy, greedy_peak = _greedy_by_size(by_size, life.nbytes, life.made, last_use, clock)
        if greedy_peak < peak:
            offset, peak = greedy, greedy_peak
    size = flat.tensor
    slots = (Slot(name, at, size[name].nbytes) for name, at in zip(life.names, offset.tolist(), strict=True))
    return tuple(slots), int(peak)


def max_live_bytes(graph: Graph, order: Sequence[int]) -> int:
    """A lower bound of the arena: the most bytes that live at one step when the steps run one by one in `order`.

    Valid for any lanes and waits that respect the order, for what lives at one step of it can share no byte.
    """
    life = _lifetimes(graph.flat(), order)
    change = np.zeros(len(order) + 1, np.int64)
    np.add.at(change, life.made, life.nbytes)
    np.add.at(change, life.last + 1, -life.nbytes)
    return int(np.cumsum(change).max())


def _lifetimes(flat: Graph, order: Sequence[int]) -> _Lifetimes:
    uses: dict[str, list[int]] = {}
    outside = set(flat.outputs)
    for step, number in enumerate(order):
        op = flat.ops[number]
        for name in op.inputs:
            if name in uses:
                uses[name].append(step)
        for name in op.outputs:
            if name not in outside:
                uses[name] = [step]
    tensor = flat.tensor
    exact = np.array([tensor[name].nbytes for name in uses], np.int64)
    user_ptr = np.zeros(len(uses) + 1, np.int64)
    np.cumsum([len(steps) for steps in uses.values()], out=user_ptr[1:])
    user = np.array([step for steps in uses.values() for step in steps], np.int64)
    return _Lifetimes(
        names=list(uses),
        nbytes=-(-exact // ALIGNMENT) * ALIGNMENT,
        made=user[user_ptr[:-1]],
        last=user[user_ptr[1:] - 1],
        user_ptr=user_ptr,
        user=user,
    )


@njit
def _clocks(lane: np.ndarray, wait_ptr: np.ndarray, wait: np.ndarray, lanes: int) -> np.ndarray:
    """clock[s, l]: the last step of lane l that has ended when step s starts, -1 for none."""
    clock = np.full((len(lane), lanes), -1, np.int32)
    last = np.full(lanes, -1, np.int64)
    for s in range(len(lane)):
        mine = lane[s]
        if last[mine] >= 0:
            clock[s] = clock[last[mine]]
            clock[s, mine] = last[mine]
        for k in range(wait_ptr[s], wait_ptr[s + 1]):
            other = wait[k]
            for i in range(lanes):
                clock[s, i] = max(clock[s, i], clock[other, i])
            clock[s, lane[other]] = max(clock[s, lane[other]], other)
        last[mine] = s
    return clock


@njit
def _last_use(user_ptr: np.ndarray, user: np.ndarray, lane: np.ndarray, lanes: int) -> np.ndarray:
    """last_use[t, l]: the last step of lane l that makes or reads tensor t, -1 for none."""
    last_use = np.full((len(user_ptr) - 1, lanes), -1, np.int32)
    for t in range(len(user_ptr) - 1):
        for k in range(user_ptr[t], user_ptr[t + 1]):
            last_use[t, lane[user[k]]] = user[k]
    return last_use


@njit
def _all_ended(steps: np.ndarray, clock: np.ndarray) -> bool:
    for i in range(len(steps)):  # noqa: SIM110 - numba compiles no generators
        if steps[i] > clock[i]:
            return False
    return True


@njit
def _greedy_by_size(
    by_size: np.ndarray, nbytes: np.ndarray, made: np.ndarray, last_use: np.ndarray, clock: np.ndarray
) -> tuple[np.ndarray, int]:
    """Largest first, each into the smallest gap between the placed tensors that it may not share bytes with."""
    n = len(nbytes)
    offset, placed, peak = np.zeros(n, np.int64), np.zeros(n, np.int64), 0
    for count in range(n):
        t = by_size[count]
        top, best_at, best_gap = 0, -1, 0
        for k in range(count):
            other = placed[k]
            if made[other] < made[t]:
                apart = _all_ended(last_use[other], clock[made[t]])
            else:
                apart = made[t] < made[other] and _all_ended(last_use[t], clock[made[other]])
            if not apart:
                gap = offset[other] - top
                if gap >= nbytes[t] and (best_at < 0 or gap < best_gap):
                    best_at, best_gap = top, gap
                top = max(top, offset[other] + nbytes[other])
        offset[t] = top if best_at < 0 else best_at
        peak = max(peak, offset[t] + nbytes[t])
        k = count
        while k > 0 and offset[placed[k - 1]] > offset[t]:
            placed[k] = placed[k - 1]
            k -= 1
        placed[k] = t
    return offset, peak


@njit
def _linear_scan(
    nbytes: np.ndarray, made: np.ndarray, last: np.ndarray, by_end: np.ndarray, last_use: np.ndarray, clock: np.ndarray
) -> tuple[np.ndarray, int]:
    """In order of production, each into the smallest free block that is large enough and safe to reuse.

    Free blocks are sorted by offset; `need` of a block are the steps, one a lane, that must have ended before its
    bytes are taken. Neighbours merge, and so do their needs.
    """
    n, lanes = last_use.shape
    offset = np.zeros(n, np.int64)
    at, size, need = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64), np.zeros((n + 1, lanes), np.int32)
    blocks, peak, ended = 0, 0, 0
    for t in range(n):
        while ended < n and last[by_end[ended]] < made[t]:
            gone = by_end[ended]
            ended += 1
            k = np.searchsorted(at[:blocks], offset[gone])
            left = k > 0 and at[k - 1] + size[k - 1] == offset[gone]
            right = k < blocks and offset[gone] + nbytes[gone] == at[k]
            if left:
                k -= 1
                size[k] += nbytes[gone]
                need[k] = np.maximum(need[k], last_use[gone])
                if right:
                    size[k] += size[k + 1]
                    need[k] = np.maximum(need[k], need[k + 1])
                    blocks -= 1
                    for j in range(k + 1, blocks):
                        at[j], size[j], need[j] = at[j + 1], size[j + 1], need[j + 1]
            elif right:
                at[k] = offset[gone]
                size[k] += nbytes[gone]
                need[k] = np.maximum(need[k], last_use[gone])
            else:
                for j in range(blocks, k, -1):
                    at[j], size[j], need[j] = at[j - 1], size[j - 1], need[j - 1]
                at[k], size[k], need[k] = offset[gone], nbytes[gone], last_use[gone]
                blocks += 1
        best = -1
        for k in range(blocks):
            fits = size[k] >= nbytes[t] and (best < 0 or size[k] < size[best])
            if fits and _all_ended(need[k], clock[made[t]]):
                best = k
        if best < 0 and blocks > 0 and at[blocks - 1] + size[blocks - 1] == peak:
            if _all_ended(need[blocks - 1], clock[made[t]]):
                best = blocks - 1
                peak = at[best] + nbytes[t]
                size[best] = nbytes[t]
        if best < 0:
            offset[t] = peak
            peak += nbytes[t]
            continue
        offset[t] = at[best]
        at[best] += nbytes[t]
        size[best] -= nbytes[t]
        if size[best] == 0:
            blocks -= 1
            for j in range(best, blocks):
                at[j], size[j], need[j] = at[j + 1], size[j + 1], need[j + 1]
    return offset, peak
