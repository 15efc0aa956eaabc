"""`taskgraph run --torch`: a module of torch by eager torch, by torch.compile's default and by us, in one table."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

import taskgraph as tg
from taskgraph.cli.console import screen, stages
from taskgraph.units import format_seconds

if TYPE_CHECKING:
    import torch

_ROUNDS = 15


def run_torch(factory: str) -> None:
    """Time the module that the factory returns, and say what became of it."""
    import torch

    from taskgraph.embed.importer import arguments
    from taskgraph.embed.sources import made_by

    with stages("make the module", "compile by taskgraph", "compile by torch", "measure") as staged:
        with staged.stage("make the module"):
            module, inputs = made_by(factory)
            args, kwargs = arguments(inputs)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", tg.embed.FallbackWarning)
            want = module(*args, **kwargs)
            with staged.stage("compile by taskgraph"):
                ours = torch.compile(module, backend=tg.embed.backend)
                for _ in range(10):
                    made = ours(*args, **kwargs)
            runs: dict[str, Callable[[], Any]] = {"eager torch": lambda: module(*args, **kwargs)}
            with staged.stage("compile by torch"):
                missing = _default(module, args, kwargs, runs)
            runs["taskgraph"] = lambda: ours(*args, **kwargs)
            with staged.stage("measure"):
                took = _measured(runs)
    title = f"{type(module).__name__} (measured on this machine)"
    table = Table("", "a call", "against eager", title=title, title_justify="left")
    for name, seconds in took.items():
        table.add_row(name, format_seconds(seconds), f"{took['eager torch'] / seconds:.2f}x")
    screen.print(table)
    if missing:
        screen.print(f"torch.compile's default is not here: {missing}", markup=False, soft_wrap=True)
    screen.print(f"largest difference from eager torch: {_difference(made, want):.1e}")
    screen.print(str(tg.embed.report(ours)), markup=False, soft_wrap=True)


def _default(
    module: "torch.nn.Module", args: tuple[Any, ...], kwargs: Mapping[str, Any], runs: dict[str, Callable[[], Any]]
) -> str:
    """Add torch.compile's default to `runs`; why it is not possible here, where it is not."""
    import torch

    try:
        made = torch.compile(module)
        made(*args, **kwargs)
    except Exception as error:  # a compiler that is missing, and whatever Inductor cannot do
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    runs["torch.compile"] = lambda: made(*args, **kwargs)
    return ""


def _measured(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds, one of each in turn; an untimed call comes before each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            run()
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _difference(got: Any, want: Any) -> float:
    import torch
    from torch.utils import _pytree as pytree

    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    found = [float((a - b).abs().max()) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return max(found, default=0.0)
