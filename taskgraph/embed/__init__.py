"""Other people's models: modules of torch as graphs, and taskgraph as a backend of torch.compile.

This is the only room above the runtime that sees torch's own graphs. Its names load on first use: importing it imports
no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgraph.embed.border import FallbackWarning
    from taskgraph.embed.direct import wrap
    from taskgraph.embed.entry import backend
    from taskgraph.embed.importer import Imported, from_torch
    from taskgraph.embed.named_attention import register_attention
    from taskgraph.embed.report import Report, report
    from taskgraph.embed.variants import Options

_WHERE = {
    "FallbackWarning": "border",
    "Imported": "importer",
    "Options": "variants",
    "Report": "report",
    "backend": "entry",
    "from_torch": "importer",
    "register_attention": "named_attention",
    "report": "report",
    "wrap": "direct",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'taskgraph.embed' has no attribute {name!r}")
    home = import_module(f"taskgraph.embed.{_WHERE[name]}")
    for each, where in _WHERE.items():  # all of that home: one has the name of its module, which importing it has set
        if where == _WHERE[name]:
            globals()[each] = getattr(home, each)
    return globals()[name]
