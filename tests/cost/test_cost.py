"""The cost model: its table and its scalar door, monotone in SMs, full speed on all SMs, sources and bands."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from benchmarks import interference
from taskgraph.cost import formulas
from taskgraph.cost.families import COLLECTIVE, DECODE, GEMM, MOE, PREFILL, STREAM
from taskgraph.cost.families.attention import causal_pairs
from taskgraph.cost.families.collective import COLLECTIVES
from taskgraph.cost.family import Family
from taskgraph.cost.fitted import RESPONSE, TRANSFER_BAND, model_of
from taskgraph.cost.model import op_table, predict
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph
from tests.strategies import devices, graphs

H100 = tg.devices.get("h100_sxm")
GPUS = [d.name for d in tg.devices.iter_specs()]
POWER = st.integers(0, 12).map(lambda e: float(2**e))


@st.composite
def kernels(draw: st.DrawFn) -> tuple[Family, np.ndarray]:
    """A family and a random shape of it."""
    family = draw(st.sampled_from([GEMM, PREFILL, DECODE, MOE, COLLECTIVE, STREAM]))
    number = st.integers(1, 5000).map(float)
    heads = draw(st.sampled_from([(8.0, 1.0), (32.0, 8.0), (16.0, 16.0)]))
    dim, window = draw(st.sampled_from([64.0, 128.0, 256.0])), draw(st.sampled_from([0.0, 128.0, 1024.0]))
    if family is GEMM:
        return family, np.array([draw(number), draw(number), draw(number), 2.0])
    if family is PREFILL:
        new = draw(number)
        return family, np.array([draw(POWER), new, new + draw(st.sampled_from([0.0, 512.0])), *heads, dim, window, 2.0])
    if family is DECODE:
        return family, np.array([draw(POWER), draw(number), *heads, dim, window, 2.0])
    if family is MOE:
        experts = draw(st.sampled_from([8.0, 128.0]))
        ranks, skew = draw(st.sampled_from([1.0, 8.0])), draw(st.sampled_from([0.0, 1.01, 1.2]))
        return family, np.array([draw(number), 4096.0, draw(number), 2.0, experts, ranks, skew, 2.0])
    if family is COLLECTIVE:
        return family, np.array([draw(st.integers(0, 3)), draw(st.sampled_from([2.0, 4.0, 8.0])), 100.0 * draw(number)])
    return family, np.array(
        [1e6 * draw(number), 1e4 * draw(number), *draw(st.sampled_from([(0, 0), (1e6, 0)])), 0.0, 0.0]
    )


@settings(max_examples=300, deadline=None)
@given(kernels(), st.sampled_from(["a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm"]))
def test_more_sms_are_never_slower(kernel: tuple[Family, np.ndarray], name: str) -> None:
    family, shape = kernel
    model = model_of(tg.devices.get(name))
    sms = np.arange(1.0, model.device.sm_count + 1)
    times = model.family(family.name).seconds(shape[None, :], model.spec(), sms)[0]
    assert np.isfinite(times).all()
    assert (times > 0).all()
    assert (np.diff(times) <= 1e-9 * times[:-1]).all()


@settings(max_examples=100, deadline=None)
@given(kernels())
def test_all_sms_give_the_formula_times_its_correction(kernel: tuple[Family, np.ndarray]) -> None:
    family, shape = kernel
    model = model_of(H100)
    part, spec = model.family(family.name), model.spec()
    full = part.seconds(shape[None, :], spec, np.array([132.0]))[0, 0]
    base = family.seconds(shape[None, :], spec, part.coefficients, np.array([132.0]))[0, 0]
    assert 0.2 < full / base < 5.0, "a correction, not another model"
    if family is STREAM:
        assert full == base


PINNED = {
    "gemm": {
        (2048.0, 8192.0, 1280.0, 2.0): (6.10163718554188e-05, 0.0001690285692998, 0.0015131380898885),
        (17.0, 4096.0, 14336.0, 2.0): (4.50969700107914e-05, 7.52438622448065e-05, 0.000514313233230688),
    },
    "prefill_attention": {
        (4.0, 700.0, 900.0, 32.0, 8.0, 128.0, 0.0, 2.0): (
            0.000101503836837461, 0.000204546081418828, 0.00164971492117141,
        ),
        (1.0, 4096.0, 4096.0, 64.0, 8.0, 128.0, 1024.0, 2.0): (
            0.000308856030080851, 0.000694423511659992, 0.00602003155897468,
        ),
    },
    "decode_attention": {
        (64.0, 1024.0, 32.0, 8.0, 128.0, 0.0, 2.0): (0.000103354113526957, 0.000190806407679742, 0.00142436260342941),
        (3.0, 50000.0, 64.0, 8.0, 128.0, 4096.0, 1.0): (
            2.02807177651202e-05, 2.61089868873624e-05, 0.000131904101462178,
        ),
    },
    "moe": {
        (512.0, 4096.0, 1536.0, 8.0, 128.0, 1.0, 0.0, 2.0): (
            0.00179932308732819, 0.00316277604946025, 0.0234659122949093,
        ),
        (7.0, 7168.0, 2048.0, 2.0, 64.0, 8.0, 1.2, 2.0): (
            0.000107335213279711, 0.000144071712663806, 0.000697854399734811,
        ),
    },
    "nccl": {
        (0.0, 8.0, 33554432.0): (0.000199324652057809, 0.000256179582973326, 0.00130233151258969),
        (2.0, 4.0, 3000.0): (7.45376726812826e-06, 7.45623877929485e-06, 7.50171550636786e-06),
    },
    "stream": {
        (1e9, 3e7, 0.0, 0.0, 0.0, 0.0): (1.31357805893529e-05, 2.02590849589623e-05, 0.000125538909098291),
        (0.0, 1e6, 2e8, 0.0, 0.0, 1.0): (0.00919917647058823, 0.00919917647058823, 0.00919917647058823),
    },
}  # fmt: skip
"""Family -> shape -> seconds on 132, 48 and 5 SMs of an H100, as scalar loops over the C library's functions gave them;
products in partitions since they keep the grid that was chosen for the device."""


@pytest.mark.parametrize("name", PINNED)
def test_times_are_those_that_plans_were_made_with(name: str) -> None:
    model = model_of(H100)
    shapes, wanted = np.array(list(PINNED[name])), np.array(list(PINNED[name].values()))
    found = model.family(name).seconds(shapes, model.spec(), np.array([132.0, 48.0, 5.0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_a_time_does_not_depend_on_what_else_is_asked_for() -> None:
    """Of many shapes and SM counts at once, in blocks, each time is to the last bit the one of a shape alone."""
    model, draw = model_of(H100), np.random.default_rng(3)
    shapes = np.column_stack([*np.floor(2.0 ** draw.uniform(0, 13, (3, 900))), np.full(900, 2.0)])
    sms = np.arange(1.0, 133.0)
    gemm, spec = model.family("gemm"), model.spec()
    many = gemm.seconds(shapes, spec, sms)
    for i in draw.choice(900, 30):
        j = int(draw.integers(132))
        assert many[i, j] == gemm.seconds(shapes[i : i + 1], spec, sms[j : j + 1])[0, 0]


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-9, 1e9), st.floats(-8.0, 8.0))
def test_powers_are_the_c_librarys_on_every_cpu(base: float, exponent: float) -> None:
    """numpy's own power is another function where the CPU has wide vectors, and plans would differ by machine."""
    row = np.full(64, base)
    assert (formulas.power(row, exponent) == math.pow(base, exponent)).all()
    assert (formulas.power(row, np.full(64, exponent)) == math.pow(base, exponent)).all()


