"""The sections of gpu-check that fill tables: products, kernels by SMs, pairs, whole plans, power."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from taskgraph.cost.gpu_report import GemmTime, KernelRate, KernelTime, PairTime, PlanTime
from taskgraph.tune.gpucheck import cases
from taskgraph.tune.gpucheck.cases import Case, CaseRunner, runner
from taskgraph.tune.gpucheck.rig import Loop, PartitionStream, Reading

if TYPE_CHECKING:
    from taskgraph.tune.gpucheck.run import Run

_ROWS = (1, 512, 1000, 2048, 4096)
_PRODUCTS = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 8192), (57344, 8192),
    (8192, 28672), (1536, 2048), (2048, 8192), (32000, 4096), (128256, 4096),
)  # fmt: skip
"""(n, k) of the products of Llama 3 8B and 70B, Qwen3 30B's projections and two vocabularies."""
_POWER_S = 0.25


def products(run: "Run") -> str:
    """Every product at every number of rows, the numbers of rows in turn so that an early end leaves all shapes."""
    shapes = [(m, n, k) for m in (_ROWS[3], _ROWS[0], _ROWS[1], _ROWS[4], _ROWS[2]) for n, k in _PRODUCTS]
    if run.gpu.capability.virtual:
        shapes = [(m, n, k) for m in (1, 64, 96, 128) for n, k in ((64, 96), (96, 64), (128, 64), (64, 128), (160, 96))]
    rows: list[GemmTime] = []
    with run.rig.lanes(run.gpu.capability.sm_count) as (lane,):
        for m, n, k in shapes:
            if run.clock.over:
                break
            case = cases.gemm_case(f"gemm_{m}x{n}x{k}", m, n, k)
            timed = run.tried(case.name, partial(_alone, run, case, lane))
            if timed is not None:
                rows.append(GemmTime(m, n, k, timed[0]))
    run.keep(replace(run.report, gemm=tuple(rows)))
    return f"{len(rows)} of {len(shapes)} shapes"


def _alone(run: "Run", case: Case, lane: PartitionStream) -> tuple[float, str, str]:
    """Seconds of one launch, what ran it, and its rate."""
    with runner(case, run.gpu, run.device, run.fast) as made, run.rig.loop(made, lane) as loop:
        seconds = run.rig.alone_s(loop)
        return seconds, made.choice, made.rate(seconds)


def layer_kernels(run: "Run") -> str:
    """Kernels of a layer on the whole device."""
    rows: list[KernelRate] = []
    every = cases.rate_cases(run.scale)
    with run.rig.lanes(run.gpu.capability.sm_count) as (lane,):
        for case in every:
            if run.clock.over:
                break
            timed = run.tried(case.name, partial(_alone, run, case, lane))
            if timed is not None:
                seconds, choice, rate = timed
                kernel, shape = case.name.rsplit("_", 1)
                rows.append(KernelRate(kernel, shape, choice, seconds, rate))
    run.keep(replace(run.report, kernels=tuple(rows)))
    return f"{len(rows)} of {len(every)} kernels"


# ------------------------------------------------------------------------------------- kernels by SMs


def curve_sizes(run: "Run") -> list[int]:
    """Numbers of SMs, the ends and the middle first: the whole device, then parts of it by its granularity."""
    total, step = run.gpu.capability.sm_count, max(run.device.sm_granularity, run.device.sm_min)
    shares: tuple[float, ...] = (0.5, 0.06, 0.25, 0.75, 0.91, 0.36, 0.61, 0.12, 0.18, 0.3, 0.42, 0.55, 0.85)
    if not run.gpu.capability.partitions:
        return [total]
    if run.gpu.capability.virtual:
        shares = shares[:3]
    parts = [max(step, round(share * total / step) * step) for share in shares]
    return list(dict.fromkeys([total, *(size for size in parts if size <= total - step)]))


def kernels_by_sms(run: "Run") -> str:
    """Every kernel alone on every number of SMs; size by size, so that an early end leaves coarser curves of all."""
    found: list[KernelTime] = []
    own = cases.own_cases(run.scale) if run.gpu.ahead("gemm") else []
    sizes, every = curve_sizes(run), [*cases.curve_cases(run.scale), *own]
    with ExitStack() as stack:
        runners = _opened(run, every, stack)
        for size in sizes:
            if not run.clock.over:
                found += run.tried(f"{size} SMs", partial(_on_size, run, list(runners.values()), size)) or []
            run.keep(replace(run.report, kernels_by_sms=tuple(sorted(found, key=lambda row: (row.kernel, row.sms)))))
    return f"{len(found)} of {len(sizes) * len(every)} points"


