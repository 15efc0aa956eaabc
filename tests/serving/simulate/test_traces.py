"""Traces: read, drawn, replayed; the grid of planned steps; bench-serve and the simulated benchmark."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from benchmarks import serve_sim
from taskgraph.errors import RequestError
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.serving.requests import Request
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.simulate.runner import SimRunner, simulated_engine
from taskgraph.serving.simulate.stepgrid import (
    CONTEXT,
    DECODE,
    TOKENS,
    VARIANTS,
    StepGrid,
    StepShape,
    between,
    visited,
)
from taskgraph.serving.simulate.traces import COLUMNS, DATASETS, Arrival, Lengths, poisson, read_trace, replay
from tests.command_line import call

ROWS = [(0.5, 7, 3), (0.0, 11, 1), (2.25, 5, 9)]

# ------------------------------------------------------------------------------------------- files


def written(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    if path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [COLUMNS, *rows]) + "\n")
    else:
        path.write_text("\n\n".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows))
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path, name: str) -> None:
    trace = read_trace(written(tmp_path / name, ROWS))
    assert trace == [Arrival(0.0, 11, 1), Arrival(0.5, 7, 3), Arrival(2.25, 5, 9)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival_s,input_tokens\n0,5\n", "line 2: no output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n0,5,2\n1,x,2\n", "line 3: .*'x'"),
        ("arrival_s,input_tokens,output_tokens\n0,5,0\n", "0 output"),
        ("arrival_s,input_tokens,output_tokens\n-1,5,1\n", "arrival -1"),
        ("arrival_s,input_tokens,output_tokens\nnan,5,1\n", "arrival nan"),
        ("arrival_s,input_tokens,output_tokens\n0,2.5,1\n", "2.5 input"),
        ("arrival_s,input_tokens,output_tokens\n", "no requests"),
        ("", "no requests"),
    ],
)
def test_a_bad_trace_names_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(RequestError, match=says):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"arrival_s": 0}\n', "line 1: no input"),
        ('{"arrival_s": 0}\n{', "line 2"),
        ("\n{]", r"t\.jsonl, line 2"),
        ("[" * 100_000, r"t\.jsonl, line 1.*deep"),
        ('{"arrival_s": 0, "input_tokens": 1e400, "output_tokens": 1}', "line 1.*inf input"),
        ('{"arrival_s": 0, "input_tokens": 5, "output_tokens": NaN}', "line 1.*nan output"),
        ('{"arrival_s": 0, "input_tokens": true, "output_tokens": 1}', "line 1.*input_tokens True"),
        ('{"arrival_s": 0, "input_tokens": 4294967296, "output_tokens": 1}', "line 1.*from 1 to"),
        ('{"arrival_s": 0, "arrival_s": 1, "input_tokens": 5, "output_tokens": 1}', "line 1.*twice"),
        ("[1]", "no arrival_s"),
    ],
)
def test_bad_json_lines(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=says):
        read_trace(path)


def test_a_trace_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="cannot read"):
        read_trace(tmp_path / "b.csv")


# ------------------------------------------------------------------------------------------- drawn


@pytest.mark.parametrize("name", DATASETS)
def test_drawn_lengths_have_the_published_moments(name: str) -> None:
    """Where nothing is cut; a log-normal's standard deviation converges slowly."""
    wanted = DATASETS[name]
    drawn = np.array(wanted.draw(200_000, 10**7, seed=1), float)
    for column, mean, std in ((0, wanted.input_mean, wanted.input_std), (1, wanted.output_mean, wanted.output_std)):
        assert drawn[:, column].mean() == pytest.approx(mean, rel=0.02)
        assert drawn[:, column].std() == pytest.approx(std, rel=0.1)


@given(context=st.integers(2, 5000), mean=st.floats(1, 3000), std=st.floats(0, 3000), seed=st.integers(0, 99))
def test_drawn_lengths_fit_the_context(context: int, mean: float, std: float, seed: int) -> None:
    drawn = Lengths(mean, std, mean, std).draw(20, context, seed)
    assert all(given >= 1 and wanted >= 1 and given + wanted <= context for given, wanted in drawn)


