"""The protocol by itself: what a body becomes, field by field and at every edge, and what an answer looks like."""

import json
import time
from typing import Any

import pytest

from taskgraph.errors import RequestError
from taskgraph.serving.http.logprobs import PlacedChance
from taskgraph.serving.http.protocol import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    Piece,
    Shape,
    parsed,
    requests_of,
)
from taskgraph.serving.requests import Chance
from tests.serve_cases import byte_tokenizer

TOKENIZER = byte_tokenizer()


def completion(prompt: Any = "abc", **more: Any) -> CompletionBody:
    return parsed(CompletionBody, json.dumps({"model": "m", "prompt": prompt, **more}).encode())


def chat(messages: Any = None, **more: Any) -> ChatBody:
    said = messages or [{"role": "user", "content": "hi"}]
    return parsed(ChatBody, json.dumps({"model": "m", "messages": said, **more}).encode())


def refused(make: Any, *given: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(*given, **more)
    return caught.value


# ------------------------------------------------------------------------------------------- defaults


def test_a_body_that_asks_for_nothing_has_the_apis_defaults() -> None:
    body = completion()
    assert (body.n, body.temperature, body.top_p, body.top_k, body.seed) == (1, 1.0, 1.0, 0, None)
    assert (body.stop, body.stream, body.ignore_eos, body.echo) == ((), False, False, False)
    assert (body.frequency_penalty, body.presence_penalty, body.logit_bias) == (0.0, 0.0, {})
    assert (body.max_tokens, body.best_of, body.alternatives, body.guided) == (16, None, None, None)
    talk = chat()
    assert (talk.logprobs, talk.top_logprobs, talk.alternatives, talk.count) == (False, None, None, 1)
    options = completion(stream=True, stream_options={}).stream_options
    assert options is not None and (options.include_usage, options.include_obfuscation) == (False, False)
    schema = completion(response_format={"type": "json_schema", "json_schema": {}}).response_format
    assert schema is not None and schema.json_schema is not None
    made = schema.json_schema
    assert (made.name, made.description, made.schema_, made.strict) == ("", "", True, False)


def test_the_default_temperature_draws_from_the_models_own_chances() -> None:
    """1, as the OpenAI API has it; the engine's own default, 0, would be greedy."""
    (request,) = requests_of(completion(seed=5), [[1, 2]], 99, set())
    how = request.sampling
    assert (how.temperature, how.top_k, how.top_p, how.seed) == (1.0, 0, 1.0, 5)
    assert (how.presence_penalty, how.frequency_penalty, how.biases) == (0.0, 0.0, ())


# ------------------------------------------------------------------------------------ edges of fields


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("n", [1, 2, 16, 1.0, 16.0], [0, 17, 1.5, "2", True, -1]),
        ("temperature", [0, 1, 2, 0.5], [-0.001, 2.001, "1", True]),
        ("logprobs", [0, 1, 20], [-1, 21, 2.5]),
        ("top_p", [0.5, 1], ["1", float("nan"), float("inf")]),
        ("presence_penalty", [0, -1.5], [float("nan"), float("-inf")]),
        ("stream", [True, False], [1, "true"]),
        ("user", ["x"], [1]),
        ("stop", ["x", ["a", "b", "c", "d"], [], "", "y" * 1024], [["a"] * 5, ["a", 1], 3, {"a": 1}, "y" * 1025]),
        ("prompt", ["x", [1, 2], ["a", "b"], [[1], [2, 3]], [1.0, 2]], [[], [[]], [1, "a"], ["a", 1], 7, {}, [1.5]]),
    ],
)
def test_a_field_takes_what_is_in_range_and_nothing_beyond(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        completion(**{field: value})
    for value in bad:
        error = refused(completion, **{field: value})
        assert (error.status, error.param) == (400, field)
        assert field in str(error)


def test_stop_takes_four_texts_and_drops_empty_ones() -> None:
    assert completion(stop="one").stop == ("one",)
    assert completion(stop=["a", "", "b", ""]).stop == ("a", "b")
    assert completion(stop=["", ""]).stop == ()
    assert str(refused(completion, stop=["a", "b", "c", "d", "e"])) == "stop: 5 texts; give at most 4."
    assert str(refused(completion, stop=["ok", "x" * 1025])) == "stop: a text of 1025 letters; give at most 1024."
    assert str(refused(completion, stop=["ok", 7])) == "stop: give a text, or a list of texts."
    # the fifth is not looked into: there may be a million
    assert "5 texts" in str(refused(completion, stop=["a", "b", "c", "d", 5]))


def test_null_is_absent_and_what_asks_for_nothing_is_taken() -> None:
    assert completion(temperature=None, stop=None, suffix=None).temperature == 1.0
    completion(
        tools=[], functions=[], tool_choice="none", function_call="auto", parallel_tool_calls=False, suffix="",
        modalities=["text"], service_tier="default", store=True,
    )  # fmt: skip
    for field, value in (("tools", [{}]), ("tool_choice", "required"), ("suffix", "x"), ("store", "yes")):
        error = refused(completion, **{field: value})
        assert str(error) == f"{field!r} is not supported by this server; leave it out."
        assert (error.status, error.param) == (400, field)


def test_best_of_is_n_and_echo_has_no_logprobs() -> None:
    assert completion(best_of=3, n=3).n == 3
    for best_of, n in ((2, 1), (1, 2)):
        assert "'best_of' other than n" in str(refused(completion, best_of=best_of, n=n))
    assert completion(echo=True).echo and completion(logprobs=0).alternatives == 0
    for logprobs in (0, 3):
        assert "'logprobs' of a prompt that is echoed" in str(refused(completion, echo=True, logprobs=logprobs))


def test_top_logprobs_want_logprobs() -> None:
    assert chat(logprobs=True).alternatives == 0
    assert chat(logprobs=True, top_logprobs=3).alternatives == 3
    assert chat(logprobs=True, top_logprobs=20).alternatives == 20
    assert chat(top_logprobs=0).alternatives is None
    assert "want 'logprobs' to be true" in str(refused(chat, top_logprobs=1))
    assert refused(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"


def test_a_schema_comes_with_its_type_and_with_no_other() -> None:
    schema = {"name": "s", "schema": {"type": "object"}}
    good = completion(response_format={"type": "json_schema", "json_schema": schema})
    assert good.guided is not None and good.guided is good.response_format
    assert completion(response_format={"type": "json_object"}).guided is not None
    assert completion(response_format={"type": "text"}).guided is None
    for bad in (
        {"type": "json_schema"},
        {"type": "text", "json_schema": schema},
        {"type": "json_object", "json_schema": schema},
    ):
        error = refused(completion, response_format=bad)
        assert "json_schema is wanted with the type json_schema" in str(error) and error.param == "response_format"

    class Guides:
        def json(self, schema: Any = "any") -> Any:
            return schema

    guides: Any = Guides()
    assert good.guided.guide(guides) == {"type": "object"}
    any_object = completion(response_format={"type": "json_object"}).guided
    assert any_object is not None and any_object.guide(guides) == "any"


# -------------------------------------------------------------------------------------- what is wrong


def test_what_is_wrong_is_said_with_its_path() -> None:
    for text in (b"{", b"", b"\xff"):
        with pytest.raises(ApiError, match=r"^the body is no JSON: .*\.$") as caught:
            parsed(CompletionBody, text)
        assert caught.value.param is None
    with pytest.raises(ApiError, match=r"^the body: ") as whole:
        parsed(CompletionBody, b"[1]")
    assert whole.value.param is None
    error = refused(chat, [{"role": "user", "content": "a"}, {"role": "king", "content": "x" * 99}])
    assert str(error) == (
        "messages.1.role: 'king' is not supported by this server; give 'system', 'developer', 'user' or 'assistant'."
    )
    assert error.param == "messages"
    error = refused(chat, [{"role": "k" * 80, "content": "x"}])
    assert str(error).startswith(f"messages.0.role: '{'k' * 59} is not supported")
    error = refused(chat, [{"role": "user", "content": "a", "weight": 1}])
    assert str(error) == "'messages.0.weight' is not supported by this server; leave it out."
    error = refused(chat, [{"role": "user", "content": [{"type": "text", "text": 3}]}])
    assert str(error).startswith("messages.0.content.0.text: ")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "invalid_request_error"), (429, "rate_limit_error"),
     (500, "server_error"), (503, "server_error"), (501, "invalid_request_error")],
)  # fmt: skip
def test_an_error_is_told_in_the_apis_words(status: int, kind: str) -> None:
    told = ApiError(status, "no", param="n", code="c")
    assert told.body() == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}
    assert told.status == status and str(told) == "no"
    assert ApiError(status, "no").body()["error"] == {"message": "no", "type": kind, "param": None, "code": None}


