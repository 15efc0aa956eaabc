"""What this machine's CPU can do, measured once in a process of its own and cached.

`python -m taskgraph.runtime.cpu.probe` prints the Device as JSON.
The cache is keyed by what identifies the machine, so a change of machine probes again. What was measured while others
used the cores serves this process alone: it is not kept, and says so among its sources.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from taskgraph import cache
from taskgraph.errors import DeviceError
from taskgraph.graph.device import Device
from taskgraph.runtime.cpu import load

_GEMM = (512, 1024, 1024)
_STREAM_BYTES = 256 << 20


_NAMED_BY = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
"""Lines of /proc/cpuinfo that tell processors apart: the first two on x86, the others on Arm."""


def identity() -> str:
    """A digest of the processor, the cores this process may use, the memory, the library versions, and the
    instructions that torch and numba use, which their settings may hold below the processor's."""
    import torch

    from taskgraph.runtime.cpu import tile

    parts = (
        _cpuinfo(), platform.machine(), len(os.sched_getaffinity(0)), _memory_bytes(), metadata.version("torch"),
        torch.backends.cpu.get_cpu_capability(), tile.PROCESSOR, tile.TARGET, 4,
    )  # fmt: skip
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _cpuinfo() -> dict[str, str]:
    """What the first core's lines of _NAMED_BY say; an Arm processor has no name, but numbers."""
    found: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in _NAMED_BY:
            found.setdefault(key, value)
    return found


def processor() -> str:
    """The processor's name, for people."""
    said = _cpuinfo()
    numbers = " ".join(f"{key.removeprefix('CPU ')} {said[key]}" for key in _NAMED_BY[3:] if key in said)
    return said.get("model name") or f"{platform.machine()} {numbers}".strip()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_path() -> Path:
    """Where the probe of this machine is kept."""
    return cache.place("devices", f"cpu-{identity()}.json")


def probe() -> Device:
    """Measure products, by the ways that they run, and read bandwidth for one core up to all, and the cost of an op's
    dispatch (about 5 s)."""
    import torch

    from taskgraph.runtime.cpu import choose, kernels, products
    from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

    ways = choose.measured()
    cores = len(os.sched_getaffinity(0))
    m, k, n = _GEMM
    rates: dict[str, list[float]] = {"f32": [], "bf16": []}
    reads: list[float] = []
    data = torch.ones(_STREAM_BYTES // 4)
    counts = sorted({1, *(1 << i for i in range(cores.bit_length()) if 1 << i <= cores), cores})
    for threads in counts:
        torch.set_num_threads(threads)
        for dtype in rates:
            x, w, out = (torch.randn(shape).to(TORCH_DTYPE[dtype]) for shape in ((m, k), (n, k), (m, n)))
            product = products.Product(x, w, None, None, out, fixed=True, threads=threads)
            rates[dtype].append(2.0 * m * k * n / best_seconds(products.entry("probe", product, ways)))
        reads.append(_STREAM_BYTES / best_seconds(data.sum))
    x, y = torch.ones(8), torch.ones(8)
    kernels.release_threads()
    dispatch = best_seconds(lambda: [torch.add(x, x, out=y) for _ in range(1000)]) / 1000
    return Device(
        name="cpu",
        kind="cpu",
        sm_count=cores,
        sm_granularity=1,
        sm_min=1,
        flops_per_s=tuple((dtype, max(r)) for dtype, r in sorted(rates.items())),
        hbm_bytes_per_s=max(reads),
        sm_hbm_bytes_per_s=reads[0],
        h2d_bytes_per_s=max(reads) / 2,
        d2h_bytes_per_s=max(reads) / 2,
        link_bytes_per_s=0.0,
        memory_bytes=_memory_bytes(),
        launch_seconds=dispatch,
        switch_seconds=dispatch,
        compute_scaling=_scaling(counts, rates["f32"], cores),
        sources=_sources(cores),
    )


def _sources(cores: int) -> tuple[tuple[str, str], ...]:
    """Where each number comes from."""
    measured = f"measured on this machine, {cores} cores"
    text = dict.fromkeys(("flops_per_s", "hbm_bytes_per_s", "sm_hbm_bytes_per_s", "launch_seconds"), measured)
    text["switch_seconds"] = "assumed: that of a launch"
    text |= dict.fromkeys(("h2d_bytes_per_s", "d2h_bytes_per_s"), "assumed: a copy reads and writes memory once")
    text |= dict.fromkeys(("sm_count", "sm_min", "sm_granularity", "memory_bytes"), "reported by the operating system")
    return tuple(sorted(text.items()))


def _scaling(counts: list[int], rates: list[float], cores: int) -> tuple[float, ...]:
    """Share of the full rate on 1..cores, linear between measured counts, never falling."""
    top = max(rates)
    result: list[float] = []
    for k in range(1, cores + 1):
        high = next(i for i, c in enumerate(counts) if c >= k)
        low = max(high - 1, 0)
        width = max(counts[high] - counts[low], 1)
        rate = rates[low] + (rates[high] - rates[low]) * (k - counts[low]) / width
        result.append(max(rate / top, result[-1] if result else 0.0))
    return (*result[:-1], 1.0)


def best_seconds(run: Callable[[], object], budget_s: float = 0.3) -> float:
    """The fastest of as many runs as fit the budget, at least one: interference only ever adds time."""
    run()
    best, stop = float("inf"), time.perf_counter() + budget_s
    while True:
        begin = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - begin)
        if end >= stop:
            return best


PROBE_AGAIN = "`taskgraph doctor --probe` measures it again"
"""What to do about a probe that is wrong."""


def cached_probe() -> Device:
    """The cached Device of this machine, probed if there is none; a damaged cache file is measured anew.

    A probe during which others had more than load.QUIET of the cores is not kept, and `disturbance` tells."""
    path = cache_path()
    try:
        return Device.from_json(path.read_text())
    except (OSError, ValueError, TypeError, DeviceError):
        begin = load.now()
        device = probe()
        share = load.others_share(begin, load.now())
        if share > load.QUIET:
            text = f"not kept: others had {share:.0%} of the cores while it was measured"
            return replace(device, sources=(*device.sources, (_DISTURBED, text)))
        with cache.keeping("the probe", path):
            cache.write_atomically(path, json.dumps(device.to_dict(), sort_keys=True))
        return device


_DISTURBED = "probe"


def disturbance(device: Device) -> str:
    """What disturbed the probe that measured `device`, for people; empty if nothing did."""
    return dict(device.sources).get(_DISTURBED, "")


def probed_when() -> str:
    """How long ago the probe that is kept was measured, for people."""
    try:
        hours = (time.time() - cache_path().stat().st_mtime) / 3600
    except OSError:
        return "not kept"
    ago = f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} hours" if hours >= 2 else "less than two hours"
    return f"kept, measured {ago} ago; {PROBE_AGAIN}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(cached_probe().to_dict()) + "\n")
