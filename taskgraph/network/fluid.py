"""Times of collectives on a network by a fluid model: links share out what goes over them; `packets` checks it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.cluster import Network
from taskgraph.network.collectives import Phase, Schedule, schedule
from taskgraph.network.flows import Flows, around_s, link_loads, longest_s
from taskgraph.network.routing import ROUTINGS
from taskgraph.record import instance, integer, number

NEAR = 0.8
"""Share of the latency of a phase's longest way in a grid that no full link hides; fitted to the packets."""
DRAWN_REACH = 0.86
"""Share of its rate that a link reaches where ways are drawn at random, packet by packet; fitted likewise."""


class Cost(NamedTuple):
    """Of each kind of phase: how many there are, seconds of latency, those that the fullest link does not hide, and
    seconds a byte of the whole message by the fullest link and by the fullest of what its own node sends."""

    times: np.ndarray
    latency_s: np.ndarray
    around_s: np.ndarray
    fullest: np.ndarray
    own: np.ndarray

    def seconds(self, nbytes: float) -> float:
        """A phase ends when the packets that leave last have gone their way, and not before the fullest link has
        taken all of its own, which have to come there first and then to go on."""
        late = self.latency_s + self.own * nbytes
        full = self.around_s + self.fullest * nbytes
        return float(self.times @ np.maximum(late, full))


class Call(NamedTuple):
    """A collective that runs beside others: of `ranks` in every group, by an algorithm, of a message of `nbytes`."""

    collective: str
    algorithm: str
    ranks: int
    nbytes: float


def collective_cost(network: Network, collective: str, ranks: int, nbytes: float) -> tuple[str, Cost]:
    """The algorithm for a message of `nbytes` (the whole of it, see `Schedule`), and what it costs by the fluid model.

    A phase takes the latency of its longest way and the time of its fullest link, the next begins after it.
    NetworkError for more ranks than hosts, or where the network's algorithm has no schedule for it."""
    number("nbytes", nbytes, NetworkError, 0)
    found = [(name, fluid_cost(network, collective, name, ranks)) for name in network.algorithms(collective, ranks)]
    return min(found, key=lambda each: each[1].seconds(nbytes))


@lru_cache(maxsize=4096)
def fluid_cost(network: Network, collective: str, algorithm: str, ranks: int) -> Cost:
    """The cost of one algorithm by the fluid model."""
    order, kinds = _phases(network, collective, algorithm, ranks)
    rows = [
        (times, late, around, *loads.max(1).tolist())
        for (late, around, loads, _), times in zip(
            kinds, np.bincount(order, minlength=len(kinds)).tolist(), strict=True
        )
    ]
    return Cost(*np.array(rows, np.float64).reshape(-1, 5).T)


class _Kind(NamedTuple):
    """A phase: seconds of latency, those that the fullest link does not hide, seconds a byte of the whole message
    (2, links) by each link and by the part of it that its own node sends, and its flows."""

    latency_s: float
    around_s: float
    loads: np.ndarray
    flows: Flows


@lru_cache(maxsize=16)
def _phases(network: Network, collective: str, algorithm: str, ranks: int) -> tuple[list[int], list[_Kind]]:
    """The phases of a collective as numbers of the kinds that there are."""
    made, nodes = placed(network, collective, algorithm, ranks)
    topology, way = network.topology, ROUTINGS[network.routing]
    reached = topology.rates_by_place() * (DRAWN_REACH if way.detour or way.weighted else 1.0)
    known: dict[tuple[bytes, ...], int] = {}
    order, kinds = list[int](), list[_Kind]()
    for phase in made.phases:
        flows = flows_in(phase, nodes, made.chunk_share)
        key = tuple(each.tobytes() for each in flows)
        if key not in known:
            known[key] = len(kinds)
            loads = link_loads(topology, way, flows) / reached
            late_s, full = longest_s(topology, way, flows), loads[0] >= loads[0].max() * (1 - 1e-9)
            kinds.append(_Kind(late_s, around_s(topology, flows, full) if way.graphs else NEAR * late_s, loads, flows))
        order.append(known[key])
    return order, kinds


