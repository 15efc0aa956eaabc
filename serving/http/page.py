"""The page at / of `taskgraph serve`: one file with nothing from elsewhere, and headers that hold it to that."""

import base64
import hashlib
import re
from importlib.resources import files

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_text() -> str:
    """The page."""
    return files("taskgraph.serving.http").joinpath("page.html").read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """A Content-Security-Policy that lets nothing run or load but the page's own script and style, by their hashes,
    and lets it talk to its own server alone."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'", f"script-src {' '.join(hashes['script'])}", f"style-src {' '.join(hashes['style'])}",
            "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
            "require-trusted-types-for 'script'", "trusted-types 'none'",
        )
    )  # fmt: skip


def page_headers(page: str) -> dict[str, str]:
    """What to send with it."""
    return {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        "Cache-Control": "no-cache",
    }
