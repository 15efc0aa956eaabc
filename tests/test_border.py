"""Files: every damaged plan, graph, device, coefficient and profile file is refused by its typed error in one line, and
what loads means what it says."""

import copy
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import taskgraph as tg
from taskgraph.cost import fitted
from taskgraph.cost.fitted import Calibration
from taskgraph.cost.profiles import OpKey, OpTime, Platform
from taskgraph.errors import CalibrationError, DeviceError, GraphError, PlanError, ProfileError, TaskgraphError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device
from taskgraph.tune import autotune

MUTATIONS = 10_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**70, -(2**70), 10**400, 1.5, -0.0, 1e-320, 1e300, 1e400, -1e400,
    math.nan, "", "x", "\ud800", "a" * 100, "é\n", [], {}, [1], [[]], {"x": 1}, [None, "x"], "NaN", "1",
)  # fmt: skip
"""What a leaf is replaced by: every kind of JSON value, and numbers at the ends."""


def small() -> tg.Graph:
    """Products, a custom op that pins SMs, writes a state and copies, and a loop: every field of a file is there."""
    b = tg.GraphBuilder("small")
    x, w, s = b.input("x", (8, 64), "f32"), b.weight("w", (64, 64), "f32"), b.state("s", (8, 64), "f32")
    h, k = tg.ops.gemm(x, w, name="a"), tg.ops.apply("swiglu", [x.rows(0, 8)], name="b", after=["a"])
    out = [tg.spec("c.o", (8, 64), "f32")]
    work, pinned = tg.Work(flops=1e6, h2d_bytes=10), tg.demand(sm=(2, 8), pcie="20GB/s")
    (c,) = b.op(("custom", {"sizes": (1, 2), "rate": 0.5}), [h, k, s.written()], out, work, "c", demand=pinned)
    with b.repeat(3) as loop:
        inside = loop.carry(c)
        value = loop.next(inside, tg.ops.add(inside, inside, name="twice"))
    b.output(tg.ops.add(value, h, name="d"))
    return b.build()


GRAPH = small()
PLAN = tg.plan(GRAPH, "h100_sxm", "list")


def reads_graph(text: str) -> None:
    graph = tg.Graph.from_json(text)
    assert tg.Graph.from_json(graph.to_json()) == graph
    if len(graph.ops) * (graph.repeat.count if graph.repeat else 1) < 100:
        tg.verify(tg.plan(graph, "h100_sxm", "sequential"), graph, memory=False)


def reads_plan(text: str) -> None:
    plan = tg.Plan.from_json(text)
    assert repr(tg.Plan.from_json(plan.to_json())) == repr(plan)  # repr, as NaN is not equal to itself
    tg.verify(plan, GRAPH)
    assert replace(plan, seal=PLAN.seal) == PLAN, "what verify accepts is the plan that was saved"
    tg.explain(plan)


def reads_device(text: str) -> None:
    device = Device.from_json(text)
    assert Device.from_json(json.dumps(device.to_dict())) == device
    device.splits(), device.partition_sizes(), device.compute_share(device.sm_count)


def reads_coefficients(text: str) -> None:
    Calibration.from_json(text)


def coefficients(family: str) -> str:
    """A shipped coefficient file with one of its families."""
    body = json.loads((fitted._FOLDER / "a100_sxm.json").read_text())
    return json.dumps(body | {"families": {family: body["families"][family]}})


