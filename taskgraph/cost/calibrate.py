"""Fit a device's coefficients to measurements: first the formula's, then the tables of its correction.

Errors are those of held-out shapes: a shape's hash decides its part, so that no shape is in both. The errors that are
reported, and the band, come from a fit without the held-out shapes; the coefficients that are kept use all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from taskgraph.cost import surface
from taskgraph.cost.families import DECODE, Family, all_features, bases
from taskgraph.cost.fitted import Calibration, DeviceModel, Fitted, Response, spec_of
from taskgraph.cost.formulas import HBM, HBM_REACH, SMS
from taskgraph.cost.interference import fit_response
from taskgraph.cost.measurements import Measurements
from taskgraph.errors import CalibrationError
from taskgraph.graph.device import Device

HELD_OUT = 0.3
"""Share of the shapes that are kept out of the fit that is judged."""
MOST_ROWS = 5000
"""Rows of the fit of a formula's few coefficients; its correction sees all."""
LEAST_ROWS = 20
_SCALE = 0.05
"""Log error beyond which a row counts linearly (soft L1), so that odd kernels do not bend the fit."""
_PULL = 0.02
"""Pull of a coefficient's log towards its start: what the data do not determine stays put."""
_LIMITS = {
    "wave": (0.01, 1.0), "overlap": (1.0, 8.0), "hbm_efficiency": (0.3, 1.0), "link_efficiency": (0.3, 1.0),
    "l2_gain": (1.0, 4.0), "l2_share": (0.3, 1.2), "mma_efficiency": (0.2, 1.0), "tile_efficiency": (0.2, 1.0),
}  # fmt: skip
"""What a coefficient can mean at all; the others stay within a factor of 20 of their start. Without these a formula may
fit as well and transfer badly: an efficiency above 1 is another effect in disguise."""
_SM_RATE, _FASTER_THAN_NEEDED = "sm_bytes_per_s", 1.25
"""An SM walks over a cache faster than its share of the saturating bandwidth: full-GPU times cannot tell the two apart,
the R -> P tables do (decode attention keeps 0.6 to 0.8 of its speed on 0.4 of an A100)."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute percentage errors of predictions, as fractions."""

    rows: int
    median: float
    mean: float
    p90: float

    @staticmethod
    def of(predicted: np.ndarray, measured: np.ndarray) -> "Errors":
        gap = np.abs(predicted / measured - 1.0)
        return Errors(len(gap), float(np.median(gap)), float(gap.mean()), float(np.quantile(gap, 0.9)))

    def as_dict(self) -> dict[str, float]:
        return {"rows": self.rows, "median": self.median, "mean": self.mean, "p90": self.p90}


def calibrate(
    tables: Sequence[Measurements],
    device: Device,
    provenance: Mapping[str, str],
    version: int = 1,
    report: Callable[[str, Errors, Errors], None] = lambda *_: None,
) -> Calibration:
    """The coefficients of `device` from its rows in `tables`; `report` hears (family, formula alone, corrected), the
    held-out errors, as they come. CalibrationError when no table has enough rows of the device."""
    (hbm_reach, hbm_sharp), (link_reach, link_sharp) = fit_response("hbm"), fit_response("link")
    response = Response(hbm_reach, hbm_sharp, link_reach, link_sharp)
    spec = spec_of(device, response, "bf16")
    fitted: dict[str, Fitted] = {}
    for table in tables:
        mine = table.where(table.systems == device.name)
        if len(mine.seconds) >= LEAST_ROWS:
            fitted[mine.family.name] = _fit_family(mine, spec, report)
    if not fitted:
        seen = sorted({str(name) for table in tables for name in table.systems})
        raise CalibrationError(
            f"column 'system': no table has {LEAST_ROWS} rows of {device.name!r}; they have {', '.join(seen)}."
        )
    stamp = {"date": datetime.now(UTC).date().isoformat(), **provenance}
    return Calibration(device.name, version, device.launch_seconds, response, fitted, stamp)


def _fit_family(table: Measurements, spec: np.ndarray, report: Callable[[str, Errors, Errors], None]) -> Fitted:
    held = table.keys < HELD_OUT
    train, test = table.where(~held), table.where(held)
    judged = _fit(train, spec)
    formula = bases(table.family.number, test.rows, spec, judged[0])
    scale = np.exp(_correction(table.family, judged[1], test.rows, spec))
    plain, errors = Errors.of(formula, test.seconds), Errors.of(formula * scale, test.seconds)
    report(table.family.name, plain, errors)
    coefficients, values = _fit(table, spec)
    named = {name: float(f"{v:.5g}") for (name, _), v in zip(table.family.coefficients, coefficients, strict=True)}
    held_out = {**errors.as_dict(), "formula_alone_median": plain.median, "formula_alone_p90": plain.p90}
    tables = tuple(map(tuple, surface.to_lists(table.family.terms, values)))
    return Fitted(named, tables, {key: round(value, 4) for key, value in held_out.items()})


def _fit(table: Measurements, spec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients, values of the correction) of one family."""
    family = table.family
    coefficients = _fit_formula(table, spec)
    left = np.log(table.seconds / bases(family.number, table.rows, spec, coefficients))
    features = all_features(family.number, table.rows, spec)
    values = surface.fit(features, left, family.terms, family.features, family.ridge)
    return coefficients, values


def _fit_formula(table: Measurements, spec: np.ndarray) -> np.ndarray:
    """Robust least squares on log time over the logs of the coefficients (trust region, scipy)."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise CalibrationError("fitting needs scipy: pip install 'taskgraph-gpu[calibrate]'.") from error
    start = np.array([value for _, value in table.family.coefficients])
    pick = np.random.default_rng(0).permutation(len(table.seconds))[:MOST_ROWS]
    rows, seconds = table.rows[pick], np.log(table.seconds[pick])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.log(bases(table.family.number, rows, spec, start * np.exp(x))) - seconds, _PULL * x])

    limits = np.array([_LIMITS.get(name, (value / 20, value * 20)) for name, value in table.family.coefficients])
    if (names := [name for name, _ in table.family.coefficients]).count(_SM_RATE) and table.family.number == DECODE:
        least = _FASTER_THAN_NEEDED * spec[HBM_REACH] * spec[HBM] / spec[SMS]
        limits[names.index(_SM_RATE)] = (least, 20 * least)
        start[names.index(_SM_RATE)] = 2 * least
    found = least_squares(
        residuals,
        np.zeros(len(start)),
        bounds=tuple(np.log(limits.T / start)),
        loss="soft_l1",
        f_scale=_SCALE,
        diff_step=1e-3,
        max_nfev=40,
    )
    result: np.ndarray = start * np.exp(found.x)
    return result


def _correction(family: Family, values: np.ndarray, rows: np.ndarray, spec: np.ndarray) -> np.ndarray:
    axes, offsets = surface.pack(family.terms, family.features)
    return surface.corrections(all_features(family.number, rows, spec), axes, offsets, values)


def predictions(model: DeviceModel, table: Measurements) -> np.ndarray:
    """Predicted seconds of measured rows on the whole device."""
    spec = model.spec()
    return model.families[table.family.number].seconds(table.rows, spec, spec[SMS : SMS + 1])[:, 0]
