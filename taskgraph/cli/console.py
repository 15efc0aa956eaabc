"""What commands say and show: results on stdout, what happens meanwhile on stderr, and progress by stages."""

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from taskgraph import compiling
from taskgraph.errors import PlanError

screen = Console(highlight=False, emoji=False)
status = Console(stderr=True, highlight=False, emoji=False)


def check_outputs(*paths: Path | None) -> None:
    """PlanError, before any work is done, for a file that cannot be written."""
    for path in filter(None, paths):
        standing = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
            raise PlanError(f"cannot write {str(path)!r}: a folder, or in no folder that can be written.")


def say(line: str) -> None:
    """A line about what happens, beside the results."""
    status.print(line, markup=False, soft_wrap=True)


def show(text: str) -> None:
    """A result, as it is."""
    screen.print(text, markup=False, soft_wrap=True)


@contextmanager
def stages(*names: str) -> Iterator["Stages"]:
    """A progress line a stage on stderr; where that is no terminal, a line for each that has ended."""
    columns = (SpinnerColumn(finished_text="[green]ok"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=status, disable=not status.is_terminal) as progress:
        yield Stages(progress, names)


@contextmanager
def planning() -> Iterator[None]:
    """A progress line on a terminal while a command plans; results say how long that took."""
    with stages("plan") as staged, staged.stage("plan", said=False):
        yield


class Stages:
    """The stages of one command, by name."""

    def __init__(self, progress: Progress, names: tuple[str, ...]) -> None:
        self._progress = progress
        self._tasks = {name: progress.add_task(name, total=1, start=False, visible=False) for name in names}

    @contextmanager
    def stage(self, name: str, said: bool = True) -> Iterator[None]:
        """Around the work of stage `name`; one that is not `said` leaves no line where stderr is no terminal."""
        task = self._tasks[name]
        self._progress.update(task, visible=True)
        self._progress.start_task(task)

        def compiled(function: str, before: int) -> None:
            if others is not None:
                others(function, before)
            self._progress.update(task, description=f"{name} (compiling function {before + 1}: {function})")

        others, begin = compiling.listen(compiled), time.perf_counter()
        try:
            yield
        finally:
            compiling.listen(others)
        self._progress.update(task, completed=1, description=name)
        if said and self._progress.disable:
            say(f"{name}: {time.perf_counter() - begin:.1f} s")


def paragraphs(command: Callable[..., None]) -> str:
    """The docstring with a line a paragraph, for the terminal to wrap; those that begin with \\b stay as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(p if p.startswith("\b") else " ".join(p.split("\n")) for p in paragraphs)
