"""What tests tell engines, by the names of the fields."""

from dataclasses import fields
from typing import Any

from taskgraph.serving.options import KvMemory, Policy


def told(**options: Any) -> dict[str, Any]:
    """The arguments of an engine: fields of KvMemory and of Policy together as such, and all others as they are."""
    made: dict[str, Any] = dict(options)
    for name, kind in (("memory", KvMemory), ("policy", Policy)):
        made[name] = kind(**{f.name: made.pop(f.name) for f in fields(kind) if f.name in made})
    return made
