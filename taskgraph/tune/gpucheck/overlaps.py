"""Pairs of ops that use different parts of a device: whether autotune finds a gain in running them together."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import taskgraph.ops as ops
from taskgraph.cost.gpu_report import Overlap
from taskgraph.cost.profiles import ProfileDB
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.schedule.planner import plan
from taskgraph.tune.autotune import SAME, autotune
from taskgraph.tune.fill import fill
from taskgraph.tune.gpucheck.checks import Bench


def pairs(rows: int) -> Iterator[tuple[str, Graph]]:
    """Two independent ops that use different parts of a device."""
    for name in ("decode attention", "a copy from the host", "an elementwise op"):
        b = GraphBuilder(f"gemm-{name.rpartition(' ')[2]}")
        x, w = b.input("x", (rows, rows), "bf16"), b.weight("w", (rows, rows), "bf16")
        product = ops.gemm(x, w, name="product")
        if name == "decode attention":
            cache = b.state("kv", (2, rows // 16, rows, 2, 64), "bf16")
            other = ops.decode_attention(b.input("q", (rows // 16, 8, 64), "bf16"), cache, name="attention")
        elif name == "an elementwise op":
            large = b.input("y", (8 * rows, rows), "bf16")
            other = ops.add(large, large, name="twice")
        else:
            other = ops.copy(b.input("page", (rows, rows), "f32"), direction="h2d", name="page_in")
        b.output(product, other)
        yield f"gemm beside {name}", b.build()


@contextmanager
def _store(path: Path | None, keep: bool) -> Iterator[ProfileDB]:
    """The profile database for measured times; a throw-away one where nothing is measured."""
    if keep:
        yield ProfileDB(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield ProfileDB(Path(folder) / "profiles.sqlite")


def overlap(name: str, graph: Graph, bench: Bench, budget_s: float, database: Path | None = None) -> Overlap:
    """What autotune says in `budget_s` seconds. A pair that it had no time to compare says so, and its sequential and
    its best predicted plan are measured once each all the same."""
    with _store(database, not bench.gpu.capability.virtual) as store:
        device = bench.name or bench.device
        tuned = autotune(graph, "cuda", max(budget_s, 0.1), device=device, database=store, fresh=True)
    v = tuned.verdict
    if any(trial.measured_s is not None and trial.session != SAME for trial in tuned.trials):
        return Overlap(name, True, v.choice, v.packed_s, v.sequential_s, v.error_band, tuned.reason)
    sequential_s, packed_s = (_once(graph, bench, scheduler) for scheduler in ("sequential", "list"))
    reason = f"{budget_s:.1f} s were too little to compare plans; measured once each. {tuned.reason}"
    return Overlap(name, False, "sequential", packed_s, sequential_s, v.error_band, reason)


def _once(graph: Graph, bench: Bench, scheduler: str) -> float:
    """Seconds of one replay of the plan that `scheduler` makes."""
    with bench.open(graph, plan(graph, bench.device, scheduler)) as executable:
        executable(fill(graph.flat(), {}, seed=5))
        return executable.replay_seconds(1)
