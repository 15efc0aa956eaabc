"""Hypothesis strategies for graphs and devices, used by all tests."""

from hypothesis import strategies as st

from taskgraph import ops
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Demand, Work, spec

SIDE = 64
KINDS = ("add", "gemm", "copy", "custom", "touch")


@st.composite
def works(draw: st.DrawFn) -> Work:
    """A Work that is not all zero."""
    number = st.integers(0, 10**9).map(float)
    work = Work(flops=draw(number), hbm_bytes=draw(number), h2d_bytes=draw(number), d2h_bytes=draw(number))
    return work if any(work.vector) else Work(flops=1.0)


@st.composite
def graphs(draw: st.DrawFn, max_ops: int = 12, repeats: bool = True) -> Graph:
    """A random DAG of standard and custom ops with control edges, a state, and sometimes a repeat."""
    b = GraphBuilder("random")
    values = [b.input("x", (SIDE, SIDE), "f32")]
    weight, state = b.weight("w", (SIDE, SIDE), "f32"), b.state("s", (SIDE, SIDE), "f32")
    names: list[str] = []

    def some_op(pool: list[Value], name: str) -> Value:
        kind, x, y = draw(st.sampled_from(KINDS)), draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        if kind == "add":
            return ops.add(x, y, name=name)
        if kind == "gemm":
            return ops.gemm(x, weight, name=name)
        if kind == "copy":
            return ops.copy(x, direction=draw(st.sampled_from(["d2d", "h2d", "d2h"])), name=name)
        after = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        low = draw(st.integers(1, 4))
        pinned = draw(st.sampled_from([None, Demand(sm=(low, 1000)), Demand(workspace_bytes=4096)]))
        outs = [spec(f"{name}.out", (SIDE, SIDE), "f32")]
        if draw(st.booleans()):
            outs.append(spec(f"{name}.extra", (draw(st.integers(1, 5000)),), "u8"))
        touches = kind == "touch"
        inputs = [x, state.written()] if touches else [x]
        made = b.op(kind, inputs, outs, draw(works()), name, pinned, after)
        return made[0]

    for i in range(draw(st.integers(1, max_ops))):
        values.append(some_op(values, f"op{i}"))
        names.append(f"op{i}")
    if repeats and draw(st.booleans()):
        with b.repeat(draw(st.integers(1, 3))) as loop:
            body = [loop.carry(values[-1])]
            for i in range(draw(st.integers(1, 3))):
                body.append(some_op(body, f"body{i}"))
            values.append(loop.next(body[0], body[-1]))
    b.output(values[-1], *draw(st.lists(st.sampled_from(values[1:]), max_size=2)))
    return b.build()


@st.composite
def devices(draw: st.DrawFn) -> Device:
    """A hypothetical GPU with a random SM count, granularity and rates."""
    granularity = draw(st.sampled_from([1, 2, 4, 8]))
    return specs.make(
        draw(st.sampled_from(["a100_sxm", "h100_sxm", "b200_sxm"])),
        name="random",
        sm_count=draw(st.integers(16, 200)),
        sm_granularity=granularity,
        sm_min=granularity,
        hbm_bytes_per_s=draw(st.floats(1e11, 1e13)),
        h2d_bytes_per_s=draw(st.floats(1e9, 1e11)),
        launch_seconds=draw(st.floats(1e-7, 1e-5)),
    )
