"""Routings as choices of one table: which way round in each dimension, by which place, and how freely in between."""

from dataclasses import dataclass

from taskgraph.errors import NetworkError
from taskgraph.network.topology import Topology
from taskgraph.record import one_of


@dataclass(frozen=True, slots=True)
class Routing:
    """How a packet goes.

    `weighted`: the direction in each dimension of size k is drawn at random, the short way (D hops) with probability
    (k - D) / k, so that both directions carry equal load; otherwise the short way, ties at random. `detour`: first to
    a node drawn at random, then on. `adaptive`: each hop in any dimension that still has hops, where most credits are;
    otherwise dimension after dimension.

    A packet's directions are fixed where it starts. That is what keeps every routing here free of deadlock: see
    `classes`."""

    name: str
    weighted: bool = False
    detour: bool = False
    adaptive: bool = False
    source: str = ""

    def classes(self, topology: Topology) -> int:
        """How many classes of virtual channels it needs to be free of deadlock.

        In a torus a packet that has still to cross the edge of a dimension is in class 0 and any other in class 1
        (Dally and Seitz 1987), in a mesh there is one class; a detour doubles them, a half for each part. An adaptive
        routing has these as a way out by dimension order and one class besides for all other hops (Duato 1993). It may
        come back from there: a way out in dimension d is only taken when all before d are done, and on from there
        positions in d only advance, so that channels of the way out still never wait for each other in a circle."""
        return (2 if topology.wrap else 1) * (2 if self.detour else 1) + (1 if self.adaptive else 0)


ROUTINGS = {
    each.name: each
    for each in (
        Routing("dimension-order", source="Dally and Seitz 1987"),
        Routing("valiant", detour=True, source="Valiant and Brebner 1981"),
        Routing("minimal-adaptive", adaptive=True, source="Duato 1993"),
        Routing("goal", weighted=True, adaptive=True, source="Singh, Dally, Gupta, Towles, ISCA 2003"),
    )
}
"""By name. Dimension order is the only one whose packets can be kept in order."""


def routing_for(topology: Topology, name: str) -> Routing:
    """The routing of that name; NetworkError where there is none, or it is not made for the topology."""
    routing = ROUTINGS[one_of("routing", name, ROUTINGS, NetworkError)]
    if routing.weighted and not topology.wrap:
        raise NetworkError(
            f"routing {name!r} chooses which way round a dimension; {topology.name!r} has one way. Use a torus, or "
            "minimal-adaptive."
        )
    return routing
