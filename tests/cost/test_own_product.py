"""Our own persistent product in the cost model: absent until measured, then it runs in partitions if it is faster."""

from dataclasses import replace

import numpy as np
import pytest

from taskgraph.cost.corunning_fit import OWN, fit_own_share
from taskgraph.cost.families.gemm import GemmCoefficients, GemmShape, gemm_seconds, library_seconds, own_seconds
from taskgraph.cost.fitted import Calibration, model_with, shipped
from taskgraph.cost.gpu_report import KernelTime
from taskgraph.cost.model import op_table, own_product_pays
from taskgraph.graph.device import Device, get
from taskgraph.graph.graph import Graph
from taskgraph.tune.gpucheck.cases import named_case

H200 = get("h200_sxm")
SIZES = (8, 32, 64, 72, 80, 96, 112, 120, 128, 132)
NAMES = ("gemm_gateup_2048", "gemm_down_2048", "gemm_qkv_2048", "gemm_o_2048", "gemm_gateup_128")


def with_own(share: float) -> Calibration:
    """H200's, where our own product has that share of the library's speed."""
    made = shipped("h200_sxm")
    gemm = made.families["gemm"]
    gemm = replace(gemm, coefficients={**gemm.coefficients, "own_share": share})
    return replace(made, families={**made.families, "gemm": gemm})


def graph_of(name: str) -> Graph:
    return named_case(name).graph


def seconds(name: str, made: Calibration, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    return op_table(graph_of(name), H200, sizes, model_with(made, H200)).seconds[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_measured_product_is_taken_where_it_is_faster_and_never_slows_one(name: str) -> None:
    """No size is slower than the library's, the whole device is the library's, and more SMs are no slower."""
    plain, better = seconds(name, shipped("h200_sxm")), seconds(name, with_own(0.95))
    assert (better <= plain * (1 + 1e-12)).all() and better[-1] == plain[-1]
    assert (np.diff(better) <= 1e-12).all()


def test_it_follows_the_partition_where_the_library_stands_still() -> None:
    """Down on 96 and 120 of 132 SMs: cuBLAS keeps half of its speed there (measured, H200: 535 and 543 us of 293)."""
    curves = (seconds("gemm_down_2048", made) for made in (shipped("h200_sxm"), with_own(0.95)))
    plain, better = (dict(zip(SIZES, curve, strict=True)) for curve in curves)
    assert plain[132] / plain[96] < 0.6 and better[132] / better[96] > 0.62
    assert better[120] < 0.8 * plain[120]


def test_it_is_as_good_as_absent_until_it_was_measured() -> None:
    op = graph_of("gemm_down_2048").ops[0]
    tensors = graph_of("gemm_down_2048").tensor
    assert not any(own_product_pays(op, tensors, H200, sms) for sms in SIZES)


def test_the_launch_and_the_cost_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_with(with_own(0.9), H200)
    monkeypatch.setattr("taskgraph.cost.model.fitted_model", lambda device: made)
    for name in NAMES:
        graph = graph_of(name)
        sides = (*graph.tensor["x"].shape[:1], *graph.tensor["w"].shape, 2)
        shape = GemmShape(*(np.array([[float(x)]]) for x in sides))
        c = made.family("gemm").coefficients
        assert isinstance(c, GemmCoefficients)
        sms = np.array(SIZES, np.float64)
        given = shape, made.spec("bf16"), c, sms
        chosen = gemm_seconds(*given) < library_seconds(*given)
        assert chosen[0].tolist() == [own_product_pays(graph.ops[0], graph.tensor, H200, size) for size in SIZES]
    assert own_seconds(*given).shape == (1, len(SIZES))


def test_its_share_is_found_again_from_a_report() -> None:
    def rows(device: Device) -> list[KernelTime]:
        found = [KernelTime(name, 132, float(seconds(name, shipped("h200_sxm"), (132,))[0])) for name in NAMES]
        made = model_with(with_own(0.8), device)
        c = made.family("gemm").coefficients
        for name in NAMES:
            graph = graph_of(name)
            sides = (*graph.tensor["x"].shape[:1], *graph.tensor["w"].shape, 2)
            shape = GemmShape(*(np.array([[float(x)]]) for x in sides))
            every = np.array([72.0, 96.0, 132.0])
            assert isinstance(c, GemmCoefficients)
            own, library = (f(shape, made.spec("bf16"), c, every)[0] for f in (own_seconds, library_seconds))
            scale = next(row.seconds for row in found if row.kernel == name) / library[-1]
            found += [KernelTime(OWN + name, sms, own[i] * scale) for i, sms in enumerate((72, 96))]
        return found

    made = fit_own_share(rows(H200), graph_of, H200, shipped("h200_sxm"))
    assert made.families["gemm"].coefficients["own_share"] == pytest.approx(0.8, rel=0.05)
    assert fit_own_share(rows(H200)[:5], graph_of, H200, shipped("h200_sxm")) == shipped("h200_sxm")
