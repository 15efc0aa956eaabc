"""Every way of multiplying on a CPU, forced, against a product in float64: whatever the processor would choose."""

import pytest
import torch

import taskgraph as tg
from taskgraph.graph import device as specs
from taskgraph.runtime.cpu import products
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.cpu.products import Product
from taskgraph.runtime.cpu.ways import WAYS, Choice, Rate, Ways

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
ROWS = (1, 2, 5, 6, 7, 12, 13, 63, 64, 65, 97, 512)
TOLERANCE = {"f32": 1e-5, "bf16": 1e-2, "f16": 2e-3}


@pytest.fixture(params=list(WAYS))
def ways(request: pytest.FixtureRequest) -> Ways:
    if request.param not in products.able():
        pytest.skip(f"this processor has no way {request.param!r}")
    return products.forced(request.param)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def run(p: Product, ways: Ways) -> torch.Tensor:
    """The output, which starts as NaN: what is not written shows."""
    p.out.fill_(float("nan"))
    with torch.inference_mode():
        products.entry("p", p, ways)()
    return p.out.clone()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (33, 50), (70, 31), (1, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_multiplies(ways: Ways, dtype: str, n: int, k: int, threads: int) -> None:
    way = ways.product("bf16", 1, fixed=True)
    if dtype != "bf16" and way in ("dot", "packed"):
        pytest.skip(f"{way} is for bf16")
    torch.manual_seed(n * k)
    kind = TORCH_DTYPE[dtype]
    w = torch.randn(n, k).to(kind)
    bias, added = torch.randn(n).to(kind), torch.randn(max(ROWS), n).to(kind)
    for rows in ROWS:
        x = torch.randn(rows, k).to(kind)
        for fixed in (True, False):
            for b, r in ((None, None), (bias, None), (None, added[:rows]), (bias, added[:rows])):
                want = x.double() @ w.double().t()
                want = want + (0 if b is None else b.double()) + (0 if r is None else r.double())
                made = run(Product(x, w, b, r, torch.empty(rows, n, dtype=kind), fixed, threads), ways)
                assert distance(made, want) < TOLERANCE[dtype], (rows, fixed)
            wide = run(Product(x, w, None, None, torch.empty(rows, n), fixed, threads), ways)
            assert wide.dtype == torch.float32
            assert distance(wide, x.double() @ w.double().t()) < 1e-5, (rows, fixed)


def test_the_weight_may_lie_either_way_round(ways: Ways) -> None:
    torch.manual_seed(1)
    for rows in (3, 80):
        x, w = torch.randn(rows, 64).bfloat16(), torch.randn(64, 48).bfloat16()
        made = run(Product(x, w.t(), None, None, torch.empty(rows, 48, dtype=torch.bfloat16), True, 2), ways)
        assert distance(made, x.double() @ w.double()) < 1e-2


@pytest.mark.parametrize(("way", "dtype"), [("dot", "bf16"), ("tile", "bf16"), ("tile", "f32"), ("tile", "f16")])
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(way: str, dtype: str) -> None:
    """To the bit: nor on the threads, or how the product is cut for caches."""
    if way not in products.able():
        pytest.skip(f"this processor has no way {way!r}")
    torch.manual_seed(4)
    kind = TORCH_DTYPE[dtype]
    x, w = torch.randn(130, 1100).to(kind), torch.randn(70, 1100).to(kind)
    whole = run(Product(x, w, None, None, torch.empty(130, 70, dtype=kind), True, 2), products.forced(way))
    for first, last in ((0, 1), (3, 5), (7, 20), (64, 128)):
        out = torch.empty(last - first, 70, dtype=kind)
        assert torch.equal(
            run(Product(x[first:last], w, None, None, out, True, 1), products.forced(way)), whole[first:last]
        )


def test_a_graph_runs_by_the_way_that_is_given(ways: Ways) -> None:
    torch.manual_seed(2)
    for rows in (1, 65):
        b = tg.GraphBuilder("g")
        x, w = b.input("x", (rows, 64), "bf16"), b.weight("w", (64, 96), "bf16")
        b.output(tg.ops.gemm(x, w, name="p"), tg.ops.gemm(x, w, out_dtype="f32", name="wide"))
        graph = b.build()
        given = {"x": torch.randn(rows, 64).bfloat16(), "w": torch.randn(64, 96).bfloat16()}
        with tg.compile(graph, tg.plan(graph, CPU), "cpu", ways=ways) as exe:
            made = exe(given)
        want = given["x"].double() @ given["w"].double()
        assert distance(made["p.out"], want) < 1e-2 and distance(made["wide.out"], want) < 1e-5


def test_ways_are_of_the_cpu_and_must_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    b = tg.GraphBuilder("g")
    b.output(tg.ops.gemm(b.input("x", (2, 4), "f32"), b.weight("w", (4, 4), "f32"), name="p"))
    graph = b.build()
    with pytest.raises(tg.BackendUnavailable, match="ways"):
        tg.compile(graph, tg.plan(graph, CPU), "sim", ways=Ways())
    monkeypatch.setattr(products, "able", lambda: ("tile", "plain", "f32"))
    with pytest.raises(tg.BackendUnavailable, match=r"'packed'.*tile, plain, f32"):
        products.forced("packed")


@pytest.mark.parametrize("packed", [False, True])
def test_a_processor_without_a_way_never_runs_it(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Neither the choice by capability nor a choice that another machine made leads to a way that is not here."""
    here = ("tile", "plain", "f32")
    monkeypatch.setattr(products, "able", lambda: here)
    chosen = Ways((Choice("bf16", True, 1, "packed"),)) if packed else products.by_capability()
    monkeypatch.setitem(products._ENTRIES, "packed", lambda p: pytest.fail("oneDNN was asked"))
    monkeypatch.setitem(products._ENTRIES, "dot", lambda p: pytest.fail("bf16 dot products were asked for"))
    torch.manual_seed(3)
    w = torch.randn(64, 32).bfloat16()
    for rows in (1, 64, 65, 512):
        x = torch.randn(rows, 32).bfloat16()
        made = run(Product(x, w, None, None, torch.empty(rows, 64, dtype=torch.bfloat16), True, 2), chosen)
        assert distance(made, x.double() @ w.double().t()) < 1e-2


def test_only_what_means_absent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def _reorder_linear_weight(self, *args: object) -> None:
            raise RuntimeError(self.text)

        text = "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw"

    monkeypatch.setattr(torch.ops, "mkldnn", Broken())
    assert products._reorders() is False
    Broken.text = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        products._reorders()


def test_ways_choose_by_rows_and_are_kept_as_json() -> None:
    ways = Ways(
        (Choice("bf16", True, 1, "tile"), Choice("bf16", True, 40, "f32")), (Rate("bf16", True, 64, "f32", 2.0),)
    )
    assert [ways.product("bf16", rows, fixed=True) for rows in (1, 39, 40, 512)] == ["tile", "tile", "f32", "f32"]
    assert ways.product("bf16", 512, fixed=False) == ways.product("f64", 1, fixed=True) == "plain"
    assert ways.rate("bf16", 64) == 2.0 and ways.rate("bf16", 8) == 0.0
    assert Ways.from_dict(ways.to_dict()) == ways
    with pytest.raises(ValueError, match="sideways"):
        Ways.from_dict({"choices": [["bf16", True, 1, "sideways"]], "rates": []})
