"""Modules that moved: their names of version 0.1 go on to work, with a warning that says the new one.

The finder is asked only for names that no module has, so it costs an import nothing.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType


@cache
def moved() -> Mapping[str, str]:
    """Module of version 0.1 -> where its names are now."""
    import json
    from pathlib import Path

    found: Mapping[str, str] = json.loads((Path(__file__).parent / "moved.json").read_text(encoding="utf-8"))
    return found


class _Forward:
    """Gives the module at its new place under its old name too."""

    def __init__(self, new: str) -> None:
        self._new = new
        self._own: ModuleSpec | None = None

    def create_module(self, spec: "ModuleSpec") -> "ModuleType":
        """The module at its new place."""
        made = import_module(self._new)
        self._own = made.__spec__
        return made

    def exec_module(self, module: "ModuleType") -> None:
        """Nothing: it is loaded."""
        module.__spec__ = self._own  # the import system set that of the old name


class _Finder:
    """What `sys.meta_path` asks last."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Where a moved module is, and a warning that it has moved."""
        new = moved().get(fullname) if fullname.startswith("taskgraph.") else None
        if new is None:
            return None
        import warnings
        from importlib.machinery import ModuleSpec

        warnings.warn(f"{fullname} is {new} now; the old name goes with version 0.3.", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Forward(new))  # type: ignore[arg-type]  # importlib.abc would cost every import


def install() -> None:
    """Let old names be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