def fluid_together(network: Network, calls: Sequence[Call]) -> tuple[float, ...]:
    """Seconds until each of some collectives ends that begin at once, by the fluid model.

    Each goes on from phase to phase by itself. A phase waits for what no full link hides, and then its bytes flow: a
    link that several have bytes on gives each an equal share, or what the others leave of it. NetworkError as in
    `collective_cost`."""
    check_calls(calls)
    todo = [_steps(network, call) for call in calls]
    now, ends = 0.0, [0.0] * len(calls)
    while any(todo):
        going = [phases[0] for phases in todo if phases]
        speeds = _speeds([each for each in going if each.wait_s <= 0.0])
        speed = iter(speeds)
        rates = [next(speed) if each.wait_s <= 0.0 else 0.0 for each in going]
        step = min(
            each.wait_s if each.wait_s > 0.0 else each.left / rate for each, rate in zip(going, rates, strict=True)
        )
        now += step
        for each, rate in zip(going, rates, strict=True):
            waits = each.wait_s > 0.0
            each.wait_s = max(each.wait_s - step, 0.0) if waits else 0.0
            each.left -= 0.0 if waits else rate * step
        for stream, phases in enumerate(todo):
            if phases and phases[0].wait_s <= 0.0 and phases[0].left <= 1e-9:
                del phases[0]
                ends[stream] = now
    return tuple(ends)


def check_calls(calls: Sequence[Call]) -> None:
    """NetworkError unless there are collectives, at most eight, of messages that have a size."""
    integer("how many collectives run at once", len(calls), NetworkError, 1, MOST_AT_ONCE)
    for call in calls:
        instance("a collective", call, Call, NetworkError, "Make one by Call(collective, algorithm, ranks, nbytes).")
        number("nbytes", call.nbytes, NetworkError, 0)


MOST_AT_ONCE = 8


@dataclass
class _Step:
    """What is left of a phase: seconds of latency, and the share of its bytes, which keep each link busy `busy_s` in
    so many `messages`."""

    wait_s: float
    left: float
    busy_s: np.ndarray
    messages: np.ndarray


def _steps(network: Network, call: Call) -> list[_Step]:
    order, kinds = _phases(network, call.collective, call.algorithm, call.ranks)
    way, found = ROUTINGS[network.routing], []
    count = [
        link_loads(network.topology, way, each.flows._replace(amount=np.ones(len(each.flows.source))))[0]
        for each in kinds
    ]
    for k in order:
        late, around, loads, _ = kinds[k]
        full_s, own_s = (float(each.max()) * call.nbytes for each in loads)
        flows = full_s > _LEAST_S
        busy_s = loads[0] * (call.nbytes if flows else 0.0)
        found.append(_Step(max(late + own_s, around + full_s) - full_s, float(flows), busy_s, count[k]))
    return found


def _speeds(going: list[_Step]) -> list[float]:
    """Shares of their bytes a second."""
    if not going:
        return []
    every, messages = np.stack([each.busy_s for each in going]), np.stack([each.messages for each in going])
    part = messages / np.maximum(messages.sum(0), 1e-30)
    speeds = np.array([1.0 / max(each.max(), 1e-30) for each in every])
    for _ in range(_ROUNDS):
        before = speeds.copy()
        for i, each in enumerate(every):
            on = each > 0
            others = speeds @ every - speeds[i] * each
            speeds[i] = float((np.maximum(part[i, on], 1.0 - others[on]) / each[on]).min(initial=1e30))
        if np.allclose(before, speeds, rtol=1e-6):
            break
    made: list[float] = speeds.tolist()
    return made


_LEAST_S = 1e-18
"""Bytes that flow in less do not count."""
_ROUNDS = 20
"""Of giving each phase what the others leave of links, until nothing changes."""


def placed(network: Network, collective: str, algorithm: str, ranks: int) -> tuple[Schedule, np.ndarray]:
    """The schedule, and the nodes (groups, ranks) of its ranks: in a ring as neighbours follow each other."""
    place, nodes = network.place(ranks), network.groups(ranks)
    made = schedule(collective, algorithm, ranks, place.grid, place.torus)
    if algorithm == "ring" and place.grid:
        nodes = nodes[:, _snake(place.grid)]
    return made, nodes


def _snake(grid: tuple[int, ...]) -> np.ndarray:
    """The places of a grid in an order in which each is a neighbour of the next."""
    order = np.arange(grid[-1])
    for size in reversed(grid[:-1]):
        order = np.concatenate([(order if i % 2 == 0 else order[::-1]) + i * len(order) for i in range(size)])
    return order


def flows_in(phase: Phase, nodes: np.ndarray, share: float) -> Flows:
    """What goes between nodes in a phase, in all groups at once; chunks are `share` of the message."""
    source, target, count = np.array([(m.source, m.target, len(m.chunks)) for m in phase], np.int64).T
    amount = np.tile(count * share, len(nodes))
    return Flows(nodes[:, source].reshape(-1), nodes[:, target].reshape(-1), amount)