@settings(max_examples=50, deadline=None)
@given(graphs(), devices())
def test_table_and_predict_say_the_same(graph: Graph, device: Device) -> None:
    flat, sizes = graph.flat(), device.partition_sizes()[-3:]
    table = op_table(flat, device, sizes)
    assert len(table.sources) == len(table.band) == len(flat.ops)
    for i, op in enumerate(flat.ops):
        for j, size in enumerate(sizes):
            seen = predict(op, flat, device, size)
            assert seen.seconds == pytest.approx(table.seconds[i, j] + device.launch_seconds, rel=1e-9)
            assert 0 <= table.sm_use[i, j] <= size
            assert table.rates[i, j, 0] <= device.hbm_bytes_per_s
            assert table.rates[i, j, 0] * table.seconds[i, j] <= op.work.hbm_bytes * (1 + 1e-9)
        assert (np.diff(table.seconds[i]) <= 1e-9 * table.seconds[i, 0]).all(), "more SMs are never slower"


def step(m: int = 2048, n: int = 4096, k: int = 4096) -> Graph:
    b = tg.GraphBuilder("step")
    x, w = b.input("x", (m, k), "bf16"), b.weight("w", (k, n), "bf16")
    kv, q = b.state("kv", (2, 64, 2048, 8, 128), "bf16"), b.input("q", (64, 64, 128), "bf16")
    pages = b.input("pages", (1 << 20,), "u8")
    h = tg.ops.gemm(x, w, name="gemm")
    b.output(h, tg.ops.decode_attention(q, kv, name="decode"), tg.ops.copy(pages, direction="h2d", name="fetch"))
    b.output(tg.ops.add(h, h, name="add"))
    return b.build()


