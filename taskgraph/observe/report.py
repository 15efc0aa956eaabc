"""One self-contained HTML file about a plan: timelines, utilisation, bounds and the verdict. No request leaves it."""

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
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
_COLOURS = 10
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
    title = _e(f"{plan.graph_name} on {plan.device.name}")
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>\n'
        f"<body><main>{body}<footer>taskgraph · plan of graph <code>{_e(plan.graph[:12])}</code> · made by "
        f'{_e(plan.made_by)}</footer></main><div id="tip" hidden></div><script>{_JS}</script></body></html>\n'
    )
    with writing(path) as place:
        write_atomically(place, text)


def _check_extras(facts: object, table: object, utilisation: object) -> None:
    """PlanError unless they are of the kinds that `write_report` says."""
    for name, value in instance("facts", facts, Mapping, PlanError).items():
        text_of("the name of a fact", name, PlanError), text_of(f"the fact {name!r}", value, PlanError, empty=True)
    for row in sequence("table", table, PlanError):
        for cell in sequence("a row of table", row, PlanError):
            text_of("a cell of table", cell, PlanError, empty=True)
    for name, points in instance("utilisation", {} if utilisation is None else utilisation, Mapping, PlanError).items():
        text_of("a resource of utilisation", name, PlanError)
        for point in sequence(f"utilisation of {name!r}", points, PlanError):
            if len(sequence("a step of utilisation", point, PlanError)) != 2:
                raise PlanError(f"a step of utilisation is a time and a share; got {shown(point)}.")
            (
                number_of("the time of a step", point[0], PlanError),
                number_of("the share of a step", point[1], PlanError, 0),
            )


# ------------------------------------------------------------------------------------------- pieces


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

_INKS = (
    "4269d0 fff", "efb118 221a00", "ff725c 2b0a04", "3ca951 04210b", "a463f2 fff",
    "6cc5b0 06251e", "ff8ab7 33091c", "97bbf5 081a38", "9c6b4e fff", "9498a0 16181c",
)  # fmt: skip
"""Colour of a stem's bars, and of the text on them."""