def test_requests_come_at_the_asked_rate() -> None:
    trace = poisson([(5, 2)] * 4000, per_s=20.0)
    assert trace[-1].arrival_s == pytest.approx(200, rel=0.1)
    assert {a.arrival_s for a in poisson([(5, 2)] * 3)} == {0.0}


# -------------------------------------------------------------------------------------- the replay


def test_a_replay_sums_up_what_the_clock_says() -> None:
    config = load_config("llama-2-70b")
    with simulated_engine(config, lambda shape: 0.5, pages=100) as engine:
        report = replay(engine, [Arrival(0.0, 5, 3), Arrival(10.0, 20, 1)], "simulated", vocabulary=99)
    assert (report.requests, report.steps, report.seconds) == (2, 4, 10.5)
    assert report.tokens_per_s == pytest.approx((5 + 2 + 20) / 10.5)
    assert report.output_tokens_per_s == pytest.approx(4 / 10.5)
    assert report.ttft is not None and report.ttft.mean_s == report.ttft.p99_s == 0.5
    assert report.tpot is not None and report.tpot.p50_s == 0.5
    assert report.latency is not None and report.latency.p99_s == pytest.approx(1.49)


def test_ten_thousand_requests_leave_no_page() -> None:
    """Lengths of a dataset, arrivals at random, more of them than the pages hold: pre-emptions and all."""
    config = load_config("llama-2-70b")
    limits = Limits(sequences=256, tokens=1024, chunks=32, context=2048)
    trace = poisson(Lengths(50, 70, 10, 8).draw(10_000, 2048), per_s=2000.0)
    with simulated_engine(
        config, lambda shape: 1e-4 * (shape.decode + shape.prefill), pages=300, host_pages=50, limits=limits,
        expected_output=5.0,
    ) as engine:  # fmt: skip
        report = replay(engine, trace, "simulated", vocabulary=config.vocab_size)
        assert (report.requests, engine.cache.device.held, engine.cache.host.held) == (10_000, 0, 0)
        assert engine.scheduler.preemptions > 0
    assert report.seconds > trace[-1].arrival_s


def test_a_request_that_never_fits_is_refused_before_the_replay() -> None:
    config = load_config("llama-2-70b")
    with simulated_engine(config, lambda shape: 1.0, pages=4) as engine:
        with pytest.raises(RequestError, match=r"at 3 s has 60 \+ 5 tokens; the engine takes 64"):
            replay(engine, [Arrival(0, 5, 5), Arrival(3, 60, 5)], "simulated", vocabulary=9)
        assert engine.stats.steps == 0


# ---------------------------------------------------------------------------------------- the grid


@given(x=st.floats(1, 9000))
def test_weights_give_the_point_back(x: float) -> None:
    (low, a), (high, b) = between(TOKENS, x)
    assert a + b == pytest.approx(1) and a * low + b * high == pytest.approx(x)
    assert low <= x <= high or x > TOKENS[-1]


class Formula(StepGrid):
    """A grid whose corners are a formula that is linear in each coordinate."""

    def corner(self, variant: str, tokens: int, share: float, context: int) -> float:
        assert (tokens in TOKENS, share in DECODE, context in (0, *CONTEXT)) == (True, True, True)
        return float(VARIANTS.index(variant) + 1) * (1 + tokens + 0.01 * tokens * share * context)


