"""A KV cache in pages (Kwon et al. 2023, "PagedAttention"): rotate and append, attention by kind, and moving pages.

Keys and values are states (pages, kv heads, page size, dim). How a page is laid out inside is the backend's own
affair, and dim may be larger than the heads', so that a backend may round it up. Places, lengths and block tables are
i32 inputs, so that one captured graph serves every batch that fits: a row of no sequence has slot -1 and length 0.

Rows of a batch are in turn: no two write one slot, and a row reads what it wrote, what rows before it wrote, and
nothing of rows behind it. Nano-batches rely on that: a slice waits for the slices before it alone.
"""

from collections.abc import Sequence

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Work
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
from taskgraph.ops.signatures import SCALING, YARN, Attrs, Shapes, need, need_floats
from taskgraph.record import number

SPLIT_RULES |= {
    "paged_rope": (0, 0, 0, None, None, None, None),
    "paged_decode": (0, 0, 0, None, None),
    "paged_prefill": (None, None, None, None, None, None),
    "copy_pages": (None, None, None),
}
IN_TURN |= {"paged_rope", "paged_decode"}


def _need_pages(kind: str, ins: Shapes, keys: int) -> None:
    k, v = ins[keys : keys + 2]
    need(len(k.shape) == 4 and k.shape == v.shape, kind, ins, "keys and values are (pages, kv heads, page size, dim)")


def _need_heads(kind: str, ins: Shapes, keys: int) -> None:
    q, pages = ins[0], ins[keys]
    need_floats(kind, ins, q, *ins[keys:])
    _need_pages(kind, ins, keys)
    need(
        len(q.shape) == 3 and q.shape[2] <= pages.shape[3], kind, ins, "q is (tokens, heads, dim), dim as in the pages"
    )
    need(q.shape[1] % pages.shape[1] == 0, kind, ins, "query heads must be a multiple of kv heads")


def need_int32(kind: str, ins: Shapes, *which: int) -> None:
    """GraphError unless these inputs are i32."""
    need(all(ins[i].dtype == "i32" for i in which), kind, ins, "places, lengths and tables are i32")


def need_decode_tables(kind: str, ins: Shapes) -> None:
    """GraphError unless inputs 1 and 2 are lengths and blocks of a row of q each."""
    q, lengths, blocks = ins[:3]
    need_int32(kind, ins, 1, 2)
    need(lengths.shape == q.shape[:1], kind, ins, "lengths have one entry a sequence")
    need(len(blocks.shape) == 2 and blocks.shape[0] == q.shape[0], kind, ins, "blocks have a row a sequence")


def need_chunk_tables(kind: str, ins: Shapes) -> None:
    """GraphError unless inputs 1 to 3 are starts, lengths and blocks of the chunks in the rows of q."""
    starts, lengths, blocks = ins[1:4]
    need_int32(kind, ins, 1, 2, 3)
    need(starts.shape == (lengths.shape[0] + 1,), kind, ins, "starts have one entry more than lengths")
    need(len(blocks.shape) == 2 and blocks.shape[:1] == lengths.shape, kind, ins, "blocks have a row a sequence")


# ------------------------------------------------------------------------------------- shape rules


@shape_rule("paged_rope")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    qkv, positions, slots, keys, _, *norms = ins
    need(len(norms) != 1, "paged_rope", ins, "q and k are normalised both or neither")
    need_floats("paged_rope", ins, qkv, *ins[3:])
    _need_pages("paged_rope", ins, 3)
    need_int32("paged_rope", ins, 1, 2)
    heads, kv_heads = integer(attrs, "heads"), keys.shape[1]
    need(heads >= 1 and integer(attrs, "context") >= 1, "paged_rope", ins, "heads and context are at least 1")
    dim, rest = divmod(qkv.shape[-1], heads + 2 * kv_heads)
    need(len(qkv.shape) == 2 and rest == 0, "paged_rope", ins, f"qkv must hold {heads} + 2 x {kv_heads} equal heads")
    need(dim % 2 == 0 and dim <= keys.shape[3], "paged_rope", ins, f"a head of {dim} does not fit the pages")
    need(
        positions.shape == slots.shape == qkv.shape[:1], "paged_rope", ins, "positions and slots have one entry a token"
    )
    need(all(t.shape == (dim,) for t in norms), "paged_rope", ins, f"q and k norms must be ({dim},)")
    return [((qkv.shape[0], heads, dim), qkv.dtype)]


