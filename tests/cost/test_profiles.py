"""The profile database, its keys, interpolation over SMs, and measured times in place of formulas."""

import math
import multiprocessing
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops
from taskgraph.cost import profiles
from taskgraph.cost.model import op_table
from taskgraph.cost.profiles import (
    OpKey,
    OpTime,
    Platform,
    Points,
    Profile,
    ProfileDB,
    interpolate,
    measured_costs,
    shape_key,
)
from taskgraph.errors import ProfileError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Op, Work, spec
from tests.strategies import devices, graphs

HERE = Platform("cpu", "abc", "none", "torch 2.13", "cpu")
KEY = OpKey("gemm", "8x16 w16x4 -> 8x4", "f32,f32->f32")


def row(sms: int = 1, median_s: float = 1e-3, key: OpKey = KEY) -> OpTime:
    return OpTime(key, sms, median_s, 1e-5, 7)


# --------------------------------------------------------------------------------------------- keys


def keyed(make: str, **attrs: object) -> OpKey:
    """The key of one op of a small graph."""
    b = GraphBuilder("one")
    if make == "rmsnorm":
        b.output(ops.rmsnorm(b.input("x", (8, 16), "f32"), b.weight("w", (16,), "f32"), **attrs))  # type: ignore[arg-type]
    elif make == "gemm":
        w = b.weight("w", (16, 4), "f32") if attrs["constant"] else b.input("w", (16, 4), "f32")
        b.output(ops.gemm(b.input("x", (8, 16), "f32"), w))
    elif make == "attention":
        keys, values = b.state("k", (2, 2, 32, 16), "f32"), b.state("v", (2, 2, 32, 16), "f32")
        q, at = b.input("q", (2, 4, 16), "f32"), b.input("at", (2,), "i64")
        b.output(ops.attention(q, at, keys, values, context=attrs["context"]))  # type: ignore[arg-type]
    else:
        out, work = [spec("y", (4,), "f32")], Work(flops=attrs["flops"])  # type: ignore[arg-type]
        b.output(*b.op(("call", {"function": "m:f"}), [b.input("x", (4,), "f32")], out, work, "f"))
    graph = b.build()
    return shape_key(graph.ops[0], graph.tensor)


def test_keys_tell_apart_what_takes_another_time_and_nothing_else() -> None:
    assert keyed("rmsnorm", eps=1e-5) == keyed("rmsnorm", eps=1e-6)
    assert keyed("gemm", constant=True) != keyed("gemm", constant=False), "backends pack weights"
    assert keyed("attention", context=8) != keyed("attention", context=32)
    assert keyed("call", flops=1.0) != keyed("call", flops=2.0)
    assert keyed("gemm", constant=True) == OpKey(
        "gemm", "8x16 w16x4 -> 8x4 bias=False residual=False transpose_w=False", "f32,f32->f32"
    )


@settings(max_examples=30, deadline=None)
@given(graphs())
def test_layers_of_a_repeat_share_their_keys(graph: Graph) -> None:
    flat = graph.flat()
    shared = {shape_key(op, graph.tensor) for op in graph.ops}
    assert {shape_key(op, flat.tensor) for op in flat.ops} == shared


# ------------------------------------------------------------------------------------ interpolation


@st.composite
def measured_points(draw: st.DrawFn) -> Points:
    sizes = sorted(draw(st.sets(st.integers(1, 132), min_size=1, max_size=6)))
    return tuple((s, draw(st.floats(1e-6, 1.0)), 1e-7) for s in sizes)


@given(measured_points(), st.integers(1, 132))
def test_interpolation_stays_between_its_neighbours(points: Points, sms: int) -> None:
    found = interpolate(points, sms)
    exact = {size: seconds for size, seconds, _ in points}
    if not points[0][0] <= sms <= points[-1][0]:
        assert found is None
    elif sms in exact:
        assert found == exact[sms]
    else:
        below = max(p for p in points if p[0] < sms)
        above = min(p for p in points if p[0] > sms)
        low, high = sorted((below[1], above[1]))
        assert found is not None
        assert low * (1 - 1e-9) <= found <= high * (1 + 1e-9)


@given(st.floats(1e-6, 1.0), st.floats(0.0, 1.0), st.integers(2, 131))
def test_interpolation_is_exact_for_power_laws(seconds: float, falls: float, sms: int) -> None:
    points = tuple((s, seconds * s**-falls, 0.0) for s in (1, 132))
    assert interpolate(points, sms) == pytest.approx(seconds * sms**-falls, rel=1e-9)