@settings(deadline=None)
@given(
    tokens=st.integers(8, TOKENS[-1] // 8), eighths=st.integers(0, 8), context=st.integers(1, CONTEXT[-2]),
)  # fmt: skip
def test_interpolation_is_exact_for_what_is_linear(tokens: int, eighths: int, context: int) -> None:
    grid = Formula(load_config("llama-2-70b"), "a100_sxm")
    shape = StepShape(tokens * eighths, context, tokens * (8 - eighths), 1, 100)
    decode = shape.decode
    for k, variant in enumerate(VARIANTS, 1):
        expected = k * (1 + 8 * tokens + 0.01 * decode * (context if decode else 0))
        assert grid.of(variant)(shape) == pytest.approx(expected)


def test_a_corner_is_the_plan_of_its_step() -> None:
    """Sequential times are those of the whole step's graph, whatever the search finds."""
    config = load_config("llama-3.2-1b")
    grid = StepGrid(config, "a100_sxm", prompt_tokens=100, budget_s=0.1)
    sequential, sliced, ours = (grid.corner(variant, 256, 0.5, 512) for variant in VARIANTS)
    graph = mixed_step(config, Decode(128, context=512), Prefill(128, context=128))
    assert sequential == tg.plan(graph, "a100_sxm", "sequential").makespan_s
    assert ours <= sequential <= sliced
    assert grid.of("taskgraph")(StepShape(128, 512, 128, 1, 128)) == ours
    with pytest.raises(tg.PlanError, match="sequential, nanobatch_only"):
        grid.of("magic")


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3000), st.integers(0, 3000)), min_size=1, max_size=20))
def test_corners_share_the_steps_among_them(drawn: list[tuple[int, int, int]]) -> None:
    shapes = [StepShape(d, context if d else 0, p + 1, 1, 100) for d, context, p in drawn]
    shares = visited(shapes)
    assert sum(shares.values()) == pytest.approx(1)
    tokens = sum(weight * corner[0] for corner, weight in shares.items())
    assert tokens == pytest.approx(np.mean([s.decode + s.prefill for s in shapes]))


def test_prepare_plans_what_the_steps_need_and_no_more() -> None:
    grid = StepGrid(load_config("llama-3.2-1b"), "a100_sxm", prompt_tokens=100)
    often, seldom = StepShape(1024, 512, 1024, 8, 128), StepShape(32, 256, 32, 1, 128)
    runs = [[often] * 300 + [seldom], [often] * 5]
    grid.prepare(runs, budget_s=0.2)
    assert set(grid.planned) == {corner for run in runs for corner in visited(run)}
    at = (2048, 0.5, 512)
    assert "search" in grid.planned[at][1].made_by
    assert grid.corner("taskgraph", *at) <= grid.corner("sequential", *at)
    before = dict(grid.planned)
    grid.of("taskgraph")(often)
    assert grid.planned == before, "nothing is planned twice"


# ------------------------------------------------------------------------- benchmark, command line


def test_batches_of_a_trace_do_not_depend_on_the_seconds_of_its_steps() -> None:
    """Which is why serve_sim replays a trace once for all variants."""
    config, found = load_config("llama-2-70b"), []
    requests = [Request(np.ones(p, np.int32), o) for p, o in DATASETS["lmsys"].draw(150, 1024, seed=3)]
    for seconds in (lambda shape: 1.0, lambda shape: 1e-3 * (shape.prefill + 2 * shape.decode)):
        with simulated_engine(
            config, seconds, pages=400, host_pages=400, limits=Limits(63, 64, 8, 1024), expected_output=20.0
        ) as engine:
            engine.run(requests)
            assert engine.scheduler.preemptions > 0
            assert isinstance(engine.runner, SimRunner)
            found.append([(shape, copies) for shape, copies in engine.runner.launched])
    assert found[0] == found[1]


def test_serve_sim_rates_are_tokens_over_seconds() -> None:
    grid = Formula(load_config("llama-2-70b"), "a100_sxm")
    steps = [(StepShape(64, 256, 0, 0, 0), 0.0), (StepShape(128, 256, 128, 1, 128), 1e6)]
    found = serve_sim.figures_of(steps, grid.of("sequential"))
    first = 1 + 64 + 0.01 * 64 * 256
    assert found.tokens_per_s * serve_sim.RANKS == pytest.approx((64 + 256) / (first + 1e6)), "copies may take longer"
    assert first <= found.p50_s <= found.p99_s <= 1e6


