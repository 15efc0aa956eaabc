"""Observe: what explain says, the Chrome trace, and the HTML report, of a plan written by hand."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from taskgraph.graph import device
from taskgraph.graph.device import Geometry
from taskgraph.observe.explain import critical_path, explain, group_name, least_use, path_shares, remark, stem
from taskgraph.observe.report import write_report
from taskgraph.observe.trace import write_trace
from taskgraph.schedule.plan import Bounds, Lane, Plan, Span, Step, Timeline, Verdict

NASTY = 'layer.1/<img src="x">&'


@pytest.fixture
def plan() -> Plan:
    """Lane 0: qkv of two layers, then the nasty op; lane 1: a copy that the second qkv waits for."""
    spans = (
        Span("layer.0/qkv", 0, 0.0, 2e-6),
        Span("page_in", 1, 0.0, 5e-6),
        Span("layer.1/qkv", 0, 5e-6, 8e-6),
        Span(NASTY, 0, 8e-6, 10e-6),
        Span("tail", 1, 5e-6, 6e-6),
    )
    return Plan(
        graph="0123456789abcdef",
        graph_name="two-lanes",
        device=device.get("h100_sxm"),
        geometries=(Geometry.of(96, 32),),
        lanes=(Lane(0, 0), Lane(0, 1)),
        steps=(
            Step("layer.0/qkv", 0),
            Step("page_in", 1),
            Step("layer.1/qkv", 0, (1,)),
            Step(NASTY, 0),
            Step("tail", 1),
        ),
        arena=(),
        arena_bytes=3_000_000,
        timeline=Timeline("simulated", "h100_sxm", spans),
        bounds=Bounds(chain_s=4e-6, sm_s=6e-6, hbm_s=8e-6, h2d_s=5e-6, d2h_s=0.0, link_s=0.0),
        verdict=Verdict("packed", 10e-6, 11.8e-6, 0.1),
        made_by="hand",
    )


@pytest.fixture
def timelines(plan: Plan) -> dict[str, Timeline]:
    late = tuple(replace(s, start_s=100 + 2 * s.start_s, end_s=100 + 2 * s.end_s) for s in plan.timeline.spans)
    return {"predicted": plan.timeline, "measured": Timeline("measured", "this machine", late)}


class Page(HTMLParser):
    """Collects tags with their attributes, checks that they close, and keeps the text."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_group_name_and_stem_collapse_layers_and_slices() -> None:
    assert group_name("layer.3/qkv") == "layer.*/qkv"
    assert group_name("layer.12/up.1") == "layer.*/up.*"
    assert group_name("fp8_gemm2") == "fp8_gemm2"
    assert (stem("layer.3/qkv"), stem("layer.12/up.1"), stem("plain")) == ("qkv", "up", "plain")


def test_critical_path_follows_the_wait(plan: Plan) -> None:
    assert [span.op for span in critical_path(plan)] == ["page_in", "layer.1/qkv", NASTY]
    assert path_shares(plan)[0] == ("page_in", 1, 5e-6)


def test_critical_path_reports_idle_time(plan: Plan) -> None:
    spans = tuple(replace(s, end_s=4e-6) if s.op == "page_in" else s for s in plan.timeline.spans)
    idle = replace(plan, timeline=replace(plan.timeline, spans=spans))
    assert ("(nothing runs)", 1) in [(name, count) for name, count, _ in path_shares(idle)]
    assert sum(seconds for *_, seconds in path_shares(idle)) == pytest.approx(idle.makespan_s)


