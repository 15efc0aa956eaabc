"""The steps in which overlap may pay: figures are those of their plans, and plans run on the cuda backend."""

import contextlib
import io
import json
from typing import Any

import pytest

import taskgraph as tg
from benchmarks import overlap_corpus
from benchmarks.overlap_corpus import FULL, SMALL, STEPS, chosen, main, planned, row_of
from taskgraph.errors import BackendUnavailable
from taskgraph.ops import COLLECTIVES
from taskgraph.schedule.problem import Budget
from tests.conftest import virtual_process


def printed(*argv: str) -> dict[str, Any]:
    """The JSON on the last line of the benchmark's output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main([*argv, "--json"]) == 0
    result: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return result


def test_every_step_that_is_asked_for_has_its_figures() -> None:
    found = printed("--only", "f,e", "--seconds", "0.05", "--device", "h100_sxm")
    assert [*found["steps"]] == ["f", "e"] and found["device"] == "h100_sxm"
    for row in found["steps"].values():
        assert {*row} == {"sequential_s", "packed_s", "gain", "band", "choice"}
        assert row["gain"] == pytest.approx(row["sequential_s"] / row["packed_s"])
        assert row["band"] > 0 and row["packed_s"] > 0
        assert row["choice"] == "sequential" or row["choice"].startswith("packed: ")


@pytest.mark.parametrize("size", [FULL, SMALL])
def test_the_steps_are_what_their_titles_say(size: overlap_corpus.Size) -> None:
    graphs = {name: step.graph(size) for name, step in STEPS.items()}
    works = {name: [op.work for op in graph.flat().ops] for name, graph in graphs.items()}
    for name, ways in {"a": (True, True), "b": (False, False), "c": (True, False)}.items():
        moved = [sum(getattr(work, way) for work in works[name]) for way in ("h2d_bytes", "d2h_bytes")]
        assert tuple(amount > 0 for amount in moved) == ways
    kinds = {name: [op.kind for op in graph.ops] for name, graph in graphs.items()}
    for name, each in kinds.items():
        assert bool({*COLLECTIVES} & {*each}) == (STEPS[name].ranks > 1), name
    assert "copy" not in {op.kind for op in graphs["c"].ops[: graphs["c"].repeat.first]}  # type: ignore[union-attr]
    layers = {name: graph.repeat.count for name, graph in graphs.items() if graph.repeat}
    assert {*layers} == {*STEPS} - {"f"} and len({*layers.values()}) == 1
    chains = graphs["f"]
    assert len(chains.outputs) * 4 == len(chains.ops) and {*kinds["f"]} == {"gemm"}


def test_full_steps_have_the_shapes_that_were_asked_for() -> None:
    graphs = {name: step.graph(FULL) for name, step in STEPS.items()}
    assert graphs["a"].tensor["tokens"].shape == (256 + 1024,)
    assert graphs["b"].tensor["layer/prefill_keys"].shape[2] == 32768
    assert graphs["b"].tensor["layer/decode_keys"].shape[::2] == (256, 4096)
    assert graphs["c"].tensor["tokens"].shape == (8 * 1024,)
    assert graphs["d"].tensor["tokens"].shape == (2048,)
    assert graphs["e"].tensor["tokens"].shape == (256,)
    op = graphs["f"].ops[0]
    assert len(graphs["f"].ops) == 256 and op.work.flops == 2 * 64 * 512 * 512


def test_what_was_chosen_is_told_by_its_lanes_and_slices() -> None:
    graph = STEPS["f"].graph(SMALL)
    assert chosen(tg.plan(graph, "h200_sxm", "sequential")) == "sequential"
    plan = tg.plan(graph, "h200_sxm", "list")
    told = chosen(plan)
    if plan.verdict.choice == "packed":
        sizes = [size for geometry in plan.geometries for size in geometry.sizes]
        assert told.startswith("packed: ") and all(str(size) in told for size in sizes)


def test_plans_of_the_steps_are_checked_and_end_before_the_sequential_one() -> None:
    for name, step in STEPS.items():
        plan = planned(step.graph(SMALL), tg.devices.get("h200_sxm"), Budget(0.02))
        row = row_of(plan)
        assert row["choice"] == "sequential" or row["packed_s"] < row["sequential_s"], name


@pytest.mark.parametrize("wrong", ["g", "a,", "a,a b"])
def test_a_step_that_is_not_there_is_refused_by_name(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--only", wrong])
    assert stop.value.code == 2
    assert "there are a, b, c, d, e, f" in capsys.readouterr().err


def test_measuring_without_a_gpu_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from taskgraph.runtime.gpu.driver import Gpu

    def absent(*_: object) -> None:
        raise BackendUnavailable("no driver here.")

    monkeypatch.setattr(Gpu, "open", absent)
    assert main(["--measure", "--only", "f"]) == 2
    said = capsys.readouterr().err
    assert "--measure needs a GPU: no driver here." in said and "--device virtual:h200_sxm" in said


def test_plans_are_replayed_by_the_cuda_backend() -> None:
    """On the virtual driver, where each takes what was predicted; a step between ranks is not replayed."""
    with virtual_process("virtual:h200_sxm") as call:
        found = call(printed, "--measure", "--device", "virtual:h200_sxm", "--seconds", "0.05")["steps"]
    assert [*found] == [*STEPS]
    for name, row in found.items():
        if row["measured"] is None:
            assert STEPS[name].ranks > 1 or row["choice"] == "sequential", row
            continue
        assert row["measured"]["kind"] == "simulated"
        assert row["measured"]["sequential_s"] == pytest.approx(row["sequential_s"], rel=1e-3)
        if row["choice"] != "sequential":
            assert row["measured"]["packed_s"] == pytest.approx(row["packed_s"], rel=1e-3)
    assert sum(row["measured"] is not None for row in found.values()) >= 3