# ------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("prompt", "count", "tokens", "texts"),
    [
        ("ab", 1, ["ab"], ["ab"]),
        (["ab"], 1, ["ab"], ["ab"]),
        (["ab", "c"], 2, ["ab", "c"], ["ab", "c"]),
    ],
)
def test_prompts_of_text(prompt: Any, count: int, tokens: list[str], texts: list[str]) -> None:
    body = completion(prompt, echo=True)
    assert body.count == count
    assert body.prompts(TOKENIZER) == [TOKENIZER.encode(text) for text in tokens]
    assert body.echoes(TOKENIZER) == texts
    assert completion(prompt).echoes(TOKENIZER) == [""] * count


def test_prompts_of_tokens() -> None:
    one, two = TOKENIZER.encode("mn"), TOKENIZER.encode("xyz")
    for prompt, tokens, texts in (
        (one, [one], ["mn"]),
        ([one], [one], ["mn"]),
        ([one, two], [one, two], ["mn", "xyz"]),
        ([one[0]], [one[:1]], ["m"]),
        ([float(one[0]), one[1]], [one], ["mn"]),
    ):
        body = completion(prompt, echo=True)
        assert body.count == len(tokens)
        assert body.prompts(TOKENIZER) == tokens
        assert all(type(token) is int for row in body.prompts(TOKENIZER) for token in row)
        assert body.echoes(TOKENIZER) == texts


