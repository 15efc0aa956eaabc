"""The times of one op as plain functions for numba: a roofline (Williams, Waterman and Patterson 2009) over SMs.

Every function is scalar, so numba compiles it into the loops that call it.
"""

from taskgraph.jit import njit


@njit
def compute_seconds(flops: float, device_flops_per_s: float, share: float) -> float:
    """Seconds of arithmetic on the `share` of the device's compute rate that the op's SMs have."""
    return flops / (device_flops_per_s * share)


@njit
def drawn_bytes_per_s(sms: float, sm_bytes_per_s: float, device_bytes_per_s: float) -> float:
    """Memory bandwidth that `sms` SMs can draw: linear in SMs until the memory saturates."""
    return min(sms * sm_bytes_per_s, device_bytes_per_s)


@njit
def transfer_seconds(nbytes: float, bytes_per_s: float) -> float:
    """Seconds to move `nbytes` at a steady rate; infinite when there is no such path."""
    if nbytes == 0.0:
        return 0.0
    return nbytes / bytes_per_s if bytes_per_s > 0.0 else float("inf")


@njit
def roofline_seconds(compute_s: float, hbm_s: float, h2d_s: float, d2h_s: float, link_s: float) -> float:
    """The slowest part binds; the others overlap with it."""
    return max(compute_s, hbm_s, h2d_s, d2h_s, link_s)
