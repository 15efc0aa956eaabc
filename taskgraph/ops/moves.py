"""Ops that move data: copies, rows, pages between memories, and collectives between ranks."""

import math
from collections.abc import Sequence

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import Demand, Work
from taskgraph.ops.kinds import Axes, Kind, Output, ShapeRule, WorkRule, apply, axis_of, register
from taskgraph.ops.signatures import COUNT, PLACE, SMALL, WORD, Attrs, Shapes, Signature, moved, need
from taskgraph.record import number

DIRECTIONS = ("h2d", "d2h", "d2d")


def _copied(direction: object, nbytes: float) -> Work:
    """Within the device a read and a write, else one of them and the link to the host."""
    if direction == "d2d":
        return Work(hbm_bytes=2 * nbytes)
    return Work(hbm_bytes=nbytes, **{f"{direction}_bytes": nbytes})


# ------------------------------------------------------------------------------------------- copy


def copy(x: Value, *, direction: str = "d2d", name: str | None = None, demand: Demand | None = None) -> Value:
    """Copy x between host and device ("h2d", "d2h") or within the device ("d2d")."""
    return apply("copy", [x], {"direction": direction}, name=name, demand=demand)


def copy_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    need(attrs["direction"] in DIRECTIONS, "copy", ins, "direction is h2d, d2h or d2d")
    return x.shape, x.dtype


def copy_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    return _copied(attrs["direction"], moved(ins))


register(Kind("copy", Signature("*", {"direction": WORD}), copy_shape, copy_work, split=(0,)))


# ------------------------------------------------------------------------------------------- rows


def concat_rows(parts: Sequence[Value], *, name: str | None = None) -> Value:
    """The rows of all `parts`, one after another, copied into one tensor."""
    return apply("concat_rows", parts, name=name)


def concat_rows_shape(ins: Shapes, attrs: Attrs) -> Output:
    rows = {(t.shape[1:], t.dtype) for t in ins}
    need(len(rows) == 1 and len(ins[0].shape) >= 1, "concat_rows", ins, "all must have one dtype and equal rows")
    return (sum(t.shape[0] for t in ins), *ins[0].shape[1:]), ins[0].dtype


def rows_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """Each row of the output read and written once."""
    return Work(hbm_bytes=2 * moved(outs))


def concat_rows_split(ins: Shapes, attrs: Attrs) -> Axes:
    return (0,) * len(ins)


register(Kind("concat_rows", Signature("+", many=True), concat_rows_shape, rows_work, concat_rows_split))


def slice_rows(x: Value, start: int, stop: int, step: int = 1, *, name: str | None = None) -> Value:
    """x[start:stop:step] along the first axis, copied (the last token of every sequence, say)."""
    return apply("slice_rows", [x], {"start": start, "stop": stop, "step": step}, name=name)


def slice_rows_shape(ins: Shapes, attrs: Attrs) -> Output:
    (x,) = ins
    start, stop, step = (attrs.integer(key) for key in ("start", "stop", "step"))
    need(0 <= start < stop <= x.shape[0] and step >= 1, "slice_rows", ins, f"rows {start}:{stop}:{step} do not exist")
    return (len(range(start, stop, step)), *x.shape[1:]), x.dtype


SLICE_ROWS = {"start": PLACE, "stop": COUNT, "step": COUNT}
register(Kind("slice_rows", Signature("+", SLICE_ROWS), slice_rows_shape, rows_work, split=(0,)))


# ------------------------------------------------------------------------------------------ pages


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
    attrs = Attrs(direction=direction, expected_pages=number("expected_pages", expected, GraphError, 0))
    return apply("copy_pages", [source, target, pairs], attrs, name=name, writes=(1,))


def copy_pages_shape(ins: Shapes, attrs: Attrs) -> Output:
    source, target, pairs = ins
    need((source.shape[1:], source.dtype) == (target.shape[1:], target.dtype), "copy_pages", ins, "pages differ")
    need(len(source.shape) >= 1, "copy_pages", ins, "pages lie along the first axis")
    need(pairs.dtype == "i32" and pairs.shape[1:] == (2,), "copy_pages", ins, "pairs are i32 (n, 2): from, to")
    need(attrs["direction"] in DIRECTIONS, "copy_pages", ins, "direction is h2d, d2h or d2d")
    need(0 <= _expected(ins, attrs) <= pairs.shape[0], "copy_pages", ins, "there are pairs for all expected pages")
    return (1,), "i32"


