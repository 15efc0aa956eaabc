"""Registries: names of other packages, found by their entry points and loaded only when asked for."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import taskgraph as tg
from taskgraph.errors import BackendUnavailable, ExecutionError
from taskgraph.plugins import Registry

GROUP = "taskgraph.tests"
ROOT = Path(__file__).resolve().parents[1]


def install(folder: Path, package: str, entry_points: str, code: str = "") -> None:
    """What an installer leaves behind of a package of one module: the module and its metadata."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / f"{package}.py").write_text(code)


def registry() -> Registry[object]:
    return Registry("shape", GROUP, {"join": "posixpath:join"}, BackendUnavailable)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages are installed in; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_name_of_another_package_is_found_and_loaded_at_first_use(site: Path) -> None:
    install(site, "bringer", f"[{GROUP}]\nround = bringer:make\n", "def make(): return 7\n")
    shapes = registry()
    assert shapes.names() == ["join", "round"]
    assert "bringer" not in sys.modules
    assert shapes["round"]() == 7
    assert shapes["round"] is shapes["round"]


def test_an_own_name_stays_ours(site: Path) -> None:
    install(site, "thief", f"[{GROUP}]\njoin = thief:make\n", "raise AssertionError")
    assert registry()["join"]("a", "b") == "a/b"
    assert registry().names() == ["join"]


@pytest.mark.parametrize("name", ["square", "", 3, None, ["round"]])
def test_an_unknown_name_is_told_what_there_is(site: Path, name: object) -> None:
    install(site, "bringer", f"[{GROUP}]\nround = bringer:make\n", "raise AssertionError")
    with pytest.raises(BackendUnavailable, match=r"no shape .*; use one of join, round\.$"):
        registry()[name]


@pytest.mark.parametrize(
    ("value", "code", "match"),
    [
        ("broken:make", "import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("broken:make", "1 / 0", "ZeroDivisionError"),
        ("broken:make", "", "AttributeError"),
        ("no.such.module:make", "", "ModuleNotFoundError"),
        ("!", "", "cannot be loaded"),
        ("broken:make", "make = 3", "is 3, but must be a function"),
    ],
)
def test_a_broken_package_is_named(site: Path, value: str, code: str, match: str) -> None:
    install(site, "broken", f"[{GROUP}]\nround = {value}\n", code)
    with pytest.raises(BackendUnavailable, match=match) as caught:
        registry()["round"]
    assert "'broken'" in str(caught.value) and "'round'" in str(caught.value) and "\n" not in str(caught.value)
    assert registry()["join"]("a", "b") == "a/b"  # nobody else is harmed


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    for package in ("first", "second"):
        install(site, package, f"[{GROUP}]\nround = {package}:make\n", "def make(): return 7\n")
    with pytest.raises(BackendUnavailable, match="'first' and 'second' both bring a shape 'round'"):
        registry()["round"]


# -- one package with a backend and a scheduler ------------------------------------------------------------------------

BOTH = """
import numpy as np
from taskgraph.runtime.cpu.executable import CpuExecutable
from taskgraph.schedule.evaluate import Assignment, Layout

class OneByOne(CpuExecutable):
    takes = frozenset({"ways"})

    def _launch(self, stream):
        self.ran = []
        self._one_by_one(lambda op, run: (self.ran.append(op.name), run()))

def backwards(problem, budget):
    order = np.arange(problem.n)
    whole = np.full(problem.n, problem.mode_of(problem.sm_count))
    return Assignment(Layout.shared(problem.sm_count, 2), order, (order + 1) % 2, whole, made_by="by hand")

class Stranger:
    pass
"""
ENTRIES = """
[taskgraph.backends]
one-by-one = bringer_of_both:OneByOne
stranger = bringer_of_both:Stranger
[taskgraph.schedulers]
other-lane-first = bringer_of_both:backwards
"""


def mixed() -> tg.Graph:
    b = tg.GraphBuilder("mixed")
    x, w = b.input("x", (6, 8), "f32"), b.weight("w", (8, 8), "f32")
    left, right = tg.ops.gemm(x, w, name="left"), tg.ops.add(x, x, name="right")
    b.output(tg.ops.add(left, right, name="sum"))
    return b.build()


def test_a_package_brings_a_backend_and_a_scheduler(site: Path) -> None:
    install(site, "bringer_of_both", ENTRIES, BOTH)
    graph = mixed()
    plan = tg.plan(graph, "cpu", scheduler="other-lane-first")
    assert [step.lane for step in plan.steps] == [1, 0, 1]
    x, w = torch.randn(6, 8), torch.randn(8, 8)
    with tg.compile(graph, plan, backend="one-by-one") as exe:
        torch.testing.assert_close(exe(x=x, w=w)["sum.out"], x @ w + 2 * x)
        assert exe.ran == ["left", "right", "sum"]  # type: ignore[attr-defined]
    with pytest.raises(ExecutionError, match="closed"):
        exe.launch()
    with pytest.raises(BackendUnavailable, match=r"device='virtual:h100_sxm': the one-by-one backend has no choice"):
        tg.compile(graph, plan, backend="one-by-one", device="virtual:h100_sxm")
    with pytest.raises(BackendUnavailable, match=r"'stranger' of the package 'bringer_of_both' is .*must be a class"):
        tg.compile(graph, plan, backend="stranger")
    with pytest.raises(BackendUnavailable, match=r"no backend 'tpu'; use one of cpu, sim, cuda, one-by-one, stranger"):
        tg.compile(graph, plan, backend="tpu")


def test_the_backend_of_contributing(site: Path) -> None:
    """Its file and its line, as they stand there, in a package of their own."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add a backend")[1].split("\n## ")[0]
    for path in re.findall(r"`((?:taskgraph|tests)/[\w/.]+)`", section):
        assert "counted" in path or (ROOT / path).exists(), path
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    entries = blocks["toml"].replace("project.entry-points.", "").replace('"', "")
    install(site, "taskgraph_counted", entries, blocks["python"])
    graph = mixed()
    plan = tg.plan(graph, "h100_sxm")
    with tg.compile(graph, plan, backend="counted") as exe:
        assert exe() == {} and exe.timeline() == plan.timeline
        exe.launch()
        exe.check()
        assert exe.replays == dict.fromkeys(("left", "right", "sum"), 3)  # type: ignore[attr-defined]
    line = re.search(r'`"counted": "([\w.]+):(\w+)",`', section)
    assert line is not None and line[1].startswith("taskgraph.runtime.") and f"class {line[2]}(" in blocks["python"]
