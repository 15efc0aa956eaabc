"""NanoFlow's pipelines against our plans, in one evaluator: how much of the optimal throughput each one reaches."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import one_line, positive, print_json, whole
from taskgraph.cost.corunning import NONE
from taskgraph.cost.model import OpTable, op_table
from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.rewrite.nanobatch import apply
from taskgraph.schedule.planner import candidate
from taskgraph.schedule.problem import Budget

EPILOG = """\
One iteration of 2048 tokens, all layers: for the 70B two thirds of them decode at context 1024, as in the paper's table
2; for the 8B the 448 sequences of that length that one GPU has room for, and prefill. Op times alone: the cost model's
(simulated, a100_sxm). Times beside others: NanoFlow's table 3 (published), the share R of the SMs to performance P.
Norms, rope and other elementwise ops cost nothing, as in NanoFlow's cost model.

sequential      the captured graph, op after op
nanobatch_only  in NanoFlow's slices, op after op
nanoflow        NanoFlow's slices and its R of every op (published) as a hand-written plan: the best of two readings, R
                as a limit or products that take what the others leave, of its variants, and of the orders of list
                schedules
nanoflow_reordered  the same slices and R, in the order and on the lanes that our search finds best for them
taskgraph       what scheduler="search" finds: slices, SMs, order and lanes are its own
bound           no plan can be better: least SM-seconds over all SM counts and all slicings in multiples of 128 tokens

Every figure is a fraction of the optimal throughput (published for the 70B: 1857 tokens/s/GPU, which means 260 TFLOP/s
for 2 x parameters; the same rate gives the 8B's).
"""
TOKENS, CONTEXT = 2048, 1024
OPTIMAL_FLOPS_PER_S = 1857 * 2 * 70e9
"""Flop/s a GPU that the published optimal throughput of the 70B stands for."""
UNIT = 128

GEMV = ((0.0, 0.1, 0.2, 0.4, 0.8, 0.9, 1.0), (0.0, 0.2, 0.3, 0.8, 0.85, 0.95, 1.0))
NETWORK = ((0.0, 0.1, 0.2, 0.8, 0.9, 1.0), (0.0, 0.3, 0.5, 0.9, 1.0, 1.0))
"""R and P of table 3 (published, paper); below R = 0.1 in proportion, and the network's P of 0.9 is all there is."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A published pipeline: the slices of all ops, those of named ones, and the R of every op by slice."""

    slices: tuple[int, ...]
    finer: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, tuple[float, ...]]

    def split(self) -> Split:
        """What `apply` needs to make its graph."""
        return Split((((), self.slices), *(((f"layer/{op}",), sizes) for op, sizes in self.finer.items())))


@dataclass(frozen=True, slots=True)
class Case:
    """A model on its GPUs, its sequences that decode, (sequences, context) of its prefill, and NanoFlow's pipelines."""

    model: str
    ranks: int
    decode: int
    prefill: tuple[int, int]
    pipelines: tuple[Pipeline, ...]

    def graph(self) -> tg.Graph:
        """One rank's iteration."""
        sequences, context = self.prefill
        return mixed_step(
            load_config(self.model).share(self.ranks), Decode(self.decode, CONTEXT),
            Prefill(TOKENS - self.decode, context, sequences),
            collectives={"o": "gather"} if self.ranks > 1 else None,
        )  # fmt: skip

    def optimal_s(self) -> float:
        """Seconds of an iteration at the optimal throughput."""
        billions = {"llama-2-70b": 70e9, "llama-3-8b": 8e9}
        return TOKENS * 2 * billions[self.model] / OPTIMAL_FLOPS_PER_S / self.ranks


SEVENTY_DECODE = 1365


def _seventy(slices: tuple[int, int], kqv: tuple[int, ...], net: float) -> Pipeline:
    """R of the 70B pipeline (published): KQV 0.4 beside decode attention 0.4, PF 0.6, O 0.6 and 0.8, UGD 0.9."""
    edges = np.minimum(np.cumsum((0, *kqv)), SEVENTY_DECODE)
    decode = tuple(int(n) for n in np.diff(edges) if n > 0)
    shares = {
        "qkv_proj": (0.4,), "decode_attention": (0.4,), "prefill_attention": (0.6,), "o_proj": (0.6, 0.8),
        "gate_up_proj": (0.9,), "down_proj": (0.9,), "o_proj.gather": (net,), "o_reduce": (net,),
        "down_reduce": (net,),
    }  # fmt: skip
    return Pipeline(slices, {"norm1": kqv, "qkv_proj": kqv, "decode_rope": decode, "decode_attention": decode}, shares)


