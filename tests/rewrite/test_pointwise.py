"""Chains of pointwise ops as one: the same bits, on the cpu backend and on the virtual GPU, and what stays apart."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops, rewrite
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.schedule.slices import check_slices
from tests.conftest import Call
from tests.ops.test_standard import numbers, on_cpu
from tests.rewrite.test_rewrite import splits
from tests.runtime.gpu.test_cuda import run_plan


@st.composite
def pointwise(draw: st.DrawFn) -> Graph:
    """Pointwise ops in floats and bool, some of them taken twice, broadcast, viewed or put out, with others between."""
    b = GraphBuilder("pointwise")
    dtype, shape = draw(st.sampled_from(["f32", "bf16", "f16"])), draw(st.sampled_from([(6,), (4, 6)]))
    pool = [b.input(f"x{i}", shape, dtype) for i in range(2)]
    narrow, state = b.weight("n", (6,), dtype), b.state("s", shape, dtype)
    pool.append(ops.cast(b.input("f", shape, "f32"), dtype))

    def step(x: Value, y: Value) -> Value:
        made = [
            lambda: ops.add(x, y), lambda: ops.mul(x, y), lambda: ops.sub(x, narrow), lambda: ops.gelu(x),
            lambda: ops.where(ops.elementwise("gt x0 x1", [x, y]), x, 0.25), lambda: ops.tanh(ops.neg(x)),
            lambda: ops.elementwise("mul x0 x1; silu s0; add s1 x0", [x, y]), lambda: ops.softmax(x),
            lambda: ops.cast(ops.mul(ops.cast(x, "f32"), 1.1), dtype), lambda: ops.maximum(x, state),
            lambda: ops.where(ops.elementwise("copy x0", [x], out_dtype="bool"), y, x),
        ]  # fmt: skip
        return draw(st.sampled_from(made))()

    for _ in range(draw(st.integers(1, 9))):
        pool.append(step(draw(st.sampled_from(pool[-3:])), draw(st.sampled_from(pool))))
    b.output(pool[-1], *draw(st.lists(st.sampled_from(pool[3:]), max_size=1)))
    if draw(st.booleans()):
        b.output(ops.add(pool[-1].rows(0, 2), pool[-2].rows(1, 3)))
    return b.build()


@settings(max_examples=100)
@given(st.data())
def test_fused_chains_give_the_same_bits(data: st.DataObject) -> None:
    graph = data.draw(pointwise())
    fused = rewrite.fuse_pointwise(graph)
    assert fused.outputs == graph.outputs and len(fused.ops) <= len(graph.ops)
    assert rewrite.fuse_pointwise(fused) is fused, "nothing is left to join"
    assert sum(op.work.hbm_bytes for op in fused.ops) <= sum(op.work.hbm_bytes for op in graph.ops)
    values = {t.name: numbers(t.shape, t.dtype, i) for i, t in enumerate(graph.with_role("input", "weight", "state"))}
    wanted, got = on_cpu(graph, values), on_cpu(fused, values)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name
    split = data.draw(splits(fused))
    check_slices(fused, split, rewrite.apply(fused, split))


def test_fused_chains_give_the_same_bits_on_the_virtual_gpu(on_virtual: Call) -> None:
    graph = chain("bf16")
    fused = rewrite.fuse_pointwise(graph)
    given = graph.flat().with_role("input", "weight", "state")
    values = {t.name: numbers(t.shape, t.dtype, i) for i, t in enumerate(given)}
    one, other = (on_virtual(run_plan, g, tg.plan(g, "h100_sxm", "sequential"), values) for g in (graph, fused))
    assert all(torch.equal(one[name], other[name]) for name in graph.outputs)


def chain(dtype: str) -> Graph:
    """A gated activation between two products, as torch writes it, in a repeat."""
    b = GraphBuilder("chain")
    x, w = b.input("x", (5, 8), dtype), b.weight("w", (8, 8), dtype)
    with b.repeat(2) as loop:
        h = loop.carry(x)
        up = ops.gemm(h, w, name="up")
        gate = ops.sigmoid(ops.mul(ops.gemm(h, w, name="gate"), 1.5), name="act")
        mixed = ops.add(ops.mul(gate, up, name="gated"), h, name="mixed")
        out = loop.next(h, ops.mul(mixed, b.weight("scale", (8,), dtype), name="scaled"))
    b.output(ops.relu(ops.neg(out, name="minus"), name="last"))
    return b.build()


def test_a_chain_between_products_is_one_op() -> None:
    fused = rewrite.fuse_pointwise(chain("bf16"))
    assert [op.name for op in fused.ops] == ["layer/up", "layer/gate", "layer/scaled", "last"]
    scaled = fused.ops[2]
    text = str(scaled.attr("formula"))
    assert text.count("bf16 ") == 4, "of the product, the sigmoid, the gate and the sum"
    assert {*scaled.inputs} == {"layer/scale", "layer/x_in", "layer/up.out", "layer/gate.out"}
    assert fused.repeat is not None and (fused.repeat.first, fused.repeat.last) == (0, 3)


def test_what_others_need_stays_an_op() -> None:
    b = GraphBuilder("kept")
    x, state = b.input("x", (4, 6), "f32"), b.state("s", (4, 6), "f32")
    twice = ops.relu(x, name="twice")
    awaited = ops.neg(x, name="awaited")
    read = ops.mul(state, 2.0, name="read")

    def change(state: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(state.add_(1.0))

    changed = b.call(change, [state.written()], [tg.spec("c", (4, 6), "f32")], work=tg.Work(flops=1.0), name="change",
                     after=["awaited"])  # fmt: skip
    first = ops.mul(twice, 3.0, name="first")
    b.output(
        twice,
        ops.add(first, twice, name="second"),
        ops.add(read, changed, name="third"),
        ops.exp(awaited, name="fourth"),
    )
    graph = b.build()
    fused = rewrite.fuse_pointwise(graph)
    assert {op.name for op in fused.ops} == {op.name for op in graph.ops} - {"first"}
