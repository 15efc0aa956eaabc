"""Nano-batching: ops split along their batch into slices that the planner may overlap (NanoFlow, Zhu et al. 2025).

A tensor that a split op makes is a list of pieces. A consumer that wants some rows takes them in place where they
lie within one piece, and from a `concat_rows` where they do not. Weights are read once a slice, so the work rules
of the kinds, applied to the slices, say what splitting costs.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Carry, Graph, Repeat
from taskgraph.graph.op import BATCH_ROWS, Attr, Op, Rows, Tensor, Work, with_rows
from taskgraph.graph.split import Sizes, Split
from taskgraph.ops import KINDS, work_of
from taskgraph.rewrite.batch import OpBatch, batches, moves_rows

Bounds = tuple[int, ...]
"""The borders of slices: 0, the cuts, the end."""


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """An op that can be split: into slices of multiples of `multiple` that sum to `units`, its own batch (tokens for a
    product, sequences for attention over caches). `batch` is the size of the graph's batch that they are part of."""

    units: int
    multiple: int
    batch: int


def split_batch(graph: Graph, sizes: Sizes | Mapping[str, Sizes], ops: Iterable[str] | None = None) -> Graph:
    """The graph with `ops` (default: all that can) split along the batch into slices of `sizes`.

    Sizes sum to the batch of the graph (tokens), to the number of its sequences, or, for ops that are named, to
    the op's own units (`splittable`); a mapping gives every op its own. Slice k of op "up" is "up#k"; outputs keep
    their names. Where the sizes cut through a unit of an op that was not named (a sequence of an attention), it is
    left whole there. GraphError when sizes do not fit, or a named op cannot be split.
    """
    return apply(graph, Split.of(sizes, ops))


def splittable(graph: Graph) -> dict[str, SplitInfo]:
    """The ops that can be split into at least two slices, by name; ops that only move rows follow the others."""
    if graph.repeat is not None and _only_moves_rows(graph, graph.repeat):
        return {}
    moving = {op.name for op in graph.ops if moves_rows(op)}
    return {
        name: SplitInfo(b.units, b.multiple, b.tokens.batch)
        for name, b in batches(graph).items()
        if b.units >= 2 * b.multiple and name not in moving
    }


def apply(graph: Graph, split: Split) -> Graph:
    """The graph that `split` makes of `graph`; the same Graph when there is nothing to split.

    A graph whose repeat only moves rows stays whole: nothing would be left to repeat. GraphError where ops are named.
    """
    repeat = graph.repeat
    if repeat is not None and _only_moves_rows(graph, repeat):
        if named := next((names[0] for names, _ in split.parts if names), None):
            raise GraphError(
                f"op {named!r} cannot be split: repeat {repeat.name!r} of graph {graph.name!r} only moves rows, and "
                "nothing would be left to repeat. Write the repeat out with Graph.flat() first."
            )
        return graph
    found = batches(graph)
    bounds = _bounds(graph, found, split)
    return _Rewriter(graph, found, bounds).run() if bounds else graph


def _only_moves_rows(graph: Graph, repeat: Repeat) -> bool:
    """Whether nothing would be left to repeat if what moves rows were dissolved."""
    return all(moves_rows(op) for op in graph.ops[repeat.first : repeat.last])


# ------------------------------------------------------------------------------------- what to cut


def _bounds(graph: Graph, found: Mapping[str, OpBatch], split: Split) -> dict[str, Bounds]:
    """The borders of the slices of every op that is cut, in its units."""
    moving = {op.name for op in graph.ops if moves_rows(op)}
    free = {name: b for name, b in found.items() if name not in moving}
    result: dict[str, Bounds] = {}
    named: set[str] = set()
    for names, sizes in sorted(split.parts, key=lambda part: not part[0]):
        _check_sizes(sizes)
        for name in names:
            if name in named:
                raise GraphError(f"op {name!r} is given two slicings; name it once.")
            named.add(name)
            result[name] = _named_bounds(name, _splittable_op(name, graph, free), sizes)
        if not names:
            common = _common_bounds(graph.name, free, sizes)
            result |= {name: cuts for name, cuts in common.items() if name not in named}
    return {name: cuts for name, cuts in result.items() if len(cuts) > 2}


def _check_sizes(sizes: Sizes) -> None:
    if not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise GraphError(f"sizes {tuple(sizes)} must be positive ints, one a slice.")


