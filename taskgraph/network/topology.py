"""Topologies as values: nodes in a grid of one or more dimensions, joined to their neighbours by links of one rate."""

import math
from dataclasses import dataclass

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.record import integer, number, sequence, text

MOST_NODES = 4096
RATE = 50e9
"""Bytes per second and direction of a link whose rate nobody gave."""
LATENCY_S = 500e-9


@dataclass(frozen=True, slots=True)
class Topology:
    """A torus (`wrap`) or mesh of shape (k1, .., kn); every node is a host, numbered with the last dimension fastest.

    A node has 2n outgoing links: link 2n*node + 2d leads up in dimension d, the next one down. Each moves
    `bytes_per_s` and takes `latency_s`. In a mesh those that would leave the grid are absent. NetworkError where a size
    is below 2, there are more than 4096 nodes, or a rate is not above 0."""

    name: str
    shape: tuple[int, ...]
    wrap: bool
    bytes_per_s: float = RATE
    latency_s: float = LATENCY_S

    def __post_init__(self) -> None:
        text("the topology's name", self.name, NetworkError)
        sizes = sequence(f"the shape of {self.name!r}", self.shape, NetworkError)
        if not sizes:
            raise NetworkError(f"the shape of {self.name!r} is empty; give a size for each dimension, such as (8, 8).")
        for size in sizes:
            integer(f"a size of {self.name!r}", size, NetworkError, 2, MOST_NODES)
        object.__setattr__(self, "shape", tuple(sizes))
        if not isinstance(self.wrap, bool):
            raise NetworkError(f"wrap of {self.name!r} is {self.wrap!r}; use True for a torus, False for a mesh.")
        number(f"bytes_per_s of {self.name!r}", self.bytes_per_s, NetworkError, 0, above=True)
        number(f"latency_s of {self.name!r}", self.latency_s, NetworkError, 0)
        if self.nodes > MOST_NODES:
            raise NetworkError(f"{self.name!r} has {self.nodes} nodes; use at most {MOST_NODES}.")

    @property
    def nodes(self) -> int:
        """How many nodes there are; each is a host."""
        return math.prod(self.shape)

    def coordinates(self) -> np.ndarray:
        """(nodes, n) int64: where each node is."""
        grid: np.ndarray = np.stack(np.unravel_index(np.arange(self.nodes), self.shape), axis=1).astype(np.int64)
        return grid

    def heads(self) -> np.ndarray:
        """(2n * nodes,) int64: the node that each link leads to; -1 for one that a mesh does not have."""
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

    def place(self, ranks: int) -> range:
        """The hosts of `ranks` ranks, in order; NetworkError where there are more ranks than hosts."""
        integer("ranks", ranks, NetworkError, 1)
        if ranks > self.nodes:
            raise NetworkError(f"{ranks} ranks on {self.name!r}, which has {self.nodes} hosts; use a larger network.")
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
