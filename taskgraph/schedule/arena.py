"""The arena: byte offsets for activations, from lifetimes over lanes that run concurrently.

A tensor may take the bytes of another only when every user of the other has ended, by lane order and waits,
before the tensor's producer starts. Order in the list of steps says nothing about that.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from taskgraph.graph.graph import Graph
from taskgraph.jit import njit
from taskgraph.schedule.plan import Slot

ALIGNMENT = 64
_EXACT = 20_000
"""Up to this many activations offsets are searched by size; above, in step order."""


def assign(
    graph: Graph, lanes: Sequence[int], waits: Sequence[tuple[int, ...]], order: Sequence[int]
) -> tuple[tuple[Slot, ...], int]:
    """Slots of all activations but the graph's outputs, and the bytes of the arena.

    Step i runs flat op order[i] on lane lanes[i] after steps waits[i]. Greedy by size with the best-fitting gap
    (Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference"); graphs above
    `_EXACT` tensors use a first-fit free list in step order.
    """
    names, size, first, last = _lifetimes(graph, lanes, order)
    if not names:
        return (), 0
    ended_before = ended_steps(lanes, waits)
    sizes = np.array([-(-n // ALIGNMENT) * ALIGNMENT for n in size], np.int64)
    born = np.array(first, np.int64)
    gone = np.array(last, np.int64)
    if len(names) <= _EXACT:
        offsets = _greedy(np.argsort(-sizes, kind="stable"), sizes, born, gone, ended_before)
    else:
        offsets = _in_order(sizes.tolist(), first, gone, ended_before)
    total = int((offsets + sizes).max())
    slots = tuple(Slot(name, int(at), int(n)) for name, at, n in zip(names, offsets, sizes, strict=True))
    return slots, total


def max_live_bytes(graph: Graph, lanes: Sequence[int], order: Sequence[int]) -> int:
    """A lower bound on any arena for this order: the most bytes that are alive at one step of it."""
    _, size, first, last = _lifetimes(graph, lanes, order)
    change = np.zeros(len(order) + 1, np.int64)
    for nbytes, born, gone in zip(size, first, last, strict=True):
        change[born] += nbytes
        change[gone.max() + 1] -= nbytes
    return int(np.cumsum(change).max())


def ended_steps(lanes: Sequence[int], waits: Sequence[tuple[int, ...]]) -> np.ndarray:
    """(steps, lanes): the last step of each lane that has ended when a step starts (vector clocks, Fidge 1988)."""
    count = max(lanes) + 1
    pointer = np.zeros(len(lanes) + 1, np.int64)
    np.cumsum([len(w) for w in waits], out=pointer[1:])
    flat = np.fromiter((s for w in waits for s in w), np.int64, int(pointer[-1]))
    return _clocks(np.array(lanes, np.int64), pointer, flat, count)


@njit
def _clocks(lane: np.ndarray, wait_ptr: np.ndarray, wait: np.ndarray, lanes: int) -> np.ndarray:
    before = np.full((len(lane), lanes), -1, np.int64)
    previous = np.full(lanes, -1, np.int64)
    for s in range(len(lane)):
        mine = lane[s]
        if previous[mine] >= 0:
            before[s] = before[previous[mine]]
            before[s, mine] = previous[mine]
        for k in range(wait_ptr[s], wait_ptr[s + 1]):
            other = wait[k]
            for j in range(lanes):
                before[s, j] = max(before[s, j], before[other, j])
            before[s, lane[other]] = max(before[s, lane[other]], other)
        previous[mine] = s
    return before


def _lifetimes(
    graph: Graph, lanes: Sequence[int], order: Sequence[int]
) -> tuple[list[str], list[int], list[int], list[np.ndarray]]:
    """Per activation: name, bytes, the step that makes it, and the last step of each lane that uses it (-1: none)."""
    count = max(lanes) + 1
    outputs = set(graph.outputs)
    tensors = graph.tensor
    names: list[str] = []
    size: list[int] = []
    first: list[int] = []
    last: list[np.ndarray] = []
    index: dict[str, int] = {}
    for step, (op_index, lane) in enumerate(zip(order, lanes, strict=True)):
        op = graph.ops[op_index]
        for name in op.inputs:
            if name in index:
                last[index[name]][lane] = step
        for name in op.outputs:
            if name not in outputs:
                index[name] = len(names)
                names.append(name)
                size.append(tensors[name].nbytes)
                first.append(step)
                users = np.full(count, -1, np.int64)
                users[lane] = step
                last.append(users)
    return names, size, first, last


@njit
def _greedy(
    by_size: np.ndarray, size: np.ndarray, first: np.ndarray, last: np.ndarray, before: np.ndarray
) -> np.ndarray:
    """Place tensors from large to small, each in the tightest gap between those alive together with it."""
    n, lanes = len(size), last.shape[1]
    offset = np.full(n, -1, np.int64)
    placed = np.empty(n, np.int64)  # by offset
    for count in range(n):
        t = by_size[count]
        best, best_gap, floor = np.int64(-1), np.int64(0), np.int64(0)
        for k in range(count):
            u = placed[k]
            apart = True
            for j in range(lanes):
                apart = apart and last[u, j] <= before[first[t], j]
            if not apart:
                apart = True
                for j in range(lanes):
                    apart = apart and last[t, j] <= before[first[u], j]
            if apart:
                continue
            gap = offset[u] - floor
            if gap >= size[t] and (best < 0 or gap < best_gap):
                best, best_gap = floor, gap
            floor = max(floor, offset[u] + size[u])
        offset[t] = floor if best < 0 else best
        k = count
        while k > 0 and offset[placed[k - 1]] > offset[t]:
            placed[k] = placed[k - 1]
            k -= 1
        placed[k] = t
    return offset


def _in_order(size: list[int], first: list[int], last: np.ndarray, before: np.ndarray) -> np.ndarray:
    """First fit in step order by size class: a slot is free once its tensor's users have ended before the new step."""
    offset = np.empty(len(size), np.int64)
    pool: dict[int, list[tuple[int, int]]] = {}
    end = 0
    for t, nbytes in enumerate(size):
        free = pool.setdefault(nbytes, [])
        if free and bool((last[free[0][1]] <= before[first[t]]).all()):
            offset[t] = offset[heapq.heappop(free)[1]]
        else:
            offset[t], end = end, end + nbytes
        heapq.heappush(free, (int(last[t].max()), t))
    return offset
