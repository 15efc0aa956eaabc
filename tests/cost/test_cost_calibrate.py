"""Calibration: known coefficients come back, bad tables are refused by row and column, files keep their meaning."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import taskgraph as tg
from benchmarks import cost_model
from taskgraph.cost import surface
from taskgraph.cost.calibrate import Errors, calibrate, fit_tables, predictions
from taskgraph.cost.fitted import Calibration, model_of, model_with, shipped
from taskgraph.cost.measurements import Measurements, read
from taskgraph.cost.surface import Axis
from taskgraph.errors import CalibrationError

H100 = tg.devices.get("h100_sxm")
GEMM_HEADER = "system,m,n,k,milliseconds"


def gemm_table(path: Path, rows: int = 400, noise: float = 0.03, seed: int = 0) -> Path:
    """Times that the shipped model gives on a slower memory, with noise: a device that never was."""
    draw = np.random.default_rng(seed)
    shapes = np.column_stack([*(2.0 ** draw.integers(5, 14, (3, rows))), np.full(rows, 2.0)])
    device = tg.devices.make("h100_sxm", hbm_bytes_per_s=2e12)
    model = model_of(device)
    seconds = model.family("gemm").seconds(shapes, model.spec(), np.array([132.0]))[:, 0]
    seconds *= np.exp(noise * draw.standard_normal(rows))
    lines = [f"h100_sxm,{m:.0f},{n:.0f},{k:.0f},{1e3 * t:.6f}" for (m, n, k, _), t in zip(shapes, seconds, strict=True)]
    with gzip.open(path, "wt") as stream:
        stream.write("\n".join([GEMM_HEADER, *lines]) + "\n")
    return path


def test_calibration_finds_a_device_that_never_was(tmp_path: Path) -> None:
    tables = read(gemm_table(tmp_path / "gemm.csv.gz"))
    made = calibrate(tables, H100, {"data": "made up"})
    before, after = model_of(H100), model_with(made, H100)
    (fresh,) = read(gemm_table(tmp_path / "fresh.csv.gz", seed=1))
    plain = Errors.of(predictions(before, fresh), fresh.seconds)
    fitted = Errors.of(predictions(after, fresh), fresh.seconds)
    assert fitted.median < 0.06
    assert fitted.median < plain.median
    assert made.families["gemm"].held_out["median"] == pytest.approx(fitted.median, abs=0.04), (
        "held-out errors are honest"
    )


def test_file_round_trip(tmp_path: Path) -> None:
    ours = shipped("h100_sxm")
    ours.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == ours
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(CalibrationError, match="schema"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(CalibrationError, match="a100_sxm, h100_sxm"):
        shipped("h101")


@pytest.mark.parametrize("name", ["a100_sxm", "h100_sxm"])
def test_shipped_coefficients_reach_their_targets_on_held_out_shapes(name: str) -> None:
    """The recorded errors of the fit that is shipped; the tables themselves are not part of the package."""
    made = shipped(name)
    assert {"data", "licence", "date"} <= set(made.provenance)
    wanted = {"gemm": 0.036, "decode_attention": 0.07, "prefill_attention": 0.07, "moe": 0.12, "nccl": 0.08}
    assert {f: fit.held_out["median"] <= wanted[f] for f, fit in made.families.items()} == dict.fromkeys(wanted, True)


def test_same_shape_has_the_same_part_on_every_device(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        f"{GEMM_HEADER}\nh100_sxm,8,64,64,0.1\na100_sxm,8,64,64,0.2\nh100_sxm,9,64,64,0.1\n"
    )
    (table,) = read(tmp_path / "t.csv")
    assert table.keys[0] == table.keys[1] != table.keys[2]


BAD = {
    "empty": (GEMM_HEADER, "empty"),
    "negative": (f"{GEMM_HEADER}\nh100_sxm,8,64,64,-0.1", "row 2, column 'milliseconds'"),
    "zero": (f"{GEMM_HEADER}\nh100_sxm,8,64,64,0.1\nh100_sxm,0,64,64,0.1", "row 3, column 'm'"),
    "nan": (f"{GEMM_HEADER}\nh100_sxm,8,nan,64,0.1", "row 2, column 'n'"),
    "text": (f"{GEMM_HEADER}\nh100_sxm,8,64,many,0.1", "row 2, column 'k' is 'many'"),
    "units": (f"{GEMM_HEADER}\nh100_sxm,8,64,64,0.1\nh100_sxm,8,64,64,0.00001", "row 3, column 'milliseconds'.*units"),
    "columns": ("system,m,n,milliseconds\nh100_sxm,8,64,0.1", "lacks column 'k'"),
    "no time": ("system,m,n,k\nh100_sxm,8,64,64", "column 'milliseconds' is missing"),
    "ragged": (f"{GEMM_HEADER}\nh100_sxm,8,64,0.1", "row 2 has 4 cells"),
    "kind": (
        "system,op_name,num_gpus,message_bytes_or_elements,milliseconds\nx,gather,2,8,0.1",
        "row 2, column 'op_name'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_by_row_and_column(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    (tmp_path / "t.csv").write_text(text + "\n")
    with pytest.raises(CalibrationError, match=message):
        read(tmp_path / "t.csv")


def test_no_rows_of_the_device(tmp_path: Path) -> None:
    tables = read(gemm_table(tmp_path / "gemm.csv.gz", rows=30))
    with pytest.raises(CalibrationError, match=r"column 'system'.*'a100_sxm'.*h100_sxm"):
        calibrate(tables, tg.devices.get("a100_sxm"), {})
    with pytest.raises(CalibrationError, match="no table in"):
        read([])


def test_parquet_says_the_same(tmp_path: Path) -> None:
    from pyarrow import csv, parquet

    (tmp_path / "t.csv").write_text(f"{GEMM_HEADER}\nh100_sxm,8,64,64,0.1\nh100_sxm,9,64,64,0.2\n")
    parquet.write_table(csv.read_csv(tmp_path / "t.csv"), tmp_path / "t.parquet")
    (a,), (b,) = read(tmp_path / "t.csv"), read(tmp_path / "t.parquet")
    np.testing.assert_array_equal(a.shapes, b.shapes)
    np.testing.assert_array_equal(a.seconds, b.seconds)


def test_a_surface_is_linear_between_knots_and_flat_beyond() -> None:
    terms = ((Axis("a", 0, 1, 3), Axis("b", 0, 2, 2)),)
    values = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])  # a + 5 b

    def at(a: float, b: float) -> float:
        (found,) = surface.corrections({"b": np.array([b]), "a": np.array([a])}, terms, values)
        return float(found)

    assert at(0.5, 0.0) == pytest.approx(0.5)
    assert at(1.25, 1.0) == pytest.approx(6.25)
    assert at(9.0, 0.0) == pytest.approx(2.0)
    assert at(-1.0, 5.0) == pytest.approx(10.0)


def test_a_surface_fit_ignores_odd_rows() -> None:
    draw = np.random.default_rng(0)
    a = draw.uniform(0, 4, 500)
    wanted = 0.1 * a + 0.005 * draw.standard_normal(500)
    wanted[::10] += 2.0
    values = fit_tables({"a": a}, wanted, ((Axis("a", 0, 1, 5),),), ridge=1e-3)
    np.testing.assert_allclose(values, 0.1 * np.arange(5), atol=0.02)


def test_benchmark_prints_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    gemm_table(tmp_path / "gemm.csv.gz", rows=30)
    assert cost_model.main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["h100_sxm"]["gemm"]) == {"rows", "median", "mean", "p90"}
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert cost_model.main([str(tmp_path)]) == 2
    assert "lacks column" in capsys.readouterr().err


def test_where_keeps_rows_together(tmp_path: Path) -> None:
    (table,) = read(gemm_table(tmp_path / "gemm.csv.gz", rows=50))
    half = table.where(table.keys < 0.5)
    assert isinstance(half, Measurements)
    assert 0 < len(half.seconds) < 50
    assert len(half.seconds) == len(half.shapes) == len(half.keys) == len(half.systems)
