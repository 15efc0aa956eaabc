"""The documentation runs: every Python block of docs/*.md and the README, and every file in examples/."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Call

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A ```python block: its first line in the page, its code, and the text that stands under it, if any."""

    line: int
    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The ```python blocks of a page. A ```text block belongs to the one that it follows with only blanks between."""
    found = list(_FENCE.finditer(page))
    result = []
    for i, fence in enumerate(found):
        if fence[1] != "python":
            continue
        after = found[i + 1] if i + 1 < len(found) else None
        joined = after is not None and after[1] == "text" and not page[fence.end() : after.start()].strip()
        line = page.count("\n", 0, fence.start()) + 2
        result.append(Block(line, fence[2], after[2] if joined and after is not None else None))
    return result


def fenced(page: str, language: str) -> str:
    """All blocks of a page in that language, one after another."""
    return "\n\n".join(fence[2] for fence in _FENCE.finditer(page) if fence[1] == language)


def matches(wanted: str, got: str) -> bool:
    """Line by line equal; `...` in a wanted line stands for any text within that line."""
    left, right = wanted.rstrip().split("\n"), got.rstrip().split("\n")
    if len(left) != len(right):
        return False
    return all(
        re.fullmatch(".*".join(map(re.escape, a.rstrip().split("..."))), b.rstrip()) is not None
        for a, b in zip(left, right, strict=True)
    )


def run_page(path: Path) -> int:
    """Execute the blocks of a page in order in one namespace; AssertionError when an output differs."""
    namespace: dict[str, Any] = {"__name__": f"docs_{path.stem}"}
    found = blocks(path.read_text())
    for block in found:
        out = io.StringIO()
        code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(path), "exec"), namespace)
        if block.output is not None and not matches(block.output, out.getvalue()):
            pytest.fail(
                f"{path.name}:{block.line} prints\n{out.getvalue()}\nbut the page shows\n{block.output}", pytrace=False
            )
    return len(found)


# cuda.md runs below, extend.md in test_extend.py: each in a process on the virtual driver
@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in ("cuda.md", "extend.md")], ids=lambda p: p.name)
def test_page_runs_and_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # pages write plans and traces into the current folder
    assert run_page(path) > 0


def test_the_page_on_cuda_runs_on_the_virtual_driver(on_virtual: Call) -> None:
    assert on_virtual(run_page, ROOT / "docs" / "cuda.md") > 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_three_pages_exist() -> None:
    assert {"declare.md", "plan.md", "run.md"} <= {p.name for p in PAGES}
    assert EXAMPLES


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_to_files_exist(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    missing = [t for t in targets if not (path.parent / t).exists() and not t.endswith("report.png")]
    assert not missing


def test_blocks_pair_code_with_the_text_right_under_it() -> None:
    page = "a\n```python\nx = 1\n```\n\n```text\n1\n```\n```python\ny\n```\nwords\n```text\n2\n```\n"
    assert blocks(page) == [Block(3, "x = 1\n", "1\n"), Block(10, "y\n", None)]


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ("a\nb\n", "a\nb", True),
        ("took ... us", "took 12 us", True),
        ("took ... us", "took 12 ms", False),
        ("a", "a\nb", False),
        ("1.0", "1x0", False),
    ],
)
def test_output_comparison(wanted: str, got: str, same: bool) -> None:
    assert matches(wanted, got) is same
