"""A device with coefficients of its own, from the report that `taskgraph gpu-check` left on it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from taskgraph.cache import write_atomically
from taskgraph.cost.calibrate import LEAST_ROWS, Errors, calibrate
from taskgraph.cost.corunning_fit import LEAST_PAIRS, GraphOf, fit_corunning, fit_kept_grid, fit_own_share
from taskgraph.cost.fitted import Calibration, Fitted, shipped
from taskgraph.cost.gpu_report import GpuReport, read_report
from taskgraph.cost.measurements import products
from taskgraph.errors import CalibrationError
from taskgraph.graph.device import Device, names

_MADE = "hypothetical, from "
"""How the sources of a device that was made from a published one begin."""


def calibrated(
    path: str | Path,
    version: int = 1,
    source: str = "not stated",
    graph_of: GraphOf | None = None,
    report: Callable[[str, Errors, Errors], None] = lambda *_: None,
) -> tuple[Device, Calibration]:
    """The device of a gpu-check report with its measured rates, and coefficients: of products fitted to the report, of
    other families those of the device's relation with a wider band; the co-running model, where it holds enough pairs.
    `graph_of` knows its kernels by name, for what needs them. `report` hears the held-out errors as `calibrate` tells
    them.

    CalibrationError, with the file's name, for a file that is no report, a device that is unknown, or too few rows."""
    found = read_report(path)
    _check_known(path, found.device)
    device = _measured(found)
    if len(found.gemm) < LEAST_ROWS:
        raise CalibrationError(
            f"{path}: the report holds {len(found.gemm)} products; {LEAST_ROWS} are needed. Run `taskgraph gpu-check` "
            "with more minutes."
        )
    shapes = [(row.m, row.n, row.k) for row in found.gemm]
    table = products(device.name, shapes, [row.seconds for row in found.gemm])
    about = {"data": source, "kind": found.kind, "gpu": found.capability, "licence": "the user's own measurements"}
    made = calibrate([table], replace(device, calibration=""), about, version, report)
    made = replace(made, families={**_borrowed(found.device), **made.families})
    known = graph_of if found.kind == "measured" else None  # a virtual device has no memory to crowd and no clocks
    return device, made if known is None else with_kernels(made, found, known, device)


def with_kernels(made: Calibration, found: GpuReport, graph_of: GraphOf, device: Device) -> Calibration:
    """The calibration with what the report's pairs, and its products on fewer SMs, say."""
    pairs = sum(row.mode == "partition" for row in found.corun)
    model = fit_corunning(found.corun, graph_of, device) if pairs >= LEAST_PAIRS else made.co_running
    made = fit_kept_grid(found.kernels_by_sms, graph_of, device, replace(made, co_running=model))
    return fit_own_share(found.kernels_by_sms, graph_of, device, made)


def save(device: Device, made: Calibration, out: Path) -> Path:
    """Write the device to `out` and its coefficients beside it; the path of these."""
    beside = out.with_name(f"{out.stem}.coefficients.json")
    made.save(beside)
    body = replace(device, calibration=beside.name).to_dict()
    write_atomically(out, json.dumps(body, indent=1) + "\n")
    return beside


def _check_known(path: str | Path, device: Device) -> None:
    if device.kind != "gpu" or not (device.name in names() or any(_MADE in text for _, text in device.sources)):
        raise CalibrationError(
            f"{path}: the device {device.name!r} is unknown: no published GPU and none made from one. Known are "
            f"{', '.join(names())}; run `taskgraph gpu-check` again with this version."
        )


def _measured(found: GpuReport) -> Device:
    """The report's device with the rates that its probes gave, each with its source."""
    device, rates = found.device, found.calibration or {}
    small = rates.get(f"hbm_read_bytes_per_s on {device.sm_min} SMs", device.sm_hbm_bytes_per_s * device.sm_min)
    made = replace(
        device,
        h2d_bytes_per_s=rates.get("h2d_bytes_per_s", device.h2d_bytes_per_s),
        d2h_bytes_per_s=rates.get("d2h_bytes_per_s", device.d2h_bytes_per_s),
        launch_seconds=rates.get("graph_node_s", device.launch_seconds),
        sm_hbm_bytes_per_s=min(small / device.sm_min, device.hbm_bytes_per_s),
    )
    said = f"{found.kind} by gpu-check on {found.capability}"
    fields = ("h2d_bytes_per_s", "d2h_bytes_per_s", "launch_seconds", "sm_hbm_bytes_per_s")
    changed = dict.fromkeys((name for name in fields if getattr(made, name) != getattr(device, name)), said)
    return replace(made, sources=tuple(sorted({**dict(device.sources), **changed}.items())))


def _borrowed(device: Device) -> dict[str, Fitted]:
    """The families of the device's relation, each with the device that it was fitted on."""
    if not device.calibration:
        return {}
    theirs = shipped(device.calibration)
    return {name: replace(fit, fitted_on=fit.fitted_on or theirs.device) for name, fit in theirs.families.items()}
