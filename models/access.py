"""Who may ask the server what, and a line for each that did.

`Gate` stands before the app: it numbers requests, refuses those that a browser sends on behalf of another site, asks
for a key where keys are set, and writes the access log (logger `taskgraph.access`: no prompts, no keys).
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

from taskgraph.errors import BackendUnavailable
from taskgraph.models.keys import KeyRing
from taskgraph.models.protocol import ApiError

log = logging.getLogger("taskgraph.access")
OPEN_PATHS = frozenset({"/", "/health"})
"""What needs no key: the page, which has no secrets, and whether the server is alive."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LOCAL_NAMES = frozenset({"localhost", "ip6-localhost"})
_SHOWN = 200
"""Characters of a path that the log shows."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a server: with `keys` those who have one. `origins` are the sites whose pages may, in a browser ("*":
    all); `hosts` are the names under which it may be called (empty: any), which stops a page that has its own name
    point here (DNS rebinding). `ended` hears the path and status of every response."""

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
    """The rules of a server that listens on `host`; BackendUnavailable for an address that others can reach, and no
    keys. Without keys it answers to this machine's own names only."""
    if keys is None and not is_loopback(host):
        raise BackendUnavailable(
            f"{host} can be reached from other machines, and there is no API key: anyone could use the model. Make one "
            "(taskgraph api-key NAME --file keys.txt) and give --api-key-file keys.txt, or stay on 127.0.0.1."
        )
    names = frozenset({"127.0.0.1", "::1", host.strip("[]"), *_LOCAL_NAMES}) if keys is None else frozenset[str]()
    return Access(keys, origins, names)


class Gate:
    """ASGI middleware of an `Access`; `ended` hears the path and the status of every response."""

    def __init__(self, app: ASGIApp, access: Access, ended: Callable[[str, int], None] | None = None) -> None:
        self._app, self._access, self._ended = app, access, ended

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

        who = ""
        try:
            try:
                who = self._checked(scope, headers)
            except ApiError as error:
                how = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
                await JSONResponse(error.body(), error.status, how)(scope, receive, numbered)
            else:
                await self._app(scope, receive, numbered)
        finally:
            if self._ended is not None:
                self._ended(scope["path"], status)
            log.info(
                "id=%s key=%s method=%s path=%s status=%d ms=%.1f%s", number, who or "-", _plain(scope["method"]),
                _plain(scope.get("raw_path", b"").decode("latin-1") or scope["path"]), status,
                1e3 * (time.perf_counter() - begin), _tokens(state),
            )  # fmt: skip

    def _checked(self, scope: Scope, headers: Headers) -> str:
        """The name of the key that was used, "" without; ApiError when the request may not pass."""
        self._check_site(headers)
        keys = self._access.keys
        if keys is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
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

    def _check_site(self, headers: Headers) -> None:
        """No page of another site may use a server through its visitor's browser, which names the page's origin."""
        host, hosts = _host(headers.get("host", "")), self._access.hosts
        if hosts and host not in hosts:
            raise ApiError(421, "this server does not answer to that Host; use 127.0.0.1 or localhost.")
        origin, origins = headers.get("origin"), self._access.origins
        if origin is None or origin in origins or "*" in origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
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
