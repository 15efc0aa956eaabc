"""Rewrites against the graph they came from: outputs and states on the CPU, work, structure, and what is refused."""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops, record, rewrite
from taskgraph.errors import GraphError
from taskgraph.graph import device as specs
from taskgraph.graph.functions import Splittable
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work, spec
from taskgraph.models import llama, paged
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE, CpuSite
from taskgraph.runtime.cpu.standard import bind

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
"""A made-up device of two cores, so that no test here waits for the probe or depends on it."""
HIDDEN, HEADS, DIM, CACHE, VOCABULARY = 16, 2, 8, 8, 23
WIDTH = (HEADS + 2) * DIM
TINY = ModelConfig(
    name="tiny", family="qwen3", hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
    vocab_size=50, norm_eps=1e-5, rope_theta=1e4, max_context=32, tie_embeddings=False,
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def random_tensors(graph: Graph, seed: int = 0) -> Tensors:
    """Values for all that the graph does not make; places and ids are small integers."""
    made = torch.Generator().manual_seed(seed)
    return {
        t.name: torch.randint(0, 3, t.shape, generator=made)
        if t.dtype == "i64"
        else torch.randn(t.shape, generator=made).to(TORCH_DTYPE[t.dtype])
        for t in graph.flat().with_role("input", "weight", "state")
    }


def run(graph: Graph, tensors: Tensors, scheduler: str = "list") -> tuple[Tensors, Tensors]:
    """Outputs, and states afterwards, of one replay on the CPU backend; the plan is verified."""
    given = {name: t.clone() for name, t in tensors.items()}
    p = tg.plan(graph, CPU, scheduler)
    tg.verify(p, graph)
    with tg.compile(graph, p) as exe:
        outputs = exe(given)
    flat = graph.flat()
    by_name = {name: outputs[made] for name, made in zip(graph.outputs, flat.outputs, strict=True)}
    return by_name, {t.name: given[t.name] for t in flat.with_role("state")}


def assert_equal(graph: Graph, other: Graph, seed: int = 0, tolerance: float = 1e-5) -> None:
    tensors = random_tensors(graph, seed)
    wanted, got = run(graph, tensors, "sequential"), run(other, tensors)
    for ours, theirs in zip(wanted, got, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            torch.testing.assert_close(
                theirs[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---------------------------------------------------------------------------------- random graphs


class Maker:
    """Appends random ops on rows of `batch * each` tokens to a builder."""

    def __init__(self, draw: st.DrawFn, b: GraphBuilder, batch: int, each: int) -> None:
        self.draw, self.b, self.batch, self.each, self.count = draw, b, batch, each, 0
        self.positions = b.input("positions", (batch,), "i64")
        self.places = b.input("places", (batch * each,), "i64")

    def weight(self, *shape: int) -> Value:
        self.count += 1
        return self.b.weight(f"w{self.count}", shape, "f32")

    def step(self, pool: list[Value]) -> Value:
        """One or more ops on values of the pool, each (tokens, HIDDEN), to another such value."""
        kind = self.draw(st.sampled_from(sorted(name for name in dir(self) if name.startswith("do_"))))
        made: Value = getattr(self, kind)(*(self.draw(st.sampled_from(pool)) for _ in range(2)))
        return made

    def do_gemm(self, x: Value, y: Value) -> Value:
        bias = self.weight(HIDDEN) if self.draw(st.booleans()) else None
        return ops.gemm(x, self.weight(HIDDEN, HIDDEN), bias, y if self.draw(st.booleans()) else None)

    def do_norm(self, x: Value, y: Value) -> Value:
        return ops.rmsnorm(x, self.weight(HIDDEN))

    def do_add(self, x: Value, y: Value) -> Value:
        return ops.add(x, y)

    def do_copy(self, x: Value, y: Value) -> Value:
        return ops.copy(x, direction=self.draw(st.sampled_from(["h2d", "d2d"])))

    def do_swiglu(self, x: Value, y: Value) -> Value:
        return ops.swiglu(ops.gemm(x, self.weight(2 * HIDDEN, HIDDEN), transpose_w=True))

    def do_rope(self, x: Value, y: Value) -> Value:
        q = self.b.call(
            Splittable(reshape, (0,)), [x], [spec(f"heads{len(self.b._ops)}", (x.shape[0], HEADS, DIM), "f32")],
            work=Work(hbm_bytes=128.0 * x.shape[0]),
        )  # fmt: skip
        q = ops.rope(q, self.places)
        return self.b.call(
            reshape, [q], [spec(f"rows{len(self.b._ops)}", x.shape, "f32")], work=Work(hbm_bytes=128.0 * x.shape[0])
        )  # type: ignore[no-any-return]

    def do_attention(self, x: Value, y: Value) -> Value:
        self.count += 1
        room = (self.batch, 1, CACHE, DIM)
        keys, values = (self.b.state(f"{n}{self.count}", room, "f32") for n in ("k", "v"))
        qkv = ops.gemm(x, self.weight(HIDDEN, WIDTH))
        q = ops.rope_kv(qkv, self.positions, keys, values, spec=ops.RopeSpec(HEADS))
        return ops.attention(q, self.positions, keys, values)

    def do_decode(self, x: Value, y: Value) -> Value:
        self.count += 1
        tokens = self.batch * self.each
        kv = self.b.state(f"kv{self.count}", (2, tokens, 5, HEADS, DIM), "f32")
        q = self.b.call(
            Splittable(reshape, (0,), 2), [x], [spec(f"q{self.count}", (tokens, HEADS, DIM), "f32")],
            work=Work(flops=5.0 * tokens),
        )  # fmt: skip
        mixed = ops.decode_attention(q, kv)
        return self.b.call(
            Splittable(reshape, (0,)), [mixed], [spec(f"m{self.count}", x.shape, "f32")], work=Work(flops=5.0 * tokens)
        )  # type: ignore[no-any-return]

    def do_regroup(self, x: Value, y: Value) -> Value:
        tokens = x.shape[0]
        cut = self.draw(st.integers(0, tokens))
        first = [x.rows(0, cut) if self.draw(st.booleans()) else ops.slice_rows(x, 0, cut)] if cut else []
        last = [ops.slice_rows(y, cut, tokens)] if cut < tokens else []
        return ops.concat_rows([*first, *last])

    def do_ranks(self, x: Value, y: Value) -> Value:
        return ops.all_reduce(x, ranks=1, axis=self.draw(st.integers(0, 1)))


def reshape(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.reshape(out.shape))


@st.composite
def batched_graphs(draw: st.DrawFn) -> Graph:
    """Random graphs over a batch: diamonds, states, views, sometimes a repeat with one or two carries."""
    b = GraphBuilder("batched")
    batch, each = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    make = Maker(draw, b, batch, each)
    tokens = b.input("tokens", (batch * each,), "i64")
    pool = [ops.embedding(tokens, b.weight("table", (VOCABULARY, HIDDEN), "f32"))]
    for _ in range(draw(st.integers(0, 4))):
        pool.append(make.step(pool))
    if draw(st.booleans()):
        with b.repeat(draw(st.integers(1, 3))) as loop:
            inside = [
                loop.carry(v, f"c{i}")
                for i, v in enumerate(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=2)))
            ]
            body = [*inside, draw(st.sampled_from(pool))]
            for _ in range(draw(st.integers(1, 4))):
                body.append(make.step(body))
            nexts = [draw(st.sampled_from([v for v in body if v.name.startswith("layer/")])) for _ in inside]
            nexts[0] = body[-1]
            pool += [_next(loop, v, n, i) for i, (v, n) in enumerate(zip(inside, nexts, strict=True))]
    for _ in range(draw(st.integers(0, 2))):
        pool.append(make.step(pool))
    last = ops.slice_rows(pool[-1], each - 1, batch * each, each)
    b.output(
        last,
        ops.argmax(last),
        pool[-1],
        *draw(st.lists(st.sampled_from(pool[1:]) if pool[1:] else st.nothing(), max_size=2)) if pool[1:] else [],
    )
    return b.build()


def _next(loop: Any, inside: Value, value: Value, number: int) -> Value:
    """The result of a carry; two carries may have the same next, so each gets its own name."""
    if any(c.next == value.name for c in loop._carries.values()):
        value = ops.copy(value)
    return loop.next(inside, value)  # type: ignore[no-any-return]


def sizes_of(draw: st.DrawFn, units: int, multiple: int) -> tuple[int, ...]:
    """Slices of multiples that sum to `units`; the last may be odd."""
    cuts = draw(st.sets(st.integers(1, max((units - 1) // multiple, 1)).map(lambda n: n * multiple), max_size=3))
    borders = [0, *sorted(c for c in cuts if c < units), units]
    return tuple(high - low for low, high in itertools.pairwise(borders))


@st.composite
def splits(draw: st.DrawFn, graph: Graph) -> rewrite.Split:
    """Random slicings: one for the whole graph, and others for single ops."""
    infos = rewrite.splittable(graph)
    parts: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    if not infos:
        return rewrite.Split()
    if draw(st.booleans()):
        batch = max(info.batch for info in infos.values())
        parts.append(((), sizes_of(draw, batch, 1)))
    names = draw(st.lists(st.sampled_from(sorted(infos)), unique=True, max_size=6))
    parts += [((name,), sizes_of(draw, infos[name].units, infos[name].multiple)) for name in names]
    return rewrite.Split(tuple(parts))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs_split_at_random_equal_themselves(data: st.DataObject) -> None:
    graph = data.draw(batched_graphs())
    split = data.draw(splits(graph))
    other = rewrite.apply(graph, split)
    assert other.outputs == graph.outputs
    assert_equal(graph, other, data.draw(st.integers(0, 1000)))
    again = data.draw(splits(other))
    assert_equal(graph, rewrite.apply(other, again))


@pytest.fixture(params=[(1, 2), (5, 2), (1, 4), (3, 4)], ids=lambda p: f"{p[1]}x{p[0]}")
def llama_step(request: pytest.FixtureRequest) -> Graph:
    tokens, batch = request.param
    return llama.step_graph(TINY, batch=batch, tokens=tokens, cache=8, dtype="f32")


def test_a_llama_step_equals_its_halves(llama_step: Graph) -> None:
    batch = llama_step.tensor["positions"].shape[0]
    for sizes in ((batch // 2, batch - batch // 2), (1, batch - 1)):
        assert_equal(llama_step, rewrite.split_batch(llama_step, sizes))


def test_slices_of_one_layer_overlap_those_of_the_next() -> None:
    """The repeat stays, its carry is cut, and no edge joins slice 0 and slice 1 anywhere in the layers."""
    graph = rewrite.split_batch(llama.step_graph(TINY, batch=4, tokens=2, cache=8), (1, 3))
    assert graph.repeat is not None
    assert len(graph.repeat.carries) == 2
    flat = graph.flat()
    for op, preds in zip(flat.ops, flat.predecessors(), strict=True):
        if op.name.startswith("layer."):
            assert {flat.ops[p].name[-2:] for p in preds} <= {op.name[-2:]}


PAGED = paged.step_graph(TINY, paged.Bucket(3, 40, 2), paged.PageShape(6, 32, 64), "f32")
"""Three rows that decode, and prompts of 33 and 39 tokens whose first 32 are the same."""


def paged_tensors() -> Tensors:
    """Values of PAGED: the second prompt reads the page that the first one writes in the same step."""

    def ints(values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return random_tensors(PAGED) | {
        "tokens": torch.randint(0, TINY.vocab_size, (43,), generator=torch.Generator().manual_seed(1)),
        "positions": ints([9, 0, 30, *range(33), *range(32, 39)]),
        "slots": ints([9, -1, 62, *(96 + i for i in range(32)), 128, *(160 + i for i in range(7))]),
        "decode_lengths": ints([10, 0, 31]), "decode_blocks": ints([[0, 0], [0, 0], [1, 0]]),
        "prefill_starts": ints([0, 33, 40]), "prefill_lengths": ints([33, 39]),
        "prefill_blocks": ints([[3, 4], [3, 5]]),
        "samples": torch.tensor([0, 1, 2, 35, 42]),
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [(3, 40), (2, 41), (20, 23), (1, 10, 32)])
def test_a_step_over_pages_equals_its_slices(sizes: tuple[int, ...]) -> None:
    given = paged_tensors()
    outputs, states = run(PAGED, given)
    others, after = run(rewrite.split_batch(PAGED, sizes), given)
    for name, wanted in {**outputs, **states}.items():
        torch.testing.assert_close({**others, **after}[name], wanted)


def test_slices_over_pages_wait_for_those_before_them_alone() -> None:
    graph = rewrite.split_batch(PAGED, (2, 41)).flat()
    for op, preds in zip(graph.ops, graph.predecessors(), strict=True):
        before = {graph.ops[p].name.removeprefix("layer.1/") for p in preds}
        if op.name == "layer.1/rope#1":
            assert before == {"qkv_proj#1"}
        if op.name.startswith("layer.1/decode_attention#"):
            assert before == {f"rope#{k}" for k in range(int(op.name[-1]) + 1)}
        if op.name == "layer.1/prefill_attention":
            assert before == {"rope#0", "rope#1"}


def test_pages_that_two_ops_write_keep_their_whole_order() -> None:
    b = GraphBuilder("two")
    pages = [b.state(name, (2, 2, 32, 32), "f32") for name in ("keys", "values")]
    places = [b.input(name, (4,), "i32") for name in ("positions", "slots")]
    for name in ("a", "b"):
        b.output(
            ops.paged_rope(
                b.input(name, (4, 96), "f32"), ops.TokenPlaces(*places, 32), *pages, spec=ops.RopeSpec(2), name=name
            )
        )
    graph = rewrite.split_batch(b.build(), (2, 2))
    before = {
        op.name: {graph.ops[p].name for p in preds} for op, preds in zip(graph.ops, graph.predecessors(), strict=True)
    }
    assert before["b#0"] >= {"a#1"} and before["a#1"] == {"a#0"}


def test_weights_are_read_once_a_slice_and_arithmetic_stays() -> None:
    graph = llama.step_graph(TINY, batch=4, tokens=2, cache=8)
    halves = rewrite.split_batch(graph, (2, 2))
    ops_of = {op.name: op for op in halves.ops}
    whole = next(op for op in graph.ops if op.name == "layer/qkv_proj")
    parts = [ops_of[f"layer/qkv_proj#{k}"] for k in (0, 1)]
    weight = graph.tensor["layer/qkv"].nbytes
    assert sum(op.work.hbm_bytes for op in parts) == whole.work.hbm_bytes + weight
    assert sum(op.work.flops for op in halves.ops) == pytest.approx(sum(op.work.flops for op in graph.ops))


def test_disagreeing_slices_join_only_where_they_must() -> None:
    b = GraphBuilder("chain")
    x = ops.add(b.input("x", (12, 4), "f32"), b.input("y", (12, 4), "f32"), name="make")
    b.output(ops.add(x, x, name="use"))
    graph = b.build()
    split = rewrite.split_batch(graph, {"make": (2, 4, 6), "use": (6, 3, 3)})
    joins = {op.name: op.inputs for op in split.ops if op.kind == "concat_rows"}
    assert joins.pop("use#join")
    assert joins == {"make#join.0.6": ("make.out#0", "make.out#1")}
    use = {op.name: op for op in split.ops}["use#2"]
    assert use.inputs == ("make.out#2",) * 2
    assert {(v.start, v.stop) for v in use.views.values()} == {(3, 6)}
    assert_equal(graph, split)


def test_ops_that_cannot_split_take_the_joined_tensor() -> None:
    b = GraphBuilder("whole")
    x = ops.add(b.input("x", (4, 4), "f32"), b.input("y", (4, 4), "f32"), name="make")
    z = b.call(reshape, [x], [spec("z", (4, 4), "f32")], work=Work(flops=1.0), name="opaque")
    b.output(ops.add(z, x, name="use"))
    graph = b.build()
    split = rewrite.split_batch(graph, (1, 3))
    assert [op.name for op in split.ops] == ["make#0", "make#1", "make#join", "opaque", "use#0", "use#1", "use#join"]
    assert set(rewrite.splittable(graph)) == {"make", "use"}
    assert_equal(graph, split)


def test_work_of_calls_is_divided_in_proportion() -> None:
    b = GraphBuilder("call")
    out = b.call(
        Splittable(reshape, (0,), 2), [b.input("x", (8, 4), "f32")], [spec("z", (8, 4), "f32")],
        work=Work(flops=8.0, hbm_bytes=80.0), name="f",
    )  # fmt: skip
    b.output(out)
    split = rewrite.split_batch(b.build(), (2, 6))
    assert [op.work for op in split.ops[:2]] == [Work(2.0, 20.0), Work(6.0, 60.0)]


def test_writes_to_disjoint_rows_of_a_state_are_free_and_others_ordered() -> None:
    b = GraphBuilder("rows")
    x, s = b.input("x", (4, 4), "f32"), b.state("s", (4, 4), "f32")

    def touch(name: str, *rows: int, write: bool = False) -> None:
        part = s.rows(*rows) if rows else s
        out = [spec(f"{name}.out", (1,), "f32")]
        b.output(*b.op("custom", [x, part.written() if write else part], out, Work(flops=1.0), name))

    touch("write02", 0, 2, write=True)
    touch("write24", 2, 4, write=True)
    touch("read01", 0, 1)
    touch("read", write=False)
    touch("write12", 1, 2, write=True)
    touch("read24", 2, 4)
    touch("write", write=True)
    touch("read13", 1, 3)
    assert b.build().predecessors() == [(), (), (0,), (0, 1), (0, 3), (1,), (0, 1, 2, 3, 4, 5), (6,)]


def test_split_is_a_value_that_goes_through_json() -> None:
    graph = llama.step_graph(TINY, batch=4, tokens=2, cache=8)
    split = rewrite.Split.of({"layer/qkv_proj": (2, 6), "layer/attention": (1, 3), "layer/rope": (1, 3)})
    text = json.dumps(asdict(split))
    again = record.decode(rewrite.Split, text, GraphError, "a split", "Split again.")
    assert again == split
    assert hash(again) == hash(split)
    assert rewrite.apply(graph, again) == rewrite.apply(graph, split)
    assert rewrite.apply(graph, rewrite.Split()) is graph
    assert rewrite.split_batch(graph, (4,)) is graph


def test_splitting_a_layer_is_fast() -> None:
    """In calls of Python functions: against building the graph itself, which the search does as often."""

    def calls(run: Callable[[], object]) -> int:
        seen = 0

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        run()  # what is remembered from now on costs nothing later
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(before)
        return seen

    graph = llama.step_graph(TINY, batch=4, tokens=2, cache=8)
    building = calls(lambda: llama.step_graph(TINY, batch=4, tokens=2, cache=8))
    assert calls(lambda: rewrite.split_batch(graph, (1, 3))) < 20 * building


STEP = llama.step_graph(TINY, batch=4, tokens=2, cache=8)
BAD: dict[str, tuple[Any, Any, str]] = {
    "sum": ((3, 2), None, r"\(3, 2\) sum to 5.*8, 4"),
    "named sum": ((3, 2), ["layer/qkv_proj"], r"sum to 5.*qkv_proj.*8 units"),
    "within a unit": ((3, 5), ["layer/attention"], r"\(3, 5\).*layer/attention.*within a unit.*4 units"),
    "unknown": ((2, 2), ["layer/qkv"], r"no op 'layer/qkv'.*layer/qkv_proj"),
    "zero": ((4, 0), None, r"\(4, 0\) must be positive"),
    "none": ((), None, "must be positive"),
    "twice": ((2, 2), ["layer/rope", "layer/rope"], "two slicings"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_splits_are_refused(case: str) -> None:
    sizes, names, pattern = BAD[case]
    with pytest.raises(GraphError, match=pattern):
        rewrite.split_batch(STEP, sizes, names)


def test_named_ops_that_cannot_split_are_refused() -> None:
    b = GraphBuilder("opaque")
    x = b.input("x", (4, 4), "f32")
    z = b.call(reshape, [x], [spec("z", (4, 4), "f32")], work=Work(flops=1.0), name="f")
    odd = b.call(Splittable(reshape, (0,), 2), [x], [spec("o", (4, 4), "f32")], work=Work(flops=1.0), name="g")
    b.output(ops.concat_rows([z, odd], name="both"), ops.all_reduce(z, ranks=1, axis=0, name="ring"))
    graph = b.build()
    for name, pattern in (("f", "Splittable"), ("both", "by itself"), ("ring", "leave it out")):
        with pytest.raises(GraphError, match=f"{name}.*{pattern}"):
            rewrite.split_batch(graph, (2, 2), [name])
    with pytest.raises(GraphError, match=r"'g' within a unit.*multiples of 2"):
        rewrite.split_batch(graph, (1, 3), ["g"])


# ------------------------------------------------------------------------------------ mixed step


def mixed(ranks: int = 1, decode: int = 3, prefill: int = 8, **more: Any) -> Graph:
    parts = Decode(decode, context=6, cache=8), Prefill(prefill, context=7, sequences=2, cache=8)
    return mixed_step(TINY.share(ranks), *parts, dtype="f32", **more)


def test_a_mixed_step_equals_a_decode_and_a_prefill() -> None:
    graph = mixed()
    tensors = random_tensors(graph)
    got, states = run(graph, tensors)
    rows = {"decode": (slice(0, 3), 3, 1), "prefill": (slice(3, 11), 2, 4)}
    logits = []
    for kind, (mine, batch, each) in rows.items():
        step = llama.step_graph(TINY, batch=batch, tokens=each, cache=8, dtype="f32")
        given = dict(tensors)
        given |= {"tokens": tensors["tokens"][mine], "positions": tensors[f"{kind}_positions"]}
        given |= {n.replace(f"{kind}_", ""): t for n, t in tensors.items() if f"/{kind}_" in n}
        wanted = {t.name for t in step.flat().with_role("input", "weight", "state")}
        alone, after = run(step, {n: t for n, t in given.items() if n in wanted})
        logits.append(alone[llama.LOGITS])
        for name, state in after.items():
            torch.testing.assert_close(states[name.replace("/", f"/{kind}_")], state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[llama.LOGITS], torch.cat(logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 8), (7, 4), (2, 9), (1, 2, 4, 4), (5, 6)])
def test_slices_of_a_mixed_step_map_to_its_sequences(sizes: tuple[int, ...]) -> None:
    graph = mixed()
    split = rewrite.split_batch(graph, sizes)
    names = {op.name for op in split.ops}
    cuts = list(itertools.accumulate(sizes))[:-1]
    decode = 1 + sum(cut < 3 for cut in cuts)
    prefill = 1 + sum(cut == 7 for cut in cuts)
    for kind, count in (("decode", decode), ("prefill", prefill)):
        assert (f"layer/{kind}_attention#{count - 1}" in names) == (count > 1)
        assert f"layer/{kind}_attention#{count}" not in names
    assert_equal(graph, split)


@pytest.mark.parametrize(("decode", "prefill"), [(4, 0), (0, 8)])
def test_a_mixed_step_of_one_kind(decode: int, prefill: int) -> None:
    graph = mixed(decode=decode, prefill=prefill)
    assert_equal(graph, rewrite.split_batch(graph, (4, decode + prefill - 4) if prefill else (1, 3)))


def test_shares_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GraphError, match="4 heads, which 3 ranks"):
        mixed(3)
    with pytest.raises(GraphError, match=r"9 prefill tokens.*2 sequences"):
        mixed(prefill=9)


NANOFLOW = {
    "qkv_proj": (27487.8, 19.5),
    "o_proj": (21990.2, 16.1),
    "gate_up_proj": (153931.6, 96.6),
    "down_proj": (76965.8, 49.7),
    "decode_attention": (3665.9, 462.2),
    "prefill_attention": (916.3, 2.1),
}
"""GFLOP and GB of one iteration of LLaMA-2-70B over all GPUs: Zhu et al. 2025 (NanoFlow), table 2."""


@pytest.mark.parametrize(("ranks", "collectives"), [(1, {}), (8, {}), (8, {"o": "gather"})])
def test_work_of_a_70b_iteration_is_the_published_one(ranks: int, collectives: dict[str, str]) -> None:
    """Dense batch 2048, two thirds decode at context 1024, the rest prefill at the end of 853 keys. The table counts
    operands once: not again on every rank, and without the residuals that one rank adds within a product."""
    graph = mixed_step(
        load_config("llama-2-70b").share(ranks), Decode(1365, context=1024), Prefill(683, context=853),
        collectives=collectives,
    )  # fmt: skip
    layers, tensor = graph.repeat.count if graph.repeat else 0, graph.tensor
    for name, (gflop, gbytes) in NANOFLOW.items():
        op = next(op for op in graph.ops if op.name == f"layer/{name}")
        moved = ranks * op.work.hbm_bytes
        by_columns = ("qkv_proj", "gate_up_proj", "o_proj" if collectives else "")
        if name in by_columns:
            moved -= (ranks - 1) * tensor[op.inputs[0]].nbytes
        elif name in ("o_proj", "down_proj"):
            moved -= (ranks - 1) * tensor[op.outputs[0]].nbytes
        if len(op.inputs) == 3:
            moved -= tensor[op.inputs[2]].nbytes
        assert layers * ranks * op.work.flops / 1e9 == pytest.approx(gflop, rel=0.01)
        assert layers * moved / 1e9 == pytest.approx(gbytes, rel=0.02 if name == "prefill_attention" else 0.01)
    sent = sum(op.work.link_bytes for op in graph.ops if op.name.startswith("layer/"))
    assert layers * ranks * sent / 1e9 == pytest.approx(75.2 if ranks > 1 else 0.0, rel=0.01)


# ----------------------------------------------------------------------------------- collectives


def simulate(graphs: Sequence[Graph], ranks: Sequence[Tensors]) -> list[list[torch.Tensor]]:
    """Every rank's outputs: op after op on all ranks, collectives by their definition, the others by their binders."""
    flat = graphs[0].flat()
    held = [dict(tensors) for tensors in ranks]
    for op, *others in zip(*(graph.flat().ops for graph in graphs), strict=True):
        made = [torch.empty(t.shape, dtype=TORCH_DTYPE[t.dtype]) for t in (flat.tensor[n] for n in op.outputs)]
        outs = [[t.clone() for t in made] for _ in ranks]
        if op.kind in ops.COLLECTIVES:
            parts, axis = [mine[op.inputs[0]] for mine in held], op.integer("axis")
            total = torch.stack(parts).sum(0)
            for r, out in enumerate(outs):
                results = {"all_gather": torch.cat(parts, axis), "all_reduce": total}
                out[0] = results.get(op.kind, total.chunk(len(ranks), axis)[r])
        else:
            for one, mine, out in zip([op, *others], held, outs, strict=True):
                bind(one, [mine[n] for n in op.inputs], out, CpuSite(1, frozenset()), {})()
        for mine, out in zip(held, outs, strict=True):
            for name, tensor in zip(op.outputs, out, strict=True):
                assert tensor.shape == flat.tensor[name].shape
                mine[name] = tensor.contiguous()
    return [[mine[name] for name in flat.outputs] for mine in held]


def sharded(graph: Graph, whole: Tensors, rank: int, ranks: int) -> Tensors:
    """What rank `rank` of a mixed step holds of the tensors of the step on one rank."""

    def part(t: torch.Tensor, axis: int = 0) -> torch.Tensor:
        return t.chunk(ranks, axis)[rank]

    heads = (TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim)
    rules: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "qkv": lambda t: torch.cat([part(p) for p in t.split(heads)]),
        "gate_up": lambda t: torch.cat([part(p) for p in t.chunk(2)]),
        "o": lambda t: part(t, 1), "down": lambda t: part(t, 1), "lm_head": part,
        "o.columns": part, "down.columns": part,
        **{f"{kind}_{n}": lambda t: part(t, 1) for kind in ("decode", "prefill") for n in ("keys", "values")},
    }  # fmt: skip
    result = {}
    for t in graph.flat().with_role("input", "weight", "state"):
        name = t.name.rpartition("/")[2]
        source = whole[t.name.removesuffix(".columns")]
        result[t.name] = rules[name](source).clone() if name in rules else source.clone()
    return result


def test_ranks_together_equal_one_rank_whatever_the_collectives() -> None:
    whole = random_tensors(mixed(1), 3)
    wanted, _ = run(mixed(1), whole)
    graph = mixed(2)
    variants = rewrite.collective_variants(graph)
    assert len(variants) == 8
    splits = {f"{label}, split": rewrite.split_batch(g, (2, 9)) for label, g in variants.items()}
    for label, variant in ({"itself": graph} | variants | splits).items():
        ranks = [sharded(variant, whole, rank, 2) for rank in range(2)]
        for logits, token in simulate([variant] * 2, ranks):
            torch.testing.assert_close(logits, wanted[llama.LOGITS], rtol=1e-4, atol=1e-4, msg=label)
            assert torch.equal(token, wanted[llama.NEXT])


def test_what_the_alternatives_move_and_compute() -> None:
    """Both forms of an all-reduce send as much; gathering features sends them and the result, and sums nothing."""
    graph = mixed(2)
    by_label = rewrite.collective_variants(graph)
    sent = {label: sum(op.work.link_bytes for op in g.ops) for label, g in by_label.items()}
    base = sum(op.work.link_bytes for op in graph.ops)
    assert sent["o_reduce=scatter"] == pytest.approx(base)
    width, features = TINY.heads * TINY.head_dim, TINY.hidden_size
    row = 0.5 * 4 * 11
    assert sent["o_reduce=gather"] == pytest.approx(base + row * (width + features - 2 * features))
    gemms = [sum(op.work.flops for op in g.ops if op.kind == "gemm") for g in (graph, *by_label.values())]
    assert gemms == [pytest.approx(gemms[0])] * 9


def test_a_mixed_step_is_built_with_its_collectives() -> None:
    wanted = rewrite.with_collectives(mixed(2), {"layer/o_reduce": "gather", "layer/down_reduce": "scatter"})
    assert mixed(2, collectives={"o": "gather", "down": "scatter"}) == wanted
    assert mixed(2, collectives={}) == mixed(2)
    assert [op.kind for op in mixed(2, collectives={"o": "gather"}).ops if op.kind in ops.COLLECTIVES] == [
        "all_gather", "all_gather", "all_reduce", "all_gather"
    ]  # fmt: skip
    for ranks, name in ((1, "o"), (2, "qkv")):
        with pytest.raises(GraphError, match=f"layer/{name}_reduce"):
            mixed(ranks, collectives={name: "gather"})


def test_choices_that_do_not_apply_are_refused() -> None:
    graph = mixed(2)
    assert rewrite.collective_choices(graph) == dict.fromkeys(
        ("layer/o_reduce", "layer/down_reduce"), ("scatter", "gather")
    )
    for choices in ({"layer/o_reduce": "tree"}, {"layer/norm1": "gather"}):
        with pytest.raises(GraphError, match=r"layer/o_reduce.*scatter or gather"):
            rewrite.with_collectives(graph, choices)
    assert rewrite.collective_variants(mixed(1)) == {}


# --------------------------------------------------------------------------------------- offload


def test_offloaded_weights_and_activations_give_the_same() -> None:
    graph = llama.step_graph(TINY, batch=2, tokens=3, cache=8, dtype="f32")
    names = ["layer/gate_up", "layer/down", "lm_head", "embed", "layer/o_proj.out", "norm"]
    for distance in (None, 0, 2, 3):
        other = rewrite.offload(graph, names, distance=distance)
        copies = [op for op in other.ops if op.kind == "copy"]
        assert {op.attr("direction") for op in copies} == {"h2d", "d2h"}
        assert_equal(graph, other)


def test_a_copy_in_waits_for_its_distance() -> None:
    graph = llama.step_graph(TINY, batch=2, tokens=1, cache=8)
    ops_of = {op.name: op for op in rewrite.offload(graph, ["layer/down"], distance=2).ops}
    copy = ops_of["layer/down.h2d"]
    assert copy.after == ("layer/norm2",)
    assert copy.work.h2d_bytes == graph.tensor["layer/down"].nbytes
    hinted = {op.name: op for op in rewrite.offload(graph, [], after={"layer/down": "layer/rope"}).ops}
    assert hinted["layer/down.h2d"].after == ("layer/rope",)
    assert {op.name: op for op in rewrite.offload(graph, ["layer/down"]).ops}["layer/down.h2d"].after == ()


def test_only_the_pages_that_a_slice_reads_are_copied_in() -> None:
    b = GraphBuilder("pages")
    kv = b.state("kv", (2, 6, 5, HEADS, DIM), "f32")
    b.output(ops.decode_attention(b.input("q", (6, HEADS, DIM), "f32"), kv, name="attend"))
    graph = b.build()
    other = rewrite.offload(rewrite.split_batch(graph, (2, 4)), ["kv"])
    sizes = [op.work.h2d_bytes for op in other.ops if op.kind == "copy"]
    assert sizes == [graph.tensor["kv"].nbytes / 3, graph.tensor["kv"].nbytes * 2 / 3]
    assert_equal(graph, other)


def test_saved_activations_are_outputs() -> None:
    graph = llama.step_graph(TINY, batch=2, tokens=1, cache=8, dtype="f32")
    other = rewrite.save_to_host(graph, ["final_norm.out"])
    assert other.outputs == (*graph.outputs, "final_norm.out.d2h.out")
    got, _ = run(other, random_tensors(graph))
    wanted, _ = run(graph, random_tensors(graph))
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("names", "options", "pattern"),
    [
        (["nothing"], {}, "no tensor 'nothing'"),
        (["layer/keys"], {}, "'layer/rope' writes state 'layer/keys'"),
        (["layer/x"], {}, "carried"),
        (["sample.out"], {}, "no op takes"),
        (["layer/down"], {"distance": -1}, "-1"),
        ([], {"after": {"layer/down": "nobody"}}, "nobody"),
        ([], {"after": {"layer/down": "sample"}}, "layer/down_proj.*sample"),
    ],
)
def test_what_cannot_be_offloaded(names: list[str], options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(GraphError, match=pattern):
        rewrite.offload(STEP, names, **options)


def test_a_split_of_a_split_finds_free_names_for_its_copies() -> None:
    """The first split copies rows of the carry's start; the second one copies the same rows of it again."""
    b = tg.GraphBuilder("twice")
    start = ops.embedding(b.input("tokens", (2,), "i64"), b.weight("table", (23, 16), "f32"), name="embedding")
    with b.repeat(2, "layer") as layer:
        entries = [layer.carry(start, f"c{i}") for i in range(2)]
        sums = [ops.add(x, x, name=f"add{i}") for i, x in enumerate(entries)]
        b.output(*(layer.next(x, y) for x, y in zip(entries, sums, strict=True)))
    graph = b.build()
    once = rewrite.split_batch(graph, {"layer/add0": (1, 1)})
    assert any(op.name.startswith("embedding#join") for op in once.ops)
    twice = rewrite.split_batch(once, {"layer/add1": (1, 1)})
    assert_equal(graph, twice)
