"""What is shown while a command works."""

import io
import time

import pytest
from rich.console import Console

from taskgraph import compiling
from taskgraph.cli import console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal as stderr would show."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "status", Console(file=shown, force_terminal=True, width=120))
    return shown


def test_the_function_that_is_being_compiled_is_named(terminal: io.StringIO) -> None:
    with console.planning():
        compiling.begin("the_slow_one")
        deadline = time.monotonic() + 20
        while "the_slow_one" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "plan (compiling function" in terminal.getvalue() and "the_slow_one" in terminal.getvalue()
    assert "the_slow_one" not in terminal.getvalue().splitlines()[-1]


@pytest.mark.parametrize("said", [True, False])
def test_where_stderr_is_no_terminal_a_stage_leaves_a_line_or_none(monkeypatch: pytest.MonkeyPatch, said: bool) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "status", Console(file=shown))
    with console.stages("fit") as staged, staged.stage("fit", said=said):
        pass
    assert shown.getvalue().startswith("fit: ") == said and bool(shown.getvalue()) == said
