"""Pointwise ops, norms, products, reductions and moves along axes: random ones against torch, whole and sliced,
on the cpu backend and on the virtual GPU."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops, rewrite
from taskgraph.errors import ExecutionError, GraphError, PlanError
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Op, Rows, rows_attr
from taskgraph.ops.formula import OPERATIONS, alive, formula
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.schedule.planner import plan
from taskgraph.schedule.slices import check_slices
from tests.conftest import Call
from tests.rewrite.test_rewrite import assert_equal, splits
from tests.runtime.gpu.test_cuda import run_plan
from tests.runtime.test_runtime import CPU

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]
NEAR = {"f32": 2e-5, "bf16": 2e-2}

# ----------------------------------------------------------------------------------------- formulas

REFERENCE: dict[str, Callable[..., torch.Tensor]] = {
    "copy": lambda a: a, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "maximum": torch.maximum, "minimum": torch.minimum, "pow": torch.pow,
    "neg": lambda a: -a, "abs": torch.abs, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log,
    "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": lambda a: 1 / a.sqrt(), "sin": torch.sin, "cos": torch.cos,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf, "relu": torch.relu, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"), "floor": torch.floor, "ceil": torch.ceil,
    "round": torch.round, "trunc": torch.trunc, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not,
    "where": lambda c, a, b: torch.where(c != 0, a, b), "bf16": lambda a: a.bfloat16(), "f16": lambda a: a.half(),
}  # fmt: skip
EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-4, 88.0, 90.0, -87.5, -104.0, 1e-40, 6.5e4, math.inf, -math.inf,
         math.nan, 3.4e38)  # fmt: skip
WELL_BEHAVED = ("add", "sub", "mul", "maximum", "minimum", "abs", "neg", "tanh", "sigmoid", "erf", "relu", "silu",
                "gelu", "where", "sin", "copy")  # fmt: skip
"""Operations whose errors do not grow in a chain."""


def numbers(shape: Shape, dtype: str, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    if not TORCH_DTYPE[dtype].is_floating_point:
        return torch.randint(0, 2 if dtype == "bool" else 5, shape, generator=made).to(TORCH_DTYPE[dtype])
    return torch.randn(shape, generator=made).to(TORCH_DTYPE[dtype])


def on_cpu(graph: Graph, values: Tensors) -> Tensors:
    p = plan(graph, CPU)
    tg.verify(p, graph)
    with tg.compile(graph, p) as exe:
        result: Tensors = exe(values)
    return result


def every_operation(dtype: str) -> tuple[Graph, Tensors]:
    """A graph of each operation on the same operands: edges beside each other, and random numbers."""
    edges = torch.tensor(EDGES)
    x = torch.cat([edges.repeat_interleave(len(edges)), numbers((3000,), "f32", 1) * torch.logspace(-3, 2, 3000)])
    y = torch.cat([edges.repeat(len(edges)), numbers((3000,), "f32", 2)])
    z = numbers((len(x),), "f32", 3).round()
    b = GraphBuilder("operations")
    inputs = [b.input(name, (len(x),), dtype) for name in "xyz"]
    for name, operation in OPERATIONS.items():
        taken = inputs[: operation.takes] if name != "where" else [inputs[2], inputs[0], inputs[1]]
        text = " ".join([name, *(f"x{i}" for i in range(operation.takes))])
        b.output(ops.elementwise(text, taken, name=name))
    kind = TORCH_DTYPE[dtype]
    return b.build(), {"x": x.to(kind), "y": y.to(kind), "z": z.to(kind)}


def check_operations(graph: Graph, values: Tensors, got: Tensors, dtype: str) -> None:
    """Each is torch's, within a few units of the last place of f32, or of the dtype."""
    for name, operation in OPERATIONS.items():
        taken = "zxy" if name == "where" else "xyz"
        wanted = REFERENCE[name](*(values[n].double() for n in taken[: operation.takes]))
        made = got[f"{name}.out"]
        assert made.dtype == (torch.bool if operation.makes else TORCH_DTYPE[dtype]), name
        wanted = wanted.to(made.dtype).float()
        limit = {"rtol": 2e-6, "atol": 1e-37} if dtype == "f32" else {"rtol": 1e-2, "atol": 1e-37}
        if name in ("gelu", "gelu_tanh"):  # both are differences: small against x
            limit["atol"] = 3e-6
            finite = values["x"].isfinite()  # of an infinity torch's gelu is what its processor makes of it
            made, wanted = made[finite], wanted[finite]
        if name in ("silu", "exp", "sigmoid", "pow"):
            limit["atol"] = 1e-36
        if name in ("sin", "cos"):
            limit["atol"] = 1e-6
        torch.testing.assert_close(made.float(), wanted, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **limit)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_every_operation_equals_torch(dtype: str) -> None:
    graph, values = every_operation(dtype)
    check_operations(graph, values, on_cpu(graph, values), dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_operation_equals_torch_on_the_virtual_gpu(on_virtual: Call, dtype: str) -> None:
    graph, values = every_operation(dtype)
    check_operations(graph, values, on_virtual(run_plan, graph, tg.plan(graph, "h100_sxm"), values), dtype)


@pytest.mark.parametrize("dtype", ["f64", "i64", "i32", "u8", "bool"])
def test_wide_and_whole_types_are_exact(dtype: str) -> None:
    """f64 and integers go through torch step by step; integers above 2^24 are not rounded."""
    b = GraphBuilder("wide")
    x, y = b.input("x", (7, 5), dtype), b.input("y", (5,), dtype)
    b.output(ops.elementwise("mul x0 3; sub s0 x1; where x1 s1 x0", [x, y], out_dtype="i64", name="whole"))
    b.output(ops.elementwise("lt x0 x1", [x, y], name="less"), ops.div(x, 4, name="quarter"))
    values = {"x": numbers((7, 5), dtype, 1), "y": numbers((5,), dtype, 2)}
    if dtype in ("i64", "i32"):
        values["x"] += (1 << 28) + 1
    got = on_cpu(b.build(), values)
    wide = {n: t.double() for n, t in values.items()}
    whole = torch.where(wide["y"] != 0, 3 * wide["x"] - wide["y"], wide["x"])
    assert torch.equal(got["whole.out"], whole.long())
    assert torch.equal(got["less.out"], wide["x"] < wide["y"])
    kind = torch.float64 if dtype == "f64" else torch.float32
    torch.testing.assert_close(got["quarter.out"], (wide["x"] / 4).to(kind))


@st.composite
def formulas(draw: st.DrawFn, inputs: int, operations: Sequence[str] = WELL_BEHAVED) -> str:
    """Up to eight steps that use all inputs; what is compared with 0 is an input."""
    steps: list[str] = []
    unused = [f"x{i}" for i in range(inputs)]
    while unused or len(steps) < draw(st.integers(1, 6)):
        name = draw(st.sampled_from(operations))
        pool = [f"x{i}" for i in range(inputs)] + [f"s{i}" for i in range(len(steps))] + ["0.5", "-2.0"]
        takes = [draw(st.sampled_from(pool)) for _ in range(OPERATIONS[name].takes)]
        if name == "where":
            takes[0] = draw(st.sampled_from(pool[:inputs]))
        if unused:
            takes[-1] = unused.pop()
        steps.append(" ".join([name, *takes]))
    return "; ".join(steps)


def evaluated(text: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The formula by torch, in f32."""
    done: list[torch.Tensor] = []
    for step in text.split("; "):
        name, *words = step.split()
        given = [
            done[int(w[1:])] if w[0] == "s" else inputs[int(w[1:])].float() if w[0] == "x" else torch.tensor(float(w))
            for w in words
        ]
        done.append(REFERENCE[name](*given).float())
    return done[-1]


@given(st.data())
def test_registers_hold_what_the_steps_say(data: st.DataObject) -> None:
    """The text of a formula reads back; no more registers than values that are still to be used."""
    text = data.draw(formulas(data.draw(st.integers(1, 4)), list(OPERATIONS)))
    made = formula(text)
    assert formula(made.text) == made
    assert alive(made) <= made.inputs + len(made.steps)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no operation"), ("nope x0", "no operation 'nope'"), ("add x0", "takes 2"),
        ("add x0 s0", "no earlier step"), ("add x0 x2", "leaves none out"),
        ("neg 1.0", "leaves none out"), ("mul x0 y", "must be an input"),
        ("; ".join(["neg x0"] * 65), "64"), ("add " + " ".join(f"x{i}" for i in range(9)), "takes 2"),
        ("; ".join(f"add x{i} x{i + 1}" for i in range(8)), "8"),
        ("; ".join([*(f"neg x{i}" for i in range(8)), *(f"add x{i} s{i}" for i in range(8))]), "alive"),
    ],
)  # fmt: skip
def test_what_is_no_formula_is_refused(text: str, says: str) -> None:
    b = GraphBuilder("g")
    with pytest.raises(GraphError, match=says):
        ops.elementwise(text, [b.input(f"x{i}", (2,), "f32") for i in range(9)])


# ------------------------------------------------------------------------------- random ops, whole

SIDES = st.integers(1, 9)


@st.composite
def shapes(draw: st.DrawFn, least: int = 1) -> Shape:
    return tuple(draw(st.lists(SIDES, min_size=least, max_size=4)))


@st.composite
def narrower(draw: st.DrawFn, shape: Shape) -> Shape:
    """A shape that is repeated to `shape`."""
    kept = tuple(1 if draw(st.integers(0, 3)) == 0 else n for n in shape)
    return kept[draw(st.integers(0, len(shape) - 1)) :]


class Bench:
    """A graph of random ops, each of inputs of its own, and what torch makes of them."""

    def __init__(self, draw: st.DrawFn, dtype: str) -> None:
        self.draw, self.dtype, self.b = draw, dtype, GraphBuilder("bench")
        self.values: Tensors = {}
        self.wanted: dict[str, torch.Tensor] = {}

    def given(self, shape: Shape, dtype: str = "", below: int = 0) -> tuple[Value, torch.Tensor]:
        name, kind = f"i{len(self.values)}", dtype or self.dtype
        made = numbers(shape, kind, len(self.values) + self.draw(st.integers(0, 99)))
        if below:
            made = torch.randint(0, below, shape, generator=torch.Generator().manual_seed(below)).to(TORCH_DTYPE[kind])
        self.values[name] = made
        return self.b.input(name, shape, kind), made.float() if made.is_floating_point() else made

    def keep(self, value: Value, wanted: torch.Tensor) -> None:
        self.b.output(value)
        self.wanted[value.name] = wanted

    def elementwise(self) -> None:
        shape = self.draw(shapes())
        text = self.draw(formulas(count := self.draw(st.integers(1, 3))))
        inputs = [self.given(shape if i == 0 else self.draw(narrower(shape))) for i in range(count)]
        self.keep(ops.elementwise(text, [v for v, _ in inputs]), evaluated(text, [t for _, t in inputs]).expand(shape))

    def layer_norm(self) -> None:
        shape = (*self.draw(shapes()), self.draw(st.integers(2, 200)))
        x, weight, bias = self.given(shape), self.given(shape[-1:]), self.given(shape[-1:])
        weighted, biased = self.draw(st.booleans()), self.draw(st.booleans())
        value = ops.layer_norm(x[0], weight[0] if weighted else None, bias[0] if biased else None, eps=1e-2)
        scale, shift = weight[1] if weighted else None, bias[1] if biased else None
        self.keep(value, F.layer_norm(x[1], shape[-1:], scale, shift, 1e-2))

    def softmax(self) -> None:
        shape = self.draw(shapes())
        axis, log = self.draw(st.integers(-len(shape), len(shape) - 1)), self.draw(st.booleans())
        value, x = self.given(shape)
        self.keep(ops.softmax(value, axis, log=log), x.log_softmax(axis) if log else x.softmax(axis))

    def matmul(self) -> None:
        lead = self.draw(st.lists(SIDES, max_size=2))
        m, n, k = (self.draw(st.integers(1, 70)) for _ in range(3))
        turned = self.draw(st.booleans())
        other = self.draw(narrower((*lead, 1)))[:-1] if lead else ()
        a, b = self.given((*lead, m, k)), self.given((*other, n, k) if turned else (*other, k, n))
        self.keep(ops.matmul(a[0], b[0], transpose_b=turned), a[1] @ (b[1].transpose(-1, -2) if turned else b[1]))

    def reduce(self) -> None:
        shape = self.draw(shapes())
        axes = sorted(self.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
        operation, keep = self.draw(st.sampled_from(["sum", "mean", "max", "min"])), self.draw(st.booleans())
        value, x = self.given(shape)
        if not keep and len(axes) == len(shape):
            keep = True  # an op of a sliceable graph has a first axis
        run = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[operation]
        self.keep(ops.reduce(operation, value, axes, keep_axes=keep), run(x, axes, keepdim=keep))

    def moved(self) -> None:
        shape = self.draw(shapes(2))
        axis = self.draw(st.integers(0, len(shape) - 1))
        value, x = self.given(shape)
        order = self.draw(st.permutations(range(len(shape))))
        self.keep(ops.permute(value, order), x.permute(order))
        self.keep(ops.permute(value, order, (shape[0], -1)), x.permute(order).reshape(shape[0], -1))
        self.keep(ops.transpose(value, axis, 0), x.transpose(axis, 0))
        self.keep(ops.reshape(value, (shape[-1], -1)), x.reshape(shape[-1], -1))
        start = self.draw(st.integers(0, shape[axis] - 1))
        stop, step = self.draw(st.integers(start + 1, shape[axis])), self.draw(st.integers(1, 3))
        self.keep(
            ops.slice_axis(value, axis, start, stop, step), x[(slice(None),) * axis + (slice(start, stop, step),)]
        )
        other, y = self.given((*shape[:axis], self.draw(SIDES), *shape[axis + 1 :]))
        self.keep(ops.concat([value, other, value], axis), torch.cat([x, y, x], axis))
        thin, z = self.given((*shape[:axis], 1, *shape[axis + 1 :]))
        wide = (2, *shape[:axis], self.draw(SIDES), *shape[axis + 1 :])
        self.keep(ops.expand(thin, wide), z.expand(wide))

    def picked(self) -> None:
        shape, kind = self.draw(shapes()), self.draw(st.sampled_from(["i32", "i64"]))
        axis = self.draw(st.integers(0, len(shape) - 1))
        value, x = self.given(shape)
        one, index = self.given((self.draw(SIDES),), kind, below=shape[axis])
        self.keep(ops.index_select(value, one, axis), x.index_select(axis, index))
        along, places = self.given((*shape[:axis], self.draw(SIDES), *shape[axis + 1 :]), kind, below=shape[axis])
        self.keep(ops.take_along(value, along, axis), x.take_along_dim(places.long(), axis))


MAKERS = ("elementwise", "layer_norm", "softmax", "matmul", "reduce", "moved", "picked")


def check_bench(bench: Bench, got: Tensors) -> None:
    near = NEAR[bench.dtype]
    for name, wanted in bench.wanted.items():
        made = got[name]
        assert made.dtype == TORCH_DTYPE[bench.dtype] and made.shape == wanted.shape, name
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(made.float() / scale, wanted / scale, rtol=near, atol=near, msg=name)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=25)
@given(data=st.data())
def test_random_ops_equal_torch(kind: str, dtype: str, data: st.DataObject) -> None:
    bench = Bench(data.draw, dtype)
    getattr(bench, kind)()
    check_bench(bench, on_cpu(bench.b.build(), bench.values))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@settings(max_examples=8)
@given(data=st.data())
def test_random_ops_equal_torch_on_the_virtual_gpu(on_virtual: Call, dtype: str, data: st.DataObject) -> None:
    bench = Bench(data.draw, dtype)
    for kind in MAKERS:
        getattr(bench, kind)()
    graph = bench.b.build()
    check_bench(bench, on_virtual(run_plan, graph, tg.plan(graph, "h100_sxm", "sequential"), bench.values))


@pytest.mark.parametrize("operation", ["sum", "mean", "max", "min"])
def test_long_reductions_are_cut_into_parts(on_virtual: Call, operation: str) -> None:
    """Few outputs of many entries, of which the second has a NaN."""
    b = GraphBuilder("long")
    b.output(ops.reduce(operation, b.input("x", (3, 50, 400), "f32"), (1, 2)))
    b.output(ops.reduce(operation, b.input("y", (30000,), "f32"), 0, keep_axes=True))
    graph, values = b.build(), {"x": numbers((3, 50, 400), "f32", 1), "y": numbers((30000,), "f32", 2)}
    values["x"][1, 20, 7] = math.nan
    run = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[operation]
    got = on_virtual(run_plan, graph, tg.plan(graph, "h100_sxm", "sequential"), values)
    for name, wanted in zip(graph.outputs, (run(values["x"], (1, 2)), run(values["y"], (0,), True)), strict=True):
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-3, equal_nan=True)
        assert got[name].isnan().equal(wanted.isnan())


def test_many_axes_are_collapsed_or_go_through_torch() -> None:
    """Eight axes, of which every second is repeated, are more than kernels have room for."""
    shape = (2,) * 14
    b = GraphBuilder("axes")
    x, y = b.input("x", shape, "f32"), b.input("y", (2, 1) * 7, "f32")
    b.output(ops.sub(x, y))
    values = {"x": torch.randn(shape), "y": torch.randn((2, 1) * 7)}
    (got,) = on_cpu(b.build(), values).values()
    assert torch.equal(got, values["x"] - values["y"])


def picks(x: int, i: int) -> Graph:
    b = GraphBuilder("picks")
    value, index = b.input("x", (x, 3), "f32"), b.input("i", (i,), "i64")
    b.output(ops.index_select(value, index, name="select"))
    b.output(ops.take_along(value, ops.expand(ops.reshape(index, (i, 1)), (i, 3)), 0, name="along"))
    return b.build()


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_that_does_not_exist_is_named(on_virtual: Call, wrong: int) -> None:
    graph, values = picks(4, 2), {"x": torch.randn(4, 3), "i": torch.tensor([0, wrong])}
    with pytest.raises(ExecutionError, match=f"'(select|along)' was given the index {wrong},"):
        on_cpu(graph, values)
    with pytest.raises(ExecutionError, match=f"'(select|along)' was given the index {wrong},"):
        on_virtual(run_plan, graph, tg.plan(graph, "h100_sxm", "sequential"), values)


# ------------------------------------------------------------------------------------------- slices


@st.composite
def batched(draw: st.DrawFn) -> Graph:
    """A chain of ops that carry a batch on their first axis, most of them; f32."""
    b = GraphBuilder("batched")
    rows, wide = draw(st.sampled_from([4, 6])), 6
    pool = [b.input("x", (rows, wide), "f32"), b.input("y", (rows, wide), "f32")]
    index = b.input("i", (rows,), "i64")
    vector, table = b.weight("w", (wide,), "f32"), b.weight("t", (11, wide), "f32")

    def step(x: Value, y: Value) -> Value:
        made = [
            lambda: ops.mul(x, vector),
            lambda: ops.elementwise("sub x0 x1; tanh s0", [x, y]),
            lambda: ops.add(x, ops.reduce_mean(y, 0, keep_axes=True)),
            lambda: ops.layer_norm(x, vector),
            lambda: ops.softmax(x, draw(st.integers(0, 1))),
            lambda: ops.mul(x, ops.reduce_max(y, 1, keep_axes=True)),
            lambda: (
                ops.transpose(ops.matmul(y, x, transpose_b=True))
                if x.shape[0] == wide
                else ops.matmul(ops.matmul(x, y, transpose_b=True), x)
            ),
            lambda: ops.reshape(
                ops.matmul(*[ops.reshape(v, (rows, 2, 3)) for v in (x, y)], transpose_b=True), (rows, 4)
            ),
            lambda: ops.reshape(ops.reshape(x, (rows // 2, 2 * wide)), (rows, wide)),
            lambda: ops.permute(ops.permute(x, (1, 0)), (1, 0)),
            lambda: ops.permute(ops.reshape(x, (rows, 2, 3)), (0, 2, 1), (rows, wide)),
            lambda: ops.permute(ops.permute(ops.reshape(x, (rows, 2, 3)), (1, 0, 2), (2, -1)), (0, 1), (rows, wide)),
            lambda: ops.slice_axis(ops.concat([x, y], 1), 1, 3, 3 + wide),
            lambda: ops.index_select(table, index),
            lambda: ops.index_select(ops.concat([x, x], 1), ops.slice_rows(index, 0, 4), 1),
            lambda: ops.expand(ops.slice_axis(x, 1, 0, 1), (rows, wide)),
        ]
        return draw(st.sampled_from(made))()

    for _ in range(draw(st.integers(1, 6))):
        whole = [v for v in pool if v.shape == (rows, wide)]
        pool.append(step(draw(st.sampled_from(whole)), draw(st.sampled_from(whole))))
    b.output(*pool[2:])
    return b.build()


@settings(max_examples=60)
@given(st.data())
def test_random_slices_of_them_equal_the_whole(data: st.DataObject) -> None:
    graph = data.draw(batched())
    split = data.draw(splits(graph))
    sliced = rewrite.apply(graph, split)
    check_slices(graph, split, sliced)
    assert_equal(graph, sliced, data.draw(st.integers(0, 99)))


def kind_graph(kind: str) -> Graph:
    """One op of the kind, which carries a batch of 4, between two others."""
    b = GraphBuilder(kind)
    x, y = (ops.relu(b.input(n, (4, 6), "f32"), name=f"first_{n}") for n in "xy")
    cube = b.input("cube", (4, 2, 3), "f32")
    made: dict[str, Callable[[], Value]] = {
        "elementwise": lambda: ops.sub(x, y, name="op"),
        "layer_norm": lambda: ops.layer_norm(x, name="op"),
        "softmax": lambda: ops.softmax(x, name="op"),
        "matmul": lambda: ops.matmul(cube, cube, transpose_b=True, name="op"),
        "reduce": lambda: ops.reduce_sum(x, 1, name="op"),
        "reshape": lambda: ops.reshape(x, (4, 3, 2), name="op"),
        "permute": lambda: ops.permute(b.input("z", (6, 4), "f32"), (1, 0), name="op"),
        "expand": lambda: ops.expand(b.input("z", (4, 1), "f32"), (4, 5), name="op"),
        "concat": lambda: ops.concat([x, y], 1, name="op"),
        "slice_axis": lambda: ops.slice_axis(x, 1, 1, 5, 2, name="op"),
        "index_select": lambda: ops.index_select(x, b.input("i", (4,), "i64"), name="op"),
        "take_along": lambda: ops.take_along(x, b.input("i", (4, 2), "i64"), name="op"),
    }
    b.output(made[kind]())
    return b.build()


@pytest.mark.parametrize(
    "kind", ["elementwise", "layer_norm", "softmax", "matmul", "reduce", "reshape", "permute", "expand", "concat",
             "slice_axis", "index_select", "take_along"],
)  # fmt: skip
def test_a_slice_of_other_rows_is_refused(kind: str) -> None:
    graph, split = kind_graph(kind), rewrite.Split.of((1, 3), ["op"])
    sliced = rewrite.apply(graph, split)
    check_slices(graph, split, sliced)
    (first, second) = (op for op in sliced.ops if op.name in ("op#0", "op#1"))
    assert first.views, "a slice takes a part of the whole tensor"
    for i, view in first.views.items():
        moved = {**first.views, i: Rows(view.axis, view.start + 1, view.stop + 1)}
        wrong = [_with_views(op, moved) if op.name == "op#0" else op for op in sliced.ops]
        with pytest.raises(PlanError, match="op#0"):
            check_slices(graph, split, Graph(sliced.name, sliced.tensors, tuple(wrong), sliced.outputs))
    assert second.views


def _with_views(op: Op, views: dict[int, Rows]) -> Op:
    attrs: dict[str, Any] = {**dict(op.attrs), "rows": rows_attr(views)}
    return Op(
        op.name, op.kind, op.inputs, op.outputs, op.work, op.demand, op.after, op.writes, tuple(sorted(attrs.items()))
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: ops.softmax(x, 0), lambda x, y: ops.reduce_sum(x, 0), lambda x, y: ops.reduce_sum(x, (0, 1)),
        lambda x, y: ops.expand(ops.reshape(x, (1, 4, 6)), (3, 4, 6)),
    ],
)  # fmt: skip
def test_what_mixes_the_batch_is_not_sliced(make: Callable[[Value, Value], Value]) -> None:
    b = GraphBuilder("mixes")
    value = make(b.input("x", (4, 6), "f32"), b.input("y", (4, 6), "f32"))
    b.output(value)
    graph = b.build()
    assert graph.ops[-1].name not in rewrite.splittable(graph)