def _splittable_op(name: str, graph: Graph, free: Mapping[str, OpBatch]) -> OpBatch:
    if name in free:
        return free[name]
    op = next((op for op in graph.ops if op.name == name), None)
    if op is None:
        near = difflib.get_close_matches(name, [op.name for op in graph.ops], 3) or [op.name for op in graph.ops[:3]]
        raise GraphError(f"graph {graph.name!r} has no op {name!r}; near it are {', '.join(map(repr, near))}.")
    way = "it follows the slices of its neighbours by itself" if moves_rows(op) else "leave it out"
    if op.kind == "call":
        way = "call its function as a Splittable if it may run on slices"
    raise GraphError(f"op {name!r} of kind {op.kind!r} cannot be split along a batch; {way}.")


def _named_bounds(name: str, batch: OpBatch, sizes: Sizes) -> Bounds:
    """The borders for an op that was named: all must be kept."""
    total = sum(sizes)
    cuts: list[int | None] = [*accumulate(sizes[:-1])]
    if total != batch.units:
        if batch.tokens.batch % total:
            raise GraphError(
                f"sizes {tuple(sizes)} sum to {total}; op {name!r} has {batch.units} units of a batch of "
                f"{batch.tokens.batch}. Make them sum to one of these."
            )
        cuts = [batch.tokens.rows_before(c * batch.tokens.batch // total) for c in cuts if c is not None]
    if any(cut is None or cut % batch.multiple for cut in cuts):
        raise GraphError(
            f"sizes {tuple(sizes)} cut op {name!r} within a unit: it has {batch.units} units and takes multiples of "
            f"{batch.multiple}. Choose other sizes, or do not name it."
        )
    return _borders(batch, cuts)


def _common_bounds(graph: str, free: Mapping[str, OpBatch], sizes: Sizes) -> dict[str, Bounds]:
    """The borders for all ops from sizes of the graph's batch: those that do not fall between units are left out."""
    total, tokens = sum(sizes), list(accumulate(sizes))[:-1]
    known = {b.tokens.batch for b in free.values()} | {b.units for b in free.values()}
    if total not in known:
        offered = ", ".join(map(str, sorted(known - {1}, reverse=True)[:6])) or "none"
        raise GraphError(f"sizes {tuple(sizes)} sum to {total}; the batches of graph {graph!r} are {offered}.")
    result = {}
    for name, b in free.items():
        if b.tokens.batch % total == 0:
            cuts = [b.tokens.rows_before(token * b.tokens.batch // total) for token in tokens]
            result[name] = _borders(b, [cut for cut in cuts if cut is not None and cut % b.multiple == 0])
    return result


def _borders(batch: OpBatch, cuts: Iterable[int | None]) -> Bounds:
    return tuple(sorted({0, batch.units, *(cut for cut in cuts if cut is not None)}))


# ------------------------------------------------------------------------------------- the new graph


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows start to stop of a tensor, which are the rows from `first` on of the tensor `name` of the new graph."""

    start: int
    stop: int
    name: str
    first: int

    def part(self, start: int, stop: int) -> "_Piece":
        low, high = max(start, self.start), min(stop, self.stop)
        return _Piece(low, high, self.name, self.first + low - self.start)


class _Rewriter:
    """Builds the new graph op by op. Ops stand in three sections: before, inside and after the repeat."""

    def __init__(self, graph: Graph, found: Mapping[str, OpBatch], bounds: Mapping[str, Bounds]) -> None:
        self.graph, self.found, self.bounds = graph, found, bounds
        self.tensors = {t.name: t for t in graph.tensors if t.role != "activation"}
        self.sections: tuple[list[Op], list[Op], list[Op]] = ([], [], [])
        self.phase = 0
        self.prefix = graph.repeat.name + "/" if graph.repeat else ""
        self.pieces: dict[str, tuple[_Piece, ...]] = {}
        self.virtual: dict[str, Op] = {}
        self.stem = {name: op.name for op in graph.ops for name in op.outputs}
        self.parts_of: dict[str, tuple[str, ...]] = {}
        self.joins: dict[tuple[str, int, int], str] = {}
        self.taken = {op.name for op in graph.ops}
        self.awaited = {name for op in graph.ops for name in op.after}
        self.writers: dict[str, list[str]] = {}
        for op in graph.ops:
            for name in op.writes if _ordered(op) and op.name in found else ():
                self.writers.setdefault(name, []).append(op.name)

    def run(self) -> Graph:
        graph, repeat = self.graph, self.graph.repeat
        first, last = (repeat.first, repeat.last) if repeat else (0, 0)
        self._emit(graph.ops[:first])
        new = None
        if repeat:
            opened = [self._open(carry) for carry in repeat.carries]
            self.phase = 1
            self._emit(graph.ops[first:last])
            carries = tuple(c for row in opened for c in self._close(row))
            new = Repeat(repeat.name, repeat.count, 0, 0, carries)
            self.phase = 2
        self._emit(graph.ops[last:])
        for name in graph.outputs:
            self._own(name)
        before, body, after = self.sections
        if new is not None:
            new = replace(new, first=len(before), last=len(before) + len(body))
        return Graph(graph.name, tuple(self.tensors.values()), (*before, *body, *after), graph.outputs, new)

    def _emit(self, ops: Sequence[Op]) -> None:
        for op in ops:
            plain = not op.after and op.name not in self.awaited and op.demand == type(op.demand)()
            if op.name in self.found and moves_rows(op) and plain:
                self._dissolve(op)
            else:
                self._slices(op)

    def _dissolve(self, op: Op) -> None:
        """An op that only moves rows becomes pieces of its own; it is made only where someone needs its tensor."""
        self.virtual[op.outputs[0]] = op
        self.stem[op.outputs[0]] = op.name
        pieces: list[_Piece] = []
        for i, source in enumerate(op.inputs):
            low, high = self._moved(op, i)
            for piece in self._covering(source, low, high):
                at = pieces[-1].stop if pieces else 0
                pieces.append(replace(piece, start=at, stop=at + piece.stop - piece.start))
        self.pieces[op.outputs[0]] = tuple(pieces)

    def _slices(self, op: Op) -> None:
        """Append the slices of `op`, or `op` itself, with the inputs that they take."""
        batch = self.found.get(op.name)
        borders = self.bounds.get(op.name) or (0, batch.units if batch else 1)
        count = len(borders) - 1
        names: list[str] = []
        for k, (low, high) in enumerate(pairwise(borders)):
            mark = f"#{k}" if count > 1 else ""
            inputs, views, attrs = self._inputs(op, (low, high) if count > 1 else None)
            attrs = {**self._batch_rows(op, low, high), **attrs}
            outputs = [self._output(name, i, batch, (low, high), mark) for i, name in enumerate(op.outputs)]
            made = replace(
                op,
                name=op.name + mark,
                inputs=tuple(inputs),
                outputs=tuple(t.name for t in outputs),
                after=tuple(part for name in op.after for part in self.parts_of.get(name, (name,))),
                attrs=with_rows(attrs, views),
            )
            if count > 1:
                share = (high - low) / borders[-1]
                made = replace(made, work=self._work(op, made, share))
            self.sections[self.phase].append(made)
            names.append(made.name)
        self.parts_of[op.name] = tuple(names)

    def _batch_rows(self, op: Op, low: int, high: int) -> dict[str, Attr]:
        """The rows of the batch that units low to high of an op stand for, if those order what it does to its states:
        one op, of the same batch, writes them all. A slice of a slice keeps the rows that it has."""
        batch = self.found.get(op.name)
        if not _ordered(op) or batch is None:
            return {}
        for state in (name for name in op.inputs if self.graph.tensor[name].role == "state"):
            writers = self.writers.get(state, [])
            if len(writers) != 1 or not self.found[writers[0]].tokens.same_batch(batch.tokens):
                return {}
        runs = batch.tokens.part(low, high).runs
        return {BATCH_ROWS: (runs[0].first, runs[-1].end)}

    def _output(self, name: str, i: int, batch: OpBatch | None, units: tuple[int, int], mark: str) -> Tensor:
        tensor = self.graph.tensor[name]
        if mark and batch is not None:
            low, high = (n * batch.out_factors[i] for n in units)
            tensor = replace(tensor, name=name + mark, shape=(high - low, *tensor.shape[1:]))
            self.pieces[name] = (*self.pieces.get(name, ()), _Piece(low, high, tensor.name, 0))
        self.tensors[tensor.name] = tensor
        return tensor

    def _inputs(self, op: Op, units: tuple[int, int] | None) -> tuple[list[str], dict[int, Rows], Mapping[str, Attr]]:
        """Names and rows of the inputs of a slice of `op` (None: of all of it), and its attributes."""
        batch, attrs = self.found.get(op.name), dict(op.attrs)
        inputs, views = [], {}
        for i, source in enumerate(op.inputs):
            axis = (batch.axes[i] if batch else None) or 0
            given = op.views.get(i)
            if given is not None and given.axis != axis:
                axis = given.axis
            carries = batch is not None and batch.axes[i] is not None
            low, high = self._rows(op, i, units if carries else None, axis)
            name, view = self._take(source, axis, low, high)
            if view is not None and op.kind != "call" and op.kind not in KINDS and given is None:
                name, view = self._copied(source, low, high), None
            inputs.append(name)
            if view is not None:
                views[i] = view
        if op.kind == "slice_rows" and units is not None:
            attrs |= {"start": 0, "stop": high - low}
        return inputs, views, attrs

    def _rows(self, op: Op, i: int, units: tuple[int, int] | None, axis: int = 0) -> tuple[int, int]:
        """The rows of input i that `units` of the op need (None: all that it takes)."""
        given = op.views.get(i)
        if given is not None:
            first, last = given.start, given.stop
        else:
            first, last = 0, _length(self.graph.tensor[op.inputs[i]], axis)
        if units is None:
            return first, last
        if op.kind == "slice_rows":
            start, step = op.integer("start"), op.integer("step")
            return first + start + units[0] * step, first + start + (units[1] - 1) * step + 1
        factor = self.found[op.name].factors[i]
        return first + units[0] * factor, first + units[1] * factor

    def _moved(self, op: Op, i: int) -> tuple[int, int]:
        """The rows of input i that an op makes its own of, if all it does is to move them."""
        first, last = self._rows(op, i, None)
        return (first + op.integer("start"), first + op.integer("stop")) if op.kind == "slice_rows" else (first, last)

    def _work(self, op: Op, made: Op, share: float) -> Work:
        """By the rule of the kind where the op's work came from it, else in proportion."""
        ruled = work_of(made, self.tensors) if work_of(op, self.graph.tensor) == op.work else None
        return op.work * share if ruled is None else ruled

    # -- rows of tensors -------------------------------------------------------------------------

    def _covering(self, tensor: str, start: int, stop: int) -> list[_Piece]:
        """The pieces that hold rows start to stop, cut to them."""
        whole = (_Piece(0, _length(self.graph.tensor[tensor], 0), tensor, 0),)
        held = self.pieces.get(tensor, whole)
        return [p.part(start, stop) for p in held if p.start < stop and start < p.stop]

    def _take(self, tensor: str, axis: int, start: int, stop: int) -> tuple[str, Rows | None]:
        """A tensor of the new graph and the rows of it (None: all) that are rows start to stop of `tensor`."""
        declared = self.graph.tensor[tensor]
        if axis > 0:
            name = self._copied(tensor, 0, declared.shape[0])
            return name, None if (start, stop) == (0, declared.shape[axis]) else Rows(axis, start, stop)
        covering = self._covering(tensor, start, stop)
        if len(covering) > 1:
            return self._joined(tensor, start, stop, covering), None
        (piece,) = covering
        held = _length(self.tensors[piece.name], 0)
        if stop - start == held:
            return piece.name, None
        return piece.name, Rows(0, piece.first, piece.first + stop - start)

    def _copied(self, tensor: str, start: int, stop: int) -> str:
        """A tensor of the new graph that is rows start to stop of `tensor`, copied if it is only part of one."""
        name, view = self._take(tensor, 0, start, stop)
        return name if view is None else self._joined(tensor, start, stop, self._covering(tensor, start, stop))

    def _own(self, tensor: str) -> None:
        """Make `tensor` itself, under its name."""
        stop = _length(self.graph.tensor[tensor], 0)
        if tensor not in self.tensors:
            self._joined(tensor, 0, stop, self._covering(tensor, 0, stop))

    def _joined(self, tensor: str, start: int, stop: int, covering: Sequence[_Piece]) -> str:
        """Append the op that copies these pieces into one tensor, once; the tensor's name."""
        key = (tensor, start, stop)
        if key in self.joins:
            return self.joins[key]
        declared = self.graph.tensor[tensor]
        whole = stop - start == _length(declared, 0)
        stem = self.stem.get(tensor, tensor)
        if whole:
            name, out = self.virtual[tensor].name if tensor in self.virtual else self._free(f"{stem}#join"), declared
        else:
            name = self._free(f"{stem}#join.{start}.{stop}")
            out = replace(declared, name=f"{name}.out", role="activation", shape=(stop - start, *declared.shape[1:]))
        inputs = tuple(p.name for p in covering)
        if len(covering) == 1:
            (part,) = covering
            attrs: Mapping[str, Attr] = {"start": part.first, "stop": part.first + part.stop - part.start, "step": 1}
            op = Op(name, "slice_rows", inputs, (out.name,), Work(), attrs=with_rows(attrs, {}))
        else:
            cut = {i: p for i, p in enumerate(covering) if p.stop - p.start != self.tensors[p.name].shape[0]}
            views = {i: Rows(0, p.first, p.first + p.stop - p.start) for i, p in cut.items()}
            op = Op(name, "concat_rows", inputs, (out.name,), Work(), attrs=with_rows({}, views))
        self.tensors[out.name] = out
        op = replace(op, work=work_of(op, self.tensors) or op.work)
        self.sections[self._section(tensor)].append(op)
        self.joins[key] = out.name
        return out.name

    def _free(self, name: str) -> str:
        """`name`, numbered when the graph has such an op already: it may be the result of an earlier split."""
        found, number = name, 1
        while found in self.taken:
            number += 1
            found = f"{name}#{number}"
        self.taken.add(found)
        return found

    def _section(self, tensor: str) -> int:
        """Where ops on `tensor` stand: with its producer, so that what a repeat only reads is joined once."""
        return self.phase if self.phase != 1 or tensor.startswith(self.prefix) else 0

    # -- carries -------------------------------------------------------------------------------------

    def _open(self, carry: Carry) -> list[tuple[Carry, int, int]]:
        """The carries that stand for `carry`, one a piece of what feeds it, with their rows."""
        length = _length(self.graph.tensor[carry.inside], 0)
        borders = sorted({0, length, *self._borders_of(carry.next, frozenset())})
        rows: list[tuple[Carry, int, int]] = []
        for k, (low, high) in enumerate(pairwise(borders)):
            mark = f"#{k}" if len(borders) > 2 else ""
            new = Carry(self._copied(carry.init, low, high), carry.inside + mark, carry.next, carry.result + mark)
            rows.append((new, low, high))
            for name in (carry.inside, carry.result):
                declared = self.graph.tensor[name]
                shape = (high - low, *declared.shape[1:]) if mark else declared.shape
                self.tensors[name + mark] = replace(declared, name=name + mark, shape=shape)
                self.pieces[name] = (*self.pieces.get(name, ()), _Piece(low, high, name + mark, 0))
        return rows

    def _close(self, rows: Sequence[tuple[Carry, int, int]]) -> list[Carry]:
        return [replace(carry, next=self._copied(carry.next, low, high)) for carry, low, high in rows]

    def _borders_of(self, tensor: str, seen: frozenset[str]) -> set[int]:
        """The rows at which the slices of what makes `tensor` in the repeat meet."""
        repeat = self.graph.repeat
        if repeat is None or tensor in seen:
            return set()
        source = next((c.next for c in repeat.carries if c.inside == tensor), None)
        if source is not None:
            return self._borders_of(source, seen | {tensor})
        op = next((op for op in self.graph.ops[repeat.first : repeat.last] if tensor in op.outputs), None)
        if op is None or op.name not in self.found:
            return set()
        if not moves_rows(op):
            factor = self.found[op.name].out_factors[op.outputs.index(tensor)]
            return {cut * factor for cut in self.bounds.get(op.name, ())}
        result, at = set[int](), 0
        for i, name in enumerate(op.inputs):
            low, high = self._moved(op, i)
            inner = self._borders_of(name, seen | {tensor})
            result |= {at, *(at + cut - low for cut in inner if low <= cut <= high)}
            at += high - low
        return result


def _ordered(op: Op) -> bool:
    """Whether the places of the op's rows in its states are data."""
    kind = KINDS.get(op.kind)
    return kind is not None and kind.ordered


def _length(tensor: Tensor, axis: int) -> int:
    return tensor.shape[axis] if tensor.shape else 1
