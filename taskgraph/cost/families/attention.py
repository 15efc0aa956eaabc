"""Attention: prefill (many queries a sequence) and decode (one)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskgraph.cost.family import (
    BF16_BYTES,
    Coefficients,
    Column,
    Family,
    Features,
    Kernel,
    Spec,
    Tensors,
    coefficient,
)
from taskgraph.cost.formulas import Numbers, both, heat_seconds, log2, waves
from taskgraph.cost.surface import Axis
from taskgraph.graph.op import ITEMSIZE, Op

_BLOCK_QUERIES = 128.0
"""Queries that a thread block of prefill takes at most."""
_CAUSAL_BUSY = 0.75
"""Share of its SMs that causal attention keeps busy: the blocks of early queries end sooner. Beside products of an
H200 two such kernels leave each other 1.2 to 1.4 of one's speed (measured)."""
_FASTER_THAN_NEEDED = 1.25
"""An SM walks over a cache faster than its share of the saturating bandwidth: full-GPU times cannot tell the two apart,
the R -> P tables do (decode attention keeps 0.6 to 0.8 of its speed on 0.4 of an A100)."""

HEADS = (
    Column("num_heads"), Column("num_key_value_heads"), Column("head_dim"), Column("window_size", zero=True),
)  # fmt: skip


# ------------------------------------------------------------------------------------------- prefill


class PrefillShape(NamedTuple):
    """Causal attention of the last `new` of `context` tokens."""

    batch: Numbers
    """Sequences."""
    new: Numbers
    """Queries of a sequence."""
    context: Numbers
    """Keys of a sequence, the new ones among them."""
    heads: Numbers
    kv_heads: Numbers
    head_dim: Numbers
    window: Numbers
    """Keys that a query sees at most; 0 for all."""
    itemsize: Numbers
    """Bytes an element."""


@dataclass(frozen=True, slots=True)
class PrefillCoefficients(Coefficients):
    """All start at the order of magnitude of an A100's and are fitted to each device's table."""

    fixed_s: float = coefficient(10e-6)
    """Seconds of an empty kernel."""
    cta_s: float = coefficient(1e-6)
    """Seconds of a thread block besides its keys."""
    mma_efficiency: float = coefficient(0.6, 0.2, 1.0)
    """Share of an SM's peak that the two products reach."""
    pad_keys: float = coefficient(64.0)
    """Keys that a thread block walks over in vain, for the edges of the mask."""
    hbm_efficiency: float = coefficient(0.8, 0.3, 1.0)
    """Share of the published memory bandwidth that is reached."""
    overlap: float = coefficient(3.0, 1.0, 8.0)
    """How well arithmetic and memory overlap: `sharp` of `both`."""
    wave: float = coefficient(0.3, 0.01, 1.0)
    """How hard the rounds of thread blocks are: see `waves`."""
    softmax_s: float = coefficient(1e-10)
    """Seconds of the softmax for a query and a key."""
    heat: float = coefficient(0.03)
    """Share of the arithmetic that long kernels take longer: see `heat_seconds`."""


def causal_pairs(new: Numbers, context: Numbers, window: Numbers) -> np.ndarray:
    """Query-key pairs of `new` causal queries at the end of `context` keys, each seeing at most `window` (0: all)."""
    before = np.asarray(context) - new
    seen = new * before + new * (new + 1.0) / 2.0
    ramp = np.maximum(np.minimum(window - before, new), 0.0)  # queries that see fewer keys than the window
    windowed = ramp * before + ramp * (ramp + 1.0) / 2.0 + (new - ramp) * window
    return np.where((np.asarray(window) <= 0.0) | (np.asarray(window) >= context), seen, windowed)


def prefill_seconds(shape: PrefillShape, spec: Spec, c: PrefillCoefficients, sms: np.ndarray) -> np.ndarray:
    """FlashAttention (Dao 2023): a thread block for every 128 queries of a head walks over the keys that they see,
    `pad_keys` more for the edges of the mask; a key costs two products of depth head dim and a softmax step."""
    batch, new, context, heads, kv_heads, dim, window, itemsize = shape
    queries = np.minimum(_BLOCK_QUERIES, 16.0 * np.ceil(new / 16.0))
    ctas = batch * heads * np.ceil(new / queries)
    keys = causal_pairs(new, context, window) / new + c.pad_keys
    product = 4.0 * queries * dim / (spec.sm_flops_per_s * c.mma_efficiency)
    busy = waves(ctas, sms, c.wave) * (c.cta_s + keys * (product + c.softmax_s * queries))
    busy = busy + heat_seconds(4.0 * ctas * queries * keys * dim, spec.flops_per_s, c.heat)
    moved = itemsize * batch * dim * (2.0 * new * heads + 2.0 * context * kv_heads)
    drawn = spec.hbm_bytes_per_s * c.hbm_efficiency * spec.hbm_share(sms)
    return c.fixed_s + both(busy, moved / drawn, c.overlap)


