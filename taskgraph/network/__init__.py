"""Networks under collectives: topologies as values, routings, traffic, and a simulator of links."""

from taskgraph.network.bounds import capacity, throughput_bound
from taskgraph.network.routing import ROUTINGS, Routing
from taskgraph.network.simulate import Outcome, Routers, saturation, simulate
from taskgraph.network.topology import Topology, mesh, ring, torus
from taskgraph.network.traffic import PATTERNS, Traffic, traffic

__all__ = [
    "PATTERNS",
    "ROUTINGS",
    "Outcome",
    "Routers",
    "Routing",
    "Topology",
    "Traffic",
    "capacity",
    "mesh",
    "ring",
    "saturation",
    "simulate",
    "throughput_bound",
    "torus",
    "traffic",
]
