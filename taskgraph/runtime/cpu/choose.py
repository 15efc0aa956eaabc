"""Which way products run on this machine: every way that is here is measured, once, in a process of its own.

`python -m taskgraph.runtime.cpu.choose` prints the Ways as JSON. They are kept beside the probe of the machine, under
the same identity, and like it only when the machine was quiet.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache as memo
from functools import partial
from pathlib import Path
from statistics import geometric_mean

from taskgraph import cache
from taskgraph.runtime.cpu import load
from taskgraph.runtime.cpu.ways import Choice, Rate, Ways

ROWS = (1, 8, 32, 128, 512)
"""Rows at which ways are compared."""

FEW = 64
"""Up to so many rows a weight that stays is multiplied by one way, whose sums run over k in order whatever rows stand
beside a row: a request's tokens do not depend on the batch. The most rows of a decode step are bound by memory."""

STEADY = ("dot", "tile")

_INNER, _OUTER = 1024, 1024
_COLD_BYTES = 48 << 20
_SECONDS = 0.02
_WORTH = 0.95
"""Another way than that of fewer rows has to take at most this share of its time: each layout of a weight is a copy."""

_CANDIDATES = {
    ("bf16", True): ("dot", "tile", "packed", "plain", "f32"),
    ("f32", True): ("tile", "plain"),
    ("f16", True): ("tile", "plain", "f32"),
    ("bf16", False): ("plain", "f32"),
    ("f16", False): ("plain", "f32"),
}


def kept_at() -> Path:
    """Where the ways of this machine are kept."""
    from taskgraph.runtime.cpu.probe import identity

    return cache.place("devices", f"ways-{identity()}.json")


@memo
def here() -> Ways:
    """The ways of this machine: as kept, else measured now by a process of its own; those by what the processor has
    while others use its cores, since nothing can be measured then."""
    from taskgraph.runtime.cpu import products

    found = _kept()
    if found is not None:
        return found
    if _busy():
        return products.by_capability()
    command = [sys.executable, "-m", "taskgraph.runtime.cpu.choose"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.home())
    try:
        return Ways.from_dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, TypeError, KeyError, IndexError):  # it could not run: nothing was measured
        return products.by_capability()


def _busy(seconds: float = 0.1) -> bool:
    """Whether others are using the cores now."""
    begin = load.now()
    time.sleep(seconds)
    return load.others_share(begin, load.now()) > load.QUIET


def _kept() -> Ways | None:
    try:
        return Ways.from_dict(json.loads(kept_at().read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def measured() -> Ways:
    """The ways as kept, or measured in this process and then kept; those by capability if others disturbed that."""
    from taskgraph.runtime.cpu import products

    found = _kept()
    if found is not None:
        return found
    if _busy():
        return products.by_capability()
    begin = load.now()
    made = measure()
    if load.others_share(begin, load.now()) > load.QUIET:
        return products.by_capability()
    path = kept_at()
    with cache.keeping("the ways to multiply", path):
        cache.write_atomically(path, json.dumps(made.to_dict()))
    return made


def measure(rows: Sequence[int] = ROWS, seconds: float = _SECONDS) -> Ways:
    """Compare all ways, on one core: what is faster there is so on many, and a busy neighbour disturbs it less."""
    import torch

    from taskgraph.runtime.cpu import products

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: list[Rate] = []
    for (dtype, fixed), ways in _CANDIDATES.items():
        for way in ways:
            if way in products.able():
                rates += _rates(dtype, fixed, way, rows, seconds)
    choices: list[Choice] = []
    for dtype, fixed in _CANDIDATES:
        choices += choose(dtype, fixed, [r for r in rates if (r.dtype, r.fixed) == (dtype, fixed)])
    torch.set_num_threads(threads)
    return Ways(tuple(choices), tuple(rates))


def choose(dtype: str, fixed: bool, rates: Sequence[Rate]) -> list[Choice]:
    """The fastest way for few rows, a steady one for a weight that stays, and for many: another one only where that is
    worth another copy of the weight."""
    few = [r for r in rates if r.rows <= FEW and (r.way in STEADY or not fixed)]
    first = _fastest(few)
    choices = [Choice(dtype, fixed, 1, first)]
    many = [r for r in rates if r.rows > FEW]
    if many:
        best = _fastest(many)
        if _mean(many, first) < _WORTH * _mean(many, best):
            choices.append(Choice(dtype, fixed, FEW + 1, best))
    return choices


def _fastest(rates: Sequence[Rate]) -> str:
    return max({r.way: None for r in rates}, key=lambda way: _mean(rates, way))


def _mean(rates: Sequence[Rate], way: str) -> float:
    """Flops a second of a way, each number of rows counted alike."""
    return geometric_mean(r.flops_per_s for r in rates if r.way == way)


def _rates(dtype: str, fixed: bool, way: str, rows: Sequence[int], seconds: float) -> list[Rate]:
    """Flops a second of one way. Few rows stream weights out of memory, as a model's do; for many it is the same."""
    import torch

    from taskgraph.runtime.cpu import products
    from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
    from taskgraph.runtime.cpu.probe import best_seconds

    kind = TORCH_DTYPE[dtype]
    size = _INNER * _OUTER * (4 if way == "f32" or dtype == "f32" else 2)
    weights = [torch.randn(_OUTER, _INNER).to(kind) for _ in range(max(_COLD_BYTES // size, 1))]
    forced, made = products.forced(way), []
    for m in rows:
        x, out = torch.randn(m, _INNER).to(kind), torch.empty(m, _OUTER, dtype=kind)
        cold = weights if m <= 32 else weights[:1]
        entries = [products.entry(way, products.Product(x, w, None, None, out, fixed, 1), forced) for w in cold]
        taken = best_seconds(partial(_all, entries), seconds) / len(entries)
        made.append(Rate(dtype, fixed, m, way, 2.0 * m * _INNER * _OUTER / taken))
    return made


def _all(entries: Sequence[Callable[[], object]]) -> None:
    for run in entries:
        run()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measured().to_dict()) + "\n")