FORMATS: dict[str, tuple[Callable[[], str], Callable[[str], None], type[TaskgraphError]]] = {
    "graph": (GRAPH.to_json, reads_graph, GraphError),
    "plan": (PLAN.to_json, reads_plan, PlanError),
    "device": (lambda: json.dumps(specs.get("h100_sxm").to_dict()), reads_device, DeviceError),
    "coefficients": (lambda: coefficients("nccl"), reads_coefficients, CalibrationError),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutated(body: Any, where: tuple[Any, ...], rnd: random.Random) -> str:
    """The text of the document with one thing wrong at `where`."""
    here = body
    for key in where[:-1]:
        here = here[key]
    last, how = where[-1], rnd.randrange(10)
    kept = copy.copy(here)
    try:
        if how <= 6:
            here[last] = rnd.choice(VALUES)
        elif how == 7:
            del here[last]
        elif isinstance(here, list):
            here.insert(last, copy.deepcopy(here[rnd.randrange(len(here))]))
        elif how == 8:
            here[rnd.choice(["x", "", f"{last}_", "schema", "\ud800", "new\nline"])] = here.pop(last)
        else:
            here["unknown"] = rnd.choice(VALUES)
        return json.dumps(body)
    finally:
        here.clear()
        here.extend(kept) if isinstance(here, list) else here.update(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_damaged_files_raise_their_error_in_one_line(name: str) -> None:
    write, read, kind = FORMATS[name]
    text, rnd = write(), random.Random(1)
    body = json.loads(text)
    where = list(places(body))
    refused = 0
    for number in range(MUTATIONS):
        damaged = mutated(body, rnd.choice(where), rnd) if number % 20 else cut(text, rnd)
        try:
            read(damaged)
        except kind as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        except TaskgraphError as error:
            assert name == "graph", f"{type(error).__name__}: {error}"  # a graph may ask for what a device has not
    assert refused > MUTATIONS / 2, "most damage is seen"
    assert json.loads(text) == body
    read(text)


def cut(text: str, rnd: random.Random) -> str:
    """The text truncated, with characters changed, or with a piece of it twice."""
    at, to = sorted(rnd.randrange(len(text)) for _ in range(2))
    return rnd.choice(
        [text[:at], text[at:], text[:to] + text[at:], text[:at] + rnd.choice('{}[]",:x0\0') + text[at + 1 :]]
    )


NO_DOCUMENTS = (
    "", " ", "null", "[]", "{}", "[" * 100_000, '{"a":' * 100_000, "\ufeff", '{"schema": true}', '{"schema": "3"}',
    "1e999", "NaN", '"\ud800"', "9" * 5000, '{"schema": 1, "schema": 1}',
    '{"schema": 3, "lanes": ' + "[" * 900 + "]" * 900 + "}",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_DOCUMENTS, ids=range(len(NO_DOCUMENTS)))
@pytest.mark.parametrize(("read", "kind"), [(tg.Graph.from_json, GraphError), (tg.Plan.from_json, PlanError)])
def test_what_is_no_document_is_refused(text: str, read: Callable[[str], object], kind: type[TaskgraphError]) -> None:
    with pytest.raises(kind) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_the_place_in_the_document_is_named() -> None:
    body = json.loads(GRAPH.to_json())
    body["ops"][2]["attrs"][1][1] = None
    with pytest.raises(GraphError, match=r"ops\.2\.attrs\.1\.1 is None"):
        tg.Graph.from_json(json.dumps(body))
    body = json.loads(PLAN.to_json())
    body["timeline"]["spans"][1]["lane"] = True
    with pytest.raises(PlanError, match=r"timeline\.spans\.1\.lane is True; it must be an integer"):
        tg.Plan.from_json(json.dumps(body))
    body["timeline"]["spans"][1] = {"op": "a", "lane": 0, "start_s": 0.0, "end_s": 1.0, "colour": "red"}
    with pytest.raises(PlanError, match=r"timeline\.spans\.1\.colour is not known"):
        tg.Plan.from_json(json.dumps(body))
    del body["device"]["sm_count"], body["timeline"]["spans"][1]["colour"]
    with pytest.raises(PlanError, match=r"device\.sm_count is missing"):
        tg.Plan.from_json(json.dumps(body))
    with pytest.raises(PlanError, match=r"key 'made_by' stands twice"):
        tg.Plan.from_json(PLAN.to_json().replace('"made_by":', '"made_by": "me", "made_by":'))


def test_a_byte_order_mark_is_no_damage() -> None:
    assert tg.Graph.from_json("\ufeff" + GRAPH.to_json()) == GRAPH


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "mark").write_bytes(b"\xef\xbb\xbf" + PLAN.to_json().encode())
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(3 << 30)
    places: tuple[Any, ...] = (
        tmp_path,
        tmp_path / "pipe",
        "/dev/zero",
        tmp_path / "bytes",
        tmp_path / "huge",
        "a\0b",
        7,
    )
    for place in (*places, None, tmp_path / "absent", "x" * 5000):
        for load, kind in ((tg.Plan.load, PlanError), (Calibration.load, CalibrationError)):
            with pytest.raises(kind) as caught:
                load(place)
            assert "\n" not in str(caught.value)
    assert tg.Plan.load(tmp_path / "mark") == PLAN


def test_a_plan_that_cannot_be_written_is_a_plan_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "plan.json", tmp_path, "a\0b", None, 3):
        with pytest.raises(PlanError, match="write"):
            PLAN.save(place)  # type: ignore[arg-type]


def test_equal_graphs_from_python_and_from_files_have_one_fingerprint() -> None:
    """Numbers are kept as one kind: -0.0, 1 and 1.0, lists for tuples, numpy's integers."""
    import numpy as np

    assert tg.Work(flops=1, hbm_bytes=-0.0) == tg.Work(flops=1.0, hbm_bytes=0.0)
    made = [tg.Tensor("x", shape, "f32") for shape in ((4, 8), [4, 8], (np.int64(4), 8))]  # type: ignore[arg-type]
    assert made[0] == made[1] == made[2] and {hash(t) for t in made} == {hash(made[0])}
    again = tg.Graph.from_json(GRAPH.to_json())
    assert again.fingerprint == GRAPH.fingerprint


@pytest.mark.slow
def test_damaged_profile_databases_are_profile_errors(tmp_path: Path) -> None:
    """Bytes of the file are changed, cut or doubled: its rows are read, or a ProfileError says what to do."""
    platform = Platform("cpu", "m", "none", "v", "cpu")
    store = tg.ProfileDB(tmp_path / "good.sqlite3")
    store.record(platform, [OpTime(OpKey("add", f"{i} -> {i}", "f32"), 1 + i % 4, 1e-3, 1e-5, 7) for i in range(40)])
    store.table(platform)
    good, rnd, refused = store.path.read_bytes(), random.Random(2), 0
    for number in range(1000):
        path = tmp_path / f"{number}.sqlite3"
        damaged = bytearray(good)
        for _ in range(rnd.choice([1, 1, 4, 64])):
            damaged[rnd.randrange(len(damaged))] = rnd.randrange(256)
        path.write_bytes(bytes(damaged) if number % 10 else bytes(damaged)[: rnd.randrange(len(damaged))])
        try:
            for points in tg.ProfileDB(path).table(platform).values():
                assert all(sms >= 1 and 0 < median_s < math.inf and spread_s >= 0 for sms, median_s, spread_s in points)
        except ProfileError as error:
            refused += 1
            assert "\n" not in str(error)
        for left in tmp_path.glob(f"{number}.sqlite3*"):
            left.unlink()
    assert refused


@pytest.mark.parametrize("text", NO_DOCUMENTS, ids=range(len(NO_DOCUMENTS)))
def test_a_damaged_winner_is_no_winner(text: str, tmp_path: Path) -> None:
    path = tmp_path / "winner.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert autotune._remembered(path, GRAPH) is None
