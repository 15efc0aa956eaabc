"""The page at /: what its file and headers hold, and what a real browser makes of it against a real server."""

import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from taskgraph.models.paged import Bucket
from taskgraph.serving.cache.pages import PagedCache
from taskgraph.serving.engine import Engine
from taskgraph.serving.http.access import Access
from taskgraph.serving.http.app import Served, create_app
from taskgraph.serving.http.keys import ApiKey, KeyRing
from taskgraph.serving.http.page import page_headers, page_text
from taskgraph.serving.requests import Request
from taskgraph.serving.runners.runner import Planned, Ran
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.service import Service
from tests.serve_cases import CONTEXT, PAGE, VOCABULARY, FormulaRunner, byte_tokenizer, make_served
from tests.serving.http.test_serve import get
from tests.serving.http.test_status import tiny_engine

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DRIVERS = ("chromedriver", "chromium-driver")
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>&lt;b&gt;'
SOON_S = 60
"""How long a browser on a busy machine may take for anything."""

Start = Callable[..., str]


# ------------------------------------------------------------------------------ the file, without a browser


def test_the_page_holds_all_that_it_needs() -> None:
    page = page_text()
    assert not re.search(r"https?:|(src|href)=(?!\"data:)|@import|url\(", page.lower())
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", page)
    assert not re.search(r"<[^>]* (on\w+|style)=", page)  # what the policy would forbid
    assert len(re.findall(r"<script", page)) == len(re.findall(r"<style", page)) == 1


def test_the_policy_allows_the_pages_own_script_and_style_only() -> None:
    served = make_served()
    try:
        answer = get(served, "/")
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert answer.text == page_text()
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        for kind in ("script-src", "style-src"):
            assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])
        assert (
            page_headers(page_text().replace("'use strict'", "'used'"))["Content-Security-Policy"]
            != (answer.headers["content-security-policy"])
        )
    finally:
        served.service.close()


# ------------------------------------------------------------------------------------- what is served


@dataclass
class Spelling(FormulaRunner):
    """A model that spells `text` over and over, whatever it is asked; its steps have a plan with the op `op`."""

    text: str = ""
    op: str = ""
    dtype: str = "f32"
    last: Ran | None = None
    spelled: int = 0
    planned_by: Planned | None = None

    def _next(self, token: int) -> int:
        self.last = Ran(Bucket(1), 0.25)
        letters = byte_tokenizer().encode(self.text)
        self.spelled += 1
        return letters[(self.spelled - 1) % len(letters)]

    def planned_step(self, bucket: Bucket) -> Planned | None:
        assert self.planned_by is not None
        plan, kinds = self.planned_by.plan, self.planned_by.kinds
        spans = tuple(replace(span, op=self.op + span.op) for span in plan.timeline.spans)
        timeline = replace(plan.timeline, spans=spans)
        return Planned(replace(plan, timeline=timeline), {self.op + op: self.op + kind for op, kind in kinds.items()})


