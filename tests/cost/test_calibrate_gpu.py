"""A gpu-check report becomes a device with coefficients of its own, in files that every command takes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import taskgraph as tg
from taskgraph.cost.calibrate_gpu import calibrated, save
from taskgraph.cost.fitted import model_of, shipped
from taskgraph.cost.gpu_report import GemmTime, GpuReport
from taskgraph.cost.model import predict
from taskgraph.errors import CalibrationError, DeviceError
from taskgraph.graph import device as specs

WEIGHTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (1536, 2048), (32000, 4096))
SHAPES = [(m, n, k) for m in (1, 64, 512, 1000, 2048, 4096) for n, k in WEIGHTS]
RATES = {
    "hbm_read_bytes_per_s on 8 SMs": 1.2e12, "h2d_bytes_per_s": 5.5e10, "d2h_bytes_per_s": 5.6e10, "graph_node_s": 6e-7,
}  # fmt: skip
SLOWER = 1.3


def product(m: int, n: int, k: int) -> tg.Graph:
    b = tg.GraphBuilder("product")
    b.output(tg.ops.gemm(b.input("x", (m, k), "bf16"), b.weight("w", (n, k), "bf16"), transpose_w=True))
    return b.build()


def seconds(device: tg.Device, shape: tuple[int, int, int]) -> float:
    graph = product(*shape)
    return predict(graph.ops[0], graph, device).seconds


def report(shapes: list[tuple[int, int, int]] = SHAPES, device: str = "h200_sxm") -> GpuReport:
    """Products that take SLOWER times what the shipped model of the device says, each by up to 1 % more or less."""
    noise = np.random.default_rng(3).uniform(0.99, 1.01, len(shapes))
    spec = specs.get(device)
    rows = tuple(
        GemmTime(*shape, SLOWER * seconds(spec, shape) * float(n)) for shape, n in zip(shapes, noise, strict=True)
    )
    return GpuReport("measured", spec, "GPU", 13000, (9, 0), (), {}, calibration=RATES, gemm=rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device file of the report, and its coefficients beside it."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "gpu-check.json").write_text(report().to_json())
    save(*calibrated(folder / "gpu-check.json", source="made up"), folder / "mine.json")
    return folder / "mine.json"


def test_the_device_predicts_what_was_measured(made: Path) -> None:
    device = tg.devices.get(str(made))
    held = [(256, 6144, 4096), (3000, 4096, 4096), (1500, 28672, 4096)]
    errors = [abs(seconds(device, s) / (SLOWER * seconds(specs.get("h200_sxm"), s)) - 1) for s in [*SHAPES, *held]]
    assert np.median(errors) < 0.03 and max(errors) < 0.25
    graph = product(512, 4096, 4096)
    assert predict(graph.ops[0], graph, device).source == "calibrated h200_sxm v1"
    tg.verify(tg.plan(graph, device, "sequential"), graph)


def test_rates_are_those_of_the_probes_and_say_so(made: Path) -> None:
    device, published = tg.devices.get(str(made)), specs.get("h200_sxm")
    assert (device.h2d_bytes_per_s, device.d2h_bytes_per_s, device.launch_seconds) == (5.5e10, 5.6e10, 6e-7)
    assert device.sm_hbm_bytes_per_s == 1.2e12 / 8
    sources = dict(device.sources)
    for name in ("h2d_bytes_per_s", "launch_seconds", "sm_hbm_bytes_per_s"):
        assert sources[name] == "measured by gpu-check on GPU"
    assert sources["hbm_bytes_per_s"] == dict(published.sources)["hbm_bytes_per_s"]


def test_families_that_were_not_measured_are_borrowed_with_a_wider_band(made: Path) -> None:
    ours, theirs = model_of(tg.devices.get(str(made))), shipped(specs.get("h200_sxm").calibration)
    for name, fit in theirs.families.items():
        if name != "gemm" and theirs.device != "h200_sxm":
            assert ours.family(name).band == pytest.approx(1.5 * fit.band, rel=1e-3)


def test_the_files_can_be_moved_together(made: Path, tmp_path: Path) -> None:
    for file in made.parent.glob("mine*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    assert seconds(tg.devices.get(str(tmp_path / "mine.json")), SHAPES[8]) == pytest.approx(
        seconds(tg.devices.get(str(made)), SHAPES[8])
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"gemm": report(SHAPES[:7]).gemm}, r"holds 7 products; 20 are needed\. Run `taskgraph gpu-check` with more"),
        ({"device": replace(specs.get("h200_sxm"), name="rtx9999")}, r"device 'rtx9999' is unknown: .*run `taskgraph"),
        ({"device": replace(specs.get("h200_sxm"), kind="cpu")}, r"is unknown"),
    ],
)
def test_reports_that_make_no_device_are_refused(change: dict[str, object], wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu-check.json"
    path.write_text(replace(report(SHAPES[:20]), **change).to_json())  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=wanted) as caught:
        calibrated(path)
    assert str(path) in str(caught.value)


def test_a_device_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(specs.get("h200_sxm").to_dict())[:300])
    with pytest.raises(DeviceError, match=r"cut\.json: not a device file: .*line 1 column.*Device\.to_dict"):
        tg.devices.get(str(path))
    with pytest.raises(DeviceError, match=r"cannot read device file .*nowhere\.json"):
        tg.devices.get(str(tmp_path / "nowhere.json"))


def test_the_command_writes_a_device_that_plan_takes(tmp_path: Path) -> None:
    from taskgraph.cli.main import app

    (tmp_path / "gpu-check.json").write_text(report().to_json())
    out = tmp_path / "mine.json"
    done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "gpu-check.json"), "--out", str(out)])
    assert done.exit_code == 0 and f"device: {out} (--device {out})" in done.output.replace("\n", ""), done.output
    planned = CliRunner().invoke(app, ["plan", "smollm2", "--device", str(out), "--batch", "1", "--context", "64"])
    assert planned.exit_code == 0 and "h200_sxm" in planned.output, planned.output
    refused = CliRunner().invoke(app, ["calibrate", str(tmp_path), "--out", str(out)])
    assert isinstance(refused.exception, CalibrationError) and "--device" in str(refused.exception)