def test_messages_are_plain_text_and_developers_speak_for_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(
        [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}, {"role": "system", "content": "s"}]
    )
    plain = [message.plain() for message in body.messages]
    assert plain == [
        {"role": "system", "content": "d"}, {"role": "user", "content": "ab"}, {"role": "system", "content": "s"}
    ]  # fmt: skip
    assert body.prompts(TOKENIZER) == [TOKENIZER.encode("<|turn|>system:d<|turn|>user:ab<|turn|>system:s<|turn|>")]
    assert refused(chat, messages=7).param == "messages"
    assert refused(parsed, ChatBody, b'{"model": "m", "messages": []}').param == "messages"


def test_how_many_tokens_an_answer_may_have() -> None:
    assert completion().most_tokens(5, 100) == 16
    assert completion(max_tokens=7).most_tokens(5, 3) == 7
    assert chat().most_tokens(40, 100) == 60
    assert (chat().most_tokens(99, 100), chat().most_tokens(100, 100), chat().most_tokens(120, 100)) == (1, 1, 1)
    assert chat(max_tokens=9).most_tokens(40, 100) == 9
    assert chat(max_completion_tokens=8).most_tokens(40, 100) == 8
    assert chat(max_tokens=9, max_completion_tokens=8).most_tokens(40, 100) == 8


# ------------------------------------------------------------------------------------------ requests


def test_choices_have_seeds_one_after_another_and_prompts_the_bodys() -> None:
    made = requests_of(completion(n=3, seed=40, temperature=0.5, top_p=0.25, top_k=7), [[1], [2, 3]], 99, {9})
    assert [r.sampling.seed for r in made] == [40, 41, 42, 40, 41, 42]
    assert [list(r.prompt) for r in made] == [[1]] * 3 + [[2, 3]] * 3
    assert {(r.sampling.temperature, r.sampling.top_k, r.sampling.top_p) for r in made} == {(0.5, 7, 0.25)}
    assert requests_of(completion(seed=0), [[1]], 99, set())[0].sampling.seed == 0


def test_without_a_seed_every_prompt_has_its_own_and_its_choices_follow() -> None:
    made = requests_of(completion(n=2), [[1], [2], [3]], 99, set())
    seeds = [r.sampling.seed for r in made]
    assert len(set(seeds)) == 6
    assert [seeds[i + 1] - seeds[i] for i in (0, 2, 4)] == [1, 1, 1]
    assert all(0 <= seed < 2**62 + 2 for seed in seeds)
    many = [requests_of(completion(), [[1]], 99, set())[0].sampling.seed for _ in range(64)]
    assert max(many) >= 2**61 > min(many)  # 62 bits: wrong by chance once in 2**64


def test_stops_penalties_biases_chances_and_guides_reach_the_engine() -> None:
    guide: Any = object()
    body = completion(presence_penalty=0.5, frequency_penalty=-1.5, logit_bias={"7": 2.5, "08": -1}, logprobs=4)
    (made,) = requests_of(body, [[1, 2]], 99, {9}, marks={11}, guide=guide)
    assert (made.stop, made.logprobs, made.guide, made.max_tokens) == (frozenset({9, 11}), 4, guide, 16)
    assert (made.sampling.presence_penalty, made.sampling.frequency_penalty) == (0.5, -1.5)
    assert made.sampling.biases == ((7, 2.5), (8, -1.0))
    (ignoring,) = requests_of(completion(ignore_eos=True), [[1]], 99, {9}, marks={11})
    assert ignoring.stop == frozenset({11}) and ignoring.logprobs is None
    (talk,) = requests_of(chat(), [[1] * 10], 99, {9})
    assert talk.max_tokens == 89


