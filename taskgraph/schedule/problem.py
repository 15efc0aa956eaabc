"""Problem and Budget: what a scheduler is given. Everything it may see is there as numba-ready arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.cost.corunning import CoRunning
from taskgraph.cost.model import Costs, op_table, reached
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph

_TABLE = 2_000_000
"""The most (op, SM count) pairs that a search looks at."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a scheduler may spend: about so many `seconds`, and `seed` for all that it draws, so that equal arguments
    give equal results. With `nano_batches` it may slice the batch of the graph. With `sure`, because nothing will be
    measured, it returns of what it finds the surest gain and not the largest."""

    seconds: float = 1.0
    seed: int = 0
    nano_batches: bool = True
    sure: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be scheduled: the ops of `graph`, written out, on `device`, by the prices of `costs`.

    n ops in topological order, m modes: the SM counts that an op may be launched on.

    sizes (m,) SMs, rising; legal (n, m); seconds (n, m) isolated without launch; use (n, m, 5) what the op takes
    while it runs alone at full speed: SMs, then bytes/s of hbm, h2d, d2h, link; work (n, 4) its bytes on these four.
    Edges in compressed rows (CSR): the predecessors of op i are pred[pred_ptr[i]:pred_ptr[i + 1]]. `capacity` (4,) is
    bytes/s of the soft resources. SMs are hard: what runs in a partition shares its SMs and no others. own_grid (n,):
    ops that can be launched on fewer SMs than their partition has; the others run in the mode of the whole partition.
    energy (n,) in seconds of the device's peak arithmetic, and `together`, what running at once does: see corunning.py.
    """

    graph: Graph
    device: Device
    costs: Costs
    sizes: np.ndarray
    legal: np.ndarray
    seconds: np.ndarray
    use: np.ndarray
    work: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    capacity: np.ndarray
    sm_count: int
    sm_bytes_per_s: float
    launch_s: float
    switch_s: float
    band: np.ndarray
    sources: tuple[str, ...]
    own_grid: np.ndarray
    energy: np.ndarray
    together: CoRunning

    @property
    def n(self) -> int:
        return len(self.legal)

    def on(self, sizes: Sequence[int] | None) -> "Problem":
        """The same ops on other SM counts (None: the usual few)."""
        return make_problem(self.graph, self.device, sizes, self.costs)

    def mode_of(self, sms: int) -> int:
        """The mode of exactly `sms` SMs."""
        return int(np.searchsorted(self.sizes, sms))

    def launched(self, mode: np.ndarray, room: np.ndarray) -> np.ndarray:
        """The modes (n,) that ops of `mode` (n,) really run in within partitions of `room` (n,) SMs: ops without a grid
        of their own take all of it."""
        whole = np.searchsorted(self.sizes, room)
        known = whole < len(self.sizes)
        known[known] = self.sizes[whole[known]] == room[known]
        made: np.ndarray = np.where(self.own_grid | ~known, mode, np.minimum(whole, len(self.sizes) - 1))
        return made

    def sequential_s(self) -> float:
        """Seconds of one op after another, on all SMs that the problem knows."""
        return float(self.seconds[:, -1].sum()) + self.n * self.launch_s

    def settled(self, seconds: float, parts: bool, beside: float = 0.0) -> float:
        """What a plan of `seconds` takes at the clocks that its power leaves.

        With `parts`, no lane with all SMs, ops are timed at the full clocks of a part of the device, and the average
        power of a replay decides. On lanes of the whole device they are timed at the clocks that they had there alone:
        what draws more power than the sequential order is slowed, and for the share `beside` of the time, in which
        kernels run side by side, they lose what pairs of them do.
        """
        energy = float(self.energy.sum())
        settled_s = self.together.settled(seconds, energy)
        if settled_s == seconds or parts:
            return settled_s
        least_s = self.together.settled(seconds, energy, self.sequential_s())
        return max(least_s, (1.0 - beside) * seconds + beside * settled_s)

    def best_seconds(self) -> np.ndarray:
        """(n,) the least time of each op over its legal modes, launch included."""
        shortest: np.ndarray = np.where(self.legal, self.seconds, np.inf).min(axis=1) + self.launch_s
        return shortest


def make_problem(graph: Graph, device: Device, sizes: Sequence[int] | None = None, costs: Costs = op_table) -> Problem:
    """The Problem of a graph, its repeat written out, on a device with the given SM counts (default: those of
    `device.splits()`). DemandError if an op asks for more than the device has."""
    flat = graph.flat()
    if sizes is None:
        sizes = sorted({size for geometry in device.splits() for size in geometry.sizes})
    table = costs(flat, device, sizes)
    pred_ptr, pred = compressed(flat.predecessors())
    succ_ptr, succ = _transposed(pred_ptr, pred)
    return Problem(
        graph=graph,
        device=device,
        costs=costs,
        sizes=np.array(sizes, dtype=np.int64),
        legal=np.array(sizes)[None, :] >= table.sm_min[:, None],
        seconds=table.seconds,
        use=np.concatenate([table.sm_use[:, :, None], table.rates], axis=2),
        work=(table.rates * table.seconds[:, :, None]).min(axis=1),
        pred_ptr=pred_ptr,
        pred=pred,
        succ_ptr=succ_ptr,
        succ=succ,
        capacity=reached(device),
        sm_count=device.sm_count,
        sm_bytes_per_s=device.sm_hbm_bytes_per_s,
        launch_s=device.launch_seconds,
        switch_s=device.switch_seconds,
        band=table.band,
        sources=table.sources,
        own_grid=table.own_grid,
        energy=table.energy,
        together=table.together,
    )


def legal_sizes(ops: int, device: Device) -> tuple[int, ...] | None:
    """Every legal SM count, as far as the tables of a graph of so many ops stay small; None for the usual few."""
    every = device.partition_sizes()
    return every if ops * len(every) <= _TABLE else None


def compressed(lists: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of integers in compressed rows: list i is values[pointer[i]:pointer[i + 1]] of (pointer, values)."""
    counts = np.fromiter((len(row) for row in lists), np.int64, len(lists))
    pointer = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(counts, out=pointer[1:])
    return pointer, np.fromiter((p for row in lists for p in row), np.int64, int(pointer[-1]))


def _transposed(pointer: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = len(pointer) - 1
    owner = np.repeat(np.arange(n), np.diff(pointer))
    by_source = np.argsort(index, kind="stable")
    result = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(index, minlength=n), out=result[1:])
    return result, owner[by_source]
