"""Devices: sources for every number, legal partitions, hypothetical devices, the probed CPU and its cache."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from taskgraph.errors import DeviceError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device, Geometry
from taskgraph.runtime.cpu import load, probe
from tests.strategies import devices

SPECS = list(specs.iter_specs())
NUMERIC = {f.name for f in fields(Device)} - {"name", "kind", "compute_scaling", "sources", "calibration", "network"}


def test_the_published_devices_are_there() -> None:
    assert set(specs.names()) == {"a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s", "rtx5090", "cpu"}
    assert [specs.get(d.name) for d in SPECS] == SPECS
    assert specs.get(SPECS[0]) is SPECS[0]


@pytest.mark.parametrize("device", SPECS, ids=lambda d: d.name)
def test_every_number_has_a_source(device: Device) -> None:
    sources = dict(device.sources)
    assert set(sources) == NUMERIC
    assert all(len(text) > 10 for text in sources.values())


REPORTED = {
    "NVIDIA A100-SXM4-80GB": "a100_sxm",
    "A100-SXM-80GB": "a100_sxm",
    "NVIDIA H100 80GB HBM3": "h100_sxm",
    "NVIDIA H200": "h200_sxm",
    "NVIDIA B200": "b200_sxm",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA GH200 480GB": None,  # another chip, though its name holds H200
    "NVIDIA H100 PCIe": None,
    "NVIDIA L40": None,
    "": None,
}
"""What a driver reports -> the spec of that GPU."""


@pytest.mark.parametrize("name", REPORTED)
def test_a_driver_s_name_finds_its_spec(name: str) -> None:
    found = specs.reported_as(name)
    assert (found and found.name) == REPORTED[name]


def test_every_published_device_is_found_by_a_driver_s_name() -> None:
    assert {REPORTED[name] for name in REPORTED} - {None} == {device.name for device in SPECS}


SHEETS = Path(specs.__file__).with_name("datasheets.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm_count = 108\n", "", "gpu.a100_sxm.sm_count is missing"),
        ("sm_count = 108", "sm_count = 108\nsms = 108", "gpu.a100_sxm.sms is not known"),
        ("sm_count = 108", 'sm_count = "108"', "gpu.a100_sxm.sm_count is '108'; it must be an integer"),
        ('partitions = "8.x"', 'partitions = "7.x"', "no partitions '7.x'; there are 8.x, 9.0"),
        ("sm_count = 108", "sm_count = 1", "'a100_sxm': needs 1 <= sm_min <= sm_count"),
        ("[gpu.l40s]", "[gpu.l40s", "not a datasheet file"),
    ],
)
def test_a_wrong_datasheet_is_refused_by_its_place(old: str, new: str, message: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(message)):
        specs.read_datasheets(SHEETS.replace(old, new, 1))


def legal(device: Device, size: int) -> bool:
    return size == device.sm_count or (device.sm_min <= size < device.sm_count and size % device.sm_granularity == 0)


def check_partitions(device: Device) -> None:
    sizes = device.partition_sizes()
    assert sizes[-1] == device.sm_count
    assert list(sizes) == sorted(set(sizes))
    assert all(legal(device, size) for size in sizes)
    splits = device.splits()
    assert splits[0] == Geometry.of(device.sm_count)
    assert len(set(splits)) == len(splits)
    for geometry in splits:
        owned = [sm for p in geometry.partitions for sm in range(p.first_sm, p.end_sm)]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(device.sm_count))
        assert all(legal(device, size) for size in geometry.sizes)
        if len(geometry.partitions) > 1:
            assert all(p.first_sm % device.sm_granularity == 0 for p in geometry.partitions)


@pytest.mark.parametrize("device", SPECS, ids=lambda d: d.name)
def test_partitions_of_published_devices(device: Device) -> None:
    check_partitions(device)
    counts = {len(g.partitions) for g in device.splits()}
    assert counts == {1, 2, 4}


@settings(max_examples=200, deadline=None)
@given(devices())
def test_partitions_of_random_devices(device: Device) -> None:
    check_partitions(device)


def test_minimum_above_the_granularity_and_no_multiple_of_it() -> None:
    check_partitions(specs.make("h100_sxm", sm_granularity=4, sm_min=6))


def test_partitions_of_h100_and_a100() -> None:
    assert specs.get("h100_sxm").partition_sizes() == (*range(8, 132, 8), 132)
    assert specs.get("a100_sxm").partition_sizes() == (*range(4, 108, 2), 108)


def test_a_device_of_one_core_is_whole() -> None:
    one = specs.make("h100_sxm", sm_count=1, sm_granularity=1, sm_min=1)
    assert one.partition_sizes() == (1,)
    assert one.splits() == (Geometry.of(1),)


def test_make() -> None:
    big = specs.make("h100_sxm", sm_count=144, hbm_bytes_per_s=4e12)
    assert (big.sm_count, big.hbm_bytes_per_s, big.name) == (144, 4e12, "h100_sxm*")
    assert big.flops_per_s == specs.get("h100_sxm").flops_per_s
    assert dict(big.sources)["sm_count"] == "hypothetical, from h100_sxm"
    assert specs.make(big, name="mine").name == "mine"


def test_rates_and_shares() -> None:
    h100 = specs.get("h100_sxm")
    assert h100.rate("bf16") == pytest.approx(989.4e12)
    assert h100.rate("i64") == h100.rate("f32")
    assert h100.compute_share(66) == 0.5
    measured = specs.make("h100_sxm", sm_count=2, sm_granularity=1, sm_min=1, compute_scaling=(0.7, 1.0))
    assert measured.compute_share(1) == 0.7


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sm_min": 200}, "sm_min"),
        ({"sm_granularity": 0}, "sm_granularity"),
        ({"hbm_bytes_per_s": 0.0}, "bandwidths"),
        ({"hbm_bytes_per_s": float("nan")}, "bandwidths"),
        ({"flops_per_s": (("bf16", 1e12),)}, "f32"),
        ({"link_bytes_per_s": -1.0}, "link"),
        ({"launch_seconds": float("inf")}, "launch_seconds"),
        ({"compute_scaling": (1.0,)}, "compute_scaling"),
        ({"sm_cuont": 4}, "sm_cuont"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DeviceError, match=word):
        specs.make("h100_sxm", **changes)


def test_unknown_names_are_refused() -> None:
    for call in (specs.get, specs.make):
        with pytest.raises(DeviceError, match=r"h101.*h100_sxm"):
            call("h101")


@settings(max_examples=50, deadline=None)
@given(devices())
def test_dict_round_trip(device: Device) -> None:
    assert Device.from_dict(json.loads(json.dumps(device.to_dict()))) == device


def test_from_dict_wants_exactly_the_fields() -> None:
    body = SPECS[0].to_dict()
    with pytest.raises(DeviceError, match="sm_min"):
        Device.from_dict({k: v for k, v in body.items() if k != "sm_min"})
    with pytest.raises(DeviceError, match="colour"):
        Device.from_dict({**body, "colour": "green"})


def test_this_machine() -> None:
    cpu = specs.get("cpu")
    assert cpu.kind == "cpu"
    assert {"bf16", "f32"} <= set(dict(cpu.flops_per_s))
    assert cpu.compute_share(cpu.sm_count) == 1.0
    check_partitions(cpu)
    assert specs.get("cpu") is cpu
    if not probe.disturbance(cpu):
        assert Device.from_dict(json.loads(probe.cache_path().read_text())) == cpu


def test_a_probe_under_load_serves_its_process_and_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: SPECS[0])
    monkeypatch.setattr(probe, "cache_path", lambda: tmp_path / "cpu.json")
    monkeypatch.setattr(load, "others_share", lambda begin, end: 0.43)
    found = probe.cached_probe()
    assert found.hbm_bytes_per_s == SPECS[0].hbm_bytes_per_s and not probe.cache_path().exists()
    assert "43%" in probe.disturbance(found)
    monkeypatch.setattr(load, "others_share", lambda begin, end: 0.02)
    assert probe.cached_probe() == SPECS[0] and probe.cache_path().exists()
    assert probe.disturbance(probe.cached_probe()) == ""


def test_what_others_had_of_the_cores_is_what_was_not_ours() -> None:
    cores = len(os.sched_getaffinity(0))
    begin = load.Moment(10.0, 100.0, 5.0)
    assert load.others_share(begin, load.Moment(12.0, 100.0 + cores, 5.0)) == 0.5
    assert load.others_share(begin, load.Moment(12.0, 100.0 + cores, 5.0 + cores)) == 0.0
    assert load.others_share(begin, load.Moment(12.0, 0.0, 9.0)) == 0.0, "where nobody tells, nothing is claimed"
    assert load.others_share(load.now(), load.now()) <= 1.0


def test_another_process_that_computes_is_noticed() -> None:
    """One core of the machine's is busy for as long as the other process says so, and this one sleeps."""
    if not load.now().busy_s:
        pytest.skip("this system does not count what its cores do")
    spin = "import time; print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        begin = load.now()
        before = Path(f"/proc/{other.pid}/stat").read_text().split()
        while True:  # until the other one has had half a second, however busy the machine is
            time.sleep(0.1)
            after = Path(f"/proc/{other.pid}/stat").read_text().split()
            if int(after[13]) - int(before[13]) >= 50:
                break
        end = load.now()
        other.kill()
    assert load.others_share(begin, end) > 0.4 / (len(os.sched_getaffinity(0)) * (end.clock_s - begin.clock_s))


