"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one low-rank vector a token, from
which every head's keys and values are products, and one rotated key that all heads share.
"""

import math

from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Work
from taskgraph.ops.rules import (
    SPLIT_RULES,
    YARN,
    Attrs,
    Outputs,
    Shapes,
    apply,
    integer,
    moved,
    need,
    shape_rule,
    work_rule,
)

SPLIT_RULES |= {"latent_rope": (0, 0, None, 0, 0), "latent_attention": (0, 0, 0, None)}


@shape_rule("latent_rope")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q, kv, norm, positions, latents = ins
    heads, rotary = integer(attrs, "heads"), integer(attrs, "rotary")
    need(len(latents.shape) == 3, "latent_rope", ins, "the cache is (batch, len, rank + rotary)")
    need(len(q.shape) == 2 and q.shape[1] % heads == 0, "latent_rope", ins, f"q must hold {heads} equal heads")
    need(0 < rotary < latents.shape[2] and rotary % 2 == 0, "latent_rope", ins, f"{rotary} rotary channels do not fit")
    need(q.shape[1] // heads >= rotary, "latent_rope", ins, f"a head of q is shorter than {rotary} rotary channels")
    need(kv.shape == (q.shape[0], latents.shape[2]), "latent_rope", ins, "kv must be (tokens, rank + rotary)")
    need(norm.shape == (latents.shape[2] - rotary,), "latent_rope", ins, "the norm must have one entry a rank")
    _need_sequences("latent_rope", ins, q.shape[0], positions.shape, latents.shape[0])
    return [((q.shape[0], heads, q.shape[1] // heads), q.dtype)]


def _need_sequences(kind: str, ins: Shapes, tokens: int, positions: tuple[int, ...], batch: int) -> None:
    need(positions == (batch,), kind, ins, "positions hold the first position of every sequence")
    need(tokens % batch == 0, kind, ins, "every sequence must have the same number of tokens")


@work_rule("latent_rope")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    q, kv = ins[:2]
    rotated = q.shape[0] * integer(attrs, "rotary") * (integer(attrs, "heads") + 1)
    normed = math.prod(kv.shape) - kv.shape[0] * integer(attrs, "rotary")
    return Work(flops=3.0 * rotated + 4.0 * normed, hbm_bytes=2 * moved(ins[:2]) + moved(ins[2:4]))


@shape_rule("latent_attention")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q, positions, latents, up = ins
    need(len(q.shape) == 3 and len(latents.shape) == 3, "latent_attention", ins, "q and the cache have three axes")
    tokens, heads, dim = q.shape
    rotary = integer(attrs, "rotary")
    need(len(up.shape) == 2 and up.shape[0] % heads == 0, "latent_attention", ins, f"up must hold {heads} equal heads")
    need(up.shape[1] + rotary == latents.shape[2], "latent_attention", ins, "up must take the cache's rank")
    values = up.shape[0] // heads - (dim - rotary)
    need(values > 0, "latent_attention", ins, "up must give a key part and a value a head")
    need(q.dtype == latents.dtype == up.dtype, "latent_attention", ins, "dtypes differ")
    _need_sequences("latent_attention", ins, tokens, positions.shape, latents.shape[0])
    return [((tokens, heads * values), q.dtype)]


@work_rule("latent_attention")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """The arithmetic of the cheaper form; each sequence's cached latents and the up-projection read once."""
    q, positions, latents, up = ins
    batch, context = latents.shape[0], integer(attrs, "context")
    each = q.shape[0] // batch
    read = batch * context * latents.shape[2] * ITEMSIZE[latents.dtype]
    flops = min(latent_flops(each, context, q.shape[1], q.shape[2], integer(attrs, "rotary"), up.shape))
    return Work(flops=batch * flops, hbm_bytes=moved([q, positions, up, *outs]) + read)


def latent_flops(
    each: int, context: int, heads: int, dim: int, rotary: int, up: tuple[int, ...]
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
    attrs: Attrs = {"heads": heads, "rotary": rotary, "theta": theta, "eps": eps, "interleaved": interleaved}
    attrs |= {f"yarn_{key}": float(v) for key, v in zip(YARN, yarn, strict=False)}
    return apply("latent_rope", [q, kv, norm, positions, latents], attrs, name=name, writes=[latents])


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
    attrs: Attrs = {"rotary": rotary, "scale": scale, "context": context or latents.shape[1]}
    return apply("latent_attention", [q, positions, latents, up], attrs, name=name)