_CSS = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1c1f24;--soft:#676d77;--line:#e5e5e1;--lane:#f1f1ee;
--hue:#3457d5;--good:#1b7f4d;--warn:#9a6200}
@media(prefers-color-scheme:dark){:root{--bg:#111317;--card:#191c22;--ink:#e7e9ee;--soft:#969dab;--line:#2b2f38;
--lane:#20242b;--hue:#8ba4ff;--good:#5fd09a;--warn:#e8b35a}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 Inter,system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1440px;margin:0 auto;padding:36px 32px 24px}h1{font-size:32px;line-height:1.2;margin:0 0 10px;
letter-spacing:-.02em;overflow-wrap:anywhere}h1 span{color:var(--soft);font-weight:400}p.over{margin:0;font-size:12px;
letter-spacing:.08em;text-transform:uppercase;color:var(--soft)}.verdict{font-size:17px;margin:0 0 22px}
.verdict strong{padding:2px 10px;border-radius:99px;margin-right:8px;font-size:14px;color:var(--card);
background:var(--warn)}.verdict.packed strong{background:var(--good)}.note{color:var(--warn);margin:-12px 0 22px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:12px}.card{padding:14px 18px}
.card b{display:block;font-size:28px;line-height:1.25;letter-spacing:-.02em;font-weight:650}
.card i{display:block;font-style:normal;color:var(--ink)}.card small,small{color:var(--soft);font-size:12px}
dl{display:flex;flex-wrap:wrap;gap:8px 34px;margin:18px 2px}
dt{color:var(--soft);font-size:12px}dd{margin:0;font-weight:550}
.geo{display:flex;align-items:center;gap:14px;margin-bottom:6px}.geo em{font-style:normal;color:var(--soft);
font-size:12px;width:80px;flex:none}.geo>div{display:flex;flex:1;gap:3px;min-width:0}.geo div span{flex-basis:0;
min-width:0;overflow:hidden;white-space:nowrap;text-overflow:ellipsis;font-size:12px;padding:3px 10px;border-radius:5px;
background:color-mix(in srgb,var(--hue) 16%,var(--card))}.geo div .free{padding:0;background:repeating-linear-gradient(
-45deg,var(--line) 0 3px,transparent 3px 7px)}
section{padding:18px 22px 20px;margin-top:16px;min-width:0}h2{font-size:17px;margin:0 0 12px;letter-spacing:-.01em}
h2 .hint{font-weight:400;font-size:12px;color:var(--soft);margin-left:12px;letter-spacing:0}h3{font-size:13px;
font-weight:550;margin:16px 0 6px}.cols{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));
column-gap:16px}.tag{font-size:11px;font-weight:600;padding:1px 7px;border-radius:99px;white-space:nowrap;
color:var(--hue);background:color-mix(in srgb,var(--hue) 13%,transparent)}.tag.measured{color:var(--good);
background:color-mix(in srgb,var(--good) 15%,transparent)}.tag.binds,.tag.published{color:var(--warn);
background:color-mix(in srgb,var(--warn) 16%,transparent)}
.legend{display:inline-flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0 24px 0 0;padding:0;font-size:13px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}label{font-size:13px;
color:var(--soft);cursor:pointer;white-space:nowrap}label input{vertical-align:-2px;accent-color:var(--hue)}
.plot{display:grid;grid-template-columns:150px minmax(0,1fr)}.names div{height:30px;font-size:13px;line-height:1.15;
display:flex;flex-direction:column;justify-content:center}.names small{font-size:11px;white-space:nowrap}
.use .names div{height:46px}.use{margin-bottom:4px}.view{position:relative;overflow:hidden;cursor:crosshair}
svg{display:block;width:100%;touch-action:pan-y}.lanes svg{background:repeating-linear-gradient(var(--card) 0 2px,
var(--lane) 2px 28px,var(--card) 28px 30px)}rect{stroke:var(--lane);stroke-width:1;vector-effect:non-scaling-stroke}
rect:hover{filter:brightness(1.15)}.crit rect:not(.k){opacity:.13}.crit .nk{display:none}
.view .over{position:absolute;inset:0;pointer-events:none;overflow:hidden}.view .over span{position:absolute;
font-size:11px;line-height:24px;padding:0 5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.view .over b{position:absolute;top:0;bottom:0;background:var(--hue);opacity:.18}
.use line{stroke:var(--line);vector-effect:non-scaling-stroke}.use path{fill-opacity:.28;stroke-width:1.3;
vector-effect:non-scaling-stroke}.axis{grid-column:2;position:relative;height:22px;border-top:1px solid var(--line);
overflow:hidden}.axis span{position:absolute;font-size:11px;color:var(--soft);padding:2px 0 0 5px;
border-left:1px solid var(--line);white-space:nowrap}
table{width:100%;border-collapse:collapse;font-size:14px}th,td{padding:7px 14px 7px 0;border-top:1px solid var(--line);
text-align:right;font-weight:400;white-space:nowrap}tr:first-child>*{border:0;color:var(--soft);font-size:12px}
th{text-align:left;font-weight:550;white-space:normal;overflow-wrap:anywhere}th small{display:block;font-weight:400}
td:last-child{padding-right:0}tr.total>*{border-top:2px solid var(--line);font-weight:650}.meter{width:110px;height:8px;
border-radius:4px;background:var(--lane);overflow:hidden;display:inline-block}.meter i{display:block;height:100%;
background:var(--hue);opacity:.55}.binds .meter i{background:var(--warn);opacity:1}.meter.all i{background:var(--soft)}
footer{color:var(--soft);font-size:12px;margin:20px 4px}#tip{position:fixed;z-index:9;pointer-events:none;
white-space:pre-line;font-size:12px;max-width:420px;padding:8px 12px;border-radius:8px;background:var(--ink);
color:var(--bg);box-shadow:0 4px 18px #0004;overflow-wrap:anywhere}#tip::first-line{font-weight:650}
@media(max-width:700px){main{padding:20px 14px}.plot{grid-template-columns:84px minmax(0,1fr)}.names small{
white-space:normal;overflow:hidden;max-height:13px}.meter{width:48px}}
""" + "".join(
    f".c{i}{{fill:#{c};background:#{c};color:#{ink}}}.r{i}{{fill:#{c};stroke:#{c}}}\n"
    for i, (c, ink) in enumerate(pair.split() for pair in _INKS)
)

_JS = """
(()=>{const $=(q,r=document)=>[...r.querySelectorAll(q)],W=10000,tip=$('#tip')[0];let a=0,b=1,from=null;
$('rect').forEach(r=>{const t=r.firstChild;r.tip=t.textContent;t.remove()});
const time=s=>{for(const[k,u]of[[1,'s'],[1e-3,'ms'],[1e-6,'us']])if(Math.abs(s)>=k)return+(s/k).toPrecision(4)+' '+u;
return s?+(s*1e9).toPrecision(4)+' ns':'0'};
function draw(){$('.plot').forEach(p=>{const S=+p.dataset.s,svg=$('svg',p)[0],over=$('.over',p)[0];
svg.setAttribute('viewBox',[a*W,0,(b-a)*W,p.dataset.h]);const wide=svg.clientWidth,per=wide/((b-a)*W);over.innerHTML='';
$('rect',p).forEach(r=>{let x=(+r.getAttribute('x')-a*W)*per,w=+r.getAttribute('width')*per;
if(x<0){w+=x;x=0}w=Math.min(w,wide-x);if(w<26||!r.dataset.n||r.dataset.n.length*6.6+9>w&&w<70)return;
const s=document.createElement('span');s.textContent=r.dataset.n;s.className=r.classList[0]+(r.matches('.k')?'':' nk');
s.style.cssText=`left:${x}px;top:${r.getAttribute('y')}px;width:${w}px;background:none`;over.append(s)});
$('.axis',p).forEach(ax=>{const raw=S*(b-a)/Math.max(2,Math.min(9,wide/120)),d=10**Math.floor(Math.log10(raw)),
step=[1,2,5,10].map(m=>m*d).find(s=>s>=raw*.999);ax.innerHTML='';
for(let i=Math.ceil(a*S/step-1e-9);i*step<=b*S;i++){const s=document.createElement('span');s.textContent=time(i*step);
s.style.left=100*(i*step/S-a)/(b-a)+'%';ax.append(s)}})})}
const at=(e,v)=>{const r=v.getBoundingClientRect();return Math.min(1,Math.max(0,(e.clientX-r.left)/r.width))};
$('.view').forEach(v=>{v.onpointerdown=e=>{from=at(e,v);v.setPointerCapture(e.pointerId)};
v.onpointermove=e=>{if(from===null)return;const x=at(e,v),o=$('.over',v)[0],m=$('b',o)[0]||document.createElement('b');
m.style.left=100*Math.min(x,from)+'%';m.style.width=100*Math.abs(x-from)+'%';o.append(m)};
v.onpointerup=e=>{const x=at(e,v),l=Math.min(x,from),r=Math.max(x,from),n=b-a;from=null;
if(r-l>.005){b=a+r*n;a+=l*n}draw()};v.ondblclick=()=>{a=0;b=1;draw()}});
document.addEventListener('pointermove',e=>{const t=e.target.tip;tip.hidden=!t;if(!t)return;tip.textContent=t;
tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';
tip.style.top=(e.clientY+tip.offsetHeight+26>innerHeight?e.clientY-tip.offsetHeight-10:e.clientY+16)+'px'});
$('#crit').forEach(c=>c.onchange=()=>document.body.classList.toggle('crit',c.checked));
addEventListener('resize',draw);draw()})()
"""
