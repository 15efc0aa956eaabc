"""Six steps in which overlap may pay: the best plan that is found for each, beside the sequential graph. Predicted, and
with --measure on a GPU also measured."""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import machine, one_line, positive, print_json, whole
from taskgraph.errors import BackendUnavailable, ConfigError
from taskgraph.models import llama, paged
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.schedule.problem import Budget
from taskgraph.tune.autotune import candidates
from taskgraph.units import format_seconds

if TYPE_CHECKING:
    import torch

EPILOG = """\
Every step has four layers of its model, so that planning is quick and their pipelines still show.

Of every step: seconds of the sequential graph and of the best packed plan that the search found, what the second gains
over the first, the relative error band of that gain, and what the planner chose. "sequential" is chosen where packing
does not gain, or not beyond the band. All these are simulated, on --device.

With --measure both plans are captured by the cuda backend, and replayed in turns; medians, measured on the GPU of this
machine, which is also what is planned for unless --device names another. --device virtual:h200_sxm captures small
versions of the steps on the virtual driver instead: then nothing is measured, and all is simulated. A step between
several ranks is not measured, for which one GPU is not enough.

examples:
  python -m benchmarks.overlap_corpus --json
  python -m benchmarks.overlap_corpus --only a,c --device h100_sxm --seconds 20
  python -m benchmarks.overlap_corpus --measure --only f
"""
DEVICE = "h200_sxm"
LAYERS, RANKS, PAGE = 4, 8, 16
_SEARCH_S = 4.0
_REPEATS, _SAMPLE_S = 9, 0.02
"""Turns of each plan in a measurement, and about how long each replays."""


