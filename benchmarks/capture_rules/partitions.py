"""SM resources, their splits, and green contexts."""

from typing import Any

from cuda.bindings import driver as cu

from benchmarks.capture_rules.world import ALIGNMENT, GREEN, GUIDE, QUEUE, SM, World, elsewhere, rule


@rule(ALIGNMENT)
def split_by_count_rounds_up(w: World) -> None:
    groups, count, rest = w.ok("cuDevSmResourceSplitByCount", 6, w.whole(), 0, 11)
    assert ([g.sm.smCount for g in groups[:count]], rest.sm.smCount) == ([16] * 6, 36)


@rule(ALIGNMENT)
def split_by_count_without_coscheduling_rounds_to_two(w: World) -> None:
    groups, count, _ = w.ok("cuDevSmResourceSplitByCount", 6, w.whole(), 1, 11)
    assert [g.sm.smCount for g in groups[:count]] == [12] * 6


@rule(ALIGNMENT)
def split_by_count_may_give_fewer_groups(w: World) -> None:
    _, count, rest = w.ok("cuDevSmResourceSplitByCount", 2, w.whole(), 0, 72)
    assert (count, rest.sm.smCount) == (1, 60)


@rule("measured on an H200, driver 13.0")
def the_least_groups_are_fewer_than_their_quotient(w: World) -> None:
    groups, count, rest = w.ok("cuDevSmResourceSplitByCount", 16, w.whole(), 0, 8)
    assert ([g.sm.smCount for g in groups[:count]], rest.sm.smCount) == ([8] * 15, 12)


@rule("measured on an H200, driver 13.0")
def a_descriptor_over_several_groups_and_the_rest(w: World) -> None:
    groups, count, rest = w.ok("cuDevSmResourceSplitByCount", 16, w.whole(), 0, 8)
    for mine, sms in ((groups[:5], 40), (groups[5:8], 24), ([*groups[8:count], rest], 68)):
        green = w.ok("cuGreenCtxCreate", w.ok("cuDevResourceGenerateDesc", mine, len(mine)), 0, 1)
        assert w.ok("cuGreenCtxGetDevResource", green, SM).sm.smCount == sms


@rule(GREEN)
def split_by_count_of_more_than_there_is_fails(w: World) -> None:
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplitByCount", 1, w.whole(), 0, 133)


@rule(GREEN)
def minimum_and_alignment_are_read_at_run_time(w: World) -> None:
    whole = w.whole()
    assert (whole.sm.minSmPartitionSize, whole.sm.smCoscheduledAlignment) == (8, 8)


