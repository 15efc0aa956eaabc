"""The plain roofline (Williams, Waterman and Patterson 2009) over SMs, for devices without coefficients: the slowest of
arithmetic, memory and copies binds, each at the rate that the op's SMs have."""

import numpy as np

from taskgraph.graph.device import Device


def roofline(
    work: np.ndarray, flops_per_s: np.ndarray, hbm_cap: np.ndarray, device: Device, useful: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(seconds (n, m), share of the SMs' arithmetic or of the bandwidth they can draw (n, m)) of `work` (n, 5) on
    `useful` (n, m) SMs."""
    share = np.array([device.compute_share(s) for s in range(1, device.sm_count + 1)])
    compute = (work[:, :1] / flops_per_s[:, None]) / share[useful - 1]
    moved = work[:, 1:2] / np.minimum(useful * device.sm_hbm_bytes_per_s, hbm_cap[:, None])
    seconds = np.maximum(compute, moved)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawing = work[:, 1:2] / seconds / device.sm_hbm_bytes_per_s / useful
        busy = np.where(seconds > 0.0, np.maximum(compute / seconds, drawing), 0.0)
    return seconds, np.minimum(busy, 1.0)
