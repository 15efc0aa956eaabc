"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one low-rank vector a token, from
which every head's keys and values are products, and one rotated key that all heads share.

The cache is static, (batch, len, rank + rotary), or in pages, (pages, page size, rank + rotary), whose places, lengths
and block tables are those of `taskgraph.ops.attention`.
"""

import math
from dataclasses import dataclass

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Work
from taskgraph.ops.attention import (
    TokenPlaces,
    all_positions,
    last_place,
    length_within,
    need_chunk_tables,
    need_decode_tables,
    need_int32,
    need_sequences,
    no_chunks,
)
from taskgraph.ops.kinds import Kind, Output, Range, WorkRule, apply, axis_of, index_of, register
from taskgraph.ops.rotary import ROPE, YARN, Stretch, stretch_attrs
from taskgraph.ops.signatures import (
    COUNT,
    FLAG,
    NUMBER,
    Attrs,
    Shapes,
    Signature,
    moved,
    need,
    need_floats,
    need_integers,
)
from taskgraph.record import instance

# ------------------------------------------------------------------------- rotating and writing


@dataclass(frozen=True, slots=True)
class LatentRopeSpec:
    """What happens to the heads of a token and to its latent: how many query `heads` there are, of which the last
    `rotary` channels are rotated by frequencies of `theta`, stretched, and the `eps` of the latent's norm.

    `interleaved` channels are rotated in pairs (0, 1), (2, 3), ... and leave as two halves, as DeepSeek's do.
    """

    heads: int
    rotary: int
    theta: float = 10000.0
    eps: float = 1e-6
    stretch: Stretch = None
    interleaved: bool = True

    def attrs(self) -> Attrs:
        """The attributes of an op."""
        channels = Attrs(heads=self.heads, rotary=self.rotary, interleaved=self.interleaved)
        return Attrs(**channels, theta=self.theta, eps=self.eps, **stretch_attrs(self.stretch))


_ROPE = {"rotary": COUNT, "interleaved": FLAG, **ROPE}


def latent_rope(
    q: Value, kv: Value, norm: Value, positions: Value, latents: Value, *, spec: LatentRopeSpec, name: str | None = None
) -> Value:
    """Normalise the latent part of kv (m, rank + rotary), rotate its last `rotary` channels, and write both into the
    cache `latents` (batch, len, rank + rotary) from `positions` (batch,) on; rotate the last channels of each head of
    q (m, heads * dim) -> (m, heads, dim)."""
    attrs = instance("spec of latent_rope", spec, LatentRopeSpec, GraphError).attrs()
    return apply("latent_rope", [q, kv, norm, positions, latents], attrs, name=name, writes=(4,))


def latent_rope_shape(ins: Shapes, attrs: Attrs) -> Output:
    q, _, _, positions, latents = ins
    made = _rotated("latent_rope", ins, attrs)
    need_integers("latent_rope", ins, positions)
    need_sequences("latent_rope", ins, q.shape[0], positions, latents.shape[0])
    return made


def latent_rope_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    q, kv = ins[:2]
    rotary = attrs.integer("rotary")
    rotated = q.shape[0] * rotary * (attrs.integer("heads") + 1)
    normed = math.prod(kv.shape) - kv.shape[0] * rotary
    return Work(flops=3.0 * rotated + 4.0 * normed, hbm_bytes=2 * moved(ins[:2]) + moved(ins[2:-1]))


def latent_rope_positions(ins: Shapes, attrs: Attrs) -> Range:
    return last_place(ins[4].shape[1], ins[0].shape[0], ins[3].shape[0])


register(
    Kind(
        "latent_rope", Signature("22113", _ROPE, groups=(YARN,)), latent_rope_shape, latent_rope_work,
        split=(0, 0, None, 0, 0), index_ranges={3: latent_rope_positions},
    )
)  # fmt: skip


def paged_latent_rope(
    q: Value, kv: Value, norm: Value, places: TokenPlaces, latents: Value, *, spec: LatentRopeSpec,
    name: str | None = None,
) -> Value:  # fmt: skip
    """`latent_rope` on pages (pages, page size, rank + rotary): every token's latent and rotated key go to its slot."""
    at = instance("places of paged_latent_rope", places, TokenPlaces, GraphError)
    attrs = instance("spec of paged_latent_rope", spec, LatentRopeSpec, GraphError).attrs() | {"context": at.context}
    return apply("paged_latent_rope", [q, kv, norm, at.positions, at.slots, latents], attrs, name=name, writes=(5,))


