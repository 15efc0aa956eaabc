"""The compiled loop that empties a network: messages of known sizes, from their first packet to the last."""

from typing import NamedTuple

import numpy as np

from taskgraph.jit import inner, kernel
from taskgraph.network.router import TURN, Net, Rules, Sent, State, enter, give_back, serve


class Sends(NamedTuple):
    """Messages of streams, collectives that run at once: of each stream in the order of their sources, with the first
    of each node (streams, nodes + 1); targets, packets still to send, and the packets of each stream that have arrived
    when its messages have (streams,)."""

    first: np.ndarray
    targets: np.ndarray
    left: np.ndarray
    wanted: np.ndarray


@inner
def _offer(net: Net, rules: Rules, sends: Sends, lanes: int, state: State, node: int, now: int) -> None:
    """Put packets of the node's messages into its slots. A message has `lanes` slots of its own, so that none waits
    behind another. Its packets have their number for `TURN`."""
    width = state.slots.shape[1] // sends.first.shape[0]
    for stream in range(sends.first.shape[0]):
        for m in range(sends.first[stream, node], sends.first[stream, node + 1]):
            slot = stream * width + (m - sends.first[stream, node]) * lanes
            for lane in range(slot, slot + lanes):
                if sends.left[m] > 0 and state.slots[node, lane] < 0:
                    state.counts[TURN] = sends.left[m]
                    enter(net, rules, state, node, lane, Sent(sends.targets[m], now, stream), now, now)
                    sends.left[m] -= 1


@inner
def _ended(state: State, sends: Sends) -> bool:
    ended = False
    for stream in range(sends.wanted.size):
        ended |= state.arrived[stream] >= sends.wanted[stream]
    return ended


@kernel
def drain(net: Net, rules: Rules, sends: Sends, lanes: int, state: State, now: int, patience: int) -> int:
    """The cycle after `now` in which the last packet of a stream's messages arrives; -1 where none moves for `patience`
    cycles."""
    nodes, idle = net.at.shape[0], 0
    while not _ended(state, sends):
        moved = 0
        for node in range(nodes):
            _offer(net, rules, sends, lanes, state, node, now)
        for node in range(nodes):
            if state.inside[node] > 0:
                moved = serve(net, rules, state, node, now, now, moved)
        give_back(state, moved)
        idle = 0 if moved > 0 else idle + 1
        if idle > patience:
            return -1
        now += 1
    return now
