"""Where the batch of a graph is: for every op its units of the batch, and which tokens each of them stands for.

A row of a tensor stands for one or more tokens of the graph's batch. Following that from op to op, a cut of the batch
at a token becomes a cut of each op in its own units: tokens for a product, sequences for attention over caches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor, seen_inputs
from taskgraph.ops import batch_axes


@dataclass(frozen=True, slots=True)
class Run:
    """`count` rows, the i-th of which stands for `width` tokens from token `first + i * stride` on."""

    count: int
    first: int
    stride: int
    width: int

    @property
    def dense(self) -> bool:
        return self.stride == self.width

    @property
    def end(self) -> int:
        return self.first + (self.count - 1) * self.stride + self.width

    def part(self, start: int, stop: int) -> "Run":
        """Rows start to stop."""
        return replace(self, count=stop - start, first=self.first + start * self.stride)

    def rows_before(self, token: int) -> int | None:
        """How many rows stand wholly before `token`; None if it lies within a row."""
        k = min(max((token - self.first - self.width) // self.stride + 1, 0), self.count)
        return None if k < self.count and self.first + k * self.stride < token else k


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens, of a batch of `batch`, that the rows of a tensor stand for: runs in ascending order.

    `root` is the tensor whose rows the batch is, which no op makes out of rows; "" where that is not known. Only
    tokens of one root are known to be the same ones.
    """

    batch: int
    runs: tuple[Run, ...]
    root: str = ""

    @staticmethod
    def own(rows: int) -> "Tokens":
        """A batch of its own: every row is a token."""
        return Tokens(rows, (Run(rows, 0, 1, 1),))

    @property
    def rows(self) -> int:
        return sum(run.count for run in self.runs)

    def same_batch(self, other: "Tokens") -> bool:
        """Whether both are known to be tokens of one batch."""
        return bool(self.root) and (self.root, self.batch) == (other.root, other.batch)

    def part(self, start: int, stop: int) -> "Tokens":
        """The tokens of rows start to stop."""
        runs, at = [], 0
        for run in self.runs:
            low, high = max(start - at, 0), min(stop - at, run.count)
            if low < high:
                runs.append(run.part(low, high))
            at += run.count
        return replace(self, runs=tuple(runs))

    def sampled(self, start: int, stop: int, step: int) -> "Tokens":
        """The tokens of rows start, start + step, ... before stop."""
        if step == 1:
            return self.part(start, stop)
        count = len(range(start, stop, step))
        if len(self.runs) > 1:
            return Tokens.own(count)
        run = self.runs[0]
        return replace(self, runs=(Run(count, run.first + start * run.stride, run.stride * step, run.width),))

    def grouped(self, rows: int) -> "Tokens":
        """The tokens of units of `rows` rows each."""
        if rows == 1:
            return self
        if any(run.count % rows or not run.dense for run in self.runs):
            return Tokens.own(self.rows // rows)
        runs = (Run(run.count // rows, run.first, run.stride * rows, run.width * rows) for run in self.runs)
        return replace(self, runs=tuple(runs))

    def ungrouped(self, rows: int) -> "Tokens":
        """The tokens of rows of which every one of these has `rows`."""
        if rows == 1:
            return self
        if any(run.width % rows or not run.dense for run in self.runs):
            return Tokens.own(self.rows * rows)
        runs = (Run(run.count * rows, run.first, run.stride // rows, run.width // rows) for run in self.runs)
        return replace(self, runs=tuple(runs))

    def rows_before(self, token: int) -> int | None:
        """The cut of the rows that cuts the batch at `token`; None if it would cut a row."""
        counts = [run.rows_before(token) for run in self.runs]
        return None if None in counts else sum(c for c in counts if c is not None)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of the rows of all `parts`, one after another."""
    runs: list[Run] = []
    for run in (run for part in parts for run in part.runs):
        last = runs[-1] if runs else None
        if last is not None and run.first < last.end:
            return Tokens.own(sum(part.rows for part in parts))
        if last is not None and last.dense and run.dense and (last.end, last.width) == (run.first, run.width):
            runs[-1] = replace(last, count=last.count + run.count)
        else:
            runs.append(run)
    if len({part.batch for part in parts}) > 1:
        return Tokens.own(sum(part.rows for part in parts))
    roots = {part.root for part in parts}
    return Tokens(parts[0].batch, tuple(runs), parts[0].root if len(roots) == 1 else "")


@dataclass(frozen=True, slots=True)
class OpBatch:
    """How an op carries the batch: `units` of it, on `axes` of its inputs (None: whole), `factor` rows a unit of each
    input and `out_factor` of each output. Slices are multiples of `multiple` units; `tokens` are those of the units."""

    axes: tuple[int | None, ...]
    units: int
    factors: tuple[int, ...]
    out_factors: tuple[int, ...]
    multiple: int
    tokens: Tokens


def moves_rows(op: Op) -> bool:
    """Whether the op only says which rows follow which: slices of its neighbours can do without it."""
    return op.kind == "concat_rows" or (op.kind == "slice_rows" and op.integer("step") == 1)


def batches(graph: Graph) -> dict[str, OpBatch]:
    """How each op carries the batch, by op name; ops that carry none are absent."""
    found: dict[str, OpBatch] = {}
    known: dict[str, Tokens] = {}
    entering = {c.inside: c.init for c in graph.repeat.carries} if graph.repeat else {}
    leaving = {c.result: c.next for c in graph.repeat.carries} if graph.repeat else {}

    def tokens(tensor: Tensor, axis: int) -> Tokens:
        if axis > 0:
            return Tokens.own(tensor.shape[axis])
        if tensor.name in known:
            return known[tensor.name]
        source = entering.get(tensor.name) or leaving.get(tensor.name) or tensor.name
        return replace(known.get(source, Tokens.own(tensor.shape[0])), root=tensor.name)

    written = {name for op in graph.ops for name in op.writes}
    for op in graph.ops:
        if op.kind in ("slice_rows", "concat_rows") and written.intersection(op.inputs):
            continue  # its rows change: they are taken when the op stands there, not when somebody needs them
        whole = [graph.tensor[name] for name in op.inputs]
        seen = seen_inputs(op, graph.tensor)
        outputs = [graph.tensor[name] for name in op.outputs]
        axes = batch_axes(op, seen)
        if axes is None or any(v.axis != axes[i] for i, v in op.views.items()) or not all(t.shape for t in outputs):
            continue
        where = {}
        for i, axis in enumerate(axes):
            if axis is not None:
                view = op.views.get(i)
                at = tokens(whole[i], axis)
                where[i] = at if view is None else at.part(view.start, view.stop)
        made = _op_batch(op, seen, outputs, axes, where)
        if made is not None:
            found[op.name] = made
            for t, factor in zip(outputs, made.out_factors, strict=True):
                known[t.name] = made.tokens.ungrouped(factor)
    return found


def _op_batch(
    op: Op,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    axes: tuple[int | None, ...],
    where: Mapping[int, Tokens],
) -> OpBatch | None:
    multiple = op.integer("split_multiple", 1)
    if op.kind in ("slice_rows", "concat_rows"):
        rows = outputs[0].shape[0]
        at = joined([where[i] for i in range(len(inputs))])
        if op.kind == "slice_rows":
            at = where[0].sampled(op.integer("start"), op.integer("stop"), op.integer("step"))
        return OpBatch(axes, rows, (1,) * len(inputs), (1,), multiple, at)
    lengths = [t.shape[a] for t, a in zip(inputs, axes, strict=True) if a is not None]
    if not lengths:
        return None
    units = math.gcd(*lengths, *(t.shape[0] for t in outputs))
    factors = tuple(0 if a is None else t.shape[a] // units for t, a in zip(inputs, axes, strict=True))
    leader = min((i for i in where if inputs[i].role in ("activation", "input")), default=min(where))
    at = where[leader].grouped(factors[leader])
    return OpBatch(axes, units, factors, tuple(t.shape[0] // units for t in outputs), multiple, at)
