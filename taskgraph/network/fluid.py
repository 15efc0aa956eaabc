"""Times of collectives on a network by a fluid model: links share out what goes over them; `packets` checks it."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.cluster import Network
from taskgraph.network.collectives import Phase, Schedule, schedule
from taskgraph.network.flows import Flows, around_s, link_loads, longest_s
from taskgraph.network.routing import ROUTINGS
from taskgraph.record import number

NEAR = 0.8
"""Share of the latency of a phase's longest way in a grid that no full link hides; fitted to the packets."""
DRAWN_REACH = 0.86
"""Share of its rate that a link reaches where ways are drawn at random, packet by packet; fitted likewise."""


class Cost(NamedTuple):
    """Of each kind of phase: how many there are, seconds of latency, those that the fullest link does not hide, and
    seconds a byte of the whole message by the fullest link and by the fullest of what its own node sends."""

    times: np.ndarray
    latency_s: np.ndarray
    around_s: np.ndarray
    fullest: np.ndarray
    own: np.ndarray

    def seconds(self, nbytes: float) -> float:
        """A phase ends when the packets that leave last have gone their way, and not before the fullest link has
        taken all of its own, which have to come there first and then to go on."""
        late = self.latency_s + self.own * nbytes
        full = self.around_s + self.fullest * nbytes
        return float(self.times @ np.maximum(late, full))


def collective_cost(network: Network, collective: str, ranks: int, nbytes: float) -> tuple[str, Cost]:
    """The algorithm for a message of `nbytes` (the whole of it, see `Schedule`), and what it costs by the fluid model.

    A phase takes the latency of its longest way and the time of its fullest link, the next begins after it.
    NetworkError for more ranks than hosts, or where the network's algorithm has no schedule for it."""
    number("nbytes", nbytes, NetworkError, 0)
    found = [(name, fluid_cost(network, collective, name, ranks)) for name in network.algorithms(collective, ranks)]
    return min(found, key=lambda each: each[1].seconds(nbytes))


@lru_cache(maxsize=4096)
def fluid_cost(network: Network, collective: str, algorithm: str, ranks: int) -> Cost:
    """The cost of one algorithm by the fluid model."""
    made, nodes = placed(network, collective, algorithm, ranks)
    way, rates = ROUTINGS[network.routing], network.topology.rates_by_place()
    known: dict[tuple[bytes, ...], list[float]] = {}
    for phase in made.phases:
        flows = flows_in(phase, nodes, made.chunk_share)
        key = tuple(each.tobytes() for each in flows)
        if key not in known:
            reached = rates * (DRAWN_REACH if way.detour or way.weighted else 1.0)
            loads = link_loads(network.topology, way, flows) / reached
            fullest, own = loads.max(1).tolist()
            late_s = longest_s(network.topology, way, flows)
            full = loads[0] >= fullest * (1 - 1e-9)
            around = around_s(network.topology, flows, full) if way.graphs else NEAR * late_s
            known[key] = [0.0, late_s, around, fullest, own]
        known[key][0] += 1.0
    return Cost(*np.array(list(known.values())).reshape(-1, 5).T)


def placed(network: Network, collective: str, algorithm: str, ranks: int) -> tuple[Schedule, np.ndarray]:
    """The schedule, and the nodes (groups, ranks) of its ranks: in a ring as neighbours follow each other."""
    place, nodes = network.place(ranks), network.groups(ranks)
    made = schedule(collective, algorithm, ranks, place.grid, place.torus)
    if algorithm == "ring" and place.grid:
        nodes = nodes[:, _snake(place.grid)]
    return made, nodes


def _snake(grid: tuple[int, ...]) -> np.ndarray:
    """The places of a grid in an order in which each is a neighbour of the next."""
    order = np.arange(grid[-1])
    for size in reversed(grid[:-1]):
        order = np.concatenate([(order if i % 2 == 0 else order[::-1]) + i * len(order) for i in range(size)])
    return order


def flows_in(phase: Phase, nodes: np.ndarray, share: float) -> Flows:
    """What goes between nodes in a phase, in all groups at once; chunks are `share` of the message."""
    source, target, count = np.array([(m.source, m.target, len(m.chunks)) for m in phase], np.int64).T
    amount = np.tile(count * share, len(nodes))
    return Flows(nodes[:, source].reshape(-1), nodes[:, target].reshape(-1), amount)
