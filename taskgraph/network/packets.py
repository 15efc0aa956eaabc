"""Collectives through the simulator of packets, which the fluid model is checked against."""

from dataclasses import dataclass

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.cluster import Network
from taskgraph.network.drain import Sends, drain
from taskgraph.network.flows import Flows
from taskgraph.network.fluid import flows_in, placed
from taskgraph.network.router import DELIVERED, HOPS, STUCK
from taskgraph.network.routing import ROUTINGS
from taskgraph.network.simulator import Routers, net_of, rules_of, state_of
from taskgraph.record import integer, number


@dataclass(frozen=True, slots=True)
class Run:
    """A collective as the simulator of packets saw it. Kind: simulated."""

    seconds: float
    packets: int
    hops: int
    cycles: int


def packet_run(
    network: Network,
    collective: str,
    algorithm: str,
    ranks: int,
    nbytes: float,
    packet_bytes: float = 4096.0,
    seed: int = 0,
) -> Run:
    """Every packet of every message, phase by phase, through routers of eight virtual channels a class with room for
    the links' latency. A message is a whole number of packets. NetworkError as in `collective_cost`."""
    number("nbytes", nbytes, NetworkError, 0)
    number("packet_bytes", packet_bytes, NetworkError, 0, above=True)
    integer("seed", seed, NetworkError, 0)
    made, nodes = placed(network, collective, algorithm, ranks)
    topology, way = network.topology, ROUTINGS[network.routing]
    rates = topology.rates_by_place()
    cycle_s = packet_bytes / rates.max()
    periods = np.maximum(np.rint(rates.max() / rates), 1).astype(np.int64)
    hops = np.maximum(np.rint(topology.latencies_by_place() / cycle_s).astype(np.int64) + periods - 1, 1)
    classes = way.classes(topology)
    channels = min(64, 8 * classes)
    room = int(max(16, hops.max()))
    routers = Routers(channels, room, int(hops.max()), choice="turns")
    lanes = 1 if way.graphs else 2
    phases = [_sends(flows_in(p, nodes, made.chunk_share), nbytes, packet_bytes, topology.nodes) for p in made.phases]
    offers = lanes * max((int(np.diff(sends.first).max()) for sends in phases), default=1)
    state = state_of(topology, routers, offers, seed)
    net, rules = net_of(topology, hops, periods), rules_of(topology, way, routers, 1.0)
    now = 0
    for sends in phases:
        now = drain(net, rules, sends, lanes, state, now, STUCK + int(hops.max()) + int(periods.max()))
        if now < 0:
            raise NetworkError(f"{topology.name!r} is in deadlock: packets wait and none moves.")
    return Run(now * cycle_s, int(state.counts[DELIVERED]), int(state.counts[HOPS]), now)


def _sends(flows: Flows, nbytes: float, packet_bytes: float, nodes: int) -> Sends:
    order = np.argsort(flows.source, kind="stable")
    left = np.maximum(np.ceil(flows.amount[order] * nbytes / packet_bytes - 1e-9), 1).astype(np.int64)
    first = np.searchsorted(flows.source[order], np.arange(nodes + 1)).astype(np.int64)
    return Sends(first, flows.target[order].astype(np.int64), left)
