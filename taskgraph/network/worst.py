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
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise NetworkError("worst-case traffic needs SciPy; install taskgraph[calibrate].") from None
    way, hosts = routing_for(topology, routing), topology.hosts
    heads = topology.heads()
    links = np.flatnonzero(heads[: 2 * len(topology.shape)] >= 0) if topology.wrap else np.flatnonzero(heads >= 0)
    loads = np.zeros((hosts, hosts, len(links)))
    for source in range(hosts):
        for target in range(hosts):
            if source != target:
                one = Flows(np.array([source]), np.array([target]), np.ones(1))
                loads[source, target] = link_loads(topology, way, one)[0, links]
    best, most = np.arange(hosts), -1.0
    for link in range(len(links)):
        rows, order = linear_sum_assignment(loads[:, :, link], maximize=True)
        load = float(loads[rows, order, link].sum())
        if load > most + 1e-9:
            best, most = order, load
    return permutation(topology, best, "worst-case")
