"""Chains of pointwise ops as one op: what passes between them stays in registers, and their operands move once."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final, NamedTuple

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import PLAIN, Op, Rows, Tensor, seen_inputs, with_rows
from taskgraph.ops import Attrs, work_of
from taskgraph.ops.formula import Applied, Formula, formula, joined
from taskgraph.ops.pointwise import computes_in, formula_of, promoted
from taskgraph.rewrite.rebuild import derived, rebuilt, section

_FORMULAS: Final[Mapping[str, str]] = {"add": "add x0 x1"}
"""Kinds that a formula stands for."""
_ROUNDED: Final[Mapping[str, str]] = {"bf16": "bf16", "f16": "f16"}


class _Pointwise(NamedTuple):
    """An op as a formula of operands: tensors, or rows of them."""

    formula: Formula
    operands: tuple[tuple[str, Rows | None], ...]
    computes_in: str


def fuse_pointwise(graph: Graph) -> Graph:
    """The graph with chains of pointwise ops as one `elementwise` each, which keeps the name and output of the last.

    An op joins the op that takes its result if nobody else takes it, both have one shape, and the formula has room.
    What the op rounded its result to, the longer formula rounds to in its midst: the values are those of `graph`,
    bit by bit. Ops that wait for others by `after`, are waited for, or pin a demand stay as they are. The same Graph
    when nothing joins.
    """
    while (fused := _fused(graph)) is not graph:
        graph = fused
    return graph


def _fused(graph: Graph) -> Graph:
    """One pass: what several ops took may be taken by one after it."""
    made = {i: found for i, op in enumerate(graph.ops) if (found := _pointwise(op, graph.tensor)) is not None}
    number = {graph.ops[i].outputs[0]: i for i in made}
    alone = _alone(graph) & {*number}
    gone: set[int] = set()
    for i in list(made):
        while (more := next(_longer(graph, i, made, number, alone), None)) is not None:
            made[i] = more[0]
            gone.add(more[1])
    return _rebuilt(graph, {i: own for i, own in made.items() if i not in gone}, gone) if gone else graph


def _pointwise(op: Op, tensors: Mapping[str, Tensor]) -> _Pointwise | None:
    """The op as a formula; None for another op, and for one whose work is not by the rule of its kind."""
    if op.kind not in ("elementwise", *_FORMULAS) or op.batch_rows is not None:
        return None
    if work_of(op, tensors) != op.work:
        return None
    made, views = _formula_of(op), op.views
    given = [(name, views.get(i)) for i, name in enumerate(op.inputs)]
    operands = tuple(dict.fromkeys(given))
    made = joined(made, {}, {i: operands.index(operand) for i, operand in enumerate(given)})
    return _Pointwise(made, operands, computes_in(seen_inputs(op, tensors), made))


def _formula_of(op: Op) -> Formula:
    return formula(_FORMULAS[op.kind]) if op.kind in _FORMULAS else formula_of(Attrs(op.attrs))


def _alone(graph: Graph) -> set[str]:
    """The activations that one op takes, whole, and nothing else needs; their makers wait for nothing and nobody waits
    for them."""
    users: dict[str, set[int]] = {}
    part: set[str] = set()
    for i, op in enumerate(graph.ops):
        for slot, name in enumerate(op.inputs):
            users.setdefault(name, set()).add(i)
            if slot in op.views:
                part.add(name)
    awaited = {name for op in graph.ops for name in op.after}
    carries = graph.repeat.carries if graph.repeat else ()
    needed = {*graph.outputs, *part, *(n for c in carries for n in (c.init, c.next, c.inside, c.result))}
    return {
        op.outputs[0]
        for i, op in enumerate(graph.ops)
        if len(op.outputs) == 1 and op.demand == PLAIN and not op.after and op.name not in awaited
        and op.outputs[0] not in needed and len(users.get(op.outputs[0], ())) == 1
        and section(graph, i) == section(graph, min(users[op.outputs[0]]))
    }  # fmt: skip


def _longer(
    graph: Graph, i: int, made: Mapping[int, _Pointwise], number: Mapping[str, int], alone: set[str]
) -> Iterator[tuple[_Pointwise, int]]:
    """Op number `i` with one of the ops joined that make its operands, and that op's number."""
    own, tensors = made[i], graph.tensor
    written = {name for op in graph.ops for name in op.writes}
    for slot, (name, _) in enumerate(own.operands):
        if name not in alone or graph.ops[i].demand != PLAIN:
            continue
        if tensors[name].shape != tensors[graph.ops[i].outputs[0]].shape:
            continue  # it would be computed again for every place that it is repeated to
        inner = made[number[name]]
        rounded = _rounded(inner, tensors[name].dtype, [tensors[n].dtype == "bool" for n, _ in inner.operands])
        if rounded is None or any(operand in written for operand, _ in inner.operands):
            continue
        others = [operand for operand in own.operands if operand[0] != name]
        operands = tuple(dict.fromkeys((*others, *inner.operands)))
        at = {operand: k for k, operand in enumerate(operands)}
        taken = [at[operand] for operand in inner.operands]
        kept = {k: at[operand] for k, operand in enumerate(own.operands) if operand[0] != name}
        try:
            longer = joined(own.formula, {slot: (rounded, taken)}, kept)
        except GraphError:
            continue  # there is no room
        if computes_in([tensors[n] for n, _ in operands], longer) == own.computes_in:
            yield _Pointwise(longer, operands, own.computes_in), number[name]


def _rounded(inner: _Pointwise, dtype: str, truths: list[bool]) -> Formula | None:
    """The formula with the rounding to what the op's result was stored as; None where no step does that. `truths` are
    those of its operands."""
    made, last = inner.formula, f"s{len(inner.formula.steps) - 1}"
    if inner.computes_in == "f32" and dtype in _ROUNDED:
        return Formula((*made.steps, Applied(_ROUNDED[dtype], (last,))), made.inputs)
    if dtype == "bool":
        return made if made.truth(truths) else Formula((*made.steps, Applied("ne", (last, 0.0))), made.inputs)
    return made if dtype == inner.computes_in else None


def _rebuilt(graph: Graph, made: Mapping[int, _Pointwise], gone: set[int]) -> Graph:
    """`graph` without the ops that are gone, and with the longer formulas."""
    ops: list[tuple[int, Op]] = []
    for i, op in enumerate(graph.ops):
        if i in gone:
            continue
        own = made.get(i)
        joined_more = own is not None and len(own.formula.steps) > len(_formula_of(op).steps)
        ops.append((i, _op_of(op, own, graph.tensor) if own is not None and joined_more else op))
    return rebuilt(graph, ops, (), {graph.ops[i].outputs[0] for i in gone})


def _op_of(op: Op, own: _Pointwise, tensors: Mapping[str, Tensor]) -> Op:
    """The op with another formula and operands, and the same output."""
    out = tensors[op.outputs[0]]
    views = {k: rows for k, (_, rows) in enumerate(own.operands) if rows is not None}
    attrs, inputs = {"formula": own.formula.text}, tuple(name for name, _ in own.operands)
    new = replace(op, kind="elementwise", inputs=inputs, attrs=with_rows(attrs, views))
    if promoted(seen_inputs(new, tensors), own.formula) != out.dtype:
        new = replace(new, attrs=with_rows({**attrs, "out_dtype": out.dtype}, views))
    made, found = derived(new, tensors)
    if (found.shape, found.dtype) != (out.shape, out.dtype):
        raise GraphError(f"op {op.name!r} makes another tensor after fusing; this is a bug of fuse_pointwise.")
    return made
