"""Say in words what a plan does: its critical path, how busy each resource is, what bounds it, and whether it won."""

import io
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from taskgraph.cost.fitted import UNFITTED_BAND
from taskgraph.errors import PlanError
from taskgraph.graph.op import RESOURCES
from taskgraph.record import number
from taskgraph.runtime.cpu.probe import PROBE_AGAIN, disturbance
from taskgraph.schedule.plan import Plan, Span
from taskgraph.schedule.verify import check_readable
from taskgraph.units import format_quantity, format_seconds

BOUNDS = ("chain", *RESOURCES, "power", "proved")
MEANING = {
    "chain": "longest dependency chain",
    "sm": "SM time of all ops",
    "hbm": "device memory traffic",
    "h2d": "host-to-device copies",
    "d2h": "device-to-host copies",
    "link": "GPU-to-GPU link traffic",
    "power": "the best of these at the clocks that power leaves",
    "proved": "what the exact scheduler proves",
}
"""What each lower bound is made of, in the order of BOUNDS."""

IDLE = "(nothing runs)"
_INSTANCE = re.compile(r"(?<=[.#\[])\d+")
_WIDTH = 100


def group_name(op: str) -> str:
    """The op's name with the numbers of layers and slices collapsed: "layer.3/qkv" is "layer.*/qkv"."""
    return _INSTANCE.sub("*", op)


def stem(op: str) -> str:
    """What the op is called within its layer: "layer.3/qkv" is "qkv"."""
    last = group_name(op).rpartition("/")[2]
    return re.sub(r"[.#]\*|\[\*\]?", "", last) or last


def unit_of(plan: Plan) -> str:
    """What the partitions of the plan's device are counted in."""
    return "cores" if plan.device.kind == "cpu" else "SM"


def lane_place(plan: Plan, lane: int) -> str:
    """Where lane number `lane` runs, for people; empty if the plan has no such lane."""
    if not 0 <= lane < len(plan.lanes):
        return ""
    part = plan.partition(lane)
    geometry = f"geometry {plan.lanes[lane].geometry}, " if len(plan.geometries) > 1 else ""
    return f"{geometry}{part.sm_count} {unit_of(plan)} [{part.first_sm}, {part.end_sm})"


def critical_path(plan: Plan) -> tuple[Span, ...]:
    """The chain of spans that ends last, in time order: each waited, by lane order or by a wait, for the one before."""
    by_op = {span.op: span for span in plan.timeline.spans}
    earlier: dict[str, list[str]] = {}
    last_on_lane: dict[int, str] = {}
    for step in plan.steps:
        earlier[step.op] = [plan.steps[i].op for i in step.waits]
        if step.lane in last_on_lane:
            earlier[step.op].append(last_on_lane[step.lane])
        last_on_lane[step.lane] = step.op
    path: list[Span] = []
    at = max(by_op.values(), key=lambda s: s.end_s, default=None)
    while at is not None:
        path.append(at)
        before = [by_op[op] for op in earlier.get(at.op, ()) if op in by_op]
        at = max(before, key=lambda s: s.end_s, default=None)
    return tuple(reversed(path))


def path_shares(plan: Plan) -> list[tuple[str, int, float]]:
    """(group, ops, seconds) of the critical path, longest first; time between its spans goes to IDLE."""
    path = critical_path(plan)
    if not path:
        return []
    seconds: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    now = min(span.start_s for span in plan.timeline.spans)
    same_s = 1e-6 * plan.makespan_s
    for span in path:
        if span.start_s - now > same_s:
            seconds[IDLE] += span.start_s - now
            count[IDLE] += 1
        name = group_name(span.op)
        seconds[name] += span.end_s - max(span.start_s, now)
        count[name] += 1
        now = span.end_s
    return sorted(((g, count[g], s) for g, s in seconds.items()), key=lambda item: (-item[2], item[0]))


def least_use(plan: Plan) -> dict[str, float]:
    """What the ops need of each resource at the least, as a share of its capacity over the makespan: its bound over the
    makespan, the one home of this figure. A plan may hold more than that: SMs on which an op gains little are in use,
    too, and how much is in use at each time only a replay tells (`planner.utilisation`)."""
    area = asdict(plan.bounds)
    return {name: area[f"{name}_s"] / plan.makespan_s if plan.makespan_s else 0.0 for name in BOUNDS}


