"""From ops to kernels: which family an op belongs to, and the row of shape numbers that its formula takes.

One rule a kind, over the inputs as the op sees them (a slice sees its rows of a tensor) and its outputs; an op of any
other kind (custom ones too) is a stream of its declared work.
"""

from collections.abc import Callable, Mapping, Sequence

from taskgraph.cost.families import COLLECTIVE, DECODE, GEMM, MOE, PREFILL, STREAM
from taskgraph.cost.formulas import COLLECTIVES
from taskgraph.graph.op import ITEMSIZE, Op, Tensor, seen_inputs

Row = tuple[int, str, tuple[float, ...]]
"""(family, dtype whose arithmetic rate counts, shape numbers)."""

Tensors = Sequence[Tensor]
Rule = Callable[[Op, Tensors, Tensors], Row]

ROW_RULES: dict[str, Rule] = {}
"""kind -> the Row of an op from its inputs and outputs."""


def row_rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Register the row rule of `kinds`."""

    def register(rule: Rule) -> Rule:
        for kind in kinds:
            ROW_RULES[kind] = rule
        return rule

    return register


def row_of(op: Op, tensors: Mapping[str, Tensor]) -> Row:
    """The kernel that `op` is for the cost model."""
    rule = ROW_RULES.get(op.kind)
    if rule is None:
        return _stream(op)
    return rule(op, seen_inputs(op, tensors), [tensors[name] for name in op.outputs])


def _stream(op: Op) -> Row:
    work = op.work
    shape = (work.flops, work.hbm_bytes, work.h2d_bytes, work.d2h_bytes, work.link_bytes, 0.0)
    return STREAM, "f32", shape


@row_rule("gemm")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    x, weight = ins[:2]
    m, k = x.shape
    return GEMM, weight.dtype, (m, outs[0].shape[1], k, ITEMSIZE[weight.dtype])


@row_rule("attention")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    tokens, heads, dim = ins[0].shape
    cache = ins[2]
    batch, kv = cache.shape[:2]
    new, context, size = tokens // batch, op.integer("context"), ITEMSIZE[cache.dtype]
    if new == 1:
        return DECODE, cache.dtype, (batch, context, heads, kv, dim, 0.0, size)
    return PREFILL, cache.dtype, (batch, new, max(context, new), heads, kv, dim, 0.0, size)


@row_rule("decode_attention")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    q, cache = ins
    _, batch, length, kv, dim = cache.shape
    return DECODE, cache.dtype, (batch, length, q.shape[1], kv, dim, 0.0, ITEMSIZE[cache.dtype])


@row_rule("paged_decode")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    (batch, heads, dim), pages = ins[0].shape, ins[3]
    shape = (batch, op.integer("context"), heads, pages.shape[1], dim, 0.0, ITEMSIZE[pages.dtype])
    return DECODE, pages.dtype, shape


@row_rule("paged_prefill")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    (tokens, heads, dim), sequences, pages = ins[0].shape, ins[2].shape[0], ins[4]
    new, context = max(tokens / sequences, 1.0), op.integer("context")
    shape = (sequences, new, max(context, new), heads, pages.shape[1], dim, 0.0, ITEMSIZE[pages.dtype])
    return PREFILL, pages.dtype, shape


@row_rule(*COLLECTIVES)
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    """The whole message is the larger side: what goes in of a reduction, what comes out of a gather."""
    sides = (sum(t.nbytes for t in side) for side in (ins, outs))
    return COLLECTIVE, "f32", (COLLECTIVES.index(op.kind), op.number("ranks"), max(sides))


@row_rule("experts")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    """The measured kernels route too, so a `route` beside this one is counted twice: a few microseconds."""
    (tokens, hidden), (held, _, inner) = ins[0].shape, ins[3].shape
    dtype, ranks = ins[2].dtype, op.integer("ranks")
    return MOE, dtype, (tokens, hidden, inner, op.integer("top_k"), held * ranks, ranks, 0.0, ITEMSIZE[dtype])


LATENT_EFFICIENCY = 660 / 989
"""Share of the tensor cores' rate that latent attention reaches when arithmetic binds it: FlashMLA's 660 TFLOPS of
the H800's 989 (published, github.com/deepseek-ai/FlashMLA)."""


@row_rule("latent_attention", "paged_latent_decode", "paged_latent_prefill")
def _(op: Op, ins: Tensors, outs: Tensors) -> Row:
    """No table measures it: its work as a stream whose arithmetic runs on tensor cores."""
    family, _, (flops, *moved) = _stream(op)
    return family, ins[0].dtype, (flops / LATENT_EFFICIENCY, *moved)
