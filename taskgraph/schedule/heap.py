"""A binary heap of numbers in a plain array, for compiled schedulers: `heapq` over tuples takes seconds to compile."""

import numpy as np

from taskgraph.jit import inner


@inner
def push(heap: np.ndarray, count: int, item: int, key: np.ndarray, tie: np.ndarray) -> int:
    """Add `item` to heap[:count], whose head has the greatest key[item], of equals the least tie[item]; the new
    count."""
    at = count
    while at > 0:
        above = heap[(at - 1) >> 1]
        if key[above] > key[item] or (key[above] == key[item] and tie[above] <= tie[item]):
            break
        heap[at] = above
        at = (at - 1) >> 1
    heap[at] = item
    return count + 1


@inner
def pop(heap: np.ndarray, count: int, key: np.ndarray, tie: np.ndarray) -> int:
    """Take the head off heap[:count] and return it; count - 1 are left."""
    head, item, at, below = heap[0], heap[count - 1], 0, 1
    while below < count - 1:
        left, right = heap[below], heap[below + 1]
        if below + 2 < count and (key[right] > key[left] or (key[right] == key[left] and tie[right] < tie[left])):
            below, left = below + 1, right
        if key[item] > key[left] or (key[item] == key[left] and tie[item] < tie[left]):
            break
        heap[at] = left
        at, below = below, 2 * below + 1
    heap[at] = item
    return int(head)
