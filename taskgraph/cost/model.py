"""The cost model: what one op costs on a device, alone, as a function of its SMs.

A device with coefficients (its own or its relation's) is predicted by the families of `families/`; any other, this
machine's CPU among them, by the roofline of roofline.py. Measured points of an op win over both (profiles.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taskgraph.cost.corunning import NONE, CoRunning
from taskgraph.cost.families import COLLECTIVE, FAMILIES, PLAIN_STREAM, STREAM, kernel_of
from taskgraph.cost.families.gemm import GEMM, GemmCoefficients, GemmShape, library_seconds, own_seconds
from taskgraph.cost.families.stream import StreamCoefficients
from taskgraph.cost.family import Kernel, blocks
from taskgraph.cost.fitted import UNFITTED_BAND, DeviceModel, model_of
from taskgraph.cost.links import is_collective, on_network
from taskgraph.cost.roofline import roofline
from taskgraph.errors import DemandError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import PLAIN, Op, Tensor, Work
from taskgraph.ops import NCCL_CHANNELS
from taskgraph.units import format_quantity

CO_RESIDENT = 0.4
"""Share of the SMs at which an op's co-residency is read off its response: NanoFlow's operating point (decode attention
at R = 0.4 beside a GEMM). An op that keeps a speed P there needs 0.4 / P of the SMs while it runs at full speed."""
_SMALL = 0.1
_UNSLOWED = 1.25
"""An op that takes less than this many times as long on a tenth of the SMs is bound by latency: it needs that tenth
times its slowdown."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Isolated time of an op on `sms` SMs, launch included.

    `bytes_s` are the bytes/s drawn from hbm, h2d, d2h and link, `sm_use` the SMs kept from others. `source`
    says where the number comes from and `band` its relative error.
    """

    seconds: float
    launch_s: float
    sm_use: float
    rates: tuple[float, float, float, float]
    source: str
    band: float


@dataclass(frozen=True, slots=True)
class OpTable:
    """What n ops cost on each of m SM counts, alone; all that a planner needs to know of the cost model.

    seconds (n, m): isolated seconds on sizes[j] SMs, without launch.
    sm_use (n, m): SMs that the op keeps from others while it runs at full speed, at most sizes[j]: two ops that share
    a partition both run at full speed exactly if their uses fit it. 0 for pure copies.
    rates (n, m, 4): bytes/s drawn from hbm, h2d, d2h and link while it runs at full speed.
    band (n,): relative error band; sources (n,): where the number comes from.
    sm_min, sm_max (n,): the SM counts that the op's demand allows.
    own_grid (n,): whether the op can be launched on fewer SMs than its partition has, because it says so (demand.sm);
    all others take what there is.
    energy (n,): its work in seconds of the device's peak arithmetic, bytes included; `together` says what the device
    does with it.
    """

    seconds: np.ndarray
    sm_use: np.ndarray
    rates: np.ndarray
    band: np.ndarray
    sources: tuple[str, ...]
    sm_min: np.ndarray
    sm_max: np.ndarray
    own_grid: np.ndarray
    energy: np.ndarray
    together: CoRunning


Costs = Callable[[Graph, Device, Sequence[int]], OpTable]
"""What prices the ops of a flat graph on the given SM counts: `op_table`, or a table of measurements over it."""


@dataclass(frozen=True, slots=True)
class _Kernels:
    """The distinct kernels among ops: `index` (ops,) into `each`, `most` SMs of each, `works` (kernels, 5)."""

    index: np.ndarray
    each: list[Kernel]
    most: np.ndarray
    works: np.ndarray


def op_table(graph: Graph, device: Device, sizes: Sequence[int], model: DeviceModel | None = None) -> OpTable:
    """The table of a flat graph's ops on `sizes` SMs, by the device's model or by another of it; DemandError as in
    `check_demand`."""
    return _table(graph.ops, graph.tensor, device, sizes, model)


def reached(device: Device) -> np.ndarray:
    """Bytes/s (4,) of hbm, h2d, d2h and link that all ops together reach: what is published, but of the copy paths what
    one pinned copy does. There is one engine a direction, so two copies at once are no faster than one after another.
    """
    made = np.array([device.hbm_bytes_per_s, device.h2d_bytes_per_s, device.d2h_bytes_per_s, device.link_bytes_per_s])
    if device.calibration and not device.compute_scaling:
        copies = model_of(device).family(STREAM.name).coefficients
        assert isinstance(copies, StreamCoefficients)
        made[1:3] *= copies.pcie_efficiency
    return made


def predict(op: Op, graph: Graph, device: Device, sms: int | None = None) -> Prediction:
    """Seconds of `op` alone on `sms` SMs of `device` (default: all of them), launch included: a row of op_table."""
    made = _table((op,), graph.tensor, device, (device.sm_count if sms is None else sms,))
    hbm, h2d, d2h, link = made.rates[0, 0].tolist()
    seconds = float(made.seconds[0, 0]) + device.launch_seconds
    use, band = float(made.sm_use[0, 0]), float(made.band[0])
    return Prediction(seconds, device.launch_seconds, use, (hbm, h2d, d2h, link), made.sources[0], band)


def _table(
    ops: Sequence[Op], tensors: Mapping[str, Tensor], device: Device, sizes: Sequence[int],
    model: DeviceModel | None = None,
) -> OpTable:  # fmt: skip
    size = np.asarray(sizes, dtype=np.int64)
    sm_min, sm_max, pinned = _demands(ops, device)
    kernels = _kernels(ops, tensors, sm_max)
    useful = np.minimum(size[None, :], kernels.most[:, None])
    fitted = model or fitted_model(device)
    together = fitted.together if fitted else NONE
    peak = device.rate("bf16")
    energy = together.energy(kernels.works[:, 0] * _thrift(kernels, peak, device), kernels.works[:, 1], peak)
    if fitted:
        asked = _left_to(kernels, np.append(size, device.sm_count))
        seconds, use, band, sources = _by_family(kernels, fitted, asked)
        _over_network(kernels, device, fitted, asked, (seconds, band, sources))
        seconds, use = _at_clocks(seconds, energy, together)[:, :-1], np.minimum(use[:, :-1], useful)
    else:
        seconds, use, band, sources = _by_roofline(kernels, device, useful)
        _over_network(kernels, device, None, useful, (seconds, band, sources))
    moves = kernels.works[:, 1:]
    whole = np.array([device.hbm_bytes_per_s, device.h2d_bytes_per_s, device.d2h_bytes_per_s, device.link_bytes_per_s])
    least = np.divide(moves, whole, out=np.zeros(moves.shape), where=moves > 0)  # a benchmark's cache is not ours
    drawn = moves[:, :1] / (useful * device.sm_hbm_bytes_per_s)  # the cap that the evaluator puts on a partition
    seconds = np.maximum(np.maximum(seconds, least.max(axis=1)[:, None]), drawn)
    use[(kernels.works[:, 0] == 0) & (moves[:, 1:3] > 0).any(axis=1)] = 0.0
    i = kernels.index
    every, use, band, named = seconds[i], use[i], band[i], [sources[k] for k in i.tolist()]
    for row, rates in pinned.items():
        slowest = max(n / rate for n, rate in zip(ops[row].work.vector[1:], rates, strict=True) if n and rate)
        every[row] = np.maximum(every[row], slowest)
    slow, share = _declared_shares(ops)
    every[slow] = np.maximum(every[slow], _at_shares(ops, tensors, device, useful[i], (slow, share)))
    rates = np.minimum(moves[i][:, None, :] / every[:, :, None], whole)
    own = np.array([device.kind != "gpu" or op.demand.sm is not None for op in ops], np.bool_)
    return OpTable(every, use, rates, band, tuple(named), sm_min, sm_max, own, energy[i], together)


def own_product_pays(op: Op, tensors: Mapping[str, Tensor], device: Device, sms: int) -> bool:
    """Whether a product in a partition of `sms` SMs is predicted to be faster by our own persistent kernel than by the
    library: what the cost of `op` assumes there. Never on the whole device, or before it was measured."""
    model = fitted_model(device)
    kernel = kernel_of(op, tensors)
    if model is None or kernel.family != GEMM.name or sms >= device.sm_count:
        return False
    c = model.family(GEMM.name).coefficients
    assert isinstance(c, GemmCoefficients)
    shape = GemmShape(*(np.array([[x]], np.float64) for x in kernel.shape))
    given = shape, model.spec(kernel.dtype), c, np.array([float(sms)])
    return bool((own_seconds(*given) < library_seconds(*given))[0, 0])


def _over_network(
    kernels: _Kernels, device: Device, model: DeviceModel | None, sms: np.ndarray,
    found: tuple[np.ndarray, np.ndarray, list[str]],
) -> None:  # fmt: skip
    """Where the device names a network, set seconds, bands and sources of its collectives to those of the network."""
    if device.network is None:
        return
    seconds, band, sources = found
    for i, kernel in enumerate(kernels.each):
        if is_collective(kernel):
            seconds[i], sources[i] = on_network(kernel, device.network, model, sms[i].astype(np.float64))
            band[i] = UNFITTED_BAND


def fitted_model(device: Device) -> DeviceModel | None:
    """The model of a device with coefficients, its own or its relation's; None where the roofline prices."""
    return model_of(device) if device.calibration and not device.compute_scaling else None


