"""Registries: names of other packages, found by their entry points and loaded only when asked for."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskgraph.errors import BackendUnavailable
from taskgraph.plugins import Registry

GROUP = "taskgraph.tests"


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
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
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
