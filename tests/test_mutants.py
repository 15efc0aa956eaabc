"""What `make mutants` changes: places of the code that run, the same for a seed, and a list that is not out of date."""

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="cosmic-ray is not installed")

from benchmarks.mutants import ROOT, mutants, targets

CONFIG = tomllib.loads((ROOT / "benchmarks/mutants.toml").read_text())
SOURCE = '''
"""About 1 thing."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


def first(count: int | None, most: "int | None" = None) -> int | None:
    """The first."""
    if count is not None and count > 3:
        return count + 1
    for _ in range(2):
        break
    return None
'''


def test_what_runs_is_changed_once_a_place_and_what_does_not_is_not() -> None:
    found = list(mutants(SOURCE, 7))
    assert {m.where for m in found} == {"first"}
    assert {m.before for m in found} == {
        "if count is not None and count > 3:", "return count + 1", "for _ in range(2):", "break"
    }  # fmt: skip
    assert len(found) == 10  # the if, is not, and, >, 3; +, 1; the loop, 2; break. (`in` is none of the operators')
    for mutant in found:
        compile(mutant.text, "mutant", "exec")
        changed = [
            i for i, (a, b) in enumerate(zip(SOURCE.splitlines(), mutant.text.splitlines(), strict=True)) if a != b
        ]
        assert changed == [mutant.line - 1]


def test_a_seed_gives_the_same_places_and_an_edit_elsewhere_leaves_them() -> None:
    keys = [m.key for m in mutants(SOURCE, 7)]
    assert [m.key for m in mutants(SOURCE, 7)] == keys
    assert [m.key for m in mutants(SOURCE, 8)] != keys
    longer = SOURCE.replace("def first", "def zeroth(x: int) -> int:\n    return x if not x else 4\n\n\ndef first")
    assert [m.key for m in mutants(longer, 7) if m.where == "first"] == keys


@pytest.mark.parametrize("target", targets(CONFIG), ids=lambda target: target.path)
def test_files_and_tests_are_there_and_equivalents_are_lines_of_the_file(target: object) -> None:
    each = next(file for file in CONFIG["file"] if file["path"] == target.path)  # type: ignore[attr-defined]
    lines = {line.strip() for line in (ROOT / each["path"]).read_text().splitlines()}
    for test in each["tests"]:
        assert Path(ROOT, test.removeprefix("--deselect=").partition("::")[0]).is_file()
    for equivalent in each.get("equivalent", ()):
        assert equivalent["before"] in lines and len(equivalent["reason"]) > 20
        assert equivalent["after"] != equivalent["before"]
