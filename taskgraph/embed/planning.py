"""How a graph of torch's is planned for this machine's CPU."""

from typing import Final

import taskgraph as tg
from taskgraph.cost.model import op_table

MOST_ALONE_S: Final = 100e-6
"""A graph whose ops all take less than this on one core is planned for one core: a team that is woken and waited for
at every op costs about as much, and far more beside other processes (24 ms, measured)."""


def planned(graph: "tg.Graph", scheduler: str = "sequential", *, alone: bool = False) -> "tg.Plan":
    """The plan of `graph` on all cores, or on one where its ops are small (predicted) or it shall be `alone`. PlanError
    as `tg.plan`."""
    device = tg.devices.get("cpu")
    if device.sm_count > 1:
        table = op_table(graph.flat(), device, [1])
        if alone or float(table.seconds.max()) < MOST_ALONE_S:
            device = one_core(device)
    return tg.plan(graph, device, scheduler)


def one_core(device: "tg.Device") -> "tg.Device":
    """One core of a CPU."""
    share = device.compute_share(1)
    return tg.devices.make(
        device,
        name=f"{device.name}, one core",
        sm_count=1,
        sm_granularity=1,
        sm_min=1,
        compute_scaling=(),
        flops_per_s=tuple((dtype, rate * share) for dtype, rate in device.flops_per_s),
        hbm_bytes_per_s=min(device.hbm_bytes_per_s, device.sm_hbm_bytes_per_s),
    )
