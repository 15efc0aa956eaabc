"""The cost model: what one op costs on a device, alone, as a function of its SMs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.cost.formulas import compute_seconds, drawn_bytes_per_s, roofline_seconds, transfer_seconds
from taskgraph.errors import DemandError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Demand, Op, Tensor

TENSOR_KINDS = frozenset({"gemm", "attention", "decode_attention"})
"""Kinds that run on tensor cores at their operands' rate; the others run at the f32 rate of the vector units."""

ERROR_BAND = 0.3
"""Relative error of an uncalibrated roofline: NanoFlow's table 2 has it 13 % to 82 % short on GEMMs of a 70B model."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Isolated time of an op on `sms` SMs: launch, then the longest of its parts.

    `compute_s` is the arithmetic alone; `bytes_s` the seconds on hbm, h2d, d2h and link alone, each at
    the rate the op can draw. `source` says where the number comes from and `band` its relative error.
    """

    seconds: float
    launch_s: float
    compute_s: float
    bytes_s: tuple[float, float, float, float]
    source: str = "roofline"
    band: float = ERROR_BAND


@dataclass(frozen=True, slots=True)
class OpArrays:
    """For n ops: work (n, 5), rate caps (n, 4) in bytes/s, whole-device FLOP/s (n,), SM minimum and maximum (n,)."""

    work: np.ndarray
    caps: np.ndarray
    flops_per_s: np.ndarray
    sm_min: np.ndarray
    sm_max: np.ndarray


@dataclass(frozen=True, slots=True)
class OpTable:
    """What n ops cost on each of m SM counts, alone; all that a planner needs to know of the cost model.

    seconds (n, m): isolated seconds on sizes[j] SMs, without launch.
    sm_use (n, m): SMs that the op keeps from others while it runs at full speed, at most sizes[j]: two ops that share
    a partition both run at full speed exactly if their uses fit it. 0 for pure copies.
    rates (n, m, 4): bytes/s drawn from hbm, h2d, d2h and link while it runs at full speed.
    band (n,): relative error band; sources (n,): where the number comes from.
    sm_min, sm_max (n,): the SM counts that the op's demand allows.
    """

    seconds: np.ndarray
    sm_use: np.ndarray
    rates: np.ndarray
    band: np.ndarray
    sources: tuple[str, ...]
    sm_min: np.ndarray
    sm_max: np.ndarray