def co_running(device: Device) -> CoRunning:
    """What running together does on this device, as far as its calibration or that of its relation knows."""
    model = fitted_model(device)
    return model.together if model else NONE


def _thrift(kernels: _Kernels, peak: float, device: Device) -> np.ndarray:
    """(kernels,) what a FLOP costs against one in bf16: half, in a type of twice the rate."""
    return np.minimum(1.0, peak / _rates(kernels, device))


def _rates(kernels: _Kernels, device: Device) -> np.ndarray:
    """(kernels,) FLOP/s of the whole device in the type of each."""
    rate = {dtype: device.rate(dtype) for dtype in {kernel.dtype for kernel in kernels.each}}
    return np.array([rate[kernel.dtype] for kernel in kernels.each])


def _at_clocks(seconds: np.ndarray, energy: np.ndarray, together: CoRunning) -> np.ndarray:
    """Seconds (n, m), the last column on all SMs, of which the times were measured: a kernel that draws more there than
    the device's power allows runs at higher clocks on fewer SMs."""
    clocks = together.clocks(energy[:, None] / seconds)
    made: np.ndarray = seconds * clocks[:, -1:] / clocks
    return made


def _kernels(ops: Sequence[Op], tensors: Mapping[str, Tensor], sm_max: np.ndarray) -> _Kernels:
    """The distinct kernels of `ops`: layers repeat, so there are far fewer of them than ops."""
    place: dict[tuple[Kernel, Work, int], int] = {}
    firsts: list[int] = []
    index = np.empty(len(ops), np.int64)
    found: list[Kernel] = []
    for i, (op, most) in enumerate(zip(ops, sm_max.tolist(), strict=True)):
        kernel = kernel_of(op, tensors)
        at = len(firsts)
        if kernel.family != STREAM.name:  # a stream is priced sooner than it is found again
            at = place.setdefault((kernel, op.work, most), at)
        if at == len(firsts):
            firsts.append(i)
            found.append(kernel)
        index[i] = at
    works = np.array([ops[i].work.vector for i in firsts])
    return _Kernels(index, found, sm_max[firsts], works)