def test_sm_use_follows_the_units() -> None:
    graph = step()
    names = [op.name for op in graph.ops]
    use = dict(zip(names, op_table(graph, H100, (132,)).sm_use[:, 0], strict=True))
    assert all(0.95 * 132 < use[name] < 132 for name in ("gemm", "decode", "add")), (
        "they fill the device: they take turns"
    )
    assert use["fetch"] == 0.0


def test_few_blocks_leave_sms_free() -> None:
    graph = step(64, 512, 512)
    names = [op.name for op in graph.ops]
    use = dict(zip(names, op_table(graph, H100, (132, 64)[::-1]).sm_use.tolist(), strict=True))
    assert use["gemm"] == [8.0, 8.0], "a tile of 64 x 64 for every 64 columns"
    assert use["add"] == [12.0, 12.0], "three times 64 x 512 x 2 bytes, 16 KB a block"


def test_interference_tables_come_out_of_the_model() -> None:
    response = model_of(tg.devices.get("a100_sxm")).calibration.response
    assert response == RESPONSE
    assert interference.fit_response("hbm") == (response.hbm_reach, response.hbm_sharp)
    assert interference.fit_response("link") == (response.link_reach, response.link_sharp)
    errors = interference.table_errors()
    assert len(errors) == 4
    assert max(e.mean for e in errors) < 0.12
    assert max(e.largest for e in errors) < 0.25, "the two published tables differ by 0.2 themselves"


@pytest.mark.parametrize("name", GPUS)
def test_every_output_says_where_it_comes_from(name: str) -> None:
    graph = step()
    device = tg.devices.get(name)
    table = op_table(graph, device, (device.sm_count,))
    source = dict(zip((op.kind for op in graph.ops), table.sources, strict=True))
    own = device.calibration == name
    assert source["gemm"] == f"{'calibrated' if own else 'transferred from'} {device.calibration} v1"
    assert source["add"] == "formula, not calibrated"
    assert ((table.band > 0) & (table.band < 1)).all()


def test_a_borrower_has_a_wider_band() -> None:
    own, borrowed = (model_of(tg.devices.get(n)).family("gemm").band for n in ("h100_sxm", "b200_sxm"))
    assert borrowed == pytest.approx(own * TRANSFER_BAND)
    assert model_of(tg.devices.make("h100_sxm", hbm_bytes_per_s=4e12)).family("gemm").source.startswith("transferred")


def test_a_device_without_coefficients_is_a_roofline() -> None:
    plain = replace(H100, calibration="")
    assert set(op_table(step(), plain, (132,)).sources) == {"roofline"}


def test_faster_parts_are_never_slower() -> None:
    graph = step()
    base = op_table(graph, H100, (132,)).seconds
    for change in ({"hbm_bytes_per_s": 6.7e12}, {"h2d_bytes_per_s": 128e9}):
        assert (op_table(graph, tg.devices.make("h100_sxm", **change), (132,)).seconds <= base * (1 + 1e-9)).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(0.001, 1.0), st.floats(1.0, 12.0), st.floats(0.6, 6.0))
def test_drawn_share_is_a_share(part: float, reach: float, sharp: float) -> None:
    share = formulas.drawn_share(part, 1.0, reach, sharp)
    assert part * (1 - 1e-9) <= share <= 1 + 1e-9
    assert formulas.drawn_share(1.0, 1.0, reach, sharp) == pytest.approx(1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 130))
def test_causal_pairs_counts_pairs(new: int, before: int, window: int) -> None:
    context = new + before
    counted = sum(min(before + i + 1, window or context) for i in range(new))
    assert causal_pairs(float(new), float(context), float(window)) == counted


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather"])
def test_a_collective_alone_takes_its_measured_time(kind: str) -> None:
    """Its library runs it on few SMs, and so it was measured: that a partition has more is no reason to be slower. In a
    smaller partition, or on fewer channels than the library's, it is slower."""
    device = tg.devices.get("a100_sxm")
    model = model_of(device)

    def one(demand: tg.Demand | None) -> Graph:
        b = tg.GraphBuilder("one")
        x = b.input("x", (2048, 8192), "bf16")
        b.output(getattr(tg.ops, kind)(x, ranks=8, axis=1, demand=demand))
        return b.build()

    graph = one(None)
    shape = np.array([[COLLECTIVES.index(kind), 8.0, 8192 * 2048 * 2.0 * (8 if kind == "all_gather" else 1)]])
    measured = model.family("nccl").seconds(shape, model.spec("f32"), np.array([108.0]))[0, 0]
    alone = predict(graph.ops[0], graph, device)
    assert alone.seconds == pytest.approx(measured)
    assert alone.sm_use <= 32
    assert predict(graph.ops[0], graph, device, 32).seconds > alone.seconds
    few = one(tg.demand(sm=(2, 8)))
    assert predict(few.ops[0], few, device).seconds == predict(graph.ops[0], graph, device, 8).seconds


