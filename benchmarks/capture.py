"""Capture on the virtual H100: random plans against their graphs, the rules of CUDA, and what capture and replay cost.

Outputs and node placement are facts; sim_vs_virtual compares simulated times with simulated times; seconds and
microseconds are measured on this machine's CPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

import taskgraph as tg
from benchmarks import machine, one_line, print_json, whole
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device, Geometry
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.rewrite import split_batch
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.gpu import virtual
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Layout
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import candidate, plan_from, replay_times
from taskgraph.schedule.problem import Budget, make_problem

DEVICE = "virtual:h100_sxm"
SIDE = 32
RANDOM_KINDS = (
    "add", "gemm", "residual", "rmsnorm", "copy", "cache", "attend", "slice", "argmax", "decode", "swiglu", "concat",
    "gather",
)  # fmt: skip
TOLERANCE = {"f32": 1e-4, "bf16": 5e-2}
EPILOG = """\
A plan counts as correct when its graph was captured and read back equal (every node in its planned partition, the
plan's order is the graph's reachability, no node more or less) and its outputs equal the cpu backend's.

example:
  python -m benchmarks.capture --plans 200 --seed 0 --json
"""


# ------------------------------------------------------------------------------------------- random cases


def random_graph(rng: np.random.Generator) -> Graph:
    """Some 4 to 24 ops of kinds that have kernels, with a state that is read and written, and control edges."""
    dtype = str(rng.choice(["f32", "bf16"]))
    b = GraphBuilder("random")
    pool = [b.input("x0", (SIDE, SIDE), dtype), b.input("x1", (SIDE, SIDE), dtype)]
    weight, norm = b.weight("w", (SIDE, SIDE), dtype), b.weight("norm", (SIDE,), dtype)
    at = b.input("at", (2,), "i64")
    kv = [b.state(name, (2, 2, 64, 16), dtype) for name in ("keys", "values")]
    old = (b.input("query", (SIDE, 4, 16), dtype), b.input("places", (SIDE,), "i64"))
    cache = b.state("cache", (2, SIDE, 24, 2, 16), dtype)
    made: list[Value] = []
    for i in range(int(rng.integers(4, 25))):
        name = f"op{i}"
        value = _random_op(rng, pool, weight, norm, at, kv, name, b)
        if value is None:
            value = tg.ops.decode_attention(tg.ops.rope(*old, name=f"{name}.rope"), cache, name=name)
        made.append(value)
        if value.shape == (SIDE, SIDE):
            pool.append(value)
    outputs = {made[-1].name: made[-1]} | {made[j].name: made[j] for j in rng.integers(0, len(made), 2)}
    b.output(*outputs.values())
    graph = b.build()
    cut = int(rng.integers(1, SIDE))
    return split_batch(graph, (cut, SIDE - cut)) if rng.integers(3) == 0 else graph


def _random_op(
    rng: np.random.Generator, pool: list[Value], weight: Value, norm: Value, at: Value, kv: list[Value], name: str,
    b: GraphBuilder,
) -> Value | None:  # fmt: skip
    """A random op on random values; None stands for attention over the read-only cache."""
    x, y = (pool[j] for j in rng.integers(0, len(pool), 2))
    kind = rng.choice([*RANDOM_KINDS])
    if kind == "decode":
        return None
    if kind == "swiglu":
        return tg.ops.swiglu(tg.ops.gemm(x, b.weight(f"{name}.w", (SIDE, 2 * SIDE), x.dtype), name=f"{name}.up"))
    if kind == "concat":
        return tg.ops.slice_rows(tg.ops.concat_rows([x, y]), 1, 2 * SIDE, 2, name=name)
    if kind == "gather":
        return tg.ops.all_gather(x, ranks=1, name=name)
    if kind == "add":
        return tg.ops.add(x, y, name=name)
    if kind == "gemm":
        return tg.ops.gemm(x, weight, transpose_w=bool(rng.integers(2)), name=name)
    if kind == "residual":
        return tg.ops.gemm(x, weight, residual=y, name=name)
    if kind == "copy":
        pinned = tg.demand(sm=(1, 4)) if rng.integers(2) else None
        return tg.ops.copy(x, direction=str(rng.choice(["d2d", "h2d", "d2h"])), name=name, demand=pinned)
    if kind == "cache":
        fused = tg.ops.gemm(x, b.weight(f"{name}.qkv", (SIDE, 4 * 2 * 16), x.dtype), name=f"{name}.qkv")
        return tg.ops.rope_kv(fused, at, *kv, spec=tg.ops.RopeSpec(4), name=name)
    if kind == "attend":
        fused = tg.ops.gemm(x, b.weight(f"{name}.qkv", (SIDE, 4 * 2 * 16), x.dtype), name=f"{name}.qkv")
        q = tg.ops.rope_kv(fused, at, *kv, spec=tg.ops.RopeSpec(4), name=f"{name}.rope")
        return tg.ops.attention(q, at, *kv, name=name)
    if kind == "slice":
        return tg.ops.slice_rows(x, 1, SIDE, 3, name=name)
    if kind == "argmax":
        return tg.ops.argmax(x, name=name)
    return tg.ops.rmsnorm(x, norm, name=name)


def random_plan(rng: np.random.Generator, graph: Graph, device: Device) -> Plan:
    """A legal plan: in three of four cases one without sense (random partitions, sometimes of two geometries, random
    lanes, SM counts and order), else what the search finds."""
    if rng.integers(4) == 0:
        return candidate(graph, device, "search", Budget(0.01, int(rng.integers(1000))))
    geometries = tuple(_random_geometry(rng, device) for _ in range(int(rng.integers(1, 3))))
    lanes = tuple(tuple(int(n) for n in rng.integers(1, 3, len(g.partitions))) for g in geometries)
    layout = Layout(geometries, lanes)
    flat = graph.flat()
    problem = make_problem(graph, device, sorted({device.sm_min, *(size for g in geometries for size in g.sizes)}))
    lane = rng.integers(0, len(layout.lane_partition), problem.n)
    whole = np.searchsorted(problem.sizes, layout.table[layout.lane_partition[lane], 2])
    alone = layout.table[layout.lane_partition[lane], 3] == 1
    mode = np.where(alone | (rng.random(problem.n) < 0.5), whole, rng.integers(0, whole + 1))
    return plan_from(problem, Assignment(layout, _random_order(rng, flat), lane, mode, NO_HOLDS, made_by="random"))


def _random_geometry(rng: np.random.Generator, device: Device) -> Geometry:
    left, sizes = device.sm_count, list[int]()
    for _ in range(int(rng.integers(1, 5))):
        steps = left // device.sm_granularity
        if steps:
            sizes.append(device.sm_granularity * int(rng.integers(1, steps + 1)))
            left -= sizes[-1]
    return Geometry.of(*sizes) if rng.integers(4) else Geometry.of(device.sm_count)


def _random_order(rng: np.random.Generator, graph: Graph) -> np.ndarray:
    """A random topological order."""
    left = [set(preds) for preds in graph.predecessors()]
    ready, order = [i for i, preds in enumerate(left) if not preds], list[int]()
    while ready:
        op = ready.pop(int(rng.integers(len(ready))))
        order.append(op)
        for other, preds in enumerate(left):
            if op in preds:
                preds.discard(op)
                if not preds:
                    ready.append(other)
    return np.array(order)


def random_tensors(rng: np.random.Generator, graph: Graph) -> dict[str, torch.Tensor]:
    """Values for all that the graph does not make."""
    return {
        t.name: torch.from_numpy(rng.integers(0, 16, t.shape))
        if t.dtype == "i64"
        else torch.from_numpy(rng.standard_normal(t.shape, np.float32) / 4).to(TORCH_DTYPE[t.dtype])
        for t in graph.with_role("input", "weight", "state")
    }


# ------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True, slots=True)
class PlanResult:
    """One random plan: what was wrong ("": nothing), and how far its times are from the sim backend's."""

    wrong: str
    time_error: float


