"""`taskgraph tune`: a model or a graph file, tuned; what it prints and writes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import taskgraph as tg
from benchmarks.schedule import layered_graph
from taskgraph.cli.steps import StepSize, graph_of
from taskgraph.cost.profiles import ProfileDB
from taskgraph.schedule.planner import replay_times
from taskgraph.tune.autotune import candidates, costs_known
from tests.command_line import call


def products(depth: int = 2) -> tg.Graph:
    """Two independent chains of small products."""
    b = tg.GraphBuilder("products")
    for side in "ab":
        x = b.input(side, (64, 64), "f32")
        for i in range(depth):
            x = tg.ops.gemm(x, b.weight(f"{side}{i}", (64, 64), "f32"))
        b.output(x)
    return b.build()


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Numba compiles what planning needs outside the budgets of the tests."""
    for device in ("cpu", "h100_sxm"):
        candidates(products(), tg.devices.get(device), 1.0, 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_a_graph_file_is_tuned_and_the_winner_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    graph = layered_graph(8, 4, 3)
    file, out = tmp_path / "graph.json", tmp_path / "best.json"
    file.write_text(graph.to_json())
    options = ["--backend", "sim", "--device", "h100_sxm", "--budget", "60", "--database", str(tmp_path / "p.sqlite3")]
    assert call(monkeypatch, "tune", str(file), *options, "--out", str(out), "--json") == 0
    result = last_line(capsys)
    assert (result["kind"], result["device"]) == ("simulated", "h100_sxm")
    assert result["choice"] == "packed" and result["gain"] > 1.0
    assert {trial["session"] for trial in result["trials"]} >= {"pass 1"}
    tg.verify(tg.Plan.load(out), graph)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProfileDB, tg.Tuned]:
    """Products tuned on this machine, and the database that remembers them."""
    database = ProfileDB(tmp_path_factory.mktemp("profiles") / "p.sqlite3")
    other = ProfileDB(tmp_path_factory.mktemp("other") / "p.sqlite3")
    tg.autotune(products(1), "cpu", 1.0, database=other)  # loads and compiles what runs; its op times are not shared
    return database, tg.autotune(products(), "cpu", 20.0, database=database)


def test_what_this_machine_measured_is_remembered(
    measured: tuple[ProfileDB, tg.Tuned],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    database, tuned = measured
    assert tuned.kind == "measured" and tuned.op_times > 0 and not tuned.remembered
    file = tmp_path / "graph.json"
    file.write_text(products().to_json())
    assert call(monkeypatch, "tune", str(file), "--database", str(database.path), "--json") == 0
    again = last_line(capsys)
    assert again["remembered"] and again["reason"] == tuned.reason


def test_a_model_by_name_is_one_step_of_it() -> None:
    graph = graph_of("smollm2-135m", StepSize(batch=2, context=32, tokens=4))
    assert graph.tensor["tokens"].shape == (8,)
    with pytest.raises(tg.PlanError, match="context is 3"):
        graph_of("smollm2-135m", StepSize(batch=2, context=3, tokens=4))


@pytest.mark.parametrize(
    ("arguments", "word"), [(["nowhere.json"], "nowhere"), (["smollm2-135m", "--budget", "0"], "budget_s")]
)
def test_bad_requests_are_one_line(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "tune", *arguments) == 2
    text = capsys.readouterr().err
    assert word in text and "Traceback" not in text


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "tune", "--help") == 0
    text = capsys.readouterr().out
    assert "taskgraph tune smollm2-135m" in text and "noise" in text


def test_measured_prices_are_those_that_autotune_plans_with(measured: tuple[ProfileDB, tg.Tuned]) -> None:
    """A replay of a tuned plan by the known prices is its own prediction; the sim backend shows the same."""
    database, tuned = measured
    known = costs_known("cpu", tuned.plan.device, database)
    assert replay_times(products(), tuned.plan, known).makespan_s == pytest.approx(tuned.plan.makespan_s, rel=1e-9)
    with tg.compile(products(), tuned.plan, "sim") as simulated:
        assert simulated.timeline() == tuned.plan.timeline
    assert "measured" in tuned.plan.timeline.origin


def wait_a_little(x: torch.Tensor, out: torch.Tensor) -> None:
    time.sleep(2e-3)
    out.copy_(x)


def test_custom_ops_are_priced_by_what_autotune_measured(tmp_path: Path) -> None:
    """Their declared work says nothing of a sleep; `plan` takes the measured times as `costs`."""
    b = tg.GraphBuilder("sleeps")
    x = b.input("x", (16,), "f32")
    for name in "ab":
        made = [tg.spec(f"y.{name}", (16,), "f32")]
        b.output(b.call(wait_a_little, [x], made, work=tg.Work(flops=16.0), demand=tg.demand(sm=(1, 1)), name=name))
    graph = b.build()
    tg.autotune(graph, "cpu", 5.0, database=tmp_path / "profiles.sqlite3")
    known = tg.costs_known("cpu", database=tmp_path / "profiles.sqlite3")
    by_formula, by_time = tg.plan(graph, "cpu", "sequential"), tg.plan(graph, "cpu", "sequential", costs=known)
    assert by_formula.makespan_s < 1e-3 and by_time.makespan_s >= 4e-3
    assert "measured" in by_time.timeline.origin
    tg.audit(by_time, graph, costs=known)
