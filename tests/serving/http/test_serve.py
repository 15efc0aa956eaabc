"""The OpenAI-compatible front: answers, streams, every kind of bad input, clients that leave, shutdown."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgraph.serving.http.app import Served, create_app
from taskgraph.serving.textstream import TextStream
from tests.serve_cases import CONTEXT, PAGE, byte_tokenizer, make_served, said

Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Makes what a test serves, and looks that nothing is left of it at the end."""
    made: list[Served] = []

    def make(**options: Any) -> Served:
        made.append(make_served(**options))
        return made[-1]

    yield make
    for served in made:
        served.service.close()
        assert (served.service.open, served.service.engine.cache.device.held) == (0, 0)
        assert served.service.engine.runner.closed  # type: ignore[attr-defined]


def together(served: Served, *bodies: dict[str, Any] | bytes, path: str = "/v1/completions") -> list[httpx.Response]:
    """The responses to all bodies, sent at once."""

    async def post(client: httpx.AsyncClient, body: dict[str, Any] | bytes) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post(path, content=content)

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client:
            return list(await asyncio.gather(*(post(client, body) for body in bodies)))

    return asyncio.run(all_of_them())


def get(served: Served, path: str) -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(one())


def body(prompt: Any = "abc", **more: Any) -> dict[str, Any]:
    return {"model": "formula", "prompt": prompt, "temperature": 0, **more}