def op_table(graph: Graph, device: Device, sizes: Sequence[int]) -> OpTable:
    """The table of a flat graph's ops on `sizes` SMs; DemandError as in `check_demand`."""
    ops = op_arrays(graph, device)
    size = np.asarray(sizes, dtype=np.int64)
    useful = np.minimum(size[None, :], ops.sm_max[:, None])
    share = np.array([device.compute_share(s) for s in range(1, device.sm_count + 1)])
    compute = (ops.work[:, :1] / ops.flops_per_s[:, None]) / share[useful - 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = ops.work[:, 1:2] / np.minimum(useful * device.sm_hbm_bytes_per_s, ops.caps[:, :1])
        copies = np.where(ops.work[:, 2:] > 0, ops.work[:, 2:] / ops.caps[:, 1:], 0.0).max(axis=1)
    seconds = np.maximum(np.maximum(compute, moved), copies[:, None])
    rates = ops.work[:, None, 1:] / seconds[:, :, None]
    drawing = rates[:, :, 0] / device.sm_hbm_bytes_per_s
    sm_use = np.minimum(np.maximum(compute / seconds * useful, drawing), useful)
    sm_use[(ops.work[:, 0] == 0) & (ops.work[:, 2:4] > 0).any(axis=1)] = 0.0
    n = len(seconds)
    return OpTable(seconds, sm_use, rates, np.full(n, ERROR_BAND), ("roofline",) * n, ops.sm_min, ops.sm_max)


def compute_rate(op: Op, tensor: dict[str, Tensor] | None, device: Device) -> float:
    """FLOP/s of the whole device for this op's arithmetic."""
    if tensor is None or op.kind not in TENSOR_KINDS or not op.inputs:
        return device.rate("f32")
    operand = op.inputs[1] if op.kind == "gemm" else op.inputs[-1]
    return device.rate(tensor[operand].dtype)


def predict(op: Op, graph: Graph, device: Device, sms: int | None = None) -> Prediction:
    """Seconds of `op` alone on `sms` SMs of `device` (default: all of them), launch included."""
    sms = device.sm_count if sms is None else sms
    check_demand(op, device)
    useful = min(sms, op.demand.sm[1]) if op.demand.sm else sms
    caps = rate_caps(op, device)
    work = op.work
    compute = compute_seconds(work.flops, compute_rate(op, dict(graph.tensor), device), device.compute_share(useful))
    hbm = transfer_seconds(work.hbm_bytes, drawn_bytes_per_s(useful, device.sm_hbm_bytes_per_s, caps[0]))
    parts = (
        hbm,
        transfer_seconds(work.h2d_bytes, caps[1]),
        transfer_seconds(work.d2h_bytes, caps[2]),
        transfer_seconds(work.link_bytes, caps[3]),
    )
    return Prediction(device.launch_seconds + roofline_seconds(compute, *parts), device.launch_seconds, compute, parts)


def rate_caps(op: Op, device: Device) -> tuple[float, float, float, float]:
    """What the op may draw from hbm, h2d, d2h and link at most: the device's rate or the declared one."""
    pinned = op.demand

    def cap(declared: float | None, offered: float) -> float:
        return offered if declared is None else min(declared, offered)

    return (
        cap(pinned.hbm_bytes_per_s, device.hbm_bytes_per_s),
        cap(pinned.pcie_bytes_per_s, device.h2d_bytes_per_s),
        cap(pinned.pcie_bytes_per_s, device.d2h_bytes_per_s),
        cap(pinned.link_bytes_per_s, device.link_bytes_per_s),
    )


def check_demand(op: Op, device: Device) -> None:
    """DemandError when no partition of the device can meet what the op asks for."""
    if op.demand.sm is not None:
        low, _ = op.demand.sm
        if low > device.sm_count:
            raise DemandError(
                f"op {op.name!r} asks for {low} SMs; {device.name} has {device.sm_count}. "
                "Lower demand.sm or choose a larger device."
            )
    for nbytes, rate, path in (
        (op.work.h2d_bytes, device.h2d_bytes_per_s, "host-to-device copies"),
        (op.work.d2h_bytes, device.d2h_bytes_per_s, "device-to-host copies"),
        (op.work.link_bytes, device.link_bytes_per_s, "an inter-device link"),
    ):
        if nbytes and not rate:
            raise DemandError(f"op {op.name!r} needs {path}; {device.name} has none. Choose another device.")
    if op.demand.workspace_bytes > device.memory_bytes:
        raise DemandError(
            f"op {op.name!r} asks for {op.demand.workspace_bytes} bytes of workspace; "
            f"{device.name} has {device.memory_bytes}. Lower demand.workspace_bytes."
        )


def op_arrays(graph: Graph, device: Device) -> "OpArrays":
    """The numbers of all ops of a flat graph, for the solvers; DemandError as in `check_demand`."""
    tensor = dict(graph.tensor)
    n = len(graph.ops)
    work = np.array([op.work.vector for op in graph.ops])
    whole = rate_caps(Op("", "", (), (), graph.ops[0].work), device)
    caps = np.tile(np.array(whole), (n, 1))
    rate = np.full(n, device.rate("f32"))
    sm_min, sm_max = np.ones(n, np.int64), np.full(n, device.sm_count, np.int64)
    plain = Demand()
    lacking = [work[:, 2 + i].any() and not r for i, r in enumerate(whole[1:])]
    for i, op in enumerate(graph.ops):
        if op.kind in TENSOR_KINDS:
            rate[i] = compute_rate(op, tensor, device)
        if op.demand != plain or any(lacking):
            check_demand(op, device)
            caps[i] = rate_caps(op, device)
            sm_min[i], sm_max[i] = op.demand.sm or (1, device.sm_count)
    return OpArrays(work, caps, rate, sm_min, np.minimum(sm_max, device.sm_count))