def _opened(run: "Run", every: Sequence[Case], stack: ExitStack) -> dict[int, CaseRunner]:
    """Runners by their place in `every`, without those that have no room."""
    found: dict[int, CaseRunner] = {}
    for i, case in enumerate(every):
        made = run.tried(case.name, lambda: stack.enter_context(runner(case, run.gpu, run.device, run.fast)))  # noqa: B023
        if made is not None:
            found[i] = made
    return found


def _on_size(run: "Run", runners: Sequence[CaseRunner], size: int) -> list[KernelTime]:
    found: list[KernelTime] = []
    with run.rig.lanes(size) as (lane,):
        for made in runners:
            if run.clock.over:
                break
            seconds = run.tried(f"{made.name} on {size} SMs", partial(_loop_s, run, made, lane))
            if seconds is not None:
                found.append(KernelTime(made.name, lane.sms, seconds))
    return found


def _loop_s(run: "Run", made: CaseRunner, lane: PartitionStream) -> float:
    with run.rig.loop(made, lane) as loop:
        return run.rig.alone_s(loop)


# ---------------------------------------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """Two kernels by their places in a list of cases."""

    a: int
    b: int


def _pairs(every: Sequence[Case]) -> list[Pair]:
    """Dense kernels and prefill beside everything else, kernels of different needs first."""
    firsts = [i for i, case in enumerate(every) if case.fills in ("dense", "blocks")]
    found = [Pair(a, b) for a in firsts for b in range(len(every)) if b != a]
    distinct = list({frozenset(pair): pair for pair in reversed(found)}.values())[::-1]
    return sorted(distinct, key=lambda pair: every[pair.a].fills == every[pair.b].fills)