def _demands(ops: Sequence[Op], device: Device) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[float, ...]]]:
    """(sm_min, sm_max, rates of the ops that pin some); DemandError when the device cannot meet a demand."""
    n = len(ops)
    low, high = np.ones(n, np.int64), np.full(n, device.sm_count, np.int64)
    pinned: dict[int, tuple[float, ...]] = {}
    lacking = not (device.h2d_bytes_per_s and device.d2h_bytes_per_s and device.link_bytes_per_s)
    for i, op in enumerate(ops):
        demand = op.demand
        if demand is not PLAIN and demand != PLAIN:
            check_demand(op, device)
            low[i], high[i] = demand.sm or (1, device.sm_count)
            if demand.hbm_bytes_per_s or demand.pcie_bytes_per_s or demand.link_bytes_per_s:
                caps = rate_caps(op, device)
                if any(n and rate for n, rate in zip(op.work.vector[1:], caps, strict=True)):
                    pinned[i] = caps
        elif lacking:
            check_demand(op, device)
    return low, np.minimum(high, device.sm_count), pinned


def _declared_shares(ops: Sequence[Op]) -> tuple[np.ndarray, np.ndarray]:
    """The ops that say at which share of the device's rate their flops run, and these shares."""
    said = [(i, op.demand.efficiency) for i, op in enumerate(ops) if op.demand.efficiency < 1.0]
    return np.array([i for i, _ in said], np.int64), np.array([share for _, share in said])


