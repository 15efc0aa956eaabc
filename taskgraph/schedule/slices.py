"""Whether a sliced graph computes what its graph does: the checker's own rule, which shares nothing with the rewriter.

Whoever slices a graph is not believed; each result is checked by itself (translation validation, Pnueli, Siegel and
Singerman 1998). From the first op to the last it is followed which rows of which tensor of the graph every tensor of
the sliced graph holds. Ops that only move rows (`concat_rows`, `slice_rows`) may stand anywhere, for that is all they
do. Every other op must be an op of the graph, or a slice of one. The slices of an op, in order, must make all of its
rows, and each must read the rows that its own come from, have their work, wait for what the op waits for, and come to
a state when the op does.
"""

import math
from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

from taskgraph.errors import PlanError
from taskgraph.graph.graph import Carry, Graph
from taskgraph.graph.op import BATCH_ROWS, PLAIN, ROWS, Attr, Op, Rows, Work, seen_inputs
from taskgraph.graph.split import Split
from taskgraph.ops import KINDS, Attrs
from taskgraph.schedule.follow import Batch, Followed, Held, Run, Seen, batch_of, followed, length_of, picked, same

_SAME_WORK = 1e-9
"""Relative difference of works that is none."""


class Interval(NamedTuple):
    """Rows of a tensor that no op makes out of rows: from `first` up to `end`."""

    tensor: str
    first: int
    end: int


def check_slices(graph: Graph, split: Split, sliced: Graph) -> None:
    """PlanError, naming the op or tensor, unless `sliced` computes what `graph` does and slices it as `split` says."""
    if sliced.fingerprint == graph.fingerprint:
        return
    if not split.parts:
        raise PlanError(f"the plan does not split graph {graph.name!r}, yet its ops are other ones.")
    _Checker(graph, split, sliced).run()


# ------------------------------------------------------------------------------------ both graphs


class _Part(NamedTuple):
    """An op of the sliced graph that is units `low` to `high` of op number `number` of the graph, or all of it."""

    made: Op
    number: int
    low: int
    high: int
    whole: bool


