"""The arena: byte offsets for activations, from lifetimes over lanes that run concurrently.

A tensor may take the bytes of another only when every user of the other has ended, by lane order and waits,
before the tensor's producer starts. Order in the list of steps says nothing about that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskgraph.graph.graph import Graph
from taskgraph.jit import ZERO, inner, kernel
from taskgraph.record import from_columns
from taskgraph.schedule.plan import Slot

ALIGNMENT = 64
_PAIRS = 1 << 22
"""Up to this many pairs of tensors that may be alive together, a table of them fits (8 bytes a pair)."""


@dataclass(frozen=True, slots=True)
class _Lifetimes:
    """Activations in the order of their first steps: `last[t, l]` is the last step of lane l that uses t, or -1."""

    names: list[str]
    nbytes: np.ndarray
    first: np.ndarray
    last: np.ndarray


def assign(
    graph: Graph, lanes: Sequence[int], waits: Sequence[tuple[int, ...]], order: Sequence[int]
) -> tuple[tuple[Slot, ...], int]:
    """Slots of all activations but the graph's outputs, and the bytes of the arena.

    Step i runs flat op order[i] on lane lanes[i] after steps waits[i]. Greedy by size with the best-fitting gap
    (Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference"). Where more than `_PAIRS`
    pairs may be alive together, which lanes that hardly ever wait for each other bring about, every lane has a
    region for the tensors that it alone uses.
    """
    life = _lifetimes(graph, lanes, order)
    if not life.names:
        return (), 0
    before = ended_steps(lanes, waits)
    sizes = -(-life.nbytes // ALIGNMENT) * ALIGNMENT
    gone = _gone(np.array(lanes, np.int64), life.last, before)
    if _pairs(life.first, gone) <= _PAIRS:
        offsets = _by_size(sizes, life.first, life.last, before, gone)
    else:
        offsets = _by_region(sizes, life, gone, len(order))
    slots = from_columns(Slot, len(sizes), life.names, offsets.tolist(), sizes.tolist())
    return slots, int((offsets + sizes).max())


def ended_steps(lanes: Sequence[int], waits: Sequence[tuple[int, ...]]) -> np.ndarray:
    """(steps, lanes): the last step of each lane that has ended when a step starts (vector clocks, Fidge 1988)."""
    count = max(lanes) + 1
    pointer = np.zeros(len(lanes) + 1, np.int64)
    np.cumsum([len(w) for w in waits], out=pointer[1:])
    flat = np.fromiter((s for w in waits for s in w), np.int64, int(pointer[-1]))
    before, previous = np.full((len(lanes), count), -1, np.int64), np.full(count, -1, np.int64)
    _clocks(np.array(lanes, np.int64), pointer, flat, previous, before)
    return before


@kernel
def _clocks(lane: np.ndarray, wait_ptr: np.ndarray, wait: np.ndarray, previous: np.ndarray, before: np.ndarray) -> None:
    """Fill `before` (steps, lanes), which is -1 as is `previous` (lanes,)."""
    for s in range(len(lane)):
        mine = lane[s]
        if previous[mine] >= 0:
            for j in range(len(previous)):
                before[s, j] = before[previous[mine], j]
            before[s, mine] = previous[mine]
        for k in range(wait_ptr[s], wait_ptr[s + 1]):
            other = wait[k]
            for j in range(len(previous)):
                if before[other, j] > before[s, j]:
                    before[s, j] = before[other, j]
            if other > before[s, lane[other]]:
                before[s, lane[other]] = other
        previous[mine] = s


def _lifetimes(graph: Graph, lanes: Sequence[int], order: Sequence[int]) -> _Lifetimes:
    outputs, ops = set(graph.outputs), graph.ops
    made = [name for op in ops for name in op.outputs if name not in outputs]
    maker = np.array([i for i, op in enumerate(ops) for name in op.outputs if name not in outputs], np.int64)
    index = dict(zip(made, range(len(made)), strict=True))
    read = np.array([index.get(name, -1) for op in ops for name in op.inputs], np.int64)
    reader = np.repeat(np.arange(len(ops)), [len(op.inputs) for op in ops])[read >= 0]
    step_of, lane_of = np.empty(len(ops), np.int64), np.empty(len(ops), np.int64)
    flat_order = np.array(order, np.int64)
    step_of[flat_order], lane_of[flat_order] = np.arange(len(ops)), lanes
    by_first = np.argsort(step_of[maker], kind="stable")
    place = np.empty(len(made), np.int64)
    place[by_first] = np.arange(len(made))
    tensor, user = np.concatenate([place, place[read[read >= 0]]]), np.concatenate([maker, reader])
    last = np.full((len(made), max(lanes, default=0) + 1), -1, np.int64)
    np.maximum.at(last, (tensor, lane_of[user]), step_of[user])
    names, tensors = [made[k] for k in by_first.tolist()], graph.tensor
    nbytes = np.array([tensors[name].nbytes for name in names], np.int64)
    return _Lifetimes(names, nbytes, step_of[maker][by_first], last)


def _gone(lane: np.ndarray, last: np.ndarray, before: np.ndarray) -> np.ndarray:
    """For each tensor a step from which on every step, on whatever lane, starts after the tensor's users ended."""
    gone, pointer = np.zeros(len(last), np.int64), np.zeros(before.shape[1] + 1, np.int64)
    np.cumsum(np.bincount(lane, minlength=before.shape[1]), out=pointer[1:])
    _find_gone(pointer, np.argsort(lane, kind="stable"), last, before, gone)
    return gone


@kernel
def _find_gone(
    pointer: np.ndarray, by_lane: np.ndarray, last: np.ndarray, before: np.ndarray, gone: np.ndarray
) -> None:
    for t in range(len(last)):
        for j in range(len(pointer) - 1):
            low, high = pointer[j], pointer[j + 1]  # what a lane's steps know only grows
            while low < high:
                middle = (low + high) >> 1
                if _ended(last, t, before, by_lane[middle]):
                    high = middle
                else:
                    low = middle + 1
            if low > pointer[j] and by_lane[low - 1] + 1 > gone[t]:
                gone[t] = by_lane[low - 1] + 1


def _pairs(first: np.ndarray, gone: np.ndarray) -> int:
    """How many pairs of tensors may be alive together."""
    return int((np.searchsorted(first, gone) - np.arange(1, len(first) + 1)).sum())


@inner
def _ended(last: np.ndarray, tensor: int, before: np.ndarray, step: int) -> bool:
    """Whether a tensor's users have all ended when a step starts."""
    ended = True
    for j in range(last.shape[1]):
        ended = ended and last[tensor, j] <= before[step, j]
    return ended


def _by_size(
    sizes: np.ndarray, first: np.ndarray, last: np.ndarray, before: np.ndarray, gone: np.ndarray
) -> np.ndarray:
    """Place tensors from large to small, each in the tightest gap between those alive together with it."""
    n = len(sizes)
    pointer, near = np.zeros(n + 1, np.int64), np.zeros(n, np.int64)
    neighbours = Neighbours(pointer, np.zeros(2 * _pairs(first, gone), np.int32), near)
    _find_neighbours(neighbours, first, last, before, gone)
    offset = np.full(n, -1, np.int64)
    _fit(np.argsort(-sizes, kind="stable"), sizes, neighbours, offset)
    return offset


class Neighbours(NamedTuple):
    """What is alive together with each tensor t: other[pointer[t] : pointer[t + 1]]; `near` (n,) is scratch."""

    pointer: np.ndarray
    other: np.ndarray
    near: np.ndarray


@kernel
def _find_neighbours(
    found: Neighbours, first: np.ndarray, last: np.ndarray, before: np.ndarray, gone: np.ndarray
) -> None:
    """Count, then fill: the second time `near` is the next free place of each tensor."""
    pointer, other, free = found.pointer, found.other, found.near
    n = len(first)
    for fill in range(2):
        for t in range(n):
            if fill:
                pointer[t + 1] += pointer[t]
                free[t] = pointer[t]
        for t in range(n):
            u = t + 1
            while u < n and first[u] < gone[t]:
                if not _ended(last, t, before, first[u]):
                    if fill:
                        other[free[t]], other[free[u]] = u, t
                        free[t] += 1
                        free[u] += 1
                    else:
                        pointer[t + 1] += 1
                        pointer[u + 1] += 1
                u += 1


@kernel
def _fit(by_size: np.ndarray, size: np.ndarray, found: Neighbours, offset: np.ndarray) -> None:
    """Place each tensor in the tightest gap between its neighbours that are placed; without one, behind them."""
    near = found.near
    for t in by_size:
        count = 0
        for k in range(found.pointer[t], found.pointer[t + 1]):
            if offset[found.other[k]] >= 0:
                near[count] = found.other[k]
                count += 1
        gap = count
        while gap > 1:  # sorted by offset (Shell 1959)
            gap >>= 1
            for x in range(gap, count):
                u, at = near[x], x
                while at >= gap and offset[near[at - gap]] > offset[u]:
                    near[at] = near[at - gap]
                    at -= gap
                near[at] = u
        best, best_gap, floor = -1, 0, 0
        for k in range(count):
            u = near[k]
            room = offset[u] - floor
            if room >= size[t] and (best < 0 or room < best_gap):
                best, best_gap = floor, room
            if offset[u] + size[u] > floor:
                floor = offset[u] + size[u]
        offset[t] = floor if best < 0 else best


def _by_region(sizes: np.ndarray, life: _Lifetimes, gone: np.ndarray, steps: int) -> np.ndarray:
    """A region for the tensors of each lane alone, and one for those that cross lanes, side by side.

    In a region a tensor is alive over an interval of steps: to its last user on its lane, or until all lanes know.
    """
    lane_count = (life.last >= 0).sum(axis=1)
    region = np.where(lane_count == 1, life.last.argmax(axis=1), -1)
    until = np.where(lane_count == 1, life.last.max(axis=1) + 1, gone)
    clock = np.arange(-1, steps - 1).reshape(-1, 1)  # one clock for all: what came before has ended
    offsets, base = np.empty(len(sizes), np.int64), 0
    for r in np.unique(region):
        mine = np.flatnonzero(region == r)
        size, first, end = sizes[mine], life.first[mine], until[mine]
        if _pairs(first, end) <= _PAIRS:
            at = _by_size(size, first, (end - 1).reshape(-1, 1), clock, end)
        else:
            at = _in_order(size, first, end, np.argsort(end, kind="stable"))
        offsets[mine] = base + at
        base += int((at + size).max())
    return offsets


def _in_order(size: np.ndarray, first: np.ndarray, end: np.ndarray, by_end: np.ndarray) -> np.ndarray:
    """Place tensors as they are made, each in the tightest of the gaps that ended tensors left."""
    offset, gaps = np.empty(len(size), np.int64), np.zeros((2, len(size) + 2), np.int64)
    _place_in_order(size, first, end, by_end, gaps, offset)
    return offset


@inner
def _close(gaps: np.ndarray, k: int, count: int) -> int:
    """Take gap k out of the first `count`."""
    for j in range(k, count - 1):
        gaps[0, j], gaps[1, j] = gaps[0, j + 1], gaps[1, j + 1]
    return count - 1


@kernel
def _place_in_order(
    size: np.ndarray, first: np.ndarray, end: np.ndarray, by_end: np.ndarray, gaps: np.ndarray, offset: np.ndarray
) -> None:
    """Fill `offset`; the columns of `gaps` are the offset and room of each gap, by offset: the last one has no end."""
    at, room = gaps[0], gaps[1]
    room[0], count, ended = np.iinfo(np.int64).max // 2, ZERO + 1, 0
    for t in range(len(size)):
        while end[by_end[ended]] <= first[t]:
            u = by_end[ended]
            k = ZERO
            while at[k] < offset[u]:
                k += 1
            joins_left = k > 0 and at[k - 1] + room[k - 1] == offset[u]
            joins_right = offset[u] + size[u] == at[k]
            if joins_left and joins_right:
                room[k - 1] += size[u] + room[k]
                count = _close(gaps, k, count)
            elif joins_left:
                room[k - 1] += size[u]
            elif joins_right:
                at[k], room[k] = offset[u], room[k] + size[u]
            else:
                for j in range(count, k, -1):
                    at[j], room[j] = at[j - 1], room[j - 1]
                at[k], room[k] = offset[u], size[u]
                count += 1
            ended += 1
        best = count - 1
        for k in range(count - 1):
            if size[t] <= room[k] < room[best]:
                best = k
        offset[t] = at[best]
        at[best], room[best] = at[best] + size[t], room[best] - size[t]
        if room[best] == 0:
            count = _close(gaps, best, count)
