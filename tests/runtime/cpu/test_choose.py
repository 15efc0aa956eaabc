"""How ways are chosen from what was measured, kept, told, and which dtype follows."""

import json
from pathlib import Path

import pytest

import taskgraph as tg
from taskgraph.runtime import dtypes
from taskgraph.runtime.cpu import choose, load, products, survey
from taskgraph.runtime.cpu.kinds import CHANGING, COMPILED, FIXED, OWN, TILED, TORCH
from taskgraph.runtime.cpu.standard import CPU_KINDS
from taskgraph.runtime.cpu.ways import WAYS, Choice, Rate, Ways


def rates(dtype: str, fixed: bool, **by_way: tuple[float, ...]) -> list[Rate]:
    sizes = (1, 32, 512)
    return [Rate(dtype, fixed, m, way, s) for way, row in by_way.items() for m, s in zip(sizes, row, strict=True)]


def test_the_fastest_way_is_chosen_for_few_rows_and_for_many() -> None:
    found = choose.choose("bf16", True, rates("bf16", True, dot=(9.0, 9.0, 9.0), packed=(1.0, 10.0, 20.0)))
    assert found == [Choice("bf16", True, 1, "dot"), Choice("bf16", True, 65, "packed")]
    found = choose.choose("bf16", False, rates("bf16", False, plain=(1.0, 1.0, 9.0), f32=(2.0, 2.0, 1.0)))
    assert found == [Choice("bf16", False, 1, "f32"), Choice("bf16", False, 65, "plain")]


def test_few_rows_go_by_a_way_whose_sums_do_not_depend_on_the_batch() -> None:
    found = choose.choose("bf16", True, rates("bf16", True, tile=(1.0, 1.0, 1.0), packed=(5.0, 5.0, 1.0)))
    assert found == [Choice("bf16", True, 1, "tile")]


def test_a_way_that_is_hardly_faster_is_not_worth_a_copy() -> None:
    found = choose.choose("f32", True, rates("f32", True, tile=(9.0, 9.0, 9.0), plain=(1.0, 9.2, 9.4)))
    assert found == [Choice("f32", True, 1, "tile")]


def test_measuring_compares_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine with what it has, and as on one that has neither oneDNN's blocks nor dot products."""
    for name, small in (("_INNER", 64), ("_OUTER", 96), ("_COLD_BYTES", 1)):
        monkeypatch.setattr(choose, name, small)
    for here in (products.able(), ("tile", "plain", "f32")):
        monkeypatch.setattr(products, "able", lambda here=here: here)
        ways = choose.measure(rows=(1, 96), seconds=0.0)
        assert {r.way for r in ways.rates if r.dtype == "bf16" and r.fixed} == set(here)
        assert all(r.flops_per_s > 0 for r in ways.rates)
        for c in ways.choices:
            at = {r.way: r for r in ways.rates if (r.dtype, r.fixed) == (c.dtype, c.fixed)}
            assert c.way in at
        assert Ways.from_dict(json.loads(json.dumps(ways.to_dict()))) == ways


@pytest.mark.parametrize("others", [0.0, 0.5])
def test_ways_are_kept_only_when_the_machine_was_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: float
) -> None:
    made = Ways((Choice("bf16", True, 1, "f32"),), (Rate("bf16", True, 1, "f32", 1.0),))
    monkeypatch.setattr(choose, "kept_at", lambda: tmp_path / "ways.json")
    monkeypatch.setattr(choose, "measure", lambda: made)
    monkeypatch.setattr(load, "others_share", lambda begin, end: others)
    if others:
        assert choose.measured() == products.by_capability()
        assert choose.here.__wrapped__() == products.by_capability()
        assert not list(tmp_path.iterdir())
    else:
        assert choose.measured() == choose.here.__wrapped__() == made
        (tmp_path / "ways.json").write_text('{"choices": 3')
        assert choose.measured() == made


def test_every_kind_is_told_of_once() -> None:
    ways = (FIXED, CHANGING, TILED, COMPILED, TORCH, OWN)
    assert sorted(kind for way in ways for kind in survey.run_by(way).split(", ") if kind) == sorted(CPU_KINDS)
    for ways in (products.by_capability(), Ways()):
        rows = list(survey.told(ways))
        text = " ".join(row.kinds for row in rows)
        assert all(kind in text for kind in CPU_KINDS)
        assert all(row.way and row.why for row in rows)
    found = survey.told(Ways((), tuple(rates("bf16", True, dot=(1e9,) * 3))))
    (products_row,) = (row for row in found if {"gemm", "experts"} <= {*row.kinds.split(", ")} and row.dtype == "bf16")
    assert "dot 1" in products_row.why


def test_auto_takes_the_dtype_that_is_faster_here() -> None:
    choices = tuple(Choice(kind, True, 1, "tile") for kind in ("bf16", "f32"))
    fast = Ways(choices, (*rates("bf16", True, tile=(2.0, 2.0, 0.9)), *rates("f32", True, tile=(1.0, 1.0, 1.0))))
    slow = Ways(choices, (*rates("bf16", True, tile=(1.2, 0.2, 0.2)), *rates("f32", True, tile=(1.0, 1.0, 1.0))))
    assert dtypes.by_ways(fast).dtype == "bf16" and "0.50, 0.50, 1.11" in dtypes.by_ways(fast).why
    assert dtypes.by_ways(slow).dtype == "f32"
    assert dtypes.by_ways(products.by_capability()).dtype == "bf16"
    assert dtypes.pick("f32") == dtypes.Picked("f32", "as asked")
    assert dtypes.pick().dtype in ("bf16", "f32")
    with pytest.raises(tg.PlanError, match="f16"):
        dtypes.pick("f16")


def test_every_way_has_words() -> None:
    assert set(products._ENTRIES) == set(products._TAKES) == set(WAYS) >= set(products.able())
