"""Quantities are read into SI, printed for people, and refused with the text they came from."""

import pytest

from taskgraph.errors import DemandError
from taskgraph.graph.op import Demand, demand
from taskgraph.units import format_quantity, format_seconds, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("64MiB", 64 * 2**20), ("1.5 GB", 1.5e9), ("4096", 4096), (7, 7), ("2 kib", 2048), ("1e3B", 1000), (0, 0)],
)
def test_bytes(text: str | float, nbytes: float) -> None:
    assert parse_bytes(text) == nbytes


def test_rates() -> None:
    assert parse_rate("20GB/s") == 20e9
    assert parse_rate("1GiB/s") == 2**30


@pytest.mark.parametrize("text", ["", "fast", "20GB", "20 qB/s", "-1GB/s", "1.2.3", "inf", float("nan"), -1])
def test_bad_rates_are_refused(text: str | float) -> None:
    with pytest.raises(DemandError):
        parse_rate(text)


def test_printed_quantities() -> None:
    assert format_seconds(0) == "0 ns"
    assert format_seconds(12.3e-9) == "12.3 ns"
    assert format_seconds(4.56e-6) == "4.56 us"
    assert format_seconds(0.0789) == "78.9 ms"
    assert format_seconds(1234.5) == "1234 s"
    assert format_quantity(3.35e12, "B/s") == "3.35 TB/s"
    assert format_quantity(12, "B") == "12 B"


def test_demand_from_friendly_units() -> None:
    made = demand(sm=(2, 8), pcie="20GB/s", workspace="32MiB")
    assert made == Demand(sm=(2, 8), pcie_bytes_per_s=20e9, workspace_bytes=32 << 20)
    assert demand(sm=4).sm == (4, 4)
    assert demand(efficiency=0.25) == Demand(efficiency=0.25)


def test_a_demand_that_says_no_efficiency_is_written_as_before_there_was_one() -> None:
    """Fingerprints of graphs, and so plans, hold what `repr` says."""
    rates = "hbm_bytes_per_s=None, pcie_bytes_per_s=None, link_bytes_per_s=None"
    assert repr(Demand(sm=(1, 2))) == f"Demand(sm=(1, 2), {rates}, workspace_bytes=0, cluster_sms=1)"
    assert repr(Demand(efficiency=0.5)).endswith("cluster_sms=1, efficiency=0.5)")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sm": (0, 4)},
        {"sm": (8, 4)},
        {"hbm_bytes_per_s": 0.0},
        {"link_bytes_per_s": float("nan")},
        {"pcie_bytes_per_s": -1.0},
        {"workspace_bytes": -1},
        {"cluster_sms": 0},
        {"efficiency": 0.0},
        {"efficiency": 1.5},
        {"efficiency": float("nan")},
    ],
)
def test_bad_demands_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DemandError, match=next(iter(wrong))):
        Demand(**wrong)  # type: ignore[arg-type]
