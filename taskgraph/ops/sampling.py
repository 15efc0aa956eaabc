"""From logits to the next step's tokens without the host: draws at a temperature, cut to top-k and top-p, and the feed
of what was drawn last.

A draw is exact arithmetic on whole numbers but for one exponential: token i has the weight floor(2^40 exp((x_i - max x)
/ temperature)), sums of weights do not depend on their order, and so one uniform number gives one token, on every
backend and in every batch.
"""

import math

from taskgraph.graph.graph import Value
from taskgraph.graph.op import Work
from taskgraph.ops.kinds import Axes, Kind, Output, Range, apply, index_of, register
from taskgraph.ops.signatures import COUNT, Attrs, Shapes, Signature, moved, need, need_floats

# ------------------------------------------------------------------------------------------- draw


def draw(
    logits: Value,
    likeliest: Value,
    temperature: Value,
    top_k: Value,
    top_p: Value,
    uniform: Value,
    kept: Value | None = None,
    *,
    name: str | None = None,
) -> Value:
    """A token for every row of logits (rows, vocabulary) -> i64 (rows,); `likeliest` i64 (rows,) is their argmax.

    A row of a temperature (f32) below 1e-5 takes the likeliest. Another draws from softmax(row / temperature), cut to
    the `top_k` likeliest tokens (i32; 0: all) and to those before which less than `top_p` (f64) has been: the token at
    which the chances, summed up, exceed `uniform` (f64, in [0, 1)) of their whole; in the order of the vocabulary, or
    of a cut row with the likeliest first, of equal ones the first. A row whose largest logit is no finite number gives
    -1. With `kept`, a state i64 of at least `rows`, its first rows are these tokens from then on (`feed`).
    """
    inputs = [logits, likeliest, temperature, top_k, top_p, uniform, *([] if kept is None else [kept])]
    return apply("draw", inputs, name=name, writes=() if kept is None else (6,))


_DTYPES = {"likeliest": "i64", "temperature": "f32", "top_k": "i32", "top_p": "f64", "uniform": "f64"}


def draw_shape(ins: Shapes, attrs: Attrs) -> Output:
    logits, *each = ins
    need_floats("draw", ins, logits)
    rows = logits.shape[0]
    for (name, dtype), t in zip(_DTYPES.items(), each[:5], strict=True):
        need((t.shape, t.dtype) == ((rows,), dtype), "draw", ins, f"{name} must be {dtype} of one entry a row")
    for kept in each[5:]:
        need(kept.dtype == "i64" and kept.shape[0] >= rows, "draw", ins, "kept must be i64 and have an entry a row")
    return (rows,), "i64"


def draw_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """As if every row were drawn without a cut: read once, an exponential an entry."""
    return Work(flops=4.0 * math.prod(ins[0].shape), hbm_bytes=moved(ins[:6]) + (1 + len(ins[6:])) * moved(outs))


def draw_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    """What is kept has its place by its row in the whole batch."""
    return (0,) * 6 if len(ins) == 6 else None


register(
    Kind(
        "draw", Signature("2111111", spare=1), draw_shape, draw_work, draw_split,
        index_ranges=dict.fromkeys((1, 3), index_of(0, 1)),
    )
)  # fmt: skip


# ------------------------------------------------------------------------------------------- feed


def feed(tokens: Value, sources: Value, kept: Value, *, vocabulary: int, name: str | None = None) -> Value:
    """tokens i64 (n,), those with an entry of sources i32 (n,) of at least 0 replaced by that entry of `kept` (i64),
    what a draw kept, brought into [0, vocabulary) -> i64 (n,)."""
    return apply("feed", [tokens, sources, kept], {"vocabulary": vocabulary}, name=name)


def feed_shape(ins: Shapes, attrs: Attrs) -> Output:
    tokens, sources, kept = ins
    need(tokens.dtype == kept.dtype == "i64", "feed", ins, "tokens and kept must be i64")
    need((sources.shape, sources.dtype) == (tokens.shape, "i32"), "feed", ins, "sources must be i32, one a token")
    return tokens.shape, "i64"


def feed_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return Work(hbm_bytes=moved(ins[:2]) + 2 * moved(outs))


def feed_sources(ins: Shapes, attrs: Attrs) -> Range:
    return -1, ins[2].shape[0]


def feed_tokens(ins: Shapes, attrs: Attrs) -> Range:
    return 0, attrs.integer("vocabulary")


register(
    Kind(
        "feed", Signature("111", {"vocabulary": COUNT}), feed_shape, feed_work, split=(0, 0, None),
        index_ranges={0: feed_tokens, 1: feed_sources, 2: feed_tokens},
    )
)  # fmt: skip
