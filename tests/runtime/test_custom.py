"""Custom ops: their functions' names and lives, and those that do what an op must not."""

import copy
import ctypes
import functools
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import CudaError, ExecutionError, GraphError
from taskgraph.graph import device as specs
from taskgraph.graph.functions import find_function, register_function
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Work, spec
from taskgraph.schedule.planner import plan

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
ONE = Work(hbm_bytes=8.0)
KEPT: list[Any] = []


def graph_of(function: Callable[..., Any], dtype: str = "f32") -> Graph:
    """An op `mine` between others, with a state that it does not name in `writes`."""
    b = tg.GraphBuilder("custom")
    x, s = b.input("x", (2, 3), dtype), b.state("s", (2, 3), dtype)
    y = b.call(function, [x, s], [spec("y", (2, 3), dtype)], name="mine", work=ONE)
    b.output(y, ops.add(x, y, name="z"))
    return b.build()


@contextmanager
def compiled(function: Callable[..., Any], dtype: str = "f32", **options: Any) -> Iterator[Any]:
    graph = graph_of(function, dtype)
    with tg.compile(graph, plan(graph, CPU), **options) as exe:
        exe.bind(s=torch.ones(2, 3, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype]))
        yield exe


# ---------------------------------------------------------------------------------------- what is refused


def returns(x: Any, s: Any, out: Any) -> Any:
    return x * 2


def returns_a_number(x: Any, s: Any, out: Any) -> Any:
    out.copy_(x)
    return 3


def returns_several(x: Any, s: Any, out: Any) -> Any:
    return out, x + 1


async def later(x: Any, out: Any) -> None:
    out.copy_(x)


def returns_a_coroutine(x: Any, s: Any, out: Any) -> Any:
    return later(x, out)


def grows(x: Any, s: Any, out: Any) -> None:
    torch.mul(torch.ones(4, 3), 2.0, out=out)


def shrinks(x: Any, s: Any, out: Any) -> None:
    out.resize_(1, 3).fill_(1.0)


def transposes(x: Any, s: Any, out: Any) -> None:
    out.copy_(x).t_()


def replaces(x: Any, s: Any, out: Any) -> None:
    out.data = x * 2


def sets(x: Any, s: Any, out: Any) -> None:
    out.set_(torch.ones(2, 3, dtype=out.dtype))


def reaches(x: Any, s: Any, out: Any) -> None:
    torch.as_strided(out, (4, 3), (3, 1)).fill_(1.0)


def writes(x: Any, s: Any, out: Any) -> None:
    out.copy_(x)
    x.zero_()


def writes_a_part(x: Any, s: Any, out: Any) -> None:
    out.copy_(x)
    s[0].add_(1.0)


def keeps(x: Any, s: Any, out: Any) -> None:
    KEPT.append(out.copy_(x))


def keeps_a_part(x: Any, s: Any, out: Any) -> None:
    KEPT.append(x.numpy())
    out.copy_(x)


def keeps_a_view(x: Any, s: Any, out: Any) -> None:
    KEPT.append(out.copy_(x)[0])


