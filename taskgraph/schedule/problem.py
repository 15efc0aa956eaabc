"""Problem: everything a solver may see, as numba-ready arrays."""

from dataclasses import dataclass

import numpy as np

from taskgraph.cost.model import op_arrays
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph


@dataclass(frozen=True, slots=True)
class Problem:
    """n ops in topological order, m modes (partition sizes).

    sizes (m,) SMs; legal (n, m); seconds (n, m) isolated without launch; use (n, m, 5) what the op uses of
    each resource when it runs alone at full speed: the share of its partition's arithmetic, then bytes/s
    of hbm, h2d, d2h, link. Edges in compressed rows: the predecessors of op i are
    pred[pred_ptr[i]:pred_ptr[i + 1]]. `capacity` (4,) is bytes/s of the soft resources.
    """

    sizes: np.ndarray
    legal: np.ndarray
    seconds: np.ndarray
    use: np.ndarray
    work: np.ndarray
    arithmetic_s: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    capacity: np.ndarray
    sm_count: int
    sm_bytes_per_s: float
    launch_s: float

    @property
    def n(self) -> int:
        return len(self.legal)


def make_problem(graph: Graph, device: Device, sizes: tuple[int, ...] | None = None) -> Problem:
    """The Problem of a flat graph on a device with the given partition sizes (default: those of `device.splits()`)."""
    if sizes is None:
        sizes = tuple(sorted({size for geometry in device.splits() for size in geometry.sizes}))
    ops = op_arrays(graph, device)
    size = np.array(sizes, dtype=np.int64)
    legal = size[None, :] >= ops.sm_min[:, None]
    useful = np.minimum(size[None, :], ops.sm_max[:, None])
    share_of = np.array([device.compute_share(s) if s else 0.0 for s in range(device.sm_count + 1)])
    whole = ops.work[:, :1] / ops.flops_per_s[:, None]
    drawn = np.minimum(useful * device.sm_hbm_bytes_per_s, ops.caps[:, :1])
    with np.errstate(divide="ignore", invalid="ignore"):
        copies = np.where(ops.work[:, 2:] > 0, ops.work[:, 2:] / ops.caps[:, 1:], 0.0).max(axis=1)
        seconds = np.maximum(np.maximum(whole / share_of[useful], ops.work[:, 1:2] / drawn), copies[:, None])
        use = np.empty((*seconds.shape, 5))
        use[:, :, 0] = whole / share_of[size][None, :] / seconds
        use[:, :, 1:] = ops.work[:, None, 1:] / seconds[:, :, None]
    pred_ptr, pred = _rows(graph.predecessors())
    succ_ptr, succ = _transposed(pred_ptr, pred)
    capacity = (device.hbm_bytes_per_s, device.h2d_bytes_per_s, device.d2h_bytes_per_s, device.link_bytes_per_s)
    return Problem(
        sizes=size,
        legal=legal,
        seconds=seconds,
        use=use,
        work=ops.work,
        arithmetic_s=whole[:, 0],
        pred_ptr=pred_ptr,
        pred=pred,
        succ_ptr=succ_ptr,
        succ=succ,
        capacity=np.array(capacity),
        sm_count=device.sm_count,
        sm_bytes_per_s=device.sm_hbm_bytes_per_s,
        launch_s=device.launch_seconds,
    )


def _rows(lists: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
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
