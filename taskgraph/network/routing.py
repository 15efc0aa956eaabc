"""Routings as choices of one table: which way round in each dimension, by which place, and how freely in between."""

from dataclasses import dataclass

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.topology import Topology
from taskgraph.record import one_of


@dataclass(frozen=True, slots=True)
class Routing:
    """How a packet goes.

    `weighted`: the direction in each dimension of size k is drawn at random, the short way (D hops) with probability
    (k - D) / k, so that both directions carry equal load; otherwise the short way, ties at random. `detour`: first to
    a node drawn at random, then on. `adaptive`: each hop in any dimension that still has hops, where most credits are;
    otherwise dimension after dimension. `graphs`: by a shortest way of any graph, of several the one that the target's
    number picks, so that targets spread over them; it is for graphs only.

    A packet's directions are fixed where it starts. That is what keeps every routing here free of deadlock: see
    `classes`."""

    name: str
    weighted: bool = False
    detour: bool = False
    adaptive: bool = False
    graphs: bool = False
    source: str = ""

    def classes(self, topology: Topology) -> int:
        """How many classes of virtual channels it needs to be free of deadlock.

        In a torus a packet that has still to cross the edge of a dimension is in class 0 and any other in class 1
        (Dally and Seitz 1987), in a mesh there is one class; a detour doubles them, a half for each part. An adaptive
        routing has these as a way out by dimension order and one class besides for all other hops (Duato 1993). It may
        come back from there: a way out in dimension d is only taken when all before d are done, and on from there
        positions in d only advance, so that channels of the way out still never wait for each other in a circle.

        In a graph one class does where no circle of links follow each other on ways of the table (as in trees);
        otherwise there is a class for each hop of the longest way (Gunther 1981)."""
        if self.graphs:
            return hop_classes(topology)
        return (2 if topology.wrap else 1) * (2 if self.detour else 1) + (1 if self.adaptive else 0)


ROUTINGS = {
    each.name: each
    for each in (
        Routing("dimension-order", source="Dally and Seitz 1987"),
        Routing("valiant", detour=True, source="Valiant and Brebner 1981"),
        Routing("minimal-adaptive", adaptive=True, source="Duato 1993"),
        Routing("goal", weighted=True, adaptive=True, source="Singh, Dally, Gupta, Towles, ISCA 2003"),
        Routing("shortest", graphs=True, source="Gunther 1981"),
    )
}
"""By name. Dimension order is the only one whose packets can be kept in order."""


def routing_for(topology: Topology, name: str) -> Routing:
    """The routing of that name; NetworkError where there is none, or it is not made for the topology."""
    routing = ROUTINGS[one_of("routing", name, ROUTINGS, NetworkError)]
    if not routing.graphs:
        topology.grid(f"routing {name!r}")
    elif not topology.links:
        raise NetworkError(f"routing {name!r} is made for graphs; {topology.name!r} is a grid. Use dimension-order.")
    if routing.weighted and not topology.wrap:
        raise NetworkError(
            f"routing {name!r} chooses which way round a dimension; {topology.name!r} has one way. Use a torus, or "
            "minimal-adaptive."
        )
    return routing


def next_ports(topology: Topology) -> np.ndarray:
    """(nodes, nodes) int64: which of its links a node of a graph sends by to each target; -1 where none leads."""
    far, heads = topology.distances(), topology.heads().reshape(topology.nodes, -1)
    ports = np.full(far.shape, -1, np.int64)
    for node, there in enumerate(heads):
        used = np.flatnonzero(there >= 0)
        closer = far[there[used]] == far[node] - 1
        wanted = np.arange(len(far)) % np.maximum(closer.sum(0), 1) + 1
        found = used[(np.cumsum(closer, 0) == wanted).argmax(0)]
        ports[node] = np.where(far[node] > 0, found, -1)
    return ports


def hop_classes(topology: Topology) -> int:
    """1 where the links of the table of a graph cannot wait for each other in a circle, else the hops of its longest
    way between hosts."""
    import networkx as nx  # a third of a second, for graphs alone

    ports, heads = next_ports(topology), topology.heads().reshape(topology.nodes, -1)
    most, hosts = heads.shape[1], topology.hosts
    node, target = (each.reshape(-1) for each in np.indices((hosts, hosts)))
    before, hops, pairs = np.full(len(node), -1), 0, set[tuple[int, int]]()
    while len(left := np.flatnonzero(node != target)):
        node, target, before = node[left], target[left], before[left]
        link = node * most + ports[node, target]
        pairs |= set(map(tuple, np.unique(np.stack([before, link], 1), axis=0).tolist())) if hops else set()
        node, before, hops = heads[node, ports[node, target]], link, hops + 1
    return 1 if nx.is_directed_acyclic_graph(nx.DiGraph(sorted(pairs))) else hops
