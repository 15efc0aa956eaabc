"""One self-contained HTML file about a plan: timelines, utilisation, bounds and the verdict. No request leaves it."""

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from taskgraph.cache import write_atomically
from taskgraph.errors import PlanError
from taskgraph.observe.explain import (
    MEANING,
    bounds_of,
    counts,
    critical_path,
    gap_text,
    lane_place,
    least_use,
    path_shares,
    remark,
    stem,
    unit_of,
    verdict_sentence,
)
from taskgraph.observe.trace import check_timelines
from taskgraph.record import instance, sequence, shown
from taskgraph.record import number as number_of
from taskgraph.record import text as text_of
from taskgraph.schedule.plan import Plan, Span, Timeline, writing
from taskgraph.units import format_seconds

Points = Sequence[tuple[float, float]]

_NO_FACTS: Mapping[str, str] = MappingProxyType({})
_COLOURS = 10  # that report.css has
_WIDE = 10_000  # units across a plot; the page stretches them to its width
_PIXELS = 1_600
_MANY = 3_000
_ROW, _BAR = 30, 24


def write_report(
    path: str | Path,
    plan: Plan,
    timelines: Mapping[str, Timeline],
    facts: Mapping[str, str] = _NO_FACTS,
    table: Sequence[tuple[str, ...]] = (),
    utilisation: Mapping[str, Points] | None = None,
) -> None:
    """Write the report of `plan` to `path`.

    `timelines` are shown in order, by label. `facts` are further name-value pairs; the first row of `table` is its
    header. `utilisation` holds (time_s, fraction) steps by resource; without it, that of the SMs is
    derived from the plan's timeline. PlanError for a damaged plan or timeline, for pairs, rows or steps of another
    kind, and where the file cannot be written.
    """
    check_timelines(plan, timelines)
    _check_extras(facts, table, utilisation)
    colour = _palette(timelines.values())
    critical = frozenset(span.op for span in critical_path(plan))
    longest = [t.makespan_s for t in timelines.values() if t.makespan_s > 0] or [1.0]
    shared = max(longest) if max(longest) <= 4 * min(longest) else None
    charts = "".join(
        _timeline(label, t, plan, colour, critical, shared or t.makespan_s or 1.0) for label, t in timelines.items()
    )
    body = (
        _header(plan, timelines, facts)
        + _section("Timeline", _legend(colour, timelines) + charts, hint=_HINT)
        + _section(
            "Utilisation over time",
            _use(plan, utilisation, shared or plan.makespan_s or 1.0),
            hint=_label(plan.timeline),
        )
        + '<div class="cols">'
        + _section("Lower bounds", _bounds(plan), hint=_label(plan.timeline))
        + _section("Critical path", _path(plan), hint=_label(plan.timeline))
        + "</div>"
        + (_section("Details", _table(table)) if table else "")
    )
    title, style, script = _e(f"{plan.graph_name} on {plan.device.name}"), _part("report.css"), _part("report.js")
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body><main>{body}<footer>taskgraph · plan of graph <code>{_e(plan.graph[:12])}</code> · made by "
        f'{_e(plan.made_by)}</footer></main><div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )
    with writing(path) as place:
        write_atomically(place, text)


def _check_extras(facts: object, table: object, utilisation: object) -> None:
    """PlanError unless they are of the kinds that `write_report` says."""
    for name, value in instance("facts", facts, Mapping, PlanError).items():
        text_of("the name of a fact", name, PlanError)
        text_of(f"the fact {name!r}", value, PlanError, empty=True)
    for row in sequence("table", table, PlanError):
        for cell in sequence("a row of table", row, PlanError):
            text_of("a cell of table", cell, PlanError, empty=True)
    for name, points in instance("utilisation", {} if utilisation is None else utilisation, Mapping, PlanError).items():
        text_of("a resource of utilisation", name, PlanError)
        for point in sequence(f"utilisation of {name!r}", points, PlanError):
            if len(sequence("a step of utilisation", point, PlanError)) != 2:
                raise PlanError(f"a step of utilisation is a time and a share; got {shown(point)}.")
            number_of("the time of a step", point[0], PlanError)
            number_of("the share of a step", point[1], PlanError, 0)


# ------------------------------------------------------------------------------------------- pieces