def paged_latent_rope_shape(ins: Shapes, attrs: Attrs) -> Output:
    q, _, _, positions, slots, _ = ins
    made = _rotated("paged_latent_rope", ins, attrs)
    need_int32("paged_latent_rope", ins, 3, 4)
    need(positions.shape == slots.shape == q.shape[:1], "paged_latent_rope", ins, "a position and a slot a token")
    return made


def paged_latent_rope_slots(ins: Shapes, attrs: Attrs) -> Range:
    return 0, ins[5].shape[0] * ins[5].shape[1]


register(
    Kind(
        "paged_latent_rope", Signature("221113", {**_ROPE, "context": COUNT}, groups=(YARN,)), paged_latent_rope_shape,
        latent_rope_work, split=(0, 0, None, 0, 0, None), ordered=True,
        index_ranges={3: all_positions, 4: paged_latent_rope_slots},
    )
)  # fmt: skip


def _rotated(kind: str, ins: Shapes, attrs: Attrs) -> Output:
    q, kv, norm, *_, latents = ins
    heads, rotary = attrs.integer("heads"), attrs.integer("rotary")
    need_floats(kind, ins, q, kv, norm, latents)
    need(heads >= 1, kind, ins, "it takes at least one head")
    need(len(latents.shape) == 3, kind, ins, "the cache is (batch, len, rank + rotary), or pages of so many")
    need(len(q.shape) == 2 and q.shape[1] % heads == 0, kind, ins, f"q must hold {heads} equal heads")
    need(0 < rotary < latents.shape[2] and rotary % 2 == 0, kind, ins, f"{rotary} rotary channels do not fit")
    need(q.shape[1] // heads >= rotary, kind, ins, f"a head of q is shorter than {rotary} rotary channels")
    need(kv.shape == (q.shape[0], latents.shape[2]), kind, ins, "kv must be (tokens, rank + rotary)")
    need(norm.shape == (latents.shape[2] - rotary,), kind, ins, "the norm must have one entry a rank")
    return (q.shape[0], heads, q.shape[1] // heads), q.dtype


# ------------------------------------------------------------------------------------ attention


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Attention over latents: the last `rotary` channels are the shared key, scores are multiplied by `scale`, and
    `context` is the length that the cost counts; None: as many as the cache holds of a sequence."""

    rotary: int
    scale: float
    context: int | None = None


_ATTENTION = {"rotary": COUNT, "scale": NUMBER, "context": COUNT}


def latent_attention(
    q: Value, positions: Value, latents: Value, up: Value, *, spec: LatentSpec, name: str | None = None
) -> Value:
    """Causal attention of q (batch*t, heads, dim) over the cache `latents` (batch, len, rank + rotary).

    -> (batch*t, heads*v). `up` (heads * (dim - rotary + v), rank) makes a head's unrotated keys, then its values.
    Token j of sequence b stands at positions[b] + j.
    """
    attrs = _attention_attrs("latent_attention", spec, latents)
    return apply("latent_attention", [q, positions, latents, up], attrs, name=name)


def _attention_attrs(kind: str, spec: LatentSpec, latents: Value, blocks: Value | None = None) -> Attrs:
    given = instance(f"spec of {kind}", spec, LatentSpec, GraphError)
    context = given.context
    if context is None:
        pages = 1 if blocks is None else axis_of(kind, "blocks", blocks, 1)
        context = pages * axis_of(kind, "latents", latents, 1)
    return Attrs(rotary=given.rotary, scale=given.scale, context=context)


def _mixed(kind: str, ins: Shapes, attrs: Attrs) -> Output:
    q, *_, latents, up = ins
    need(len(q.shape) == 3 and len(latents.shape) == 3, kind, ins, "q and the cache have three axes")
    tokens, heads, dim = q.shape
    rotary = attrs.integer("rotary")
    need(len(up.shape) == 2 and up.shape[0] % heads == 0, kind, ins, f"up must hold {heads} equal heads")
    need(up.shape[1] + rotary == latents.shape[2], kind, ins, "up must take the cache's rank")
    values = up.shape[0] // heads - (dim - rotary)
    need(values > 0, kind, ins, "up must give a key part and a value a head")
    need_floats(kind, ins, q, latents, up)
    need(0 < rotary <= dim, kind, ins, f"{rotary} rotary channels do not fit")
    need(attrs.integer("context") >= 1, kind, ins, "context must be at least 1")
    return (tokens, heads * values), q.dtype


def latent_work(by: int) -> WorkRule:
    """The arithmetic of the cheaper form; the up-projection, and the cached latents of each sequence read once: there
    are as many as input number `by` has rows."""

    def work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
        q, *places, latents, up = ins
        sequences, context = ins[by].shape[0], attrs.integer("context")
        read = sequences * context * latents.shape[2] * ITEMSIZE[latents.dtype]
        shape = (q.shape[1], q.shape[2], attrs.integer("rotary"), up.shape)
        flops = min(latent_flops(q.shape[0] / sequences, context, *shape))
        return Work(flops=sequences * flops, hbm_bytes=moved([q, *places, up, *outs]) + read)

    return work


def latent_attention_shape(ins: Shapes, attrs: Attrs) -> Output:
    q, positions, latents, _ = ins
    made = _mixed("latent_attention", ins, attrs)
    need_integers("latent_attention", ins, positions)
    need_sequences("latent_attention", ins, q.shape[0], positions, latents.shape[0])
    return made


def latent_attention_positions(ins: Shapes, attrs: Attrs) -> Range:
    return last_place(min(attrs.integer("context"), ins[2].shape[1]), ins[0].shape[0], ins[1].shape[0])


register(
    Kind(
        "latent_attention", Signature("3132", _ATTENTION), latent_attention_shape, latent_work(2),
        split=(0, 0, 0, None), index_ranges={1: latent_attention_positions},
    )
)  # fmt: skip


def paged_latent_decode(
    q: Value, lengths: Value, blocks: Value, latents: Value, up: Value, *, spec: LatentSpec, name: str | None = None
) -> Value:
    """`latent_attention` of one query a sequence: q (n, heads, dim) over the first lengths[i] latents of the pages
    blocks[i] -> (n, heads * v). A sequence of length 0 gives zeros."""
    attrs = _attention_attrs("paged_latent_decode", spec, latents, blocks)
    return apply("paged_latent_decode", [q, lengths, blocks, latents, up], attrs, name=name)


def paged_latent_decode_shape(ins: Shapes, attrs: Attrs) -> Output:
    made = _mixed("paged_latent_decode", ins, attrs)
    need_decode_tables("paged_latent_decode", ins)
    return made


def paged_latent_decode_lengths(ins: Shapes, attrs: Attrs) -> Range:
    return length_within(attrs.integer("context"), ins[2], ins[3].shape[1])


register(
    Kind(
        "paged_latent_decode", Signature("31232", _ATTENTION), paged_latent_decode_shape, latent_work(0),
        split=(0, 0, 0, None, None), ordered=True,
        index_ranges={1: paged_latent_decode_lengths, 2: index_of(3)},
    )
)  # fmt: skip


def paged_latent_prefill(
    q: Value, starts: Value, lengths: Value, blocks: Value, latents: Value, up: Value, *, spec: LatentSpec,
    name: str | None = None,
) -> Value:  # fmt: skip
    """`latent_attention` of chunks, causal: rows starts[i] to starts[i + 1] of q are the last tokens of the lengths[i]
    that sequence i has in the pages blocks[i] -> (tokens, heads * v). Rows beyond the last start give zeros."""
    attrs = _attention_attrs("paged_latent_prefill", spec, latents, blocks)
    return apply("paged_latent_prefill", [q, starts, lengths, blocks, latents, up], attrs, name=name)


def paged_latent_prefill_shape(ins: Shapes, attrs: Attrs) -> Output:
    made = _mixed("paged_latent_prefill", ins, attrs)
    need_chunk_tables("paged_latent_prefill", ins)
    return made


register(
    Kind(
        "paged_latent_prefill", Signature("311232", _ATTENTION), paged_latent_prefill_shape, latent_work(2),
        split=(None,) * 6, index_ranges={1: no_chunks, 3: index_of(4)},
    )
)  # fmt: skip


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
