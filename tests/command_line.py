"""The command line, called in this process."""

import sys

import pytest

from taskgraph.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `taskgraph ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["taskgraph", *arguments])
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
