"""Other people's models: modules of torch as graphs, and taskgraph as a backend of torch.compile.

This is the only room above the runtime that sees torch's own graphs. Its names load on first use: importing it imports
no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgraph.embed.dynamo import FallbackWarning, Options
    from taskgraph.embed.entry import backend
    from taskgraph.embed.importer import Imported, from_torch
    from taskgraph.embed.named_attention import register_attention
    from taskgraph.embed.report import Report, report

_WHERE = {
    "FallbackWarning": "dynamo",
    "Imported": "importer",
    "Options": "dynamo",
    "Report": "report",
    "backend": "entry",
    "from_torch": "importer",
    "register_attention": "named_attention",
    "report": "report",
}

__all__ = ["FallbackWarning", "Imported", "Options", "Report", "backend", "from_torch", "register_attention", "report"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'taskgraph.embed' has no attribute {name!r}")
    value = getattr(import_module(f"taskgraph.embed.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
