"""The checker of slices: what the rewriter makes passes; a change of it is refused, unless it computes the same."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops, rewrite
from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.functions import Splittable
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import BATCH_ROWS, ROWS, Op, Work, rows_attr, spec
from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.models import llama
from taskgraph.schedule.follow import Held, Run, joined, picked, same
from taskgraph.schedule.slices import check_slices
from taskgraph.schedule.verify import check_plan
from tests.rewrite.test_rewrite import CPU, PAGED, TINY, assert_equal, batched_graphs, mixed, splits

# ------------------------------------------------------------------------------------ rows held


@st.composite
def held_rows(draw: st.DrawFn) -> Held:
    runs = st.builds(Run, st.sampled_from("ab"), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4))
    return tuple(draw(st.lists(runs, max_size=4)))


def written_out(held: Held) -> list[tuple[str, int]]:
    """Every row by itself."""
    return [(run.tensor, run.first + i * run.stride) for run in held for i in range(run.length)]


@given(held_rows(), held_rows(), st.integers(0, 16), st.integers(0, 16), st.integers(1, 4))
def test_rows_are_picked_joined_and_compared_as_written_out(
    one: Held, other: Held, start: int, stop: int, step: int
) -> None:
    assert written_out(picked(one, start, stop, step)) == written_out(one)[start:stop:step]
    assert written_out(joined([one, other])) == written_out(one) + written_out(other)
    assert same(one, other) == (written_out(one) == written_out(other))
    assert same(joined([picked(one, 0, start), picked(one, start, 99)]), one)


def with_tensor(graph: Graph, name: str, **changes: Any) -> Graph:
    return replace(graph, tensors=tuple(replace(t, **changes) if t.name == name else t for t in graph.tensors))


def with_op(graph: Graph, name: str, **changes: Any) -> Graph:
    return replace(graph, ops=tuple(replace(op, **changes) if op.name == name else op for op in graph.ops))


def op_of(graph: Graph, name: str) -> Op:
    return next(op for op in graph.ops if op.name == name)


def attr(graph: Graph, name: str, **values: Any) -> Graph:
    """The graph with other attributes of an op."""
    return with_op(graph, name, attrs=tuple(sorted({**dict(op_of(graph, name).attrs), **values}.items())))


# ------------------------------------------------------------------------------- right rewrites


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_the_rewriter_makes_passes(data: st.DataObject) -> None:
    graph = data.draw(batched_graphs())
    split = data.draw(splits(graph))
    sliced = rewrite.apply(graph, split)
    check_slices(graph, split, sliced)
    again = data.draw(splits(sliced))
    check_slices(sliced, again, rewrite.apply(sliced, again))


@pytest.mark.parametrize("sizes", [(3, 40), (2, 41), (20, 23), (1, 10, 32)])
def test_slices_over_pages_pass(sizes: tuple[int, ...]) -> None:
    check_slices(PAGED, Split.of(sizes), rewrite.split_batch(PAGED, sizes))


@pytest.mark.parametrize("sizes", [(2, 9), (3, 8), (1, 2, 4, 4)])
def test_slices_of_a_step_on_two_ranks_pass(sizes: tuple[int, ...]) -> None:
    for graph in (mixed(2), *rewrite.collective_variants(mixed(2)).values()):
        check_slices(graph, Split.of(sizes), rewrite.split_batch(graph, sizes))


def over_pages(same: bool, between: bool = False, part: bool = False, **rows: tuple[int, int]) -> Graph:
    """A writer of pages and a reader of them, whose rows are of one input (or of two inputs, unless `same`).

    `between` is an op that leads by its second input, `part` makes both take the first pages only, and `rows` are rows
    of the batch that an op stands for already.
    """
    b = GraphBuilder("pages")
    keys, values = (b.state(name, (3, 2, 32, 32), "f32") for name in ("keys", "values"))
    pages = [p.rows(0, 2) if part else p for p in (keys, values)]
    places = ops.TokenPlaces(*(b.input(name, (4,), "i32") for name in ("positions", "slots")), 32)
    q = ops.paged_rope(b.input("x", (4, 192), "f32"), places, *pages, spec=ops.RopeSpec(2), name="write")
    b.output(q)
    q = q if same else b.input("q", (4, 2, 32), "f32")
    if between:
        q = b.call(
            Splittable(np.copyto, (None, 0)),
            [ops.add(b.input("table", (3, 5), "f32"), b.input("other", (3, 5), "f32")), q],
            [spec("mixed", (4, 2, 32), "f32")], work=Work(flops=9.0), name="between",
        )  # fmt: skip
    tables = b.input("lengths", (4,), "i32"), b.input("blocks", (4, 2), "i32")
    b.output(ops.paged_decode(q, *tables, *pages, context=8, name="read"))
    graph = b.build()
    for name, span in rows.items():
        graph = attr(graph, name, **{BATCH_ROWS: span})
    return graph


def waits(graph: Graph) -> dict[str, set[str]]:
    """Every op -> the ops that must have ended before it."""
    return {
        op.name: {graph.ops[i].name for i in before} for op, before in zip(graph.ops, graph.predecessors(), strict=True)
    }


@pytest.mark.parametrize("between", [False, True])
def test_a_reader_need_not_wait_for_rows_behind_its_own(between: bool) -> None:
    graph = over_pages(same=True, between=between)
    sliced = rewrite.split_batch(graph, (1, 3))
    check_slices(graph, Split.of((1, 3)), sliced)
    assert "write#1" not in waits(sliced)["read#0"] and waits(sliced)["read#1"] >= {"write#0", "write#1"}


def test_rows_of_two_inputs_are_not_taken_for_one_batch() -> None:
    graph = over_pages(same=False)
    sliced = rewrite.split_batch(graph, (1, 3))
    check_slices(graph, Split.of((1, 3)), sliced)
    assert waits(sliced)["read#0"] >= {"write#0", "write#1"}
    wrong = sliced
    for k, rows in enumerate(((0, 1), (1, 4))):
        for name in ("read", "write"):
            wrong = attr(wrong, f"{name}#{k}", **{BATCH_ROWS: rows})
    with pytest.raises(PlanError, match="'write#1' and 'read#0' share state"):
        check_slices(graph, Split.of((1, 3)), wrong)


def test_what_ops_take_of_a_state_orders_them_whatever_they_say_of_the_batch() -> None:
    graph = over_pages(same=False, between=True, part=True)
    split = Split(((("between",), (1, 3)),))
    sliced = rewrite.apply(graph, split)
    for name, rows in (("write", (2, 4)), ("read", (0, 2))):
        sliced = attr(sliced, name, **{BATCH_ROWS: rows})
    check_slices(graph, split, sliced)
    assert "write" in waits(sliced)["read"]


def test_what_the_graph_itself_says_of_its_rows_holds() -> None:
    graph = over_pages(same=False, write=(4, 8), read=(0, 4))
    assert "write" not in waits(graph)["read"]
    sliced = rewrite.split_batch(graph, (1, 3))
    check_slices(graph, Split.of((1, 3)), sliced)
    with pytest.raises(PlanError, match="'read#1' has other attributes"):
        check_slices(graph, Split.of((1, 3)), attr(sliced, "read#1", **{BATCH_ROWS: (0, 3)}))


# ------------------------------------------------------------------------------- wrong rewrites


def touch(x: torch.Tensor, kv: torch.Tensor, out: torch.Tensor) -> None:
    kv += x.sum()
    torch.mul(x, 2.0, out=out)


def graph_of_all() -> Graph:
    """Products that disagree about their slices, a state that two ops write, a control edge, and a repeat."""
    b = GraphBuilder("all")
    x, w = b.input("x", (12, 8), "f32"), b.weight("w", (8, 8), "f32")
    pages = [b.state(name, (2, 2, 32, 32), "f32") for name in ("keys", "values")]
    places = [b.input(name, (12,), "i32") for name in ("positions", "slots")]
    up = ops.gemm(x, w, name="up")
    norm = ops.rmsnorm(up, b.weight("scale", (8,), "f32"), name="norm")
    for name in ("side", "idle"):
        made = [spec(f"{name}_made", (12, 8), "f32")]
        b.call(Splittable(np.copyto, (0,)), [norm], made, work=Work(hbm_bytes=7.0), name=name)
    last = b.call(
        Splittable(np.copyto, (0,), 2), [norm], [spec("copied", (12, 8), "f32")], work=Work(hbm_bytes=768.0),
        name="late", after=["side"],
    )  # fmt: skip
    for name in ("first", "second"):
        qkv = ops.gemm(last, b.weight(f"qkv_{name}", (8, 96), "f32"), name=f"{name}_qkv")
        b.output(ops.paged_rope(qkv, ops.TokenPlaces(*places, 32), *pages, spec=ops.RopeSpec(2), name=name))
    with b.repeat(3) as loop:
        one, two = loop.carry(norm, "one"), loop.carry(last, "two")
        b.output(
            loop.next(one, ops.add(one, two, name="sum")),
            loop.next(two, ops.swiglu(ops.gemm(two, b.weight("w2", (8, 16), "f32"), name="wide"), name="gate")),
        )
    return b.build()


ALL = graph_of_all()
SPLIT = Split(((("norm",), (6, 2, 4)), ((), (4, 8))))
SLICED = rewrite.apply(ALL, SPLIT)


def moved(graph: Graph, name: str, before: str) -> Graph:
    """The graph with one op ahead of another one."""
    left = [op for op in graph.ops if op.name != name]
    at = next(i for i, op in enumerate(left) if op.name == before)
    return replace(graph, ops=(*left[:at], op_of(graph, name), *left[at:]))


def renamed(graph: Graph, names: dict[str, str]) -> Graph:
    """The graph with other names of ops."""
    return replace(
        graph,
        ops=tuple(
            replace(op, name=names.get(op.name, op.name), after=tuple(names.get(a, a) for a in op.after))
            for op in graph.ops
        ),
    )


def shifted(graph: Graph, name: str, by: int) -> Graph:
    """The graph with an op that takes its first input's rows from elsewhere."""
    op = op_of(graph, name)
    views = op.views
    views[0] = replace(views[0], start=views[0].start + by, stop=views[0].stop + by)
    return attr(graph, name, **{ROWS: rows_attr(views)})


