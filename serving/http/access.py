"""Who may ask the server what, and a line for each that did.

`AccessLog` numbers requests and writes the access log (logger `taskgraph.access`: no prompts, no keys). Behind it
stands `Gate`, which refuses requests that a browser sends on behalf of another site, and asks for a key where keys are
set.
"""

import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskgraph.errors import BackendUnavailable, RequestError
from taskgraph.serving.http.keys import KeyRing
from taskgraph.serving.http.protocol import ApiError

log = logging.getLogger("taskgraph.access")
OPEN_PATHS = frozenset({"/", "/health"})
"""What needs no key: the page, which has no secrets, and whether the server is alive."""
POLLED = "/v1/status"
"""What the page asks for all the time: the log has it at its level DEBUG, unless it was refused."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_LOCAL_NAMES = frozenset({"localhost", "ip6-localhost"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_SHOWN = 200
"""Characters of a path that the log shows."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a server: with `keys` those who have one. `origins` are the sites whose pages may, in a browser ("*":
    all); `hosts` are the names under which it may be called (empty: any), which stops a page that has its own name
    point here (DNS rebinding)."""

    keys: KeyRing | None = None
    origins: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def access_of(host: str, keys: KeyRing | None, origins: tuple[str, ...] = ()) -> Access:
    """The rules of a server that listens on `host`; BackendUnavailable for an address that others can reach, or all
    sites as origins, and no keys; RequestError for an origin that is none. Without keys it answers to this machine's
    own names only."""
    if keys is None and not is_loopback(host):
        raise BackendUnavailable(
            f"{host} can be reached from other machines, and there is no API key: anyone could use the model. Make one "
            "(taskgraph api-key NAME --file keys.txt) and give --api-key-file keys.txt, or stay on 127.0.0.1."
        )
    sites = tuple(map(_origin, origins))
    if keys is None and "*" in sites:
        raise BackendUnavailable(
            "--cors-origin '*' lets every page that a browser here opens use the model, and there is no API key. Give "
            "--api-key-file too (taskgraph api-key NAME --file keys.txt), or name the sites."
        )
    names = frozenset({"127.0.0.1", "::1", host.strip("[]"), *_LOCAL_NAMES}) if keys is None else frozenset[str]()
    return Access(keys, sites, names)


def _origin(text: str) -> str:
    """An origin as browsers send it; RequestError when they never send one like it."""
    origin = text.strip().lower().removesuffix("/")
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise RequestError(
            f"--cors-origin {text[:80]!r} is no origin: give scheme, name and port alone, like https://chat.example or "
            "http://localhost:3000, or '*' for all."
        )
    scheme, _, place = origin.partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    return f"{scheme}://{place.removesuffix(default)}" if place and default else origin


class AccessLog:
    """ASGI middleware that numbers requests and logs each when it has ended; `ended` hears its path and status."""

    def __init__(self, app: ASGIApp, ended: Callable[[str, int], None] | None = None) -> None:
        self._app, self._ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begin = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        number = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        status = 499  # unless a response begins: the client left

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = number
            await send(message)

        try:
            await self._app(scope, receive, numbered)
        finally:
            if self._ended is not None:
                self._ended(scope["path"], status)
            polled = scope["path"] == POLLED and status == 200  # once a second and page
            log.log(
                logging.DEBUG if polled else logging.INFO,
                "id=%s key=%s method=%s path=%s status=%d ms=%.1f%s",
                number, state.get("key") or "-", _plain(scope["method"]),
                _plain(scope.get("raw_path", b"").decode("latin-1") or scope["path"]), status,
                1e3 * (time.perf_counter() - begin), _tokens(state),
            )  # fmt: skip


class Gate:
    """ASGI middleware of an `Access`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["key"] = self._checked(scope, Headers(scope=scope))
            except ApiError as error:
                how = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
                app = JSONResponse(error.body(), error.status, how)
        await app(scope, receive, send)

    def _checked(self, scope: Scope, headers: Headers) -> str:
        """The name of the key that was used, "" without; ApiError when the request may not pass."""
        self._check_site(scope["method"], headers)
        keys = self._access.keys
        if keys is None or scope["path"] in OPEN_PATHS:
            return ""
        kind, _, secret = headers.get("authorization", "").partition(" ")
        found = keys.find(secret.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise ApiError(
                401, "this server needs an API key: send `Authorization: Bearer KEY`.", code="invalid_api_key"
            )
        if found.role == "metrics" and scope["path"] != "/metrics":
            raise ApiError(403, "this API key may read /metrics only.", code="insufficient_permissions")
        return found.name

    def _check_site(self, method: str, headers: Headers) -> None:
        """No page of another site may use a server through its visitor's browser, which names the page's origin, or
        says at least that it is another's. Reading without an origin is harmless: the page cannot see what it gets."""
        host, hosts = _host(headers.get("host", "")), self._access.hosts
        if hosts and host not in hosts:
            raise ApiError(421, "this server does not answer to that Host; use 127.0.0.1 or localhost.")
        origin, origins = headers.get("origin"), self._access.origins
        if origin in origins or "*" in origins:
            return
        if origin is None:
            foreign = method not in _READING and headers.get("sec-fetch-site") in ("cross-site", "same-site")
        else:
            foreign = urlsplit(origin).netloc != headers.get("host")
        if foreign:
            raise ApiError(403, "pages of other origins may not use this server; --cors-origin allows one.")


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].lower()


def _plain(text: str) -> str:
    """What a client wrote, on one line and without quotes or spaces."""
    return "".join(c if "!" <= c <= "~" and c not in "\"'\\=" else "?" for c in text[:_SHOWN])


def _tokens(state: dict[str, object]) -> str:
    """Tokens in and out, of what was answered."""
    usage = state.get("usage")
    counts = usage() if callable(usage) else None
    return f" in={counts['prompt_tokens']} out={counts['completion_tokens']}" if counts else ""