class _Checker:
    """One check of `sliced` against `graph`."""

    def __init__(self, graph: Graph, split: Split, sliced: Graph) -> None:
        self.graph, self.split, self.sliced = graph, split, sliced
        self.written = frozenset(name for op in graph.ops for name in op.writes)
        self.whole, self.cut = followed(graph, self.written), Followed(sliced, self.written)
        self.number = {op.name: i for i, op in enumerate(graph.ops)}
        self.batch = [batch_of(op, graph) for op in graph.ops]
        self.maker = {name: i for i, op in enumerate(graph.ops) for name in op.outputs}
        self.names: dict[str, tuple[str, ...]] = {}
        self.parts: dict[str, _Part] = {}

    def run(self) -> None:
        """PlanError at the first thing that is not as in the graph."""
        self._same_border()
        self._find_parts()
        carries = list(self._open_carries())
        for op in self.sliced.ops:
            if op.name in self.parts:
                self._check_part(self.parts[op.name])
            elif self.cut.moves(op):
                self.cut.move(op)
                self._plain(op)
            else:
                raise PlanError(f"op {op.name!r} is neither an op of graph {self.graph.name!r} nor a slice of one.")
        for new, old, low, high in carries:
            self._fed_alike(new, old, low, high)
        for name in self.graph.outputs:
            self._same_tensor(name, "the output")
        self._states_in_order()
        self._independent_places()

    # -- what stays ------------------------------------------------------------------------------

    def _same_border(self) -> None:
        """The name, outputs, given tensors and the repeat are those of the graph."""
        graph, sliced = self.graph, self.sliced
        if (graph.name, graph.outputs) != (sliced.name, sliced.outputs):
            raise PlanError(f"the slices of graph {graph.name!r} have another name or other outputs.")
        given, found = ({t for t in g.tensors if t.role != "activation"} for g in (graph, sliced))
        if other := next(iter(sorted(t.name for t in given ^ found)), None):
            raise PlanError(f"tensor {other!r} is given to the graph or to its slices, but not to both alike.")
        repeats = [None if g.repeat is None else (g.repeat.name, g.repeat.count) for g in (graph, sliced)]
        if repeats[0] != repeats[1]:
            raise PlanError(f"the repeat of graph {graph.name!r} is {repeats[0]}; that of its slices is {repeats[1]}.")

    def _same_tensor(self, name: str, what: str) -> None:
        mine, other = self.graph.tensor[name], self.sliced.tensor[name]
        held = self.cut.held.get(name)
        if mine != other or held is None or not same(held, self.whole.held[name]):
            raise PlanError(f"{what} {name!r} of graph {self.graph.name!r} holds other rows after slicing.")

    # -- which op is what ------------------------------------------------------------------------

    def _find_parts(self) -> None:
        """Every op but those that only move rows is there, whole or as the slices "name#0", "name#1", ..."""
        found: dict[str, list[Op]] = {}
        for op in self.sliced.ops:
            stem, _, mark = op.name.rpartition("#")
            owner = op.name if op.name in self.number else stem if mark.isdecimal() and stem in self.number else None
            if owner is not None and (self._stays(owner) or not self.cut.moves(op)):
                found.setdefault(owner, []).append(op)
        for op in self.graph.ops:
            if self._stays(op.name):
                self._take_parts(op, found.get(op.name, []))

    def _stays(self, name: str) -> bool:
        """Whether an op of the graph must be found in the slices: it does more than move rows, or is waited for."""
        op = self.graph.ops[self.number[name]]
        awaited = any(name in other.after for other in self.graph.ops)
        return not self.whole.moves(op) or bool(op.after) or op.demand != PLAIN or awaited

    def _take_parts(self, op: Op, made: list[Op]) -> None:
        number = self.number[op.name]
        names = tuple(each.name for each in made)
        self.names[op.name] = names
        if names == (op.name,):
            self._as_split(op, (0, 1))
            self.parts[op.name] = _Part(made[0], number, 0, 1, True)
            return
        batch = self.batch[number]
        if len(names) < 2 or names != tuple(f"{op.name}#{k}" for k in range(len(names))):
            raise PlanError(
                f"op {op.name!r} is sliced into {', '.join(map(repr, names)) or 'nothing'}; slices are #0, #1, ..."
            )
        if batch is None:
            raise PlanError(f"op {op.name!r} of kind {op.kind!r} has no batch to slice.")
        borders = (0, *accumulate(self._units(each, op, batch) for each in made))
        multiple = op.integer("split_multiple", 1)
        if borders[-1] != batch.units or any(low % multiple for low in borders[:-1]):
            raise PlanError(
                f"the slices of op {op.name!r} meet at {borders}; it has {batch.units} units, in multiples of "
                f"{multiple}."
            )
        self._as_split(op, borders)
        for each, (low, high) in zip(made, pairwise(borders), strict=True):
            self.parts[each.name] = _Part(each, number, low, high, False)

    def _units(self, made: Op, op: Op, batch: Batch) -> int:
        """The units of its batch that a slice has: by what it makes, or by what it takes if it makes nothing."""
        if made.outputs:
            rows, factor = length_of(self.sliced.tensor[made.outputs[0]]), batch.out_factors[0]
        else:
            i = next(i for i, axis in enumerate(batch.axes) if axis is not None)
            rows, factor = seen_inputs(made, self.sliced.tensor)[i].shape[batch.axes[i] or 0], batch.factors[i]
        if rows % factor:
            raise PlanError(f"op {made.name!r} has {rows} rows, which is no number of units of op {op.name!r}.")
        return rows // factor

    def _as_split(self, op: Op, borders: tuple[int, ...]) -> None:
        """The slices are as many as the plan's split says; fewer only where an op has a part of the batch that the
        sizes are of, and some sizes lie beyond it."""
        batch = self.batch[self.number[op.name]]
        named = next((sizes for names, sizes in self.split.parts if op.name in names), None)
        most = max((len(sizes) for names, sizes in self.split.parts if not names), default=1)
        if named is None and len(borders) - 1 > most:
            raise PlanError(f"op {op.name!r} has {len(borders) - 1} slices; the plan's split says {most} at most.")
        part = batch is not None and named is not None and batch.units < sum(named)
        if named is not None and (len(borders) - 1 > len(named) or (len(borders) - 1 < len(named) and not part)):
            raise PlanError(f"op {op.name!r} has {len(borders) - 1} slices; the plan's split says {len(named)}.")
        if named is not None and sum(named) == borders[-1] > 1 and (0, *accumulate(named)) != borders:
            raise PlanError(f"the slices of op {op.name!r} meet at {borders}; the plan's split says {named}.")

    # -- one op ----------------------------------------------------------------------------------

    def _check_part(self, part: _Part) -> None:
        op, made = self.graph.ops[part.number], part.made
        if (made.kind, made.demand, made.writes) != (op.kind, op.demand, op.writes):
            raise PlanError(f"op {made.name!r} has another kind, demand or written state than op {op.name!r}.")
        if set(made.after) != {name for before in op.after for name in self.names[before]}:
            raise PlanError(f"op {made.name!r} waits for {list(made.after)}, not for all that op {op.name!r} does.")
        if (len(made.inputs), len(made.outputs)) != (len(op.inputs), len(op.outputs)):
            raise PlanError(f"op {made.name!r} has not as many inputs and outputs as op {op.name!r}.")
        if self.cut.moves(made):
            self.cut.move(made)
            self._work(part)
            return
        if _static(made) != _static(op) or (op.batch_rows is not None and made.batch_rows != op.batch_rows):
            raise PlanError(f"op {made.name!r} has other attributes than op {op.name!r}.")
        for i, name in enumerate(op.inputs):
            if self.cut.seen(made, i) != (wanted := self._wanted(part, i)) and not self._alike(made, i, wanted):
                raise PlanError(f"op {made.name!r} takes other rows of {name!r} than its part of op {op.name!r} needs.")
        for i, name in enumerate(op.outputs):
            self._made(part, i, name)
        self._work(part)

    def _alike(self, made: Op, i: int, wanted: Seen) -> bool:
        seen = self.cut.seen(made, i)
        return seen.part == wanted.part and same(seen.rows, wanted.rows)

    def _wanted(self, part: _Part, i: int) -> Seen:
        """What a part of an op must take of the op's input number `i`."""
        op, batch = self.graph.ops[part.number], self.batch[part.number]
        seen = self.whole.seen(op, i)
        axis = None if part.whole or batch is None else batch.axes[i]
        if batch is None or axis is None:
            return seen
        low, high = part.low * batch.factors[i], part.high * batch.factors[i]
        if axis == 0:
            return Seen(picked(seen.rows, low, high), None)
        start = seen.part.start if seen.part is not None else 0
        whole = (start + low, start + high) == (0, self.graph.tensor[op.inputs[i]].shape[axis])
        return Seen(seen.rows, None if whole else Rows(axis, start + low, start + high))

    def _made(self, part: _Part, i: int, name: str) -> None:
        """Output number `i` of a part is its rows of the op's output `name`."""
        old, new = self.graph.tensor[name], self.sliced.tensor[part.made.outputs[i]]
        batch, low, count = self.batch[part.number], 0, length_of(old)
        if not part.whole and batch is not None:
            factor = batch.out_factors[i]
            low, count = part.low * factor, (part.high - part.low) * factor
        shape = (count, *old.shape[1:]) if old.shape else ()
        if (new.shape, new.dtype, new.role) != (shape, old.dtype, old.role) or (part.whole and new != old):
            raise PlanError(
                f"op {part.made.name!r} makes {new.name!r} of {new.dtype}{list(new.shape)}, not its part of {name!r}."
            )
        self.cut.held[new.name] = (Run(name, low, 1, count),)

    def _work(self, part: _Part) -> None:
        """The work of a part: by the rule of the kind where that of the op came from it, else in proportion."""
        op, made, batch = self.graph.ops[part.number], part.made, self.batch[part.number]
        wanted = op.work
        if not part.whole and batch is not None:
            wanted = op.work * ((part.high - part.low) / batch.units)
            if _ruled(op, self.graph) == op.work:
                wanted = _ruled(made, self.sliced) or wanted
        self._has_work(made, wanted)

    def _has_work(self, made: Op, wanted: Work) -> None:
        pairs = zip(made.work.vector, wanted.vector, strict=True)
        if not all(math.isclose(has, needs, rel_tol=_SAME_WORK) for has, needs in pairs):
            raise PlanError(f"op {made.name!r} has {made.work}; its part of the work is {wanted}.")

    def _plain(self, op: Op) -> None:
        """An op that only moves rows, and was not in the graph, asks for nothing and has the work of its rows."""
        if op.after or op.demand != PLAIN or op.writes or op.batch_rows is not None:
            raise PlanError(f"op {op.name!r} only moves rows, yet it waits, demands or writes.")
        self._has_work(op, _ruled(op, self.sliced) or op.work)

    # -- the repeat ------------------------------------------------------------------------------

    def _open_carries(self) -> Iterator[tuple[Carry, Carry, int, int]]:
        """Each carry of the slices with the carry of the graph that it is rows `low` to `high` of."""
        old_repeat, new_repeat = self.graph.repeat, self.sliced.repeat
        if old_repeat is None or new_repeat is None:
            return
        left = list(reversed(new_repeat.carries))
        for old in old_repeat.carries:
            low, length = 0, length_of(self.graph.tensor[old.inside])
            while low < length:
                if not left:
                    raise PlanError(
                        f"rows {low} to {length} of the carry {old.inside!r} are not carried after slicing."
                    )
                new = left.pop()
                high = low + length_of(self.sliced.tensor[new.inside])
                for name, source in ((new.inside, old.inside), (new.result, old.result)):
                    tensor, whole = self.sliced.tensor[name], self.graph.tensor[source]
                    shape = (high - low, *whole.shape[1:]) if whole.shape else ()
                    if high > length or (tensor.shape, tensor.dtype, tensor.role) != (shape, whole.dtype, whole.role):
                        raise PlanError(f"the carried tensor {name!r} is not rows {low} to {high} of {source!r}.")
                    self.cut.held[name] = (Run(source, low, 1, high - low),)
                yield new, old, low, high
                low = high
        if left:
            raise PlanError(f"the carry {left[-1].inside!r} of the slices is none of the graph's.")

    def _fed_alike(self, new: Carry, old: Carry, low: int, high: int) -> None:
        for name, source in ((new.init, old.init), (new.next, old.next)):
            if not same(self.cut.held.get(name, ()), picked(self.whole.held[source], low, high)):
                raise PlanError(
                    f"the carry {new.inside!r} takes {name!r}, which is not rows {low} to {high} of {source!r}."
                )

    # -- states ----------------------------------------------------------------------------------

    def _states_in_order(self) -> None:
        """Ops come to a state that is written in the order of the graph, the slices of one op in theirs."""
        last: dict[str, _Part] = {}
        for op in self.sliced.ops:
            for name in self.written.intersection(op.inputs):
                part, before = self.parts[op.name], last.get(name)
                if before is not None and (part.number, part.low) < (before.number, before.low):
                    raise PlanError(
                        f"op {op.name!r} comes to state {name!r} after {before.made.name!r}, which follows it."
                    )
                last[name] = part

    def _independent_places(self) -> None:
        """Slices whose places in a state are data, and that need not wait for each other by the batch rows that they
        say they stand for, are slices of one writer, or the writer's rows are behind all that the reader may see."""
        placed = [part for part in self.parts.values() if part.made.batch_rows is not None]
        for one, other in combinations(placed, 2):
            shared = self.written.intersection(one.made.inputs, other.made.inputs)
            for state in shared & {*one.made.writes, *other.made.writes}:
                if not _ordered(one.made, other.made, state) and not self._known_apart(one, other, state):
                    raise PlanError(
                        f"ops {one.made.name!r} and {other.made.name!r} share state {state!r} without an order, and "
                        "their rows of the batch do not say that they may."
                    )

    def _known_apart(self, one: _Part, other: _Part, state: str) -> bool:
        old, older = self.graph.ops[one.number], self.graph.ops[other.number]
        if not all(op.kind in KINDS and KINDS[op.kind].ordered for op in (old, older)):
            return False
        if one.number == other.number:
            return True
        if old.batch_rows is not None and older.batch_rows is not None:
            return not _ordered(old, older, state)
        writer, reader = (one, other) if state in old.writes else (other, one)
        if state in self.graph.ops[reader.number].writes:
            return False
        written, read = self._tokens(writer), self._tokens(reader)
        return written is not None and read is not None and written.tensor == read.tensor and written.first >= read.end

    def _tokens(self, part: _Part) -> Interval | None:
        """The rows that a part's batch comes from, followed back through the op that leads each: the first input that
        carries the batch and is no weight or state. None where they come from several tensors."""
        start = self._led_by(part.number, part.low, part.high, part.whole)
        todo, roots = list(start or ()), list[Interval]()
        while todo:
            run = todo.pop()
            low, high = run.first, run.first + (run.length - 1) * run.stride + 1
            maker = self.maker.get(run.tensor)
            batch = None if maker is None else self.batch[maker]
            led: Held | None = None
            if maker is not None and batch is not None:
                factor = batch.out_factors[self.graph.ops[maker].outputs.index(run.tensor)]
                led = self._led_by(maker, low // factor, -(-high // factor), False)
            if led is None:
                roots.append(Interval(run.tensor, low, high))
            else:
                todo += led
        if len({root.tensor for root in roots}) != 1:
            return None
        return Interval(roots[0].tensor, min(root.first for root in roots), max(root.end for root in roots))

    def _led_by(self, number: int, low: int, high: int, whole: bool) -> Held | None:
        """The rows of the leading input of op `number` that its units from `low` to `high` come from."""
        op, batch = self.graph.ops[number], self.batch[number]
        if batch is None:
            return None
        lead = next(
            (
                i
                for i, axis in enumerate(batch.axes)
                if axis == 0 and self.graph.tensor[op.inputs[i]].role in ("activation", "input")
            ),
            None,
        )
        if lead is None:
            return None
        rows, factor = self.whole.seen(op, lead).rows, batch.factors[lead]
        return rows if whole else picked(rows, low * factor, high * factor)


def _static(op: Op) -> dict[str, Attr]:
    """The attributes that no slice changes."""
    return {key: value for key, value in op.attrs if key not in (ROWS, BATCH_ROWS)}


def _ruled(op: Op, graph: Graph) -> Work | None:
    """The work of an op by the rule of its kind; None for a kind without one."""
    if op.kind not in KINDS:
        return None
    outputs = [graph.tensor[name] for name in op.outputs]
    return KINDS[op.kind].work(seen_inputs(op, graph.tensor), outputs, Attrs(op.attrs))


def _ordered(one: Op, other: Op, state: str) -> bool:
    """Whether the rows of the batch that two ops say they stand for make one wait for the other in `state`."""
    spans = []
    for op in (one, other):
        view, span = op.views.get(op.inputs.index(state)), op.batch_rows
        if view is not None or span is None:
            return True  # parts of the state itself: what each takes of it has been checked
        spans.append(Rows(0, span[0] if state in op.writes else 0, span[1]))
    return spans[0].overlaps(spans[1])
