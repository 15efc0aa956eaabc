"""Which way each op kind runs on this machine's CPU, and why: what `taskgraph doctor` shows."""

from collections.abc import Iterator
from dataclasses import dataclass

from taskgraph.runtime.cpu import tile
from taskgraph.runtime.cpu.kinds import CHANGING, COMPILED, FIXED, OWN, TILED, TORCH
from taskgraph.runtime.cpu.standard import CPU_KINDS
from taskgraph.runtime.cpu.ways import Ways

DTYPES = ("bf16", "f32", "f16")


def run_by(way: str) -> str:
    """The kinds that run so, for people."""
    return ", ".join(kind for kind, runs in CPU_KINDS.items() if runs.by == way)


@dataclass(frozen=True, slots=True)
class Told:
    """How op kinds of a dtype run, and why so: for people."""

    kinds: str
    dtype: str
    way: str
    why: str


def compiled_for() -> str:
    """What our kernels are compiled for, in words."""
    target = tile.TARGET
    has = f"{target.registers} registers of {target.lanes} float32" + (", bf16 dot products" if target.dot else "")
    return f"{tile.PROCESSOR}, {has}; product tile of {target.rows} rows"


def told(ways: Ways) -> Iterator[Told]:
    """Every op kind of the cpu backend."""
    for dtype in DTYPES:
        yield Told(run_by(FIXED), dtype, *_products(ways, dtype, fixed=True))
    for dtype in DTYPES:
        changing = f"products without a weight, {run_by(CHANGING)}"
        yield Told(changing, dtype, *_products(ways, dtype, fixed=False))
    dots = tile.DOT and ways.product("bf16", 1, fixed=True) == "dot"
    yield Told(run_by(TILED), "bf16", "dot" if dots else "tile", "as gemm of one row")
    yield Told(run_by(TILED), "f32", "tile", "over the same panels")
    yield Told(run_by(COMPILED), "any", "compiled", "our kernels, float32 arithmetic")
    yield Told(run_by(TORCH), "any", "torch", "they move data, or are few and small")
    if run_by(OWN):
        yield Told(run_by(OWN), "any", "own", "code of another package")


def _products(ways: Ways, dtype: str, *, fixed: bool) -> tuple[str, str]:
    """The choices by rows, and what was measured."""
    chosen = [c for c in ways.choices if (c.dtype, c.fixed) == (dtype, fixed)]
    way = ", ".join(c.way if c.rows == 1 else f"from {c.rows} rows {c.way}" for c in chosen) or "plain"
    mine = [r for r in ways.rates if (r.dtype, r.fixed) == (dtype, fixed)]
    if not mine:
        return way, "by what the processor has" if chosen else "torch's own dtype"
    said = []
    for rows in (min(r.rows for r in mine), max(r.rows for r in mine)):
        at = sorted((r for r in mine if r.rows == rows), key=lambda r: -r.flops_per_s)
        said.append(f"{rows} rows: " + ", ".join(f"{r.way} {r.flops_per_s / 1e9:,.0f}" for r in at))
    return way, f"measured, GFLOP/s of a core, {'; '.join(said)}"
