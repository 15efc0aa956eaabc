"""Whether others used this process's cores while something was measured: what Linux counts, before and after."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.1
"""Share of the cores that others may have while a measurement counts as undisturbed."""

_BUSY = (1, 2, 3, 6, 7, 8)
"""Columns of a cpu line of /proc/stat that are time spent: user, nice, system, irq, softirq, steal."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Seconds so far: of the clock, of anyone on the cores that this process may use, and of this process."""

    clock_s: float
    busy_s: float
    own_s: float


def now() -> Moment:
    """The counters now. `busy_s` has what other guests of a hypervisor took, too; it is 0 where nobody tells."""
    return Moment(time.monotonic(), _busy_s(), sum(os.times()[:2]))


def _busy_s() -> float:
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    except OSError:
        return 0.0
    ticks = sum(sum(int(row[i]) for i in _BUSY if i < len(row)) for row in rows if row[0] in mine)
    return ticks / os.sysconf("SC_CLK_TCK")


def others_share(begin: Moment, end: Moment) -> float:
    """The share of the cores, 0 to 1, that others had from `begin` to `end`; 0 where the system does not tell."""
    if not end.busy_s or end.clock_s <= begin.clock_s:
        return 0.0
    others_s = end.busy_s - begin.busy_s - (end.own_s - begin.own_s)
    return min(max(others_s / (len(os.sched_getaffinity(0)) * (end.clock_s - begin.clock_s)), 0.0), 1.0)