def _at_shares(
    ops: Sequence[Op], tensors: Mapping[str, Tensor], device: Device, useful: np.ndarray,
    slow: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Seconds (slow, sizes) of the flops of these ops at their declared shares of what their `useful` SMs have."""
    rows, share = slow
    chosen = [ops[i] for i in rows.tolist()]
    dtypes = [tensors[(op.outputs or op.inputs)[0]].dtype if op.outputs or op.inputs else "f32" for op in chosen]
    rate = {dtype: device.rate(dtype) for dtype in {*dtypes}}
    whole = np.array([op.work.flops for op in chosen]) / (share * np.array([rate[dtype] for dtype in dtypes]))
    part = np.array([device.compute_share(s) for s in range(1, device.sm_count + 1)])
    made: np.ndarray = whole[:, None] / part[useful[rows] - 1]
    return made


def _left_to(kernels: _Kernels, size: np.ndarray) -> np.ndarray:
    """The SMs (kernels, sizes) that a kernel's time answers to: of a partition, those that the op may use.

    A collective on all the channels that its library takes answers to the whole partition instead. Measured alone on a
    GPU it ran on those few channels already; what slows it, by the R -> P tables, is how much its neighbours have.
    """
    free = np.array([kernel.family == COLLECTIVE.name for kernel in kernels.each]) & (kernels.most >= NCCL_CHANNELS)
    return np.where(free[:, None], size[None, :], np.minimum(size[None, :], kernels.most[:, None]))


def _by_family(
    kernels: _Kernels, model: DeviceModel, useful: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Seconds without launch, SM use, bands and sources of every kernel on `useful` SMs."""
    seconds, use = np.empty(useful.shape), np.empty(useful.shape)
    band, sources = np.empty(len(useful)), [""] * len(useful)
    groups: dict[tuple[str, str, int, bool], list[int]] = {}
    for i, (kernel, most) in enumerate(zip(kernels.each, kernels.most.tolist(), strict=True)):
        groups.setdefault((kernel.family, kernel.dtype, most, kernel is PLAIN_STREAM), []).append(i)
    for (family, dtype, _, _), members in groups.items():
        part, made = model.family(family), FAMILIES[family]
        shapes, rows = _shapes(kernels, members), np.array(members)
        sms, spec = useful[members[0]].astype(np.float64), model.spec(dtype)
        asked, n = np.concatenate([sms, CO_RESIDENT * sms, _SMALL * sms]) if made.by_response else sms, len(sms)
        for some in blocks(len(rows), len(asked)):
            times = part.seconds(shapes[some], spec, asked)
            times = np.maximum(times - model.launch_s, 0.05 * times)
            seconds[rows[some]] = times[:, :n]
            use[rows[some]] = (
                _needed(times, sms) if made.by_response else made.occupied(shapes[some], useful[rows[some]])
            )
        band[members] = part.band
        for i in members:
            sources[i] = part.source
    return seconds, use, band, sources


def _needed(times: np.ndarray, sms: np.ndarray) -> np.ndarray:
    """SMs that kernels need, by their seconds on `sms` (m,), on CO_RESIDENT of these, and on _SMALL of these."""
    full, part_of, tenth = np.split(times, 3, axis=1)
    share = np.minimum(CO_RESIDENT * part_of / full, 1.0)
    share = np.where(tenth < _UNSLOWED * full, np.minimum(share, _SMALL * tenth / full), share)
    made: np.ndarray = share * sms
    return made


def _shapes(kernels: _Kernels, members: Sequence[int]) -> np.ndarray:
    """The shapes (members, fields) of some kernels of one family; a plain stream's are its work, nothing pageable."""
    if kernels.each[members[0]] is PLAIN_STREAM:
        return np.pad(kernels.works[members], ((0, 0), (0, 1)))
    return np.array([kernels.each[i].shape for i in members], np.float64)


def _by_roofline(
    kernels: _Kernels, device: Device, useful: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    rates = _rates(kernels, device)
    cap = np.full(len(useful), device.hbm_bytes_per_s)
    seconds, share = roofline(kernels.works, rates, cap, device, useful)
    return seconds, share * useful, np.full(len(useful), UNFITTED_BAND), ["roofline"] * len(useful)


def _paths(op: Op, device: Device) -> tuple[tuple[float, float | None, float, str], ...]:
    """(bytes that the op moves, the rate that it pins, the device's rate, their name) of hbm, h2d, d2h and link."""
    work, pinned = op.work, op.demand
    return (
        (work.hbm_bytes, pinned.hbm_bytes_per_s, device.hbm_bytes_per_s, "hbm"),
        (work.h2d_bytes, pinned.pcie_bytes_per_s, device.h2d_bytes_per_s, "pcie"),
        (work.d2h_bytes, pinned.pcie_bytes_per_s, device.d2h_bytes_per_s, "pcie"),
        (work.link_bytes, pinned.link_bytes_per_s, device.link_bytes_per_s, "link"),
    )


def rate_caps(op: Op, device: Device) -> tuple[float, ...]:
    """What the op may draw from hbm, h2d, d2h and link at most: the device's rate or the declared one."""
    return tuple(offered if asked is None else min(asked, offered) for _, asked, offered, _ in _paths(op, device))


_LACKING = ("device memory", "host-to-device copies", "device-to-host copies", "an inter-device link")


def check_demand(op: Op, device: Device) -> None:
    """DemandError when no partition of the device can meet what the op asks for."""
    if op.demand.sm is not None and op.demand.sm[0] > device.sm_count:
        raise DemandError(
            f"op {op.name!r} asks for {op.demand.sm[0]} SMs; {device.name} has {device.sm_count}. "
            "Lower demand.sm or choose a larger device."
        )
    for (needed, _, offered, _), path in zip(_paths(op, device), _LACKING, strict=True):
        if needed and not offered:
            raise DemandError(f"op {op.name!r} needs {path}; {device.name} has none. Choose another device.")
    for needed, asked, offered, name in _paths(op, device):
        if needed and asked is not None and asked > offered:
            raise DemandError(
                f"op {op.name!r} asks for {format_quantity(asked, 'B/s')} of {name}; {device.name} has "
                f"{format_quantity(offered, 'B/s')}. Lower demand.{name}_bytes_per_s or choose another device."
            )
    if op.demand.workspace_bytes > device.memory_bytes:
        raise DemandError(
            f"op {op.name!r} asks for {op.demand.workspace_bytes} bytes of workspace; "
            f"{device.name} has {device.memory_bytes}. Lower demand.workspace_bytes."
        )
