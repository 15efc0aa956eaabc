"""Fitted coefficients of a device as a value, their files, and the device that borrows them."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from taskgraph.cost import surface
from taskgraph.cost.corunning import NONE, CoRunning
from taskgraph.cost.families import FAMILIES
from taskgraph.cost.family import Coefficients, Family, Spec, blocks
from taskgraph.cost.formulas import exp
from taskgraph.errors import CalibrationError
from taskgraph.graph.device import Device
from taskgraph.graph.op import MOST_WORK
from taskgraph.record import decode, read_text, shown

SCHEMA = 1
UNFITTED_BAND = 0.3
"""Error band of families that no table measures (norms, elementwise, copies) and of plain rooflines: NanoFlow's
table 2 has a roofline 13 % to 82 % short on GEMMs."""
TRANSFER_BAND = 1.5
"""A device that borrows coefficients gets this many times the band of the device that they were fitted on."""
CO_RUNNING_FROM = "h200_sxm"
"""Whose pairs of kernels a device borrows that has none: most were measured there."""
_MOST_LOG = 20.0
"""A correction's part of the log of a time, at most."""
_INNERMOST = re.compile(r"\[[^\[\]{}]*\]")
_FOLDER = Path(__file__).parent / "coefficients"


@dataclass(frozen=True, slots=True)
class Response:
    """How bandwidth follows SMs: `drawn_share` of device memory and of the link (see RESPONSE)."""

    hbm_reach: float
    hbm_sharp: float
    link_reach: float
    link_sharp: float

    def _check(self) -> None:
        if not all(0.01 <= getattr(self, name) <= 100 for name in self.__slots__):
            raise CalibrationError(f"{self} must have numbers from 0.01 to 100.")


RESPONSE = Response(hbm_reach=1.6, hbm_sharp=1.2, link_reach=3.55, link_sharp=1.4)
"""Nearest to both published tables of how attention and collectives on an A100 answer to their share of it (arXiv
2408.12757, table 3, and the repository efeslab/Nanoflow): `benchmarks.interference` fits it."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A table of a correction: its axes as `axes_of` tells them, and its values in row order."""

    axes: tuple[tuple[str, float, float, int], ...]
    log: tuple[float, ...]

    def _check(self) -> None:
        if not all(abs(value) <= _MOST_LOG for value in self.log):
            raise CalibrationError(f"a value of a correction is beyond {_MOST_LOG:g}, or no number.")


def axes_of(term: surface.Term) -> tuple[tuple[str, float, float, int], ...]:
    """(feature, low, step, count) of each axis of a term."""
    return tuple((a.feature, a.low, round(a.step, 6), a.count) for a in term)


@dataclass(frozen=True, slots=True)
class Fitted:
    """One family on one device: held-out errors (rows, median, mean, p90), coefficients by name, and the tables of its
    correction. `band` is the 90th percentile of the held-out error. `fitted_on` is the device that it was fitted on,
    where that is another than the calibration's."""

    held_out: Mapping[str, float]
    coefficients: Mapping[str, float]
    correction: tuple[Correction, ...]
    fitted_on: str = ""

    _LATER: ClassVar[frozenset[str]] = frozenset({"fitted_on"})

    def _check(self) -> None:
        for name, value in self.coefficients.items():
            if not 0 < value <= MOST_WORK:
                raise CalibrationError(f"coefficient {name!r} is {value}; it must be finite and above 0.")
        for name, value in self.held_out.items():
            if not 0 <= value <= MOST_WORK:
                raise CalibrationError(f"held-out {name!r} is {value}; it must be finite and not negative.")
        if "p90" not in self.held_out:
            raise CalibrationError("held_out has no 'p90', which the error band is.")

    @property
    def band(self) -> float:
        return float(self.held_out["p90"])