def _eight(first: int) -> Pipeline:
    """The 8B pipeline (published): two nano-batches, decode attention under up, gate and down."""
    shares = {"qkv_proj": (1.0,), "decode_attention": (0.4,), "prefill_attention": (0.6,), "o_proj": (0.6,)}
    return Pipeline((first, TOKENS - first), {}, {**shares, "gate_up_proj": (0.6,), "down_proj": (0.6,)})


CASES = {
    "llama2-70b": Case(
        "llama-2-70b",
        8,
        SEVENTY_DECODE,
        (1, 853),
        tuple(
            _seventy(slices, kqv, net)
            for slices, kqv in (((768, 1280), (384, 384, 640, 640)), ((640, 1408), (256, 384, 768, 640)))
            for net in (0.1, 0.2)
        ),
    ),
    "llama3-8b": Case("llama-3-8b", 1, 448, (2, 800), tuple(_eight(first) for first in (768, 1024))),
}


# ------------------------------------------------------------------------------------------- prices


def category(op: tg.Op) -> str:
    """What the op is bound by, in NanoFlow's words: gemm, gemv, network, or nothing."""
    if op.kind in ("all_reduce", "all_gather", "reduce_scatter"):
        return "network"
    if "decode_attention" in op.name:
        return "gemv"
    return "gemm" if op.kind in ("gemm", "attention") else ""


def performance(kind: str, share: np.ndarray) -> np.ndarray:
    """P at R: for GEMMs R itself, by definition."""
    table = {"gemv": GEMV, "network": NETWORK}.get(kind)
    return share if table is None else np.interp(share, *table)


def free_costs(graph: tg.Graph, device: tg.Device, sizes: Sequence[int]) -> OpTable:
    """Every op on any SM count: its time on the whole GPU over P."""
    share = np.array(sizes) / device.sm_count
    return _priced(graph, device, [share] * len(graph.ops), np.tile(np.array(sizes, float), (len(graph.ops), 1)))


def published_costs(
    pipeline: Pipeline, leading: bool, graph: tg.Graph, device: tg.Device, sizes: Sequence[int]
) -> OpTable:
    """Every op at its published R alone, whatever the SM count; `leading` products take what the others leave."""
    share = np.array([1.0 if leading and category(op) == "gemm" else _share(pipeline, op) for op in graph.ops])
    same = [np.full(len(sizes), each) for each in share]
    return _priced(graph, device, same, np.tile(share[:, None] * device.sm_count, (1, len(sizes))))


def _share(pipeline: Pipeline, op: tg.Op) -> float:
    stem, _, slice_number = op.name.rpartition("/")[2].partition("#")
    row = pipeline.shares.get(stem, (1.0,))
    return row[min(int(slice_number) if slice_number.isdigit() else 0, len(row) - 1)]


def _priced(graph: tg.Graph, device: tg.Device, share: Sequence[np.ndarray], use: np.ndarray) -> OpTable:
    alone = op_table(graph, device, [device.sm_count])
    seconds, rates = np.empty_like(use), np.zeros((*use.shape, 4))
    for i, op in enumerate(graph.ops):
        kind = category(op)
        seconds[i] = alone.seconds[i, 0] / performance(kind, share[i]) if kind else 1e-9
        rates[i] = alone.rates[i, 0] * (alone.seconds[i, 0] / seconds[i])[:, None] if kind else 0.0
        use[i] = use[i] if kind else 1e-3
    # R is the grid that a kernel is launched on, and table 3 all that kernels do to each other
    grid = np.ones_like(alone.own_grid)
    table = replace(alone, seconds=seconds, rates=rates, sm_use=use, sm_min=np.ones_like(alone.sm_min))
    return replace(table, own_grid=grid, energy=np.zeros_like(alone.energy), together=NONE)


# ------------------------------------------------------------------------------------------- plans and bound