def test_a_measured_time_beyond_the_band_is_remarked_everywhere(
    plan: Plan, timelines: dict[str, Timeline], tmp_path: Path
) -> None:
    """Predicted 10 us within 10 %: 14 times that is no time of this machine at rest."""
    assert remark(plan, 10.9e-6) == remark(plan, 9.2e-6) == remark(plan, 0.0) == ""
    cpu = replace(plan, device=device.make("h100_sxm", name="cpu", kind="cpu"))
    said = remark(cpu, 140e-6)
    for part in ("140 us", "14.00x", "10 us", "±10 %", "busy", "stale", "taskgraph doctor --probe"):
        assert part in said, part
    assert "doctor" not in remark(plan, 140e-6) and "14.00x" in remark(plan, 140e-6), "a GPU is not probed by doctor"
    assert "faster" in remark(cpu, 2e-6)
    noisy = ("probe", "not kept: others had 43% of the cores while it was measured")
    assert "43%" in remark(replace(cpu, device=replace(cpu.device, sources=(noisy,))), 140e-6)
    whole = " ".join(explain(cpu, measured_s=140e-6).split())
    assert said in whole and "note:" not in explain(cpu)
    tuned = replace(cpu, verdict=Verdict("packed", 140e-6, 150e-6, 0.01, "measured"))
    assert "14.00x the prediction" in " ".join(explain(tuned).split())
    late = tuple(replace(s, start_s=14 * s.start_s, end_s=14 * s.end_s) for s in plan.timeline.spans)
    slow = timelines | {"measured": Timeline("measured", "this machine", late)}
    write_report(tmp_path / "busy.html", cpu, slow)
    assert said in Page((tmp_path / "busy.html").read_text()).text
    write_report(tmp_path / "calm.html", cpu, {"predicted": plan.timeline})
    assert "note:" not in Page((tmp_path / "calm.html").read_text()).text


def test_one_figure_for_one_bound_wherever_it_stands(plan: Plan, tmp_path: Path) -> None:
    """The SM bound is 6 of 10 us: explain, the table of bounds and the charts say so; what is in use is called that."""
    assert least_use(plan)["sm"] == pytest.approx(0.6)
    text = explain(plan)
    assert len(re.findall(r"\bsm +(?:6 us +)?60\.0%", text)) == 2 and "utilisation" not in text
    write_report(tmp_path / "r.html", plan, {}, utilisation={"sm": [(0.0, 0.9), (5e-6, 0.7)]})
    page = " ".join(Page((tmp_path / "r.html").read_text()).text.split())
    assert page.count("60.0%") == 2, "beside the chart and in the table of bounds"
    assert "in use 80.0%, meanneeded at least 60.0%" in page


def test_explain_says_path_bound_and_verdict(plan: Plan) -> None:
    text = explain(plan)
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 100
    assert re.search(r"page_in +1 +5 us +50\.0%", text)
    assert re.search(r"layer\.\*/qkv +1 +3 us +30\.0%", text)
    assert re.search(r"hbm +8 us +80\.0% +<- binds", text)
    assert "gap 1.250x of the hbm bound" in text
    assert "simulated on device h100_sxm" in text
    assert "packed: 1.18x faster than the sequential graph, simulated, error band ±10 %; survives the band" in text
    assert "\x1b[" in explain(plan, color=True)


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (Verdict("sequential", 10.3, 10.0, 0.1), "sequential: packing would take 1.03x"),
        (Verdict("sequential", 10.0, 10.0, 0.1), "sequential: no packing was found that beats it"),
        (Verdict("packed", 10.0, 10.5, 0.1), "error band ±10 %; does not survive the band"),
        (Verdict("packed", 10.5, 10.0, 0.1), "packed: 1.05x slower"),
    ],
)  # fmt: skip
def test_explain_words_every_verdict(plan: Plan, verdict: Verdict, says: str) -> None:
    assert says in " ".join(explain(replace(plan, verdict=verdict)).split())


def test_explain_of_an_empty_timeline(plan: Plan) -> None:
    empty = replace(plan, steps=(), timeline=replace(plan.timeline, spans=()))
    assert "0 ns" in explain(empty)