def splits(run: "Run") -> list[tuple[int, int]]:
    """Sizes of two partitions: a group of SMs and what remains of the device, as far as it is a multiple."""
    total, step = run.gpu.capability.sm_count, max(run.device.sm_granularity, run.device.sm_min)
    if not run.gpu.capability.partitions:
        return []
    found: list[tuple[int, int]] = []
    for share in (0.5, 0.75, 0.25, 0.62, 0.37, 0.86, 0.12)[: 2 if run.gpu.capability.virtual else None]:
        small = max(step, round(share * total / step) * step)
        found.append((small, (total - small) // step * step))
    return [(a, b) for a, b in dict.fromkeys(found) if b >= step]


def _beside(run: "Run", mode: str, loops: tuple[Loop, Loop], alone: tuple[float, float]) -> PairTime:
    a, b = loops
    names, sms = (a.runner.name, b.runner.name), (a.lane.sms, b.lane.sms)
    return PairTime(*names, mode, *sms, *alone, run.rig.beside_s(a, b), run.rig.beside_s(b, a))


def _pairs_on(
    run: "Run", mode: str, lanes: tuple[PartitionStream, PartitionStream], every: Sequence[Case], chosen: Sequence[Pair]
) -> int:
    """Measure pairs on two lanes, as many as there is time for; how many."""
    count = 0
    with ExitStack() as stack:
        runners = _opened(run, every, stack)
        loops: dict[tuple[int, int], tuple[Loop, float]] = {}

        def on(which: int, side: int) -> tuple[Loop, float]:
            if (which, side) not in loops:
                loop = stack.enter_context(run.rig.loop(runners[which], lanes[side]))
                loops[which, side] = loop, run.rig.alone_s(loop)
            return loops[which, side]

        def measured(pair: Pair) -> PairTime:
            (a, a_s), (b, b_s) = on(pair.a, 0), on(pair.b, 1)
            return _beside(run, mode, (a, b), (a_s, b_s))

        for pair in chosen:
            if run.clock.over:
                break
            if pair.a in runners and pair.b in runners:
                row = run.tried(f"{every[pair.a].name} beside {every[pair.b].name}", partial(measured, pair))
                if row is not None:
                    run.report, count = replace(run.report, corun=(*run.report.corun, row)), count + 1
    run.keep(run.report)
    return count


def partition_pairs(run: "Run") -> str:
    """Pairs of kernels in two partitions, split by split."""
    every, sizes = cases.curve_cases(run.scale)[: None if not run.gpu.capability.virtual else 4], splits(run)
    chosen = _pairs(every)
    if not sizes:
        return "this driver has no partitions"

    def on_split(a: int, b: int) -> int:
        with run.rig.lanes(a, b) as (first, second):
            return _pairs_on(run, "partition", (first, second), every, chosen)

    count = 0
    for a, b in sizes:
        if not run.clock.over:
            count += run.tried(f"{a} + {b} SMs", partial(on_split, a, b)) or 0
    return f"{count} of {len(chosen) * len(sizes)} pairs, at {', '.join(f'{a} + {b}' for a, b in sizes)} SMs"


def shared_pairs(run: "Run") -> str:
    """Pairs of kernels, and kernels beside copies, on two streams of the whole device."""
    curves = cases.curve_cases(run.scale)[: None if not run.gpu.capability.virtual else 3]
    every = [*curves, *cases.copy_cases(run.scale)]
    total = run.gpu.capability.sm_count
    chosen = _pairs(every)
    with run.rig.lanes(total, total) as (first, second):
        count = _pairs_on(run, "shared", (first, second), every, chosen)
    return f"{count} of {len(chosen)} pairs"


# ---------------------------------------------------------------------------------------------- plans


def whole_plans(run: "Run") -> str:
    """Every candidate plan of every step, in interleaved repeats: predicted and measured, with its files."""
    rows: list[PlanTime] = []
    failed: list[str] = []
    for name in run.graphs:
        if run.clock.over:
            break
        made = run.tried(name, partial(run.planning.wait, name, run.clock.section_s)) or []
        rows.extend(run.planning.measure(run, name, made, failed))
        run.keep(replace(run.report, plans=tuple(rows)))
    run.lost.extend(failed)
    return f"{len(rows)} plans of {len(run.graphs)} steps"


# ---------------------------------------------------------------------------------------------- power


def power(run: "Run") -> str:
    """Watts and clocks: of kernels on every number of SMs that a pair has, and of pairs, dense ones first."""
    if run.rig.meter is None:
        return "no energy counter (NVML): watts and clocks stay empty"
    every = [*cases.curve_cases(run.scale), *cases.copy_cases(run.scale)]
    kinds = {case.name: case.fills for case in every}
    count = 0
    with ExitStack() as stack:
        runners = {made.name: made for made in _opened(run, every, stack).values()}
        for dense in (True, False):
            chosen = [i for i, row in enumerate(run.report.corun) if _both_dense(row, kinds) is dense]
            for sizes, group in groupby(chosen, key=lambda i: (run.report.corun[i].sms_a, run.report.corun[i].sms_b)):
                if not run.clock.over:
                    body = partial(_powers_on, run, sizes, list(group), runners)
                    count += run.tried(f"power on {sizes[0]} + {sizes[1]} SMs", body) or 0
    run.keep(run.report)
    return f"{count} of {len(run.report.corun)} pairs and the kernels in them"


def _both_dense(row: PairTime, kinds: dict[str, str]) -> bool:
    return kinds.get(row.a) == kinds.get(row.b) == "dense"


def _powers_on(run: "Run", sizes: tuple[int, int], places: Sequence[int], runners: dict[str, CaseRunner]) -> int:
    """Put watts and clocks into the rows of pairs at `places`, all on partitions of these sizes; how many."""
    count = 0
    with run.rig.lanes(*sizes) as lanes:
        for place in places:
            if run.clock.over:
                break
            row = run.report.corun[place]
            if row.a in runners and row.b in runners:
                pair = (runners[row.a], lanes[0]), (runners[row.b], lanes[1])
                read = run.tried(f"power of {row.a} beside {row.b}", partial(_pair_power, run, pair))
                if read is not None:
                    corun = list(run.report.corun)
                    corun[place] = replace(row, watts=read.watts, sm_mhz=read.sm_mhz)
                    run.report, count = replace(run.report, corun=tuple(corun)), count + 1
    run.keep(run.report)
    return count


def _pair_power(run: "Run", pair: Sequence[tuple[CaseRunner, PartitionStream]]) -> Reading:
    """The pair's watts and clock; those of its kernels alone go to their rows when those have none yet."""
    with ExitStack() as stack:
        loops = [stack.enter_context(run.rig.loop(made, lane)) for made, lane in pair]
        for loop in loops:
            _alone_power(run, loop)
        return run.rig.power(loops, _POWER_S)


def _alone_power(run: "Run", loop: Loop) -> None:
    name, sms = loop.runner.name, loop.lane.sms
    rows = list(run.report.kernels_by_sms)
    place = next((i for i, r in enumerate(rows) if (r.kernel, r.sms) == (name, sms)), None)
    if place is not None and rows[place].watts is not None:
        return
    read = run.rig.power([loop], _POWER_S)
    row = rows[place] if place is not None else KernelTime(name, sms, run.rig.alone_s(loop))
    made = replace(row, watts=read.watts, sm_mhz=read.sm_mhz)
    if place is None:
        rows.append(made)
    else:
        rows[place] = made
    run.report = replace(run.report, kernels_by_sms=tuple(rows))
