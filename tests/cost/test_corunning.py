"""What kernels that run at once do to each other: the model, its fit, and what two GPUs measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from benchmarks import corun
from taskgraph.cost.calibrate_gpu import calibrated
from taskgraph.cost.corunning import NONE, CoRunning, Pairs, pair_speeds
from taskgraph.cost.corunning_fit import Table, fit_corunning, fit_kept_grid
from taskgraph.cost.fitted import Calibration, model_of, shipped
from taskgraph.cost.gpu_report import KernelTime, PairTime, read_report
from taskgraph.cost.model import op_table
from taskgraph.errors import CalibrationError
from taskgraph.graph.device import Geometry, Partition
from taskgraph.schedule.evaluate import Assignment, Layout, beside_share, evaluate
from taskgraph.schedule.problem import make_problem
from taskgraph.tune.gpucheck.cases import named_case
from tests.schedule.problems_by_hand import CAPACITY, problem

REPORTS = Path(__file__).parents[2] / "benchmarks" / "reports"
GIVEN, WIDER, H100 = (REPORTS / name for name in ("h200-2026-11-26", "h200-2026-11-27", "h100-2026-11-27"))
H200 = tg.devices.get("h200_sxm")
SHARES = st.floats(0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.tuples(SHARES, SHARES), st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)), st.booleans())
def test_a_pair_runs_as_fast_as_the_clock_says(
    drawn: tuple[float, float], busy: tuple[float, float], shared: bool
) -> None:
    """Until the first of two ops ends, the evaluator's clock moves both at the speeds of `pair_speeds`."""
    together = CoRunning(hbm_knee=0.5, hbm_slope=0.8)
    room = 8 if shared else 4
    use = [[b * room, d * CAPACITY[0], 0.0, 0.0, 0.0] for b, d in zip(busy, drawn, strict=True)]
    two = replace(problem([1.0, 1.0], use, [], sizes=(room,), sm_bytes_per_s=np.inf), together=together)
    halves = Geometry((Partition(0, 4), Partition(4, 4)))
    layout = Layout.shared(8, 2) if shared else Layout.isolated(halves)
    times = evaluate(two, Assignment(layout, np.arange(2), np.arange(2), np.zeros(2, np.int64)))
    at_once = Pairs(
        np.array([busy]) * room, np.array([drawn]), np.zeros((1, 2)), np.array([8.0 if shared else 0.0])
    )  # fmt: skip
    speed = pair_speeds(at_once, together)[0]
    assert times.end_s.min() == pytest.approx(1.0 / speed.max(), rel=1e-9)


def test_nobody_is_slowed_by_a_device_without_a_model() -> None:
    pairs = Pairs(np.array([[60.0, 60.0]]), np.array([[0.5, 0.5]]), np.array([[9.0, 9.0]]), np.zeros(1))
    assert (pair_speeds(pairs, NONE) == 1.0).all()
    assert NONE.settled(2.0, 1e9) == 2.0


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 10.0), st.floats(0.1, 2.0), st.floats(0.01, 1.0))
def test_a_replay_settles_where_its_power_and_its_clocks_agree(
    seconds: float, energy: float, budget: float, exponent: float
) -> None:
    model = CoRunning(power_budget=budget, power_exponent=exponent)
    settled = model.settled(seconds, energy)
    assert settled >= seconds
    assert settled == pytest.approx(seconds / float(model.clocks(np.array(energy / settled))), rel=1e-6)
    assert model.settled(seconds, energy, measured_s=seconds) == seconds, "no more power than the times have in them"
    assert model.settled(2 * seconds, energy) >= settled


def test_kernels_of_full_partitions_are_slowed_by_power_and_copies_by_nothing() -> None:
    model = CoRunning(power_budget=0.5, power_exponent=0.25, hbm_slope=1.0, hbm_knee=0.2)
    beside = Pairs(np.array([[66.0, 0.0]]), np.array([[0.6, 0.01]]), np.array([[0.8, 0.2]]), np.zeros(1))
    slowed, free = pair_speeds(beside, model)[0]
    assert slowed == pytest.approx((1.4 / 1.41) * (0.5 / (0.8 * 1.4 / 1.41 + 0.2)) ** 0.25)
    assert free == 1.0


