"""Whether a graph may be run with more rows than a call has, and its results be cut: a proof, operator by operator.

A symbol's size is an axis of some arguments. Those are padded at its end, and each result is cut there. That is
harmless if no element within the call's rows is computed of one beyond. What is looked at are two flows of the graph,
of a size and of another: where they differ is what depends on the size, and every call there has to be of an
operator whose rule, below, says that rows stay apart. An operator without a rule is no proof: such a size gets a plan
of its own. Two sizes are enough, as all that a graph computes of a size are multiples of it
(`taskgraph.embed.sizes.proportional`).
"""

from dataclasses import dataclass, field
from typing import Any, Final

from taskgraph.embed.calls import Strided, by_name, leaves
from taskgraph.embed.flow import Call, Flow, Leaf, Use
from taskgraph.embed.padding_rules import CREATORS, RULES, SHAPE_ARGUMENTS, Rows, Unpadded

_LOOK_UPS: Final = frozenset({"embedding", "index"})
_SIMPLE: Final = frozenset({"end", "dtype", "layout", "device", "pin_memory"})
"""What arange is given where it counts from 0."""


def rows_of_results(flow: Flow, other: Flow, sizes: tuple[int, int]) -> list[Rows | None]:
    """Where each result of a graph has the size: its flow with `sizes[0]` rows, and `other` with
    `sizes[1]`, both unfolded.

    Unpadded if a result may depend on what it is padded with."""
    proof = _Proof(flow, other, sizes)
    for call, twin in zip(flow.calls, other.calls, strict=True):
        proof.check(call, twin)
    found: list[Rows | None] = []
    for one, two in zip(leaves(flow.outputs), leaves(other.outputs), strict=True):
        if not isinstance(one, Use) and one != two:
            raise Unpadded("the size itself is returned")
        found.append(proof.rows(one) if isinstance(one, Use) else None)
        if found[-1] is not None and flow.storage(one).role == "input" and not flow.is_whole(one):
            raise Unpadded("a view of an argument is returned")
    return found


