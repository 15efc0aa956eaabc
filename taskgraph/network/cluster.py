"""A network as devices refer to it: topology, routing, the algorithm of collectives, and the hosts of ranks."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.collectives import ALGORITHMS, COLLECTIVES, Ranks, lacking
from taskgraph.network.routing import routing_for
from taskgraph.network.topology import (
    LATENCY_S,
    MOST_NODES,
    RATE,
    Topology,
    fat_tree,
    hosts_of,
    machines,
    mesh,
    ring,
    switch,
    torus,
)
from taskgraph.record import instance, integer, one_of, sequence, shown, text
from taskgraph.units import parse_rate, parse_seconds

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Network:
    """`routing` is dimension-order, in graphs shortest, unless given. `algorithm` of collectives: a name of
    `ALGORITHMS`, or "auto", the fastest for each. `hosts`: the nodes of ranks 0, 1, ..; () for all hosts in order.

    As many groups of ranks as there is room for do the same at the same time: links are shared with the others.
    NetworkError where the routing is not made for the topology, there is no such algorithm, or a host is none."""

    topology: Topology
    routing: str = ""
    algorithm: str = AUTO
    hosts: tuple[int, ...] = ()

    _LATER: ClassVar[frozenset[str]] = frozenset({"routing", "algorithm", "hosts"})

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        instance(
            "topology", self.topology, Topology, NetworkError, "Make one by torus(4, 4), or read a text by network()."
        )
        if not self.routing:
            object.__setattr__(self, "routing", "shortest" if self.topology.links else "dimension-order")
        routing_for(self.topology, self.routing)
        one_of("algorithm", self.algorithm, (AUTO, *ALGORITHMS), NetworkError)
        found = sequence("hosts", self.hosts, NetworkError)
        made = tuple(integer("a host", each, NetworkError, 0, self.topology.hosts - 1) for each in found)
        if len(set(made)) < len(made):
            raise NetworkError(f"a host of {self.topology.name!r} is given twice; a host has one rank.")
        object.__setattr__(self, "hosts", made)

    @property
    def name(self) -> str:
        """Topology and routing, and the algorithm where it is fixed."""
        fixed = "" if self.algorithm == AUTO else f", {self.algorithm}"
        return f"{self.topology.name} by {self.routing}{fixed}"

    def groups(self, ranks: int) -> np.ndarray:
        """(groups, ranks) int64: the node of each rank of each group; NetworkError for more ranks than hosts."""
        integer("ranks", ranks, NetworkError, 1)
        placed = np.array(self.hosts or range(self.topology.hosts), np.int64)
        if ranks > len(placed):
            raise NetworkError(
                f"{ranks} ranks on {self.topology.name!r}, which has {len(placed)} hosts; use a larger network."
            )
        return placed[: len(placed) // ranks * ranks].reshape(-1, ranks)

    def place(self, ranks: int) -> Ranks:
        """Where a group's ranks are: in a grid, where the hosts in their order fill one."""
        sizes = self.topology.shape or self.topology.tiers
        grid: list[int] = []
        left = ranks
        for size in reversed(sizes):
            grid.insert(0, math.gcd(left, size) if left < size or left % size == 0 else 0)
            left //= max(grid[0], 1)
        box = () if self.hosts or left != 1 or math.prod(grid) != ranks else tuple(k for k in grid if k > 1)
        return Ranks(ranks, box, bool(self.topology.shape))

    def algorithms(self, collective: str, ranks: int) -> tuple[str, ...]:
        """The algorithms that may be used: the one that is fixed, or all that there are for the collective and the
        ranks' place."""
        one_of("collective", collective, COLLECTIVES, NetworkError)
        place = self.place(ranks)
        if self.algorithm != AUTO:
            return (self.algorithm,)
        return tuple(name for name in ALGORITHMS if not lacking(collective, name, place))


_Link = tuple[float, float]


def _links(word: str) -> _Link:
    """(bytes/s, seconds) from "50GB/s" or "50GB/s,2us"."""
    rate, comma, latency = word.partition(",")
    return parse_rate(rate), parse_seconds(latency) if comma else LATENCY_S


_KINDS: dict[str, Callable[..., Topology]] = {
    "torus": torus, "mesh": mesh, "ring": ring, "switch": switch, "fat-tree": fat_tree, "machines": machines,
}  # fmt: skip
_FORMS = (
    "torus:4x4x4, mesh:8x8, ring:16, switch:8, fat-tree:4x8+4 (leaves x hosts + spines), machines:2x8, or one of these "
    "with so many devices in each host, torus:4x4*8"
)
_TEXT = re.compile(r"([a-z_-]+):([0-9]+(?:[x+][0-9]+)*)(?:\*([0-9]+))?(?:@(.+))?")


def network(value: "str | Network | Topology", routing: str = "", algorithm: str = "", link: float = 0.0) -> Network:
    """The network of a text such as "torus:4x4x4", "fat-tree:2x4+2*8" or "machines:2x8@450GB/s,500ns+50GB/s,2us": kind,
    sizes, after * the devices in each host, and after @ bytes/s and latency of a link (of machines and of hosts with
    devices: within one, then between them).

    Without @ a link has `link` bytes/s shared out to the links of a host (0: 50 GB/s each) and 500 ns; between machines
    and between hosts with devices it has 50 GB/s. `routing` and `algorithm`, if given, take the place of those of a
    Network. NetworkError for what is none."""
    if isinstance(value, str):
        value = _parsed(value, link)
    made = value if isinstance(value, Network) else Network(value)
    for name, word in (("routing", routing), ("algorithm", algorithm)):
        text(name, word, NetworkError, empty=True)
    return replace(made, routing=routing or made.routing, algorithm=algorithm or made.algorithm)


def _parsed(word: str, link: float) -> Topology:
    match = _TEXT.fullmatch(word.strip().lower())
    kind = match[1].replace("_", "-") if match else ""
    if match is None or kind not in _KINDS:
        raise NetworkError(f"cannot read {shown(word)} as a network; write {_FORMS}.")
    sizes = [int(n) for n in re.split("[x+]", match[2])]
    if any(size > MOST_NODES for size in sizes):
        raise NetworkError(f"{shown(word)} has a size above {MOST_NODES}; use a smaller network.")
    given = [_links(each) for each in match[4].split("+")] if match[4] else []
    devices = int(match[3]) if match[3] else 0
    if len(given) > (2 if devices or kind == "machines" else 1) or (devices and kind == "machines"):
        raise NetworkError(f"cannot read {shown(word)} as a network; write {_FORMS}.")
    ports = {"torus": 2 * len(sizes), "mesh": 2 * len(sizes), "ring": 2}.get(kind, 1)
    own, between = (link or RATE, LATENCY_S), (RATE, LATENCY_S)
    try:
        if kind == "machines":
            count, each = sizes
            return machines(count, each, *_or(given, own, between))
        if devices:
            inner, outer = _or(given, own, between)
            return hosts_of(devices, _KINDS[kind](*sizes, bytes_per_s=outer[0], latency_s=outer[1]), inner)
        (rate, latency), _ = _or(given, (link / ports or RATE, LATENCY_S), between)
        return _KINDS[kind](*sizes, bytes_per_s=rate, latency_s=latency)
    except (TypeError, ValueError) as error:
        if isinstance(error, NetworkError):
            raise
        raise NetworkError(f"cannot read {shown(word)} as a network; write {_FORMS}.") from None


def _or(given: list[_Link], first: _Link, second: _Link) -> tuple[_Link, _Link]:
    """What is given in place of the two."""
    return (given or [first])[0], given[1] if len(given) > 1 else second
