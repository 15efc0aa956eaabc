"""What may be in a request: from Python and over HTTP a wrong value is refused by name, and none reaches a step."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.soak import FIELDS, NAME, WRONG, good_bodies, hostile
from taskgraph.errors import RequestError
from taskgraph.models.config import load_config
from taskgraph.serving.engine import Engine
from taskgraph.serving.http.app import Served, create_app
from taskgraph.serving.requests import Completion, Request, Sampling, checked
from taskgraph.serving.simulate.runner import simulated_engine
from tests.serve_cases import CONTEXT, END, VOCABULARY, make_served, said


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = make_served(most_body_bytes=1 << 20)
    yield made
    made.service.close()
    assert made.service.engine.cache.device.held == 0


def ask(served: Served, *sent: tuple[str, Any]) -> list[httpx.Response]:
    """The responses to (path, body), sent at once."""

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(served), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as client:
            bodies = [(path, body if isinstance(body, bytes) else json.dumps(body).encode()) for path, body in sent]
            return list(await asyncio.gather(*(client.post(path, content=body) for path, body in bodies)))

    return asyncio.run(all_of_them())


def completion(**more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "formula", "prompt": "abc", "max_tokens": 4, "temperature": 0, **more}


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "x"}]
    return "/v1/chat/completions", {
        "model": "formula", "messages": messages, "max_tokens": 4, "temperature": 0, **more
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ over HTTP


def test_null_is_a_field_that_was_not_given(served: Served) -> None:
    names = [name for name in FIELDS if name not in ("model", "prompt", "messages")]
    responses = ask(served, *(make(**{name: None}) for name in names for make in (completion, chat)))
    assert {r.status_code for r in responses} == {200}
    plain = [ask(served, make())[0].json()["choices"] for make in (completion, chat)]
    for i, name in enumerate(names):
        if name != "max_tokens":
            assert [r.json()["choices"] for r in responses[2 * i : 2 * i + 2]] == plain
    for make, name in ((completion, "model"), (completion, "prompt"), (chat, "messages")):
        error = ask(served, make(**{name: None}))[0].json()["error"]
        assert error["param"] == name and "required" in error["message"]
    nulls = [{"role": "user", "content": "x", "name": None, "tool_calls": None}]
    assert ask(served, chat(messages=nulls, stream_options={"include_usage": None}))[0].status_code == 200


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"stop": []},
        {"stop": ""},
        {"stop": [""]},
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"store": False},
        {"parallel_tool_calls": True},
        {"service_tier": "auto"},
        {"n": 1.0},
        {"top_k": 5.0},
        {"seed": -1},
        {"seed": 2**70},
        {"top_k": 2**63},
        {"temperature": 1e-40},
        {"top_p": 1e-300},
        {"temperature": 0.0},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -2},
        {"logit_bias": {"5": 0}},
    ],
    ids=str,
)
def test_values_that_are_served(served: Served, harmless: dict[str, Any]) -> None:
    for response in ask(served, completion(**harmless), chat(**harmless)):
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
        ({"tool_choice": "required"}, "'tool_choice' is not supported"),
        ({"functions": [{"name": "f"}]}, "'functions' is not supported"),
        ({"guided_json": {}}, "'guided_json' is not supported"),
        ({"min_p": 0.1}, "'min_p' is not supported"),
        ({"repetition_penalty": 1.1}, "'repetition_penalty' is not supported"),
        ({"unknown": 1}, "'unknown' is not supported"),
        ({"modalities": ["audio"]}, "'modalities' is not supported"),
        ({"response_format": {"type": "grammar"}}, "response_format.type: 'grammar' is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"stream_options": {"x": 1}}, "'stream_options.x' is not supported"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": []}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": False}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": "3"}, "top_k"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 5}, "stop: 5 texts"),
        ({"stop": {}}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": ["a"] * 100_000}, "stop: 100000 texts"),
        ({"stop": "a" * 5000}, "stop"),
        ({"presence_penalty": 2.01}, "presence_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logit_bias": {str(2**70): 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"user": 5}, "user"),
        ({"model": 5}, "model"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": []}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": -(2**63)}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_that_are_refused_by_name(served: Served, wrong: dict[str, Any], names: str) -> None:
    steps = served.service.engine.stats.steps
    for response in ask(served, completion(**wrong), chat(**wrong)):
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == next(iter(wrong)), response.text
        assert names in error["message"] and len(error["message"]) < 400
    assert served.service.engine.stats.steps == steps


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"echo": "yes"}, "echo"),
        ({"echo": True, "logprobs": 1}, "'logprobs' of a prompt"),
        ({"best_of": 3}, "'best_of'"),
        ({"suffix": "x"}, "'suffix' is not supported"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"top_logprobs": 2}, "'top_logprobs' is not supported"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, -5]}, "prompt: token -5"),
        ({"prompt": [258]}, "prompt: token 258"),
        ({"prompt": [2**63]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"logprobs": 2}, "logprobs is not supported by this engine"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_completions_refuse_by_name(served: Served, wrong: dict[str, Any], names: str) -> None:
    (response,) = ask(served, completion(**wrong))
    assert response.status_code == 400 and names in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"top_logprobs": 3}, "'top_logprobs' want 'logprobs'"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt": "x"}, "'prompt' is not supported"),
        ({"messages": {}}, "messages"),
        ({"messages": [{}] * 50_000}, "messages"),
        ({"messages": ["x"]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: 'tool' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' is not supported"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "'messages.0.tool_calls' is not supported",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_chats_refuse_by_name(served: Served, wrong: dict[str, Any], names: str) -> None:
    (response,) = ask(served, chat(**wrong))
    assert response.status_code == 400 and names in response.json()["error"]["message"], response.text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_hostile_bodies_beside_good_ones(served: Served, seed: int) -> None:
    """Whatever comes, it is answered or refused with a reason in JSON, and its neighbours get what they would alone."""
    draw = random.Random(seed)
    bad = [(path, body.replace(b'"tiny"', b'"formula"')) for path, body in (hostile(draw) for _ in range(8))]
    good = [completion(max_tokens=3 + i, stream=i == 1) for i in range(3)]
    responses = ask(served, *bad, *good)
    for (path, body), response in zip(bad, responses, strict=False):
        # 500: an answer of a model without logits does not follow a grammar
        guided = b"response_format" in body and "grammar" in response.text
        assert response.status_code in (200, 400, 404, 413, 500 if guided else 0), (path, body[:300], response.text)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    first, streamed, last = responses[-3:]
    assert first.json()["choices"][0]["text"] == said("abc", 3) and last.json()["choices"][0]["text"] == said("abc", 5)
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == said("abc", 4)
    assert served.service.failure is None and served.service.open == 0


def test_every_field_with_every_wrong_value(served: Served) -> None:
    """None of them is the server's fault, and none reaches the engine as what it is not."""
    for name in FIELDS:
        sent = [make(**{name: value}) for value in WRONG for make in (completion, chat)]
        for first in range(0, len(sent), 60):
            for response in ask(served, *sent[first : first + 60]):
                ok = response.status_code in (200, 400, 404) or "grammar" in response.text
                assert ok, (name, response.text)
    assert served.service.failure is None and NAME and good_bodies()