@cache
def _part(name: str) -> str:
    """A file beside this one that goes into every report."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _label(timeline: Timeline) -> str:
    return f'<span class="tag {_e(timeline.kind)}">{_e(timeline.kind)}</span> {_e(timeline.origin)}'


def _section(title: str, body: str, hint: str = "") -> str:
    return f'<section><h2>{_e(title)}<span class="hint">{hint}</span></h2>{body}</section>\n'


def _header(plan: Plan, timelines: Mapping[str, Timeline], facts: Mapping[str, str]) -> str:
    """Title, verdict, the headline numbers, the small facts and how the device is split."""
    v = plan.verdict
    ratio = v.gain if v.choice == "packed" else v.packed_s / v.sequential_s if v.sequential_s else 1.0
    what = "faster than sequential" if v.choice == "packed" else "time that packing would take"
    cards = [(f"{name} step", format_seconds(t.makespan_s), _label(t)) for name, t in timelines.items()]
    cards.append((what, f"{ratio:.2f}×", f'<span class="tag {_e(v.kind)}">{_e(v.kind)}</span>'))
    if plan.bounds.best_s > 0:
        cards.append(("of the best lower bound", f"{plan.gap:.3f}×", _label(plan.timeline)))
    big = "".join(f'<div class="card"><b>{_e(n)}</b><i>{_e(k)}</i><small>{s}</small></div>' for k, n, s in cards)
    small = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(x)}</dd></div>" for k, x in (counts(plan) | dict(facts)).items())
    choice = "packed" if v.choice == "packed" else "sequential"
    head, _, tail = verdict_sentence(plan).partition(":")
    notes = [remark(plan, t.makespan_s) for t in timelines.values() if t.kind == "measured"]
    noted = "".join(f'<p class="note">note: {_e(text)}</p>' for text in dict.fromkeys(notes) if text)
    return (
        f'<header><p class="over">taskgraph plan</p><h1>{_e(plan.graph_name)} <span>on {_e(plan.device.name)}</span>'
        f'</h1><p class="verdict {choice}"><strong>{_e(head)}</strong>{_e(tail)}</p>{noted}'
        f'<div class="cards">{big}</div><dl>{small}</dl>{_geometries(plan)}</header>\n'
    )


def _geometries(plan: Plan) -> str:
    rows = []
    for number, geometry in enumerate(plan.geometries):
        cells = []
        for index, part in enumerate(geometry.partitions):
            lanes = [str(i) for i, lane in enumerate(plan.lanes) if (lane.geometry, lane.partition) == (number, index)]
            who = f"lane{'s' if len(lanes) > 1 else ''} {', '.join(lanes)}" if lanes else "no lane"
            text = f"{part.sm_count} {unit_of(plan)} · {who}"
            cells.append(f'<span style="flex-grow:{part.sm_count}" title="{text}">{text}</span>')
        left = plan.device.sm_count - sum(geometry.sizes)
        rest = f'<span class="free" style="flex-grow:{left}" title="{left} unused"></span>' if left > 0 else ""
        rows.append(f'<div class="geo"><em>geometry {number}</em><div>{"".join(cells)}{rest}</div></div>')
    return "".join(rows)


def _palette(timelines: Iterable[Timeline]) -> dict[str, int]:
    """A colour number for every stem: its own for those with the most time, the last one for all others."""
    total: defaultdict[str, float] = defaultdict(float)
    for timeline in timelines:
        whole = timeline.makespan_s or 1.0
        for span in timeline.spans:
            total[stem(span.op)] += (span.end_s - span.start_s) / whole
    ranked = sorted(total, key=lambda s: (-total[s], s))
    return {name: min(i, _COLOURS - 1) for i, name in enumerate(ranked)}


def _legend(colour: Mapping[str, int], timelines: Mapping[str, Timeline]) -> str:
    shown = [(name, c) for name, c in colour.items() if c < _COLOURS - 1 or len(colour) <= _COLOURS]
    others = len(colour) - len(shown)
    items = [f'<li><i class="c{c}"></i>{_e(name)}</li>' for name, c in shown]
    items += [f'<li><i class="c{_COLOURS - 1}"></i>{others} others</li>'] if others else []
    box = '<label><input type="checkbox" id="crit"> critical path only</label>'
    return f'<ul class="legend">{"".join(items)}</ul>{box if timelines else ""}'


# ----------------------------------------------------------------------------------------- timeline


def _timeline(
    label: str, timeline: Timeline, plan: Plan, colour: Mapping[str, int], critical: frozenset[str], scale_s: float
) -> str:
    """One timeline: a row for each lane, an axis of `scale_s` seconds below."""
    lanes = sorted({*range(len(plan.lanes)), *(s.lane for s in timeline.spans)})
    zero = min((s.start_s for s in timeline.spans), default=0.0)
    runs = _merged(timeline, scale_s / _PIXELS) if len(timeline.spans) > _MANY else [[s] for s in timeline.spans]
    bars = []
    for run in sorted(runs, key=lambda r: (r[0].lane, r[0].start_s)):
        begin, end = run[0].start_s - zero, max(s.end_s for s in run) - zero
        main = max(run, key=lambda s: s.end_s - s.start_s)
        name = main.op if len(run) == 1 else f"{len(run)} short ops, the longest {main.op}"
        tip = f"{name}\nlane {main.lane} · {lane_place(plan, main.lane)}\n{format_seconds(end - begin)} "
        tip += f"({timeline.kind}), from {format_seconds(begin)} to {format_seconds(end)}"
        kind = f"c{colour[stem(main.op)]}" + (" k" if any(s.op in critical for s in run) else "")
        bars.append(
            f'<rect class="{kind}" x="{_WIDE * begin / scale_s:.2f}" y="{lanes.index(main.lane) * _ROW + 3}" '
            f'width="{max(_WIDE * (end - begin) / scale_s, 0.5):.2f}" height="{_BAR}" '
            f'data-n="{_e(stem(main.op) if len(run) == 1 else "")}"><title>{_e(tip)}</title></rect>'
        )
    names = "".join(f"<div>lane {lane}<small>{_e(lane_place(plan, lane))}</small></div>" for lane in lanes)
    title = f"<h3>{_e(label)} {_label(timeline)} · {format_seconds(timeline.makespan_s)}</h3>"
    return title + _plot(names, "".join(bars), len(lanes) * _ROW, scale_s, "lanes")


def _merged(timeline: Timeline, pixel_s: float) -> list[list[Span]]:
    """Runs of spans: neighbours of one lane that are shorter than a pixel and closer than one share a run."""
    runs: list[list[Span]] = []
    for span in sorted(timeline.spans, key=lambda s: (s.lane, s.start_s)):
        last = runs[-1] if runs else None
        if last and last[0].lane == span.lane and span.end_s - last[0].start_s < pixel_s:
            last.append(span)
        else:
            runs.append([span])
    return runs


def _plot(names: str, shapes: str, height: int, scale_s: float, kind: str, axis: bool = True) -> str:
    ticks = "".join(f'<span style="left:{100 * at:.3f}%">{text}</span>' for at, text in _ticks(scale_s))
    return (
        f'<div class="plot {kind}" data-s="{scale_s!r}" data-h="{height}"><div class="names">{names}</div>'
        f'<div class="view"><svg viewBox="0 0 {_WIDE} {height}" preserveAspectRatio="none" height="{height}" '
        f'role="img">{shapes}</svg><div class="over"></div></div>'
        f'{f"""<div class="axis">{ticks}</div>""" if axis else ""}</div>'
    )


def _ticks(scale_s: float) -> list[tuple[float, str]]:
    """(share of the axis, text) of about six round times."""
    raw = scale_s / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = min(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [(i * step / scale_s, format_seconds(i * step) if i else "0") for i in range(int(scale_s / step) + 1)]


# -------------------------------------------------------------------------------------- utilisation


def _use(plan: Plan, given: Mapping[str, Points] | None, scale: float) -> str:
    """A step chart for each resource while the plan runs, on an axis of `scale` seconds."""
    series, needed = given if given is not None else {"sm": _allocated(plan)}, least_use(plan)
    whole = plan.makespan_s or 1.0
    rows = []
    for number, (name, points) in enumerate(series.items()):
        start = points[0][0] if points else 0.0
        steps = _binned([(t - start, x) for t, x in points if t - start < whole], whole)
        corners = [f"M0 44V{44 - 42 * min(steps[0][1], 1.0):.1f}"] if steps else ["M0 44"]
        corners += [f"H{_WIDE * t / scale:.1f}V{44 - 42 * min(x, 1.0):.1f}" for t, x in steps[1:]]
        path = f'<path class="r{number % 5}" d="{"".join(corners)}H{_WIDE * whole / scale:.1f}V44Z"/>'
        shape = f'<line x2="{_WIDE}" y1="2" y2="2"/>{path}'
        what = "allocated" if given is None else "in use"
        least = f"<br>needed at least {needed[name]:.1%}" if name in needed else ""
        label = f"<div>{_e(name)}<small>{what} {_mean(steps, whole):.1%}, mean{least}</small></div>"
        rows.append(_plot(label, shape, 46, scale, "use", axis=number == len(series) - 1))
    return "".join(rows)


def _allocated(plan: Plan) -> list[tuple[float, float]]:
    """Share of the SMs in partitions where something runs, as steps."""
    events = sorted(e for s in plan.timeline.spans for e in ((s.start_s, 1, s.lane), (s.end_s, -1, s.lane)))
    active: defaultdict[tuple[int, int], int] = defaultdict(int)
    steps: list[tuple[float, float]] = []
    same_s = 1e-9 * plan.makespan_s
    for at, change, lane in events:
        part = plan.partition(lane)
        active[(part.first_sm, part.sm_count)] += change
        share = sum(size for (_, size), running in active.items() if running) / plan.device.sm_count
        if steps and at - steps[-1][0] <= same_s:
            steps.pop()
        steps.append((at, share))
    return steps


def _mean(steps: Points, scale_s: float) -> float:
    return sum(x * (after - t) for (t, x), (after, _) in pairwise([*steps, (scale_s, 0.0)])) / scale_s


def _binned(steps: list[tuple[float, float]], scale_s: float) -> list[tuple[float, float]]:
    """The same steps, or their means over each pixel when there are many more steps than pixels."""
    if len(steps) <= 2 * _PIXELS:
        return steps
    width, area = scale_s / _PIXELS, [0.0] * _PIXELS
    for (t, x), (after, _) in pairwise([*steps, (scale_s, 0.0)]):
        first, last = int(t / width), min(math.ceil(after / width), _PIXELS)
        for i in range(first, last):
            area[i] += x * max(min(after, (i + 1) * width) - max(t, i * width), 0.0)
    return [(i * width, a / width) for i, a in enumerate(area)]


# ------------------------------------------------------------------------------------------- tables


def _meter(share: float, kind: str = "") -> str:
    return f'<div class="meter {kind}"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></div>'


def _bounds(plan: Plan) -> str:
    seconds, needed = asdict(plan.bounds), least_use(plan)
    rows = ""
    for name in bounds_of(plan):
        value, binds = seconds[f"{name}_s"], name == plan.bounds.binding
        mark = '<span class="tag binds">binds</span>' if binds else ""
        rows += (
            f"<tr{' class=binds' if binds else ''}><th>{name} {mark}<small>{MEANING[name]}</small></th>"
            f"<td>{format_seconds(value)}</td><td>{needed[name]:.1%}</td><td>{_meter(needed[name])}</td></tr>"
        )
    rows += (
        f'<tr class="total"><th>this plan<small>{_e(gap_text(plan))}</small></th>'
        f"<td>{format_seconds(plan.makespan_s)}</td><td>100.0%</td><td>{_meter(1.0, 'all')}</td></tr>"
    )
    return f"<table><tr><th>bound</th><td>time</td><td>of makespan</td><td></td></tr>{rows}</table>"


def _path(plan: Plan) -> str:
    rows = ""
    for name, count, seconds in path_shares(plan)[:10]:
        share = seconds / (plan.makespan_s or 1.0)
        rows += f"<tr><th>{_e(name)}</th><td>{count}</td><td>{format_seconds(seconds)}</td>"
        rows += f"<td>{share:.1%}</td><td>{_meter(share)}</td></tr>"
    return f"<table><tr><th>op</th><td>ops</td><td>time</td><td>share</td><td></td></tr>{rows}</table>"


def _table(table: Sequence[tuple[str, ...]]) -> str:
    rows = ("".join(f"<{'th' if i == 0 else 'td'}>{_e(c)}</{'th' if i == 0 else 'td'}>" for i, c in enumerate(row))
            for row in table)  # fmt: skip
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


_HINT = "drag to zoom, double-click to reset, hover for details"
