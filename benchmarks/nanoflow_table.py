"""One LLaMA-2-70B iteration on eight A100s: NanoFlow's published times against ours, which never saw them."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import one_line, print_json
from taskgraph.cost.model import predict
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step

EPILOG = """\
published   table 2 of NanoFlow (Zhu et al. 2025, arXiv 2408.12757v2), 80 layers, milliseconds
calibrated  simulated with the shipped a100_sxm coefficients: other libraries' kernels, NCCL among them
declared    simulated with the GEMM and prefill tiles and the collectives that NanoFlow's repository declares; decode
            attention as calibrated

The step gathers the attention's features, and o's result, in place of an all-reduce, as the repository does. Its work
is the table's: prompts of 512 tokens and answers of 1024, so a third of 2048 tokens is prefill, in two chunked prompts.
"""

PUBLISHED_MS: Mapping[str, float] = {
    "KQV": 16.08, "O": 16.01, "UG": 69.92, "D": 34.96, "DecAttn": 35.60, "PfAttn": 4.56, "Net": 47.92,
}  # fmt: skip
"""Real time of each row; 225.05 in all."""
OPS: Mapping[str, tuple[str, ...]] = {
    "KQV": ("qkv_proj",), "O": ("o_proj",), "UG": ("gate_up_proj",), "D": ("down_proj",),
    "DecAttn": ("decode_attention",), "PfAttn": ("prefill_attention",),
    "Net": ("o_proj.gather", "o_reduce", "down_reduce"),
}  # fmt: skip
"""The ops of a layer that each row holds. The table leaves out norms, rope and the rest."""

TILE = 128
"""Output rows and columns of a thread block in every GEMM of NanoFlow's pipeline without overlap (pipeline.h of
efeslab/Nanoflow: 128 x 128 x 32 without a split of k; gate and up together, 64 columns of each)."""
GEMM_FLOPS_PER_S = 280e12
"""CUTLASS's profiled peak on an A100 (published, section 3 of the paper)."""
PHASE_BYTES = (8 << 20, 16 << 20, 32 << 20)
PHASE_S = (59.39e-6, 93.25e-6, 162.49e-6)
"""Seconds of NanoFlow's reduce-scatter (MSCCL++) of a message on 32 thread blocks of eight A100s: published, the traces
in autosearch/trace/networkData of its repository. An all-gather moves as much, and has a trace on 8 blocks only."""
ROWS = 128
"""Rows of a thread block of its prefill attention, the tokens of a kv head times the heads that share it; no split of
the keys (gemv/include/attention of the repository: FlashInfer, split_qo_indptr with four warps of two fragments)."""
ALONE_ROWS, ALONE_S, ALONE_KEY_S = 64, 8.7e-6, 24.4e-9
"""A block of causal attention alone on an SM of an A100: its rows, seconds, and seconds a key. Measured (NVIDIA, the
table behind the shipped coefficients): one sequence, one head of 128, the line through 512 to 4096 tokens, off by at
most 2 %. That the blocks have 64 rows shows in the steps of the times, from 96 blocks to 128 on 108 SMs."""
PHASES: Mapping[str, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}

Costs = Callable[[tg.Op], float]


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of one row of the table in a whole iteration."""

    published_ms: float
    calibrated_ms: float
    declared_ms: float


def step() -> tg.Graph:
    """One rank's iteration with the table's work: 2048 tokens, a third of them prefill, at NanoFlow's collectives."""
    return mixed_step(
        load_config("llama-2-70b").share(8), Decode(1366, context=1024), Prefill(682, context=512, sequences=2),
        collectives={"o": "gather"},
    )  # fmt: skip


def rows() -> dict[str, Row]:
    """Every row of the table, and their total."""
    graph, device = step(), tg.devices.get("a100_sxm")
    layers = graph.repeat.count if graph.repeat else 1
    layer = {op.name.removeprefix("layer/"): op for op in graph.ops if op.name.startswith("layer/")}

    def calibrated(op: tg.Op) -> float:
        return predict(op, graph, device).seconds

    def declared(op: tg.Op) -> float:
        ins, out = [graph.tensor[n] for n in op.inputs], graph.tensor[op.outputs[0]]
        if op.kind == "gemm":
            return gemm_seconds(*ins[0].shape, out.shape[1], device)
        if op.kind in PHASES:
            return PHASES[op.kind] * phase_seconds(max(ins[0].nbytes, out.nbytes))
        if op.name == "layer/prefill_attention":
            (tokens, heads, _), (sequences, kv_heads) = ins[0].shape, ins[2].shape[:2]
            blocks = sequences * kv_heads * math.ceil(tokens // sequences * heads // kv_heads / ROWS)
            return attention_seconds(blocks, op.integer("context"), device)
        return calibrated(op)

    def of(names: Sequence[str], costs: Costs) -> float:
        return 1e3 * layers * sum(costs(layer[name]) for name in names)

    found = {name: Row(PUBLISHED_MS[name], of(names, calibrated), of(names, declared)) for name, names in OPS.items()}
    sums = (sum(getattr(row, field.name) for row in found.values()) for field in fields(Row))
    return {**found, "total": Row(*sums)}


def gemm_seconds(m: int, k: int, n: int, device: tg.Device) -> float:
    """Whole waves of tiles, one on each SM, at the profiled peak: an SM that has a second tile needs twice as long."""
    waves = math.ceil(math.ceil(m / TILE) * math.ceil(n / TILE) / device.sm_count)
    return device.launch_seconds + waves * 2.0 * TILE * TILE * k * device.sm_count / GEMM_FLOPS_PER_S


def attention_seconds(blocks: int, keys: int, device: tg.Device) -> float:
    """The block that sees the most keys, alone on its SM, at the arithmetic rate of the measured ones."""
    if blocks > device.sm_count:
        raise tg.ProfileError(f"{blocks} blocks share the {device.sm_count} SMs; a block was measured alone on one.")
    return ALONE_S + keys * ALONE_KEY_S * ROWS / ALONE_ROWS


def phase_seconds(nbytes: int) -> float:
    """A reduce-scatter or an all-gather of a message, between the published sizes."""
    if not PHASE_BYTES[0] <= nbytes <= PHASE_BYTES[-1]:
        raise tg.ProfileError(
            f"a message of {nbytes} bytes lies outside the published {PHASE_BYTES[0]} to {PHASE_BYTES[-1]}."
        )
    return float(np.interp(nbytes, PHASE_BYTES, PHASE_S))


def table(found: Mapping[str, Row]) -> Table:
    """The rows for the screen."""
    shown = Table(title="LLaMA-2-70B on 8 A100, ms an iteration (published; simulated)", title_justify="left")
    for column in ("row", "published", "calibrated", "error", "declared", "error"):
        shown.add_column(column)
    for name, row in found.items():
        cells = (f"{t:.2f}|{t / row.published_ms - 1:+.1%}" for t in (row.calibrated_ms, row.declared_ms))
        shown.add_row(name, f"{row.published_ms:.2f}", *"|".join(cells).split("|"))
    return shown


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nanoflow_table",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on the last line")
    options = parser.parse_args(argv)
    found = rows()
    Console(highlight=False).print(table(found))
    if options.json:
        print_json({name: asdict(row) for name, row in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