@dataclass(slots=True)
class _Proof:
    flow: Flow
    other: Flow
    sizes: tuple[int, int]
    placed: dict[int, int] = field(default_factory=dict)
    """Storages whose rows depend on where they are, with the largest number in them, -1 if that is not known. All
    other padding is computed of copies of a call's first row, and as good an index as that."""

    def __post_init__(self) -> None:
        if _outline(self.flow) != _outline(self.other):
            raise Unpadded("other calls are made for another size")

    def check(self, call: Call, other: Call) -> None:
        """Unpadded unless the rows of what a call makes are computed of the same rows alone."""
        made = [leaf for leaf in call.results if leaf is not None]
        outs = [self.rows(Use(leaf, 0)) for leaf in made]
        uses = call.uses()
        given = [self.rows(use) for use in uses]
        name = call.target._opname
        if not any(outs) and not any(given) and not any(map(self._sized, uses)):
            self._same_arguments(call, other, ())
            return
        self._place(call, name, made)
        if call.changes or call.target.namespace not in ("aten", "taskgraph"):
            raise Unpadded(f"{call.name} ({call.target}) has no rule")
        if name in CREATORS:
            self._same_arguments(call, other, CREATORS[name])
            return
        if not any(given):  # of a tensor that has the size it reads the first row alone
            self._same_arguments(call, other, ())
            if any(outs):
                raise Unpadded(f"{call.name} ({call.target}) makes rows of what has none")
            return
        self._same_arguments(call, other, SHAPE_ARGUMENTS.get(name, ()))
        rule = RULES.get(name)
        if rule is None:
            raise Unpadded(f"{call.name} ({call.target}) has no rule")
        by = {(u.leaf, u.version): r for u, r in zip(uses, given, strict=True)}
        arguments = by_name(call.target, call.args, call.kwargs)
        for leaf, out in zip(made, outs, strict=True):
            wanted = rule(self.flow, arguments, by, self.flow.leaves[leaf].layout)
            if wanted is None or wanted != out:
                raise Unpadded(f"{call.name} ({call.target}) may mix rows")

    def _place(self, call: Call, name: str, made: list[int]) -> None:
        """Keep account of `placed`. Unpadded for a look-up at a place that may not be in its table."""
        uses = call.uses()
        known = [self.placed[n] for u in uses if (n := self.flow.leaves[u.leaf].storage) in self.placed]
        if name in _LOOK_UPS and known:
            table = self.flow.layout(uses[0]).size[0]
            if not 0 <= known[0] < table:
                raise Unpadded(f"{call.name} ({call.target}) may look beyond its table")
        if name == "arange" or known or name in ("attention", "scaled_dot_product_attention"):
            most = -1
            if name == "arange" and set(by_name(call.target, call.args, call.kwargs)) <= _SIMPLE:
                most = self.flow.leaves[made[0]].layout.elements - 1
            self.placed |= {self.flow.leaves[leaf].storage: most for leaf in made}

    def _sized(self, use: Use) -> bool:
        """Whether the storage of a tensor has the size, whether or not the tensor has it."""
        return self._whole(self.flow.leaves[use.leaf].storage) is not None

    def _same_arguments(self, call: Call, other: Call, free: tuple[str, ...]) -> None:
        one = by_name(call.target, call.args, call.kwargs)
        two = by_name(other.target, other.args, other.kwargs)
        if one.keys() != two.keys() or any(one[key] != two[key] for key in one if key not in free):
            raise Unpadded(f"{call.name} ({call.target}) computes with the size")

    # -- tensors ---------------------------------------------------------------------------------

    def rows(self, use: Use) -> Rows | None:
        """The rows of a tensor, None if it has none. Unpadded if they do not lie apart from each other."""
        leaf, other = self.flow.leaves[use.leaf], self.other.leaves[use.leaf]
        found, base = self._differing(leaf.layout, other.layout), self._whole(leaf.storage)
        if leaf.view is None:
            return found
        if base is None:
            here, there = ((one.offset, one.layout.stride) for one in (leaf, other))
        else:
            here, there = (
                _seen(flow.leaves[flow.storages[one.storage].whole].layout, base, one, found)
                for flow, one in ((self.flow, leaf), (self.other, other))
            )
        if here != there:
            raise Unpadded("a view lies where the size says")
        return found

    def _whole(self, storage: int) -> Rows | None:
        whole = self.flow.storages[storage].whole
        return self._differing(self.flow.leaves[whole].layout, self.other.leaves[whole].layout)

    def _differing(self, one: Strided, two: Strided) -> Rows | None:
        if len(one.size) != len(two.size) or one.dtype != two.dtype:
            raise Unpadded("a tensor is another for another size")
        axes = [axis for axis, (n, k) in enumerate(zip(one.size, two.size, strict=True)) if n != k]
        if not axes:
            return None
        axis = axes[0]
        unit, rest = divmod(one.size[axis], self.sizes[0])
        if len(axes) > 1 or rest or two.size[axis] != self.sizes[1] * unit:
            raise Unpadded("a tensor has the size along two axes, or not as a multiple")
        return Rows(axis, unit)


def _outline(flow: Flow) -> Any:
    """What of a flow is the same for every size, where rows stay apart."""
    calls = [(call.target, call.results, call.changes) for call in flow.calls]
    return calls, [(leaf.storage, leaf.view and leaf.view.base) for leaf in flow.leaves]


def _seen(whole: Strided, base: Rows, leaf: Leaf, rows: Rows | None) -> Any:
    """How a view lies in memory of which an axis has rows, in terms that no size is part of.

    Unpadded if one of its rows is not one of the memory's: if it has rows, row i of it must be of row i there; if it
    has none, of row 0 alone."""
    step = whole.stride[base.axis]
    span, block = step * whole.size[base.axis], step * base.unit
    if not whole.dense or whole.lazy or leaf.layout.lazy:
        raise Unpadded("memory has gaps")
    inner, terms = leaf.offset % span, list[Any]()
    for axis, (n, stride) in enumerate(zip(leaf.layout.size, leaf.layout.stride, strict=True)):
        if rows is not None and axis == rows.axis:
            if stride * rows.unit != block:
                raise Unpadded("a view mixes rows")
            inner += (rows.unit - 1) * stride
            terms.append("rows")
        elif n > 1 and stride and stride % span == 0:
            terms.append(("outside", stride // span))
        else:
            inner += (n - 1) * stride
            terms.append(("inside", stride if n > 1 else 0))
    if inner >= block:
        raise Unpadded("a view takes more than a row for one")
    return leaf.offset // span, leaf.offset % span, terms
