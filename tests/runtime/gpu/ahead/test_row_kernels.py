"""Triton kernels of ops that work row by row, of moves and of rotations, in Triton's interpreter against the cpu
backend."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.graph.graph import Graph, Value
from taskgraph.runtime.rotary import inverse_frequencies
from tests.runtime.gpu.ahead.interpreted import Done, Interpret, by_cpu, jobs

Values = dict[str, torch.Tensor]
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"f32": 2e-5, "bf16": 1.6e-2}
Made = Callable[[tg.GraphBuilder, Callable[..., Value]], Value | tuple[Value, ...]]


def graph_of(make: Made, dtype: str, given: Mapping[str, torch.Tensor] | None = None) -> tuple[Graph, Values]:
    """The graph that `make` declares, whose inputs are drawn unless they are `given`."""
    b, values = tg.GraphBuilder("rows"), Values()
    draw = torch.Generator().manual_seed(11)

    def declare(name: str, *shape: int, kind: str = dtype, role: str = "input") -> Value:
        made = (given or {}).get(name)
        values[name] = torch.randn(shape, generator=draw).to(TYPES[kind]) if made is None else made
        return getattr(b, role)(name, shape, kind)  # type: ignore[no-any-return]

    outs = make(b, declare)
    b.output(*outs) if isinstance(outs, tuple) else b.output(outs)
    return b.build(), values


def ran(interpret: Interpret, graph: Graph, values: Values, sm_count: int = 2) -> Done:
    """The one op of the graph, interpreted."""
    (job,) = jobs(graph, values, graph.ops[0].kind, sm_count)
    done = interpret(job)
    assert not done.torn, done.torn
    return done


def agree(interpret: Interpret, graph: Graph, values: Values, dtype: str, sm_count: int = 2) -> Done:
    """Outputs and states are those of the cpu backend, and nothing is reported."""
    done, wanted = ran(interpret, graph, values, sm_count), by_cpu(graph, values)
    assert done.fault == 0
    for name in graph.outputs:
        torch.testing.assert_close(
            done.tensors[name].float(),
            wanted[name].float(),
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
            equal_nan=True,
        )
    return done


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 37), (5, 2560), (40, 16)])
def test_rows(interpret: Interpret, dtype: str, rows: int, columns: int) -> None:
    for make in (
        lambda b, of: ops.add(of("x", rows, columns), of("y", rows, columns), name="out"),
        lambda b, of: ops.swiglu(of("x", rows, 2 * columns), name="out"),
        lambda b, of: ops.rmsnorm(of("x", rows, columns), of("w", columns), eps=1e-5, name="out"),
        lambda b, of: ops.gated_add(of("x", rows, columns), of("g", rows, 1), of("base", rows, columns), name="out"),
    ):
        agree(interpret, *graph_of(make, dtype), dtype)


def test_a_row_longer_than_a_tile_is_read_twice(interpret: Interpret) -> None:
    agree(interpret, *graph_of(lambda b, of: ops.rmsnorm(of("x", 2, 8200), of("w", 8200), name="out"), "bf16"), "bf16")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_argmax(interpret: Interpret, dtype: str) -> None:
    """The first of equals; a NaN above all, the first of them; a row of -inf. Rows in one part and in several."""
    for columns in (5, 4100):
        x = torch.randn(9, columns).to(TYPES[dtype])
        x[1, [1, 3]] = 50.0
        x[2, [columns - 1, 2]] = torch.nan
        x[3] = -torch.inf
        x[4] = torch.nan
        x[5, :], x[5, columns - 1] = 1.0, 2.0
        x[6, columns - 1] = torch.nan
        x[7, [0, columns - 2]] = torch.inf
        graph, values = graph_of(lambda b, of: ops.argmax(of("x", 9, columns), name="out"), dtype, {"x": x})  # noqa: B023
        for sms, launches in ((1, 1), (16, 1 if columns == 5 else 2)):
            done = ran(interpret, graph, values, sms)
            assert len(done.grids) == launches
            assert torch.equal(done.tensors["out.out"], by_cpu(graph, values)["out.out"])


@pytest.mark.parametrize(("table", "out"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")])
@pytest.mark.parametrize("token", [torch.int32, torch.int64])
def test_embedding(interpret: Interpret, table: str, out: str, token: torch.dtype) -> None:
    tokens = torch.tensor([3, 0, 49, 7, 7], dtype=token)
    kind = {torch.int32: "i32", torch.int64: "i64"}[token]

    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        return ops.embedding(of("tokens", 5, kind=kind), of("table", 50, 37, kind=table), out_dtype=out, name="out")

    graph, values = graph_of(make, table, {"tokens": tokens})
    done = agree(interpret, graph, values, out)
    assert torch.equal(done.tensors["out.out"], by_cpu(graph, values)["out.out"])
    for odd in (50, -1, 1 << 30):
        tokens[2] = odd
        done = ran(interpret, graph, values)
        assert done.fault == 1 << 48 | (odd & ((1 << 48) - 1))
        assert not done.tensors["out.out"][2].any() and done.tensors["out.out"][1].any()


def test_moves_of_rows(interpret: Interpret) -> None:
    parts = (("x", 1), ("y", 6), ("z", 2))
    for columns, dtype in ((37, "bf16"), (36, "bf16"), (600, "f32")):
        for make in (
            lambda b, of: ops.slice_rows(of("x", 11, columns), 1, 11, 3, name="out"),  # noqa: B023
            lambda b, of: ops.concat_rows([of(n, rows, columns) for n, rows in parts], name="out"),  # noqa: B023
            lambda b, of: ops.all_reduce(of("x", 3, columns), ranks=1, name="out"),  # noqa: B023
        ):
            graph, values = graph_of(make, dtype)
            assert torch.equal(ran(interpret, graph, values).tensors["out.out"], by_cpu(graph, values)["out.out"])


def test_pages_that_do_not_exist_are_left_out(interpret: Interpret) -> None:
    pairs = torch.tensor([[0, 4], [-1, 2], [3, -1], [2, 0], [1, 1]], dtype=torch.int32)

    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        pages = (of(name, 5, 2, 16, 8, role="state") for name in ("source", "target"))
        return ops.copy_pages(*pages, of("pairs", 5, 2, kind="i32"), direction="d2d", name="out")

    graph, values = graph_of(make, "bf16", {"pairs": pairs})
    done, wanted = ran(interpret, graph, values), by_cpu(graph, values)
    assert done.fault == 0 and int(done.tensors["out.out"]) == int(wanted["out.out"]) == 3
    assert torch.equal(done.tensors["target"], wanted["target"])
    pairs[3, 1] = 9
    done = ran(interpret, graph, values)
    assert done.fault == 4 << 48 | 9 and int(done.tensors["out.out"]) == 2


# ------------------------------------------------------------------------------------------------ rotations


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("heads", "kv", "dim", "norms"), [(4, 2, 64, True), (5, 5, 24, False), (8, 1, 128, True)])
def test_rotation_into_a_cache(interpret: Interpret, dtype: str, heads: int, kv: int, dim: int, norms: bool) -> None:
    """Two sequences with three tokens each from a place of their own."""
    spec = ops.RopeSpec(heads, 1e4)
    positions = torch.tensor([0, 5], dtype=torch.int64)

    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        cache = (of(name, 2, kv, 9, dim, role="state") for name in ("keys", "values"))
        more = [of(f"{n}_norm", dim) for n in "qk"] if norms else []
        qkv, at = of("qkv", 6, (heads + 2 * kv) * dim), of("positions", 2, kind="i64")
        return ops.rope_kv(qkv, at, *cache, more, spec=spec, name="out")

    graph, values = graph_of(make, dtype, {"positions": positions})
    done, wanted = agree(interpret, graph, values, dtype), by_cpu(graph, values)
    for name in ("keys", "values"):
        torch.testing.assert_close(done.tensors[name], wanted[name], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    positions[1] = 7
    done = ran(interpret, graph, values)
    assert done.fault == 2 << 48 | 7, "the last token would stand at 9"


def paged(dtype: str, heads: int, kv: int, dim: int, norms: bool, given: Values) -> tuple[Graph, Values]:
    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        pages = (of(name, 3, kv, 16, 128, role="state") for name in ("keys", "values"))
        more = [of(f"{n}_norm", dim) for n in "qk"] if norms else []
        places = ops.TokenPlaces(of("positions", 5, kind="i32"), of("slots", 5, kind="i32"), 40000)
        return ops.paged_rope(
            of("qkv", 5, (heads + 2 * kv) * dim), places, *pages, more, spec=ops.RopeSpec(heads, 5e5), name="out"
        )

    return graph_of(make, dtype, given)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("heads", "kv", "dim", "norms"), [(8, 2, 64, False), (3, 1, 80, True), (2, 2, 128, True)])
def test_rotation_into_pages(interpret: Interpret, dtype: str, heads: int, kv: int, dim: int, norms: bool) -> None:
    """Tokens without a slot turn their queries and leave nothing in the pages; a slot or position outside is told."""
    slots = torch.tensor([47, -1, 0, 16, -5], dtype=torch.int32)
    positions = torch.tensor([0, 39999, 3, 777, 12], dtype=torch.int32)
    graph, values = paged(dtype, heads, kv, dim, norms, {"slots": slots, "positions": positions})
    done = ran(interpret, graph, values)
    assert done.fault == 0
    x = values["qkv"].float().reshape(5, heads + 2 * kv, dim)
    parts = [x[:, :heads], x[:, heads : heads + kv], x[:, heads + kv :]]
    if norms:
        for i, name in enumerate(("q_norm", "k_norm")):
            parts[i] = torch.nn.functional.rms_norm(parts[i], (dim,), values[name].float(), graph.ops[0].number("eps"))
    angle = positions.double()[:, None, None] * 5e5 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turned = [_turn(part, angle) for part in parts[:2]]
    near: dict[str, Any] = {"rtol": TOLERANCE[dtype], "atol": 8e-3 if dtype == "f32" else 3e-2}  # angles are f32
    torch.testing.assert_close(done.tensors["out.out"].float(), turned[0], **near)
    for name, rows in (("keys", turned[1]), ("values", parts[2])):
        wanted = values[name].clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[slot // 16, :, slot % 16, :dim] = rows[token].to(wanted.dtype)
        torch.testing.assert_close(done.tensors[name].float(), wanted.float(), **near)
    slots[3] = 48
    assert ran(interpret, graph, values).fault == 3 << 48 | 48
    slots[3], positions[2] = 1, 40000
    assert ran(interpret, graph, values).fault == 2 << 48 | 40000


def _turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    low, high = x.double().chunk(2, -1)
    c, s = angle.cos(), angle.sin()
    return torch.cat([low * c - high * s, high * c + low * s], -1).float()


def test_rotation_alone_far_out(interpret: Interpret) -> None:
    """Sines of angles up to 1e5 are those of the f32 that the angle is."""
    positions = torch.tensor([0, 1, 40961, 99991], dtype=torch.int64)

    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        return ops.rope(of("x", 4, 3, 16), of("positions", 4, kind="i64"), theta=1e4, name="out")

    graph, values = graph_of(make, "f32", {"positions": positions})
    angle = positions.float()[:, None, None] * torch.from_numpy(inverse_frequencies(graph.ops[0], 16))
    torch.testing.assert_close(ran(interpret, graph, values).tensors["out.out"], _turn(values["x"], angle.double()))
