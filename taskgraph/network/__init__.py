"""Networks under collectives: topologies as values, routings, traffic, and a simulator of links."""

from taskgraph.network.bounds import capacity, throughput_bound
from taskgraph.network.routing import ROUTINGS, Routing
from taskgraph.network.simulate import Outcome, Routers, saturation, simulate
from taskgraph.network.topology import Topology, fat_tree, from_links, mesh, ring, switch, torus
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
    "fat_tree",
    "from_links",
    "mesh",
    "ring",
    "saturation",
    "simulate",
    "switch",
    "throughput_bound",
    "torus",
    "traffic",
]
