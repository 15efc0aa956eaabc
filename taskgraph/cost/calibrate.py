"""Fit a device's coefficients to measurements: first the formula's, then the tables of its correction.

Errors are those of held-out shapes: a shape's hash decides its part, so that no shape is in both. The errors that are
reported, and the band, come from a fit without the held-out shapes; the coefficients that are kept use all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from taskgraph.cost import surface
from taskgraph.cost.family import Coefficients, Family, Features, Spec
from taskgraph.cost.fitted import RESPONSE, Calibration, Correction, DeviceModel, FamilyModel, Fitted, axes_of, spec_of
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


def calibrate(
    tables: Sequence[Measurements],
    device: Device,
    provenance: Mapping[str, str],
    version: int = 1,
    report: Callable[[str, Errors, Errors], None] = lambda *_: None,
) -> Calibration:
    """The coefficients of `device` from its rows in `tables`; `report` hears (family, formula alone, corrected), the
    held-out errors, as they come. CalibrationError when no table has enough rows of the device."""
    spec = spec_of(device, RESPONSE, "bf16")
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
    return Calibration(device.name, version, device.launch_seconds, stamp, RESPONSE, fitted)


def _fit_family(table: Measurements, spec: Spec, report: Callable[[str, Errors, Errors], None]) -> Fitted:
    family, held = table.family, table.keys < HELD_OUT
    train, test = table.where(~held), table.where(held)
    coefficients, values = _fit(train, spec)
    formula, model = _whole_device(family, test.shapes, spec, coefficients), FamilyModel(family, coefficients, values)
    corrected = model.seconds(test.shapes, spec, np.array([spec.sms]))[:, 0]
    plain, errors = Errors.of(formula, test.seconds), Errors.of(corrected, test.seconds)
    report(family.name, plain, errors)
    coefficients, values = _fit(table, spec)
    fitted = zip(family.coefficients.names(), coefficients.values(), strict=True)
    named = {name: float(f"{value:.5g}") for name, value in fitted}
    held_out = {**asdict(errors), "formula_alone_median": plain.median, "formula_alone_p90": plain.p90}
    parts = np.split(values, np.cumsum(surface.sizes_of(family.terms), dtype=np.int64))[:-1]
    correction = tuple(
        Correction(axes_of(term), tuple(round(value, 4) for value in part.tolist()))
        for term, part in zip(family.terms, parts, strict=True)
    )
    return Fitted({key: round(value, 4) for key, value in held_out.items()}, named, correction)


def _fit(table: Measurements, spec: Spec) -> tuple[Coefficients, np.ndarray]:
    """The coefficients of one family, and the values of its correction."""
    family = table.family
    coefficients = _fit_formula(table, spec)
    left = np.log(table.seconds / _whole_device(family, table.shapes, spec, coefficients))
    return coefficients, fit_tables(family.features_of(table.shapes, spec), left, family.terms, family.ridge)


def _whole_device(family: Family, shapes: np.ndarray, spec: Spec, coefficients: Coefficients) -> np.ndarray:
    """The formula's seconds (n,) on all SMs."""
    return family.seconds(shapes, spec, coefficients, np.array([spec.sms]))[:, 0]


def _fit_formula(table: Measurements, spec: Spec) -> Coefficients:
    """Robust least squares on log time over the logs of the coefficients (trust region, scipy)."""
    family, kind = table.family, table.family.coefficients
    start, limits = kind().values(), kind.limits()
    for name, (value, low, high) in family.on_device(spec).items():
        start[kind.names().index(name)], limits[name] = value, (low, high)
    pick = np.random.default_rng(0).permutation(len(table.seconds))[:MOST_ROWS]
    shapes, seconds = table.shapes[pick], np.log(table.seconds[pick])

    def residuals(x: np.ndarray) -> np.ndarray:
        predicted = _whole_device(family, shapes, spec, kind.of(start * np.exp(x)))
        return np.concatenate([np.log(predicted) - seconds, _PULL * x])

    found = scipy_parts().optimize.least_squares(
        residuals,
        np.zeros(len(start)),
        bounds=tuple(np.log(np.array([limits[name] for name in kind.names()]).T / start)),
        loss="soft_l1",
        f_scale=_SCALE,
        diff_step=1e-3,
        max_nfev=40,
    )
    return kind.of(start * np.exp(found.x))


def fit_tables(
    features: Features, wanted: np.ndarray, terms: Sequence[surface.Term], ridge: float, rounds: int = 12
) -> np.ndarray:
    """The values of all terms' tables, one after another, that bring the correction near `wanted` (n,): least absolute
    deviations with a ridge penalty, by iteratively reweighted least squares (Holland and Welsch 1977). All terms are
    fitted together, so that a term without data is 0."""
    if not terms:
        return np.zeros(0)
    size = sum(surface.sizes_of(terms))
    index, weight = surface.corners(features, terms)
    points = np.broadcast_to(np.arange(len(wanted)), index.shape)
    entries = (weight.ravel(), (points.ravel(), index.ravel()))
    design = scipy_parts().sparse.csr_array(entries, shape=(len(wanted), size))
    values, weights = np.zeros(size), np.ones(len(wanted))
    for _ in range(rounds):
        scaled = design * weights[:, None]
        values = np.linalg.solve((design.T @ scaled).toarray() + ridge * np.eye(size), scaled.T @ wanted)
        error = np.abs(wanted - design @ values)
        weights = 1.0 / np.maximum(error, 0.01)
        weights /= weights.mean()
    return values


def scipy_parts() -> Any:
    """scipy, which only fitting needs, with the parts that it takes."""
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError as error:
        raise CalibrationError("fitting needs scipy: pip install 'taskgraph-gpu[calibrate]'.") from error
    return scipy


def predictions(model: DeviceModel, table: Measurements) -> np.ndarray:
    """Predicted seconds of measured rows on the whole device."""
    spec = model.spec()
    return model.family(table.family.name).seconds(table.shapes, spec, np.array([spec.sms]))[:, 0]
