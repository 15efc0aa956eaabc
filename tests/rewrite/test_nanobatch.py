"""Slices compute what the whole did: by an interpreter that only mixes rows, on random graphs, and by structure."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph import ops, rewrite
from taskgraph.errors import GraphError
from taskgraph.graph.functions import Splittable
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import BATCH_ROWS, Op, Work, seen_inputs, spec
from taskgraph.ops import KINDS, Attrs
from tests.rewrite.test_rewrite import PAGED, batched_graphs, reshape, splits

BATCH_AXES: Mapping[str, tuple[int | None, ...]] = {
    "embedding": (0, None), "gemm": (0, None, None, None), "rmsnorm": (0, None), "add": (0, 0), "copy": (0,),
    "swiglu": (0,), "rope": (0, 0), "rope_kv": (0, 0, 0, 0), "attention": (0, 0, 0, 0), "decode_attention": (0, 1),
    "call": (0,), "argmax": (0,), "all_reduce": (0,), "slice_rows": (0,), "concat_rows": (0,) * 9,
}  # fmt: skip
Ratios = dict[tuple[str, int], float]


def mixed_rows(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    """(count,) a number for each of `count` equal parts of the rows along `axis`, or a row's for its equal part."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    numbers = rows @ np.cos(np.arange(rows.shape[1]))
    if len(numbers) >= count:
        return numbers.reshape(count, -1) @ np.cos(np.arange(len(numbers) // count))
    return np.repeat(numbers, count // len(numbers))


def computed(op: Op, inputs: list[np.ndarray], shape: tuple[int, ...], ratios: Ratios) -> np.ndarray:
    """What `op` makes of its inputs: moved rows, or numbers that depend on the rows of all inputs, row by row."""
    if op.kind == "slice_rows":
        return inputs[0][op.integer("start") : op.integer("stop") : op.integer("step")]
    if op.kind == "concat_rows":
        return np.concatenate(inputs)
    total = np.zeros(shape[0])
    for i, array in enumerate(inputs):
        axis = BATCH_AXES[op.kind][i]
        if op.kind == "gemm" and i == len(inputs) - 1 and dict(op.attrs).get("residual"):
            axis = 0
        if axis is None:
            total += np.cos(array).sum() * (i + 1)
            continue
        stem = op.name.partition("#")[0]
        ratio = ratios.setdefault((stem, i), array.shape[axis] / shape[0])
        assert ratio == array.shape[axis] / shape[0], f"input {i} of {op.name} has other rows than it should"
        total += mixed_rows(array, axis, shape[0]) * (i + 1)
    columns = np.cos(np.arange(int(np.prod(shape[1:]))) + 1.0)
    made: np.ndarray = np.outer(np.tanh(total), columns).reshape(shape)
    return made


def interpreted(graph: Graph, ratios: Ratios) -> dict[str, np.ndarray]:
    """The outputs, by the names that the graph gives them."""
    flat = graph.flat()
    rng = np.random.default_rng(0)
    values = {t.name: rng.normal(size=t.shape) for t in flat.with_role("input", "weight", "state")}
    for op in flat.ops:
        inputs = []
        for i, name in enumerate(op.inputs):
            array, view = values[name], op.views.get(i)
            if view is not None:
                array = array[(slice(None),) * view.axis + (slice(view.start, view.stop),)]
                assert array.shape[view.axis] == view.stop - view.start
            inputs.append(array)
        for name in op.outputs:
            values[name] = computed(op, inputs, flat.tensor[name].shape, ratios)
            assert values[name].shape == flat.tensor[name].shape
    return {name: values[made] for name, made in zip(graph.outputs, flat.outputs, strict=True)}


@settings(max_examples=80)
@given(st.data())
def test_slices_compute_what_the_whole_did(data: st.DataObject) -> None:
    graph = data.draw(batched_graphs())
    once = rewrite.apply(graph, data.draw(splits(graph)))
    twice = rewrite.apply(once, data.draw(splits(once)))
    ratios: Ratios = {}
    wanted = interpreted(graph, ratios)
    for other in (once, twice):
        found = interpreted(other, ratios)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-9, err_msg=name)
        flops, whole = defaultdict(float), defaultdict(float)
        for of, where in ((other, flops), (graph, whole)):
            for op in of.flat().ops:
                where[op.name.partition("#")[0]] += op.work.flops
        assert all(flops[name] == pytest.approx(whole[name]) for name in whole if whole[name])
        for op in other.ops:
            kind = KINDS.get(op.kind)
            if kind is not None:
                outputs = [other.tensor[name] for name in op.outputs]
                assert op.work == kind.work(seen_inputs(op, other.tensor), outputs, Attrs(op.attrs))


# ---------------------------------------------------------------------------------------- by structure


def chain(rows: int = 12) -> Graph:
    """make, use and end on (rows, 4)."""
    b = GraphBuilder("chain")
    x, y = b.input("x", (rows, 4), "f32"), b.input("y", (rows, 4), "f32")
    made = ops.add(x, y, name="make")
    b.output(ops.add(ops.add(made, x, name="use"), y, name="end"))
    return b.build()


def rows_of(graph: Graph, name: str) -> dict[int, tuple[str, tuple[int, int] | None]]:
    """The inputs of an op, each with the rows of it that are taken."""
    op = next(op for op in graph.ops if op.name == name)
    views = {i: (v.start, v.stop) for i, v in op.views.items()}
    return {i: (each, views.get(i)) for i, each in enumerate(op.inputs)}


def test_slices_take_their_rows_of_what_is_whole_and_pieces_of_what_is_cut() -> None:
    split = rewrite.split_batch(chain(), (2, 4, 6))
    assert [op.name for op in split.ops] == [
        "make#0", "make#1", "make#2", "use#0", "use#1", "use#2", "end#0", "end#1", "end#2", "end#join"
    ]  # fmt: skip
    assert rows_of(split, "make#1") == {0: ("x", (2, 6)), 1: ("y", (2, 6))}
    assert rows_of(split, "use#2") == {0: ("make.out#2", None), 1: ("x", (6, 12))}
    assert split.tensor["make.out#1"].shape == (4, 4)
    (join,) = (op for op in split.ops if op.name == "end#join")
    assert (join.kind, join.inputs, join.outputs) == (
        "concat_rows", ("end.out#0", "end.out#1", "end.out#2"), ("end.out",)
    )  # fmt: skip
    assert split.outputs == ("end.out",)


def test_only_the_rows_that_are_wanted_are_joined_and_only_once() -> None:
    split = rewrite.split_batch(chain(), {"make": (4, 4, 4), "use": (6, 6), "end": (6, 6)})
    joins = {op.name: op for op in split.ops if op.kind == "concat_rows"}
    assert set(joins) == {"make#join.0.6", "make#join.6.12", "end#join"}
    assert rows_of(split, "make#join.0.6") == {0: ("make.out#0", None), 1: ("make.out#1", (0, 2))}
    assert rows_of(split, "make#join.6.12") == {0: ("make.out#1", (2, 4)), 1: ("make.out#2", None)}
    assert joins["make#join.0.6"].work.hbm_bytes == 2 * 6 * 4 * 4
    assert split.tensor["make#join.0.6.out"].shape == (6, 4)


def test_what_is_not_named_stays_whole() -> None:
    split = rewrite.split_batch(chain(), (3, 9), ["use"])
    assert [op.name for op in split.ops] == ["make", "use#0", "use#1", "use#join", "end"]
    assert rows_of(split, "use#1") == {0: ("make.out", (3, 12)), 1: ("x", (3, 12))}
    assert rows_of(split, "end") == {0: ("use.out", None), 1: ("y", None)}


def test_work_is_that_of_the_slice() -> None:
    split = rewrite.split_batch(chain(), (3, 9), ["use"])
    work = {op.name: op.work for op in split.ops}
    assert work["use#0"].hbm_bytes == 3 * 3 * 4 * 4 and work["use#1"].hbm_bytes == 3 * 9 * 4 * 4


def test_which_ops_can_be_split_into_what() -> None:
    b = GraphBuilder("kinds")
    x = b.input("x", (6, 4), "f32")
    pairs = b.call(Splittable(reshape, (0,), 2), [x], [spec("p", (6, 4), "f32")], work=Work(flops=1.0), name="pairs")
    threes = b.call(Splittable(reshape, (0,), 3), [x], [spec("t", (6, 4), "f32")], work=Work(flops=1.0), name="threes")
    fours = b.call(Splittable(reshape, (0,), 4), [x], [spec("f", (6, 4), "f32")], work=Work(flops=1.0), name="fours")
    last = ops.slice_rows(ops.add(pairs, threes, name="sum"), 0, 5, name="cut")
    b.output(last, fours)
    infos = rewrite.splittable(b.build())
    assert {name: (i.units, i.multiple, i.batch) for name, i in infos.items()} == {
        "pairs": (6, 2, 6), "threes": (6, 3, 6), "sum": (6, 1, 6)
    }  # fmt: skip
    split = rewrite.split_batch(b.build(), (3, 3))
    names = [op.name for op in split.ops]
    assert "threes#1" in names and "sum#1" in names and "pairs" in names and "fours" in names


@pytest.mark.parametrize(
    ("sizes", "names", "says"),
    [
        ((), None, r"sizes \(\) must be positive ints, one a slice"),
        ((12, 0), None, "must be positive ints"),
        ((-1, 13), None, "must be positive ints"),
        ((5, 5), None, r"sizes \(5, 5\) sum to 10; the batches of graph 'chain' are 12\."),
        ((5, 5), ["use"], r"sum to 10; op 'use' has 12 units of a batch of 12\. Make them sum to one of these"),
        ((6, 6), ["use", "use"], "op 'use' is given two slicings; name it once"),
        ((6, 6), ["us"], "has no op 'us'; near it are 'use'"),
        ((6, 6), ["zzzz"], "has no op 'zzzz'; near it are 'make', 'use', 'end'"),
    ],
)
def test_what_cannot_be_done_is_said(sizes: tuple[int, ...], names: list[str] | None, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        rewrite.split_batch(chain(), sizes, names)


def test_one_slice_is_the_same_graph_and_one_token_can_be_a_slice() -> None:
    graph = chain()
    assert rewrite.split_batch(graph, (12,)) is graph
    split = rewrite.split_batch(graph, (1, 11))
    assert split.tensor["make.out#0"].shape == (1, 4)
    halves = rewrite.split_batch(graph, {"make": (6, 6), "use": (12,)})
    assert [op.name for op in halves.ops] == ["make#0", "make#1", "make#join", "use", "end"]


def test_a_split_of_a_split_numbers_its_joins() -> None:
    once = rewrite.split_batch(chain(), (6, 6), ["make"])
    assert "make#join" in [op.name for op in once.ops]
    twice = rewrite.split_batch(once, (3, 3), ["make#0"])
    names = [op.name for op in twice.ops]
    assert len(names) == len(set(names)) and "make#0#1" in names


def test_a_repeat_keeps_its_count_and_carries_its_pieces() -> None:
    b = GraphBuilder("loop")
    x = b.input("x", (8, 4), "f32")
    before = ops.add(x, x, name="before")
    with b.repeat(3) as loop:
        inside = loop.carry(before)
        value = loop.next(inside, ops.add(inside, before, name="body"))
    b.output(ops.add(value, x, name="after"))
    split = rewrite.split_batch(b.build(), (3, 5))
    repeat = split.repeat
    assert repeat is not None and (repeat.count, len(repeat.carries)) == (3, 2)
    names = [op.name for op in split.ops]
    assert names[: repeat.first] == ["before#0", "before#1"]
    assert [name.rpartition("/")[2] for name in names[repeat.first : repeat.last]] == ["body#0", "body#1"]
    assert names[repeat.last :] == ["after#0", "after#1", "after#join"]
    assert [c.init for c in repeat.carries] == ["before.out#0", "before.out#1"]
    assert [split.tensor[c.inside].shape for c in repeat.carries] == [(3, 4), (5, 4)]
    assert [split.tensor[c.result].shape for c in repeat.carries] == [(3, 4), (5, 4)]


def test_slices_that_touch_the_same_pages_say_which_rows_of_the_batch_they_are() -> None:
    split = rewrite.split_batch(PAGED, (3, 10, 30))
    ordered = {op.name: dict(op.attrs)[BATCH_ROWS] for op in split.ops if BATCH_ROWS in dict(op.attrs)}
    ropes = [turn for name, turn in ordered.items() if "/rope#" in name]
    assert ropes == [(0, 3), (3, 13), (13, 43)]
    decodes = [turn for name, turn in ordered.items() if "decode_attention" in name]
    assert decodes and decodes[-1][1] == 3