def events(text: str) -> list[Any]:
    """The objects of a stream, which ends by [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------- answers


def test_completion(serve: Serve) -> None:
    (response,) = together(serve(), body(max_tokens=7))
    answer = response.json()
    assert response.status_code == 200 and answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "defghij", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}


def test_many_at_once_get_their_own(serve: Serve) -> None:
    served = serve(sequences=4)
    prompts = [chr(97 + i % 26) * (1 + i) for i in range(40)]
    responses = together(served, *(body(p, max_tokens=1 + i) for i, p in enumerate(prompts)))
    assert [r.json()["choices"][0]["text"] for r in responses] == [said(p, 1 + i) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("prompt", [["ab", "xy"], [byte_tokenizer().encode("ab"), byte_tokenizer().encode("xy")]])
def test_several_prompts_and_choices(serve: Serve, prompt: list[Any]) -> None:
    (response,) = together(serve(), body(prompt, max_tokens=3, n=2))
    assert [c["text"] for c in response.json()["choices"]] == ["cde", "cde", "zab", "zab"]
    assert [c["index"] for c in response.json()["choices"]] == [0, 1, 2, 3]


def test_a_prompt_of_tokens(serve: Serve) -> None:
    (response,) = together(serve(), body(byte_tokenizer().encode("mn"), max_tokens=2))
    assert response.json()["choices"][0]["text"] == "op"


def test_streamed_completion_equals_the_whole_one(serve: Serve) -> None:
    served = serve()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    (response,) = together(served, body("héllo", max_tokens=9, **options))
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, usage = events(response.text)
    assert "".join(p["choices"][0]["text"] for p in pieces) == said("héllo", 9)
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 9


def test_chat_whole_and_streamed(serve: Serve) -> None:
    served = serve()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "k"}, {"type": "text", "text": "l"}]},
    ]
    chat = {"model": "formula", "messages": messages, "temperature": 0, "max_completion_tokens": 4}
    whole, streamed = together(served, chat, {**chat, "stream": True}, path="/v1/chat/completions")
    choice = whole.json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "abcd"} and choice["finish_reason"] == "length"
    assert whole.json()["object"] == "chat.completion"
    assert whole.json()["usage"]["prompt_tokens"] == len("system:be brief") + len("user:kl") + 3
    first, *pieces = events(streamed.text)
    assert first["object"] == "chat.completion.chunk" and first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == "abcd"


def test_a_chat_goes_on_to_the_end_of_the_context(serve: Serve) -> None:
    chat = {"model": "formula", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    (response,) = together(serve(), chat, path="/v1/chat/completions")
    assert response.json()["usage"]["total_tokens"] == CONTEXT


def test_an_end_token_stops_and_is_not_shown(serve: Serve) -> None:
    ends, goes_on = together(serve(ends=True), body("wx", max_tokens=50), body("wx", max_tokens=5, ignore_eos=True))
    assert ends.json()["choices"][0] == {"index": 0, "text": "yz", "logprobs": None, "finish_reason": "stop"}
    assert goes_on.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_the_answer_before_them(serve: Serve, stream: bool) -> None:
    served = serve()
    (response,) = together(served, body(max_tokens=200, stop=["xyz", "ijk"], stream=stream))
    if stream:
        pieces = events(response.text)
        text, reason = "".join(p["choices"][0]["text"] for p in pieces), pieces[-1]["choices"][0]["finish_reason"]
    else:
        text, reason = response.json()["choices"][0]["text"], response.json()["choices"][0]["finish_reason"]
    assert (text, reason) == ("defgh", "stop")
    assert served.service.engine.stats.tokens < 50, "the request did not run on"


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_ends_where_the_whole_text_would(text: str, stops: list[str]) -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, stops)
    got = "".join([stream.push(token) for token in tokenizer.encode(text)]) + stream.flush()
    first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    # pushed letter by letter, the stop text that is whole first wins, even if another began before it
    whole = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    expected = text if whole is None else text[: min(text[:whole].find(s) for s in stops if s in text[:whole])]
    assert got == expected and len(got) >= first and stream.stopped is (whole is not None)


def test_models_and_health(serve: Serve) -> None:
    served = serve()
    assert get(served, "/v1/models").json()["data"][0]["id"] == "formula"
    assert get(served, "/v1/models/formula").json()["max_model_len"] == CONTEXT
    assert get(served, "/v1/models/gpt").status_code == 404
    health = get(served, "/health")
    assert health.status_code == 200 and health.json()["status"] == "ok" and health.json()["pages_held"] == 0
    served.service.close()
    assert get(served, "/health").status_code == 503


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sent", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"", 400, "JSON"),
        (b"[1]", 400, "body"),
        (b"\xff\xfe", 400, "JSON"),
        (b'{"model": "formula", "prompt": "\\ud800"}', 400, "JSON"),
        (b'{"model": "formula", "prompt": "a", "temperature": NaN}', 400, ""),
        (b'{"model": "formula", "prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", 400, ""),
        (body(model="gpt-4"), 404, "gpt-4"),
        ({"prompt": "a"}, 400, "model"),
        ({"model": "formula"}, 400, "prompt"),
        (body(max_tokens=-1), 400, "max_tokens"),
        (body(max_tokens=0), 400, "max_tokens"),
        (body(max_tokens=1.5), 400, "max_tokens"),
        (body(max_tokens=10**30), 400, "max_tokens"),
        (body(max_tokens=CONTEXT), 400, "context"),
        (body("a" * (CONTEXT + 1)), 400, "context"),
        (body(""), 400, "at least one"),
        (body([]), 400, "prompt"),
        (body([-1]), 400, "prompt"),
        (body([9999]), 400, "vocabulary"),
        (body([10**30]), 400, "prompt"),
        (body(temperature=-1), 400, "temperature"),
        (body(temperature="hot"), 400, "temperature"),
        (body(top_p=0), 400, "top_p"),
        (body(n=0), 400, "n"),
        (body(n=1000), 400, "n"),
        (body(logit_bias={"x": 5}), 400, "logit_bias"),
        (body(logit_bias={"258": 5}), 400, "logit_bias"),
        (body(suffix="x"), 400, "'suffix' is not supported"),
        (body(frequency_penalty=2.5), 400, "frequency_penalty"),
        (body("a" * 5000), 413, "4096"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_input_is_refused_in_openai_words(serve: Serve, sent: Any, status: int, word: str) -> None:
    served = serve()
    (response,) = together(served, sent)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert word in error["message"]
    assert served.service.engine.stats.steps == 0


def test_the_code_says_that_a_prompt_is_too_long(serve: Serve) -> None:
    (response,) = together(serve(), body("a" * 300))
    assert response.json()["error"]["code"] == "context_length_exceeded"
    (unknown,) = together(serve(), body(model="x"))
    assert unknown.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("messages", [[], [{"role": "king", "content": "x"}], [{"role": "user"}], "hello"])
def test_bad_messages(serve: Serve, messages: Any) -> None:
    (response,) = together(serve(), {"model": "formula", "messages": messages}, path="/v1/chat/completions")
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


def test_a_wrong_path_and_a_wrong_method(serve: Serve) -> None:
    served = serve()
    assert together(served, body(), path="/v1/nothing")[0].json()["error"]["type"] == "invalid_request_error"
    assert get(served, "/v1/completions").status_code == 405


def test_a_body_without_an_end_is_cut_off(serve: Serve) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1000
            yield b" " * 1000

    async def post(app: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions", content=endless())

    assert asyncio.run(post(create_app(serve()))).status_code == 413
    assert read <= 6000


def test_a_request_that_never_fits_the_cache(serve: Serve) -> None:
    (response,) = together(serve(pages=4), body(max_tokens=4 * PAGE))
    assert response.status_code == 400 and "pages" in response.json()["error"]["message"]


# ----------------------------------------------------------------------- full caches, too many clients


def test_a_full_cache_makes_requests_wait(serve: Serve) -> None:
    served = serve(pages=8)
    responses = together(served, *(body("abc", max_tokens=30) for _ in range(20)))
    assert {r.json()["choices"][0]["text"] for r in responses} == {said("abc", 30)}


def test_too_many_open_requests_get_429(serve: Serve) -> None:
    served = serve(most_open=3, step_s=0.002)
    responses = together(served, *(body(max_tokens=20) for _ in range(8)))
    refused = [r for r in responses if r.status_code == 429]
    assert len(refused) == 5 and all(r.headers["retry-after"] for r in refused)
    assert all(r.json()["error"]["type"] == "rate_limit_error" for r in refused)
    assert [r.json()["choices"][0]["text"] for r in responses if r.status_code == 200] == [said("abc", 20)] * 3


def test_choices_that_do_not_all_fit_are_all_refused(serve: Serve) -> None:
    served = serve(most_open=3, step_s=0.002)
    never, first, second = together(served, body(n=4), body(n=2, max_tokens=50), body(n=2))
    assert never.status_code == 400 and "at most 3" in never.json()["error"]["message"]
    assert (first.status_code, second.status_code) == (200, 429)
    wait_for(lambda: served.service.open == 0)
    assert together(served, body(n=3))[0].status_code == 200


# --------------------------------------------------------------------------- processes and sockets


def wait_for(condition: Callable[[], bool], most_s: float = 300.0) -> None:
    until = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def process() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts a server in a process of its own: (process, base URL)."""
    started: list[subprocess.Popen[str]] = []

    def start(step_s: float = 0.0, drain_s: float = 300.0, fails_at: int = -1) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "tests.serve_cases", *map(str, (step_s, drain_s, fails_at))]
        root = Path(__file__).parents[3]
        made = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(made)
        assert made.stdout is not None
        return made, f"http://127.0.0.1:{int(made.stdout.readline())}"

    yield start
    for each in started:
        each.kill()
        each.communicate()


