"""Which rows every tensor of a graph holds, and how ops carry a batch: what the checker knows of slices.

Written for the checker alone: what slices graphs (`taskgraph.rewrite`) has its own account of the same, and neither
imports the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from taskgraph.errors import PlanError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Rows, Tensor, seen_inputs
from taskgraph.ops import batch_axes

MOVING = ("concat_rows", "slice_rows")
"""Kinds that only say which rows follow which."""


class Run(NamedTuple):
    """`length` rows of a tensor of the graph: first, first + stride, ..."""

    tensor: str
    first: int
    stride: int
    length: int


Held = tuple[Run, ...]
"""The rows that a tensor holds, one after another."""


class Seen(NamedTuple):
    """What an op takes of one input: rows, and of another axis than the first a part (None: all of it)."""

    rows: Held
    part: Rows | None


# ------------------------------------------------------------------------------------------- rows


def length_of(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def all_of(tensor: Tensor) -> Held:
    return (Run(tensor.name, 0, 1, length_of(tensor)),)


def picked(held: Held, start: int, stop: int, step: int = 1) -> Held:
    """Rows start, start + step, ... before `stop` of what is held."""
    made, at = list[Run](), 0
    for run in held:
        skipped = max(0, -(-(at - start) // step))
        low, high = start + skipped * step, min(stop, at + run.length)
        if low < high:
            count = -(-(high - low) // step)
            made.append(Run(run.tensor, run.first + (low - at) * run.stride, run.stride * step, count))
        at += run.length
    return tuple(made)


def joined(parts: Sequence[Held]) -> Held:
    """All rows of the parts, one part after another; runs that go on are one."""
    made = list[Run]()
    for run in (run for part in parts for run in part):
        last = made[-1] if made else None
        goes_on = last is not None and (last.tensor, last.stride) == (run.tensor, run.stride)
        if last is not None and goes_on and run.first == last.first + last.length * last.stride:
            made[-1] = last._replace(length=last.length + run.length)
        else:
            made.append(run)
    return tuple(made)


def same(one: Held, other: Held) -> bool:
    """Whether these are the same rows in the same order, however they are cut into runs."""
    left, right = list(reversed(one)), list(reversed(other))
    while left and right:
        a, b = left.pop(), right.pop()
        count = min(a.length, b.length) if a.stride == b.stride else 1
        if (a.tensor, a.first) != (b.tensor, b.first):
            return False
        for run, rest in ((a, left), (b, right)):
            if run.length > count:
                rest.append(run._replace(first=run.first + count * run.stride, length=run.length - count))
    return not left and not right


# -------------------------------------------------------------------------------------- one graph


@dataclass
class Followed:
    """A graph, and what each of its tensors that is known so far holds. `written` are the states that ops of the
    graph change: their rows are not the same before and after, so nothing but the state itself holds them."""

    graph: Graph
    written: frozenset[str]
    held: dict[str, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held |= {t.name: all_of(t) for t in self.graph.tensors if t.role != "activation"}

    def moves(self, op: Op) -> bool:
        """Whether the op only says which rows follow which."""
        whole = all(view.axis == 0 for view in op.views.values())
        return op.kind in MOVING and whole and not self.written.intersection(op.inputs)

    def seen(self, op: Op, i: int) -> Seen:
        """What the op takes of its input number `i`."""
        tensor, view = self.graph.tensor[op.inputs[i]], op.views.get(i)
        rows = self.held.get(tensor.name)
        if rows is None:
            raise PlanError(f"op {op.name!r} takes {tensor.name!r}, which nothing has made before it.")
        if view is None:
            return Seen(rows, None)
        if view.axis == 0:
            return Seen(picked(rows, view.start, view.stop), None)
        return Seen(rows, None if (view.start, view.stop) == (0, tensor.shape[view.axis]) else view)

    def move(self, op: Op) -> None:
        """Follow an op that only moves rows."""
        made = joined([self.seen(op, i).rows for i in range(len(op.inputs))])
        if op.kind == "slice_rows":
            start, stop, step = (op.integer(key) for key in ("start", "stop", "step"))
            if not 0 <= start < stop <= sum(run.length for run in made) or step < 1:
                raise PlanError(f"op {op.name!r} takes rows {start}:{stop}:{step}, which its input has not.")
            made = joined([picked(made, start, stop, step)])
        out, *_ = (self.graph.tensor[name] for name in op.outputs)
        rests = {(t.shape[1:], t.dtype) for t in (out, *(self.graph.tensor[name] for name in op.inputs))}
        if len(rests) != 1 or length_of(out) != sum(run.length for run in made) or out.role != "activation":
            raise PlanError(f"op {op.name!r} makes {out.name!r} of shape {list(out.shape)} out of other rows.")
        self.held[out.name] = made


def followed(graph: Graph, written: frozenset[str]) -> Followed:
    """The graph that is sliced: what is carried, and what ops make, is itself."""
    whole = Followed(graph, written)
    carries = graph.repeat.carries if graph.repeat else ()
    for name in (name for c in carries for name in (c.inside, c.result)):
        whole.held[name] = all_of(graph.tensor[name])
    for op in graph.ops:
        if whole.moves(op):
            whole.move(op)
        else:
            whole.held |= {name: all_of(graph.tensor[name]) for name in op.outputs}
    return whole


@dataclass(frozen=True, slots=True)
class Batch:
    """How an op may be sliced: `units` of its batch, on `axes` of its inputs (None: a slice takes all of it), with
    `factors` rows a unit of each input and `out_factors` of each output."""

    axes: tuple[int | None, ...]
    units: int
    factors: tuple[int, ...]
    out_factors: tuple[int, ...]


def batch_of(op: Op, graph: Graph) -> Batch | None:
    """How an op of the graph may be sliced, by what its kind declares; None for one that may not."""
    seen, outputs = seen_inputs(op, graph.tensor), [graph.tensor[name] for name in op.outputs]
    axes = batch_axes(op, seen)
    if op.kind in MOVING and len(outputs) == 1:
        return Batch((0,) * len(seen), length_of(outputs[0]), (1,) * len(seen), (1,))
    if axes is None or not all(t.shape for t in outputs) or any(v.axis != axes[i] for i, v in op.views.items()):
        return None
    lengths = [0 if axis is None else t.shape[axis] for t, axis in zip(seen, axes, strict=True)]
    units = math.gcd(*lengths, *(t.shape[0] for t in outputs))
    if not any(lengths) or not units:
        return None
    factors = tuple(length // units for length in lengths)
    return Batch(axes, units, factors, tuple(t.shape[0] // units for t in outputs))
