"""Topologies as values: grids of one or more dimensions, whose links are alike, and graphs given by their links."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.record import instance, integer, number, sequence, text

MOST_NODES = 4096
MOST_GRAPH = 1024
MOST_PORTS = 62
RATE = 50e9
"""Bytes per second and direction of a link whose rate nobody gave."""
LATENCY_S = 500e-9


@dataclass(frozen=True, slots=True)
class Topology:
    """A torus (`wrap`) or mesh of shape (k1, .., kn); every node is a host, numbered with the last dimension fastest.

    A node has 2n outgoing links: link 2n*node + 2d leads up in dimension d, the next one down. Each moves
    `bytes_per_s` and takes `latency_s`. In a mesh those that would leave the grid are absent. NetworkError where a size
    is below 2, there are more than 4096 nodes, or a rate is not above 0.

    A graph instead has shape (), `links` as (from, to) and `hosts`: nodes 0 to hosts - 1 are hosts, the others
    switches; a node has at most 62 links out. `rates` and `latencies` are those of each link where they are not alike;
    `bytes_per_s` is the fastest. `tiers` says that hosts in their order are so many groups of so many: machines and
    their devices (`machines`, `hosts_of`), say. NetworkError where a host cannot reach another."""

    name: str
    shape: tuple[int, ...]
    wrap: bool
    bytes_per_s: float = RATE
    latency_s: float = LATENCY_S
    links: tuple[tuple[int, int], ...] = ()
    hosts: int = 0
    rates: tuple[float, ...] = ()
    latencies: tuple[float, ...] = ()
    tiers: tuple[int, ...] = ()

    _LATER: ClassVar[frozenset[str]] = frozenset({"links", "hosts", "rates", "latencies", "tiers"})

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        text("the topology's name", self.name, NetworkError)
        number(f"bytes_per_s of {self.name!r}", self.bytes_per_s, NetworkError, 0, above=True)
        number(f"latency_s of {self.name!r}", self.latency_s, NetworkError, 0)
        if self.links:
            self._check_graph()
            return
        if self.rates or self.latencies or self.tiers:
            raise NetworkError(f"{self.name!r} is a grid, whose links are alike; leave rates, latencies and tiers out.")
        sizes = sequence(f"the shape of {self.name!r}", self.shape, NetworkError)
        if not sizes:
            raise NetworkError(f"the shape of {self.name!r} is empty; give a size for each dimension, such as (8, 8).")
        for size in sizes:
            integer(f"a size of {self.name!r}", size, NetworkError, 2, MOST_NODES)
        object.__setattr__(self, "shape", tuple(sizes))
        if not isinstance(self.wrap, bool):
            raise NetworkError(f"wrap of {self.name!r} is {self.wrap!r}; use True for a torus, False for a mesh.")
        if self.nodes > MOST_NODES:
            raise NetworkError(f"{self.name!r} has {self.nodes} nodes; use at most {MOST_NODES}.")
        if self.hosts not in (0, self.nodes):
            raise NetworkError(f"{self.name!r} has {self.nodes} nodes, all hosts, not {self.hosts}; leave hosts out.")
        object.__setattr__(self, "hosts", self.nodes)

    def _check_graph(self) -> None:
        if self.shape or self.wrap:
            raise NetworkError(f"{self.name!r} has links and a shape; a graph has the shape ().")
        made = []
        for link in sequence(f"the links of {self.name!r}", self.links, NetworkError):
            if len(sequence(f"a link of {self.name!r}", link, NetworkError)) != 2 or link[0] == link[1]:
                raise NetworkError(f"{self.name!r} has the link {link!r}; a link is a pair of two nodes.")
            made.append(
                tuple(integer(f"a node of {self.name!r}", each, NetworkError, 0, MOST_GRAPH - 1) for each in link)
            )
        object.__setattr__(self, "links", tuple(made))
        if len(set(made)) < len(made):
            raise NetworkError(f"{self.name!r} has a link twice; give each pair once.")
        integer(f"hosts of {self.name!r}", self.hosts, NetworkError, 2, self.nodes)
        self._check_links()
        most = int(np.bincount([tail for tail, _ in made]).max())
        if most > MOST_PORTS:
            raise NetworkError(
                f"a node of {self.name!r} has {most} links out; use at most {MOST_PORTS}, or two levels."
            )
        far = self.distances()
        apart = np.argwhere(far[: self.hosts, : self.hosts] < 0)
        if len(apart):
            raise NetworkError(
                f"{self.name!r} is not connected: host {apart[0][0]} cannot reach host {apart[0][1]}. Add links."
            )

    def _check_links(self) -> None:
        for field, low in (("rates", True), ("latencies", False)):
            found = sequence(f"{field} of {self.name!r}", getattr(self, field), NetworkError)
            if found and len(found) != len(self.links):
                raise NetworkError(
                    f"{self.name!r} has {len(self.links)} links and {len(found)} {field}; give one each."
                )
            made = tuple(number(f"one of the {field} of {self.name!r}", x, NetworkError, 0, above=low) for x in found)
            object.__setattr__(self, field, made)
        if self.rates and max(self.rates) != self.bytes_per_s:
            raise NetworkError(f"bytes_per_s of {self.name!r} is {self.bytes_per_s}; its fastest link is another.")
        if self.tiers and math.prod(self.tiers) != self.hosts:
            raise NetworkError(f"the tiers {self.tiers} of {self.name!r} are not its {self.hosts} hosts.")

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return max(map(max, self.links)) + 1 if self.links else math.prod(self.shape)

    def distances(self) -> np.ndarray:
        """(nodes, nodes) int64: hops from each node to each; -1 where there is no way."""
        heads = self.heads().reshape(self.nodes, -1)
        far = np.full((self.nodes, self.nodes), -1, np.int64)
        for source in range(self.nodes):
            front, hops = np.array([source]), 0
            while front.size:
                far[source, front] = hops
                there = np.unique(heads[front])
                front, hops = there[(there >= 0) & (far[source, there] < 0)], hops + 1
        return far

    def grid(self, what: str) -> None:
        """NetworkError if this is a graph; `what` says who needs a grid."""
        if self.links:
            raise NetworkError(
                f"{what} is made for tori and meshes; {self.name!r} is a graph. Use a grid, or shortest."
            )

    def coordinates(self) -> np.ndarray:
        """(nodes, n) int64: where each node is; n = 0 in a graph."""
        if self.links:
            return np.zeros((self.nodes, 0), np.int64)
        grid: np.ndarray = np.stack(np.unravel_index(np.arange(self.nodes), self.shape), axis=1).astype(np.int64)
        return grid

    def heads(self) -> np.ndarray:
        """(links,) int64: the node that each link leads to; -1 for one that is absent. In a graph all
        nodes have as many places for links as the one with most, filled in the order of `links`."""
        if self.links:
            tails = np.array(self.links)[:, 0]
            places = np.full((self.nodes, int(np.bincount(tails).max())), -1, np.int64)
            used = [0] * self.nodes
            for tail, head in self.links:
                places[tail, used[tail]] = head
                used[tail] += 1
            return places.reshape(-1)
        at, n = self.coordinates(), len(self.shape)
        heads = np.empty((self.nodes, 2 * n), np.int64)
        for d, size in enumerate(self.shape):
            for side, step in enumerate((1, -1)):
                there = at.copy()
                there[:, d] += step
                gone = (there[:, d] < 0) | (there[:, d] >= size)
                there[:, d] %= size
                found = np.ravel_multi_index(tuple(there.T), self.shape)
                heads[:, 2 * d + side] = np.where(gone & (not self.wrap), -1, found)
        return heads.reshape(-1)

    def rates_by_place(self) -> np.ndarray:
        """(links,) bytes/s of each link, by the places of `heads`."""
        return self._by_place(self.rates, self.bytes_per_s)

    def latencies_by_place(self) -> np.ndarray:
        """(links,) seconds of each link, by the places of `heads`."""
        return self._by_place(self.latencies, self.latency_s)

    def _by_place(self, values: tuple[float, ...], every: float) -> np.ndarray:
        made = np.full(self.heads().size, every)
        if values:
            most = made.size // self.nodes
            used = [0] * self.nodes
            for (tail, _), value in zip(self.links, values, strict=True):
                made[tail * most + used[tail]] = value
                used[tail] += 1
        return made

    def injection_bytes_per_s(self) -> float:
        """What the first host sends at most, by all its links."""
        most = self.heads().size // self.nodes
        return float(self.rates_by_place()[:most][self.heads()[:most] >= 0].sum())

    def place(self, ranks: int) -> range:
        """The hosts of `ranks` ranks, in order; NetworkError where there are more ranks than hosts."""
        integer("ranks", ranks, NetworkError, 1)
        if ranks > self.hosts:
            raise NetworkError(f"{ranks} ranks on {self.name!r}, which has {self.hosts} hosts; use a larger network.")
        return range(ranks)


def torus(*shape: int, bytes_per_s: float = RATE, latency_s: float = LATENCY_S) -> Topology:
    """A torus: `torus(8, 8)` is the 8-ary 2-cube. A dimension of size 2 has two links between its nodes."""
    return Topology(f"torus:{'x'.join(map(str, shape))}", shape, True, bytes_per_s, latency_s)


def ring(nodes: int, bytes_per_s: float = RATE, latency_s: float = LATENCY_S) -> Topology:
    """A ring with links both ways: a torus of one dimension."""
    return Topology(f"ring:{nodes}", (nodes,), True, bytes_per_s, latency_s)


def mesh(*shape: int, bytes_per_s: float = RATE, latency_s: float = LATENCY_S) -> Topology:
    """A mesh: a torus without the links that close each dimension."""
    return Topology(f"mesh:{'x'.join(map(str, shape))}", shape, False, bytes_per_s, latency_s)


def from_links(
    name: str,
    hosts: int,
    links: Iterable[tuple[int, int]],
    bytes_per_s: float | Sequence[float] = RATE,
    latency_s: float | Sequence[float] = LATENCY_S,
    tiers: tuple[int, ...] = (),
) -> Topology:
    """A graph of at most 1024 nodes; each pair of `links` is joined both ways. Nodes 0 to hosts - 1 are hosts. Rates
    and latencies are one for all, or one for each pair."""
    pairs = list(links)
    both = [end for a, b in pairs for end in ((a, b), (b, a))]
    if not both:
        raise NetworkError(f"{name!r} has no links; give pairs of nodes, such as [(0, 1)].")
    rates, latencies = (_each_way(what, len(pairs)) for what in (bytes_per_s, latency_s))
    one = bytes_per_s if not isinstance(bytes_per_s, Sequence) else max(bytes_per_s)
    least = latency_s if not isinstance(latency_s, Sequence) else min(latency_s)
    return Topology(name, (), False, one, least, tuple(both), hosts, rates, latencies, tiers)


def _each_way(values: float | Sequence[float], pairs: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence):
        return ()
    if len(values) != pairs:
        raise NetworkError(f"there are {pairs} pairs of nodes and {len(values)} rates or latencies; give one each.")
    return tuple(value for value in values for _ in range(2))


def switch(hosts: int, bytes_per_s: float = RATE, latency_s: float = LATENCY_S) -> Topology:
    """2 to 62 hosts fully connected through one switch, as by NVLink; two hops from any to any."""
    integer("hosts", hosts, NetworkError, 2, MOST_PORTS)
    return from_links(f"switch:{hosts}", hosts, [(i, hosts) for i in range(hosts)], bytes_per_s, latency_s)


def fat_tree(
    leaves: int, hosts_a_leaf: int, spines: int, bytes_per_s: float = RATE, latency_s: float = LATENCY_S
) -> Topology:
    """Two levels: each of `leaves` switches has its hosts, and a link to each of `spines` switches."""
    for name, value, low in (("leaves", leaves, 2), ("hosts_a_leaf", hosts_a_leaf, 1), ("spines", spines, 1)):
        integer(name, value, NetworkError, low, MOST_PORTS)
    hosts = leaves * hosts_a_leaf
    down = [(i, hosts + i // hosts_a_leaf) for i in range(hosts)]
    up = [(hosts + leaf, hosts + leaves + spine) for leaf in range(leaves) for spine in range(spines)]
    name, tiers = f"fat-tree:{leaves}x{hosts_a_leaf}+{spines}", (leaves, hosts_a_leaf)
    return from_links(name, hosts, down + up, bytes_per_s, latency_s, tiers)


def machines(
    count: int,
    devices: int,
    inner: tuple[float, float] = (RATE, LATENCY_S),
    outer: tuple[float, float] = (RATE, LATENCY_S),
) -> Topology:
    """`count` machines of `devices`, each machine with a switch between its devices (NVLink), and each device with a
    link of its own (its NIC) to a network between the machines that has room for all, one switch a device's number.

    `inner` and `outer` are (bytes/s, seconds) of a link; a way through a switch is two of them."""
    for name, value in (("count", count), ("devices", devices)):
        integer(name, value, NetworkError, 2, MOST_PORTS)
    hosts = count * devices
    pairs = [(i, hosts + i // devices) for i in range(hosts)]
    pairs += [(i, hosts + count + i % devices) for i in range(hosts)]
    rates, latencies = ([inner[k]] * hosts + [outer[k]] * hosts for k in range(2))
    return from_links(f"machines:{count}x{devices}", hosts, pairs, rates, latencies, (count, devices))


def hosts_of(devices: int, outer: Topology, inner: tuple[float, float] = (RATE, LATENCY_S)) -> Topology:
    """`outer` with `devices` in each of its hosts: a graph in which a switch takes the host's place, with the host's
    links, which its devices share, and a link of `inner` (bytes/s, seconds) to each device."""
    instance("outer", outer, Topology, NetworkError, "Make one by torus(4, 4) or fat_tree(2, 4, 2).")
    integer("devices", devices, NetworkError, 2, MOST_PORTS)
    hosts = outer.hosts * devices
    if hosts + outer.nodes > MOST_GRAPH:
        raise NetworkError(
            f"{devices} devices in each of {outer.hosts} hosts make a graph of {hosts + outer.nodes} nodes; use a "
            f"network of at most {MOST_GRAPH}."
        )
    heads, most = outer.heads(), outer.heads().size // outer.nodes
    pairs = [(i, hosts + i // devices) for i in range(hosts)]
    rates = dict.fromkeys([end for a, b in pairs for end in ((a, b), (b, a))], inner[0])
    latencies = dict.fromkeys(rates, inner[1])
    kinds = zip(heads.tolist(), outer.rates_by_place().tolist(), outer.latencies_by_place().tolist(), strict=True)
    for place, (head, rate, latency) in enumerate(kinds):
        if head >= 0:
            link = hosts + place // most, hosts + head
            rates[link] = rates.get(link, 0.0) + rate  # a torus has two links between two nodes of a dimension of 2
            latencies[link] = latency
    return Topology(
        f"{outer.name}*{devices}", (), False, max(rates.values()), min(latencies.values()), tuple(rates), hosts,
        tuple(rates.values()), tuple(latencies.values()), (*(outer.shape or outer.tiers or (outer.hosts,)), devices),
    )  # fmt: skip