def _expected(ins: Shapes, attrs: Attrs) -> float:
    return attrs.number("expected_pages", float(ins[2].shape[0]))


def copy_pages_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """The pages that are expected to move; the pairs are only what there is room for."""
    return _copied(attrs["direction"], moved(ins[:1]) / ins[0].shape[0] * _expected(ins, attrs))


def copy_pages_pairs(ins: Shapes, attrs: Attrs) -> tuple[int, int]:
    return 0, min(ins[0].shape[0], ins[1].shape[0])


register(
    Kind(
        "copy_pages", Signature("++2", {"direction": WORD}, {"expected_pages": SMALL}), copy_pages_shape,
        copy_pages_work, split=(None, None, None), index_ranges={2: copy_pages_pairs},
    )
)  # fmt: skip


# ------------------------------------------------------------------------------------ collectives

COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter")
NCCL_CHANNELS = 32
NCCL_SMS = Demand(sm=(1, NCCL_CHANNELS))
"""What a collective asks for unless told: NCCL drives a link with one block a channel, and uses 1 to 32 of them by
default (minCTAs and maxCTAs of its ncclConfig_t)."""


def all_gather(x: Value, *, ranks: int, axis: int = 0, name: str | None = None, demand: Demand | None = None) -> Value:
    """The x of all `ranks`, in their order, joined along `axis`."""
    return _collective("all_gather", x, ranks, axis, name, demand)


def all_reduce(x: Value, *, ranks: int, axis: int = 1, name: str | None = None, demand: Demand | None = None) -> Value:
    """The sum of x over all `ranks`; `axis` is where a ring cuts it into chunks."""
    return _collective("all_reduce", x, ranks, axis, name, demand)


def reduce_scatter(
    x: Value, *, ranks: int, axis: int = 0, name: str | None = None, demand: Demand | None = None
) -> Value:
    """This rank's share, cut along `axis`, of the sum of x over all `ranks`."""
    return _collective("reduce_scatter", x, ranks, axis, name, demand)


def _collective(kind: str, x: Value, ranks: int, axis: int, name: str | None, demand: Demand | None) -> Value:
    wanted = demand if demand is not None else NCCL_SMS if ranks != 1 else None
    return apply(kind, [x], {"ranks": ranks, "axis": axis}, name=name, demand=wanted)


def collective_shape(kind: str) -> ShapeRule:
    """The input, whose `axis` a gather makes `ranks` times as long and a scatter cuts into as many parts."""

    def shape(ins: Shapes, attrs: Attrs) -> Output:
        (x,) = ins
        ranks, axis = attrs.integer("ranks"), attrs.integer("axis")
        need(x.dtype != "bool", kind, ins, "sums and joins are of numbers")
        need(ranks >= 1 and 0 <= axis < len(x.shape), kind, ins, f"no {ranks} ranks on axis {axis}")
        times, parts = {"all_gather": (ranks, 1), "reduce_scatter": (1, ranks)}.get(kind, (1, 1))
        need(x.shape[axis] % parts == 0, kind, ins, f"{ranks} ranks cannot share axis {axis}")
        return (*x.shape[:axis], x.shape[axis] * times // parts, *x.shape[axis + 1 :]), x.dtype

    return shape


def collective_work(passes: int, reduces: bool) -> WorkRule:
    """Ring algorithms (Patarasuk and Yuan 2009): in each pass a rank sends (ranks - 1) / ranks of the whole tensor."""

    def work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
        whole = max(ins[0], outs[0], key=lambda t: t.nbytes)
        sent = (attrs.integer("ranks") - 1) / attrs.integer("ranks")
        flops = sent * math.prod(whole.shape) if reduces else 0.0
        return Work(flops, moved(ins) + moved(outs), link_bytes=passes * sent * whole.nbytes)

    return work


def collective_split(ins: Shapes, attrs: Attrs) -> Axes | None:
    """What is joined or shared along the batch cannot be sliced along it."""
    return None if attrs.integer("axis") == 0 else (0,)


_COLLECTIVE = Signature("+", {"ranks": COUNT, "axis": PLACE})
for _kind, _passes, _reduces in (("all_gather", 1, False), ("all_reduce", 2, True), ("reduce_scatter", 1, True)):
    register(Kind(_kind, _COLLECTIVE, collective_shape(_kind), collective_work(_passes, _reduces), collective_split))
