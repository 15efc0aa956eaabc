"""Native custom ops: rows of machine code on lanes, beside ops in Python, with errors, waits and teams."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.graph import device as specs
from taskgraph.graph.graph import Graph
from taskgraph.runtime.cpu.native import Row
from taskgraph.schedule.planner import plan

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
barrier, flat = tg.cpu.barrier, tg.cpu.flat
ROWS = 16


def says(code: int, *tensors: torch.Tensor) -> None:
    raise ValueError(f"code {code}, first {float(tensors[0][0])}")


@tg.cpu.native(says)
def total(tensors: Any, count: Any) -> int:
    """The sum of all inputs; refuses what begins with a negative number."""
    out = flat(tensors, count - 1, np.float64)
    out[:] = 0.0
    for k in range(count - 1):
        out += flat(tensors, k, np.float64)
    return 7 if out[0] < 0.0 else 0


@tg.cpu.native(wide=True)
def shifted(tensors: Any, count: Any, part: Any, parts: Any, team: Any) -> int:
    """out[i] = 2 * x[i + 1]: what another thread has doubled."""
    x, doubled, out = flat(tensors, 0, np.float64), flat(tensors, 1, np.float64), flat(tensors, 2, np.float64)
    for i in range(part, len(x), parts):
        doubled[i] = 2.0 * x[i]
    barrier(team)
    for i in range(part, len(x), parts):
        out[i] = doubled[(i + 1) % len(x)]
    return 0


@tg.cpu.native()
def raises(tensors: Any, count: Any) -> int:
    if flat(tensors, 0, np.float64)[0] == 0.0:
        raise ValueError("not seen")
    return 0


def plain_total(*tensors: torch.Tensor) -> None:
    tensors[-1].copy_(torch.stack(tensors[:-1]).sum(0))


def double(x: np.ndarray) -> np.ndarray:
    return 2.0 * np.roll(x, -1)


@st.composite
def graphs(draw: Any) -> tuple[Graph, Any]:
    """A random graph of native, wide and Python ops, and what it computes."""
    b = tg.GraphBuilder("random")
    values, how = [b.input("x", (ROWS,), "f64")], []
    for i in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["native", "wide", "python"]))
        picked = draw(st.lists(st.integers(0, i), min_size=1, max_size=1 if kind == "wide" else 3))
        given = [values[k] for k in picked]
        work = tg.Work(flops=draw(st.floats(1e3, 1e6)))
        outs = [tg.spec(f"v{i}", (ROWS,), "f64")]
        if kind == "wide":
            outs = [tg.spec(f"room{i}", (ROWS,), "f64"), *outs]
        narrow = None if kind == "wide" else tg.demand((1, 1))
        made = b.call(
            {"native": total, "wide": shifted, "python": plain_total}[kind], given, outs, work=work, demand=narrow
        )
        values.append(made[-1] if isinstance(made, tuple) else made)
        how.append((kind, picked))
    b.output(*values[1:])

    def expected(x: np.ndarray) -> list[np.ndarray]:
        rows = [x]
        for kind, picked in how:
            rows.append(double(rows[picked[0]]) if kind == "wide" else np.sum([rows[k] for k in picked], 0))
        return rows[1:]

    return b.build(), expected


@settings(deadline=None, max_examples=25)
@given(graphs(), st.integers(0, 2**32 - 1))
def test_any_mixture_on_any_plan_computes_what_it_says(drawn: Any, seed: int) -> None:
    graph, expected = drawn
    rng = np.random.default_rng(seed)
    for scheduler in ("list", "sequential"):
        with tg.compile(graph, plan(graph, CPU, scheduler=scheduler)) as exe:
            for _ in range(3):
                x = rng.random(ROWS)
                found = exe(x=torch.from_numpy(x))
                for name, wanted in zip(graph.outputs, expected(x), strict=True):
                    np.testing.assert_allclose(found[name].numpy(), wanted)
            spans = {span.op: span for span in exe.timeline().spans}
            assert set(spans) == {op.name for op in graph.ops}
            for op, before in zip(graph.ops, graph.predecessors(), strict=True):
                assert all(spans[graph.ops[p].name].end_s <= spans[op.name].start_s for p in before)


def fan(function: Any, width: int = 6) -> Graph:
    b = tg.GraphBuilder("fan")
    x = b.input("x", (ROWS,), "f64")
    work, narrow = tg.Work(flops=1e5), tg.demand((1, 1))
    first = [
        b.call(total, [x], [tg.spec(f"a{i}", (ROWS,), "f64")], work=work, demand=narrow, name=f"first{i}")
        for i in range(width)
    ]
    middle = b.call(function, first[:1], [tg.spec("m", (ROWS,), "f64")], work=work, demand=narrow, name="middle")
    last = [
        b.call(total, [middle, each], [tg.spec(f"b{i}", (ROWS,), "f64")], work=work, demand=narrow, name=f"last{i}")
        for i, each in enumerate(first)
    ]
    b.output(*last)
    return b.build()


def test_a_refused_op_is_named_and_the_next_replay_is_whole() -> None:
    graph = fan(total)
    with tg.compile(graph, plan(graph, CPU, scheduler="list")) as exe:
        for _ in range(3):
            with pytest.raises(
                tg.ExecutionError, match=r"op 'first0' failed: ValueError: code 7, first -1\.0"
            ) as caught:
                exe(x=torch.full((ROWS,), -1.0, dtype=torch.float64))
            assert isinstance(caught.value.__cause__, ValueError)
            found = exe(x=torch.ones(ROWS, dtype=torch.float64))
            assert all((value == 2.0).all() for value in found.values())


def test_an_exception_in_compiled_code_is_an_error() -> None:
    graph = fan(raises)
    with (
        tg.compile(graph, plan(graph, CPU)) as exe,
        pytest.raises(tg.ExecutionError, match="op 'middle' raised in compiled code"),
    ):
        exe(x=torch.zeros(ROWS, dtype=torch.float64))


def test_a_row_is_one_entry_of_the_program() -> None:
    graph = fan(total)
    with tg.compile(graph, plan(graph, CPU, scheduler="list")) as exe:
        exe(x=torch.ones(ROWS, dtype=torch.float64))
        assert all(len(program) == 1 and isinstance(program[0], Row) for program in exe._programs if program)


def test_a_native_op_takes_contiguous_memory_of_the_host() -> None:
    with pytest.raises(tg.BackendUnavailable, match="contiguous CPU tensors"):
        total(torch.ones(4, 4, dtype=torch.float64)[:, 0], torch.ones(4, dtype=torch.float64))
    out = torch.empty(4, dtype=torch.float64)
    total(torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), out)
    assert (out == 2.0).all()
    with pytest.raises(ValueError, match="code 7"):
        total(-torch.ones(4, dtype=torch.float64), out)


def test_the_checks_of_custom_ops_pass() -> None:
    graph = fan(total)
    with tg.compile(graph, plan(graph, CPU), check=True) as exe:
        exe(x=torch.ones(ROWS, dtype=torch.float64))