def verdict_sentence(plan: Plan) -> str:
    """The verdict in one sentence, with the kind of its numbers and whether it survives the error band."""
    v = plan.verdict
    band = f"error band ±{100 * v.band:.3g} %"
    if v.choice != "packed":
        if v.packed_s == v.sequential_s:
            return f"sequential: no packing was found that beats it ({v.kind}, {band})"
        inside = "; a difference inside the band is no win" if v.packed_s < v.sequential_s else ""
        decides = "; `taskgraph tune` decides by measuring" if inside and v.kind == "simulated" else ""
        times = _times(v.packed_s / v.sequential_s)
        return f"sequential: packing would take {times} ({v.kind}, {band}{inside}{decides})"
    word = "survives" if v.sure_gain > 1 else "does not survive"
    how = f"{_times(v.gain)} faster" if v.gain >= 1 else f"{_times(1 / v.gain)} slower"
    return f"packed: {how} than the sequential graph, {v.kind}, {band}; {word} the band"


def remark(plan: Plan, measured_s: float) -> str:
    """What to say of a measured time of the plan that its prediction does not fit; empty where it lies in the band.

    The one home of this: `run`, `explain`, `explain_tuned` and the report print it wherever both times are known.
    """
    v = plan.verdict
    band = v.error_band if v.kind == "simulated" else UNFITTED_BAND  # that of a measured verdict is noise
    predicted_s = plan.makespan_s
    if not (predicted_s > 0 and measured_s > 0) or 1 / (1 + band) <= measured_s / predicted_s <= 1 + band:
        return ""
    ratio = measured_s / predicted_s
    how = f"{_times(ratio)} the prediction" if ratio > 1 else f"{1 / ratio:.2f}x faster than the prediction"
    if plan.device.kind != "cpu":
        why = "the device is busy or runs at other clocks, or its kernels are not those of the coefficients"
    elif ratio > 1:
        why = f"the machine is busy, or its probe stale; {PROBE_AGAIN}"
    else:
        why = f"the machine was busy when it was probed; {PROBE_AGAIN}"
    text = f"measured {format_seconds(measured_s)} is {how} of {format_seconds(predicted_s)} (simulated)"
    seen = disturbance(plan.device)
    return f"{text}, beyond its error band of ±{100 * band:.3g} %: {why}{f' (probe {seen})' if seen else ''}."


def measured_seconds(plan: Plan) -> float | None:
    """The time of the plan as its own verdict measured it; None where the verdict is no measurement."""
    v = plan.verdict
    return None if v.kind != "measured" else v.packed_s if v.choice == "packed" else v.sequential_s


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if abs(ratio - 1) >= 0.01 else f"{ratio:.3f}x"