def test_trace_has_a_track_a_lane_and_right_durations(
    plan: Plan, timelines: dict[str, Timeline], tmp_path: Path
) -> None:
    write_trace(tmp_path / "trace.json", timelines, plan)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"predicted (simulated, h100_sxm)", "measured (measured, this machine)"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(tracks) == 4 and tracks[1, 2] == "lane 1: 32 SM [96, 128)"
    spans = [e for e in events if e["ph"] == "X"]
    assert {(e["pid"], e["tid"]) for e in spans} == set(tracks)
    page = {e["pid"]: e for e in spans if e["args"]["op"] == "page_in"}
    assert (page[1]["ts"], page[1]["dur"]) == (0, pytest.approx(5))
    assert (page[2]["ts"], page[2]["dur"]) == (0, pytest.approx(10, rel=1e-6))
    assert page[2]["args"]["kind"] == "measured"


def test_trace_is_what_perfetto_reads(plan: Plan, timelines: dict[str, Timeline], tmp_path: Path) -> None:
    """The rules of the Trace Event Format for the two phases we write; Perfetto's JSON importer follows them.

    "Trace Event Format", Duncan and others, Google 2013 to 2016: metadata events carry args.name or args.sort_index;
    complete events carry ts and dur in microseconds, nest or follow each other on a thread, and never overlap.
    """
    write_trace(tmp_path / "trace.json", timelines, plan)
    text = (tmp_path / "trace.json").read_text()
    body = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert isinstance(body["traceEvents"], list) and body["displayTimeUnit"] in ("ms", "ns")
    keys = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index"}
    keys["thread_sort_index"] = "sort_index"
    ends: dict[tuple[int, int], float] = {}
    for event in body["traceEvents"]:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["name"], str)
        if event["ph"] == "M":
            value = event["args"][keys[event["name"]]]
            assert isinstance(value, str if "name" in keys[event["name"]] else int)
            assert event["pid"] not in {pid for pid, _ in ends}, "names come before the spans of their process"
            continue
        assert event["ph"] == "X" and isinstance(event["cat"], str) and isinstance(event["args"], dict)
        assert event["ts"] >= 0 and event["dur"] >= 0
        track = (event["pid"], event["tid"])
        assert event["ts"] >= ends.get(track, 0.0) - 1e-6
        ends[track] = event["ts"] + event["dur"]
    longest = {pid: max(end for (p, _), end in ends.items() if p == pid) for pid in (1, 2)}
    assert longest == {1: pytest.approx(10.0), 2: pytest.approx(20.0)}, "microseconds"


def test_report_is_one_file_and_escapes_names(plan: Plan, timelines: dict[str, Timeline], tmp_path: Path) -> None:
    facts, table = {"tokens/s": "12,345 (simulated)"}, [("batch", "step"), ("<8>", "1 ms")]
    write_report(tmp_path / "r.html", plan, timelines, facts, table)
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.open == [] and page.count("rect") == 10 and page.count("img") == 0
    assert not re.search(r"https?:|@import|url\(", text)
    assert not any({"src", "href"} & set(attrs) for _, attrs in page.tags)
    assert NASTY not in text and NASTY in page.text
    for part in ("12,345 (simulated)", "<8>", "simulated", "measured", "1.18×", "gap 1.250x", "binds"):
        assert part in page.text


def test_report_takes_utilisation_and_other_lanes(plan: Plan, tmp_path: Path) -> None:
    other = Timeline("measured", "cpu", (Span("qkv", 5, 0.0, 1e-3),))
    write_report(tmp_path / "r.html", plan, {"x": other}, utilisation={"sm": [(0.0, 0.5), (5e-6, 1.0)], "hbm": []})
    assert Page((tmp_path / "r.html").read_text()).count("path") == 2


def test_report_merges_what_is_under_a_pixel(plan: Plan, tmp_path: Path) -> None:
    spans = tuple(Span(f"layer.{i}/op", i % 2, i * 1e-6, (i + 1) * 1e-6) for i in range(20_000))
    many = replace(plan, timeline=replace(plan.timeline, spans=spans), steps=())
    write_report(tmp_path / "r.html", many, {"predicted": many.timeline})
    page = Page((tmp_path / "r.html").read_text())
    assert 1_000 < page.count("rect") < 5_000 and "short ops" in page.text
