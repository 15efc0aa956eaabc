"""Plans that are there already are used: files, and what autotune remembers."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import taskgraph as tg
from taskgraph.cli import main
from taskgraph.models import llama
from taskgraph.models.config import load_config
from taskgraph.serving.options import KvMemory
from taskgraph.serving.session import Session
from taskgraph.tune import autotune
from taskgraph.tune.known import KnownPlans

CONFIG = replace(
    load_config("smollm2-135m"), name="tiny", vocab_size=96, hidden_size=64, intermediate_size=96, layers=2, heads=4,
    kv_heads=2, head_dim=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Winners of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def decode_graph(name: str = "tiny", cache: int = 32) -> tg.Graph:
    """The decode step of a session with this cache."""
    return llama.step_graph(replace(CONFIG, name=name), batch=1, tokens=1, cache=cache, dtype="f32")


def weights() -> dict[str, torch.Tensor]:
    """Random weights of every step."""
    generator = torch.Generator().manual_seed(3)
    return {t.name: torch.randn(t.shape, generator=generator) * 0.1 for t in decode_graph().flat().with_role("weight")}


def sessions_plans(known: KnownPlans) -> tuple[tg.Plan, tg.Plan]:
    """The plans of a prefill of four tokens and of a decode, of a session that has been told of plans."""
    with Session(CONFIG, weights(), cache=32, planner=known) as session:
        session.run([1, 2, 3, 4], [0])
        session.run([5], [4])
        return session.step(4).plan, session.step(1).plan


@pytest.mark.parametrize("name", ["tiny", "called otherwise"])
def test_a_saved_plan_is_used_for_the_step_whose_it_is(tmp_path: Path, name: str) -> None:
    file, said = tmp_path / "decode.json", list[str]()
    marked = replace(tg.plan(decode_graph(name), "cpu", "list"), made_by="by hand").sealed()
    marked.save(file)
    known = KnownPlans([file], use_remembered=False, say=said.append)
    prefill, decode = sessions_plans(known)
    assert decode.made_by == "by hand" and decode.steps == marked.steps and prefill.made_by != "by hand"
    tg.verify(decode, decode_graph())
    known.check_used()
    assert len(said) == 1 and str(file) in said[0] and "decode" in said[0]


def test_a_plan_of_another_graph_is_refused_with_the_steps_that_there_are(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    tg.plan(decode_graph(cache=64), "cpu", "list").save(file)
    known = KnownPlans([file], use_remembered=False)
    sessions_plans(known)
    with pytest.raises(tg.PlanError, match=r"other\.json.*no step here.*tiny-decode") as caught:
        known.check_used()
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_device_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    tg.plan(decode_graph(), "h100_sxm", "list").save(file)
    with pytest.raises(tg.PlanError, match=r"gpu\.json is a plan for h100_sxm \(132 SMs\).*cpu"):
        KnownPlans([file])(decode_graph(), "cpu")


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(tg.PlanError, match=r"x\.json"):
        KnownPlans([tmp_path / "x.json"])
    with pytest.raises(tg.PlanError, match=r"none\.json"):
        KnownPlans([tmp_path / "none.json"])


def test_what_autotune_remembers_is_used_until_told_otherwise() -> None:
    graph, said = decode_graph(), list[str]()
    assert autotune.remembered(graph) is None
    tuned = tg.autotune(graph, "cpu", 60.0)  # ends when no candidate is new
    found = autotune.remembered(decode_graph("called otherwise"))
    assert found is not None and found.plan.steps == tuned.plan.steps and found.at == tuned.at != ""
    assert KnownPlans(say=said.append)(graph, "cpu") == tuned.plan
    assert len(said) == 1 and tuned.at in said[0] and tuned.kind in said[0]
    assert KnownPlans(use_remembered=False, say=said.append)(graph, "cpu").made_by != tuned.plan.made_by
    assert len(said) == 1


@pytest.mark.model
def test_a_step_planned_by_name_is_that_of_the_checkpoint(smollm2_gguf: Path) -> None:
    from taskgraph.models.weights import open_checkpoint

    with open_checkpoint(smollm2_gguf) as checkpoint:
        config = checkpoint.config
    by_name, by_file = (
        replace(llama.step_graph(each, batch=1, tokens=1, cache=256), name="step")
        for each in (load_config("smollm2"), config)
    )
    assert by_name.fingerprint == by_file.fingerprint


def test_the_serving_engine_uses_a_saved_plan_for_the_bucket_whose_it_is(tmp_path: Path) -> None:
    from taskgraph.models.paged import Bucket, PageShape, step_graph
    from taskgraph.serving.requests import Request
    from taskgraph.serving.runners.cpu import cpu_engine
    from taskgraph.serving.scheduler import Limits

    limits, file, said = Limits(2, 16, chunks=1, context=32), tmp_path / "bucket.json", list[str]()
    graph = step_graph(CONFIG, Bucket(2), PageShape(4, 32, 32), "f32")
    replace(tg.plan(graph, "cpu", "list"), made_by="by hand").sealed().save(file)
    known = KnownPlans([file], use_remembered=False, say=said.append)
    answers = []
    for planner in (known, "auto"):
        with cpu_engine(CONFIG, weights(), limits, KvMemory(4), planner=planner) as engine:
            engine.runner.warm()
            answers.append([done.tokens for done in engine.run([Request([1, 2], max_tokens=3)] * 2)])
    known.check_used()
    assert len(said) == 1 and "by hand" in said[0] and answers[0] == answers[1]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `taskgraph ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["taskgraph", *arguments])
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_plan_shares_a_model_out_over_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "rank.json"
    sizes = ["--batch", "64", "--context", "512", "--scheduler", "list"]
    assert command(monkeypatch, "plan", "llama-3-70b", "--ranks", "8", "--dtype", "f16", *sizes, "--out", str(out)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "8 x h100_sxm" in text and "each of 8 ranks keeps" in text and "of the 80 GB" in text
    graph = llama.step_graph(load_config("llama-3-70b").share(8), batch=64, tokens=1, cache=512, dtype="f16")
    tg.verify(tg.Plan.load(out), graph)  # also: it fits the memory of one
    assert command(monkeypatch, "plan", "llama-3-70b", *sizes) == 0
    assert "--ranks 4 would share it out" not in text
    alone = " ".join(capsys.readouterr().out.split())
    assert "note: the step keeps" in alone and "--ranks 2 would share it out" in alone


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan", "llama-3-8b", "--ranks", "3"], "32 heads"),
        (["plan", "llama-3-8b", "--dtype", "f8"], "f8"),
        (["plan", "llama-3-8b", "--ranks", "2", "--device", "l40s"], "link"),
        (["plan", "llama-3-8b", "--expert-parallel"], "--ranks 2"),
        (["run", "smollm2", "--plan", "nowhere.json"], "nowhere.json"),
        (["bench-serve", "llama-3-8b", "--device", "h100_sxm", "--dataset", "sharegpt", "--plan", "x.json"], "--plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_planned_or_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert word in error and len(error.splitlines()) == 1
