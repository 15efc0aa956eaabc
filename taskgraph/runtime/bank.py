"""The graph bank: executables by key (a batch bucket, a partition geometry), made at first use and kept, LRU."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from threading import RLock
from typing import Generic, Self, TypeVar

from taskgraph.errors import PlanError
from taskgraph.record import function, number
from taskgraph.runtime.executable import Executable

Key = TypeVar("Key", bound=Hashable)


class GraphBank(Generic[Key]):
    """Executables that `make` gives for a key, within `budget_bytes` of their own memory (None: all are kept).

    The one in use always stays, so a single executable may exceed the budget. `made` counts calls of `make`: one
    that grows while serving means keys that were not warmed up, or a budget that is too small. Several threads may ask.
    """

    def __init__(self, make: Callable[[Key], Executable], budget_bytes: float | None = None) -> None:
        self._make: Callable[[Key], Executable] = function("make", make, PlanError)
        self._budget_bytes = None if budget_bytes is None else number("budget_bytes", budget_bytes, PlanError, 0.0)
        self._kept: OrderedDict[Key, Executable] = OrderedDict()
        self.made = self.evicted = 0
        self._guard = RLock()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Key]:
        """The keys of what is kept."""
        return iter(list(self._kept))

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __getitem__(self, key: Key) -> Executable:
        """The executable of `key`, made if it is not kept; the longest unused ones are closed to make room."""
        with self._guard:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            made = self._kept[key] = self._make(key)
            self.made += 1
            most = self._budget_bytes
            while most is not None and len(self._kept) > 1 and self.memory_bytes > most:
                _, oldest = self._kept.popitem(last=False)
                oldest.close()
                self.evicted += 1
            return made

    @property
    def memory_bytes(self) -> int:
        """What the kept executables hold beside what is bound to them."""
        return sum(executable.memory_bytes for executable in self._kept.values())

    def close(self) -> None:
        """Close every executable; a second call does nothing."""
        with self._guard:
            while self._kept:
                self._kept.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
