"""Networks under collectives: topologies as values, routings, a simulator of links, and collectives on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgraph.network.bounds import capacity, throughput_bound
    from taskgraph.network.cluster import Network, network
    from taskgraph.network.collectives import ALGORITHMS, COLLECTIVES, Schedule, schedule
    from taskgraph.network.fluid import Call, Cost, collective_cost, fluid_cost, fluid_together
    from taskgraph.network.packets import Run, packet_run, packets_together
    from taskgraph.network.patterns import PATTERNS, Traffic, permutation, traffic
    from taskgraph.network.routing import ROUTINGS, Routing
    from taskgraph.network.simulator import Outcome, Routers, saturation, simulate
    from taskgraph.network.topology import Topology, fat_tree, from_links, hosts_of, machines, mesh, ring, switch, torus
    from taskgraph.network.worst import worst_case

_HOME = {
    "bounds": "capacity throughput_bound",
    "cluster": "Network network",
    "collectives": "ALGORITHMS COLLECTIVES Schedule schedule",
    "fluid": "Call Cost collective_cost fluid_cost fluid_together",
    "packets": "Run packet_run packets_together",
    "routing": "ROUTINGS Routing",
    "simulator": "Outcome Routers saturation simulate",
    "topology": "Topology fat_tree from_links hosts_of machines mesh ring switch torus",
    "patterns": "PATTERNS Traffic permutation traffic",
    "worst": "worst_case",
}
"""By the module that has them: those with compiled code are imported when they are asked for."""
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'taskgraph.network' has no attribute {name!r}")
    value = getattr(import_module(f"taskgraph.network.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
