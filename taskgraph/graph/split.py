"""Split: which ops of a graph are cut along their batch, and where. The rewriter, plans and their checker read it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from taskgraph.errors import GraphError
from taskgraph.record import Typed

Sizes = Sequence[int]
"""The units of each slice of an op."""


@dataclass(frozen=True, slots=True)
class Split(Typed, error=GraphError):
    """What `split_batch` is to do: pairs of op names (none: every op that can) and the sizes of their slices."""

    parts: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = ()

    @staticmethod
    def of(sizes: Sizes | Mapping[str, Sizes], ops: Iterable[str] | None = None) -> "Split":
        """The Split that `split_batch` makes of the same arguments."""
        if isinstance(sizes, Mapping):
            by_sizes: dict[tuple[int, ...], list[str]] = {}
            for name, each in sizes.items():
                by_sizes.setdefault(tuple(each), []).append(name)
            return Split(tuple((tuple(names), each) for each, names in by_sizes.items()))
        return Split((((() if ops is None else tuple(ops)), tuple(sizes)),))


UNSPLIT = Split()
"""Leaves every op whole."""