# ----------------------------------------------------------------------------------------- database


def test_rows_come_back_by_op_with_rising_sms(tmp_path: Path) -> None:
    database, other = ProfileDB(tmp_path / "deep" / "p.sqlite3"), replace(KEY_OF_ADD, sms=3)
    assert database.table(HERE) == {}
    assert database.record(HERE, [row(4, 1e-3), row(1, 3e-3), other]) == 3
    assert database.table(HERE)[KEY] == ((1, 3e-3, 1e-5), (4, 1e-3, 1e-5))
    assert set(database.table(HERE)) == {KEY, other.key}
    assert database.platforms() == (HERE,)


KEY_OF_ADD = row(key=OpKey("add", "4 4 -> 4", "f32,f32->f32"))


def test_the_newest_time_of_an_op_stays(tmp_path: Path) -> None:
    database = ProfileDB(tmp_path / "p.sqlite3")
    for median_s in (5e-3, 2e-3):
        database.record(HERE, [row(2, median_s)])
    assert database.table(HERE)[KEY] == ((2, 2e-3, 1e-5),)


@pytest.mark.parametrize("field", ["device", "machine", "driver", "versions", "backend"])
def test_places_are_never_mixed(tmp_path: Path, field: str) -> None:
    database = ProfileDB(tmp_path / "p.sqlite3")
    database.record(HERE, [row(1, 1e-3)])
    there = replace(HERE, **{field: "other"})
    assert database.table(there) == {}
    database.record(there, [row(1, 9e-3)])
    assert database.table(HERE)[KEY] == ((1, 1e-3, 1e-5),)


def write_batches(path: str, writer: int, batches: int) -> None:
    """What each of several processes does at once."""
    for batch in range(batches):
        rows = [row(sms, 1e-3 * (writer + 1), OpKey("gemm", f"{writer} {batch}", "f32")) for sms in range(1, 9)]
        ProfileDB(path).record(HERE, rows)


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path, context = tmp_path / "p.sqlite3", multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_batches, args=(str(path), i, 12)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    table = ProfileDB(path).table(HERE)
    assert len(table) == 4 * 12
    assert all(len(points) == 8 for points in table.values())


def test_a_batch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = ProfileDB(tmp_path / "p.sqlite3")
    database.record(HERE, [row(1)])
    broken = row(3)
    object.__setattr__(broken, "median_s", None)  # NOT NULL fails at the second row of the batch
    with pytest.raises(ProfileError):
        database.record(HERE, [row(2), broken])
    assert [sms for sms, _, _ in database.table(HERE)[KEY]] == [1]


@pytest.mark.parametrize(
    "bad", [{"median_s": math.nan}, {"median_s": 0.0}, {"median_s": -1.0}, {"spread_s": math.inf}, {"spread_s": -1e-9},
            {"sms": 0}, {"count": 0}], ids=str,
)  # fmt: skip
def test_what_is_no_measurement_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ProfileError, match="gemm 8x16"):
        replace(row(), **bad)


def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite3"
    path.write_bytes(b"this is not a database, and longer than a header of one hundred bytes" * 10)
    for use in (lambda: ProfileDB(path).table(HERE), lambda: ProfileDB(path).record(HERE, [row()])):
        with pytest.raises(ProfileError, match=r"p\.sqlite3.*damaged.*Move it away"):
            use()
    assert path.read_bytes().startswith(b"this is not"), "it is left as it was"


def test_pages_torn_in_the_middle_are_found(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite3"
    ProfileDB(path).record(HERE, [row(s, key=OpKey("gemm", f"{k}", "f32")) for k in range(500) for s in (1, 2)])
    body = bytearray(path.read_bytes())
    body[4096:] = b"\xa5" * (len(body) - 4096)
    path.write_bytes(body)
    with pytest.raises(ProfileError, match=r"p\.sqlite3"):
        ProfileDB(path).table(HERE)


def test_foreign_and_newer_files_are_left_alone(tmp_path: Path) -> None:
    foreign, newer = tmp_path / "foreign.sqlite3", tmp_path / "newer.sqlite3"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mail (text TEXT)")
    connection.close()
    with pytest.raises(ProfileError, match="not one of profiles"):
        ProfileDB(foreign).record(HERE, [row()])
    ProfileDB(newer).record(HERE, [row()])
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ProfileError, match=r"schema 99.*knows 1.*Upgrade"):
        ProfileDB(newer).table(HERE)


