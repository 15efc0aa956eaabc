"""Collectives through the simulator of packets, which the fluid model is checked against."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.cluster import Network
from taskgraph.network.drain import Sends, drain
from taskgraph.network.flows import Flows
from taskgraph.network.fluid import Call, check_calls, flows_in, placed
from taskgraph.network.router import DELIVERED, HOPS, NEVER, STUCK
from taskgraph.network.routing import ROUTINGS
from taskgraph.network.simulator import Routers, net_of, rules_of, state_of
from taskgraph.record import integer, number


@dataclass(frozen=True, slots=True)
class Run:
    """Collectives as the simulator of packets saw them; `each_s`: when each of them ended. Kind: simulated."""

    seconds: float
    packets: int
    hops: int
    cycles: int
    each_s: tuple[float, ...]


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
    return packets_together(network, [Call(collective, algorithm, ranks, nbytes)], packet_bytes, seed)


def packets_together(network: Network, calls: Sequence[Call], packet_bytes: float = 4096.0, seed: int = 0) -> Run:
    """`packet_run` of collectives that begin at once and share links; each goes on by itself from phase to phase."""
    check_calls(calls)
    number("packet_bytes", packet_bytes, NetworkError, 0, above=True)
    integer("seed", seed, NetworkError, 0)
    topology, way = network.topology, ROUTINGS[network.routing]
    rates = topology.rates_by_place()
    cycle_s = packet_bytes / rates.max()
    periods = np.maximum(np.rint(rates.max() / rates), 1).astype(np.int64)
    hops = np.maximum(np.rint(topology.latencies_by_place() / cycle_s).astype(np.int64) + periods - 1, 1)
    routers = Routers(min(64, 8 * way.classes(topology)), int(max(16, hops.max())), int(hops.max()), choice="turns")
    lanes = 1 if way.graphs else 2
    todo = [_phases(network, call, packet_bytes) for call in calls]
    width = lanes * max((int(np.diff(sends.first).max()) for phases in todo for sends in phases), default=1)
    state = state_of(topology, routers, width * len(calls), seed)
    net, rules = net_of(topology, hops, periods), rules_of(topology, way, routers, 1.0)
    now, ends = 0, [0] * len(calls)
    while any(todo):
        sends = _at_once(todo, topology.nodes)
        now = drain(net, rules, sends, lanes, state, now, STUCK + int(hops.max()) + int(periods.max()))
        if now < 0:
            raise NetworkError(f"{topology.name!r} is in deadlock: packets wait and none moves.")
        _ended(todo, sends, state.arrived, ends, now)
    each = tuple(end * cycle_s for end in ends)
    return Run(max(each), int(state.counts[DELIVERED]), int(state.counts[HOPS]), now, each)


def _phases(network: Network, call: Call, packet_bytes: float) -> list[Sends]:
    """The messages of each phase of a collective; all that arrive until its end."""
    made, nodes = placed(network, call.collective, call.algorithm, call.ranks)
    phases, total = [], 0
    for phase in made.phases:
        flows = flows_in(phase, nodes, made.chunk_share)
        phases.append(_sends(flows, call.nbytes, packet_bytes, network.topology.nodes, total))
        total = int(phases[-1].wanted[0])
    return phases


def _sends(flows: Flows, nbytes: float, packet_bytes: float, nodes: int, before: int) -> Sends:
    order = np.argsort(flows.source, kind="stable")
    left = np.maximum(np.ceil(flows.amount[order] * nbytes / packet_bytes - 1e-9), 1).astype(np.int64)
    first = np.searchsorted(flows.source[order], np.arange(nodes + 1)).astype(np.int64)
    return Sends(first[None], flows.target[order].astype(np.int64), left, np.array([before + left.sum()]))


def _at_once(todo: list[list[Sends]], nodes: int) -> Sends:
    """The phases that are under way, as one; a collective that has ended has no messages and never ends again."""
    none = np.zeros(0, np.int64)
    now = [
        phases[0] if phases else Sends(np.zeros((1, nodes + 1), np.int64), none, none, np.array([NEVER]))
        for phases in todo
    ]
    starts = np.cumsum([0, *(len(each.left) for each in now[:-1])])
    first = np.concatenate([each.first + start for each, start in zip(now, starts, strict=True)])
    return Sends(first, *(np.concatenate(column) for column in list(zip(*now, strict=True))[1:]))


def _ended(todo: list[list[Sends]], sends: Sends, arrived: np.ndarray, ends: list[int], now: int) -> None:
    """Note what is still to send of the phases under way, and drop those that have ended at `now`."""
    for stream, phases in enumerate(todo):
        if phases:
            phases[0].left[:] = sends.left[sends.first[stream, 0] : sends.first[stream, -1]]
            if arrived[stream] >= phases[0].wanted[0]:
                del phases[0]
                ends[stream] = now
