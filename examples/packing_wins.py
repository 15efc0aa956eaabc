"""A graph that packing speeds up on this machine's cores, found and measured by autotune.

Two independent chains of ops that keep one core busy each, like tokenising beside preparing pages: one after another
they leave the other cores idle. `tg.autotune` runs the candidates beside the sequential graph and says which won, by
how much, and whether that is more than the noise. Run it with `python examples/packing_wins.py`.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import taskgraph as tg
from taskgraph.jit import njit

ELEMENTS, TURNS = 512, 256


@njit
def recurrence(x: np.ndarray, out: np.ndarray, turns: int) -> None:
    """A chain of dependent multiplications for every element: no core can share it. It releases the interpreter."""
    for i in range(len(x)):
        y = x[i]
        for _ in range(turns):
            y = y * 0.999 + 0.001
        out[i] = y


def step(x: torch.Tensor, out: torch.Tensor) -> None:
    """The custom op: it gets its inputs and the outputs that it fills."""
    recurrence(x.numpy(), out.numpy(), TURNS)


def chains(width: int, depth: int) -> tg.Graph:
    """`width` independent chains of `depth` ops each. A custom op says what it does to the hardware."""
    b = tg.GraphBuilder(f"chains-{width}x{depth}")
    work = tg.Work(flops=2.0 * ELEMENTS * TURNS, hbm_bytes=8.0 * ELEMENTS)
    for i in range(width):
        x = b.input(f"x{i}", (ELEMENTS,), "f32")
        for level in range(depth):
            x = b.call(step, [x], [tg.spec(f"y{i}_{level}", (ELEMENTS,), "f32")], work=work, name=f"n{i}_{level}")
        b.output(x)
    return b.build()


def main() -> None:
    graph = chains(width=2, depth=8)
    with tempfile.TemporaryDirectory() as folder:
        tuned = tg.autotune(graph, "cpu", budget_s=15.0, database=Path(folder) / "profiles.sqlite3")
    print(tg.explain_tuned(tuned))
    values = {f"x{i}": torch.rand(ELEMENTS) for i in range(2)}
    with tg.compile(graph, tuned.plan) as run, tg.compile(graph, tg.plan(graph, "cpu", "sequential")) as one_by_one:
        packed, sequential = run(**values), one_by_one(**values)
        assert all(torch.equal(packed[name], sequential[name]) for name in sequential)
    print("the winner computes what the sequential graph computes")


if __name__ == "__main__":
    main()