def prefill_blocks(shape: PrefillShape) -> np.ndarray:
    """A thread block for every 128 queries of a head."""
    made: np.ndarray = np.asarray(shape.batch) * shape.heads * np.ceil(np.asarray(shape.new) / _BLOCK_QUERIES)
    return made


def prefill_features(shape: PrefillShape, spec: Spec) -> Features:
    """Logs of what a thread block, a head and the batch have to do."""
    batch, new, context, heads, kv_heads, dim, window, _ = map(np.asarray, shape)
    return {
        "new": log2(new),
        "batch_heads": log2(batch * heads),
        "head_dim": log2(dim),
        "group": log2(heads / kv_heads),
        "seen": log2(np.where(window > 0.0, np.minimum(window, context), context)),
        "windowed": np.where(window > 0.0, 1.0, 0.0),
        "batch": log2(batch),
    }


def paged_prefill_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """Tokens of several sequences over pages, as if each had as many."""
    (tokens, heads, dim), sequences, pages = ins[0].shape, ins[2].shape[0], ins[4]
    new, context = max(tokens / sequences, 1.0), op.integer("context")
    size = ITEMSIZE[pages.dtype]
    shape = PrefillShape(sequences, new, max(context, new), heads, pages.shape[1], dim, 0.0, size)
    return Kernel("prefill_attention", pages.dtype, shape)


def prefill_read(columns: Mapping[str, np.ndarray]) -> PrefillShape:
    """The shapes of a table: whole prompts."""
    heads, kv_heads, dim, window = (columns[column.name] for column in HEADS)
    prompt = columns["isl"]
    return PrefillShape(columns["batch_size"], prompt, prompt, heads, kv_heads, dim, window, BF16_BYTES)


PREFILL = Family(
    "prefill_attention",
    PrefillShape,
    PrefillCoefficients,
    prefill_seconds,
    kinds={"paged_prefill": paged_prefill_kernel},
    columns=(Column("batch_size"), Column("isl"), *HEADS),
    read=prefill_read,
    features=prefill_features,
    thread_blocks=prefill_blocks,
    busy=_CAUSAL_BUSY,
    terms=(
        (Axis("new", 0, 1, 15), Axis("batch_heads", 0, 2, 8), Axis("head_dim", 6, 1, 4)),
        (Axis("new", 0, 2, 8), Axis("group", 0, 1, 7), Axis("batch_heads", 0, 3, 6)),
        (Axis("new", 0, 2, 8), Axis("windowed", 0, 1, 2), Axis("head_dim", 6, 1, 4)),
        (Axis("new", 0, 2, 8), Axis("windowed", 0, 1, 2), Axis("batch_heads", 0, 3, 6)),
        (Axis("new", 0, 2, 8), Axis("batch", 0, 2, 5), Axis("group", 0, 1, 7)),
    ),
)

# -------------------------------------------------------------------------------------------- decode


class DecodeShape(NamedTuple):
    """Attention of one query a sequence over its cached keys."""

    batch: Numbers
    """Sequences."""
    keys: Numbers
    """Keys of a sequence."""
    heads: Numbers
    kv_heads: Numbers
    head_dim: Numbers
    window: Numbers
    """Keys that a query sees at most; 0 for all."""
    itemsize: Numbers
    """Bytes an element of the cache."""


@dataclass(frozen=True, slots=True)
class DecodeCoefficients(Coefficients):
    """All start at the order of magnitude of an A100's and are fitted to each device's table."""

    fixed_s: float = coefficient(9e-6)
    """Seconds of an empty kernel."""
    cta_s: float = coefficient(3e-6)
    """Seconds of a thread block besides its keys."""
    sm_bytes_per_s: float = coefficient(40e9)
    """Bytes/s at which an SM walks over a cache; its start and limits depend on the device: see `decode_on_device`."""
    split_s: float = coefficient(1e-6)
    """Seconds that each doubling of the parts of a sequence adds."""
    hbm_efficiency: float = coefficient(0.92, 0.3, 1.0)
    """Share of the published memory bandwidth that is reached."""
    overlap: float = coefficient(3.0, 1.0, 8.0)
    """How well arithmetic and memory overlap: `sharp` of `both`."""
    wave: float = coefficient(0.2, 0.01, 1.0)
    """How hard the rounds of thread blocks are: see `waves`."""
    l2_gain: float = coefficient(2.0, 1.0, 4.0)
    """How many times as fast a cache is read from L2."""
    l2_share: float = coefficient(0.8, 0.3, 1.2)
    """Share of the L2 that a cache may fill and still be read from there."""
    group_s: float = coefficient(1e-10)
    """Seconds of a key for each query head that shares it."""


