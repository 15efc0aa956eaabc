"""JSON objects of a checkpoint's folder, and the keys that are known in them."""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from taskgraph.errors import ConfigError, WeightsError
from taskgraph.record import shown

MOST_BYTES = 1 << 30
"""A larger JSON file is no part of a checkpoint that this package can hold."""


def json_object(path: Path, error: type[WeightsError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file; `error`, in one line, for a file that is damaged, too deep or no object."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise error(f"{path} has {path.stat().st_size} bytes; at most {MOST_BYTES} are read. Fetch it again.")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError as cause:
        raise error(f"{path} is not JSON that can be read: it is nested too deeply; fetch it again.") from cause
    except (OSError, ValueError) as cause:
        raise error(f"{path} is not JSON that can be read ({shown(cause)}); fetch it again.") from cause
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}; it must be an object. Fetch it again.")
    return content


def optional_object(path: Path, error: type[WeightsError] = WeightsError) -> Mapping[str, Any]:
    """The object in a JSON file, empty when there is no such file."""
    return json_object(path, error) if path.is_file() else {}


def words(text: str) -> frozenset[str]:
    """The words of a text: a table of keys."""
    return frozenset(text.split())


@cache
def known_formats() -> dict[str, Any]:
    """What checkpoints.toml holds, which says what that is."""
    return tomllib.loads((Path(__file__).parent / "checkpoints.toml").read_text(encoding="utf-8"))