def bound_s(graph: tg.Graph, device: tg.Device) -> float:
    """The least seconds of SMs, over all SM counts and slicings in multiples of UNIT tokens; or of the link."""
    layers = graph.repeat.count if graph.repeat else 1
    sizes = [size for size in device.partition_sizes() if size >= 2]
    priced: dict[str, dict[int, float]] = {}
    for cut in range(0, TOKENS // 2 + 1, UNIT):
        sliced = apply(graph, Split.of((cut, TOKENS - cut))) if cut else graph
        table = free_costs(sliced, device, sizes)
        area = (table.seconds * table.sm_use).min(axis=1)
        for op, least in zip(sliced.ops, area.tolist(), strict=True):
            if category(op):
                units = op_rows(op, sliced)
                by_units = priced.setdefault(op.name.partition("#")[0], {})
                by_units[units] = min(least, by_units.get(units, math.inf))
    inside = {op.name for op in graph.ops if op.name.startswith("layer/")}
    total = sum(least_area(by_units) * (layers if name in inside else 1) for name, by_units in priced.items())
    return total / device.sm_count


def op_rows(op: tg.Op, graph: tg.Graph) -> int:
    """Rows of what the op makes: how much of the batch it has."""
    return graph.tensor[op.outputs[0]].shape[0]


def least_area(by_units: Mapping[int, float]) -> float:
    """The cheapest way to make all rows from slices of the priced sizes."""
    whole = max(by_units)
    cheapest = {0: 0.0}
    for rows in range(1, whole + 1):
        ways = [cheapest[rows - u] + area for u, area in by_units.items() if rows - u in cheapest]
        if ways:
            cheapest[rows] = min(ways)
    return cheapest[whole]


def pipeline_s(case: Case, graph: tg.Graph, device: tg.Device, budget_s: float) -> tuple[float, float]:
    """Seconds of NanoFlow's pipeline: in the best order of a list schedule, and in the best that a search finds."""
    readings = []
    for pipeline in case.pipelines:
        sliced = apply(graph, pipeline.split())
        for leading in (False, True):
            costs = partial(published_costs, pipeline, leading)
            by_hand = tg.plan(sliced, device, "list", costs=costs)
            readings.append((by_hand.makespan_s, len(readings), sliced, costs))
    seconds, _, sliced, costs = min(readings)
    best = candidate(sliced, device, "search", Budget(budget_s, nano_batches=False), costs)
    return seconds, min(seconds, best.makespan_s)


def in_sequence_s(graph: tg.Graph, split: Split, device: tg.Device) -> float:
    return tg.plan(apply(graph, split), device, "sequential", costs=free_costs).makespan_s


def run(case: Case, budget_s: float, seed: int, say: Callable[[str], None]) -> dict[str, float]:
    """The figures of one case."""
    graph, device = case.graph(), tg.devices.get("a100_sxm")
    optimal = case.optimal_s()
    say("sequential")
    times = {
        "sequential": in_sequence_s(graph, UNSPLIT, device),
        "nanobatch_only": min(in_sequence_s(graph, each.split(), device) for each in case.pipelines),
    }
    say("NanoFlow's pipeline")
    times["nanoflow"], times["nanoflow_reordered"] = pipeline_s(case, graph, device, budget_s / 4)
    say(f"taskgraph, {budget_s:g} s")
    begin = time.perf_counter()
    plan = candidate(graph, device, "search", Budget(budget_s, seed), free_costs)
    search_seconds = time.perf_counter() - begin
    tg.verify(plan, graph)
    times["taskgraph"] = plan.makespan_s
    times["bound"] = bound_s(graph, device)
    say(plan.made_by)
    return {name: optimal / seconds for name, seconds in times.items()} | {"search_seconds": search_seconds}


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nanoflow",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=CASES, help="only this one")
    parser.add_argument("--seconds", type=positive, default=15.0, help="budget of our search (default 15)")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    found = {}
    for name, case in CASES.items():
        if options.model in (None, name):
            say = partial(console.print, f"[dim]{name}[/dim]")
            found[name] = run(case, options.seconds, options.seed, say)
    console.print(_table(found))
    if options.json:
        print_json(found)
    return 0


def _table(found: Mapping[str, Mapping[str, float]]) -> Table:
    shown = Table(title="fraction of the optimal throughput (simulated on a100_sxm; R and P published)")
    for column in ("", *found):
        shown.add_column(column, justify="right")
    for key in next(iter(found.values())):
        shown.add_row(key, *(f"{row[key]:.3f}" for row in found.values()))
    shown.add_row("taskgraph over nanoflow", *(f"{r['taskgraph'] / r['nanoflow']:.3f}x" for r in found.values()))
    shown.add_row("taskgraph of the bound", *(f"{r['taskgraph'] / r['bound']:.1%}" for r in found.values()))
    return shown


if __name__ == "__main__":
    sys.exit(main())