def test_an_older_file_is_migrated_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = ProfileDB(tmp_path / "p.sqlite3")
    database.record(HERE, [row(2, 4e-3)])
    monkeypatch.setattr(profiles, "_MIGRATIONS", (*profiles._MIGRATIONS, "CREATE TABLE notes (text TEXT)"))
    assert database.table(HERE)[KEY] == ((2, 4e-3, 1e-5),)
    with sqlite3.connect(database.path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ProfileError, match="another path"):
        ProfileDB(tmp_path / "file" / "p.sqlite3").table(HERE)


# ------------------------------------------------------------------------------- measured over formula


@st.composite
def profiles_of(draw: st.DrawFn, graph: Graph, device: Device) -> Profile:
    """Random times, some of them far from the formulas, for some of the ops, on some of the sizes."""
    flat, seed = graph.flat(), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    sizes = sorted({size for geometry in device.splits() for size in geometry.sizes})
    times: dict[OpKey, Points] = {}
    for op in flat.ops:
        kept = [s for s in sizes if random.random() < 0.9]
        if kept and random.random() < 0.8:
            times[shape_key(op, flat.tensor)] = tuple((s, 10 ** random.uniform(-7, -2), 1e-8) for s in kept)
    return Profile(times)


@settings(max_examples=60, deadline=None)
@given(st.data(), graphs(), devices())
def test_plans_with_measured_times_pass_the_checker(data: st.DataObject, graph: Graph, device: Device) -> None:
    costs = measured_costs(data.draw(profiles_of(graph, device)))
    for scheduler in ("sequential", "list", "auto"):
        tg.verify(tg.plan(graph, device, scheduler, costs=costs), graph)


@settings(max_examples=60, deadline=None)
@given(st.data(), graphs(), devices())
def test_an_op_is_priced_by_measurements_or_by_the_formula(data: st.DataObject, graph: Graph, device: Device) -> None:
    profile, flat = data.draw(profiles_of(graph, device)), graph.flat()
    sizes = sorted({size for geometry in device.splits() for size in geometry.sizes})
    table, formula = measured_costs(profile)(flat, device, sizes), op_table(flat, device, sizes)
    for i, op in enumerate(flat.ops):
        found = [profile(op, flat.tensor, size) for size in sizes]
        for j, seconds in enumerate(found):
            if seconds is None:
                assert table.seconds[i, j] == formula.seconds[i, j]
                assert (table.rates[i, j] == formula.rates[i, j]).all()
            else:
                assert table.seconds[i, j] == pytest.approx(max(seconds - device.launch_seconds, 1e-9))
                assert table.rates[i, j, 0] <= device.hbm_bytes_per_s
        assert table.sources[i].startswith("measured") == any(t is not None for t in found)
        assert (table.sources[i] == "measured") == (None not in found)
        alone = measured_costs(profile)(flat, device, sizes[-1:])
        assert alone.seconds[i, 0] == table.seconds[i, -1], "a price does not depend on what else is asked"


def test_planning_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = GraphBuilder("sum")
    b.output(ops.add(b.input("x", (64,), "f32"), b.input("y", (64,), "f32")))
    graph, device = b.build(), tg.devices.get("h100_sxm")
    key = shape_key(graph.ops[0], graph.tensor)
    database = ProfileDB(tmp_path / "p.sqlite3")
    database.record(HERE, [row(8, 3e-3, key), row(132, 1e-3, key)])
    profile = Profile(database.table(HERE))

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(sqlite3, "connect", refused)
    plan = tg.plan(graph, device, costs=measured_costs(profile))
    assert plan.makespan_s == pytest.approx(1e-3)
    assert "measured" in plan.timeline.origin


def test_a_profile_is_a_measured() -> None:
    seen: profiles.Measured = Profile({KEY: ((1, 2e-3, 0.0),)})
    unknown = Op("x", "add", (), (), Work(flops=1.0))
    assert seen(unknown, {}, 1) is None


def test_no_torch() -> None:
    code = "import sys, taskgraph; taskgraph.ProfileDB; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
