"""Problems whose every number is given, so that times can be worked out on paper."""

from collections.abc import Sequence

import numpy as np

from taskgraph.cost.corunning import NONE
from taskgraph.cost.model import op_table
from taskgraph.graph import device as specs
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Work, spec
from taskgraph.schedule import arena
from taskgraph.schedule.problem import Problem

H100 = specs.get("h100_sxm")


def small_graph() -> Graph:
    """What a problem is of, where nobody looks."""
    b = GraphBuilder("by hand")
    b.output(*b.op("custom", [b.input("x", (4,), "f32")], [spec("y", (4,), "f32")], Work(flops=1.0), "op"))
    return b.build()


CAPACITY = (100.0, 10.0, 20.0, 40.0)


def problem(
    seconds: Sequence[float] | Sequence[Sequence[float]],
    use: Sequence[Sequence[float]] | np.ndarray,
    edges: Sequence[tuple[int, int]] = (),
    *,
    sizes: Sequence[int] = (8,),
    sm_count: int = 8,
    capacity: Sequence[float] = CAPACITY,
    sm_bytes_per_s: float = 1e9,
    launch_s: float = 0.0,
    switch_s: float = 0.0,
    legal: Sequence[Sequence[bool]] | None = None,
    work: Sequence[Sequence[float]] | None = None,
) -> Problem:
    """`seconds` (n,) or (n, m); `use` (n, 5) or (n, m, 5); `edges` as (before, after)."""
    n, m = len(seconds), len(sizes)
    took = np.array(seconds, float).reshape(n, -1) * np.ones((1, m))
    uses = np.array(use, float)
    uses = np.repeat(uses[:, None, :], m, axis=1) if uses.ndim == 2 else uses
    before, after = (np.array([e[side] for e in sorted(edges)], np.int64) for side in (0, 1))
    by_after = np.argsort(after, kind="stable")
    return Problem(
        graph=small_graph(),
        device=H100,
        costs=op_table,
        sizes=np.array(sizes, np.int64),
        legal=np.ones((n, m), bool) if legal is None else np.array(legal),
        seconds=took,
        use=uses,
        work=(uses[:, :, 1:] * took[:, :, None]).min(axis=1) if work is None else np.array(work, float),
        pred_ptr=np.concatenate([[0], np.cumsum(np.bincount(after, minlength=n))]).astype(np.int64),
        pred=before[by_after],
        succ_ptr=np.concatenate([[0], np.cumsum(np.bincount(before, minlength=n))]).astype(np.int64),
        succ=after,
        capacity=np.array(capacity, float),
        sm_count=sm_count,
        sm_bytes_per_s=sm_bytes_per_s,
        launch_s=launch_s,
        switch_s=switch_s,
        band=np.full(n, 0.1),
        sources=("hand",) * n,
        own_grid=np.ones(n, bool),
        energy=np.zeros(n),
        together=NONE,
    )


def sms(*counts: float) -> list[list[float]]:
    """The use of ops that take SMs and nothing else."""
    return [[count, 0.0, 0.0, 0.0, 0.0] for count in counts]


def max_live_bytes(graph: Graph, lanes: Sequence[int], order: Sequence[int]) -> int:
    """A lower bound on any arena for this order: the most bytes that are alive at one step of it."""
    life = arena._lifetimes(graph, lanes, order)
    change = np.zeros(len(order) + 1, np.int64)
    np.add.at(change, life.first, life.nbytes)
    np.add.at(change, life.last.max(axis=1) + 1, -life.nbytes)
    return int(np.cumsum(change).max())
