"""The traffic that a routing takes worst: the permutation that fills one of its links most."""

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.flows import Flows, link_loads
from taskgraph.network.patterns import Traffic, permutation
from taskgraph.network.routing import routing_for
from taskgraph.network.topology import Topology


def worst_case(topology: Topology, routing: str) -> Traffic:
    """The permutation of hosts under which the fullest link is fullest: for every link the matching of sources and
    targets whose packets load it most (Towles and Dally 2002). In a torus the links out of one node stand for all.

    It is the worst for dimension order and Valiant; for an adaptive routing for `link_loads`, which is an estimate.
    NetworkError without SciPy, which finds the matchings (extra `calibrate`)."""
    way, hosts = routing_for(topology, routing), topology.hosts
    every = range(hosts)

    def loads_from(source: int, target: int) -> np.ndarray:
        one = Flows(np.array([source]), np.array([target]), np.ones(1))
        made: np.ndarray = link_loads(topology, way, one)[0]
        return made

    if topology.wrap:
        at, ways = topology.coordinates(), 2 * len(topology.shape)
        alike = np.stack([loads_from(0, to).reshape(hosts, ways) for to in every])
        far, back = (np.ravel_multi_index(x.T, topology.shape, mode="wrap").T for x in (at[None] - at[:, None], -at))
        loads = alike[far, back[:, None]]
    else:
        loads = np.stack([[loads_from(source, to) for to in every] for source in every])
        loads = loads[:, :, topology.heads() >= 0]
    return permutation(topology, fullest(loads)[0], "worst-case")


def fullest(loads: np.ndarray) -> tuple[np.ndarray, float]:
    """The permutation under which the fullest link is fullest, and its load, by (hosts, hosts, links) what a packet
    from one to another loads each link; NetworkError without SciPy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise NetworkError("worst-case traffic needs SciPy; install taskgraph[calibrate].") from None
    best, most = np.arange(len(loads)), -1.0
    for link in range(loads.shape[2]):
        rows, order = linear_sum_assignment(loads[:, :, link], maximize=True)
        load = float(loads[rows, order, link].sum())
        if load > most + 1e-9:
            best, most = order, load
    return best, most