def test_serve_sim_prints_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--setting", "prefill_only_512", "--requests", "40", "--seconds", "0.05", "--json"]
    assert serve_sim.main(argv) == 0
    out = capsys.readouterr().out
    result: Mapping[str, Mapping[str, float]] = json.loads(out.splitlines()[-1])
    assert set(result) == {"prefill_only_512"}
    row = result["prefill_only_512"]
    assert list(row) == ["optimal", "sequential", "nanobatch_only", "taskgraph"]
    assert row["optimal"] == 1857 and "published" in out and "simulated" in out
    assert row["nanobatch_only"] <= row["sequential"] <= row["taskgraph"] < row["optimal"]


def test_serve_sim_shows_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--setting", "lmsys", "--requests", "30", "--tokens", "256", "--tpot-ms", "60", "--in-order", "--json"]
    assert serve_sim.main(argv) == 0
    out = capsys.readouterr().out
    made = json.loads(out.splitlines()[-1])["lmsys"]
    assert "simulated" in out and "as chosen" in out
    assert made["mixed"]["requests"] == made["chosen"]["requests"] == 30
    assert made["chosen"]["tokens_per_s"] > 0.98 * made["mixed"]["tokens_per_s"]


def test_serve_sim_has_every_setting() -> None:
    assert set(serve_sim.SETTINGS) == {
        "512-512", "1024-512", "512-1024", "splitwise", "lmsys", "sharegpt", "prefill_only_512"
    }  # fmt: skip


SIMULATED = ["bench-serve", "llama-3.2-1b", "--device", "a100_sxm", "--plan-seconds", "0.05"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_bench_serve_simulates_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = written(tmp_path / name, ROWS)
    assert call(monkeypatch, *SIMULATED, "--trace", str(path), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "simulated" and report["requests"] == 3
    assert report["seconds"] > 2.25 and set(report["ttft"]) == {"mean_s", "p50_s", "p90_s", "p99_s"}
    assert call(monkeypatch, *SIMULATED, "--trace", str(path)) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("simulated", "TTFT", "TPOT", "tokens/s", "p99"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--trace"),
        (["--trace", "/no/such/trace.csv"], "/no/such/trace.csv"),
        (["--dataset", "novels"], "sharegpt"),
        (["--dataset", "lmsys", "--variant", "magic"], "magic"),
        (["--dataset", "lmsys", "--device", "cpu", "--ranks", "2"], "no checkpoint"),
        (["--dataset", "lmsys", "--device", "a100"], "a100_sxm"),
    ],
)
def test_bench_serve_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert call(monkeypatch, *SIMULATED, *arguments) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "bench-serve"])
def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert f"taskgraph {command} smollm2" in capsys.readouterr().out


def test_bench_serve_shows_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Mixed steps, and apart where that is better: with long contexts more prompts in the same time a token."""
    trace = written(tmp_path / "t.csv", [(0.02 * i, 6000 + 9 * i, 400 + i) for i in range(60)])
    argv = ["bench-serve", "llama-3-8b", "--device", "h200_sxm", "--trace", str(trace), "--context", "8192"]
    argv += ["--tpot-ms", "50", "--variant", "sequential"]
    assert call(monkeypatch, *argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    mixed, chosen = found["mixed"], found["chosen"]
    assert found["tpot_s"] == 0.05 and mixed["kind"] == chosen["kind"] == "simulated"
    assert mixed["requests"] == chosen["requests"] == 60
    assert found["beside"] > 0
    assert chosen["tokens_per_s"] > 0.995 * mixed["tokens_per_s"]
    for made in (mixed, chosen):
        assert made["tpot"]["p99_s"] < 0.0525
    assert found["choices"]
    assert call(monkeypatch, *argv) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in ("mixed steps", "as chosen", "simulated", "predicted"))


def test_a_wish_for_time_a_token_is_refused_where_it_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *SIMULATED, "--dataset", "lmsys", "--tpot-ms", "nan") == 2
    assert "tpot-ms" in capsys.readouterr().err
