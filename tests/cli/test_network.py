"""Commands whose ranks talk over a network: --network, --routing and --algorithm of plan, whatif and bench-serve."""

from pathlib import Path

import pytest

import taskgraph as tg
from tests.command_line import call

SIZE = ["--batch", "64", "--tensor-parallel", "8", "--scheduler", "list"]


def test_whatif_on_a_torus_by_goal_and_by_dimension_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for routing in ("goal", "dimension-order"):
        arguments = ["--network", "torus:4x4x4", "--routing", routing, *SIZE]
        assert call(monkeypatch, "whatif", "llama-3-70b", *arguments) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "each of 8 ranks" in text and "torus:4x4x4 by" in text and routing in text
        assert "collectives by" in text and "the device's links" in text


@pytest.mark.parametrize("text", ["machines:2x8", "switch:2*8", "fat-tree:2x1+2*8"])
def test_a_plan_of_16_ranks_of_two_machines(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Twice as many as the model has key-value heads."""
    out = tmp_path / "plan.json"
    arguments = ["--network", text, "--ranks", "16", "--batch", "64", "--scheduler", "list", "--out", str(out)]
    assert call(monkeypatch, "plan", "llama-3-70b", *arguments) == 0
    assert f"16 x h100_sxm on {text} by shortest" in " ".join(capsys.readouterr().out.split())
    network = tg.Plan.load(out).device.network
    assert network is not None and network.topology.tiers[-1] == 8 and network.topology.hosts == 16


def test_a_trace_is_replayed_on_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,64,4\n0.1,32,2\n")
    took = []
    for network in ("switch:8@450GB/s", "switch:8@1GB/s"):
        arguments = ["--device", "h100_sxm", "--ranks", "8", "--trace", str(trace), "--variant", "sequential"]
        assert call(monkeypatch, "bench-serve", "llama-2-7b", *arguments, "--network", network, "--json") == 0
        took.append(float(capsys.readouterr().out.split('"seconds": ')[1].split(",")[0]))
    assert took[0] < took[1]


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("whatif", ["--network", "torus:4x4x4"], "give --tensor-parallel 2 or more"),
        ("whatif", ["--routing", "goal", *SIZE], "give --network too"),
        ("whatif", ["--network", "cube", *SIZE], "write torus:4x4x4"),
        ("plan", ["--network", "switch:8", "--routing", "goal", *SIZE], "made for tori and meshes"),
        ("plan", ["--network", "torus:4x4*8", "--routing", "goal", *SIZE], "made for tori and meshes"),
        ("plan", ["--network", "switch:4", *SIZE], "8 ranks on 'switch:4', which has 4 hosts; use a larger network"),
    ],
)
def test_a_bad_network_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], says: str
) -> None:
    assert call(monkeypatch, command, "llama-3-70b", *arguments) == 2
    assert says in " ".join(capsys.readouterr().err.split())