HOST = specs.make("h100_sxm", name="reference", kind="cpu", sm_count=1, sm_granularity=1, sm_min=1)


def check_plan(seed: int) -> PlanResult:
    """Make a random case from `seed`, capture it, compare placement, order, outputs, states and times."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    plan = random_plan(rng, graph, virtual.spec_of(DEVICE))
    tg.verify(plan, graph)
    given = random_tensors(rng, graph)
    expected = {name: t.clone() for name, t in given.items()}
    with tg.compile(graph, tg.plan(graph, HOST, "sequential"), "cpu") as reference:
        wanted = reference(expected)
    try:
        with tg.compile(graph, plan, "cuda", device=DEVICE) as exe:
            assert isinstance(exe, CudaExecutable)
            got = exe(given)
            got |= {name: exe.state(name).cpu() for name in ("keys", "values") if name in graph.tensor}
            timeline = exe.timeline()
    except tg.TaskgraphError as error:
        return PlanResult(f"seed {seed}: {error}", 0.0)
    wanted |= {name: expected[name] for name in ("keys", "values")}
    for name, value in wanted.items():
        if name in got and not _close(got[name], value, graph.tensor[name].dtype):
            return PlanResult(f"seed {seed}: output {name!r} differs", 0.0)
    return PlanResult("", _time_error(timeline, replay_times(graph, plan)))


def _close(got: torch.Tensor, wanted: torch.Tensor, dtype: str) -> bool:
    if dtype == "i64":  # indices of largest entries: equal but for ties of rounded values
        return bool((got == wanted).float().mean() > 0.9)
    scale = max(float(wanted.float().abs().max()), 1.0)
    return bool((got.float() - wanted.float()).abs().max() <= TOLERANCE[dtype] * scale)


def _time_error(found: tg.Timeline, wanted: tg.Timeline) -> float:
    """The largest difference of a begin or an end, over the makespan."""
    pairs = zip(found.spans, wanted.spans, strict=True)
    zero = min(span.start_s for span in wanted.spans)
    differences = [max(abs(a.start_s - b.start_s + zero), abs(a.end_s - b.end_s + zero)) for a, b in pairs]
    return max(differences) / wanted.makespan_s


def deep_graph(nodes: int) -> Graph:
    """`nodes` small adds in a lattice."""
    b = GraphBuilder(f"lattice-{nodes}")
    values = [b.input("x", (8, 8), "f32"), b.input("y", (8, 8), "f32")]
    for i in range(nodes):
        values.append(tg.ops.add(values[-1], values[-2], name=f"n{i}"))
    b.output(values[-1])
    return b.build()


def capture_seconds(nodes: int = 2000, rounds: int = 3) -> float:
    """Median seconds to capture, compare and instantiate a graph of `nodes` kernels; the kernel is compiled before."""
    graph = deep_graph(nodes)
    plan = tg.plan(graph, virtual.spec_of(DEVICE), "list")
    times = []
    for _ in range(rounds):
        with tg.compile(graph, plan, "cuda", device=DEVICE) as exe:
            assert isinstance(exe, CudaExecutable)
            begin = time.perf_counter()
            exe.capture()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def replay_microseconds(nodes: int = 9, rounds: int = 2000) -> float:
    """Median microseconds of the call that replays, without waiting: what Python and cuda.core cost the caller."""
    graph = deep_graph(nodes)
    with tg.compile(graph, tg.plan(graph, virtual.spec_of(DEVICE), "list"), "cuda", device=DEVICE) as exe:
        assert isinstance(exe, CudaExecutable)
        exe.launch()
        stream, times = exe.origin, []
        for _ in range(rounds):
            begin = time.perf_counter()
            exe.launch(stream)
            times.append(time.perf_counter() - begin)
            if len(times) % 50 == 0:
                stream.sync()
    return statistics.median(times) * 1e6


def measure(plans: int, seed: int) -> dict[str, Any]:
    """All figures of the command."""
    control = virtual.load(DEVICE)
    from benchmarks.capture_rules import check_rules

    results = [check_plan(seed + i) for i in range(plans)]
    rules = check_rules(control)
    return {
        "plans": plans,
        "correct": sum(not r.wrong for r in results),
        "wrong": [r.wrong for r in results if r.wrong][:10],
        "rules": len(rules),
        "rules_passed": sum(not text for text in rules.values()),
        "rules_failed": {name: text for name, text in rules.items() if text},
        "instantiate_2000_nodes_s": capture_seconds(),
        "replay_python_us": replay_microseconds(),
        "sim_vs_virtual_max_rel": max((r.time_error for r in results), default=0.0),
        "device": f"{DEVICE}, times simulated",
        "machine": machine(),
    }


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.capture", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=whole, default=200, help="random plans (default 200)")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the first plan; the others follow (default 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    if args.plans < 0:
        parser.error("--plans is at least 0.")
    result = measure(args.plans, args.seed)
    screen = Console(highlight=False)
    screen.print(f"plans captured equal: {result['correct']} of {result['plans']}")
    screen.print(f"rules enforced: {result['rules_passed']} of {result['rules']}")
    screen.print(f"virtual against sim, largest difference (simulated): {result['sim_vs_virtual_max_rel']:.2e}")
    screen.print(f"capture of 2,000 nodes: {result['instantiate_2000_nodes_s']:.3f} s (measured, {result['machine']})")
    screen.print(f"replay call: {result['replay_python_us']:.1f} us (measured)")
    for text in (*result["wrong"], *result["rules_failed"].items()):
        screen.print(f"failed: {text}")
    if args.json:
        print_json(result)
    return 0 if result["correct"] == result["plans"] and result["rules"] == result["rules_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
