"""Who may use the server: keys and roles, other sites' pages, names and addresses; the access log; /metrics."""

import asyncio
import json
import logging
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import taskgraph as tg
from taskgraph.serving.http.access import Access, AccessLog, Gate, access_of, is_loopback
from taskgraph.serving.http.app import Served, create_app, run_server
from taskgraph.serving.http.keys import ApiKey, KeyRing, add_key, readable_by_others
from tests.serve_cases import make_served

FULL, READER = "tg-a-secret-of-many-letters", "tg-another-secret-for-metrics"
RING = KeyRing((ApiKey.of(FULL, "alice", "all"), ApiKey.of(READER, "prometheus", "metrics")))
ASK = {"model": "formula", "prompt": "abc", "temperature": 0, "max_tokens": 3}


@pytest.fixture
def served() -> Iterator[Served]:
    made = make_served()
    yield made
    made.service.close()


def ask(
    served: Served, method: str, path: str, *, access: Access | None = None, base: str = "http://localhost", **how: Any
) -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(served, access), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=20) as client:
            return await client.request(method, path, **how)

    return asyncio.run(one())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ------------------------------------------------------------------------------------------- keys


def test_a_key_is_added_hashed_and_found(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    first, second = add_key(path, "alice"), add_key(path, "bob", "metrics")
    text = path.read_text()
    assert first not in text and second not in text and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not readable_by_others(path)
    ring = KeyRing.load(path)
    found = [ring.find(key) for key in (first, second)]
    assert [(k.name, k.role) for k in found if k] == [("alice", "all"), ("bob", "metrics")]
    for wrong in ("", first[:-1], first + "x", first.swapcase(), "x" * 100_000, "\ud800", second.upper()):
        assert ring.find(wrong) is None
    for name, role, what in (("alice", "all", "alice"), ("a b", "all", "a b"), ("c", "root", "root")):
        with pytest.raises(tg.KeyFileError, match=what):
            add_key(path, name, role)
    os.truncate(path, path.stat().st_size - 1)  # an editor that ends files without a newline
    add_key(path, "carol")
    assert [key.name for key in KeyRing.load(path).keys] == ["alice", "bob", "carol"]


LINE = ApiKey.of(FULL, "alice", "all").line()


@given(st.one_of(st.text(max_size=80), st.integers(0, len(LINE) - 1).map(lambda at: LINE[:at])))
@settings(max_examples=200)
def test_a_damaged_file_of_keys_is_refused_without_its_contents(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.txt"
    path.write_bytes(f"# keys\n\n{LINE}\n{text}".encode("utf-8", "surrogatepass"))
    shown = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        assert len(KeyRing.load(path).keys) == 1 and not shown
    except tg.KeyFileError as error:
        said = str(error).replace(str(path), "")
        assert "\n" not in said and ("line" in said or "no text file" in said)
        assert not [line for line in shown if len(line) > 12 and line in said], "it may be a key"


@pytest.mark.parametrize(
    "text", [None, "", "# none\n", "alice all tg-plain-text-key\n", f"{LINE}\n{LINE}\n", b"\xff\xfe"]
)
def test_no_keys_is_an_error(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "keys.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(tg.KeyFileError, match=r"keys\.txt") as seen:
        KeyRing.load(path)
    assert "plain-text" not in str(seen.value)


PATHS = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_key_is_asked_for(served: Served, method: str, path: str) -> None:
    rules = Access(RING)
    for headers in ({}, bearer("tg-wrong"), {"Authorization": FULL}, {"Authorization": f"Basic {FULL}"}):
        refused = ask(served, method, path, access=rules, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key" and "tg-" not in refused.text
    asked = {**ASK, "messages": [{"role": "user", "content": "k"}]}
    asked.pop("messages" if path == "/v1/completions" else "prompt")
    given_json = {"json": asked} if method == "POST" else {}
    assert ask(served, method, path, access=rules, headers=bearer(FULL), **given_json).status_code == 200
    assert ask(served, method, path, access=rules, headers={"authorization": f"bearer {FULL}"}, **given_json).is_success
    reader = ask(served, method, path, access=rules, headers=bearer(READER), **given_json)
    assert reader.status_code == (200 if path == "/metrics" else 403)


def test_health_needs_no_key(served: Served) -> None:
    assert ask(served, "GET", "/health", access=Access(RING)).status_code == 200


# ------------------------------------------------------------------------------- sites and addresses


def test_pages_of_other_sites_are_refused(served: Served) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:3000", "https://localhost"):
        response = ask(served, "POST", "/v1/completions", json=ASK, headers={"Origin": origin})
        expected = 200 if origin == "https://localhost" else 403  # the same name and port
        assert response.status_code == expected, origin
        assert "access-control-allow-origin" not in response.headers
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert ask(served, "OPTIONS", "/v1/completions", headers=preflight).status_code == 403


def test_an_origin_can_be_allowed(served: Served) -> None:
    rules = Access(RING, origins=("https://chat.example",))
    mine = {"Origin": "https://chat.example"}
    preflight = {**mine, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = ask(served, "OPTIONS", "/v1/completions", access=rules, headers=preflight)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == mine["Origin"]
    answer = ask(served, "POST", "/v1/completions", access=rules, json=ASK, headers={**mine, **bearer(FULL)})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == mine["Origin"]
    assert ask(served, "POST", "/v1/completions", access=rules, json=ASK, headers=mine).status_code == 401
    other = {"Origin": "http://evil.example", **bearer(FULL)}
    assert ask(served, "POST", "/v1/completions", access=rules, json=ASK, headers=other).status_code == 403


def test_without_keys_only_this_machine_and_its_own_names(served: Served) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"):
        assert is_loopback(host) and access_of(host, None).keys is None
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.com", "", "localhost.evil.example", "10.0.0.1"):
        with pytest.raises(tg.BackendUnavailable, match="API key"):
            access_of(host, None)
        with pytest.raises(tg.BackendUnavailable, match="API key"):
            run_server(served, host, 0, access=Access())
        assert access_of(host, RING).hosts == frozenset()
    rules = access_of("127.0.0.1", None)
    for base, status in (("http://localhost:8000", 200), ("http://[::1]:8000", 200), ("http://evil.example", 421)):
        assert ask(served, "GET", "/v1/models", access=rules, base=base).status_code == status


def test_what_is_not_supported_says_so(served: Served) -> None:
    for method, path, status in (
        ("POST", "/v1/embeddings", 404), ("POST", "/v1/audio/speech", 404), ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405), ("GET", "/nope", 404),
    ):  # fmt: skip
        error = ask(served, method, path)
        assert error.status_code == status and error.json()["error"]["code"] == "not_supported"
        assert path in error.text and "not supported" in error.text


# ------------------------------------------------------------------------------------- the log


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """The lines of the access log by field."""
    lines = [record.getMessage() for record in caplog.records if record.name == "taskgraph.access"]
    assert not [line for line in lines if "\n" in line or "\r" in line]
    return [dict(part.split("=", 1) for part in line.split(" ")) for line in lines]


def test_every_request_has_a_line_and_a_number(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "taskgraph.access")
    rules = Access(RING)
    asked = {**ASK, "prompt": "my secret prompt"}
    whole = ask(served, "POST", "/v1/completions", access=rules, json=asked, headers=bearer(FULL))
    stream = ask(
        served, "POST", "/v1/completions", access=rules, json={**asked, "stream": True, "n": 2},
        headers={**bearer(FULL), "X-Request-Id": "mine-7.b"},
    )  # fmt: skip
    refused = ask(served, "POST", "/v1/completions?key=x", access=rules, json=asked, headers=bearer("tg-wrong-one"))
    first, second, third = logged(caplog)
    numbers = [r.headers["x-request-id"] for r in (whole, stream, refused)]
    assert [first["id"], second["id"], third["id"]] == numbers and numbers[1] == "mine-7.b"
    assert (first["key"], first["status"], first["in"], first["out"]) == ("alice", "200", "16", "3")
    assert (second["in"], second["out"]) == ("16", "6") and float(second["ms"]) > 0
    assert (third["key"], third["status"], third["path"]) == ("-", "401", "/v1/completions")
    for secret in (FULL, "tg-wrong-one", "secret prompt"):
        assert secret not in caplog.text


@given(path=st.binary(max_size=300), method=st.text(max_size=12), number=st.binary(max_size=300))
def test_nothing_that_a_client_writes_breaks_the_log(path: bytes, method: str, number: bytes) -> None:
    lines: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, handler = logging.getLogger("taskgraph.access"), Keep()
    log.addHandler(handler)
    before, log.level = log.level, logging.INFO
    try:
        scope = {
            "type": "http", "method": method, "path": path.decode("latin-1"), "raw_path": path,
            "headers": [(b"x-request-id", number)],
        }  # fmt: skip
        asyncio.run(AccessLog(Gate(app, Access()))(scope, None, send))  # type: ignore[arg-type]
    finally:
        log.removeHandler(handler)
        log.level = before
    (line,) = lines
    assert [part.partition("=")[0] for part in line.split(" ")] == ["id", "key", "method", "path", "status", "ms"]
    assert line.isascii() and line.isprintable() and len(line) < 600
    ((_, shown),) = sent[0]["headers"]
    assert len(shown) <= 128 and f"id={shown.decode()} " in line


# ---------------------------------------------------------------------------------------- metrics


def samples(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = ask(served, "GET", "/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("taskgraph_") and family.documentation for family in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_count_what_happened(served: Served) -> None:
    rng = random.Random(3)
    sizes = [(rng.randint(1, 30), rng.randint(1, 20)) for _ in range(12)]

    async def all_of_them() -> list[int]:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
            own = "abcdefghijkl"  # prompts that share no page
            bodies = [
                json.dumps({**ASK, "prompt": c * p, "max_tokens": n}) for c, (p, n) in zip(own, sizes, strict=True)
            ]
            posts = [client.post("/v1/completions", content=body) for body in bodies]
            posts.append(client.post("/v1/completions", content=b'{"model": "other", "prompt": "a"}'))
            return [response.status_code for response in await asyncio.gather(*posts)]

    assert asyncio.run(all_of_them()) == [200] * len(sizes) + [404]
    seen = samples(served)
    generated = sum(n for _, n in sizes)
    assert seen["taskgraph_generated_tokens_total", ()] >= generated  # one more where an answer has ended by then
    assert seen["taskgraph_prompt_tokens_total", ()] == sum(p for p, _ in sizes)
    assert seen["taskgraph_requests_total", (("reason", "length"),)] == len(sizes)
    assert seen["taskgraph_requests_total", (("reason", "failed"),)] == 0
    assert seen["taskgraph_time_to_first_token_seconds_count", ()] == len(sizes)
    assert seen["taskgraph_time_per_output_token_seconds_count", ()] == sum(n > 1 for _, n in sizes)
    assert seen["taskgraph_request_seconds_sum", ()] >= seen["taskgraph_time_to_first_token_seconds_sum", ()] > 0
    where = ("path", "/v1/completions")
    assert seen["taskgraph_http_responses_total", (where, ("status", "200"))] == len(sizes)
    assert seen["taskgraph_http_responses_total", (where, ("status", "404"))] == 1
    assert seen["taskgraph_up", ()] == 1
    for idle in ("requests_running", "requests_waiting", "kv_pages_used"):
        assert seen[f"taskgraph_{idle}", ()] == 0
    ask(served, "GET", "/a/path/of/no/use")
    again = samples(served)
    assert again["taskgraph_http_responses_total", (("path", "other"), ("status", "404"))] == 1
    assert all(again[key] >= value for key, value in seen.items() if key[0].endswith(("_total", "_count", "_bucket")))


def test_metrics_of_a_full_cache_count_preemptions() -> None:
    served = make_served(pages=6, sequences=4)
    served.service.engine.scheduler.expected_output = 1.0
    try:
        from tests.serving.http.test_serve import together

        answers = together(served, *({**ASK, "prompt": c * 5, "max_tokens": 30} for c in "abcd"))
        assert [a.status_code for a in answers] == [200] * 4
        seen = samples(served)
        assert seen["taskgraph_preemptions_total", ()] == served.service.engine.scheduler.preemptions > 0
        assert seen["taskgraph_requests_total", (("reason", "length"),)] == 4
    finally:
        served.service.close()


def test_an_engine_that_failed_is_down() -> None:
    served = make_served(fails_at=2)
    assert ask(served, "POST", "/v1/completions", json={**ASK, "max_tokens": 20}).status_code == 503
    assert samples(served)["taskgraph_up", ()] == 0
    served.service.close()
    assert samples(served)["taskgraph_requests_total", (("reason", "failed"),)] == 1