@dataclass(frozen=True, slots=True)
class Calibration:
    """The coefficients of one device, with where they come from, as a coefficient file has them. `launch_seconds` is
    the part of every time that is launch; `co_running` what running together does, where pairs of kernels were
    measured."""

    device: str
    version: int
    launch_seconds: float
    provenance: Mapping[str, str]
    response: Response
    families: Mapping[str, Fitted]
    co_running: CoRunning | None = None

    _LATER: ClassVar[frozenset[str]] = frozenset({"co_running"})

    def _check(self) -> None:
        if not self.device or self.version < 1 or not 0 <= self.launch_seconds <= 1:
            raise CalibrationError(
                f"device {self.device!r}, version {self.version} and launch_seconds {self.launch_seconds} must be a "
                "name, at least 1, and from 0 to 1."
            )
        for name, fit in self.families.items():
            family = FAMILIES.get(name)
            if family is None:
                raise CalibrationError(f"there is no family {shown(name)}; there are {', '.join(FAMILIES)}.")
            wanted = [*zip(map(axes_of, family.terms), surface.sizes_of(family.terms), strict=True)]
            found = [(table.axes, len(table.log)) for table in fit.correction]
            if found != wanted or fit.coefficients.keys() != {*family.coefficients.names()}:
                raise CalibrationError(
                    f"family {name!r} has other coefficients or axes than this version. Calibrate again."
                )

    def save(self, path: str | Path) -> None:
        """Write the coefficient file."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        Path(path).write_text(_INNERMOST.sub(lambda found: " ".join(found[0].split()), text) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Calibration":
        """The calibration in a file; CalibrationError when it is not one of this version."""
        text = read_text(path, CalibrationError, "coefficient file")
        try:
            return Calibration.from_json(text)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from None

    @staticmethod
    def from_json(text: str) -> "Calibration":
        """The calibration in the text of a coefficient file; CalibrationError, with the place in it, if it is none."""
        return decode(Calibration, text, CalibrationError, "coefficient file", "Calibrate again.", SCHEMA)


@lru_cache(maxsize=16)
def shipped(name: str) -> Calibration:
    """The calibration of that name that comes with the package, or that the file NAME.json holds."""
    if name.endswith(".json"):
        return Calibration.load(name)
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.json")))
        raise CalibrationError(f"no coefficients named {name!r} come with the package; it has {known}.")
    return Calibration.load(path)


@dataclass(frozen=True, slots=True)
class FamilyModel:
    """A family on one device: its coefficients and the values of its correction, those of all terms one after another
    (none where it was not fitted). `band` is the relative error of its times, `source` says where they come from."""

    family: Family
    coefficients: Coefficients
    values: np.ndarray
    band: float = UNFITTED_BAND
    source: str = "formula, not calibrated"

    def seconds(self, shapes: np.ndarray, spec: Spec, sms: np.ndarray) -> np.ndarray:
        """Seconds (n, m), launch included, of shapes (n, fields of the family's `shape`) on `sms` (m,) SMs: the formula
        times the exponential of the correction, which depends on the shape alone, so that the time is monotone in SMs
        as the formula is."""
        seconds = self.family.seconds(shapes, spec, self.coefficients, sms)
        return seconds * self.scale(shapes, spec)[:, None] if len(self.values) else seconds

    def scale(self, shapes: np.ndarray, spec: Spec) -> np.ndarray:
        """What the correction multiplies the formula's times by (n,)."""
        made = np.empty(len(shapes))
        for part in blocks(len(shapes), surface.CORNERS * len(self.family.terms)):
            features = self.family.features_of(shapes[part], spec)
            made[part] = exp(surface.corrections(features, self.family.terms, self.values))
        return made


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """Every family on one device under one calibration."""

    device: Device
    calibration: Calibration
    _made: dict[str, FamilyModel] = field(default_factory=dict, repr=False, compare=False)

    @property
    def launch_s(self) -> float:
        """The launch within the families' seconds."""
        return self.calibration.launch_seconds

    def family(self, name: str) -> FamilyModel:
        """The family of that name, made when it is first asked for."""
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(FAMILIES[name])
        return made

    def _make(self, family: Family) -> FamilyModel:
        fitted = self.calibration.families.get(family.name)
        if fitted is None:
            return FamilyModel(family, family.coefficients(), np.zeros(0))
        origin = fitted.fitted_on or self.calibration.device
        source, wider = ("calibrated", 1.0) if origin == self.device.name else ("transferred from", TRANSFER_BAND)
        named = [fitted.coefficients[name] for name in family.coefficients.names()]
        values = np.array([value for table in fitted.correction for value in table.log], np.float64)
        made = f"{source} {origin} v{self.calibration.version}"
        return FamilyModel(family, family.coefficients.of(named), values, fitted.band * wider, made)

    @property
    def together(self) -> CoRunning:
        """What running together does, by the calibration's own pairs, or by those of CO_RUNNING_FROM with wider
        errors."""
        own = self.calibration.co_running
        if own is not None and self.calibration.device == self.device.name:
            return own
        theirs = own or shipped(CO_RUNNING_FROM).co_running or NONE
        wider = {layout: {**errors, "p90": errors["p90"] * TRANSFER_BAND} for layout, errors in theirs.held_out.items()}
        return replace(theirs, held_out=wider)

    def spec(self, dtype: str = "bf16") -> Spec:
        """The device's numbers as the formulas take them, with the arithmetic rate of `dtype`."""
        return spec_of(self.device, self.calibration.response, dtype)


def spec_of(device: Device, response: Response, dtype: str) -> Spec:
    """`device` as the formulas take it, for kernels of `dtype`."""
    return Spec(
        sms=float(device.sm_count),
        flops_per_s=device.rate(dtype),
        hbm_bytes_per_s=device.hbm_bytes_per_s,
        link_bytes_per_s=device.link_bytes_per_s,
        l2_bytes=float(device.l2_bytes),
        h2d_bytes_per_s=device.h2d_bytes_per_s,
        d2h_bytes_per_s=device.d2h_bytes_per_s,
        hbm_reach=response.hbm_reach,
        hbm_sharp=response.hbm_sharp,
        link_reach=response.link_reach,
        link_sharp=response.link_sharp,
    )


@lru_cache(maxsize=64)
def model_of(device: Device) -> DeviceModel:
    """The device's calibrated model, its own or its relation's; CalibrationError if it names coefficients that are
    not shipped."""
    return model_with(shipped(device.calibration), device)


def model_with(calibration: Calibration, device: Device) -> DeviceModel:
    """`device` under the coefficients of `calibration`."""
    return DeviceModel(device, calibration)
