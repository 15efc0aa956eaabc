"""From ops to kernels: which family an op belongs to, and the row of shape numbers that its formula takes.

One rule a kind; an op of any other kind (custom ones too) is a stream of its declared work.
"""

from collections.abc import Callable, Mapping

from taskgraph.cost.families import COLLECTIVE, DECODE, GEMM, PREFILL, STREAM
from taskgraph.cost.formulas import COLLECTIVES
from taskgraph.graph.op import ITEMSIZE, Op, Tensor

Row = tuple[int, str, tuple[float, ...]]
"""(family, dtype whose arithmetic rate counts, shape numbers)."""

Tensors = Mapping[str, Tensor]

ROW_RULES: dict[str, Callable[[Op, Tensors], Row]] = {}
"""kind -> the Row of an op."""


def row_rule(*kinds: str) -> Callable[[Callable[[Op, Tensors], Row]], Callable[[Op, Tensors], Row]]:
    """Register the row rule of `kinds`."""

    def register(rule: Callable[[Op, Tensors], Row]) -> Callable[[Op, Tensors], Row]:
        for kind in kinds:
            ROW_RULES[kind] = rule
        return rule

    return register


def row_of(op: Op, tensors: Tensors) -> Row:
    """The kernel that `op` is for the cost model."""
    rule = ROW_RULES.get(op.kind)
    return _stream(op) if rule is None else rule(op, tensors)


def _stream(op: Op) -> Row:
    work = op.work
    shape = (work.flops, work.hbm_bytes, work.h2d_bytes, work.d2h_bytes, work.link_bytes, 0.0)
    return STREAM, "f32", shape


@row_rule("gemm")
def _(op: Op, tensors: Tensors) -> Row:
    m, k = tensors[op.inputs[0]].shape
    weight = tensors[op.inputs[1]].dtype
    return GEMM, weight, (m, tensors[op.outputs[0]].shape[1], k, ITEMSIZE[weight])


@row_rule("attention")
def _(op: Op, tensors: Tensors) -> Row:
    tokens, heads, dim = tensors[op.inputs[0]].shape
    cache = tensors[op.inputs[2]]
    batch, kv = tensors[op.inputs[1]].shape[0], cache.shape[1]  # a slice of the batch reads its part of the caches
    new, context, size = tokens // batch, op.integer("context"), ITEMSIZE[cache.dtype]
    if new == 1:
        return DECODE, cache.dtype, (batch, context, heads, kv, dim, 0.0, size)
    return PREFILL, cache.dtype, (batch, new, max(context, new), heads, kv, dim, 0.0, size)


@row_rule("decode_attention")
def _(op: Op, tensors: Tensors) -> Row:
    cache = tensors[op.inputs[1]]
    _, batch, length, kv, dim = cache.shape
    return DECODE, cache.dtype, (batch, length, tensors[op.inputs[0]].shape[1], kv, dim, 0.0, ITEMSIZE[cache.dtype])


@row_rule(*COLLECTIVES)
def _(op: Op, tensors: Tensors) -> Row:
    """The whole message is the larger side: what goes in of a reduction, what comes out of a gather."""
    sides = (sum(tensors[name].nbytes for name in names) for names in (op.inputs, op.outputs))
    return COLLECTIVE, "f32", (COLLECTIVES.index(op.kind), op.number("ranks"), max(sides))
