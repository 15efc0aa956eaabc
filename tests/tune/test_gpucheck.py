"""autotune and gpu-check on the virtual GPU: they run to their end, and nothing simulated is called measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import taskgraph as tg
from taskgraph.cost.profiles import ProfileDB
from taskgraph.errors import DeviceError
from taskgraph.graph import device as specs
from taskgraph.runtime.gpu import dense, driver, spec
from taskgraph.runtime.gpu.driver import Capability
from taskgraph.tune import gpucheck
from tests.conftest import Call

DEVICE = "virtual:h100_sxm"


def test_autotune_on_the_virtual_gpu_is_simulated_and_stores_no_time(on_virtual: Call, tmp_path: Path) -> None:
    on_virtual(tune, tmp_path)


def tune(folder: Path) -> None:
    b = tg.GraphBuilder("pair")
    x, w, y = b.input("x", (64, 64), "f32"), b.weight("w", (64, 64), "f32"), b.input("y", (256, 64), "f32")
    b.output(tg.ops.gemm(x, w, name="product"), tg.ops.add(y, y, name="twice"))
    store = ProfileDB(folder / "profiles.sqlite")
    tuned = tg.autotune(b.build(), "cuda", budget_s=60, device=DEVICE, database=store)
    assert tuned.kind == "simulated" and "virtual h100_sxm" in tuned.origin
    assert tuned.trials and all(t.measured_s is None or t.measured_s > 0 for t in tuned.trials)
    assert not store.path.exists() or store.places() == ()


@pytest.mark.parametrize(
    ("name", "published"), [("NVIDIA H100 80GB HBM3", "h100_sxm"), ("NVIDIA A100-SXM4-80GB", "a100_sxm")]
)
def test_a_real_device_is_planned_for_by_its_published_spec(name: str, published: str) -> None:
    found = spec._of_real(Capability(device=name, sm_count=114), 1 << 36)
    assert found.name == published and (found.sm_count, found.memory_bytes) == (114, 1 << 36)
    assert found.hbm_bytes_per_s == specs.get(published).hbm_bytes_per_s
    with pytest.raises(DeviceError, match=r"GTX 480.*devices\.make"):
        spec._of_real(Capability(device="NVIDIA GTX 480", sm_count=15), 1 << 30)


def test_gpu_check_runs_to_its_end_on_the_virtual_gpu(on_virtual: Call, tmp_path: Path) -> None:
    code, text = on_virtual(run_cli, "gpu-check", "--device", DEVICE, "--out", str(tmp_path / "report.json"))
    assert code == 0, text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kind"] == "simulated" and "(simulated), 132 SMs, driver 13.5" in report["capability"]
    assert len(report["checks"]) >= 8 and all(check["passed"] for check in report["checks"])
    assert all(value > 0 for value in report["calibration"].values())
    rates = [value for name, value in report["calibration"].items() if name.startswith("hbm_read")]
    assert rates == sorted(rates), "more SMs draw more bandwidth"
    assert {o["choice"] for o in report["overlaps"]} <= {"packed", "sequential"} and len(report["overlaps"]) == 3
    assert all(o["packed_s"] > 0 and o["sequential_s"] > 0 for o in report["overlaps"])
    asked = sum(check["asked"] for check in report["checks"])
    compared = sum(o["compared"] for o in report["overlaps"])
    assert f"{asked} of {asked} checks hold" in " ".join(text.split())
    assert f"{compared} of 3 pairs were compared" in " ".join(text.split())


def test_what_was_not_asked_or_not_compared_is_counted_apart() -> None:
    """Nothing that did not happen is inside a number of things that hold."""
    checks = (gpucheck.Check("a", True, "seen"), gpucheck.Check("b", False, "not asked: no splits", asked=False))
    pairs = (
        gpucheck.Overlap("p", True, "sequential", 1.0, 1.0, 0.1, "sequential: it loses."),
        gpucheck.Overlap("q", False, "sequential", 1.0, 1.0, 0.1, "sequential: nothing was compared."),
    )
    report = gpucheck.GpuReport("measured", "GPU", 13000, (9, 0), (), (), checks, (), pairs, 1.0)
    text = gpucheck.summary(report)
    assert report.passed and "1 of 1 checks hold, 1 not asked; 1 of 2 pairs were compared; all times" in text
    assert "--   b: not asked" in text and "q: NOT COMPARED" in text and "p: sequential" in text
    failing = gpucheck.GpuReport(
        "measured", "GPU", 13000, (9, 0), (), (), (gpucheck.Check("a", False, "x"),), (), (), 1.0
    )
    assert not failing.passed and "FAIL a: x" in gpucheck.summary(failing)
    assert "0 of 1 checks hold; 0 of 0 pairs" in gpucheck.summary(failing)


def run_cli(*arguments: str) -> tuple[int, str]:
    from taskgraph.cli.main import app

    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    return done.exit_code, done.output


def test_doctor_tells_of_the_virtual_gpu(on_virtual: Call) -> None:
    code, text = on_virtual(run_cli, "doctor", "--device", DEVICE)
    assert code == 0 and "simulated" in text and "h100_sxm" in text


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_check_that_fails_is_reported_and_the_run_goes_on(on_virtual: Call, fault: str) -> None:
    on_virtual(fail_a_check, fault)


def fail_a_check(fault: str) -> None:
    def broken(bench: Any) -> str:
        if fault == "raises":
            raise DeviceError("lost")
        raise AssertionError("outputs differ")

    made = gpucheck._checked("broken", broken, None, lambda text: None)  # type: ignore[arg-type]
    assert not made.passed and made.seen in ("DeviceError: lost", "AssertionError: outputs differ")


def test_the_equality_check_sees_a_wrong_output(on_virtual: Call) -> None:
    on_virtual(see_a_wrong_output)


def see_a_wrong_output() -> None:
    """With a launch rule that adds a tensor to itself, the check of every op kind must fail."""
    right = dense.LAUNCH_RULES["add"]
    dense.LAUNCH_RULES["add"] = lambda op, ins, outs, site: right(op, [ins[0], ins[0]], outs, site)
    try:
        bench = gpucheck._Bench(driver.Gpu.open(), specs.get("h100_sxm"), DEVICE, gpucheck.VIRTUAL)
        name = "every op kind, f32, equals the cpu backend"
        made = gpucheck._checked(name, gpucheck.CHECKS[name], bench, lambda text: None)
    finally:
        dense.LAUNCH_RULES["add"] = right
    assert not made.passed and "differ from the cpu backend" in made.seen
