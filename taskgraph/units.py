"""Reading and writing quantities. Inside the package everything is SI: bytes, seconds, bytes/s, FLOP/s."""

import math
import re
from collections.abc import Mapping

from taskgraph.errors import DemandError
from taskgraph.record import number, shown

_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_BYTES, _RATES = (
    {"": 1.0} | {prefix + unit: scale for prefix, scale in (_PREFIX | _BINARY).items()} for unit in ("b", "b/s")
)
"""Unit, in lower case -> what one of it is in SI; "" for a plain number."""
_QUANTITY = re.compile(r"^\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)\s*([a-z/]*)\s*$", re.IGNORECASE)


def parse_bytes(value: str | float) -> float:
    """Bytes from a number or a text such as "64MiB", "1.5 GB", "4096"."""
    return _parse(value, _BYTES, "B", "64MiB")


def parse_rate(value: str | float) -> float:
    """Bytes per second from a number or a text such as "20GB/s"."""
    return _parse(value, _RATES, "B/s", "20GB/s")


def parse_seconds(value: str | float) -> float:
    """Seconds from a number or a text such as "500ns", "2 us", "1.5ms"."""
    return _parse(value, _SECONDS, "seconds", "2us")


def _parse(value: str | float, scales: Mapping[str, float], what: str, example: str) -> float:
    if isinstance(value, str):
        match = _QUANTITY.match(value)
        if match is None:
            raise DemandError(f"cannot read {shown(value)} as a quantity; write it like {example!r}.")
        if match[2].lower() not in scales:
            raise DemandError(f"cannot read {value!r} as {what}; write it like {example!r}.")
        made = float(match[1]) * scales[match[2].lower()]
    else:
        made = number("a quantity", value, DemandError)
    if not math.isfinite(made) or made < 0:
        raise DemandError(f"{value!r} must be finite and not negative; write it like {example!r}.")
    return made


def format_seconds(seconds: float) -> str:
    """A time for people: three significant digits with ns, us, ms or s."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 1000 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_quantity(value: float, unit: str) -> str:
    """A quantity for people with decimal prefixes: format_quantity(3.35e12, "B/s") is "3.35 TB/s"."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