def carries(graph: Graph, order: Sequence[int]) -> Graph:
    """The graph whose carries take what others did after an iteration."""
    assert graph.repeat is not None
    old = graph.repeat.carries
    new = tuple(replace(c, next=old[i].next) for c, i in zip(old, order, strict=True))
    return replace(graph, repeat=replace(graph.repeat, carries=new))


def without(graph: Graph, name: str) -> Graph:
    """The graph less an op that stands ahead of its repeat."""
    assert graph.repeat is not None
    repeat = replace(graph.repeat, first=graph.repeat.first - 1, last=graph.repeat.last - 1)
    return replace(graph, ops=tuple(op for op in graph.ops if op.name != name), repeat=repeat)


def join(graph: Graph) -> Op:
    return next(op for op in graph.ops if op.kind == "concat_rows")


WRONG: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "rows of another slice": (lambda g: shifted(g, "norm#1", -2), "'norm#1' takes other rows of 'up.out'"),
    "a gap": (lambda g: shifted(g, "norm#1", 1), "'norm#1' takes other rows of 'up.out'"),
    "joined backwards": (
        lambda g: with_op(g, join(g).name, inputs=join(g).inputs[::-1], attrs=()), "other rows"
    ),
    "other work": (lambda g: with_op(g, "up#0", work=op_of(g, "up#0").work * 1.001), "'up#0' has Work"),
    "other work of a custom op": (lambda g: with_op(g, "side#1", work=Work(hbm_bytes=7.0)), "'side#1' has Work"),
    "other work of a join": (lambda g: with_op(g, join(g).name, work=Work(flops=1.0)), "has Work"),
    "swapped names": (lambda g: renamed(g, {"side#0": "side#1", "side#1": "side#0"}), "'side' is sliced into 'side#1'"),
    "the name of another op's slice": (lambda g: renamed(g, {"side#1": "late#2"}), "'side' is sliced into 'side#0'"),
    "dropped control edge": (lambda g: with_op(g, "late#1", after=("side#0",)), "'late#1' waits for"),
    "added control edge": (lambda g: with_op(g, "first#0", after=("late#1",)), "'first#0' waits for"),
    "other demand": (lambda g: with_op(g, "up#1", demand=tg.demand(sm=1)), "'up#1' has another kind, demand"),
    "other kind": (lambda g: with_op(g, "norm#0", kind="mystery"), "'norm#0' has another kind"),
    "rows beyond the last": (lambda g: attr(g, "norm#join.0.4", stop=7), "rows 0:7:1, which its input has not"),
    "other attribute": (lambda g: attr(g, "norm#0", eps=1e-3), "'norm#0' has other attributes"),
    "state not written": (lambda g: with_op(g, "first#1", writes=()), "'first#1' has another kind, demand or written"),
    "states in another order": (lambda g: moved(g, "first#1", "layer/sum#0"), "'first#1' comes to state"),
    "lost slice": (lambda g: without(g, "idle#1"), "'idle' is sliced into 'idle#0'"),
    "additional op": (
        lambda g: replace(g, ops=(*g.ops, replace(op_of(g, "up#0"), name="more", outputs=()))), "'more' is neither"
    ),
    "carried elsewhere": (lambda g: carries(g, [2, 1, 0, 3]), "the carry 'layer/one#0' takes"),
    "one iteration less": (lambda g: replace(g, repeat=replace(g.repeat, count=2)), "'all' is ('layer', 3)"),
    "outputs exchanged": (lambda g: replace(g, outputs=g.outputs[::-1]), "other outputs"),
    "an earlier name": (lambda g: replace(g, name="a"), "another name"),
    "a later name": (lambda g: replace(g, name="z"), "another name"),
    "what leaves the repeat in fewer bits": (
        lambda g: with_tensor(g, "layer:sum.out#0", dtype="bf16"), "'layer:sum.out#0' is not rows 0 to 4"
    ),
    "what leaves the repeat in more bits": (
        lambda g: with_tensor(g, "layer:sum.out#0", dtype="f64"), "'layer:sum.out#0' is not rows 0 to 4"
    ),
    "joined to another dtype": (
        lambda g: with_tensor(g, join(g).outputs[0], dtype="f64"), "out of other rows"
    ),
    "joined to more rows": (
        lambda g: with_tensor(g, join(g).outputs[0], shape=(7, 8)), "out of other rows"
    ),
    "another weight": (
        lambda g: replace(g, tensors=tuple(replace(t, dtype="f64") if t.name == "w" else t for t in g.tensors)), "'w'"
    ),
    "another weight taken": (
        lambda g: with_op(g, "first_qkv#0", inputs=(op_of(g, "first_qkv#0").inputs[0], "qkv_second")), "'qkv_first'"
    ),
    "the sum of one slice twice": (
        lambda g: with_op(g, "layer/sum#0", inputs=("layer/one#0", "layer/one#0")), "'layer/sum#0' takes other rows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_rewrite_is_refused(how: str) -> None:
    change, text = WRONG[how]
    check_slices(ALL, SPLIT, SLICED)
    wrong = change(SLICED)
    assert wrong != SLICED
    with pytest.raises(PlanError) as caught:
        check_slices(ALL, SPLIT, wrong)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_slices_within_a_unit_are_refused() -> None:
    """The rewriter refuses such sizes; here it sliced a graph whose op did not mind."""
    free = attr(ALL, "late", split_multiple=1)
    made = rewrite.split_batch(free, (3, 9))
    for name in ("late#0", "late#1"):
        made = attr(made, name, split_multiple=2)
    with pytest.raises(PlanError, match=r"'late' meet at \(0, 3, 12\).*multiples of 2"):
        check_slices(ALL, Split.of((3, 9)), made)


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (UNSPLIT, "does not split graph 'all'"),
        (Split(((("norm",), (2, 6, 4)), ((), (4, 8)))), "'norm' meet at (0, 6, 8, 12)"),
        (Split(((("norm",), (6, 6)), ((), (4, 8)))), "'norm' has 3 slices; the plan's split says 2"),
        (Split(((("norm",), (6, 2, 4)),)), "'up' has 2 slices; the plan's split says 1 at most"),
    ],
)
def test_slices_are_those_that_the_split_says(split: Split, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_slices(ALL, split, SLICED)
    assert text in str(caught.value)


def test_an_op_of_a_part_of_the_batch_has_the_slices_that_reach_it() -> None:
    """43 tokens, of which the first few decode: sizes that lie beyond those are no slices of their attention."""
    units = rewrite.splittable(PAGED)["layer/decode_attention"].units
    split = Split(((("layer/decode_attention",), (1, units, 42 - units)), ((), (1, 42))))
    made = rewrite.apply(PAGED, split)
    assert sum(op.name.startswith("layer/decode_attention#") for op in made.ops) == 2
    check_slices(PAGED, split, made)
    with pytest.raises(PlanError, match=r"decode_attention' has 2 slices; the plan's split says 1"):
        check_slices(PAGED, Split(((("layer/decode_attention",), (43,)), ((), (1, 42)))), made)


@pytest.mark.parametrize(("name", "rows"), [("decode_attention#1", (2, 2)), ("rope#1", (40, 43)), ("rope#1", (43, 43))])
def test_slices_over_pages_that_need_not_wait_for_what_they_read_are_refused(name: str, rows: tuple[int, int]) -> None:
    made = rewrite.split_batch(PAGED, (2, 41))
    with pytest.raises(PlanError, match=r"'layer/(rope|decode_attention)#1'.* share state .* without an order"):
        check_slices(PAGED, Split.of((2, 41)), attr(made, f"layer/{name}", **{BATCH_ROWS: rows}))


def test_verify_refuses_a_plan_of_a_wrong_rewrite() -> None:
    """The sliced graph is a claim to the checker, whoever makes it."""
    graph = llama.step_graph(TINY, batch=4, tokens=2, cache=8, dtype="f32")
    split = Split.of((2, 2))
    sliced = rewrite.apply(graph, split)
    plan = replace(tg.plan(sliced, CPU, "list"), graph=graph.fingerprint, split=split, seal="")
    check_plan(plan, graph, sliced, True)
    tg.verify(plan, graph)
    first, second = (op_of(sliced, f"layer/swiglu#{k}") for k in (0, 1))
    wrong = with_op(sliced, first.name, inputs=second.inputs)
    with pytest.raises(PlanError, match="'layer/swiglu#0' takes other rows"):
        check_plan(plan, graph, wrong, True)


# --------------------------------------------------------------------- any change of a right one


Change = Callable[[st.DrawFn, Graph, Op], Graph | None]
"""Changes an op of a graph in one place; None where the op has no such place."""


def other_input(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    i = draw(st.integers(0, len(op.inputs) - 1))
    one = graph.tensor[op.inputs[i]]
    like = [t.name for t in graph.tensors if (t.shape, t.dtype) == (one.shape, one.dtype) and t != one]
    if not like:
        return None
    return with_op(graph, op.name, inputs=(*op.inputs[:i], draw(st.sampled_from(like)), *op.inputs[i + 1 :]))


def other_rows(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    views = op.views
    if not views:
        return None
    i = draw(st.sampled_from(sorted(views)))
    by = draw(st.sampled_from([by for by in (-2, -1, 1, 2) if views[i].start + by >= 0]))
    views[i] = replace(views[i], start=views[i].start + by, stop=views[i].stop + by)
    return attr(graph, op.name, **{ROWS: rows_attr(views)})


def other_order(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    return None if op.views else with_op(graph, op.name, inputs=draw(st.permutations(op.inputs)))


def other_attribute(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    plain = {k: v for k, v in op.attrs if isinstance(v, (int, float)) and not isinstance(v, bool)}
    if not plain:
        return None
    key = draw(st.sampled_from(sorted(plain)))
    return attr(graph, op.name, **{key: plain[key] + 1})


def dropped(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    return replace(graph, ops=tuple(each for each in graph.ops if each is not op))


def other_place(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    others = [each.name for each in graph.ops if each is not op]
    return moved(graph, op.name, draw(st.sampled_from(others))) if others else None


def other_work(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    return with_op(graph, op.name, work=op.work * draw(st.sampled_from([0.5, 0.99, 1.001])))


def other_demand(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    return with_op(graph, op.name, demand=tg.demand(sm=1))


def other_wait(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    before = [each.name for each in graph.ops[: graph.ops.index(op)]]
    return with_op(graph, op.name, after=(draw(st.sampled_from(before)),)) if before else None


def unwritten(draw: st.DrawFn, graph: Graph, op: Op) -> Graph | None:
    return with_op(graph, op.name, writes=op.writes[1:]) if op.writes else None


SEEN: tuple[Change, ...] = (other_input, other_rows, other_order, other_attribute, dropped, other_place)
"""What a change of these does shows in what the graph computes, if it does anything."""
TO_THE_LETTER: tuple[Change, ...] = (other_work, other_demand, other_wait, unwritten)


@st.composite
def sliced_graphs(draw: st.DrawFn) -> tuple[Graph, Split, Graph]:
    """A random graph, a split that slices at least one of its ops in two, and what the rewriter makes of both."""
    graph = draw(batched_graphs().filter(rewrite.splittable))
    infos = rewrite.splittable(graph)
    parts = draw(splits(graph)).parts
    name = draw(st.sampled_from(sorted(infos)))
    first = draw(st.integers(1, (infos[name].units - 1) // infos[name].multiple)) * infos[name].multiple
    others = tuple((names, sizes) for names, sizes in parts if name not in names)
    split = Split((*others, ((name,), (first, infos[name].units - first))))
    return graph, split, rewrite.apply(graph, split)


@settings(max_examples=300, deadline=None)
@given(sliced_graphs(), st.data())
def test_one_change_of_a_right_rewrite_is_refused_or_computes_the_same(
    made: tuple[Graph, Split, Graph], data: st.DataObject
) -> None:
    graph, split, sliced = made
    op = data.draw(st.sampled_from(sliced.ops))
    order = data.draw(st.permutations([*SEEN, *TO_THE_LETTER]))
    try:
        tried = ((change, change(data.draw, sliced, op)) for change in order)
        how, changed = next((change, other) for change, other in tried if other not in (None, sliced))
        assert changed is not None
        check_slices(graph, split, changed)
    except GraphError:
        return  # no graph at all
    except PlanError as error:
        assert "\n" not in str(error)
        return
    assert how not in TO_THE_LETTER
    assert_equal(graph, changed)


# ---------------------------------------------------------------------- what the checker has found


def test_rows_of_a_state_are_taken_before_it_is_written() -> None:
    """Not when somebody needs them: by then the state has changed."""
    b = GraphBuilder("stale")
    x, kv = b.input("x", (4, 8), "f32"), b.state("kv", (4, 8), "f32")
    before = ops.slice_rows(kv, 0, 4, name="before")
    made = b.call(touch, [x, kv.written()], [spec("made", (4, 8), "f32")], work=Work(flops=1.0), name="touch")
    b.output(ops.add(before, made, name="sum"))
    graph = b.build()
    split = Split(((("sum",), (1, 3)),))
    sliced = rewrite.apply(graph, split)
    check_slices(graph, split, sliced)
    assert_equal(graph, sliced)


def test_rows_that_others_wait_for_are_moved_where_they_were() -> None:
    b = GraphBuilder("awaited")
    x = b.input("x", (8, 4), "f32")
    double = ops.add(x, x, name="double")
    part = ops.slice_rows(double, 2, 6, name="part")
    b.output(part, ops.add(part, part, name="twice", after=["part"]))
    graph = b.build()
    split = Split(((("double",), (3, 5)), (("twice",), (1, 3))))
    sliced = rewrite.apply(graph, split)
    check_slices(graph, split, sliced)
    assert_equal(graph, sliced)