def spelling(text: str, name: str, planned: Planned) -> Served:
    runner = Spelling(text=text, op=HOSTILE, planned_by=planned)
    limits = Limits(sequences=8, tokens=64, chunks=8, context=CONTEXT)
    return Served(Service(Engine(runner, PagedCache(256, PAGE), limits, vocabulary=VOCABULARY)), byte_tokenizer(), name)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A real engine with a tiny model, whose steps are planned; its service closes it."""
    return tiny_engine()


@pytest.fixture(scope="module")
def tiny(engine: Engine) -> Iterator[Served]:
    with Service(engine) as service:
        yield Served(service, byte_tokenizer(), "tiny")


@pytest.fixture
def start() -> Iterator[Start]:
    """Serves what it is given on a free port, and says the address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def begin(served: Served, access: Access | None = None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(served, access), log_level="warning", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield begin
    for server, thread in running:
        server.should_exit = True
        server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()


# --------------------------------------------------------------------------------------- the browser


@dataclass(frozen=True)
class Tab:
    """A browser's tab."""

    chrome: Chrome

    def open(self, url: str) -> None:
        self.chrome.get_log("browser")
        self.chrome.get_log("performance")
        self.chrome.get(url)

    def at(self, name: str) -> WebElement:
        return self.chrome.find_element(By.ID, name)

    def all(self, css: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, css)

    def text(self, name: str) -> str:
        found = self.at(name).get_property("textContent")
        assert isinstance(found, str)
        return found

    def number(self, name: str) -> float:
        return float(self.text(name).replace(",", "") or "nan")

    def until(self, what: Callable[[], Any]) -> Any:
        return WebDriverWait(self.chrome, SOON_S, 0.05).until(lambda _: what())

    def run(self, script: str, *args: Any) -> Any:
        return self.chrome.execute_script(script, *args)

    def width(self, pixels: int, height: int = 800) -> None:
        size = {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def say(self, text: str) -> None:
        self.at("text").send_keys(text + Keys.ENTER)

    def ended(self) -> str:
        """What the last answer says of itself, once it has ended."""
        self.until(lambda: self.at("send").is_displayed() and self.all(".turn.assistant:last-child small"))
        return self.all(".turn.assistant:last-child small")[0].text

    def answer(self) -> str:
        found = self.all(".turn.assistant p")[-1].get_property("textContent")
        assert isinstance(found, str)
        return found

    def complaints(self) -> list[str]:
        """What the browser's console has, since the page was opened."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]  # type: ignore[no-untyped-call]

    def hosts(self) -> set[str]:
        """The hosts that were asked for anything, since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]  # type: ignore[no-untyped-call]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).hostname or "" for url in urls if not url.startswith("data:")}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = next(filter(None, map(shutil.which, DRIVERS)), None)
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        chrome = Chrome(options=options, service=ChromeService(driver))
    except WebDriverException as error:
        pytest.skip(f"{browser} does not start here: {(error.msg or '').splitlines()[0]}")
    chrome.set_page_load_timeout(SOON_S)
    try:
        yield Tab(chrome)
    finally:
        chrome.quit()


@pytest.fixture(autouse=True)
def _wide(request: pytest.FixtureRequest) -> None:
    if "tab" in request.fixturenames:
        request.getfixturevalue("tab").width(1280)


# ------------------------------------------------------------------------------------------ the tests


@pytest.mark.slow
def test_a_chat_is_streamed_and_the_numbers_move(tab: Tab, start: Start, tiny: Served) -> None:
    tab.open(start(tiny))
    tab.until(lambda: tab.text("model") == "tiny")
    assert tab.number("pages") == 24
    tab.at("text").send_keys("two", Keys.SHIFT + Keys.ENTER)  # breaks the line; nothing is sent
    tab.at("text").send_keys(Keys.NULL + "lines")
    tab.say("")
    assert "token" in tab.ended()
    assert tab.all(".turn.user p")[0].get_property("textContent") == "two\nlines"
    assert tab.answer()
    made = tiny.service.engine.stats.tokens
    assert made > 0
    tab.until(lambda: f"{made} tokens generated" in tab.text("totals").replace(",", ""))
    tab.until(lambda: (tab.number("running"), tab.number("waiting"), tab.number("held")) == (0, 0, 0))

    def idle_and_not() -> bool:
        curve = tab.at("curve").get_attribute("d") or ""
        heights = {float(y) for y in re.findall(r"[ML][\d.-]+ ([\d.]+)", curve)}
        return 100.0 in heights and min(heights) < 100

    tab.until(idle_and_not)
    assert tab.complaints() == []
    assert tab.hosts() == {"127.0.0.1"}


@pytest.mark.slow
def test_the_last_plan_is_drawn_and_can_be_read_by_keyboard(tab: Tab, start: Start, tiny: Served) -> None:
    tab.open(start(tiny))
    tab.until(lambda: tab.text("model") == "tiny")
    tab.say("abc")
    tab.ended()
    tab.until(lambda: "decoding" in tab.text("step") and "prompt" not in tab.text("step"))
    runner: Any = tiny.service.engine.runner
    plan = runner.planned_step(runner.last.bucket).plan
    bars = tab.all("#bars rect:not(.real)")
    labels = [bar.get_attribute("aria-label") or "" for bar in bars]
    spans = sorted(plan.timeline.spans, key=lambda span: (span.lane, span.start_s))
    assert [label.split("\n")[0] for label in labels] == [span.op for span in spans]
    assert all("(simulated)" in label for label in labels)
    ends = [float(bar.get_attribute("x") or 0) + float(bar.get_attribute("width") or 0) for bar in bars]
    ratio = (spans[3].end_s - spans[0].start_s) / (spans[-1].end_s - spans[0].start_s)
    assert ends[3] / ends[-1] == pytest.approx(ratio, rel=1e-2)
    assert {item.text.rsplit(" ", 2)[0] for item in tab.all("#legend li")} >= {"gemm", "rmsnorm", "paged_decode"}
    assert "predicted" in tab.text("numbers") and "measured" in tab.text("numbers")
    tab.run("arguments[0].focus()", bars[0])
    assert tab.text("tip").startswith(spans[0].op)
    tab.chrome.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert tab.text("tip").startswith(spans[1].op)
    assert tab.complaints() == []


@pytest.mark.slow
def test_stop_ends_the_answer_and_frees_its_pages(tab: Tab, start: Start) -> None:
    served = make_served(step_s=0.03)
    try:
        tab.open(start(served))
        tab.until(lambda: tab.text("model") == "formula")
        tab.say("abc")
        tab.until(lambda: len(tab.answer()) > 3)
        tab.until(lambda: tab.number("running") == 1 and tab.number("held") > 0)
        tab.at("stop").click()
        assert "stopped" in tab.ended()
        tab.until(lambda: served.service.open == 0)
        assert 3 < len(tab.answer()) < CONTEXT - 20
        tab.until(lambda: (tab.number("running"), tab.number("held")) == (0, 0))
        tab.say("abc")  # and the next is taken, with the one before in its prompt
        tab.until(lambda: len(tab.all(".turn.assistant")) == 2 and len(tab.answer()) > 3)
        tab.at("text").send_keys(Keys.ESCAPE)
        assert "stopped" in tab.ended()
        assert tab.complaints() == []
    finally:
        served.service.close()


@pytest.mark.slow
def test_system_prompt_temperature_and_length_are_sent(tab: Tab, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    served = make_served()
    seen: list[Request] = []
    submit = served.service.engine.submit
    monkeypatch.setattr(served.service.engine, "submit", lambda request: seen.append(request) or submit(request))
    try:
        tab.open(start(served))
        tab.until(lambda: tab.text("model") == "formula")
        tab.all("summary")[0].click()
        tab.at("system").send_keys("be brief")
        tab.at("temperature").clear()
        tab.at("temperature").send_keys("0.4")
        tab.at("length").send_keys("5")
        tab.say("abc")
        assert "5 tokens" in tab.ended() and "length" in tab.ended()
        (asked,) = seen
        assert byte_tokenizer().decode(list(asked.prompt)) == "system:be briefuser:abc"
        assert (asked.max_tokens, asked.sampling.temperature) == (5, 0.4)
        assert tab.complaints() == []
    finally:
        served.service.close()


@pytest.mark.slow
def test_what_models_plans_and_names_say_is_text(tab: Tab, start: Start, engine: Engine, tiny: Served) -> None:
    runner: Any = engine.runner
    if runner.last is None:
        engine.run([Request([1, 2], max_tokens=2)])
    served = spelling(HOSTILE, HOSTILE, runner.planned_step(runner.last.bucket))
    try:
        tab.open(start(served))
        tab.until(lambda: tab.text("model") == HOSTILE)
        tab.run("document.getElementById('length').value = arguments[0]", 2 * len(HOSTILE))
        tab.say(HOSTILE)
        tab.ended()
        assert HOSTILE in tab.answer()
        assert tab.all(".turn.user p")[0].get_property("textContent") == HOSTILE
        tab.until(lambda: tab.all("#bars rect:not(.real)"))
        assert (tab.all("#bars rect")[0].get_attribute("aria-label") or "").startswith(HOSTILE)
        assert HOSTILE in tab.text("legend")
        assert (len(tab.all("img")), len(tab.all("script")), tab.run("return window.hit")) == (0, 1, None)
        assert tab.complaints() == []
        inject = "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s)"
        with pytest.raises(WebDriverException, match="Trusted"):
            tab.run(inject)  # nor could it, were the page wrong
        assert tab.run("return window.hit") is None
    finally:
        served.service.close()


@pytest.mark.slow
def test_a_key_is_asked_for_kept_in_the_tab_and_sent(tab: Tab, start: Start) -> None:
    served = make_served()
    keys = KeyRing((ApiKey.of("tg-right", "alice", "all"),))
    try:
        tab.open(start(served, Access(keys)))
        tab.until(lambda: tab.at("key").is_displayed())
        assert tab.text("model") == ""
        tab.at("key").send_keys("tg-wrong" + Keys.ENTER)
        tab.until(lambda: "does not know" in tab.text("key-why") and tab.at("key").is_displayed())
        tab.at("key").send_keys("tg-right" + Keys.ENTER)
        tab.until(lambda: tab.text("model") == "formula")
        assert tab.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        tab.say("abc")
        assert "token" in tab.ended()
        tab.chrome.refresh()
        tab.until(lambda: tab.text("model") == "formula")  # without asking again
        assert not tab.at("key").is_displayed()
        assert all(" 401 " in message for message in tab.complaints())
    finally:
        tab.run("sessionStorage.clear()")
        served.service.close()


@pytest.mark.slow
def test_refusals_are_shown_and_the_question_is_kept(tab: Tab, start: Start) -> None:
    served = make_served()
    try:
        tab.open(start(served))
        tab.until(lambda: tab.text("model") == "formula")
        tab.say("a" * (CONTEXT + 20))
        tab.until(lambda: tab.all(".turn .error"))
        assert "context" in tab.all(".turn .error")[0].text
        assert len(tab.at("text").get_property("value")) == CONTEXT + 20  # type: ignore[arg-type]
        served.service.close()
        tab.until(lambda: tab.text("state") == "stopping")
    finally:
        served.service.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way_and_everything_has_a_name(tab: Tab, start: Start, tiny: Served, scheme: str) -> None:
    tab.width(360, 740)
    tab.chrome.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    tab.open(start(tiny))
    tab.until(lambda: tab.text("model") == "tiny")
    tab.say("w" * 60)
    tab.ended()
    tab.until(lambda: tab.all("#bars rect"))
    assert tab.run("return document.documentElement.scrollWidth") <= 360
    back, ink = (
        sum(map(int, re.findall(r"\d+", tab.run(f"return getComputedStyle(document.body).{which}"))[:3]))
        for which in ("backgroundColor", "color")
    )
    assert (back < ink) == (scheme == "dark")
    for control in tab.all("button, input, textarea, summary, [role]"):
        assert control.accessible_name or not control.is_displayed() or control.get_attribute("role") == "status"
    tab.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
