"""Triton's products, plain and of experts, in its interpreter: by tiles that follow the SMs, for shapes that they do
not divide."""

from collections.abc import Callable

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.graph.graph import Graph, Value
from taskgraph.runtime.gpu.ahead.products import TILINGS, tiling
from tests.runtime.gpu.ahead.interpreted import Interpret, by_cpu
from tests.runtime.gpu.ahead.test_row_kernels import Values, graph_of, ran


def product(m: int, n: int, k: int, extra: str, transposed: bool, types: tuple[str, str, str]) -> tuple[Graph, Values]:
    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        w = of("w", *((n, k) if transposed else (k, n)), kind=types[1])
        more = {"bias": of("bias", n)} if "b" in extra else {}
        more |= {"residual": of("residual", m, n)} if "r" in extra else {}
        x = of("x", m, k)
        return ops.gemm(x, w, **more, transpose_w=transposed, out_dtype=types[2], name="out")

    return graph_of(make, types[0])


def near(made: torch.Tensor, values: Values, transposed: bool) -> None:
    """Within the rounding of the operands, by a product in f64."""
    w = values["w"].double()
    wanted = values["x"].double() @ (w.T if transposed else w)
    wanted += sum(values[name].double() for name in ("bias", "residual") if name in values)
    error = (made.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-5 if made.dtype == torch.float32 else 8e-3), float(error)


HALF, WIDE = ("bf16",) * 3, ("f32",) * 3


@pytest.mark.parametrize(
    ("m", "n", "k", "extra", "transposed", "types"),
    [
        (1, 40, 72, "", True, HALF),  # one row, by descriptors
        (17, 72, 136, "br", True, HALF),
        (33, 136, 264, "r", False, HALF),  # k no multiple of the tile
        (130, 264, 72, "b", True, ("bf16", "bf16", "f32")),
        (5, 33, 45, "br", False, HALF),  # odd columns: no bulk copy can move them
        (70, 65, 30, "", True, HALF),
        (9, 70, 37, "br", True, WIDE),
        (66, 65, 33, "", False, ("f32", "bf16", "f32")),
    ],
)  # fmt: skip
def test_product(
    interpret: Interpret, m: int, n: int, k: int, extra: str, transposed: bool, types: tuple[str, str, str]
) -> None:
    graph, values = product(m, n, k, extra, transposed, types)
    for sms in (1, 3):
        done = ran(interpret, graph, values, sms)
        assert done.grids[0][0] <= 2 * sms, "at most two blocks an SM"
        near(done.tensors["out.out"], values, transposed)


def test_a_product_is_the_same_on_any_number_of_sms(interpret: Interpret) -> None:
    """Tiles of one shape, so one order of sums; rounds are what the SMs change."""
    graph, values = product(40, 96, 64, "", True, HALF)
    made = [ran(interpret, graph, values, sms).tensors["out.out"] for sms in (1, 2, 7)]
    assert all(torch.allclose(made[0].float(), other.float(), rtol=1e-2) for other in made[1:])


def test_tilings_follow_the_partition() -> None:
    """On fewer SMs rounds are no fewer; few rows take low tiles; a device of little shared memory gets what fits."""
    for n in (4096, 6144, 28672):
        seconds = [tiling(2048, n, sms, 0, 227 << 10).seconds(2048, n, sms) for sms in (8, 32, 72, 96, 120, 132)]
        assert seconds == sorted(seconds, reverse=True)
    assert tiling(1, 4096, 96, 0, 227 << 10).rows == 16 and tiling(2048, 28672, 96, 0, 227 << 10).columns == 256
    for limit in (99 << 10, 163 << 10, 227 << 10):
        assert all(tiling(m, 4096, 96, 1, limit).fits(1, limit) for m in (1, 20, 100, 2048))
    assert len({(t.rows, t.columns, t.depth, t.stages, t.blocks) for t in TILINGS}) == len(TILINGS)


# -------------------------------------------------------------------------------------------------- experts


def routed(rows: int, held: int, hidden: int, inner: int, top: int, dtype: str, residual: bool) -> tuple[Graph, Values]:
    """Experts 1 and 3 get nothing, and the last row goes nowhere, as a padded one does."""
    draw = torch.Generator().manual_seed(3)
    routing = torch.zeros(rows, held)
    used = [e for e in range(held) if e not in (1, 3)] or [0]
    for row in range(rows - 1):
        chosen = torch.tensor(used)[torch.randperm(len(used), generator=draw)[:top]]
        routing[row, chosen] = torch.rand(len(chosen), generator=draw) + 0.1

    def make(b: tg.GraphBuilder, of: Callable[..., Value]) -> Value:
        weights = of("up", held, 2 * inner, hidden), of("down", held, hidden, inner)
        more = (of("residual", rows, hidden),) if residual else ()
        return ops.experts(
            of("x", rows, hidden), of("routing", rows, held, kind="f32"), *weights, *more, top_k=top, name="out"
        )

    return graph_of(make, dtype, {"routing": routing})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "held", "hidden", "inner", "top", "residual"),
    [(1, 3, 16, 8, 1, True), (9, 6, 40, 24, 3, True), (70, 4, 72, 70, 2, False)],
)
def test_experts(
    interpret: Interpret, rows: int, held: int, hidden: int, inner: int, top: int, residual: bool, dtype: str
) -> None:
    graph, values = routed(rows, held, hidden, inner, top, dtype, residual)
    wanted = by_cpu(graph, values)["out.out"].float()
    for sms in (1, 3):
        made = ran(interpret, graph, values, sms).tensors["out.out"].float()
        torch.testing.assert_close(
            made, wanted, rtol=2e-2, atol=(1e-4 if dtype == "f32" else 1e-2) * float(wanted.abs().max() + 1)
        )


def test_more_rows_than_there_is_room_for_are_left_out(interpret: Interpret) -> None:
    """A routing with more entries than top_k, which `route` never makes, stays within the buffers."""
    graph, values = routed(6, 4, 16, 8, 1, "f32", True)
    values["routing"] = torch.ones(6, 4)
    assert ran(interpret, graph, values).tensors["out.out"].isfinite().all()