@pytest.mark.parametrize("text", ["x", "-1", "", "1.0", "²", "٣", "9" * 20, " 1"])
def test_a_bias_names_a_token_by_its_number(text: str) -> None:
    with pytest.raises(RequestError, match="is no token number") as caught:
        requests_of(completion(logit_bias={text: 1}), [[1]], 99, set())
    assert repr(text) in str(caught.value)


def test_the_longest_number_is_taken_and_a_long_word_is_cut() -> None:
    (made,) = requests_of(completion(logit_bias={"9" * 19: 1}), [[1]], 99, set())
    assert made.sampling.biases == ((10**19 - 1, 1.0),)
    with pytest.raises(RequestError, match=rf"^logit_bias: '{'w' * 40}' is no token number.$"):
        requests_of(completion(logit_bias={"w" * 60: 1}), [[1]], 99, set())


# ------------------------------------------------------------------------------------------- answers


def shape(body: Body) -> Shape:
    made = Shape.of(body, TOKENIZER)
    assert len(made.id) == len("cmpl-") + 24 + 4 * made.chat
    assert abs(made.created - time.time()) < 100
    return made


def test_a_completions_answer() -> None:
    made = shape(completion())
    head = {"id": made.id, "object": "text_completion", "created": made.created, "model": "m"}
    assert made.id.startswith("cmpl-") and not made.chat and not made.tells
    choices = [
        {"index": 0, "text": "x", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": "y", "logprobs": None, "finish_reason": "length"},
    ]
    answers = [(Piece("x"), "stop"), (Piece("y"), "length")]
    assert made.whole(answers, {"total_tokens": 2}) == {**head, "choices": choices, "usage": {"total_tokens": 2}}
    assert made.begin(0) is None
    assert made.piece(1, Piece("z")) == {
        **head, "choices": [{"index": 1, "text": "z", "logprobs": None, "finish_reason": None}]
    }  # fmt: skip
    assert made.piece(0, Piece(""), "stop")["choices"][0]["finish_reason"] == "stop"
    assert made.usage({"total_tokens": 3}) == {**head, "choices": [], "usage": {"total_tokens": 3}}


def test_a_chats_answer() -> None:
    made = shape(chat())
    head = {"id": made.id, "object": "chat.completion.chunk", "created": made.created, "model": "m"}
    assert made.id.startswith("chatcmpl-") and made.chat and not made.tells
    whole = made.whole([(Piece("x"), "stop")], {})
    said = {"message": {"role": "assistant", "content": "x"}}
    assert whole["choices"] == [{"index": 0, **said, "logprobs": None, "finish_reason": "stop"}]
    assert whole["object"] == "chat.completion"

    def delta(index: int, of: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": of, "logprobs": None, "finish_reason": reason}]}

    assert made.begin(2) == delta(2, {"role": "assistant", "content": ""})
    assert made.piece(1, Piece("z")) == delta(1, {"content": "z"})
    assert made.piece(1, Piece(""), "length") == delta(1, {}, "length")
    assert made.usage({"a": 1}) == {**head, "choices": [], "usage": {"a": 1}}


@pytest.mark.parametrize("talk", [False, True])
def test_chances_are_told_to_those_who_asked(talk: bool) -> None:
    body: Body = chat(logprobs=True, top_logprobs=1) if talk else completion(logprobs=1)
    made = shape(body)
    token = TOKENIZER.encode("a")[0]
    piece = Piece("a", [PlacedChance(Chance(token, -0.5, ((token, -0.5),)), 3)])
    key = "content" if talk else "tokens"
    whole = made.whole([(piece, "stop")], {})["choices"][0]["logprobs"]
    assert made.tells and len(whole[key]) == 1
    assert made.piece(0, piece)["choices"][0]["logprobs"] == whole
    assert made.piece(0, Piece("a"))["choices"][0]["logprobs"] is None
    assert shape(chat() if talk else completion()).whole([(piece, "stop")], {})["choices"][0]["logprobs"] is None
    assert "content" in whole if talk else whole["text_offset"] == [3]
