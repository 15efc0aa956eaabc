"""The compiled loop that empties a network: messages of known sizes, from their first packet to the last."""

from typing import NamedTuple

import numpy as np

from taskgraph.jit import kernel
from taskgraph.network.router import DELIVERED, TURN, Net, Rules, Sent, State, enter, give_back, serve


class Sends(NamedTuple):
    """Messages in the order of their sources: the first of each node (nodes + 1,), targets, packets still to send."""

    first: np.ndarray
    targets: np.ndarray
    left: np.ndarray


@kernel
def drain(net: Net, rules: Rules, sends: Sends, lanes: int, state: State, now: int, patience: int) -> int:
    """The cycle after `now` in which the last packet arrives; -1 where none moves for `patience` cycles. A message has
    `lanes` slots of its host, so that none waits behind another. Its packets have their number for `TURN`."""
    nodes = net.at.shape[0]
    total = 0
    for m in range(sends.left.size):
        total += sends.left[m]
    end = state.counts[DELIVERED] + total
    idle = 0
    while state.counts[DELIVERED] < end:
        moved = 0
        for node in range(nodes):
            for m in range(sends.first[node], sends.first[node + 1]):
                slot = (m - sends.first[node]) * lanes
                for lane in range(slot, slot + lanes):
                    if sends.left[m] > 0 and state.slots[node, lane] < 0:
                        state.counts[TURN] = sends.left[m]
                        enter(net, rules, state, node, lane, Sent(sends.targets[m], now), now, now)
                        sends.left[m] -= 1
        for node in range(nodes):
            if state.inside[node] > 0:
                moved += serve(net, rules, state, node, now, now, moved)
        give_back(state, moved)
        idle = 0 if moved > 0 else idle + 1
        if idle > patience:
            return -1
        now += 1
    return now