def text_console(width: int, color: bool) -> tuple[Console, Callable[[], str]]:
    """A console of `width` columns that prints into a text, and what gives the text without trailing blanks."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        color_system="truecolor" if color else None,
        highlight=False,
        legacy_windows=False,
    )
    return console, lambda: "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def explain(plan: Plan, color: bool = False, measured_s: float | None = None) -> str:
    """What the plan does and how good it is, as text for a terminal of 100 columns.

    `measured_s` is the time that it took, if it was run; one that the prediction does not fit gets a `remark`.
    PlanError for a plan whose indices or numbers are damaged."""
    check_readable(plan)
    if measured_s is not None:
        number("measured_s", measured_s, PlanError, 0)
    console, text = text_console(_WIDTH, color)
    console.print(_header(plan))
    for title, body in (
        (f"Critical path ({plan.timeline.kind})", _path_table(plan)),
        (f"Least use of each resource ({plan.timeline.kind})", _use_table(plan)),
        (f"Lower bounds ({plan.timeline.kind})", _bounds_table(plan)),
    ):
        console.print(Text(f"\n{title}", style="bold"))
        console.print(Padding(body, (0, 0, 0, 2)))
    console.print(Text("\nVerdict", style="bold"))
    style = "green" if plan.verdict.choice == "packed" else "yellow"
    console.print(Padding(Text(verdict_sentence(plan), style=style), (0, 0, 0, 2)))
    took_s = measured_s if measured_s is not None else measured_seconds(plan)
    if took_s is not None and (said := remark(plan, took_s)):
        console.print(Padding(Text(f"note: {said}", style="yellow"), (0, 0, 0, 2)))
    return text()


def counts(plan: Plan) -> dict[str, str]:
    """How many ops, lanes, partitions and geometries the plan has, the size of its arena, and on a network how
    collectives go."""
    partitions = sum(len(g.partitions) for g in plan.geometries)
    sizes = " | ".join("+".join(map(str, g.sizes)) for g in plan.geometries)
    ways = {f"{stem(each.op)} by {each.algorithm}": None for each in plan.collectives}
    over = {"collectives": ", ".join(ways)} if ways else {}
    return {
        "ops": f"{len(plan.steps):,}",
        "lanes": str(len(plan.lanes)),
        "partitions": f"{partitions} ({sizes} of {plan.device.sm_count} {unit_of(plan)})",
        "geometries": str(len(plan.geometries)),
        "arena": format_quantity(plan.arena_bytes, "B"),
        **over,
    }


def _header(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    numbers = f"{plan.timeline.kind} on device {plan.device.name}"
    if plan.timeline.origin and plan.timeline.origin != plan.device.name:
        numbers += f" ({plan.timeline.origin})"
    rows = {"graph": plan.graph_name, "device": plan.device.name, "made by": plan.made_by, "numbers": numbers}
    rows |= {"makespan": f"{format_seconds(plan.makespan_s)} ({plan.timeline.kind})"} | counts(plan)
    for key, value in rows.items():
        table.add_row(key, Text(value, style="bold" if key == "graph" else ""))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        right = name in ("ops", "time", "share", "of capacity", "of makespan")
        table.add_column(name, justify="right" if right else "left", overflow="ellipsis", no_wrap=True)
    return table


def _path_table(plan: Plan, top: int = 10) -> Table:
    table = _table("op", "ops", "time", "share", "")
    shares = path_shares(plan)
    rest = shares[top:]
    if rest:
        rest = [(f"({len(rest)} more)", sum(c for _, c, _ in rest), sum(s for _, _, s in rest))]
    for name, count, seconds in (*shares[:top], *rest):
        part = seconds / plan.makespan_s if plan.makespan_s else 0.0
        row = (str(count), format_seconds(seconds), f"{part:.1%}")
        table.add_row(Text(name), *row, Text(_bar(part), style="cyan"))
    return table


def _use_table(plan: Plan) -> Table:
    table = _table("resource", "of capacity", "", "what")
    needed = least_use(plan)
    for resource in RESOURCES:
        part = needed[resource]
        table.add_row(resource, f"{part:.1%}", Text(_bar(part), style="cyan"), Text(MEANING[resource], style="dim"))
    return table


def bounds_of(plan: Plan) -> tuple[str, ...]:
    """The bounds that the plan has: "proved" only after the exact scheduler, "power" only where it slows."""
    found = asdict(plan.bounds)
    return tuple(name for name in BOUNDS if name not in ("power", "proved") or found[f"{name}_s"])


def _bounds_table(plan: Plan) -> Table:
    table = _table("bound", "time", "of makespan", "", "what")
    seconds, needed = asdict(plan.bounds), least_use(plan)
    for name in bounds_of(plan):
        value, part = seconds[f"{name}_s"], needed[name]
        binds = name == plan.bounds.binding
        mark, style = ("<- binds", "bold") if binds else ("", "")
        row = (format_seconds(value), f"{part:.1%}", mark)
        table.add_row(Text(name), *row, Text(MEANING[name], style="dim"), style=style)
    table.add_row(Text("plan"), format_seconds(plan.makespan_s), "100.0%", "", gap_text(plan))
    return table


def gap_text(plan: Plan) -> str:
    """How far the plan is from its best lower bound."""
    if plan.bounds.best_s <= 0:
        return "no bound"
    return f"gap {plan.gap:.3f}x of the {plan.bounds.binding} bound"


def _bar(share: float, width: int = 20) -> str:
    filled = round(8 * width * min(max(share, 0.0), 1.0))
    return "█" * (filled // 8) + ("" if filled % 8 == 0 else " ▏▎▍▌▋▊▉"[filled % 8])