def test_chat_fits_itself_to_a_small_cache_and_completions_have_their_16() -> None:
    small = make_served(pages=4)  # 32 tokens, of a context of 256
    try:
        _, body = chat()
        del body["max_tokens"]
        whole, second = ask(small, ("/v1/chat/completions", body), ("/v1/chat/completions", body))
        assert whole.status_code == second.status_code == 200
        assert whole.json()["usage"]["total_tokens"] == 32 and whole.json()["choices"][0]["finish_reason"] == "length"
        _, plain = completion()
        del plain["max_tokens"]
        assert ask(small, ("/v1/completions", plain))[0].json()["usage"]["completion_tokens"] == 16
    finally:
        small.service.close()


def test_echo_and_stop_texts_of_the_prompt(served: Served) -> None:
    wanted = completion(echo=True, stop="ab"), completion(echo=True, prompt=[[97 - 33, 65], [66]], n=2)
    first, several = ask(served, *wanted)
    assert first.json()["choices"][0]["text"] == "abc" + said("abc", 4)
    assert [c["text"][0] for c in several.json()["choices"]] == ["a", "a", "c", "c"]
    assert first.json()["usage"]["completion_tokens"] == 4


def test_a_stop_text_that_is_a_special_token_ends_the_answer_in_the_engine(served: Served) -> None:
    tokens = served.service.engine.stats.tokens
    ends = make_served(ends=True)
    try:
        body = completion(prompt="w", max_tokens=100, stop="<|end|>", ignore_eos=True)
        (response,) = ask(ends, body)
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("xyz", "stop")
        assert ends.service.engine.stats.tokens < 10
    finally:
        ends.service.close()
    assert served.service.engine.stats.tokens == tokens and END < VOCABULARY