def _groups(*rows: tuple[int, int, int]) -> list[Any]:
    groups = []
    for count, coscheduled, flags in rows:
        group = cu.CU_DEV_SM_RESOURCE_GROUP_PARAMS()
        group.smCount, group.coscheduledSmCount, group.flags = count, coscheduled, flags
        groups.append(group)
    return groups


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_gives_what_was_asked_for(w: World) -> None:
    groups, rest = w.ok("cuDevSmResourceSplit", 2, w.whole(), 0, _groups((88, 0, 0), (40, 0, 0)))
    assert ([g.sm.smCount for g in groups], rest.sm.smCount) == ([88, 40], 4)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_does_not_round(w: World) -> None:
    args = (1, w.whole(), 0, _groups((12, 0, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_is_finer_with_smaller_coscheduling(w: World) -> None:
    groups, _ = w.ok("cuDevSmResourceSplit", 1, w.whole(), 0, _groups((12, 2, 0)))
    assert groups[0].sm.smCount == 12


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_refuses_odd_counts(w: World) -> None:
    args = (1, w.whole(), 0, _groups((13, 2, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def unequal_split_bounds_coscheduling(w: World) -> None:
    args = (1, w.whole(), 0, _groups((64, 64, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def backfill_permits_counts_off_the_grid(w: World) -> None:
    groups, _ = w.ok("cuDevSmResourceSplit", 1, w.whole(), 0, _groups((12, 8, 1)))
    assert groups[0].sm.smCount == 12


@rule("CUDA driver API, cuDevSmResourceSplit (13.1)")
def groups_are_filled_in_order(w: World) -> None:
    args = (2, w.whole(), 0, _groups((128, 0, 0), (8, 0, 0)))
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplit", *args)


@rule(GREEN)
def the_result_of_a_split_is_not_split_again(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, w.whole(), 0, 64)[0][0]
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevSmResourceSplitByCount", 2, part, 0, 16)


@rule(GREEN)
def the_resource_of_a_green_context_is_split_again(w: World) -> None:
    inside = w.ok("cuGreenCtxGetDevResource", w.green(64), SM)
    _, count, _ = w.ok("cuDevSmResourceSplitByCount", 2, inside, 0, 32)
    assert count == 2


@rule(GREEN)
def separate_splits_overlap(w: World) -> None:
    w.green(64)
    w.green(64)
    w.logged("share SMs")


@rule(GREEN)
def one_descriptor_takes_sms_of_one_split(w: World) -> None:
    parts = [w.ok("cuDevSmResourceSplitByCount", 1, w.whole(), 0, 16)[0][0] for _ in range(2)]
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevResourceGenerateDesc", parts, 2)


@rule("github.com/NVIDIA/TensorRT-LLM green_context.py; " + GREEN)
def a_workqueue_comes_from_the_device_as_the_sms_do(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, w.whole(), 0, 16)[0][0]
    context = w.ok("cuCtxGetCurrent")
    queue = w.ok("cuCtxGetDevResource", context, QUEUE)
    w.expect("ERROR_INVALID_RESOURCE_CONFIGURATION", "cuDevResourceGenerateDesc", [part, queue], 2)
    w.ok("cuDevResourceGenerateDesc", [part, w.ok("cuDeviceGetDevResource", 0, QUEUE)], 2)


@rule(GREEN)
def a_green_context_needs_its_flag(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, w.whole(), 0, 16)[0][0]
    desc = w.ok("cuDevResourceGenerateDesc", [part], 1)
    w.expect("ERROR_INVALID_VALUE", "cuGreenCtxCreate", desc, 0, 0)


@rule(GREEN)
def a_stream_of_a_green_context_is_nonblocking(w: World) -> None:
    w.expect("ERROR_INVALID_VALUE", "cuGreenCtxStreamCreate", w.green(), 0, 0)


@rule("CUDA driver API, cuCtxFromGreenCtx")
def a_green_context_is_current_to_one_thread(w: World) -> None:
    context = w.ok("cuCtxFromGreenCtx", w.green())
    w.ok("cuCtxPushCurrent", context)
    elsewhere(lambda: w.expect("ERROR_CONTEXT_ALREADY_IN_USE", "cuCtxPushCurrent", context))
    w.ok("cuCtxPopCurrent")


@rule(f"{GUIDE} 4.6.5, green contexts with graphs")
def a_node_runs_in_the_context_of_its_capture_stream(w: World) -> None:
    green = w.green(16)
    origin, inside, fork, join = w.stream(), w.green_stream(green), w.event(), w.event()
    w.begin(origin)
    w.launch(origin, count=0)
    w.ok("cuEventRecord", fork, origin)
    w.ok("cuStreamWaitEvent", inside, fork, 0)
    w.launch(inside, count=0)
    w.ok("cuEventRecord", join, inside)
    w.ok("cuStreamWaitEvent", origin, join, 0)
    first, second = w.nodes(w.end(origin))
    own = w.ok("cuCtxFromGreenCtx", green)
    contexts = [int(w.ok("cuGraphKernelNodeGetParams", node).ctx) for node in (first, second)]
    assert contexts == [int(w.ok("cuCtxGetCurrent")), int(own)]


@rule(GREEN)
def a_destroyed_green_context_has_no_streams(w: World) -> None:
    part = w.ok("cuDevSmResourceSplitByCount", 1, w.whole(), 0, 16)[0][0]
    green = w.ok("cuGreenCtxCreate", w.ok("cuDevResourceGenerateDesc", [part], 1), 0, 1)
    stream = w.green_stream(green)
    w.ok("cuGreenCtxDestroy", green)
    w.launch(stream, count=0, code="ERROR_CONTEXT_IS_DESTROYED")
