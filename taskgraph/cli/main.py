"""The command line. Errors are one line and exit code 2; a warning about the cache is one line."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

import taskgraph as tg
from taskgraph import compiling
from taskgraph.cli import bench_serve, calibrate, machine, plan, run, serve, tune, whatif
from taskgraph.cli.console import say, status

app = typer.Typer(
    help="Declare LLM layers as a task graph, plan them onto streams and SM partitions, capture, replay.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (run, plan, machine, tune, calibrate, whatif, serve, bench_serve):
    command.register(app)


def main() -> None:
    """Entry point: a TaskgraphError becomes one line on stderr and exit code 2; a warning about the cache one line."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning(warnings.showwarning)
        before = compiling.listen(_first_compilation)
        try:
            _command()
        finally:
            compiling.listen(before)


def _command() -> None:
    try:
        app()
    except tg.TaskgraphError as error:
        status.print(f"taskgraph: {' '.join(str(error).split())}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


def _show_warning(others: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning about the cache in one line, and leaves `others` as they are."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, tg.CacheWarning):
            say(f"taskgraph: warning: {message}")
        else:
            others(message, category, *where, **more)

    return show


def _first_compilation(name: str, before: int) -> None:
    if not before:
        say("compiling the schedulers for this processor, once: some ten seconds")