def test_clients_that_leave_free_their_requests(process: Any) -> None:
    _, url = process(step_s=0.05)

    def open_requests() -> int:
        return int(httpx.get(f"{url}/health").json()["open"])

    with httpx.Client(base_url=url) as client:
        with client.stream("POST", "/v1/completions", json=body(max_tokens=250, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            assert open_requests() == 1
        wait_for(lambda: open_requests() == 0)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body(max_tokens=250, n=2), timeout=httpx.Timeout(300, read=0.1))
        wait_for(lambda: open_requests() == 0)
        wait_for(lambda: client.get("/health").json()["pages_held"] == 0)  # its pages go at the next step's start
        assert client.get("/health").json()["tokens"] < 250


def test_a_client_that_leaves_within_its_body_is_no_error(process: Any) -> None:
    server, url = process()
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as client:
        client.sendall(
            b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"model": "form'
        )
        time.sleep(0.1)
    assert httpx.post(f"{url}/v1/completions", json=body(max_tokens=2)).json()["choices"][0]["text"] == "de"
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=300)
    assert (server.returncode, err) == (0, "")


def test_shutdown_lets_running_requests_end(process: Any) -> None:
    server, url = process(step_s=0.005)
    with httpx.stream("POST", f"{url}/v1/completions", json=body(max_tokens=100, stream=True), timeout=300) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and len(rest) > 90
    assert server.wait(300) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_shutdown_cancels_what_runs_too_long(process: Any) -> None:
    server, url = process(step_s=0.1, drain_s=0.1)
    with httpx.stream("POST", f"{url}/v1/completions", json=body(max_tokens=250, stream=True), timeout=300) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert "shutting down" in rest[-2] and rest[-1] == "data: [DONE]" and len(rest) < 100
    out, err = server.communicate(timeout=300)
    assert (server.returncode, out.split()[-1], err) == (0, "stopped", "")
    assert "waiting for 1 request, 0 s at most" in out and "cancelling 1 request: time is up" in out


def test_a_second_signal_does_not_wait(process: Any) -> None:
    server, url = process(step_s=0.02, drain_s=600)
    with httpx.stream("POST", f"{url}/v1/completions", json=body(max_tokens=250, stream=True), timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        assert "waiting for 1 request, 600 s at most" in server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out.splitlines(), err) == (
        0, ["cancelling 1 request: a second signal", "stopped"], "",
    )  # fmt: skip


def test_an_engine_that_fails_fails_all_requests_and_the_process(process: Any) -> None:
    server, url = process(step_s=0.01, fails_at=20)
    request = body(max_tokens=100)
    with httpx.stream("POST", f"{url}/v1/completions", json={**request, "stream": True}, timeout=300) as response:
        text = "".join(response.iter_text())
    assert "rank 1 is lost" in text and '"server_error"' in text
    _, err = server.communicate(timeout=300)
    assert server.returncode == 2 and "rank 1 is lost" in err


def test_requests_fail_cleanly_when_the_engine_has(serve: Serve) -> None:
    served = serve(fails_at=3)
    responses = together(served, *(body(max_tokens=20) for _ in range(5)))
    assert {r.status_code for r in responses} == {503}
    assert together(served, body())[0].status_code == 503
    assert get(served, "/health").json()["status"] == "failed"