def decode_seconds(shape: DecodeShape, spec: Spec, c: DecodeCoefficients, sms: np.ndarray) -> np.ndarray:
    """One pass over the cached keys and values, split over thread blocks when there are fewer sequences than SMs
    (FlashDecoding, Dao et al. 2023). A cache that fits `l2_share` of the L2 and was read just before comes from there,
    `l2_gain` times as fast."""
    batch, keys, heads, kv_heads, dim, window, itemsize = shape
    keys = np.where(np.asarray(window) > 0.0, np.minimum(keys, window), keys)
    token = 2.0 * dim * itemsize / c.sm_bytes_per_s + c.group_s * heads / kv_heads
    busy = np.full(np.broadcast_shapes(keys.shape, sms.shape), np.inf)
    for doublings in range(7):
        parts = 2.0**doublings
        seconds = waves(batch * kv_heads * parts, sms, c.wave) * (c.cta_s + np.ceil(keys / parts) * token)
        tried = (keys >= 64.0 * parts) | (parts == 1.0)
        busy = np.minimum(busy, np.where(tried, seconds + c.split_s * doublings, np.inf))
    moved = itemsize * batch * dim * (2.0 * keys * kv_heads + 2.0 * heads)
    hit = np.minimum(np.maximum(2.0 - moved / (c.l2_share * spec.l2_bytes + 1.0), 0.0), 1.0)
    drawn = spec.hbm_bytes_per_s * c.hbm_efficiency * spec.hbm_share(sms)
    return c.fixed_s + both(busy, moved * (1.0 - hit + hit / c.l2_gain) / drawn, c.overlap)


def decode_features(shape: DecodeShape, spec: Spec) -> Features:
    """Logs of what the batch, a sequence and a head have to do."""
    batch, keys, heads, kv_heads, dim, window, _ = map(np.asarray, shape)
    return {
        "batch_kv": log2(batch * kv_heads),
        "seen": log2(np.where(window > 0.0, np.minimum(window, keys), keys)),
        "group": log2(heads / kv_heads),
        "head_dim": log2(dim),
        "windowed": np.where(window > 0.0, 1.0, 0.0),
        "batch": log2(batch),
        "keys": log2(keys),
    }


def decode_on_device(spec: Spec) -> dict[str, tuple[float, float, float]]:
    """An SM's rate lies above its share of the bandwidth at which the device saturates."""
    least = _FASTER_THAN_NEEDED * spec.hbm_reach * spec.hbm_bytes_per_s / spec.sms
    return {"sm_bytes_per_s": (2 * least, least, 20 * least)}


def decode_attention_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """One query a sequence over a cache of keys and values in one tensor."""
    q, cache = ins
    _, batch, length, kv_heads, dim = cache.shape
    shape = DecodeShape(batch, length, q.shape[1], kv_heads, dim, 0.0, ITEMSIZE[cache.dtype])
    return Kernel("decode_attention", cache.dtype, shape)


def paged_decode_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """One query a sequence over pages."""
    (batch, heads, dim), pages = ins[0].shape, ins[3]
    shape = DecodeShape(batch, op.integer("context"), heads, pages.shape[1], dim, 0.0, ITEMSIZE[pages.dtype])
    return Kernel("decode_attention", pages.dtype, shape)


def attention_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """Over a cache that lies in one piece: decode for one token a sequence, else prefill."""
    tokens, heads, dim = ins[0].shape
    cache = ins[2]
    batch, kv_heads = cache.shape[:2]
    new, context, size = tokens // batch, op.integer("context"), ITEMSIZE[cache.dtype]
    if new == 1:
        decode = DecodeShape(batch, context, heads, kv_heads, dim, 0.0, size)
        return Kernel("decode_attention", cache.dtype, decode)
    prefill = PrefillShape(batch, new, max(context, new), heads, kv_heads, dim, 0.0, size)
    return Kernel("prefill_attention", cache.dtype, prefill)


def decode_read(columns: Mapping[str, np.ndarray]) -> DecodeShape:
    """The shapes of a table: `step` keys lie in the cache before the one that is added."""
    heads, kv_heads, dim, window = (columns[column.name] for column in HEADS)
    return DecodeShape(columns["batch_size"], columns["step"] + 1, heads, kv_heads, dim, window, BF16_BYTES)


DECODE = Family(
    "decode_attention",
    DecodeShape,
    DecodeCoefficients,
    decode_seconds,
    kinds={
        "attention": attention_kernel,
        "decode_attention": decode_attention_kernel,
        "paged_decode": paged_decode_kernel,
    },
    columns=(Column("batch_size"), *HEADS[:3], Column("step"), HEADS[3]),
    read=decode_read,
    features=decode_features,
    terms=(
        (Axis("batch_kv", 0, 2, 8), Axis("seen", 1, 1, 17), Axis("head_dim", 6, 1, 4)),
        (Axis("batch_kv", 0, 2, 8), Axis("seen", 1, 2, 9), Axis("group", 0, 1, 7)),
        (Axis("windowed", 0, 1, 2), Axis("keys", 1, 2, 9), Axis("batch_kv", 0, 3, 6)),
        (Axis("group", 0, 1, 7), Axis("batch", 0, 2, 6), Axis("head_dim", 6, 1, 4)),
    ),
    on_device=decode_on_device,
)
