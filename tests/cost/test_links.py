"""Collectives of a device on a network: their times are the network's, all else stays, and devices keep it in files."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.cost.model import op_table
from taskgraph.network import Network, collective_cost, network

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def summed(rows: int = 512, ranks: int = 8) -> tg.Graph:
    b = tg.GraphBuilder("summed")
    x = b.input("x", (rows, 8192), "bf16")
    b.output(tg.ops.all_reduce(tg.ops.add(x, x), ranks=ranks, name="sum"))
    return b.build()


def seconds(device: tg.Device, graph: tg.Graph) -> dict[str, float]:
    table = op_table(graph, device, (device.sm_count,))
    return {op.name: float(table.seconds[i, 0]) for i, op in enumerate(graph.ops)}


@FEW
@given(st.sampled_from(["h100_sxm", "a100_sxm", "h200_sxm"]), st.integers(1, 4096), st.sampled_from([2, 4, 8]))
def test_only_collectives_take_other_times(name: str, rows: int, ranks: int) -> None:
    graph, plain = summed(rows, ranks), tg.devices.get(name)
    on = tg.devices.networked(plain, "torus:2x4")
    before, after = seconds(plain, graph), seconds(on, graph)
    assert {k: v for k, v in before.items() if k != "sum"} == {k: v for k, v in after.items() if k != "sum"}
    assert on.link_bytes_per_s == pytest.approx(plain.link_bytes_per_s)
    least = collective_cost(on.network, "all_reduce", ranks, rows * 8192 * 2)[1].seconds(rows * 8192 * 2)
    assert after["sum"] >= least
    told = op_table(graph, on, (plain.sm_count,)).sources
    assert [source.startswith("fluid model of torus:2x4 by dimension-order, ") for source in told] == [
        op.name == "sum" for op in graph.ops
    ]


def test_without_coefficients_a_collective_takes_what_the_network_says() -> None:
    plain = tg.devices.make("h100_sxm", calibration="")
    on = tg.devices.make(plain, network="switch:8@100GB/s,1us")
    nbytes = 512 * 8192 * 2
    assert seconds(on, summed())["sum"] == pytest.approx(
        collective_cost(on.network, "all_reduce", 8, nbytes)[1].seconds(nbytes)
    )
    assert on.link_bytes_per_s == 100e9


def test_more_sms_are_never_slower_and_slower_links_are() -> None:
    graph = summed()
    rates = []
    for rate in ("450GB/s", "50GB/s"):
        device = tg.devices.networked("h100_sxm", f"switch:8@{rate}")
        table = op_table(graph, device, (8, 32, 64, 132))
        at = [op.name for op in graph.ops].index("sum")
        assert (table.seconds[at, 1:] <= table.seconds[at, :-1] * (1 + 1e-12)).all()
        rates.append(float(table.seconds[at, -1]))
    assert rates[0] < rates[1]


@pytest.mark.parametrize("text", ["torus:4x4", "fat-tree:2x4+2", "machines:2x4"])
def test_a_device_and_a_plan_keep_the_network(text: str) -> None:
    device = tg.devices.networked("h100_sxm", text)
    assert tg.Device.from_dict(json.loads(json.dumps(device.to_dict()))) == device
    graph = summed()
    plan = tg.plan(graph, device, "list")
    assert tg.Plan.from_json(plan.to_json()) == plan
    tg.verify(plan, graph)
    assert (
        plan.digest() != tg.plan(graph, tg.devices.networked(device, network(text, algorithm="tree")), "list").digest()
    )


def test_files_from_before_networks_are_read() -> None:
    body = tg.devices.get("h100_sxm").to_dict()
    assert body.pop("network") is None
    assert tg.Device.from_dict(body) == tg.devices.get("h100_sxm")


def test_what_a_network_cannot_do_is_refused() -> None:
    device = tg.devices.networked("h100_sxm", "switch:4")
    with pytest.raises(tg.NetworkError, match="8 ranks on 'switch:4', which has 4 hosts; use a larger network"):
        tg.plan(summed(), device)
    with pytest.raises(tg.NetworkError, match="needs a power of two"):
        tg.plan(
            summed(ranks=6),
            tg.devices.networked("h100_sxm", Network(network("switch:6").topology, algorithm="halving")),
        )
    with pytest.raises(tg.DeviceError, match="network"):
        tg.devices.make(device, link_bytes_per_s=0.0)
    body = device.to_dict()
    body["network"]["routing"] = "goal"
    with pytest.raises(tg.DeviceError, match=r"network.*made for tori"):
        tg.Device.from_dict(body)


def test_sixteen_ranks_of_two_machines_are_slower_than_of_one_switch() -> None:
    graph = summed(ranks=16)
    one, two = (seconds(tg.devices.networked("h100_sxm", each), graph)["sum"] for each in ("switch:16", "machines:2x8"))
    assert one < two
