"""Registries that other packages can add to: a name stands for something in this package or for an entry point.

A package brings one by a line in its own pyproject.toml, and nothing of it is imported before its name is asked for:

    [project.entry-points."taskgraph.backends"]
    toy = "taskgraph_toy.executable:ToyExecutable"
"""

from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from taskgraph.errors import TaskgraphError
from taskgraph.record import shown

T = TypeVar("T")


class Registry(Generic[T]):
    """What is known by name, each loaded when it is first asked for.

    `what` is the word for one of them in errors of the type `error`; `own` are the names of this package, each with its
    "module:attribute"; `group` is the entry-point group by which other packages add theirs. A name of this package
    stays this package's. `fits` says whether something brought under a name can be used, `must` what it has to be.
    """

    def __init__(
        self,
        what: str,
        group: str,
        own: Mapping[str, str],
        error: type[TaskgraphError],
        fits: Callable[[Any], bool] = callable,
        must: str = "a function",
    ) -> None:
        self._what, self._group, self._own, self._error = what, group, dict(own), error
        self._fits, self._must = fits, must
        self._loaded: dict[str, T] = {}

    def names(self) -> list[str]:
        """This package's names, then those that other packages bring."""
        return [*self._own, *sorted({entry.name for entry in self._brought()} - {*self._own})]

    def __getitem__(self, name: str) -> T:
        """What `name` stands for. The registry's error for a name that nobody brings, that two packages bring, or whose
        package cannot be loaded or brings something else; it names the package."""
        found = self._loaded.get(name) if isinstance(name, str) else None
        if found is None:
            found = self._loaded[name] = self._load(name)
        return found

    def _load(self, name: object) -> T:
        if isinstance(name, str) and name in self._own:
            module, _, attribute = self._own[name].partition(":")
            own: T = getattr(import_module(module), attribute)
            return own
        entries = [entry for entry in self._brought() if entry.name == name]
        if not entries:
            raise self._error(f"no {self._what} {shown(name)}; use one of {', '.join(self.names())}.")
        packages = sorted({_package(entry) for entry in entries})
        if len(packages) > 1:
            raise self._error(
                f"the packages {' and '.join(map(repr, packages))} both bring a {self._what} {shown(name)}; uninstall "
                "all but one of them."
            )
        return self._brought_by(entries[0])

    def _brought_by(self, entry: metadata.EntryPoint) -> T:
        whose = f"the {self._what} {entry.name!r} of the package {_package(entry)!r}"
        try:
            found: T = entry.load()
        except Exception as error:  # another package's code, which may raise anything
            raise self._error(
                f"{whose} cannot be loaded from {entry.value!r} ({type(error).__name__}: {shown(str(error))}); mend or "
                "uninstall that package."
            ) from error
        if not self._fits(found):
            raise self._error(
                f"{whose} is {shown(found)}, but must be {self._must}; mend its entry point {entry.value!r}."
            )
        return found

    def _brought(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=self._group)


def _package(entry: metadata.EntryPoint) -> str:
    """The name of the package that an entry point is of."""
    return entry.dist.name if entry.dist is not None else "?"
