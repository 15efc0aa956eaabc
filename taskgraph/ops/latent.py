"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one low-rank vector a token, from
which every head's keys and values are products, and one rotated key that all heads share.

The cache is static, (batch, len, rank + rotary), or in pages, (pages, page size, rank + rotary), whose places, lengths
and block tables are those of `taskgraph.ops.paged`.
"""

import math

from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Attr, Work
from taskgraph.ops.paged import need_chunk_tables, need_decode_tables, need_int32
from taskgraph.ops.rules import (
    IN_TURN,
    SPLIT_RULES,
    Outputs,
    apply,
    axis_of,
    integer,
    moved,
    numbered,
    shape_rule,
    work_rule,
)
from taskgraph.ops.signatures import YARN, Attrs, Shapes, need, need_floats, need_integers

SPLIT_RULES |= {
    "latent_rope": (0, 0, None, 0, 0),
    "latent_attention": (0, 0, 0, None),
    "paged_latent_rope": (0, 0, None, 0, 0, None),
    "paged_latent_decode": (0, 0, 0, None, None),
    "paged_latent_prefill": (None, None, None, None, None, None),
}
IN_TURN |= {"paged_latent_rope", "paged_latent_decode"}


# ------------------------------------------------------------------------- rotating and writing


@shape_rule("latent_rope")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q, _, _, positions, latents = ins
    made = _rotated("latent_rope", ins, attrs)
    need_integers("latent_rope", ins, positions)
    _need_sequences("latent_rope", ins, q.shape[0], positions.shape, latents.shape[0])
    return made


@shape_rule("paged_latent_rope")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q, _, _, positions, slots, _ = ins
    made = _rotated("paged_latent_rope", ins, attrs)
    need_int32("paged_latent_rope", ins, 3, 4)
    need(positions.shape == slots.shape == q.shape[:1], "paged_latent_rope", ins, "a position and a slot a token")
    return made


def _rotated(kind: str, ins: Shapes, attrs: Attrs) -> Outputs:
    q, kv, norm, *_, latents = ins
    heads, rotary = integer(attrs, "heads"), integer(attrs, "rotary")
    need_floats(kind, ins, q, kv, norm, latents)
    need(heads >= 1, kind, ins, "it takes at least one head")
    need(len(latents.shape) == 3, kind, ins, "the cache is (batch, len, rank + rotary), or pages of so many")
    need(len(q.shape) == 2 and q.shape[1] % heads == 0, kind, ins, f"q must hold {heads} equal heads")
    need(0 < rotary < latents.shape[2] and rotary % 2 == 0, kind, ins, f"{rotary} rotary channels do not fit")
    need(q.shape[1] // heads >= rotary, kind, ins, f"a head of q is shorter than {rotary} rotary channels")
    need(kv.shape == (q.shape[0], latents.shape[2]), kind, ins, "kv must be (tokens, rank + rotary)")
    need(norm.shape == (latents.shape[2] - rotary,), kind, ins, "the norm must have one entry a rank")
    return [((q.shape[0], heads, q.shape[1] // heads), q.dtype)]


def _need_sequences(kind: str, ins: Shapes, tokens: int, positions: tuple[int, ...], batch: int) -> None:
    need(positions == (batch,), kind, ins, "positions hold the first position of every sequence")
    need(tokens % batch == 0, kind, ins, "every sequence must have the same number of tokens")


@work_rule("latent_rope")
@work_rule("paged_latent_rope")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    q, kv = ins[:2]
    rotated = q.shape[0] * integer(attrs, "rotary") * (integer(attrs, "heads") + 1)
    normed = math.prod(kv.shape) - kv.shape[0] * integer(attrs, "rotary")
    return Work(flops=3.0 * rotated + 4.0 * normed, hbm_bytes=2 * moved(ins[:2]) + moved(ins[2:-1]))


# ------------------------------------------------------------------------------------ attention


@shape_rule("latent_attention")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q, positions, latents, _ = ins
    made = _mixed("latent_attention", ins, attrs)
    need_integers("latent_attention", ins, positions)
    _need_sequences("latent_attention", ins, q.shape[0], positions.shape, latents.shape[0])
    return made


@shape_rule("paged_latent_decode")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    made = _mixed("paged_latent_decode", ins, attrs)
    need_decode_tables("paged_latent_decode", ins)
    return made


@shape_rule("paged_latent_prefill")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    made = _mixed("paged_latent_prefill", ins, attrs)
    need_chunk_tables("paged_latent_prefill", ins)
    return made


def _mixed(kind: str, ins: Shapes, attrs: Attrs) -> Outputs:
    q, *_, latents, up = ins
    need(len(q.shape) == 3 and len(latents.shape) == 3, kind, ins, "q and the cache have three axes")
    tokens, heads, dim = q.shape
    rotary = integer(attrs, "rotary")
    need(len(up.shape) == 2 and up.shape[0] % heads == 0, kind, ins, f"up must hold {heads} equal heads")
    need(up.shape[1] + rotary == latents.shape[2], kind, ins, "up must take the cache's rank")
    values = up.shape[0] // heads - (dim - rotary)
    need(values > 0, kind, ins, "up must give a key part and a value a head")
    need_floats(kind, ins, q, latents, up)
    need(0 < rotary <= dim, kind, ins, f"{rotary} rotary channels do not fit")
    need(integer(attrs, "context") >= 1, kind, ins, "context must be at least 1")
    return [((tokens, heads * values), q.dtype)]


@work_rule("latent_attention")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return _attention_work(ins, outs, attrs, ins[2].shape[0])


@work_rule("paged_latent_decode")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return _attention_work(ins, outs, attrs, ins[0].shape[0])


@work_rule("paged_latent_prefill")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return _attention_work(ins, outs, attrs, ins[2].shape[0])


def _attention_work(ins: Shapes, outs: Shapes, attrs: Attrs, sequences: int) -> Work:
    """The arithmetic of the cheaper form; each sequence's cached latents and the up-projection read once."""
    q, *places, latents, up = ins
    context = integer(attrs, "context")
    read = sequences * context * latents.shape[2] * ITEMSIZE[latents.dtype]
    shape = (q.shape[1], q.shape[2], integer(attrs, "rotary"), up.shape)
    flops = min(latent_flops(q.shape[0] / sequences, context, *shape))
    return Work(flops=sequences * flops, hbm_bytes=moved([q, *places, up, *outs]) + read)