REFUSED = {
    returns: "returned a Tensor", returns_a_number: "returned a int", returns_several: "returned a tuple",
    returns_a_coroutine: "of which nothing has run", grows: "resize", shrinks: r"changed 'y'.*\[2, 3\] to \[1, 3\]",
    transposes: "changed 'y'", replaces: "in place of 'y'", sets: "in place of 'y'|resize|storage", reaches: "storage",
    writes: "wrote to its input 'x'", writes_a_part: "wrote to its input 's'", keeps: "keeps a reference.*'y'",
    keeps_a_part: "keeps a reference.*'x'", keeps_a_view: "keeps a reference.*'y'",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_an_op_must_not_do_names_it_at_every_replay(function: Any, dtype: str) -> None:
    if function is keeps_a_part and dtype == "bf16":
        pytest.skip("numpy has no bf16")
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with compiled(function, dtype) as exe:
        for _ in range(3):
            with pytest.raises(ExecutionError, match=f"op 'mine'.*({REFUSED[function]})") as info:
                exe(x=torch.ones(2, 3, dtype=kind))
            assert info.value.op == "mine"
            assert "\n" not in str(info.value)
            KEPT.clear()


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_an_op_does_only_later_is_noticed_too(function: Any, by_torch: bool) -> None:
    """After calls that did nothing wrong, whether torch counted their writes or NumPy made them unseen."""
    calls: list[int] = []

    def at_last(x: Any, s: Any, out: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            return function(x, s, out)
        if by_torch:
            out.copy_(x)
        else:
            out.numpy()[:] = x.numpy()
        return None

    with compiled(at_last) as exe:
        for _ in range(3):
            assert torch.equal(exe(x=torch.ones(2, 3))["y"], torch.ones(2, 3))
        with pytest.raises(ExecutionError, match=f"op 'mine'.*({REFUSED[function]})"):
            exe(x=torch.ones(2, 3))
        KEPT.clear()


def returns_its_output(x: Any, s: Any, out: Any) -> Any:
    return torch.mul(x, 2, out=out)


def returns_a_view(x: Any, s: Any, out: Any) -> Any:
    return out.view(-1).copy_((2 * x).view(-1))


def by_numpy(x: Any, s: Any, out: Any) -> Any:
    import numpy as np

    return np.multiply(x.numpy(), 2, out=out.numpy())


def with_a_cycle(x: Any, s: Any, out: Any) -> None:
    def again(n: int) -> None:
        torch.mul(x, 2, out=out) if n else again(n + 1)

    again(0)


@pytest.mark.parametrize("function", [returns_its_output, returns_a_view, by_numpy, with_a_cycle])
def test_what_an_op_may_do(function: Any) -> None:
    with compiled(function) as exe:
        for i in range(3):
            x = torch.full((2, 3), float(i))
            assert torch.equal(exe(x=x)["z.out"], 3 * x)


def test_an_op_that_behaves_again_runs_again() -> None:
    wrong = [True]

    def sometimes(x: Any, s: Any, out: Any) -> None:
        out.copy_(x)
        if wrong[0]:
            out.resize_(1, 1)

    with compiled(sometimes) as exe:
        with pytest.raises(ExecutionError, match="mine"):
            exe(x=torch.ones(2, 3))
        wrong[0] = False
        assert torch.equal(exe(x=torch.ones(2, 3))["y"], torch.ones(2, 3))


def test_an_error_keeps_no_blame_for_what_its_traceback_holds() -> None:
    wrong = [True]

    def raises(x: Any, s: Any, out: Any) -> None:
        if wrong[0]:
            raise ValueError("no")
        out.copy_(x)

    with compiled(raises) as exe:
        with pytest.raises(ExecutionError, match=r"'mine'.*no") as info:
            exe(x=torch.ones(2, 3))
        wrong[0] = False
        assert torch.equal(exe(x=torch.ones(2, 3))["y"], torch.ones(2, 3))
        assert isinstance(info.value.__cause__, ValueError)


def two(x: Any, out: Any) -> None: ...
def four(x: Any, s: Any, out: Any, more: Any) -> None: ...
async def async_op(x: Any, s: Any, out: Any) -> None: ...
def generator(x: Any, s: Any, out: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [two, four, async_op, generator, functools.partial(async_op), 3, None])
def test_functions_that_cannot_be_ops_are_refused_when_declared(function: Any) -> None:
    with pytest.raises(GraphError):
        graph_of(function)


def test_a_function_given_at_compile_is_checked_too() -> None:
    graph = graph_of(returns_its_output)
    key = next(op for op in graph.ops if op.kind == "call").attr("function")
    with tg.compile(graph, plan(graph, CPU), functions={str(key): two}) as exe:
        exe.bind(s=torch.ones(2, 3))
        with pytest.raises(GraphError, match=r"'mine'.*3 tensors"):
            exe(x=torch.ones(2, 3))


# -------------------------------------------------------------------------------------- names and lives


class Copier:
    def __call__(self, x: Any, s: Any, out: Any) -> None:
        out.copy_(x)

    def method(self, x: Any, s: Any, out: Any) -> None:
        out.copy_(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda x, s, out: out.copy_(x),
        lambda: functools.partial(lambda scale, x, s, out: out.copy_(x), 2),
        lambda: Copier(),
        lambda: Copier().method,
    ],
    ids=["lambda", "partial", "object", "method"],
)
def test_functions_live_as_long_as_their_graphs_and_executables(make: Callable[[], Any]) -> None:
    function = make()
    held = weakref.ref(getattr(function, "__self__", function))
    graph = graph_of(function)
    same = graph_of(function)
    assert same.fingerprint == graph.fingerprint
    del function, same
    gc.collect()
    for copied in (graph, copy.deepcopy(graph), graph.flat()):
        with tg.compile(copied, plan(copied, CPU)) as exe:
            exe.bind(s=torch.ones(2, 3))
            assert torch.equal(exe(x=torch.ones(2, 3))["y"], torch.ones(2, 3))
    gone = tg.compile(graph, plan(graph, CPU))
    text = graph.to_json()
    again = Graph.from_json(text)
    with tg.compile(again, plan(again, CPU)) as exe:
        exe.bind(s=torch.ones(2, 3))
        assert torch.equal(exe(x=torch.ones(2, 3))["y"], torch.ones(2, 3))
    gone.close()
    del graph, copied, exe, gone
    gc.collect()
    assert held() is None
    with pytest.raises(GraphError, match=r"not importable|takes .self"), tg.compile(again, plan(again, CPU)) as exe:
        exe(x=torch.ones(2, 3), s=torch.ones(2, 3))


def test_importable_functions_outlive_files() -> None:
    graph = Graph.from_json(graph_of(returns_its_output).to_json())
    with tg.compile(graph, plan(graph, CPU)) as exe:
        assert torch.equal(exe(x=torch.ones(2, 3), s=torch.ones(2, 3))["y"], torch.full((2, 3), 2.0))
    assert pickle.loads(pickle.dumps(graph)) == graph


def test_names_of_the_gone_are_given_again_and_those_of_the_living_never() -> None:
    def made(i: int) -> Callable[..., Any]:
        def inner(x: Any, out: Any) -> int:
            return i

        return inner

    functions = [made(i) for i in range(200)]
    names = [register_function(f) for f in functions]
    assert len(set(names)) == 200
    assert [find_function(str(name)) for name in names] == functions
    assert [register_function(f) for f in functions] == names
    first = str(names[0])
    del names[0], functions[0]
    gc.collect()
    fresh = made(-1)
    assert register_function(fresh) == first
    assert find_function(str(names[0])) is functions[0]


# ------------------------------------------------------------------------------------------------ cuda


def test_what_breaks_a_capture_names_the_op(on_virtual: Callable[..., Any]) -> None:
    on_virtual(break_captures)


def break_captures() -> None:
    from cuda.bindings import driver as cu

    how = [""]

    def misbehave(x: Any, out: Any, stream: Any) -> Any:
        if how[0] == "raise":
            raise ValueError("boom")
        if how[0] == "stream":
            stream.sync()
        if how[0] == "device":
            cu.cuCtxSynchronize()
        if how[0] == "end":
            cu.cuStreamEndCapture(stream.handle)
        if how[0] == "allocate":
            cu.cuMemFree(cu.cuMemAlloc(64)[1])
        pointers = (out.__cuda_array_interface__["data"][0], x.__cuda_array_interface__["data"][0])
        cu.cuMemcpyAsync(*pointers, 256, stream.handle)
        return x if how[0] == "return" else None

    b = tg.GraphBuilder("c")
    x = b.input("x", (64,), "f32")
    m = b.call(misbehave, [x], [spec("m", (64,), "f32")], work=Work(hbm_bytes=512), name="mine")
    b.output(ops.add(ops.add(x, x, name="a"), m, name="z"))
    graph = b.build()
    value = torch.arange(64.0)
    want = {
        "raise": ExecutionError,
        "stream": CudaError,
        "device": CudaError,
        "end": CudaError,
        "return": ExecutionError,
    }
    with tg.compile(graph, tg.plan(graph, "h100_sxm", "list"), "cuda", device="virtual:h100_sxm") as exe:
        for name, kind in want.items():
            how[0] = name
            with pytest.raises(kind, match="'mine'") as info:
                exe(x=value)
            assert "\n" not in str(info.value)
            how[0] = ""
            assert torch.equal(exe(x=value)["z.out"], 3 * value), name
            exe._stale = True  # type: ignore[attr-defined]
    how[0] = "stream"
    exe = tg.compile(graph, tg.plan(graph, "h100_sxm", "list"), "cuda", device="virtual:h100_sxm")
    with exe, pytest.raises(CudaError, match="'mine'"):
        exe.timeline()


# --------------------------------------------------------------------------- what only check=True sees


def writes_by_numpy(x: Any, s: Any, out: Any) -> None:
    out.copy_(x)
    x.numpy()[0, 0] += 1.0


def writes_state_by_numpy(x: Any, s: Any, out: Any) -> None:
    out.copy_(x)
    s.numpy()[1, 2] += 1.0


def leaves_unwritten(x: Any, s: Any, out: Any) -> None:
    out[0].copy_(x[0])


def makes_nan(x: Any, s: Any, out: Any) -> None:
    torch.div(x - x, x - x, out=out)


def writes_beside(x: Any, s: Any, out: Any) -> None:
    out.copy_(x)
    ctypes.memset(out.data_ptr() + out.nbytes, 7, 4)


def behaves(x: Any, s: Any, out: Any) -> None:
    torch.add(x, s, out=out)


DEAR = {
    writes_by_numpy: "wrote to its input 'x'", writes_state_by_numpy: "wrote to its input 's'",
    leaves_unwritten: "left 12 of the 24 bytes of its output 'y' unwritten, from element 3 on",
    makes_nan: "made 6 NaN in 'y'", writes_beside: "outside its outputs",
}  # fmt: skip


def beside(function: Callable[..., Any]) -> Graph:
    """The op's output lies in the arena, before that of another op."""
    b = tg.GraphBuilder("custom")
    x, s = b.input("x", (2, 3), "f32"), b.state("s", (2, 3), "f32")
    a = ops.add(x, x, name="a")
    y = b.call(function, [x, s], [spec("y", (2, 3), "f32")], name="mine", work=ONE)
    b.output(ops.add(ops.add(a, y, name="z"), a, name="last"))
    return b.build()


@pytest.mark.parametrize("function", DEAR, ids=lambda f: f.__name__)
def test_the_dear_checks_name_the_op(function: Any) -> None:
    graph = beside(function)
    made = plan(graph, CPU)
    values = {"x": torch.ones(2, 3), "s": torch.ones(2, 3)}
    with tg.compile(graph, made, check=True) as exe:
        for _ in range(2):
            with pytest.raises(ExecutionError, match=f"op 'mine' .*{DEAR[function]}") as info:
                exe({name: t.clone() for name, t in values.items()})
            assert info.value.op == "mine"
    with tg.compile(graph, made) as exe:
        exe.bind({name: t.clone() for name, t in values.items()})
        with pytest.raises(ExecutionError, match="op 'mine' "):
            exe.check({"call"})


def test_checked_replays_give_the_same_results() -> None:
    graph = beside(behaves)
    values = {"x": torch.rand(2, 3), "s": torch.rand(2, 3)}
    with tg.compile(graph, plan(graph, CPU)) as exe, tg.compile(graph, plan(graph, CPU), check=True) as checked:
        for _ in range(2):
            assert torch.equal(exe(values)["last.out"], checked(values)["last.out"])
        nan = {**values, "x": torch.full((2, 3), float("nan"))}
        assert checked(nan)["last.out"].isnan().all()  # what comes in as NaN may go out so


def test_states_that_are_declared_may_be_written_and_are_written_once() -> None:
    def counts(s: Any, out: Any) -> None:
        s.add_(1.0)
        out.copy_(s)

    b = tg.GraphBuilder("counts")
    s = b.state("s", (4,), "f32")
    b.output(b.call(counts, [s.written()], [spec("y", (4,), "f32")], name="mine", work=ONE))
    graph = b.build()
    held = torch.zeros(4)
    with tg.compile(graph, plan(graph, CPU), check=True) as exe:
        for i in range(1, 4):
            assert exe(s=held)["y"].tolist() == [i] * 4
            assert held.tolist() == [i] * 4


def test_autotune_looks_at_custom_ops_first(tmp_path: Any) -> None:
    graph = beside(leaves_unwritten)
    with pytest.raises(ExecutionError, match="op 'mine' left"):
        tg.autotune(graph, device=CPU, budget_s=2, database=tmp_path / "profiles.sqlite")


def test_the_dear_checks_on_the_cuda_backend(on_virtual: Callable[..., Any]) -> None:
    on_virtual(dear_on_cuda)


def dear_on_cuda() -> None:
    from cuda.bindings import driver as cu

    how = [""]

    def mine(x: Any, s: Any, out: Any, stream: Any) -> None:
        target = {"input": x, "state": s}.get(how[0], out).buffer.address
        cu.cuMemcpyAsync(out.buffer.address, x.buffer.address, 12 if how[0] == "part" else 24, stream.handle)
        if how[0] in ("input", "state"):
            cu.cuMemsetD8Async(target, 3, 4, stream.handle)
        if how[0] == "beside":
            cu.cuMemsetD8Async(out.buffer.address + 24, 3, 4, stream.handle)
        if how[0] == "nan":
            cu.cuMemsetD8Async(target, 0xFF, 8, stream.handle)

    graph = beside(mine)
    values = {"x": torch.rand(2, 3), "s": torch.rand(2, 3)}
    made = tg.plan(graph, "h100_sxm")
    with tg.compile(graph, made, "cuda", device="virtual:h100_sxm", check=True) as exe:
        want = 2 * values["x"] + values["x"] + 2 * values["x"]
        torch.testing.assert_close(exe(values)["last.out"], want)
        for name, text in (("input", "its input 'x'"), ("state", "its input 's'"), ("part", "unwritten"),
                           ("beside", "outside its outputs"), ("nan", "NaN")):  # fmt: skip
            how[0] = name
            with pytest.raises(ExecutionError, match=f"op 'mine' .*{text}"):
                exe(values)
        how[0] = ""
        torch.testing.assert_close(exe(values)["last.out"], want)