class Size(NamedTuple):
    """How large the steps are: the model of a name, and by what tokens, keys, branches and pages are divided."""

    model: Callable[[str], ModelConfig]
    by: int

    def of(self, count: int) -> int:
        """So many, at this size."""
        return max(count // self.by, 2)


def _published(name: str) -> ModelConfig:
    return replace(load_config(name), layers=LAYERS)


def _tiny(name: str) -> ModelConfig:
    config = load_config(name)
    experts = config.experts and replace(config.experts, count=8, inner_size=32)
    return replace(
        config, layers=2, hidden_size=64, heads=8, kv_heads=8, head_dim=32, intermediate_size=64, vocab_size=128,
        experts=experts,
    )  # fmt: skip


FULL, SMALL = Size(_published, 1), Size(_tiny, 64)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the corpus: what it is, its graph, the inputs that say where its tokens stand, and its ranks."""

    title: str
    graph: Callable[[Size], tg.Graph]
    places: Callable[[tg.Graph, Size], Mapping[str, "torch.Tensor"]] = lambda graph, size: {}
    ranks: int = 1


# ------------------------------------------------------------------------------------------- the six steps


def moved_pages(size: Size) -> tg.Graph:
    """Decode and two chunks of prefill over pages that are full, so that pages leave for the host and come back."""
    context, decode = size.of(1024), size.of(256)
    pages = decode * context // PAGE + size.of(64)
    shape = paged.PageShape(pages, PAGE, context, host_pages=pages)
    return paged.step_graph(size.model("llama-3-8b"), paged.Bucket(decode, size.of(1024), 2, moves=True), shape)


def moved_places(graph: tg.Graph, size: Size) -> Mapping[str, "torch.Tensor"]:
    """Full contexts, and as many pages that move as the cost expects; a pair of pages below 0 moves nothing."""
    import torch

    from taskgraph.tune.gpucheck.plans import step_values

    given = dict(step_values(graph))
    for op in graph.ops:
        if op.kind == "copy_pages":
            pairs = torch.full(graph.tensor[op.inputs[2]].shape, -1, dtype=torch.int32)
            count = round(op.number("expected_pages"))
            pairs[:count] = torch.arange(count, dtype=torch.int32)[:, None]
            pairs[:count, 1] += 0 if op.attr("direction") != "d2d" else count
            given[op.inputs[2]] = pairs
    return given


def mixed(size: Size) -> tg.Graph:
    """Decode beside a chunk of prefill that stands behind 32k keys."""
    return mixed_step(size.model("llama-3-8b"), *_parts(size, 256, 4096, 32768))


def _parts(size: Size, decode: int, decode_keys: int, prefill_keys: int) -> tuple[Decode, Prefill]:
    return Decode(size.of(decode), size.of(decode_keys)), Prefill(size.of(1024), size.of(prefill_keys))


def mixed_places(graph: tg.Graph, size: Size) -> Mapping[str, "torch.Tensor"]:
    """Every sequence at the end of its keys."""
    return _at_ends(graph, *_parts(size, 256, 4096, 32768))


def _at_ends(graph: tg.Graph, decode: Decode, prefill: Prefill) -> Mapping[str, "torch.Tensor"]:
    import torch

    shape = {t.name: t.shape for t in graph.with_role("input")}
    first = {"decode_positions": decode.context - 1, "prefill_positions": prefill.context - prefill.tokens}
    return {name: torch.full(shape[name], place) for name, place in first.items()}


def streamed(size: Size) -> tg.Graph:
    """Prefill with the layers' weights on the host; each comes a few ops before it is needed."""
    prompt = size.of(1024)
    graph = llama.step_graph(size.model("llama-3-8b"), batch=size.of(8), tokens=prompt, cache=prompt)
    return tg.rewrite.offload(graph, _matrices(graph), distance=10)


def _matrices(graph: tg.Graph) -> list[str]:
    """The weights of the layers that are matrices."""
    repeat = graph.repeat
    body = graph.ops[repeat.first : repeat.last] if repeat else ()
    used = {name for op in body for name in op.inputs}
    return [t.name for t in graph.with_role("weight") if t.name in used and len(t.shape) == 2]


def started_places(graph: tg.Graph, size: Size) -> Mapping[str, "torch.Tensor"]:
    """Prompts from their begin."""
    import torch

    return {"positions": torch.zeros(graph.tensor["positions"].shape, dtype=torch.int64)}


def ranked(size: Size) -> tg.Graph:
    """One rank's share of a 70B step, with its collectives."""
    return mixed_step(size.model("llama-3-70b").share(RANKS), *_parts(size, 1024, 1024, 1024))


def experts(size: Size) -> tg.Graph:
    """Decode of a model with experts."""
    return llama.step_graph(size.model("qwen3-30b-a3b"), batch=size.of(256), tokens=1, cache=size.of(1024))


def expert_places(graph: tg.Graph, size: Size) -> Mapping[str, "torch.Tensor"]:
    """Every sequence at the end of its keys."""
    import torch

    return {"positions": torch.full(graph.tensor["positions"].shape, size.of(1024) - 1)}


def branches(size: Size) -> tg.Graph:
    """Chains of products, each too small to fill a device, that do not need each other."""
    b = tg.GraphBuilder("branches")
    width = size.of(512)
    for i in range(size.of(64)):
        x = b.input(f"x{i}", (64, width), "bf16")
        for j in range(4):
            x = tg.ops.gemm(x, b.weight(f"w{i}_{j}", (width, width), "bf16"), name=f"product{i}_{j}")
        b.output(x)
    return b.build()


STEPS: Mapping[str, Step] = {
    "a": Step("llama-3-8b, 256 decodes + 2 x 512 prefill, KV pages to the host and back", moved_pages, moved_places),
    "b": Step("llama-3-8b, 256 decodes at 4k + 1024 prefill at the end of 32k keys", mixed, mixed_places),
    "c": Step("llama-3-8b, prefill of 8 x 1024, weights streamed from the host", streamed, started_places),
    "d": Step("llama-3-70b on 8 GPUs, 1024 decodes + 1024 prefill, collectives", ranked, ranks=RANKS),
    "e": Step("qwen3-30b-a3b, 256 decodes", experts, expert_places),
    "f": Step("64 chains of 4 products of 64 x 512 x 512", branches),
}


# --------------------------------------------------------------------------------------- planning


def planned(graph: tg.Graph, device: tg.Device, budget: Budget) -> tg.Plan:
    """The plan that the search finds, checked; its verdict has the best packing's time also where it is sequential."""
    plan = tg.plan(graph, device, "search", budget_s=budget.seconds, seed=budget.seed)
    tg.verify(plan, graph)
    return plan


def chosen(plan: tg.Plan) -> str:
    """What was chosen: "packed: partitions 96+36, slices of 512 + 768", or "sequential"."""
    if plan.verdict.choice == "sequential":
        return "sequential"
    parts, number = [], Counter((lane.geometry, lane.partition) for lane in plan.lanes)
    for g, geometry in enumerate(plan.geometries):
        lanes = [number[g, p] for p in range(len(geometry.partitions))]
        sizes = "+".join(map(str, geometry.sizes))
        if len(geometry.partitions) > 1:
            parts.append(f"partitions {sizes}" + (f" of {'+'.join(map(str, lanes))} lanes" if max(lanes) > 1 else ""))
        else:
            parts.append(f"{lanes[0]} lanes that share {sizes} SMs" if lanes[0] > 1 else f"all of {sizes} SMs")
    slices = [f"slices of {' + '.join(map(str, sizes))}" for ops, sizes in plan.split.parts if not ops]
    return f"packed: {', '.join([' in turns with '.join(parts), *slices])}"


def row_of(plan: tg.Plan) -> dict[str, Any]:
    """The figures of a plan's verdict."""
    verdict = plan.verdict
    return {
        "sequential_s": verdict.sequential_s,
        "packed_s": verdict.packed_s,
        "gain": verdict.gain,
        "band": verdict.band,
        "choice": chosen(plan),
    }


# --------------------------------------------------------------------------------------- measuring


def measured(step: Step, size: Size, plan: tg.Plan, graph: tg.Graph, budget: Budget) -> dict[str, Any]:
    """Seconds of the sequential graph and of the packed plan, replayed in turns by the cuda backend, and their kind."""
    if step.ranks > 1:
        return {"measured": None, "why": f"between {step.ranks} ranks"}
    packed = plan if plan.verdict.choice == "packed" else _best_packing(graph, plan.device, budget)
    if packed is None:
        return {"measured": None, "why": "no packing was found"}
    sequential = tg.plan(graph, plan.device, "sequential")
    with ExitStack() as stack:
        _leave_out_what_is_wrong()
        values = _values(graph, step.places(graph, size))
        opened = [stack.enter_context(tg.compile(graph, each, backend="cuda")) for each in (sequential, packed)]
        for executable in opened:
            executable.bind(values)
        seconds = _in_turns(opened)
        kind = opened[0].timeline().kind
    one, other = map(statistics.median, seconds)
    return {"measured": {"kind": kind, "sequential_s": one, "packed_s": other, "gain": one / other}}


def _best_packing(graph: tg.Graph, device: tg.Device, budget: Budget) -> tg.Plan | None:
    """Of what autotune would run beside the sequential plan the one with the least predicted time."""
    made = candidates(graph, device, budget.seconds, budget.seed)[1:]
    return min(made, key=lambda plan: plan.makespan_s, default=None)


def _in_turns(opened: Sequence[Any]) -> list[list[float]]:
    """Seconds of a replay of each, in interleaved repeats, the order turned round each time."""
    once = max(opened[0].replay_seconds(1), 1e-6)
    real = opened[0].kind == "measured"
    launches = max(1, min(50, round(_SAMPLE_S / once))) if real else 1
    rows: list[list[float]] = [[] for _ in opened]
    for turn in range(_REPEATS if real else 1):
        for i in range(len(opened))[:: -1 if turn % 2 else 1]:
            rows[i].append(opened[i].replay_seconds(launches))
    return rows


def _leave_out_what_is_wrong() -> None:
    """Of the kernels that are compiled ahead, those that do not give right results on this GPU."""
    from taskgraph.runtime.gpu.driver import Gpu
    from taskgraph.runtime.gpu.spec import planning_device
    from taskgraph.tune.gpucheck import cases

    cases.verified(Gpu.open(), planning_device())


def _values(graph: tg.Graph, given: Mapping[str, "torch.Tensor"]) -> dict[str, Any]:
    """A value for every input, weight and state: drawn on the GPU where torch has it, but for what lies on the host."""
    import torch

    from taskgraph.tune.fill import fill

    flat = graph.flat()
    if not torch.cuda.is_available():
        return fill(flat, given, seed=0)
    from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

    host, made = {*_on_host(flat)}, dict[str, Any](given)
    for t in flat.with_role("input", "weight", "state"):
        kind = TORCH_DTYPE[t.dtype]
        if t.name in given:
            continue
        if t.name in host or not kind.is_floating_point:
            made[t.name] = torch.zeros(t.shape, dtype=kind)
        else:
            scale = t.shape[-1] ** -0.5 if t.role == "weight" and len(t.shape) > 1 else 1.0
            made[t.name] = torch.randn(t.shape, dtype=kind, device="cuda").mul_(scale)
    return made


def _on_host(flat: tg.Graph) -> Iterator[str]:
    """What copies bring from the host, or take there."""
    for op in flat.ops:
        if op.kind in ("copy", "copy_pages") and op.attr("direction") == "h2d":
            yield op.inputs[0]
        if op.kind == "copy_pages" and op.attr("direction") == "d2h":
            yield op.inputs[1]


# --------------------------------------------------------------------------------------- the command line


def only(text: str) -> list[str]:
    """An argument that names steps: "a,c"."""
    names = [name.strip() for name in text.split(",")]
    unknown = next((name for name in names if name not in STEPS), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"there is no step {unknown!r}; there are {', '.join(STEPS)}.")
    return names


def target(name: str | None, measure: bool) -> tuple[tg.Device, Size]:
    """What is planned for, and how large the steps are. BackendUnavailable where a measurement finds no GPU."""
    if not measure:
        return tg.devices.get(name or DEVICE), FULL
    from taskgraph.runtime.gpu import virtual
    from taskgraph.runtime.gpu.driver import Gpu
    from taskgraph.runtime.gpu.spec import planning_device

    simulated = virtual.is_virtual(name)
    try:
        gpu = Gpu.open(name if simulated else None)
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"--measure needs a GPU: {error} Leave --measure out for predictions, or give --device virtual:{DEVICE}, "
            "which captures on the virtual driver."
        ) from error
    device = tg.devices.get(name) if name and not simulated else planning_device(name)
    if device.sm_count > gpu.capability.sm_count:
        raise ConfigError(
            f"--device {name} has {device.sm_count} SMs; the GPU of this machine, {gpu.capability.device}, has "
            f"{gpu.capability.sm_count}. Leave --device out to plan for this one."
        )
    return device, SMALL if gpu.capability.virtual else FULL


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.overlap_corpus", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", help=f"what is planned for (default {DEVICE}; with --measure this machine's GPU)")
    parser.add_argument("--only", type=only, default=[*STEPS], metavar="A,B", help="these steps (default: all six)")
    parser.add_argument(
        "--seconds", type=positive, default=_SEARCH_S, help=f"search of every step (default {_SEARCH_S:g})"
    )
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--measure", action="store_true", help="also capture both plans and replay them on a GPU")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    options = parser.parse_args(argv)
    device, size = target(options.device, options.measure)
    budget = Budget(options.seconds, options.seed)
    rows: dict[str, dict[str, Any]] = {}
    begin = time.perf_counter()
    for name in options.only:
        step = STEPS[name]
        print(f"[{time.perf_counter() - begin:5.1f} s] {name}: {step.title}", file=sys.stderr, flush=True)
        graph = step.graph(size)
        plan = planned(graph, device, budget)
        rows[name] = row_of(plan)
        if options.measure:
            rows[name] |= measured(step, size, plan, graph, budget)
    Console(width=max(Console().width, 150)).print(_table(rows, device, options.measure, size))
    if options.json:
        extra = {"machine": machine(), "device": device.name, "seconds": time.perf_counter() - begin}
        print_json({"steps": rows, **extra})
    return 0


def _table(rows: Mapping[str, Mapping[str, Any]], device: tg.Device, measure: bool, size: Size) -> Table:
    small = "small versions, " if size is SMALL else ""
    shown = Table(title=f"the best plan found, beside the sequential graph ({small}simulated on {device.name})")
    for column in ("", "step", "sequential", "packed", "gain", "band", "choice", *(("replayed",) if measure else ())):
        shown.add_column(column, justify="left" if column in ("", "step", "choice") else "right")
    for name, row in rows.items():
        cells = [name, STEPS[name].title, format_seconds(row["sequential_s"]), format_seconds(row["packed_s"])]
        cells += [f"{row['gain']:.2f}x", f"±{row['band']:.1%}", row["choice"]]
        shown.add_row(*cells, *([_replayed(row)] if measure else []))
    return shown


def _replayed(row: Mapping[str, Any]) -> str:
    found = row["measured"]
    if found is None:
        return str(row["why"])
    times = f"{format_seconds(found['packed_s'])} for {format_seconds(found['sequential_s'])}"
    return f"{found['gain']:.2f}x, {times} ({found['kind']})"


if __name__ == "__main__":
    sys.exit(main())