def latent_flops(
    each: float, context: int, heads: int, dim: int, rotary: int, up: tuple[int, ...]
) -> tuple[float, float]:
    """Flops of one sequence's `each` causal queries at the end of `context` keys: (absorbed, expanded).

    Absorbed, the up-projection is folded into queries and results, and heads attend over latents; expanded, keys and
    values of all heads are made first (DeepSeek-V2, section 2.1.2).
    """
    rank, wide = up[1], up[0] // heads
    values = wide - (dim - rotary)
    pairs = each * max(context - each, 0) + each * (each + 1) / 2.0
    absorbed = 2.0 * each * rank * wide + 2.0 * pairs * (2 * rank + rotary)
    expanded = 2.0 * max(context, each) * rank * wide + 2.0 * pairs * (dim + values)
    return heads * absorbed, heads * expanded


# ------------------------------------------------------------------------------ public functions


def latent_rope(
    q: Value,
    kv: Value,
    norm: Value,
    positions: Value,
    latents: Value,
    *,
    heads: int,
    rotary: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
    yarn: tuple[float, ...] = (),
    interleaved: bool = True,
    name: str | None = None,
) -> Value:
    """Normalise the latent part of kv (m, rank + rotary), rotate its last `rotary` channels, and write both into the
    cache `latents` (batch, len, rank + rotary) from `positions` (batch,) on; rotate the last channels of each head of
    q (m, heads * dim) -> (m, heads, dim).

    `interleaved` channels are rotated in pairs (0, 1), (2, 3), ... and leave as two halves, as DeepSeek's do. `yarn`
    is as for `rope_kv`.
    """
    attrs = _rope_attrs(heads, rotary, theta, eps, yarn, interleaved)
    return apply("latent_rope", [q, kv, norm, positions, latents], attrs, name=name, writes=[latents])


