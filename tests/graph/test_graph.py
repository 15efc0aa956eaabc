"""Declaring: builder, rules of every kind, JSON, fingerprint, repeats, state hazards, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx
import pytest
from hypothesis import given, settings

from taskgraph import ops
from taskgraph.errors import GraphError
from taskgraph.graph.functions import Splittable
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Demand, Op, Tensor, Work, spec
from taskgraph.runtime.cpu.standard import CPU_KINDS
from tests import cases_sampling, cases_standard
from tests.strategies import graphs

ONE = Work(flops=1.0)


def node(
    b: GraphBuilder, name: str, *inputs: Value, after: tuple[str, ...] = (), writes: tuple[Value, ...] = ()
) -> Value:
    given = [value.written() if any(value is w for w in writes) else value for value in inputs]
    return b.op("custom", given, [spec(f"{name}.out", (4,), "f32")], ONE, name, after=after)[0]


# ------------------------------------------------------------------------------------------- rules


OWN = {name for name, kind in ops.KINDS.items() if kind.shape.__module__.startswith("taskgraph.ops.")}
"""The kinds of `taskgraph.ops`: other rooms and packages may have registered theirs."""


def test_every_kind_has_all_its_rules() -> None:
    assert set(ops.KINDS) == set(CPU_KINDS)


def pages(b: GraphBuilder, kv_heads: int, dim: int, dtype: str) -> list[Value]:
    """The keys and values of 6 pages of 32 tokens."""
    return [b.state(name, (6, kv_heads, 32, dim), dtype) for name in ("keys", "values")]


Maker = Callable[[GraphBuilder], Value]
MADE: dict[str, tuple[Maker, tuple[int, ...], str, Work]] = {
    "embedding": (
        lambda b: ops.embedding(b.input("t", (3,), "i64"), b.weight("e", (10, 8), "bf16")),
        (3, 8), "bf16", Work(hbm_bytes=3 * 8 + 48 + 48),
    ),
    "gemm": (
        lambda b: ops.gemm(
            b.input("x", (3, 8), "f32"), b.weight("w", (5, 8), "f32"), b.weight("bias", (5,), "f32"),
            b.input("r", (3, 5), "f32"), transpose_w=True,
        ),
        (3, 5), "f32", Work(flops=2 * 3 * 8 * 5, hbm_bytes=4 * (24 + 40 + 5 + 15 + 15)),
    ),
    "rmsnorm": (
        lambda b: ops.rmsnorm(b.input("x", (3, 8), "bf16"), b.weight("w", (8,), "bf16")),
        (3, 8), "bf16", Work(flops=96, hbm_bytes=2 * (24 + 8 + 24)),
    ),
    "rope": (
        lambda b: ops.rope(b.input("x", (3, 2, 8), "f32"), b.input("p", (3,), "i64")),
        (3, 2, 8), "f32", Work(flops=144, hbm_bytes=4 * 96 + 24),
    ),
    "rope_kv": (
        lambda b: ops.rope_kv(
            b.input("qkv", (6, 48), "bf16"), b.input("p", (2,), "i64"), b.state("k", (2, 1, 16, 8), "bf16"),
            b.state("v", (2, 1, 16, 8), "bf16"), spec=ops.RopeSpec(4),
        ),
        (6, 4, 8), "bf16", Work(flops=3 * 288, hbm_bytes=2 * 576 + 16),
    ),
    "attention": (
        lambda b: ops.attention(
            b.input("q", (2, 4, 8), "f32"), b.input("p", (2,), "i64"), b.state("k", (2, 2, 16, 8), "f32"),
            b.state("v", (2, 2, 16, 8), "f32"), context=10,
        ),
        (2, 32), "f32", Work(flops=4 * 2 * 10 * 4 * 8, hbm_bytes=4 * 64 + 16 + 2 * 2 * 2 * 10 * 8 * 4 + 4 * 64),
    ),
    "decode_attention": (
        lambda b: ops.decode_attention(b.input("q", (2, 4, 8), "bf16"), b.state("kv", (2, 2, 16, 2, 8), "bf16")),
        (2, 4, 8), "bf16", Work(flops=4 * 2 * 16 * 4 * 8, hbm_bytes=2 * (64 + 1024 + 64)),
    ),
    "paged_rope": (
        lambda b: ops.paged_rope(
            b.input("qkv", (6, 48), "bf16"),
            ops.TokenPlaces(b.input("p", (6,), "i32"), b.input("s", (6,), "i32"), 64), *pages(b, 1, 8, "bf16"),
            spec=ops.RopeSpec(4),
        ),
        (6, 4, 8), "bf16", Work(flops=3 * 288, hbm_bytes=2 * 576 + 48),
    ),
    "paged_decode": (
        lambda b: ops.paged_decode(
            b.input("q", (3, 4, 8), "f32"), b.input("l", (3,), "i32"), b.input("t", (3, 5), "i32"),
            *pages(b, 2, 8, "f32"), context=10,
        ),
        (3, 32), "f32", Work(flops=4 * 30 * 32, hbm_bytes=4 * 96 * 2 + 12 + 60 + 2 * 3 * 10 * 2 * 8 * 4),
    ),
    "paged_prefill": (
        lambda b: ops.paged_prefill(
            b.input("q", (8, 4, 8), "f32"), b.input("s", (3,), "i32"), b.input("l", (2,), "i32"),
            b.input("t", (2, 5), "i32"), *pages(b, 2, 8, "f32"), context=10,
        ),
        (8, 32), "f32",
        Work(flops=4 * 2 * 4 * 8.5 * 32, hbm_bytes=4 * 256 * 2 + 12 + 8 + 40 + 2 * 2 * 10 * 2 * 8 * 4),
    ),
    "copy_pages": (
        lambda b: ops.copy_pages(*pages(b, 2, 8, "f32"), b.input("pairs", (3, 2), "i32"), direction="h2d"),
        (1,), "i32", Work(hbm_bytes=3 * 2 * 32 * 8 * 4, h2d_bytes=3 * 2 * 32 * 8 * 4),
    ),
    "swiglu": (lambda b: ops.swiglu(b.input("x", (3, 8), "f32")), (3, 4), "f32", Work(flops=96, hbm_bytes=4 * 36)),
    "route": (
        lambda b: ops.route(b.input("l", (3, 8), "f32"), b.weight("c", (8,), "f32"), spec=ops.RouteSpec(2)),
        (3, 8), "f32", Work(flops=4 * 24, hbm_bytes=4 * (24 + 8 + 24)),
    ),
    "experts": (
        lambda b: ops.experts(
            b.input("x", (2, 8), "bf16"), b.input("r", (2, 4), "f32"), b.weight("g", (4, 12, 8), "bf16"),
            b.weight("d", (4, 8, 6), "bf16"), b.input("res", (2, 8), "bf16"), top_k=2,
        ),
        (2, 8), "bf16",
        Work(flops=2 * 2 * 2 * 3 * 6 * 8, hbm_bytes=2 * 3 * 6 * 8 * 3 + 4 * 8 + 2 * 3 * 16),  # 3 experts of 4 expected
    ),
    "gated_add": (
        lambda b: ops.gated_add(b.input("x", (3, 8), "f32"), b.input("g", (3, 1), "f32"), b.input("y", (3, 8), "f32")),
        (3, 8), "f32", Work(flops=48, hbm_bytes=4 * (72 + 3)),
    ),
    "latent_rope": (
        lambda b: ops.latent_rope(
            b.input("q", (6, 24), "bf16"), b.input("kv", (6, 12), "bf16"), b.weight("n", (8,), "bf16"),
            b.input("p", (2,), "i64"), b.state("c", (2, 16, 12), "bf16"), spec=ops.LatentRopeSpec(2, 4),
        ),
        (6, 2, 12), "bf16", Work(flops=3 * 6 * 4 * 3 + 4 * 6 * 8, hbm_bytes=2 * 2 * (144 + 72) + 16 + 16),
    ),
    "latent_attention": (
        lambda b: ops.latent_attention(
            b.input("q", (2, 4, 12), "f32"), b.input("p", (2,), "i64"), b.state("c", (2, 16, 12), "f32"),
            b.weight("u", (4 * 14, 8), "f32"), spec=ops.LatentSpec(4, 0.3, context=10),
        ),
        (2, 24), "f32",
        Work(flops=2 * 4 * (2 * 8 * 14 + 2 * 10 * 20), hbm_bytes=4 * (96 + 56 * 8 + 48) + 16 + 2 * 10 * 12 * 4),
    ),
    "paged_latent_rope": (
        lambda b: ops.paged_latent_rope(
            b.input("q", (6, 24), "bf16"), b.input("kv", (6, 12), "bf16"), b.weight("n", (8,), "bf16"),
            ops.TokenPlaces(b.input("p", (6,), "i32"), b.input("s", (6,), "i32"), 64),
            b.state("c", (5, 16, 12), "bf16"), spec=ops.LatentRopeSpec(2, 4),
        ),
        (6, 2, 12), "bf16", Work(flops=3 * 6 * 4 * 3 + 4 * 6 * 8, hbm_bytes=2 * 2 * (144 + 72) + 16 + 48),
    ),
    "paged_latent_decode": (
        lambda b: ops.paged_latent_decode(
            b.input("q", (2, 4, 12), "f32"), b.input("l", (2,), "i32"), b.input("t", (2, 3), "i32"),
            b.state("c", (5, 16, 12), "f32"), b.weight("u", (4 * 14, 8), "f32"),
            spec=ops.LatentSpec(4, 0.3, context=10),
        ),
        (2, 24), "f32",
        Work(flops=2 * 4 * (2 * 8 * 14 + 2 * 10 * 20), hbm_bytes=4 * (96 + 56 * 8 + 48) + 8 + 24 + 2 * 10 * 12 * 4),
    ),
    "paged_latent_prefill": (
        lambda b: ops.paged_latent_prefill(
            b.input("q", (8, 4, 12), "f32"), b.input("s", (3,), "i32"), b.input("l", (2,), "i32"),
            b.input("t", (2, 3), "i32"), b.state("c", (5, 16, 12), "f32"), b.weight("u", (4 * 14, 8), "f32"),
            spec=ops.LatentSpec(4, 0.3, context=10),
        ),
        (8, 24), "f32",
        Work(
            flops=2 * 4 * (2 * 4 * 8 * 14 + 2 * 34 * 20),
            hbm_bytes=4 * (384 + 56 * 8 + 192) + 12 + 8 + 24 + 2 * 10 * 12 * 4,
        ),
    ),
    "add": (
        lambda b: ops.add(b.input("x", (3, 8), "f32"), b.input("y", (3, 8), "f32")),
        (3, 8), "f32", Work(flops=24, hbm_bytes=4 * 72),
    ),
    "argmax": (lambda b: ops.argmax(b.input("x", (3, 8), "f32")), (3,), "i64", Work(flops=24, hbm_bytes=96 + 24)),
    "copy": (
        lambda b: ops.copy(b.input("x", (3, 8), "f32"), direction="h2d"),
        (3, 8), "f32", Work(hbm_bytes=96, h2d_bytes=96),
    ),
    "slice_rows": (
        lambda b: ops.slice_rows(b.input("x", (7, 8), "f32"), 1, 7, 2), (3, 8), "f32", Work(hbm_bytes=2 * 96),
    ),
    "concat_rows": (
        lambda b: ops.concat_rows([b.input("x", (2, 8), "f32"), b.input("y", (1, 8), "f32")]),
        (3, 8), "f32", Work(hbm_bytes=2 * 96),
    ),
    "all_gather": (
        lambda b: ops.all_gather(b.input("x", (3, 8), "f32"), ranks=4, axis=1),
        (3, 32), "f32", Work(hbm_bytes=96 + 384, link_bytes=3 * 96),
    ),
    "all_reduce": (
        lambda b: ops.all_reduce(b.input("x", (3, 8), "f32"), ranks=4),
        (3, 8), "f32", Work(flops=18, hbm_bytes=2 * 96, link_bytes=2 * 72),
    ),
    "reduce_scatter": (
        lambda b: ops.reduce_scatter(b.input("x", (3, 8), "f32"), ranks=4, axis=1),
        (3, 2), "f32", Work(flops=18, hbm_bytes=96 + 24, link_bytes=72),
    ),
    **cases_standard.MADE,
    **cases_sampling.MADE,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(OWN))
def test_shape_dtype_and_work_of_every_kind(kind: str) -> None:
    make, shape, dtype, work = MADE[kind]
    b = GraphBuilder("one")
    value = make(b)
    assert (value.shape, value.dtype) == (shape, dtype)
    b.output(value)
    graph = b.build()
    op = graph.ops[-1]
    assert op.kind == kind
    assert op.work.vector == work.vector
    axes = ops.batch_axes(op, [graph.tensor[name] for name in op.inputs])
    assert axes is None or len(axes) == len(op.inputs)


def test_d2d_copy_moves_twice_within_the_device() -> None:
    b = GraphBuilder("copy")
    b.output(ops.copy(b.input("x", (4,), "f32")))
    assert b.build().ops[0].work == Work(hbm_bytes=32)


MISFITS: dict[str, Callable[[GraphBuilder], Any]] = {
    "embedding": lambda b: ops.embedding(b.input("bad", (3,), "f32"), b.weight("e", (10, 8), "f32")),
    "gemm": lambda b: ops.gemm(b.input("bad", (3, 8), "f32"), b.weight("w", (7, 5), "f32")),
    "gemm dtype": lambda b: ops.gemm(b.input("bad", (3, 8), "bf16"), b.weight("w", (8, 5), "f32")),
    "gemm bias": lambda b: ops.gemm(
        b.input("x", (3, 8), "f32"), b.weight("w", (8, 5), "f32"), b.weight("bad", (4,), "f32")
    ),
    "rmsnorm": lambda b: ops.rmsnorm(b.input("x", (3, 8), "f32"), b.weight("bad", (7,), "f32")),
    "rope": lambda b: ops.rope(b.input("bad", (3, 2, 7), "f32"), b.input("p", (3,), "i64")),
    "rope positions": lambda b: ops.rope(b.input("x", (3, 2, 8), "f32"), b.input("bad", (4,), "i64")),
    "rope_kv": lambda b: ops.rope_kv(
        b.input("bad", (2, 40), "f32"), b.input("p", (2,), "i64"), b.state("k", (2, 1, 16, 8), "f32"),
        b.state("v", (2, 1, 16, 8), "f32"), spec=ops.RopeSpec(4),
    ),
    "attention": lambda b: ops.attention(
        b.input("bad", (2, 3, 8), "f32"), b.input("p", (2,), "i64"), b.state("k", (2, 2, 16, 8), "f32"),
        b.state("v", (2, 2, 16, 8), "f32"),
    ),
    "decode_attention": lambda b: ops.decode_attention(
        b.input("bad", (3, 4, 8), "f32"), b.state("kv", (2, 2, 16, 2, 8), "f32")
    ),
    "paged_rope": lambda b: ops.paged_rope(
        b.input("bad", (6, 47), "f32"), ops.TokenPlaces(b.input("p", (6,), "i32"), b.input("s", (6,), "i32"), 64),
        *pages(b, 1, 8, "f32"), spec=ops.RopeSpec(4),
    ),
    "paged_rope slots": lambda b: ops.paged_rope(
        b.input("x", (6, 48), "f32"), ops.TokenPlaces(b.input("p", (6,), "i32"), b.input("bad", (5,), "i32"), 64),
        *pages(b, 1, 8, "f32"), spec=ops.RopeSpec(4),
    ),
    "paged_decode": lambda b: ops.paged_decode(
        b.input("q", (3, 4, 8), "f32"), b.input("bad", (3,), "i64"), b.input("t", (3, 5), "i32"),
        *pages(b, 2, 8, "f32"), context=10,
    ),
    "paged_prefill": lambda b: ops.paged_prefill(
        b.input("q", (8, 4, 8), "f32"), b.input("bad", (2,), "i32"), b.input("l", (2,), "i32"),
        b.input("t", (2, 5), "i32"), *pages(b, 2, 8, "f32"), context=10,
    ),
    "copy_pages": lambda b: ops.copy_pages(*pages(b, 2, 8, "f32"), b.input("bad", (3,), "i32"), direction="h2d"),
    "swiglu": lambda b: ops.swiglu(b.input("bad", (3, 7), "f32")),
    "route": lambda b: ops.route(b.input("bad", (3, 4), "f32"), spec=ops.RouteSpec(5)),
    "route groups": lambda b: ops.route(b.input("bad", (3, 9), "f32"), spec=ops.RouteSpec(2, groups=4, top_groups=2)),
    "route kept": lambda b: ops.route(b.input("bad", (3, 8), "f32"), spec=ops.RouteSpec(2, groups=2, top_groups=3)),
    "route single": lambda b: ops.route(b.input("bad", (3, 8), "f32"), spec=ops.RouteSpec(2, groups=8, top_groups=3)),
    "route slots": lambda b: ops.route(
        b.input("bad", (3, 4), "f32"), slots=b.input("s", (2,), "i32"), spec=ops.RouteSpec(2)
    ),
    "route scoring": lambda b: ops.route(b.input("bad", (3, 8), "f32"), spec=ops.RouteSpec(2, scoring="tanh")),
    "route correction": lambda b: ops.route(
        b.input("l", (3, 8), "f32"), b.weight("bad", (7,), "f32"), spec=ops.RouteSpec(2)
    ),
    "experts": lambda b: ops.experts(
        b.input("x", (2, 8), "f32"), b.input("bad", (2, 3), "f32"), b.weight("g", (4, 12, 8), "f32"),
        b.weight("d", (4, 8, 6), "f32"), top_k=2,
    ),
    "experts gate_up": lambda b: ops.experts(
        b.input("x", (2, 8), "f32"), b.input("r", (2, 4), "f32"), b.weight("bad", (4, 10, 8), "f32"),
        b.weight("d", (4, 8, 6), "f32"), top_k=2,
    ),
    "experts residual": lambda b: ops.experts(
        b.input("x", (2, 8), "f32"), b.input("r", (2, 4), "f32"), b.weight("g", (4, 12, 8), "f32"),
        b.weight("d", (4, 8, 6), "f32"), b.input("bad", (1, 8), "f32"), top_k=2,
    ),
    "gated_add": lambda b: ops.gated_add(
        b.input("x", (3, 8), "f32"), b.input("bad", (3, 8), "f32"), b.input("y", (3, 8), "f32")
    ),
    "latent_rope": lambda b: ops.latent_rope(
        b.input("q", (6, 24), "f32"), b.input("bad", (6, 10), "f32"), b.weight("n", (8,), "f32"),
        b.input("p", (2,), "i64"), b.state("c", (2, 16, 12), "f32"), spec=ops.LatentRopeSpec(2, 4),
    ),
    "latent_rope odd": lambda b: ops.latent_rope(
        b.input("q", (6, 24), "f32"), b.input("kv", (6, 12), "f32"), b.weight("n", (7,), "f32"),
        b.input("p", (2,), "i64"), b.state("bad", (2, 16, 12), "f32"), spec=ops.LatentRopeSpec(2, 5),
    ),
    "latent_attention": lambda b: ops.latent_attention(
        b.input("q", (2, 4, 12), "f32"), b.input("p", (2,), "i64"), b.state("c", (2, 16, 12), "f32"),
        b.weight("bad", (4 * 14, 9), "f32"), spec=ops.LatentSpec(4, 0.3),
    ),
    "latent_attention values": lambda b: ops.latent_attention(
        b.input("q", (2, 4, 12), "f32"), b.input("p", (2,), "i64"), b.state("c", (2, 16, 12), "f32"),
        b.weight("bad", (4 * 8, 8), "f32"), spec=ops.LatentSpec(4, 0.3),
    ),
    "paged_latent_rope": lambda b: ops.paged_latent_rope(
        b.input("q", (6, 24), "f32"), b.input("kv", (6, 12), "f32"), b.weight("n", (8,), "f32"),
        ops.TokenPlaces(b.input("p", (6,), "i32"), b.input("bad", (2,), "i32"), 64), b.state("c", (5, 16, 12), "f32"),
        spec=ops.LatentRopeSpec(2, 4),
    ),
    "paged_latent_decode": lambda b: ops.paged_latent_decode(
        b.input("q", (2, 4, 12), "f32"), b.input("bad", (2,), "i64"), b.input("t", (2, 3), "i32"),
        b.state("c", (5, 16, 12), "f32"), b.weight("u", (4 * 14, 8), "f32"), spec=ops.LatentSpec(4, 0.3, context=10),
    ),
    "paged_latent_prefill": lambda b: ops.paged_latent_prefill(
        b.input("q", (8, 4, 12), "f32"), b.input("bad", (2,), "i32"), b.input("l", (2,), "i32"),
        b.input("t", (2, 3), "i32"), b.state("c", (5, 16, 12), "f32"), b.weight("u", (4 * 14, 8), "f32"),
        spec=ops.LatentSpec(4, 0.3, context=10),
    ),
    "add": lambda b: ops.add(b.input("x", (3, 8), "f32"), b.input("bad", (3, 7), "f32")),
    "add dtype": lambda b: ops.add(b.input("x", (3, 8), "f32"), b.input("bad", (3, 8), "bf16")),
    "argmax": lambda b: ops.argmax(b.input("bad", (3,), "f32")),
    "copy": lambda b: ops.copy(b.input("bad", (3,), "f32"), direction="up"),
    "slice_rows": lambda b: ops.slice_rows(b.input("bad", (3, 4), "f32"), 1, 9),
    "concat_rows": lambda b: ops.concat_rows([b.input("bad", (3, 4), "f32"), b.input("y", (3, 5), "f32")]),
    "all_gather": lambda b: ops.all_gather(b.input("bad", (3, 4), "f32"), ranks=2, axis=2),
    "all_reduce": lambda b: ops.all_reduce(b.input("bad", (3, 4), "f32"), ranks=0),
    "reduce_scatter": lambda b: ops.reduce_scatter(b.input("bad", (3, 4), "f32"), ranks=2, axis=0),
    **cases_standard.MISFITS,
    **cases_sampling.MISFITS,
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(MISFITS))
def test_misfits_are_refused_by_kind_and_tensor(case: str) -> None:
    with pytest.raises(GraphError, match=f"{case.split()[0]}.*bad"):
        MISFITS[case](GraphBuilder("g"))


def test_misfits_table_covers_every_kind() -> None:
    assert {case.split()[0] for case in MISFITS} == OWN


def test_a_file_with_wrong_outputs_of_a_standard_op_is_refused() -> None:
    x, out = Tensor("x", (4, 4), "f32", "input"), Tensor("y", (4, 3), "f32")
    op = Op("sum", "add", ("x", "x"), ("y",), ONE)
    with pytest.raises(GraphError, match="sum"):
        ops.check_op(op, {"x": x, "y": out})
    ops.check_op(op, {"x": x, "y": replace(out, shape=(4, 4))})
    ops.check_op(replace(op, kind="custom"), {})


# ----------------------------------------------------------------------------------------- builder


def chain() -> Graph:
    b = GraphBuilder("chain")
    x = b.input("x", (4,), "f32")
    a = node(b, "a", x)
    b.output(node(b, "b", a, after=("a",)))
    return b.build()


def test_builder_makes_unique_default_names() -> None:
    b = GraphBuilder("names")
    x = b.input("x", (4,), "f32")
    b.output(ops.add(ops.add(x, x), x), b.call(print, [x], [spec("o", (4,), "f32")], work=ONE))
    assert [op.name for op in b.build().ops] == ["add", "add_1", "print"]


def test_call_returns_a_tuple_for_several_outputs_and_keeps_no_callable() -> None:
    b = GraphBuilder("call")
    outs = b.call(print, [b.input("x", (4,), "f32")], [spec("q", (4,), "f32"), spec("r", (4,), "f32")], work=ONE)
    assert [v.name for v in outs] == ["q", "r"]
    b.output(*outs)
    assert b.build().ops[0].attrs == (("function", "builtins:print"),)


def test_control_edge_to_a_later_op_reorders() -> None:
    b = GraphBuilder("later")
    x = b.input("x", (4,), "f32")
    first = node(b, "first", x, after=("second",))
    node(b, "second", x)
    b.output(first)
    graph = b.build()
    assert [op.name for op in graph.ops] == ["second", "first"]
    assert graph.predecessors() == [(), (0,)]


def test_roles() -> None:
    b = GraphBuilder("roles")
    x, s = b.input("x", (4,), "f32"), b.state("s", (4,), "f32")
    b.output(node(b, "a", x, s, writes=(s,)))
    graph = b.build()
    assert [t.name for t in graph.with_role("input", "state")] == ["x", "s"]
    assert graph.tensor["a.out"].role == "activation"
    assert graph.tensor["x"].nbytes == 16


def test_a_splittable_function_says_how_it_is_sliced() -> None:
    b = GraphBuilder("g")
    x, table = b.input("x", (4, 2), "f32"), b.weight("table", (2, 2), "f32")
    out = [spec("o", (4, 2), "f32")]
    b.output(b.call(Splittable(print, (0, None), 2), [x, table], out, work=ONE, name="part"))
    (op,) = b.build().ops
    assert (op.attr("split_axes"), op.attr("split_multiple")) == ((0, -1), 2)
    with pytest.raises(GraphError, match=r"axis or None for each of 1 inputs; got \(0, None\)"):
        b.call(Splittable(print, (0, None)), [x], out, work=ONE)
    for wrong, message in (({"axes": (-1,)}, "from 0|at least 0"), ({"axes": (0,), "multiple": 0}, "at least 1")):
        with pytest.raises(GraphError, match=message):
            Splittable(print, **wrong)


def test_written_marks_an_input_and_not_the_state() -> None:
    b = GraphBuilder("g")
    s, x = b.state("s", (4, 2), "f32"), b.input("x", (4, 2), "f32")
    b.output(node(b, "read", s, x))
    b.output(node(b, "part", s.rows(0, 2).written(), s.rows(2, 4)), node(b, "rows", s.written().rows(1, 3)))
    assert [op.writes for op in b.build().ops] == [(), ("s",), ("s",)]


def test_state_hazards_order_ops() -> None:
    b = GraphBuilder("hazards")
    x, s = b.input("x", (4,), "f32"), b.state("s", (4,), "f32")
    node(b, "read0", s)
    node(b, "write1", x, s, writes=(s,))
    node(b, "read2", s)
    node(b, "read3", s)
    b.output(node(b, "write4", x, s, writes=(s,)), node(b, "read5", s), node(b, "free6", x))
    preds = b.build().predecessors()
    assert preds[1] == (0,)  # write after read
    assert preds[2] == preds[3] == (1,)  # read after write; reads do not order each other
    assert set(preds[4]) >= {2, 3}  # write after reads
    assert preds[5] == (4,)
    assert preds[6] == ()


def test_two_writes_without_a_read_between_are_ordered() -> None:
    b = GraphBuilder("writes")
    s = b.state("s", (4,), "f32")
    b.output(node(b, "w0", s, writes=(s,)), node(b, "w1", s, writes=(s,)))
    assert b.build().predecessors() == [(), (0,)]


# ------------------------------------------------------------------------------------------ repeat


def looped(count: int = 3) -> Graph:
    b = GraphBuilder("g")
    x = b.input("x", (4,), "f32")
    start = node(b, "start", x)
    with b.repeat(count, "layer") as loop:
        h = loop.carry(start, "h")
        w, s = b.weight("w", (4,), "f32"), b.state("s", (4,), "f32")
        mid = node(b, "mid", h, w, s, writes=(s,))
        out = loop.next(h, node(b, "end", mid, x, s, after=("mid", "start")))
    b.output(node(b, "last", out))
    return b.build()


def unrolled(count: int) -> Graph:
    b = GraphBuilder("g")
    x = b.input("x", (4,), "f32")
    h = node(b, "start", x)
    for i in range(count):
        p = f"layer.{i}/"
        w, s = b.weight(p + "w", (4,), "f32"), b.state(p + "s", (4,), "f32")
        mid = node(b, p + "mid", h, w, s, writes=(s,))
        h = node(b, p + "end", mid, x, s, after=(p + "mid", "start"))
    b.output(node(b, "last", h))
    return b.build()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_flat_equals_a_hand_written_unrolled_graph(count: int) -> None:
    flat, wanted = looped(count).flat(), unrolled(count)
    assert flat.ops == wanted.ops
    assert flat.outputs == wanted.outputs
    assert set(flat.tensors) == set(wanted.tensors)
    assert flat.predecessors() == wanted.predecessors()
    assert flat.flat() is flat
    assert wanted.flat() is wanted


def test_two_carries_may_swap() -> None:
    b = GraphBuilder("swap")
    p, q = b.input("p", (4,), "f32"), b.input("q", (4,), "f32")
    with b.repeat(2) as loop:
        u, v = loop.carry(p, "u"), loop.carry(q, "v")
        node(b, "sum", u, v)
        one, two = loop.next(u, v), loop.next(v, u)
    b.output(node(b, "left", one), node(b, "right", two))
    flat = {op.name: op.inputs for op in b.build().flat().ops}
    assert flat["layer.0/sum"] == ("p", "q")
    assert flat["layer.1/sum"] == ("q", "p")
    assert (flat["left"], flat["right"]) == (("p",), ("q",))


# ------------------------------------------------------------------- JSON, fingerprint, networkx


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_json_round_trip_and_networkx(graph: Graph) -> None:
    again = Graph.from_json(graph.to_json())
    assert again == graph
    assert again.fingerprint == graph.fingerprint
    assert again.to_json() == graph.to_json()
    for g in (graph, graph.flat()):
        dag = g.to_networkx()
        assert networkx.is_directed_acyclic_graph(dag)
        assert list(dag) == [op.name for op in g.ops]
        edges = {(g.ops[p].name, op.name) for op, preds in zip(g.ops, g.predecessors(), strict=True) for p in preds}
        assert set(dag.edges) == edges
        assert all(dag.nodes[op.name]["op"] == op for op in g.ops)


def test_edges_follow_from_tensors_and_control() -> None:
    assert set(looped(2).flat().to_networkx().edges) == {
        ("start", "layer.0/mid"), ("start", "layer.0/end"), ("layer.0/mid", "layer.0/end"),
        ("layer.0/end", "layer.1/mid"), ("start", "layer.1/end"), ("layer.1/mid", "layer.1/end"),
        ("layer.1/end", "last"),
    }  # fmt: skip


def test_fingerprint_is_stable() -> None:
    assert chain().fingerprint == chain().fingerprint == "c6c3ff69544ed6fc16fbf79a8a44421b"
    assert hash(chain()) == hash(chain())


def test_equal_graphs_have_equal_fingerprints_whatever_the_number_type() -> None:
    graph = chain()
    same = replace(graph, ops=tuple(replace(op, work=Work(flops=1)) for op in graph.ops))
    assert same == graph
    assert same.fingerprint == graph.fingerprint


def test_fingerprint_changes_with_everything() -> None:
    graph = looped()
    op, tensor, repeat = graph.ops[-1], graph.tensors[0], graph.repeat
    assert repeat is not None

    def last(**changes: Any) -> Graph:
        return replace(graph, ops=(*graph.ops[:-1], replace(op, **changes)))

    variants = [
        graph,
        replace(graph, name="other"),
        replace(graph, tensors=(replace(tensor, shape=(5,)), *graph.tensors[1:])),
        replace(graph, tensors=(replace(tensor, dtype="i32"), *graph.tensors[1:])),
        replace(graph, tensors=(replace(tensor, role="weight"), *graph.tensors[1:])),
        replace(graph, tensors=(*graph.tensors, Tensor("unused", (1,), "u8", "input"))),
        replace(graph, outputs=("last.out", "start.out")),
        replace(graph, repeat=replace(repeat, count=4)),
        last(name="renamed"),
        last(kind="other"),
        last(work=Work(flops=2.0)),
        last(work=Work(hbm_bytes=1.0)),
        last(demand=Demand(sm=(1, 2))),
        last(demand=Demand(workspace_bytes=1)),
        last(after=("start",)),
        last(attrs=(("k", 1),)),
        last(attrs=(("k", 2),)),
        last(inputs=(*op.inputs, "x")),
    ]
    assert len({g.fingerprint for g in variants}) == len(variants)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"schema": 99}', '{"schema": 1}'])
def test_what_is_not_a_graph_file_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match="graph file"):
        Graph.from_json(text)


# --------------------------------------------------------------------------------------- bad input


def _builder() -> tuple[GraphBuilder, Value]:
    b = GraphBuilder("g")
    return b, b.input("x", (4,), "f32")


def _control_cycle() -> None:
    b, x = _builder()
    b.output(node(b, "bad", x, after=("other",)), node(b, "other", x, after=("bad",)))
    b.build()


def _self_cycle() -> None:
    b, x = _builder()
    b.output(node(b, "bad", x, after=("bad",)))
    b.build()


def _data_and_control_cycle() -> None:
    b, x = _builder()
    b.output(node(b, "second", node(b, "bad", x, after=("second",))))
    b.build()


def _after_unknown() -> None:
    b, x = _builder()
    b.output(node(b, "a", x, after=("bad",)))
    b.build()


def _unknown_tensor() -> None:
    Graph("g", (Tensor("y", (4,), "f32"),), (Op("bad", "custom", ("nowhere",), ("y",), ONE),), ("y",))


def _unknown_output() -> None:
    replace(chain(), outputs=("bad",))


def _not_made() -> None:
    graph = chain()
    tensors = (*graph.tensors, Tensor("bad", (4,), "f32"))
    replace(graph, tensors=tensors, ops=(replace(graph.ops[0], inputs=("bad",)), graph.ops[1]))


def _made_twice() -> None:
    graph = chain()
    replace(graph, ops=(graph.ops[0], replace(graph.ops[1], name="bad", outputs=graph.ops[0].outputs)))


def _work(**work: float) -> Callable[[], None]:
    def case() -> None:
        b, x = _builder()
        b.op("custom", [x], [spec("o", (4,), "f32")], Work(**work), "bad")

    return case


def _duplicate_op() -> None:
    b, x = _builder()
    node(b, "bad", x)
    b.op("custom", [x], [spec("o", (4,), "f32")], ONE, "bad")


def _duplicate_tensor() -> None:
    b, _ = _builder()
    b.input("bad", (4,), "f32")
    b.weight("bad", (4,), "f32")


def _tensor(shape: Any, dtype: str) -> Callable[[], None]:
    def case() -> None:
        _builder()[0].input("bad", shape, dtype)

    return case


def _other_builder() -> None:
    _, x = _builder()
    node(GraphBuilder("other"), "bad", x)


def _two_repeats() -> None:
    b, x = _builder()
    with b.repeat(2, "good"):
        node(b, "a", x)
    with b.repeat(2, "bad"):
        pass


def _nested() -> None:
    b, _ = _builder()
    with b.repeat(2, "good"), b.repeat(2, "bad"):
        pass


def _no_next() -> None:
    b, x = _builder()
    with b.repeat(2) as loop:
        node(b, "a", loop.carry(x, "bad"))


def _foreign_next() -> None:
    b, x = _builder()
    with b.repeat(2) as loop:
        made = node(b, "bad", x)
        loop.next(made, made)


def _count() -> None:
    with _builder()[0].repeat(0, "bad"):
        pass


def _carry_shape() -> None:
    b, x = _builder()
    with b.repeat(2) as loop:
        bad = loop.carry(x, "bad")
        out = loop.next(bad, b.op("custom", [bad], [spec("o", (5,), "f32")], ONE, "a")[0])
    b.output(out)
    b.build()


def _reach_in() -> None:
    b, x = _builder()
    with b.repeat(2):
        inner = node(b, "a", x)
    b.output(node(b, "bad", inner))
    b.build()


def _output_inside() -> None:
    b, x = _builder()
    with b.repeat(2):
        b.output(node(b, "bad", x))
    b.build()


def _write_input() -> None:
    b, x = _builder()
    b.output(node(b, "bad", x, writes=(x,)))
    b.build()


def _no_outputs() -> None:
    b = GraphBuilder("bad")
    node(b, "a", b.input("x", (4,), "f32"))
    b.build()


def _empty() -> None:
    b = GraphBuilder("bad")
    b.output(b.input("x", (4,), "f32"))
    b.build()


def _unknown_kind() -> None:
    _, x = _builder()
    ops.apply("bad", [x])


BAD: dict[str, tuple[Callable[[], None], str]] = {
    "control cycle": (_control_cycle, "cycle.*bad"),
    "self cycle": (_self_cycle, "cycle.*bad"),
    "data and control cycle": (_data_and_control_cycle, "cycle.*bad"),
    "after unknown op": (_after_unknown, "unknown op 'bad'"),
    "unknown tensor": (_unknown_tensor, "bad.*nowhere"),
    "unknown output": (_unknown_output, "bad"),
    "activation never made": (_not_made, "bad"),
    "tensor made twice": (_made_twice, "bad"),
    "no work": (_work(), "bad"),
    "negative work": (_work(flops=-1.0), "bad.*flops"),
    "nan work": (_work(flops=1.0, hbm_bytes=float("nan")), "bad.*hbm_bytes"),
    "infinite work": (_work(link_bytes=float("inf")), "bad.*link_bytes"),
    "duplicate op": (_duplicate_op, "duplicate op name 'bad'"),
    "duplicate tensor": (_duplicate_tensor, "duplicate tensor name 'bad'"),
    "zero dimension": (_tensor((4, 0), "f32"), "bad"),
    "fractional dimension": (_tensor((4.5,), "f32"), "bad"),
    "unknown dtype": (_tensor((4,), "float32"), "bad.*float32"),
    "another builder": (_other_builder, "bad.*'x'"),
    "two repeats": (_two_repeats, "at most one repeat"),
    "nested repeat": (_nested, "at most one repeat"),
    "carry without next": (_no_next, "layer/bad"),
    "next of no carry": (_foreign_next, "bad"),
    "repeat of zero": (_count, "bad"),
    "carry changes shape": (_carry_shape, "layer/bad"),
    "reaches into a repeat": (_reach_in, "bad"),
    "output inside a repeat": (_output_inside, "output 'layer/bad.out' is inside repeat"),
    "writes an input": (_write_input, "bad.*'x'"),
    "no outputs": (_no_outputs, "bad"),
    "no ops": (_empty, "bad"),
    "unknown kind": (_unknown_kind, "bad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_culprit(case: str) -> None:
    make, pattern = BAD[case]
    with pytest.raises(GraphError, match=pattern):
        make()


def test_an_output_is_a_value() -> None:
    b = GraphBuilder("g")
    with pytest.raises(GraphError, match="'x'"):
        b.output("x")  # type: ignore[arg-type]
