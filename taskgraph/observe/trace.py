"""Timelines as a Chrome trace: open it in Perfetto or chrome://tracing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskgraph.cache import write_atomically
from taskgraph.errors import PlanError
from taskgraph.observe.explain import group_name, lane_place, stem
from taskgraph.record import instance, text
from taskgraph.schedule.plan import Plan, Span, Timeline, writing
from taskgraph.schedule.verify import check_readable, check_timeline


def write_trace(path: str | Path, timelines: Mapping[str, Timeline], plan: Plan) -> None:
    """Write `timelines`, by label, as trace-event JSON: a process for each timeline and a track for each lane.

    PlanError for a damaged plan or timeline, and where the file cannot be written."""
    check_timelines(plan, timelines)
    events: list[dict[str, Any]] = []
    for pid, (label, timeline) in enumerate(timelines.items(), start=1):
        events += _process(pid, label, timeline, plan)
    about = {"graph": plan.graph_name, "fingerprint": plan.graph, "device": plan.device.name, "made_by": plan.made_by}
    body = {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}
    with writing(path) as place:
        write_atomically(place, json.dumps(body))


def check_timelines(plan: Plan, timelines: Mapping[str, Timeline]) -> None:
    """PlanError unless the plan and the timelines, by label, can be shown."""
    check_readable(plan)
    for label, timeline in instance("timelines", timelines, Mapping, PlanError, "It holds them by label.").items():
        text("the label of a timeline", label, PlanError)
        check_timeline(timeline)


def _process(pid: int, label: str, timeline: Timeline, plan: Plan) -> list[dict[str, Any]]:
    """The names of one timeline's tracks, then its spans in order of time, from its own zero."""
    title = f"{label} ({timeline.kind}, {timeline.origin})"
    events = [_about(pid, 0, "process_name", name=title), _about(pid, 0, "process_sort_index", sort_index=pid)]
    for lane in sorted({*range(len(plan.lanes)), *(s.lane for s in timeline.spans)}):
        place = lane_place(plan, lane)
        events.append(_about(pid, lane + 1, "thread_name", name=f"lane {lane}: {place}" if place else f"lane {lane}"))
        events.append(_about(pid, lane + 1, "thread_sort_index", sort_index=lane))
    zero = min((s.start_s for s in timeline.spans), default=0.0)
    in_order = sorted(timeline.spans, key=lambda s: (s.start_s, s.lane))
    return events + [_complete(pid, span, zero, timeline.kind) for span in in_order]


def _complete(pid: int, span: Span, zero: float, kind: str) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": pid,
        "tid": span.lane + 1,
        "name": span.op,
        "cat": stem(span.op),
        "ts": (span.start_s - zero) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "args": {"op": span.op, "group": group_name(span.op), "kind": kind},
    }


def _about(pid: int, tid: int, what: str, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args}