def test_products_beside_each_other_lose_what_pairs_do() -> None:
    """On lanes that share the device: no more power than in sequence, and yet slower, for as long as both run."""
    b = tg.GraphBuilder("beside")
    for i in range(2):
        x, w = b.input(f"x{i}", (4096, 4096), "bf16"), b.weight(f"w{i}", (4096, 14336), "bf16")
        b.output(tg.ops.gemm(x, w, name=f"product{i}"))
    two = make_problem(b.build(), H200, (132,))
    zeros, both = np.zeros(2, np.int64), Layout.shared(132, 2)
    beside = evaluate(two, Assignment(both, np.arange(2), np.arange(2), zeros))
    in_turn = evaluate(two, Assignment(both, np.arange(2), zeros, zeros))
    assert in_turn.makespan_s == pytest.approx(two.sequential_s()), "alone at its clocks, one after the other"
    assert 1.02 < beside.makespan_s / in_turn.makespan_s < 1.2
    assert beside_share(two, beside.start_s, beside.end_s) == pytest.approx(1.0, abs=0.02)
    assert beside_share(two, in_turn.start_s, in_turn.end_s) == 0.0


def test_power_bounds_every_plan_of_a_step_that_draws_too_much() -> None:
    """Large products alone: no order, slices or partitions take less than their SM time at the clocks that are left."""
    b = tg.GraphBuilder("products")
    for i in range(3):
        x, w = b.input(f"x{i}", (4096, 4096), "bf16"), b.weight(f"w{i}", (4096, 14336), "bf16")
        b.output(tg.ops.gemm(x, w, name=f"product{i}"))
    graph = b.build()
    plans = [tg.plan(graph, "h200_sxm", scheduler) for scheduler in ("sequential", "list", "search")]
    for plan in plans:
        assert plan.bounds.binding == "power"
        assert plan.bounds.sm_s < plan.bounds.power_s <= plan.makespan_s
        assert "clocks that power leaves" in tg.explain(plan)
        tg.verify(plan, graph)
        tg.audit(plan, graph)
    quiet = tg.plan(graph, replace(H200, name="quiet", calibration=""), "sequential")
    assert quiet.bounds.power_s == 0.0 and "power" not in tg.explain(quiet)


# ------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize(
    ("folder", "partition", "shared", "gain"),
    [(GIVEN, (0.03, 0.08), (0.06, 0.15), 0.06), (WIDER, (0.06, 0.15), (0.06, 0.15), 0.06),
     (H100, (0.08, 0.20), (0.08, 0.18), 0.06)],
)  # fmt: skip
def test_the_shipped_models_say_what_was_measured(
    folder: Path, partition: tuple[float, float], shared: tuple[float, float], gain: float
) -> None:
    """Errors in sample; the held-out ones are in the coefficient files and in docs/predict.md."""
    body, gains = corun.judged(corun.Measured.read([folder], corun.device_of([folder])))
    for name, (median, p90) in (("partition", partition), ("shared_sum", shared)):
        assert body[name]["median"] <= median and body[name]["p90"] <= p90
    assert body["gain_error_max"] <= gain and body["false_packed"] == 0
    assert len(gains) == body["plans"] == 8


def test_products_of_the_h200_are_its_own() -> None:
    errors = corun.gemm_errors(corun.Measured.read([GIVEN], H200))
    assert errors["median"] <= 0.04 and errors["p90"] <= 0.12
    made = shipped("h200_sxm").families
    assert made["gemm"].fitted_on == "" and made["gemm"].held_out["median"] <= 0.04
    assert made["gemm"].held_out["p90"] <= 0.12
    assert model_of(H200).family("moe").source == "transferred from h100_sxm v1"


@pytest.mark.parametrize("name", ["gemm_down_2048", "gemm_qkv_2048", "gemm_gateup_2048", "decode_512x1024"])
def test_kernels_on_fewer_sms_take_what_they_were_measured_to(name: str) -> None:
    """Relative to the whole device: products of two rounds stand still from 72 to 120 SMs."""
    rows = [row for row in corun.rows_of(KernelTime, GIVEN / "kernels_by_sms.csv") if row.kernel == name]
    table = op_table(named_case(name).graph, H200, [row.sms for row in rows]).seconds[0]
    whole = next(i for i, row in enumerate(rows) if row.sms == H200.sm_count)
    ratio = table / table[whole] / (np.array([row.seconds for row in rows]) / rows[whole].seconds)
    assert np.median(np.abs(ratio - 1)) < 0.13 and np.abs(ratio - 1).max() < 0.35


# ------------------------------------------------------------------------------------------- the fit


def drawn_rows(model: CoRunning, noise: float) -> list[PairTime]:
    """The given pairs as the model has them, each by up to `noise` more or less."""
    rows = corun.rows_of(PairTime, GIVEN / "corun.csv")
    speed = Table(rows, corun.graph_of, H200).predicted(model)
    speed = speed * np.random.default_rng(1).uniform(1 - noise, 1 + noise, speed.shape)
    beside = [(row.a_alone_s / a, row.b_alone_s / b) for row, (a, b) in zip(rows, speed.tolist(), strict=True)]
    return [replace(row, a_beside_b_s=a, b_beside_a_s=b) for row, (a, b) in zip(rows, beside, strict=True)]