def test_a_slice_costs_what_a_graph_of_its_own_size_costs() -> None:
    """Half of a batch by `rows` is the kernel of half the batch, whole tensors or not."""
    sizes = (54, 108)

    def step(batch: int, rows: int | None) -> Graph:
        b = tg.GraphBuilder(f"step{batch}")
        q, places = b.input("q", (batch, 8, 64), "bf16"), b.input("places", (batch,), "i64")
        keys, values = (b.state(n, (batch, 2, 512, 64), "bf16") for n in ("keys", "values"))
        x, w = b.input("x", (batch, 1024), "bf16"), b.weight("w", (1024, 2048), "bf16")
        if rows is not None:
            q, places, keys, values, x = (t.rows(0, rows) for t in (q, places, keys, values, x))
        b.output(tg.ops.attention(q, places, keys, values, name="attend"), tg.ops.gemm(x, w, name="project"))
        return b.build()

    device = tg.devices.get("a100_sxm")
    part, own = (op_table(g, device, sizes) for g in (step(256, 128), step(128, None)))
    assert part.seconds == pytest.approx(own.seconds)
    assert part.sm_use == pytest.approx(own.sm_use)


def test_batched_products_run_at_the_rate_of_tensor_cores() -> None:
    """By the published rate of their dtype, not at that of plain arithmetic."""
    b = tg.GraphBuilder("batched")
    x, y = (b.input(name, (64, 512, 512), "bf16") for name in "xy")
    b.output(tg.ops.matmul(x, y, name="product"))
    graph = b.build()
    seconds = tg.plan(graph, "h100_sxm", "sequential").timeline.spans[0].end_s
    published = 2.0 * 64 * 512**3 / H100.rate("bf16")
    assert published < seconds < 4 * published


def fill(*tensors: object) -> None:
    """A custom op that only has a name."""


def one_call(demand: tg.Demand, flops: float = 1e12, hbm_bytes: float = 1e3, dtype: str = "f32") -> Graph:
    b = tg.GraphBuilder("one")
    x = b.input("x", (8,), dtype)
    work = tg.Work(flops=flops, hbm_bytes=hbm_bytes)
    b.output(b.call(fill, [x], [tg.spec("y", (8,), dtype)], work=work, demand=demand, name="fill"))
    return b.build()


@given(
    devices(), st.floats(1e-3, 1.0), st.floats(1e3, 1e15), st.floats(1e3, 1e12), st.sampled_from(["f32", "bf16", "f64"])
)
def test_a_declared_efficiency_is_the_rate_of_the_flops_and_shortens_nothing(
    device: Device, share: float, flops: float, hbm_bytes: float, dtype: str
) -> None:
    sizes = list(device.partition_sizes())
    plain, slow = (
        op_table(one_call(demand, flops, hbm_bytes, dtype), device, sizes)
        for demand in (tg.Demand(), tg.Demand(efficiency=share))
    )
    rate = np.array([share * device.rate(dtype) * device.compute_share(s) for s in sizes])
    by_share = flops / rate if share < 1.0 else np.zeros(len(sizes))
    np.testing.assert_allclose(slow.seconds[0], np.maximum(plain.seconds[0], by_share), rtol=1e-12)
    assert (slow.rates <= plain.rates * (1 + 1e-12)).all() and (slow.sm_use == plain.sm_use).all()


def test_a_graph_with_an_efficiency_is_read_back_and_one_of_an_older_file_has_none() -> None:
    graph = one_call(tg.demand(sm=(1, 1), efficiency=0.25))
    text = graph.to_json()
    assert tg.Graph.from_json(text) == graph and '"efficiency": 0.25' in text
    assert tg.Graph.from_json(text.replace('"efficiency": 0.25, ', "")).ops[0].demand == tg.demand(sm=(1, 1))
