"""Two graphs beside each other in a split of a device: what they take by the one clock, and the plans that run so."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step

DEVICES = ("h200_sxm", "h100_sxm", "a100_sxm")
CONFIG = load_config("llama-3.2-1b")


def side(device: str, decode: int = 0, context: int = 1, prefill: int = 0) -> tg.Side:
    chunks = Prefill(prefill, max(prefill, 1), 1)
    return tg.Side.of(mixed_step(CONFIG, Decode(decode, context), chunks), device)


@settings(max_examples=15)
@given(
    st.sampled_from(DEVICES), st.integers(1, 300), st.integers(1, 4096), st.integers(1, 2048), st.floats(0, 1)
)  # fmt: skip
def test_a_neighbour_never_helps_and_takes_no_more_than_all(
    device: str, decode: int, context: int, prefill: int, where: float
) -> None:
    """Each is at least as slow as alone on its part, and there as on the whole; and their speeds, relative to alone on
    the whole device, add up to less than two."""
    every = tg.halves(device)
    sizes = every[round(where * (len(every) - 1))]
    sides = side(device, decode, context), side(device, prefill=prefill)
    seconds = tg.beside(*sides, sizes)
    for one, took, sms in zip(sides, seconds, sizes, strict=True):
        # Bandwidth that a neighbour takes lowers a product's power, and its clock then falls less: 0.2 % were seen.
        assert took >= one.alone_s(sms) * 0.99
        assert one.alone_s(sms) >= one.alone_s() * (1 - 1e-9)
    assert sum(one.alone_s() / took for one, took in zip(sides, seconds, strict=True)) < 2.0
    assert tg.beside(*reversed(sides), (sizes[1], sizes[0])) == pytest.approx((seconds[1], seconds[0]), rel=1e-6)


def test_two_that_fill_the_memory_share_it() -> None:
    """Streams of decode that alone reach the device's bandwidth on half of the SMs get half of it each, at most."""
    one = side("h200_sxm", 256, 8192)
    alone, both = one.alone_s(64), tg.beside(one, one, (64, 64))
    assert both[0] == pytest.approx(both[1], rel=1e-6)
    drawn = 2 * sum(op.work.hbm_bytes for op in one.problem.graph.flat().ops) / both[0]
    assert both[0] > alone
    assert drawn <= tg.devices.get("h200_sxm").hbm_bytes_per_s


def test_halves_are_legal_and_leave_nothing_that_fits() -> None:
    for name in DEVICES:
        device = tg.devices.get(name)
        sizes, every = device.partition_sizes(), tg.halves(device)
        assert every
        for first, second in every:
            assert {first, second} <= set(sizes)
            assert first + second <= device.sm_count < first + second + device.sm_granularity + device.sm_min
    assert tg.halves(tg.devices.make("h100_sxm", sm_count=8)) == ()


@pytest.mark.parametrize("at", [0, 1])
def test_a_plan_of_one_side_is_legal_and_stays_in_its_partition(at: int) -> None:
    graph = mixed_step(CONFIG, Decode(64, 512), Prefill())
    for sizes in tg.halves("h100_sxm")[3:9:2]:
        plan = tg.plan_beside(graph, "h100_sxm", sizes, at)
        tg.verify(plan, graph)
        assert {plan.partition(step.lane) for step in plan.steps} == {tg.Geometry.of(*sizes).partitions[at]}
        assert plan.makespan_s == pytest.approx(tg.Side.of(graph, "h100_sxm").alone_s(sizes[at]))
        assert f"{sizes[at]} SMs" in plan.made_by


def test_what_is_no_split_is_refused() -> None:
    one = side("h100_sxm", 4)
    for sizes in ((64, 72), (5, 64), (4, 64)):
        with pytest.raises(tg.PlanError, match="no split of h100_sxm"):
            tg.beside(one, one, sizes)
        with pytest.raises(tg.PlanError, match="no split of h100_sxm"):
            tg.plan_beside(one.problem.graph, "h100_sxm", sizes, 0)
    with pytest.raises(tg.PlanError, match="price them alike"):
        tg.beside(one, side("h200_sxm", 4), (64, 64))
    with pytest.raises(tg.PlanError, match="the side"):
        tg.plan_beside(one.problem.graph, "h100_sxm", (64, 64), 2)
