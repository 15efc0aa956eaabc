"""Expected loads of links and lengths of ways, for many flows at once."""

from functools import lru_cache
from itertools import permutations
from math import prod
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from taskgraph.network.routing import Routing, next_ports
from taskgraph.network.topology import Topology

_MOST_ORDERS = 3
"""Dimensions up to which an adaptive routing is taken to use all orders of them alike; beyond it, all rotations."""


_PACKETS = 2
"""Packets of a flow that try how long ways can be."""


class Flows(NamedTuple):
    """(n,) nodes from and to, and how much goes from each to each."""

    source: np.ndarray
    target: np.ndarray
    amount: np.ndarray


class _Table(NamedTuple):
    at: np.ndarray
    heads: np.ndarray
    ports: np.ndarray
    latencies: np.ndarray


@lru_cache(maxsize=16)
def _table(topology: Topology) -> _Table:
    ports = next_ports(topology) if topology.links else np.zeros((0, 0), np.int64)
    return _Table(topology.coordinates(), topology.heads(), ports, topology.latencies_by_place())


def link_loads(topology: Topology, routing: Routing, flows: Flows) -> np.ndarray:
    """(2, links) the expected amount on each link, and the part of it that its own node sends. For an adaptive routing
    an estimate: it is taken to go through the dimensions in all orders alike."""
    table = _table(topology)
    if routing.graphs:
        loads = np.zeros((2, table.heads.size))
        for links, now in _steps(topology, table, flows):
            step = np.bincount(links, flows.amount[now], table.heads.size)
            loads[0] += step
            loads[1] += step * (loads[1].max() == 0.0)
        return loads
    n = len(topology.shape)
    turns = [(*range(d, n), *range(d)) for d in range(n)]
    orders = turns[:1] if not routing.adaptive else list(permutations(range(n))) if n <= _MOST_ORDERS else turns
    loads = np.zeros((2, table.heads.size))
    for part, each in enumerate(_halves(topology, flows) if routing.detour else (flows,)):
        for order in orders:
            made = _grid_loads(topology, each, order, routing.weighted) / len(orders)
            loads += made * [[1.0], [part == 0]]
    return loads


def _halves(topology: Topology, flows: Flows) -> tuple[Flows, Flows]:
    """To a node drawn at random, and on from there."""
    nodes, every = topology.nodes, np.arange(topology.nodes)
    out, into = (np.bincount(ends, flows.amount, nodes) for ends in (flows.source, flows.target))
    some, ends = np.flatnonzero(out), np.flatnonzero(into)
    return (
        Flows(np.repeat(some, nodes), np.tile(every, len(some)), np.repeat(out[some] / nodes, nodes)),
        Flows(np.tile(every, len(ends)), np.repeat(ends, nodes), np.repeat(into[ends] / nodes, nodes)),
    )


def _grid_loads(topology: Topology, flows: Flows, order: tuple[int, ...], weighted: bool) -> np.ndarray:
    """By one dimension after another, in each the short way, or (`weighted`) each way as often as GOAL takes it. Where
    a packet turns does not depend on which way round it came."""
    at, n = _table(topology).at, len(topology.shape)
    loads = np.zeros((2, topology.nodes * 2 * n))
    stride = np.array([prod(topology.shape[d + 1 :]) for d in range(n)])
    start, end = at[flows.source], at[flows.target]
    node = flows.source.astype(np.int64)
    for d in order:
        size, here = topology.shape[d], start[:, d]
        for side, step in enumerate((1, -1)):
            hops = (end[:, d] - here) * step
            if topology.wrap:
                hops %= size
                short = np.where(2 * hops == size, 0.5, 2 * hops < size)
                amount = flows.amount * ((size - hops) / size if weighted else short)
            else:
                amount = flows.amount
            for j in range(int(hops.max(initial=0))):
                on = np.flatnonzero((hops > j) & (amount > 0))
                there = node[on] + ((here[on] + j * step) % size - here[on]) * stride[d]
                link, own = there * 2 * n + 2 * d + side, there == flows.source[on]
                loads[0] += np.bincount(link, amount[on], loads.shape[1])
                loads[1] += np.bincount(link[own], amount[on][own], loads.shape[1])
        node = node + (end[:, d] - here) * stride[d]
    return loads


def _steps(topology: Topology, table: _Table, flows: Flows) -> list[tuple[np.ndarray, np.ndarray]]:
    """The links that flows take at each step in a graph, and which flows."""
    most, made = table.heads.size // topology.nodes, list[tuple[np.ndarray, np.ndarray]]()
    node, now = flows.source.astype(np.int64), np.arange(len(flows.source))
    while True:
        now = now[node[now] != flows.target[now]]
        if not len(now):
            return made
        links = node[now] * most + table.ports[node[now], flows.target[now]]
        made.append((links, now))
        node[now] = table.heads[links]


def around_s(topology: Topology, flows: Flows, full: np.ndarray) -> float:
    """Seconds of latency that the links of a graph marked in `full` (links,) neither begin nor end without: to the
    first that comes to one, and on from it for what has furthest to go."""
    table = _table(topology)
    steps, passed = _steps(topology, table, flows), np.zeros(len(flows.source))
    total = np.zeros(len(passed))
    for links, now in steps:
        total[now] += table.latencies[links]
    before, after = np.full(len(full), np.inf), np.zeros(len(full))
    for links, now in steps:
        np.minimum.at(before, links, passed[now])
        np.maximum.at(after, links, total[now] - passed[now])
        passed[now] += table.latencies[links]
    return float((before + after)[full].max(initial=0.0))


def longest_s(topology: Topology, routing: Routing, flows: Flows) -> float:
    """Seconds of latency of the longest way that packets of the flows take. Where ways are drawn at random it is what
    the largest of so many normal numbers is (Blom 1958) as there are packets, a few a flow, at most the longest."""
    table = _table(topology)
    if routing.graphs:
        passed = np.zeros(len(flows.source))
        for links, now in _steps(topology, table, flows):
            passed[now] += table.latencies[links]
        return float(passed.max(initial=0.0))
    mean, variance, most = np.zeros((3, len(flows.source)))
    for d, size in enumerate(topology.shape):
        away = np.abs(table.at[flows.target, d] - table.at[flows.source, d])
        if routing.detour:
            steps = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).reshape(-1)
            steps = np.minimum(steps, size - steps) if topology.wrap else steps
            moments = 2 * steps.mean(), 2 * steps.var(), 2 * steps.max()
        elif routing.weighted:
            long = np.where(away > 0, size - away, 0)
            part = away / size  # of the packets goes the other way
            moments = away * (1 - part) + long * part, part * (1 - part) * (long - away) ** 2, np.maximum(away, long)
        else:
            short = np.minimum(away, size - away) if topology.wrap else away
            moments = short, 0.0, short
        mean, variance, most = mean + moments[0], variance + moments[1], most + moments[2]
    packets = _PACKETS * max(1, len(mean))
    deviations = NormalDist().inv_cdf((packets - 0.375) / (packets + 0.25))
    hops = np.minimum(most, mean + deviations * np.sqrt(variance))
    return float(hops.max(initial=0.0)) * topology.latency_s