def test_a_second_probe_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Device] = []

    def measure() -> Device:
        measured.append(SPECS[0])
        return SPECS[0]

    monkeypatch.setattr(probe, "probe", measure)
    monkeypatch.setattr(load, "others_share", lambda begin, end: 0.0)
    monkeypatch.setattr(probe, "cache_path", lambda: tmp_path / "deep" / "cpu.json")
    assert probe.cached_probe() == probe.cached_probe() == SPECS[0]
    assert len(measured) == 1
    (tmp_path / "deep" / "cpu.json").write_text('{"half": ')
    assert probe.cached_probe() == SPECS[0]
    assert len(measured) == 2
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["cpu.json"]


def test_another_machine_has_another_cache_file(monkeypatch: pytest.MonkeyPatch) -> None:
    here = probe.cache_path()
    monkeypatch.setattr(probe, "_memory_bytes", lambda: 1)
    assert probe.cache_path() != here


def test_a_failing_probe_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no torch")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(DeviceError, match="no torch"):
        specs._this_machine.__wrapped__()


def test_a_virtual_gpu_is_planned_for_by_its_spec() -> None:
    assert specs.get("virtual:h100_sxm") == specs.get("h100_sxm")
    with pytest.raises(DeviceError, match="h900"):
        specs.get("virtual:h900")