@shape_rule("paged_decode")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q = ins[0]
    _need_heads("paged_decode", ins, 3)
    need_decode_tables("paged_decode", ins)
    return [((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)]


@shape_rule("paged_prefill")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    q = ins[0]
    _need_heads("paged_prefill", ins, 4)
    need_chunk_tables("paged_prefill", ins)
    return [((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)]


@shape_rule("copy_pages")
def _(ins: Shapes, attrs: Attrs) -> Outputs:
    source, target, pairs = ins
    need((source.shape[1:], source.dtype) == (target.shape[1:], target.dtype), "copy_pages", ins, "pages differ")
    need(len(source.shape) >= 1, "copy_pages", ins, "pages lie along the first axis")
    need(len(pairs.shape) == 2, "copy_pages", ins, "pairs are i32 (n, 2): from, to")
    need(pairs.dtype == "i32" and pairs.shape[1:] == (2,), "copy_pages", ins, "pairs are i32 (n, 2): from, to")
    need(attrs["direction"] in ("h2d", "d2h", "d2d"), "copy_pages", ins, "direction is h2d, d2h or d2d")
    need(0 <= _expected(ins, attrs) <= pairs.shape[0], "copy_pages", ins, "there are pairs for all expected pages")
    return [((1,), "i32")]


def _expected(ins: Shapes, attrs: Attrs) -> float:
    return float(attrs.get("expected_pages", ins[2].shape[0]))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- work rules


@work_rule("paged_rope")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    rows, width = ins[0].shape
    return Work(flops=3.0 * rows * width, hbm_bytes=2 * moved(ins[:1]) + moved(ins[1:3]))


def _attention_work(ins: Shapes, outs: Shapes, keys: int, sequences: int, pairs: float, context: int) -> Work:
    """4 flops a query, visible key and channel; each sequence's keys and values read once."""
    _, heads, dim = ins[0].shape
    pages = ins[keys]
    kv_bytes = 2.0 * sequences * context * pages.shape[1] * dim * ITEMSIZE[pages.dtype]
    return Work(flops=4.0 * pairs * heads * dim, hbm_bytes=moved([ins[0], *ins[1:keys], *outs]) + kv_bytes)


@work_rule("paged_decode")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    rows, context = ins[0].shape[0], integer(attrs, "context")
    return _attention_work(ins, outs, 3, rows, float(rows * context), context)


@work_rule("paged_prefill")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    sequences, context = ins[2].shape[0], integer(attrs, "context")
    each = ins[0].shape[0] / sequences
    pairs = sequences * each * max(context - (each - 1) / 2, each / 2)
    return _attention_work(ins, outs, 4, sequences, pairs, context)


@work_rule("copy_pages")
def _(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """Of the pages that are expected to move; the pairs are only what there is room for."""
    nbytes = moved(ins[:1]) / ins[0].shape[0] * _expected(ins, attrs)
    if attrs["direction"] == "d2d":
        return Work(hbm_bytes=2 * nbytes)
    return Work(hbm_bytes=nbytes, **{f"{attrs['direction']}_bytes": nbytes})


# ---------------------------------------------------------------------------------- public functions


def paged_rope(
    qkv: Value,
    positions: Value,
    slots: Value,
    keys: Value,
    values: Value,
    q_norm: Value | None = None,
    k_norm: Value | None = None,
    *,
    heads: int,
    context: int,
    theta: float = 10000.0,
    eps: float = 1e-6,
    scaling: Sequence[float] = (),
    yarn: Sequence[float] = (),
    name: str | None = None,
) -> Value:
    """`ops.rope_kv` on pages: token i stands at positions[i], and its keys and values go to slot slots[i], which is
    page * page size + offset, or -1 for nowhere. `context` is the number of positions there are."""
    norms = [v for v in (q_norm, k_norm) if v is not None]
    attrs: Attrs = {"heads": heads, "theta": theta, "eps": eps, "context": context}
    attrs |= numbered("paged_rope", "scaling", SCALING, scaling) | numbered("paged_rope", "yarn", YARN, yarn)
    inputs = [qkv, positions, slots, keys, values, *norms]
    return apply("paged_rope", inputs, attrs, name=name, writes=[keys, values])


def paged_decode(
    q: Value, lengths: Value, blocks: Value, keys: Value, values: Value, *, context: int, name: str | None = None
) -> Value:
    """One query a sequence: q (n, heads, dim) over the first lengths[i] keys of the pages blocks[i] -> (n, heads*dim).

    A sequence of length 0 gives zeros. `context` is the length that the cost counts.
    """
    return apply("paged_decode", [q, lengths, blocks, keys, values], {"context": context}, name=name)


def paged_prefill(
    q: Value,
    starts: Value,
    lengths: Value,
    blocks: Value,
    keys: Value,
    values: Value,
    *,
    context: int,
    name: str | None = None,
) -> Value:
    """Causal attention of chunks: rows starts[i] to starts[i + 1] of q are the last tokens of the lengths[i] that
    sequence i has in the pages blocks[i] -> (tokens, heads*dim). Rows beyond the last start give zeros.

    `context` is the length that the cost counts.
    """
    return apply("paged_prefill", [q, starts, lengths, blocks, keys, values], {"context": context}, name=name)


def copy_pages(
    source: Value,
    target: Value,
    pairs: Value,
    *,
    direction: str,
    expected_pages: float | None = None,
    name: str | None = None,
) -> Value:
    """Copy page pairs[i, 0] of `source` to page pairs[i, 1] of `target` for every i with neither below 0 -> how many.

    `direction` is "d2h", "h2d" or "d2d"; the state on the host's side is pinned host memory. The cost counts
    `expected_pages`, a mean over steps, or as many as there are pairs.
    """
    expected = axis_of("copy_pages", "pairs", pairs, 0) if expected_pages is None else expected_pages
    attrs: Attrs = {"direction": direction, "expected_pages": number("expected_pages", expected, GraphError, 0)}
    return apply("copy_pages", [source, target, pairs], attrs, name=name, writes=[target])
