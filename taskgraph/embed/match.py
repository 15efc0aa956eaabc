"""What patterns ask of a flow: who makes a tensor, who else needs it, and what its dtype and shape are."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from taskgraph.embed.calls import Strided, argument, leaves
from taskgraph.embed.flow import Call, Flow, Use
from taskgraph.embed.lower import Match


class Matcher:
    """A flow with its tables; `taken` are the calls that matches have already."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.taken = flow, set[int]()
        self.made: dict[int, int] = {}
        """By storage the call that makes it."""
        self.readers: dict[int, set[int]] = {}
        """By storage the calls that take it, -1 for the outputs."""
        self.changed: dict[int, list[int]] = {}
        """By storage the calls that change it."""
        for i, call in enumerate(flow.calls):
            for leaf in call.results:
                if leaf is not None:
                    self.made[flow.leaves[leaf].storage] = i
            for use in call.uses():
                self.readers.setdefault(flow.leaves[use.leaf].storage, set()).add(i)
            for storage, _ in call.changes:
                self.changed.setdefault(storage, []).append(i)
        for use in leaves(flow.outputs):
            if isinstance(use, Use):
                self.readers.setdefault(flow.leaves[use.leaf].storage, set()).add(-1)

    def call(self, i: int) -> Call:
        """Call number i."""
        return self.flow.calls[i]

    def is_op(self, i: int | None, *names: str) -> bool:
        """Whether call i is one of aten's of these names, and free."""
        if i is None or i in self.taken:
            return False
        target = self.flow.calls[i].target
        return target.namespace == "aten" and target._opname in names

    def arg(self, i: int, name: str) -> Any:
        """An argument of call i, or its default."""
        call = self.flow.calls[i]
        return argument(call.target, call.args, call.kwargs, name)

    def out(self, i: int) -> Use:
        """What call i makes."""
        (leaf,) = (r for r in self.flow.calls[i].results if r is not None)
        return Use(leaf, 0)

    def layout(self, use: Use) -> Strided:
        """The layout of a tensor."""
        return self.flow.layout(use)

    def storage(self, use: Use) -> int:
        """The number of a tensor's storage."""
        return self.flow.leaves[use.leaf].storage

    def maker(self, use: Any) -> int | None:
        """The free call whose whole result this is and stays; None if there is none."""
        if not isinstance(use, Use) or not self.flow.is_whole(use):
            return None
        number = self.storage(use)
        i = self.made.get(number)
        return None if i is None or i in self.taken or number in self.changed else i

    def same_rows(self, use: Any) -> bool:
        """Whether its rows are all of its storage as it lies, in whatever shape."""
        if not isinstance(use, Use):
            return False
        leaf = self.flow.leaves[use.leaf]
        root = self.flow.leaves[self.flow.storage(use).whole].layout
        return leaf.offset == 0 and leaf.layout.plain and root.dense and leaf.layout.elements == root.elements

    def rows_of(self, use: Any) -> int | None:
        """As `maker`, where the tensor may have another shape than the result, row by row."""
        if not self.same_rows(use):
            return None
        number = self.storage(use)
        i = self.made.get(number)
        return None if i is None or i in self.taken or number in self.changed else i

    def only_for(self, i: int, group: Iterable[int]) -> bool:
        """Whether nothing but the calls of `group` needs what call i makes."""
        allowed = set(group)
        return all(
            self.readers.get(self.flow.leaves[leaf].storage, set()) <= allowed
            for leaf in self.flow.calls[i].results
            if leaf is not None
        )

    def steady(self, i: int, root: int) -> bool:
        """Whether what call i reads is the same when call `root` runs."""
        return not any(
            i < c < root for use in self.flow.calls[i].uses() for c in self.changed.get(self.storage(use), ())
        )

    def match(self, inner: Iterable[int], root: int, kind: str, emit: Callable[..., str]) -> Match | None:
        """The match of these calls, the root last; None where others need what the inner ones make or it changes."""
        members = [i for i in dict.fromkeys(sorted(inner)) if i != root]
        group = {*members, root}
        if any(i in self.taken or self.call(i).changes for i in group):
            return None
        if any(self.layout(use).lazy for i in group for use in self.call(i).uses()):
            return None
        if not all(self.only_for(i, group) and self.steady(i, root) for i in members):
            return None
        return Match((*members, root), kind, emit)

    def want(self, use: Use | None, shape: tuple[int, ...]) -> None:
        """Say that the storage of a tensor should have this shape in the graph, if nobody said another before."""
        if use is not None and self.same_rows(use):
            self.flow.wanted.setdefault(self.storage(use), shape)

    def roots(self) -> Iterator[int]:
        """The free calls, the last first: what ends a pattern is found before its parts."""
        for i in range(len(self.flow.calls) - 1, -1, -1):
            if i not in self.taken:
                yield i