def test_a_fit_finds_the_model_that_rows_were_made_with() -> None:
    wanted = CoRunning(hbm_knee=0.5, hbm_slope=0.6, power_budget=0.45, power_exponent=0.25, flops_a_byte=100.0)
    rows = drawn_rows(wanted, 0.01)
    found = fit_corunning(rows, corun.graph_of, H200)
    assert found.held_out["partition"]["median"] < 0.01 and found.held_out["shared_sum"]["p90"] < 0.03
    table = Table(rows, corun.graph_of, H200)
    np.testing.assert_allclose(table.predicted(found), table.predicted(wanted), rtol=0.02)
    with pytest.raises(CalibrationError, match="at least 30 pairs"):
        fit_corunning(rows[:20], corun.graph_of, H200)


def test_a_fit_finds_how_much_products_keep_their_grid() -> None:
    own = shipped("h200_sxm")
    names = ["gemm_down_2048", "gemm_qkv_2048", "gemm_gateup_512"]
    sizes = [16, 40, 72, 96, 120, 132]
    rows = [
        KernelTime(name, sms, float(seconds)) for name in names
        for sms, seconds in zip(sizes, op_table(named_case(name).graph, H200, sizes).seconds[0], strict=True)
    ]  # fmt: skip
    gemm = replace(own.families["gemm"], coefficients={**own.families["gemm"].coefficients, "kept_grid": 0.01})
    found = fit_kept_grid(rows, corun.graph_of, H200, replace(own, families={**own.families, "gemm": gemm}))
    assert found.families["gemm"].coefficients["kept_grid"] == pytest.approx(
        own.families["gemm"].coefficients["kept_grid"], rel=0.07
    )
    assert fit_kept_grid([], corun.graph_of, H200, own) is own


def test_a_report_of_gpu_check_makes_a_model_of_its_own() -> None:
    path = H100 / "gpu-check.json"
    _, made = calibrated(path, graph_of=corun.graph_of)
    assert made.co_running is not None and made.co_running.held_out["partition"]["rows"] > 700
    assert made.families["gemm"].coefficients["kept_grid"] > 0.5
    assert Calibration.from_json(saved(made)) == made
    assert len(read_report(path).corun) == 488


def saved(made: Calibration) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "made.json")
        return (Path(folder) / "made.json").read_text()


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"hbm_slope": 0.', '"hbm_slope": -0.', "hbm_slope is -0"),
        ('"power_budget": ', '"power_budget": 0.0, "power_exponent_": ', "is not known"),
        ('"hbm_knee": 0.', '"hbm_knee": NaN, "x": 0.', "is not known"),
        ('"partition": {', '"partitions": {', "held_out has 'partitions'"),
    ],
)
def test_a_coefficient_file_with_a_wrong_model_is_refused(old: str, new: str, says: str) -> None:
    text = saved(shipped("h200_sxm"))
    assert old in text
    with pytest.raises(CalibrationError, match=says):
        Calibration.from_json(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("gemm_gateup_2048,decode_64x4096,shared,132,132,nan,2e-4,9e-4,8e-4", "line 2: .*a_alone_s"),
        ("gemm_gateup_2048,decode_64x4096,shared,132,132,-6e-4,2e-4,9e-4,8e-4", "line 2: .*a_alone_s is -0.0006"),
        ("gemm_gateup_2048,decode_64x4096,both,132,132,6e-4,2e-4,9e-4,8e-4", "line 2: .*mode is 'both'"),
        ("gemm_gateup_2048,decode_64x4096,shared,132,132,6e-4,2e-4,9e-4", "line 2: .*b_beside_a_s is missing"),
        ("gemm_gateup,decode_64x4096,shared,132,132,6e-4,2e-4,9e-4,8e-4", "'gemm_gateup' names no kernel"),
    ],
)
def test_a_row_that_no_measurement_gives_is_named(row: str, says: str, tmp_path: Path) -> None:
    head = "a,b,mode,sms_a,sms_b,a_alone_s,b_alone_s,a_beside_b_s,b_beside_a_s"
    (tmp_path / "corun.csv").write_text(f"{head}\n{row}\n")
    with pytest.raises(CalibrationError, match=says):
        corun.judged(corun.Measured.read([tmp_path], H200))


def test_a_folder_without_tables_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert corun.main([str(tmp_path)]) == 2
    assert "there is none of corun.csv" in capsys.readouterr().err
