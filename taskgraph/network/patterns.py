"""Who sends to whom: the patterns that routings are compared on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.topology import Topology
from taskgraph.record import one_of


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """`targets`: (nodes, m) int64, the nodes that each node sends to, all as often; -1: it sends nothing."""

    name: str
    targets: np.ndarray

    def pairs(self) -> np.ndarray:
        """(nodes, nodes) float64: the share of each source's packets that goes to each target."""
        nodes, m = self.targets.shape
        shares = np.zeros((nodes, nodes))
        source, column = np.nonzero(self.targets >= 0)
        np.add.at(shares, (source, self.targets[source, column]), 1.0 / m)
        return shares


def _uniform(topology: Topology) -> np.ndarray:
    made = np.tile(np.arange(topology.hosts), (topology.nodes, 1))
    made[topology.hosts :] = -1  # switches
    return made


def _neighbour(topology: Topology) -> np.ndarray:
    if not topology.wrap:
        raise NetworkError(
            f"nearest-neighbour traffic needs as many neighbours at each node; use a torus instead of "
            f"{topology.name!r}."
        )
    return topology.heads().reshape(topology.nodes, -1)


def _moved(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Topology], np.ndarray]:
    def targets(topology: Topology) -> np.ndarray:
        there = change(topology.coordinates(), np.array(topology.shape))
        made: np.ndarray = np.ravel_multi_index(tuple(there.T), topology.shape).reshape(-1, 1)
        return made

    return targets


def _transpose(topology: Topology) -> np.ndarray:
    if len(set(topology.shape)) != 1 or len(topology.shape) < 2:
        raise NetworkError(
            f"transpose traffic needs two or more dimensions of one size; {topology.name!r} has {topology.shape}."
        )
    return _moved(lambda at, _: np.roll(at, 1, axis=1))(topology)


PATTERNS: dict[str, Callable[[Topology], np.ndarray]] = {
    "uniform": _uniform,
    "nearest-neighbour": _neighbour,
    "bit-complement": _moved(lambda at, size: size - 1 - at),
    "transpose": _transpose,
    "tornado": _moved(lambda at, size: (at + np.append(np.zeros(len(size) - 1, int), (size[-1] - 1) // 2)) % size),
}
"""uniform: any host, itself among them; nearest-neighbour: one of the 2n; bit-complement: from x to k - 1 - x in each
dimension; transpose: coordinates turned round by one dimension; tornado: (k - 1) // 2 up in the last dimension."""


def traffic(topology: Topology, pattern: str) -> Traffic:
    """The pattern of that name on the topology; NetworkError where there is none or it is not made for the topology."""
    make = PATTERNS[one_of("pattern", pattern, PATTERNS, NetworkError)]
    if pattern != "uniform":
        topology.grid(f"{pattern} traffic")
    return Traffic(pattern, np.ascontiguousarray(make(topology), dtype=np.int64))


def permutation(topology: Topology, order: np.ndarray, name: str = "permutation") -> Traffic:
    """Host i sends to order[i] only; NetworkError where `order` is not a permutation of the hosts."""
    made = np.asarray(order)
    if made.shape != (topology.hosts,) or not np.array_equal(np.sort(made), np.arange(topology.hosts)):
        raise NetworkError(f"order must hold each of the {topology.hosts} hosts of {topology.name!r} once.")
    idle = np.full(topology.nodes - topology.hosts, -1)
    return Traffic(name, np.append(made, idle).astype(np.int64).reshape(-1, 1))