def test_a_bug_in_decoding_ends_that_request_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskgraph.serving.textstream import TextStream

    push, calls = TextStream.push, 0

    def sometimes(self: TextStream, token: int) -> str:
        nonlocal calls
        calls += 1
        if self._marked:  # type: ignore[attr-defined]
            raise KeyError("no such piece")
        return push(self, token)

    begin = TextStream.__init__

    def marked(self: TextStream, tokenizer: Any, stops: Any, *more: Any) -> None:
        begin(self, tokenizer, stops, *more)
        self._marked = "boom" in stops  # type: ignore[attr-defined]

    monkeypatch.setattr(TextStream, "__init__", marked)
    monkeypatch.setattr(TextStream, "push", sometimes)
    bad, streamed, good = ask(served, completion(stop="boom"), completion(stop="boom", stream=True), completion())
    assert bad.status_code == 500 and "KeyError" in bad.json()["error"]["message"]
    assert '"server_error"' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
    assert good.json()["choices"][0]["text"] == said("abc", 4)
    assert served.service.failure is None and calls and CONTEXT


# --------------------------------------------------------------------------------------- from Python


def engine() -> Engine:
    return simulated_engine(load_config("llama-3.2-1b"), lambda shape: 0.01, pages=100)


ODD: list[Any] = [
    None, True, "3", 1.5, -1, 2**31, 2**63, 2**70, -(2**70), float("nan"), float("inf"), [], [1], [[1]], {}, {"a": 1},
    {1: 2}, "x", b"x", object(), np.float32(0.5), np.int64(3), np.arange(3), np.array("x"), (1, 2), frozenset([2]),
    frozenset(["a"]), frozenset([2**70]), {1: float("nan")}, {2**40: 1.0}, {-1: 1.0}, [1, True], [2**70], ["a"], 1j,
]  # fmt: skip


@pytest.mark.parametrize("name", [*Request.__dataclass_fields__, *Sampling.__dataclass_fields__])
def test_every_field_of_every_kind_is_refused_by_name_or_served(name: str) -> None:
    """And never in a step: what is beside it is served."""
    sim, accepted = engine(), 0
    for value in ODD:
        try:
            if name in Sampling.__dataclass_fields__:
                request = Request([1, 2], 3, Sampling(**{"temperature": 1.0, name: value}))
            else:
                request = Request(**{"prompt": [1, 2], "max_tokens": 3, name: value})
            sim.submit(request)
            accepted += 1
        except RequestError as error:
            assert name in str(error) or error.field == name or name == "sampling", (name, value, error)
            assert "\n" not in str(error) and len(str(error)) < 300
    beside = sim.submit(Request([5, 6], 4))
    done = {c.request: c for c in sim.run()}
    assert len(done) == accepted + 1
    assert {c.reason for c in done.values()} == {"length"} and len(done[beside].tokens) == 4
    assert sim.cache.device.held == 0


@pytest.mark.parametrize("wrong", [None, 5, "x", [1, 2], {"prompt": [1]}, Request, Sampling()])
def test_what_is_no_request(wrong: Any) -> None:
    with pytest.raises(RequestError, match="no Request"):
        engine().submit(wrong)


@pytest.mark.parametrize("wrong", [None, "1", 1.5, [1], True])
def test_what_is_no_number_of_a_request(wrong: Any) -> None:
    sim = engine()
    sim.submit(Request([1], 3))
    with pytest.raises(RequestError, match="number of a request"):
        sim.cancel(wrong)
    sim.cancel(10**30)
    assert len(sim.run()) == 1


def test_numbers_of_numpy_are_numbers() -> None:
    how = Sampling(np.float32(0.5), np.int64(3), np.float64(0.9), np.uint8(7))
    assert (how.temperature, how.top_k, how.top_p, how.seed) == (0.5, 3, 0.9, 7)
    request = checked(Request(np.array([1, 2], np.uint16), np.int32(3), how, {4}), 10, 10)  # type: ignore[arg-type]
    assert (request.max_tokens, request.stop) == (3, frozenset([4]))


def test_a_request_is_what_it_was_when_it_was_submitted() -> None:
    sim, prompt, stop = engine(), [1, 2, 3], {9}
    sim.submit(Request(prompt, 3, stop=stop))  # type: ignore[arg-type]
    prompt.clear()
    stop.update(range(100))
    assert len(sim.run()[0].tokens) == 3


def test_a_request_that_cannot_begin_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = engine()
    start = type(sim.scheduler)._start

    def some(self: Any, candidate: Any) -> int:
        if candidate.number == 1:
            raise OverflowError("a value that does not fit")
        return start(self, candidate)

    monkeypatch.setattr(type(sim.scheduler), "_start", some)
    done: list[Completion] = sim.run([Request([1], 3) for _ in range(3)])
    assert [c.reason for c in done] == ["length", "failed", "length"]
    assert "request 1 cannot begin: OverflowError: a value" in done[1].error
    assert sim.cache.device.held == 0 and not sim.busy
