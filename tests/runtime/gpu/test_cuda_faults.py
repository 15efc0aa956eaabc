"""Faults on the virtual driver: each becomes a typed error, everything is freed, and the backend can start again."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.errors import BackendUnavailable, CudaError, PlanError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device, Geometry
from taskgraph.runtime.gpu import division, driver, virtual
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.schedule.evaluate import Layout
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan_from
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve.lists import pack
from tests.conftest import Call, virtual_process

X, W = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
WANTED = X @ W + 2 * X


def graph() -> tg.Graph:
    b = tg.GraphBuilder("two-branches")
    x, w = b.input("x", (32, 32), "f32"), b.weight("w", (32, 32), "f32")
    left, right = tg.ops.gemm(x, w, name="left"), tg.ops.add(x, x, name="right")
    b.output(tg.ops.add(left, right, name="sum"))
    return b.build()


def isolated(device: Device, *sizes: int) -> Plan:
    """A list schedule on partitions of `sizes`."""
    problem = make_problem(graph(), device, sorted({*sizes}))
    found = pack(problem, Layout.isolated(Geometry.of(*sizes)))
    assert found is not None
    return plan_from(problem, replace(found, made_by="test"))


def control() -> virtual.Control:
    found = virtual.loaded()
    assert found is not None
    return found


def held() -> dict[str, int]:
    """What is alive in the driver, kernels aside: they are loaded once and stay."""
    gc.collect()
    report = control().report()
    live = {kind: n for kind, n in report.live.items() if kind not in ("kernel", "library")}
    return {**live, "bytes": report.allocated_bytes, "allocations": report.allocations}


def opened(plan: Plan) -> CudaExecutable:
    exe = tg.compile(graph(), plan, "cuda", device=f"virtual:{plan.device.name}")
    assert isinstance(exe, CudaExecutable)
    return exe


def works(plan: Plan) -> str:
    """Run the plan, compare its result; the capability that its report says."""
    with opened(plan) as exe:
        torch.testing.assert_close(exe(x=X, w=W)["sum.out"], WANTED, rtol=1e-4, atol=1e-4)
        return exe.report.capability


# ---------------------------------------------------------------------------------- faults of one replay


def test_every_allocation_may_fail(on_virtual: Call) -> None:
    assert on_virtual(fail_each_allocation) >= 3


def fail_each_allocation() -> int:
    plan = isolated(specs.get("h100_sxm"), 64, 64)
    works(plan)
    before = held()
    for count in range(1, 100):
        control().set(fail_alloc=count)
        try:
            works(plan)
        except CudaError as error:
            assert error.code == "CUDA_ERROR_OUT_OF_MEMORY"
            assert "bytes: CUDA_ERROR_OUT_OF_MEMORY (" in str(error) and "injected" in str(error)
        else:
            control().set(fail_alloc=0)
            break
        assert held() == before
    works(plan)
    return count - 1


@pytest.mark.parametrize(
    ("fault", "code"), [("fail_launch", "CUDA_ERROR_LAUNCH_FAILED"), ("lose_device", "CUDA_ERROR_UNKNOWN")]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_replay_that_fails_is_typed_and_the_backend_starts_again(
    on_virtual: Call, fault: str, code: str, at: int
) -> None:
    on_virtual(fail_replay, fault, code, at)


def fail_replay(fault: str, code: str, at: int) -> None:
    driver.Gpu.reset()  # what tests before this one left goes now, not with the reset below
    plan = isolated(specs.get("h100_sxm"), 64, 64)
    works(plan)
    before = held()
    exe = opened(plan)
    exe(x=X, w=W)
    control().set(**{fault: at})
    with pytest.raises(CudaError, match="replay 'two-branches'") as caught:
        exe.launch()
    assert caught.value.code == code
    with pytest.raises(CudaError):
        exe(x=X)  # the error sticks until the device is reset
    exe.close()
    driver.Gpu.reset()
    assert held() == before
    works(plan)
    assert held() == before


def test_memory_that_is_not_there_is_said(on_virtual: Call) -> None:
    on_virtual(ask_for_too_much)


def ask_for_too_much() -> None:
    before = held()
    driver.Gpu.open()
    with pytest.raises(CudaError, match=r"allocate 200000000000 bytes.*of 80000000000 are free"):
        driver.Memory(200_000_000_000)
    assert held() == before


# ------------------------------------------------------------------------------------ other drivers, devices


@pytest.mark.parametrize(
    ("version", "rung", "made"),
    [
        (12000, "", ()),
        (12040, "plain streams, no workqueues", (132, 132)),
        (12050, "any partition, no workqueues", (124, 8)),
        (13000, "any partition, no workqueues", (124, 8)),
        (13010, "any partition, balanced workqueues", (120, 8)),
    ],
)
def test_the_capability_ladder(version: int, rung: str, made: tuple[int, ...]) -> None:
    """Each driver runs what it can and says what it is; a partition has at least the SMs that were planned, and before
    13.1 the rest of the split goes to one that would not fit without it."""
    with virtual_process(driver_version=version) as call:
        if not rung:
            with pytest.raises(BackendUnavailable, match=r"driver 12\.0 is older than 12\.3; update it"):
                call(works, isolated(specs.get("h100_sxm"), 64, 64))
            return
        assert f": {rung}" in call(works, isolated(specs.get("h100_sxm"), 64, 64))
        call(works, isolated(specs.get("h100_sxm"), 64, 48))
        assert call(partition_sizes, 120, 8) == made
        if version >= 12050:
            assert call(partition_sizes, 40, 24) == (40, 24)
        if 12050 <= version < 13010:
            with pytest.raises(PlanError, match=r"15 groups of 8 SMs and a rest of 12\. Plan partitions"):
                call(partition_sizes, *[4] * 33)


def partition_sizes(*sizes: int) -> tuple[int, ...]:
    """The SMs of the partitions that the driver makes; the contexts are disjoint, or the virtual driver warns."""
    made = driver.Gpu.open().partition(specs.Geometry.of(*sizes))
    for context in made.contexts:
        if context is not None:
            context.close()
    control = virtual.loaded()
    assert control is not None and not control.report().texts("warning")
    return made.sm_counts


@given(
    sizes=st.lists(st.integers(1, 16).map(lambda n: 8 * n), min_size=1, max_size=4),
    groups=st.integers(1, 18), rest=st.integers(0, 14),
)  # fmt: skip
def test_partitions_are_composed_of_the_groups_of_one_split(sizes: list[int], groups: int, rest: int) -> None:
    """Every partition gets at least its size of disjoint groups, the rest at most once; sizes that the groups hold are
    exact; none is found only if none exists."""
    made = division.composed(sizes, groups, 8, rest)
    if made is None:
        assert sum(sizes) > 8 * groups and all(
            sum(sizes) - size + 8 * -(-max(size - rest, 0) // 8) > 8 * groups for size in sizes
        )
        return
    given_sms = [8 * share.groups + rest * share.rest for share in made]
    assert all(given >= size for given, size in zip(given_sms, sizes, strict=True))
    assert sum(share.groups for share in made) <= groups and sum(share.rest for share in made) <= 1
    if sum(sizes) <= 8 * groups:
        assert given_sms == sizes


SLICE = specs.make("h100_sxm", name="h100_slice", sm_count=16, memory_bytes=10_000_000_000)


def test_a_small_device_as_mig_makes_it() -> None:
    with virtual_process(SLICE) as call:
        assert "16 SMs" in call(works, isolated(SLICE, 8, 8))
        with pytest.raises(PlanError, match=r"132 SMs.*has 16"):
            call(works, isolated(replace(specs.get("h100_sxm"), name="h100_slice"), 64, 64))
