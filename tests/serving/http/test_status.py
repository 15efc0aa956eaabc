"""What a service says of itself: the counts, and the plan of its last step."""

import asyncio
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, from_hf
from taskgraph.serving.engine import Engine
from taskgraph.serving.http.app import Served
from taskgraph.serving.http.status import PlanBook, status_of
from taskgraph.serving.options import KvMemory
from taskgraph.serving.requests import Request
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.service import Service
from tests.serve_cases import PAGE, byte_tokenizer, make_served
from tests.serving.http.test_serve import body, get, together

VOCABULARY = 258


def tiny() -> ModelConfig:
    return from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256, "tie_word_embeddings": True,
        },
        "tiny",
    )  # fmt: skip


def tiny_engine() -> Engine:
    """A real engine with random weights."""
    config, draw = tiny(), torch.Generator().manual_seed(0)
    shapes = llama.step_graph(config, batch=1, tokens=1, cache=8, dtype="f32").flat().with_role("weight")
    weights = {t.name: torch.randn(t.shape, generator=draw) * 0.3 for t in shapes}
    return cpu_engine(config, weights, Limits(4, 64, 4, 128), KvMemory(24))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Service(tiny_engine()) as service:
        yield Served(service, byte_tokenizer(), "tiny")


def status(served: Served, query: str = "") -> dict[str, Any]:
    answer = get(served, "/v1/status" + query)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


def test_counts_are_those_of_what_was_served() -> None:
    served = make_served()
    try:
        first = status(served)
        assert (first["running"], first["waiting"], first["tokens"], first["pages_held"]) == (0, 0, 0, 0)
        assert (first["model"], first["state"], first["pages"], first["page_size"]) == ("formula", "ok", 256, PAGE)
        together(served, *(body("abc", max_tokens=7) for _ in range(3)))
        after = status(served)
        assert (after["tokens"], after["prompt_tokens"], after["running"]) == (21, 9, 0)
        assert after["uptime_s"] > first["uptime_s"]
        assert after["steps"] >= 7
        assert (after["last"], after["plan"]) == (None, None)  # a formula has no plan
    finally:
        served.service.close()
    assert status_of(served.service).state == "stopping"


def test_requests_that_run_and_wait_are_counted() -> None:
    engine = tiny_engine()
    for _ in range(7):
        engine.submit(Request([1, 2, 3], max_tokens=20))
    assert (engine.running, engine.waiting) == (0, 7)
    engine.step()
    assert (engine.running, engine.waiting) == (4, 3)  # the engine takes four sequences
    engine.run()
    assert (engine.running, engine.waiting) == (0, 0)
    engine.close()


def test_the_last_steps_plan_is_that_of_its_bucket(served: Served) -> None:
    together(served, {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0})
    found = status(served)
    last, plan, runner = found["last"], found["plan"], served.service.engine.runner
    assert (last["bucket"]["decode"], last["bucket"]["prefill"]) == (1, 0)
    assert last["digest"] == plan["digest"]
    made: tg.Plan = runner._plans[runner.last.bucket]  # type: ignore[attr-defined]
    assert {(s[0], s[2]) for s in plan["spans"]} == {(s.op, s.lane) for s in made.timeline.spans}
    assert len(plan["spans"]) == len(made.steps)
    ends = max(end for *_, end in plan["spans"])
    assert ends == pytest.approx(plan["predicted_s"]) == pytest.approx(made.makespan_s)
    assert len(plan["lanes"]) == len(made.lanes)
    kinds = {op: kind for op, kind, *_ in plan["spans"]}
    assert (kinds["layer.1/rope"], kinds["lm_head_proj"]) == ("paged_rope", "gemm")
    assert last["seconds"] > 0


def test_a_client_that_has_the_plan_gets_it_no_more(served: Served) -> None:
    together(served, {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0})
    digest = status(served)["plan"]["digest"]
    assert status(served, f"?plan={digest}")["plan"] is None
    assert status(served, f"?plan={digest}")["last"]["digest"] == digest
    assert status(served, "?plan=other")["plan"]["digest"] == digest


def test_a_view_is_made_once_a_plan(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    together(served, {"model": "tiny", "prompt": [5], "max_tokens": 2, "temperature": 0})
    book, last = PlanBook(served.service), status_of(served.service).last
    assert last is not None
    first = book.of(last)
    monkeypatch.setattr(served.service.engine.runner, "planned_step", lambda _: pytest.fail("made again"))
    again = book.of(last)
    assert first is not None and again is not None
    assert again[0] is first[0]


def test_status_can_be_asked_for_while_steps_run(served: Served) -> None:
    """Nothing that a client reads is torn: counts never go back, pages stay within the pool."""

    async def ask() -> list[dict[str, Any]]:
        seen = []
        streams = [served.service.submit(Request([i, 2], max_tokens=60)) for i in range(6)]
        while served.service.open:
            seen.append(await asyncio.to_thread(lambda: status_of(served.service)))
            await asyncio.sleep(0)
        for stream in streams:
            stream.close()
        return seen  # type: ignore[return-value]

    seen: list[Any] = asyncio.run(ask())
    assert len(seen) > 3
    for before, after in itertools.pairwise(seen):
        assert (after.tokens, after.steps) >= (before.tokens, before.steps)
        assert 0 <= after.pages_held <= after.pages
        assert after.running + after.waiting <= 6


def test_the_pages_polls_are_no_lines_of_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    served = make_served()
    try:
        with caplog.at_level(logging.INFO, "taskgraph.access"):
            status(served)
            get(served, "/v1/models")
        assert [record.getMessage().count("path=/v1/models ") for record in caplog.records] == [1]
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "taskgraph.access"):
            status(served)
        assert "path=/v1/status" in caplog.text
    finally:
        served.service.close()
