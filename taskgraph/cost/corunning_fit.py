"""A device's co-running model, fitted to pairs of kernels that it ran at once; and how its products take fewer SMs.

Five numbers over hundreds of pairs. Errors are those of pairs that the fit has not seen: all rows of two kernels, on
whatever SMs, are held out together, a part of the pairs at a time (cross-validation); what is kept uses all rows.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np

from taskgraph.cost.calibrate import Errors, scipy_parts
from taskgraph.cost.corunning import CoRunning, Pairs, pair_speeds
from taskgraph.cost.families import kernel_of
from taskgraph.cost.families.gemm import GEMM, GemmCoefficients, GemmShape, library_seconds, own_seconds
from taskgraph.cost.fitted import Calibration, DeviceModel, model_with
from taskgraph.cost.gpu_report import KernelTime, PairTime
from taskgraph.cost.model import op_table
from taskgraph.errors import CalibrationError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph

LEAST_PAIRS = 30
"""Rows in partitions that a fit wants."""
PARTS = 6
_START = np.array([0.6, 0.5, 0.5, 0.2, 80.0])
"""hbm_knee, hbm_slope, power_budget, power_exponent, flops_a_byte: the order of magnitude of a Hopper GPU."""
_SHARED_WEIGHT = 3.0
"""A row on shared lanes counts so much more: there is one of a pair where there are seven in partitions."""
_SCALE = 0.03
"""Log error beyond which a row counts linearly (soft L1)."""

GraphOf = Callable[[str], Graph]
"""The graph of one op that is the kernel of a name."""


class Table:
    """Rows of pairs as arrays: what each kernel is alone, by its measured time, and its speed beside the other."""

    def __init__(self, rows: Sequence[PairTime], graph_of: GraphOf, device: Device) -> None:
        known: dict[tuple[str, int], tuple[float, float, float]] = {}

        def facts(name: str, sms: int) -> tuple[float, float, float]:
            if (name, sms) not in known:
                graph = graph_of(name)
                (op,) = graph.ops
                busy = op_table(graph, device, (min(sms, device.sm_count),)).sm_use[0, 0]
                known[name, sms] = float(busy), op.work.flops, op.work.hbm_bytes
            return known[name, sms]

        alone = np.array([(row.a_alone_s, row.b_alone_s) for row in rows]).reshape(-1, 2)
        beside = np.array([(row.a_beside_b_s, row.b_beside_a_s) for row in rows]).reshape(-1, 2)
        found = np.array([(facts(row.a, row.sms_a), facts(row.b, row.sms_b)) for row in rows]).reshape(-1, 2, 3)
        self.device, self.speed = device, alone / beside
        self.busy, self._flops, self._bytes = found[:, :, 0], found[:, :, 1] / alone, found[:, :, 2] / alone
        self.shared = np.array([row.mode == "shared" for row in rows], np.bool_)
        names = [zlib.crc32("|".join(sorted((row.a, row.b))).encode()) for row in rows]
        self.part = np.array(names, np.int64) % PARTS

    def predicted(self, model: CoRunning) -> np.ndarray:
        """The speed (rows, 2) of each kernel beside the other, relative to alone."""
        power = model.energy(self._flops, self._bytes, self.device.rate("bf16"))
        together = np.where(self.shared, float(self.device.sm_count), 0.0)
        return pair_speeds(Pairs(self.busy, self._bytes / self.device.hbm_bytes_per_s, power, together), model)

    def partition_errors(self, speed: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Predicted over measured speed of both kernels, of the chosen rows in partitions."""
        chosen = which & ~self.shared
        return np.ravel(speed[chosen] / self.speed[chosen])

    def shared_errors(self, speed: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Predicted over measured sum of both speeds, of the chosen rows on shared lanes; the share of each kernel
        there is not known: which runs first on a free SM is up to the hardware."""
        chosen = which & self.shared
        made: np.ndarray = speed[chosen].sum(axis=1) / self.speed[chosen].sum(axis=1)
        return made


def fit_corunning(rows: Sequence[PairTime], graph_of: GraphOf, device: Device) -> CoRunning:
    """The model of these rows with its held-out errors; CalibrationError where they are too few."""
    if sum(row.mode == "partition" for row in rows) < LEAST_PAIRS:
        raise CalibrationError(f"a co-running model wants at least {LEAST_PAIRS} pairs of kernels in partitions.")
    table = Table(rows, graph_of, device)
    every = np.ones(len(rows), np.bool_)
    held: dict[str, list[np.ndarray]] = {"partition": [], "shared_sum": []}
    for part in range(PARTS):
        out = table.part == part
        if out.any() and not out.all():
            speed = table.predicted(_fitted(table, ~out))
            held["partition"].append(table.partition_errors(speed, out))
            held["shared_sum"].append(table.shared_errors(speed, out))
    errors = {name: _errors(np.concatenate(ratios)) for name, ratios in held.items() if np.concatenate(ratios).size}
    model = _fitted(table, every)
    named = {each.name: float(f"{getattr(model, each.name):.4g}") for each in fields(model) if each.name != "held_out"}
    return CoRunning(**named, held_out=errors)


def _errors(ratios: np.ndarray) -> dict[str, float]:
    found = Errors.of(ratios, np.ones(len(ratios)))
    return {"rows": found.rows, "median": round(found.median, 4), "p90": round(found.p90, 4)}


def _fitted(table: Table, which: np.ndarray) -> CoRunning:
    """Robust least squares on log speed over the logs of the numbers (trust region, scipy)."""

    def residuals(x: np.ndarray) -> np.ndarray:
        speed = table.predicted(_model(x))
        parts = table.partition_errors(speed, which), table.shared_errors(speed, which)
        return np.concatenate([np.log(parts[0]), _SHARED_WEIGHT * np.log(parts[1])])

    found = scipy_parts().optimize.least_squares(
        residuals, np.zeros(len(_START)), loss="soft_l1", f_scale=_SCALE, diff_step=1e-3
    )
    return _model(found.x)


def _model(x: np.ndarray) -> CoRunning:
    return CoRunning(*(_START * np.exp(x)).tolist())


# -------------------------------------------------------------------------------- products in partitions

_GRIDS = np.geomspace(0.01, 10.0, 61)


def fit_kept_grid(rows: Sequence[KernelTime], graph_of: GraphOf, device: Device, made: Calibration) -> Calibration:
    """The calibration with the `kept_grid` of its products that is nearest to products measured on fewer SMs: by the
    sum of absolute log errors of their times relative to the whole device's. As it is without such rows."""
    whole = {row.kernel: row.seconds for row in rows if row.sms == device.sm_count}
    mine = [row for row in rows if row.kernel in whole and row.sms < device.sm_count and _is_product(row, graph_of)]
    if not mine:
        return made
    asked = {name: sorted({row.sms for row in mine if row.kernel == name}) for name in whole}
    ratios = np.log([row.seconds / whole[row.kernel] for row in mine])

    def off(kept: float) -> float:
        model = model_with(_with(made, kept_grid=kept), device)
        times = {name: _curve(graph_of(name), model, sizes) for name, sizes in asked.items()}
        return float(np.abs(np.array([times[row.kernel][row.sms] for row in mine]) - ratios).sum())

    return _with(made, kept_grid=float(f"{min(_GRIDS.tolist(), key=off):.3g}"))


OWN = "own_"
"""How the names of our own products begin in tables of kernels by SMs."""


def fit_own_share(rows: Sequence[KernelTime], graph_of: GraphOf, device: Device, made: Calibration) -> Calibration:
    """The calibration with the `own_share` of our own persistent product: the median over its rows of what they would
    take at the library's speed, by its measured time on all SMs, over what they took. As it is without such rows."""
    whole = {row.kernel: row.seconds for row in rows if row.sms == device.sm_count}
    mine = [row for row in rows if row.kernel.startswith(OWN) and row.kernel.removeprefix(OWN) in whole]
    found = []
    for row in mine:
        if row.sms < device.sm_count:
            share = _own_over_library(graph_of(row.kernel), row.sms, made, device)
            found.append(share * whole[row.kernel.removeprefix(OWN)] / row.seconds)
    return _with(made, own_share=float(f"{np.clip(np.median(found), 1e-3, 1.0):.3g}")) if found else made


def _own_over_library(graph: Graph, sms: int, made: Calibration, device: Device) -> float:
    """Predicted seconds of our own product on `sms` SMs, at the library's speed, over the library's on all."""
    model, kernel = model_with(made, device), kernel_of(graph.ops[0], graph.tensor)
    c = model.family(GEMM.name).coefficients
    assert isinstance(c, GemmCoefficients)
    shape = GemmShape(*(np.array([[x]], np.float64) for x in kernel.shape))
    given, every = (shape, model.spec(kernel.dtype)), np.array([float(device.sm_count)])
    own = own_seconds(*given, replace(c, own_share=1.0), np.array([float(sms)]))
    return float((own / library_seconds(*given, c, every))[0, 0])


def _is_product(row: KernelTime, graph_of: GraphOf) -> bool:
    return not row.kernel.startswith(OWN) and graph_of(row.kernel).ops[0].kind == "gemm"


def _with(made: Calibration, **values: float) -> Calibration:
    """With these coefficients of products."""
    gemm = made.families[GEMM.name]
    gemm = replace(gemm, coefficients={**gemm.coefficients, **values})
    return replace(made, families={**made.families, GEMM.name: gemm})


def _curve(graph: Graph, model: DeviceModel, sizes: Sequence[int]) -> dict[int, float]:
    """Log of the time on each size over that on all SMs."""
    seconds = op_table(graph, model.device, [*sizes, model.device.sm_count], model).seconds[0]
    return dict(zip(sizes, np.log(seconds[:-1] / seconds[-1]).tolist(), strict=True))
