"""Answers that follow a grammar, and log-probabilities, from a real engine behind the HTTP app: a model of random
weights, which left to itself writes no JSON at all."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from benchmarks.soak import NAME, tiny_served
from taskgraph.errors import RequestError
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving import guides
from taskgraph.serving.guides import Guides
from taskgraph.serving.http.app import Served, create_app
from taskgraph.serving.requests import Request, Sampling
from tests.serve_cases import byte_tokenizer, raw_tokenizer

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
     "required": ["a", "b"], "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"enum": ["ja", "nein", 3, None]},
    {"type": "string", "pattern": "^[ab]{2,4}$"},
    {"$defs": {"p": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}},
                     "required": ["n"], "additionalProperties": False}},
     "type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 1, "maxItems": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = tiny_served(pages=8)
    yield made
    made.service.close()
    assert (made.service.engine.cache.device.held, made.service.open) == (0, 0)


def ask(served: Served, *bodies: dict[str, Any], path: str = "/v1/completions") -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return list(await asyncio.gather(*(client.post(path, json={"model": NAME, **body}) for body in bodies)))

    return asyncio.run(all_of_them())


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


# -------------------------------------------------------------------------------------------- grammars


def test_answers_are_json_of_their_schema_whatever_is_beside_them(served: Served) -> None:
    """Whole and streamed, with sequences that are pre-empted and requests without a grammar between them."""
    bodies: list[dict[str, Any]] = []
    for seed in range(4):
        for schema in SCHEMAS:
            bodies.append(
                {"prompt": "ab" * (1 + seed), "max_tokens": 110, "temperature": 1.0, "seed": seed, **of_schema(schema)}
            )
            bodies.append({"prompt": "free", "max_tokens": 60, "temperature": 0})
    before = served.service.engine.scheduler.preemptions
    answers = ask(served, *bodies)
    assert served.service.engine.scheduler.preemptions > before
    free = {r.json()["choices"][0]["text"] for r in answers[1::2]}
    assert len(free) == 1
    for body, response in zip(bodies[::2], answers[::2], strict=True):
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "stop", choice
        schema = body["response_format"]["json_schema"]["schema"]
        jsonschema.validate(json.loads(choice["text"]), schema)
    streamed = ask(served, *({**body, "stream": True} for body in bodies[:10:2]))
    for response, whole in zip(streamed, answers[:10:2], strict=True):
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        assert "".join(e["choices"][0]["text"] for e in events) == whole.json()["choices"][0]["text"]
        assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_any_object_begins_as_one_and_is_cut_by_its_length(served: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 1.0,
        "response_format": {"type": "json_object"},
    }
    bodies = [{**body, "seed": seed, "max_tokens": 60} for seed in range(6)]
    for response in ask(served, *bodies, path="/v1/chat/completions"):
        choice = response.json()["choices"][0]
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert choice["finish_reason"] == "length" and response.json()["usage"]["completion_tokens"] == 60


def test_greedy_answers_follow_too_and_stop_texts_cut_them(served: Served) -> None:
    body = {"prompt": "x", "max_tokens": 100, "temperature": 0, **of_schema(SCHEMAS[0])}
    whole, cut, short, twice = ask(
        served, body, {**body, "stop": '"b"'}, {**body, "max_tokens": 3}, {**body, "n": 2, "ignore_eos": True}
    )
    text = whole.json()["choices"][0]["text"]
    jsonschema.validate(json.loads(text), SCHEMAS[0])
    assert cut.json()["choices"][0]["text"] == text[: text.index('"b"')]
    assert cut.json()["choices"][0]["finish_reason"] == "stop"
    assert (short.json()["choices"][0]["text"], short.json()["choices"][0]["finish_reason"]) == (text[:3], "length")
    assert [c["text"] for c in twice.json()["choices"]] == [text] * 2


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nothing"}, "nothing"), ({"$ref": "#/nowhere"}, "schema cannot be used"), (False, "schema"),
        ({"type": "string", "pattern": "("}, "schema cannot be used"), ({"oneOf": [{"type": "object"}] * 2}, "oneOf"),
        ({"not": {}}, "not"), ({"enum": []}, "schema"), ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"$ref": "http://example.com/x"}, "schema cannot be used"), ({"description": "x" * 70_000}, "at most 32768"),
        ({"format": "no such", "type": "string"}, "no such"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused(served: Served, schema: Any, says: str) -> None:
    served = Served(served.service, served.tokenizer, NAME, 1 << 20)
    (response,) = ask(served, {"prompt": "x", **of_schema(schema)})
    error = response.json()["error"]
    assert response.status_code == 400 and says in error["message"] and error["param"] == "response_format", error
    assert "\n" not in error["message"] and len(error["message"]) < 400


NO_SCHEMAS = {"number": 5, "text": "x", "list": [1], "nan": {"a": float("nan")}, "object": {"a": object()}}


@pytest.mark.parametrize("schema", NO_SCHEMAS.values(), ids=NO_SCHEMAS)
def test_what_is_no_schema_from_python(schema: Any) -> None:
    with pytest.raises(RequestError, match="schema cannot be used"):
        Guides(byte_tokenizer(), 258).json(schema)


def test_a_deep_schema_from_python() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(100_000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="schema cannot be used"):
        Guides(byte_tokenizer(), 258).json(schema)
    while "items" in schema:  # taken apart, or its end would be as deep
        schema = schema["items"]


def test_grammars_are_compiled_once_and_by_no_thread_of_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, threads = Guides._compiled, []

    def watched(self: Guides, schema: str) -> Any:
        threads.append(threading.current_thread())
        return compiled(self, schema)

    monkeypatch.setattr(Guides, "_compiled", watched)
    schema = {"enum": ["only here"]}
    for _ in range(2):
        ask(served, {"prompt": "x", "max_tokens": 30, **of_schema(schema)})
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread() and threads[0] is not served.service._thread


def test_without_llguidance_it_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    guides._guides.cache_clear()
    monkeypatch.setattr(guides, "find_spec", lambda name: None)
    (response,) = ask(served, {"prompt": "x", "response_format": {"type": "json_object"}})
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and "response_format is not supported by this server" in message
    assert "taskgraph-gpu[guided]" in message
    assert ask(served, {"prompt": "x", "response_format": {"type": "text"}})[0].status_code == 200


def test_a_grammar_of_another_vocabulary_is_refused(served: Served) -> None:
    guide = Guides(byte_tokenizer(), 300).json()
    with pytest.raises(RequestError, match="guide is"):
        served.service.engine.submit(Request([1], 3, guide=guide))


def test_an_end_token_that_looks_like_text_is_no_part_of_a_string() -> None:
    """Of a type that says nothing of it, as some files have it: within a string it may not come."""
    raw = raw_tokenizer()
    raw.add_tokens(["<stop>"])
    end = raw.token_to_id("<stop>")
    guide = Guides(Tokenizer(raw, source="the test", eos_ids=[end]), 260).json({"type": "string", "minLength": 3})
    course = guide.begin()
    assert not course.advance(raw.token_to_id('"'))
    bits = course.allowed()
    assert not isinstance(bits, str)
    allowed = set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())
    assert raw.token_to_id("a") in allowed and not allowed & {end, 256, 257, 259}


def test_a_token_against_the_grammar_ends_that_request_alone(served: Served) -> None:
    """As a runner without logits would give it."""
    guide = Guides(served.tokenizer, 258).json(SCHEMAS[2])
    course = guide.begin()
    assert "is not what its grammar allows" in course.advance(5)


# ------------------------------------------------------------------------------------ log-probabilities


def test_logprobs_of_completions(served: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "logprobs": 3}
    whole, streamed, own, without = ask(
        served, body, {**body, "stream": True}, {**body, "logprobs": 0}, {**body, "logprobs": None}
    )
    choice = whole.json()["choices"][0]
    told = choice["logprobs"]
    assert [len(told[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [12] * 4
    for name, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert logprob <= 0 and top[name] == logprob == max(top.values()) and len(top) == 3
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert b"".join(_bytes(name) for name in told["tokens"]).decode(errors="replace") == choice["text"]
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    for key in told:
        assert [value for part in parts for value in part[key]] == told[key]
    assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]
    assert own.json()["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"]
    assert own.json()["choices"][0]["logprobs"]["top_logprobs"] == [None] * 12
    assert without.json()["choices"][0]["logprobs"] is None


def _bytes(name: str) -> bytes:
    if not name.startswith("bytes:"):
        return name.encode()
    return bytes(int(part, 16) for part in name.removeprefix("bytes:").split("\\x")[1:])


def test_logprobs_of_chats(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, "temperature": 0, "logprobs": True}
    more, plain, streamed = ask(
        served, {**body, "top_logprobs": 4}, body, {**body, "top_logprobs": 4, "stream": True},
        path="/v1/chat/completions",
    )  # fmt: skip
    content = more.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 10
    for each in content:
        assert set(each) == {"token", "logprob", "bytes", "top_logprobs"} and len(each["top_logprobs"]) == 4
        assert each["top_logprobs"][0]["bytes"] == each["bytes"]
        assert math.isclose(each["top_logprobs"][0]["logprob"], each["logprob"])
        assert sum(math.exp(top["logprob"]) for top in each["top_logprobs"]) <= 1.0 + 1e-6
    text = more.json()["choices"][0]["message"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode(errors="replace") == text
    assert [each["top_logprobs"] for each in plain.json()["choices"][0]["logprobs"]["content"]] == [[]] * 10
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    parts = [e["choices"][0]["logprobs"]["content"] for e in events if e["choices"][0]["logprobs"]]
    assert [each for part in parts for each in part] == content


def test_logprobs_end_where_the_text_does(served: Served) -> None:
    body = {"prompt": "abc", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    (whole,) = ask(served, body)
    choice = whole.json()["choices"][0]
    tokens = choice["logprobs"]["tokens"]
    stop = "".join(t for t in tokens[20:23] if not t.startswith("bytes:")) or tokens[20]
    if stop not in choice["text"]:
        stop = next(c for c in choice["text"][15:] if c != "\ufffd")
    (cut,) = ask(served, {**body, "stop": stop})
    found = cut.json()["choices"][0]
    assert found["finish_reason"] == "stop" and stop not in found["text"]
    said = b"".join(_bytes(name) for name in found["logprobs"]["tokens"]).decode(errors="replace")
    assert said == found["text"]


def test_what_no_row_can_be_is_a_number_in_json(served: Served) -> None:
    """A bias of -100 makes a token impossible, and its own log-probability stays what the model says."""
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    (first,) = ask(served, body)
    token = byte_tokenizer().encode("abc")
    assert len(token) == 3
    best = first.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    engine = served.service.engine
    assert engine.vocabulary == 258 and best
    other = ask(served, {**body, "logit_bias": {str(i): -100 for i in range(129)}})[0].json()["choices"][0]["logprobs"]
    assert other["top_logprobs"][0].items() >= best.items()


def test_sampling_defaults_stay() -> None:
    assert Sampling() == Sampling(0.0, 0, 1.0, 0, 0.0, 0.0, ())