def _rope_attrs(
    heads: int, rotary: int, theta: float, eps: float, yarn: tuple[float, ...], interleaved: bool
) -> dict[str, Attr]:
    attrs: dict[str, Attr] = {"heads": heads, "rotary": rotary, "theta": theta, "eps": eps, "interleaved": interleaved}
    return attrs | numbered("latent_rope", "yarn", YARN, yarn)


def paged_latent_rope(
    q: Value,
    kv: Value,
    norm: Value,
    positions: Value,
    slots: Value,
    latents: Value,
    *,
    heads: int,
    rotary: int,
    context: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
    yarn: tuple[float, ...] = (),
    interleaved: bool = True,
    name: str | None = None,
) -> Value:
    """`latent_rope` on pages (pages, page size, rank + rotary): token i stands at positions[i], and its latent and
    rotated key go to slot slots[i], which is page * page size + offset, or -1 for nowhere. `context` is the number of
    positions there are."""
    attrs = {"context": context, **_rope_attrs(heads, rotary, theta, eps, yarn, interleaved)}
    return apply("paged_latent_rope", [q, kv, norm, positions, slots, latents], attrs, name=name, writes=[latents])


def latent_attention(
    q: Value,
    positions: Value,
    latents: Value,
    up: Value,
    *,
    rotary: int,
    scale: float,
    context: int | None = None,
    name: str | None = None,
) -> Value:
    """Causal attention of q (batch*t, heads, dim) over the cache `latents` (batch, len, rank + rotary).

    -> (batch*t, heads*v). `up` (heads * (dim - rotary + v), rank) makes a head's unrotated keys, then its values.
    Token j of sequence b stands at positions[b] + j; scores are multiplied by `scale`. `context` is the length that
    the cost counts (the whole cache unless given).
    """
    length = axis_of("latent_attention", "latents", latents, 1) if context is None else context
    attrs: Attrs = {"rotary": rotary, "scale": scale, "context": length}
    return apply("latent_attention", [q, positions, latents, up], attrs, name=name)


def paged_latent_decode(
    q: Value,
    lengths: Value,
    blocks: Value,
    latents: Value,
    up: Value,
    *,
    rotary: int,
    scale: float,
    context: int,
    name: str | None = None,
) -> Value:
    """`latent_attention` of one query a sequence: q (n, heads, dim) over the first lengths[i] latents of the pages
    blocks[i] -> (n, heads * v). A sequence of length 0 gives zeros. `context` is the length that the cost counts."""
    attrs: Attrs = {"rotary": rotary, "scale": scale, "context": context}
    return apply("paged_latent_decode", [q, lengths, blocks, latents, up], attrs, name=name)


def paged_latent_prefill(
    q: Value,
    starts: Value,
    lengths: Value,
    blocks: Value,
    latents: Value,
    up: Value,
    *,
    rotary: int,
    scale: float,
    context: int,
    name: str | None = None,
) -> Value:
    """`latent_attention` of chunks, causal: rows starts[i] to starts[i + 1] of q are the last tokens of the lengths[i]
    that sequence i has in the pages blocks[i] -> (tokens, heads * v). Rows beyond the last start give zeros."""
    attrs: Attrs = {"rotary": rotary, "scale": scale, "context": context}
    return apply("paged_latent_prefill", [q, starts, lengths, blocks, latents, up], attrs, name=name)
