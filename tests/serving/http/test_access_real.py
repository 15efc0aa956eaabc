"""What the front refuses, and how it says so, where that takes a browser's headers, a signal or a real connection."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import taskgraph as tg
from taskgraph.cli import console, serve
from taskgraph.serving.http.access import Access, access_of
from taskgraph.serving.http.app import Served, create_app
from taskgraph.serving.http.keys import KeyRing, add_key
from tests.serve_cases import make_served
from tests.serving.http.test_access import ASK, FULL, RING, ask, bearer

SITE = "https://chat.example"


@pytest.fixture
def served() -> Iterator[Served]:
    made = make_served()
    yield made
    made.service.close()


@pytest.mark.parametrize(
    "origin", ["", "null", "chat.example", "https://", "https://a.example/path", "javascript:x", "https://a b", "a\nb"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(tg.RequestError, match="is no origin") as seen:
        access_of("127.0.0.1", None, (origin,))
    assert "\n" not in str(seen.value)


def test_origins_are_compared_as_browsers_write_them() -> None:
    given = (
        "https://Chat.example/",
        "http://localhost:3000",
        "https://a.example:443",
        "http://[::1]:80",
        "tauri://app",
    )
    expected = ("https://chat.example", "http://localhost:3000", "https://a.example", "http://[::1]", "tauri://app")
    assert access_of("127.0.0.1", None, given).origins == expected
    assert access_of("0.0.0.0", RING, ("*",)).origins == ("*",)
    with pytest.raises(tg.BackendUnavailable, match="API key"):
        access_of("127.0.0.1", None, ("*",))


def test_a_refusal_can_be_read_by_a_page_that_may(served: Served) -> None:
    rules = Access(RING, origins=(SITE,))
    refused = ask(served, "GET", "/v1/models", access=rules, headers={"Origin": SITE})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == SITE
    assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()
    for origin in ("https://evil.example", "null"):
        other = ask(served, "GET", "/v1/models", access=rules, headers={"Origin": origin, **bearer(FULL)})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        early = ask(served, "OPTIONS", "/v1/completions", access=rules, headers=preflight)
        assert early.is_client_error and "access-control-allow-origin" not in early.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_hides_the_origin_still_says_whose_page_it_is(served: Served, site: str) -> None:
    said = {"Sec-Fetch-Site": site, "Content-Type": "text/plain"}
    assert ask(served, "POST", "/v1/completions", json=ASK, headers=said).status_code == 403
    assert ask(served, "GET", "/health", headers={"Sec-Fetch-Site": site}).status_code == 200, "a link to it"
    for own in ("same-origin", "none"):
        assert ask(served, "POST", "/v1/completions", json=ASK, headers={"Sec-Fetch-Site": own}).status_code == 200


def test_nothing_redirects_and_a_method_names_the_right_one(served: Served) -> None:
    slash = ask(served, "POST", "/v1/chat/completions/", json=ASK)
    assert slash.status_code == 404 and slash.json()["error"]["code"] == "not_supported"
    wrong = ask(served, "GET", "/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == "GET /v1/completions is not supported by this server; use POST."
    head = ask(served, "HEAD", "/health")
    assert head.status_code == 200 and not head.content


def test_a_body_that_is_too_large_or_late_is_not_waited_for(served: Served) -> None:
    def send(most_s: float, length: int, *parts: bytes) -> int:
        """The status of a request whose client sends these parts and then nothing."""
        app, statuses, coming = (
            create_app(Served(served.service, served.tokenizer, "formula", 4096, most_s)),
            [],
            [*parts],
        )

        async def receive() -> Any:
            if not coming:
                await asyncio.sleep(3600)
            return {"type": "http.request", "body": coming.pop(0), "more_body": True}

        async def reply(message: Any) -> None:
            statuses.append(message.get("status"))

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [(b"content-length", str(length).encode())],
        }  # fmt: skip
        asyncio.run(asyncio.wait_for(app(scope, receive, reply), 20))
        return int(statuses[0])

    assert send(3600.0, 4097) == 413
    assert send(3600.0, 10**40) == 413
    assert send(3600.0, 1, b"x" * 4097) == 413
    assert send(0.05, 100, b'{"model": ') == 408


def test_what_a_user_wrote_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for shown in (console.screen, console.status):
        assert not shown._emoji, "a path of /:smile:/ is no smile"
    path = tmp_path / "keys.txt"
    path.write_text("alice all\n")
    with pytest.raises(tg.KeyFileError, match="sha256:SALT:DIGEST"):
        KeyRing.load(path)


def test_a_file_of_keys_may_have_a_mark_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    secret = add_key(path, "alice")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    ring = KeyRing.load(path)
    assert ring.find(secret) is not None
    with pytest.raises(tg.KeyFileError, match="letter or digit first"):
        add_key(path, "-")
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(tg.KeyFileError, match="more than 1048576 bytes"):
        ring.reload()
    assert ring.find(secret) is not None, "the keys stay as they were"
    with pytest.raises(tg.KeyFileError, match="more than"):
        KeyRing.load("/dev/zero")


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Any, str, Path, str]]:
    """A server process with a file of keys: the process, its address, the file, and a key."""
    path = tmp_path / "keys.txt"
    secret = add_key(path, "alice")
    command = [sys.executable, str(Path(__file__).parents[2] / "serve_cases.py"), "0", "5", "-1", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, f"http://127.0.0.1:{int(server.stdout.readline())}", path, secret
        finally:
            server.kill()


def test_hangup_reads_the_keys_again(keyed: tuple[Any, str, Path, str]) -> None:
    server, url, path, first = keyed

    def status(key: str) -> int:
        return httpx.get(f"{url}/v1/models", headers=bearer(key), timeout=30).status_code

    second = add_key(path, "bob")
    assert (status(first), status(second)) == (200, 401)
    server.send_signal(signal.SIGHUP)
    assert server.stdout.readline().strip() == f"read the keys again: 2 of {path}"
    assert (status(first), status(second)) == (200, 200)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[1]}\n")
    server.send_signal(signal.SIGHUP)
    assert "1 of" in server.stdout.readline()
    assert (status(first), status(second)) == (401, 200)
    path.write_text("damaged\n")
    server.send_signal(signal.SIGHUP)
    said = server.stdout.readline()
    assert said.startswith("the keys stay as they are") and "line 1" in said
    assert (status(first), status(second)) == (401, 200)
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=30)
    assert (server.returncode, out.split()[-1], err) == (0, "stopped", "")


HOSTILE = {
    "no request": b"GARBAGE\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "negative length": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "huge length": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n{}",
    "huge header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    "control characters": b"GET /a\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "websocket": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
}


def test_hostile_connections_are_refused_and_others_served(keyed: tuple[Any, str, Path, str]) -> None:
    server, url, _, secret = keyed
    port = httpx.URL(url).port or 0
    for what, data in HOSTILE.items():
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(data)
            answer = client.recv(4096)
        assert re.match(rb"HTTP/1.1 4\d\d ", answer), (what, answer)
    idle = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(50)]
    for client in idle:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
    begin = time.monotonic()
    answer = httpx.post(f"{url}/v1/completions", json=ASK, headers=bearer(secret), timeout=60)
    assert answer.status_code == 200 and time.monotonic() - begin < 60
    for client in idle:
        client.close()
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=30)
    assert server.returncode == 0


def test_a_file_of_keys_that_others_can_read_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.txt"
    add_key(path, "alice")
    serve._key_ring(path)
    assert "chmod" not in capsys.readouterr().err
    path.chmod(0o644)
    ring = serve._key_ring(path)
    assert "chmod 600" in capsys.readouterr().err and len(ring.keys) == 1
    assert path.stat().st_mode & 0o777 == 0o644, "it is the owner's to change"
