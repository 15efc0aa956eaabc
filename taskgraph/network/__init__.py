"""Networks under collectives: topologies as values, routings, a simulator of links, and collectives on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgraph.network.bounds import capacity as capacity
    from taskgraph.network.bounds import throughput_bound as throughput_bound
    from taskgraph.network.cluster import Network as Network
    from taskgraph.network.cluster import network as network
    from taskgraph.network.collectives import (
        ALGORITHMS as ALGORITHMS,
    )
    from taskgraph.network.collectives import (
        COLLECTIVES as COLLECTIVES,
    )
    from taskgraph.network.collectives import (
        Schedule as Schedule,
    )
    from taskgraph.network.collectives import (
        schedule as schedule,
    )
    from taskgraph.network.fluid import Call as Call
    from taskgraph.network.fluid import Cost as Cost
    from taskgraph.network.fluid import collective_cost as collective_cost
    from taskgraph.network.fluid import fluid_cost as fluid_cost
    from taskgraph.network.fluid import fluid_together as fluid_together
    from taskgraph.network.packets import Run as Run
    from taskgraph.network.packets import packet_run as packet_run
    from taskgraph.network.packets import packets_together as packets_together
    from taskgraph.network.patterns import (
        PATTERNS as PATTERNS,
    )
    from taskgraph.network.patterns import (
        Traffic as Traffic,
    )
    from taskgraph.network.patterns import (
        permutation as permutation,
    )
    from taskgraph.network.patterns import (
        traffic as traffic,
    )
    from taskgraph.network.routing import ROUTINGS as ROUTINGS
    from taskgraph.network.routing import Routing as Routing
    from taskgraph.network.simulator import (
        Outcome as Outcome,
    )
    from taskgraph.network.simulator import (
        Routers as Routers,
    )
    from taskgraph.network.simulator import (
        saturation as saturation,
    )
    from taskgraph.network.simulator import (
        simulate as simulate,
    )
    from taskgraph.network.topology import (
        Topology as Topology,
    )
    from taskgraph.network.topology import (
        fat_tree as fat_tree,
    )
    from taskgraph.network.topology import (
        from_links as from_links,
    )
    from taskgraph.network.topology import (
        hosts_of as hosts_of,
    )
    from taskgraph.network.topology import (
        machines as machines,
    )
    from taskgraph.network.topology import (
        mesh as mesh,
    )
    from taskgraph.network.topology import (
        ring as ring,
    )
    from taskgraph.network.topology import (
        switch as switch,
    )
    from taskgraph.network.topology import (
        torus as torus,
    )
    from taskgraph.network.worst import worst_case as worst_case

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
