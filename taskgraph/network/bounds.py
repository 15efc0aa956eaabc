"""What no simulation may exceed: throughput at which a routing's most loaded link is full, from expected loads.

With g the expected packets on a link for one packet sent by every node, throughput is at most 1 / max g packets a node
and cycle. For dimension order and Valiant g is exact, link by link. An adaptive routing chooses in which line of the
grid a packet makes a hop, but not how many hops from each position it makes in each direction of each dimension: the
mean of g over the parallel links there is known, and the largest of these means bounds it."""

import math
from typing import Any

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.jit import njit
from taskgraph.network.routing import Routing, next_ports, routing_for
from taskgraph.network.topology import Topology
from taskgraph.network.traffic import Traffic, traffic
from taskgraph.record import instance


def throughput_bound(topology: Topology, routing: str, pattern: Traffic) -> float:
    """Packets per node and cycle that the routing cannot exceed on the pattern; infinite where nobody uses a link."""
    instance("pattern", pattern, Traffic, NetworkError, "Make one by traffic(topology, name).")
    way, pairs = routing_for(topology, routing), pattern.pairs()
    if pairs.shape[0] != topology.nodes:
        raise NetworkError(f"the traffic is one of {pairs.shape[0]} nodes; {topology.name!r} has {topology.nodes}.")
    if way.adaptive:
        most = _mean_load(topology, way, pairs)
    else:
        most = float(link_loads(topology, way, pairs).max())
    return 1.0 / most if most > 0 else math.inf


def capacity(topology: Topology) -> float:
    """Packets per node and cycle at which links are full under uniform traffic by the shortest ways: 8/k in a k-ary
    torus of even k. Throughputs are published as fractions of it."""
    return throughput_bound(topology, "shortest" if topology.links else "dimension-order", traffic(topology, "uniform"))


def link_loads(topology: Topology, routing: Routing, pairs: np.ndarray) -> np.ndarray:
    """(links,) expected packets on each link when every node sends one packet, for a routing that is not adaptive;
    `pairs` is (nodes, nodes), shares by source and target."""
    if routing.graphs:
        return _table_loads(topology, pairs)
    args: Any = (topology.coordinates(), np.array(topology.shape), topology.heads(), topology.wrap)
    if not routing.detour:
        loads: np.ndarray = _loads(pairs, *args)
        return loads
    nodes = topology.nodes
    first = np.repeat(pairs.sum(1, keepdims=True) / nodes, nodes, axis=1)
    second = np.repeat(pairs.sum(0, keepdims=True) / nodes, nodes, axis=0)
    both: np.ndarray = _loads(first, *args) + _loads(second, *args)
    return both


def _table_loads(topology: Topology, pairs: np.ndarray) -> np.ndarray:
    ports, heads = next_ports(topology), topology.heads().reshape(topology.nodes, -1)
    loads = np.zeros(heads.shape)
    for source, target in np.argwhere(pairs > 0):
        node = int(source)
        while node != target:
            port = ports[node, target]
            loads[node, port] += pairs[source, target]
            node = int(heads[node, port])
    return loads.reshape(-1)


def _mean_load(topology: Topology, routing: Routing, pairs: np.ndarray) -> float:
    at, most = topology.coordinates(), 0.0
    for d, size in enumerate(topology.shape):
        moves = np.zeros((size, size))
        np.add.at(moves, (at[:, None, d], at[None, :, d]), pairs)
        loads = np.zeros((2, size))
        for start, end in zip(*np.nonzero(moves), strict=True):
            for side, hops in enumerate((int(end - start), int(start - end))):
                share = 1.0
                if topology.wrap:
                    hops %= size
                    short = 0.5 if 2 * hops == size else float(2 * hops < size)
                    share = (size - hops) / size if routing.weighted else short
                step = 1 - 2 * side
                for j in range(hops):
                    loads[side, (start + j * step) % size] += share * moves[start, end]
        most = max(most, float(loads.max()) * size / topology.nodes)
    return most


@njit
def _loads(pairs: np.ndarray, at: np.ndarray, shape: np.ndarray, heads: np.ndarray, wrap: bool) -> np.ndarray:
    nodes, n = at.shape
    loads = np.zeros(heads.size)
    for source in range(nodes):
        for target in range(nodes):
            if pairs[source, target] == 0:
                continue
            # Ties are broken dimension by dimension; where a packet turns does not depend on which way round it came.
            node = source
            for d in range(n):
                up = at[target, d] - at[node, d]
                first = node
                for side in range(2):
                    hops, share = (up if side == 0 else -up), 1.0
                    if wrap:
                        hops %= shape[d]
                        share = 0.5 if 2 * hops == shape[d] else (1.0 if 2 * hops < shape[d] else 0.0)
                    if hops <= 0 or share == 0:
                        continue
                    here = first
                    for _ in range(hops):
                        link = here * 2 * n + 2 * d + side
                        loads[link] += share * pairs[source, target]
                        here = heads[link]
                    node = here
    return loads
