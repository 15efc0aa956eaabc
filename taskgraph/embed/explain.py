"""What an imported module consists of, for people."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taskgraph.cost.model import op_table
from taskgraph.embed.kinds import ATEN
from taskgraph.graph.device import Device, get
from taskgraph.units import format_seconds

if TYPE_CHECKING:
    from taskgraph.embed.importer import Imported

_MOST_ROWS = 12


@dataclass(frozen=True, slots=True)
class Share:
    """Ops of one kind, or calls of one operator of torch: how many, and their predicted seconds one after another."""

    what: str
    recognised: bool
    count: int
    seconds: float


def shares(imported: "Imported", device: str | Device = "cpu") -> list[Share]:
    """By kind, and `aten` ops by operator, the most time first; seconds are simulated, op after op on all SMs."""
    spec, graph = get(device), imported.graph.flat()
    table = op_table(graph, spec, [spec.sm_count])
    seconds = {op.name: float(s) + spec.launch_seconds for op, s in zip(graph.ops, table.seconds[:, 0], strict=True)}
    counts: Counter[tuple[str, bool]] = Counter()
    times: Counter[tuple[str, bool]] = Counter()
    for made in imported.recognised:
        key = (made.calls[0].rpartition(".")[0], False) if made.kind == ATEN else (made.kind, True)
        counts[key] += 1
        times[key] += seconds[made.op]  # type: ignore[assignment]  # a Counter adds floats too
    rows = [Share(what, known, counts[what, known], float(times[what, known])) for what, known in counts]
    return sorted(rows, key=lambda row: (-row.seconds, row.what))


def recognised_share(imported: "Imported", device: str | Device = "cpu") -> float:
    """The share of the predicted time that recognised ops have."""
    rows = shares(imported, device)
    return sum(r.seconds for r in rows if r.recognised) / sum(r.seconds for r in rows)


def explain(imported: "Imported", device: str | Device = "cpu") -> str:
    """A line a kind: how many ops, whether recognised or run as they are, and their share of the predicted time."""
    rows = shares(imported, device)
    total = sum(row.seconds for row in rows)
    calls = sum(len(made.calls) for made in imported.recognised)
    known = [row for row in rows if row.recognised]
    lines = [
        f"{imported.graph.name}: {calls} calls of torch as {len(imported.graph.ops)} ops, "
        f"{sum(r.count for r in known)} of them recognised "
        f"({100 * sum(r.seconds for r in known) / total:.0f} % of the time)",
        f"  op after op {format_seconds(total)} on {get(device).name} (simulated)",
    ]
    for row in rows[:_MOST_ROWS]:
        how = "recognised" if row.recognised else "as it is"
        lines.append(f"  {row.count:5d}  {row.what:<40} {how:<10} {100 * row.seconds / total:5.1f} %")
    if len(rows) > _MOST_ROWS:
        rest = rows[_MOST_ROWS:]
        share = 100 * sum(r.seconds for r in rest) / total
        lines.append(f"  {sum(r.count for r in rest):5d}  {len(rest)} other kinds{'':<39} {share:5.1f} %")
    return "\n".join(lines)
