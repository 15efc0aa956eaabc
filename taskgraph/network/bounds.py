"""What no simulation may exceed: throughput at which a routing's most loaded link is full, from expected loads.

With g the expected packets on a link for one packet sent by every node, throughput is at most 1 / max g packets a node
and cycle. For dimension order and Valiant g is exact, link by link. An adaptive routing chooses in which line of the
grid a packet makes a hop, but not how many hops from each position it makes in each direction of each dimension: the
mean of g over the parallel links there is known, and the largest of these means bounds it."""

import math

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.flows import Flows, link_loads
from taskgraph.network.patterns import Traffic, traffic
from taskgraph.network.routing import Routing, routing_for
from taskgraph.network.topology import Topology
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
        most = float(link_loads(topology, way, flows_of(pairs))[0].max())
    return 1.0 / most if most > 0 else math.inf


def capacity(topology: Topology) -> float:
    """Packets per node and cycle at which links are full under uniform traffic by the shortest ways: 8/k in a k-ary
    torus of even k. Throughputs are published as fractions of it."""
    return throughput_bound(topology, "shortest" if topology.links else "dimension-order", traffic(topology, "uniform"))


def flows_of(pairs: np.ndarray) -> Flows:
    """The flows of (nodes, nodes) amounts by source and target."""
    source, target = np.nonzero(pairs)
    return Flows(source, target, pairs[source, target])


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
