"""What is given as a tensor: memory of every kind that cannot be it, and memory that is shared."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import ExecutionError, GraphError, TaskgraphError
from taskgraph.graph import device as specs
from taskgraph.graph.graph import Graph
from taskgraph.schedule.planner import plan

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
Call = Callable[..., Any]


def cache_graph(dtype: str = "f32") -> Graph:
    """An input, a weight, a state that is written, and two outputs."""
    b = tg.GraphBuilder("cached")
    qkv, at, norm = b.input("qkv", (2, 64), dtype), b.input("at", (2,), "i64"), b.weight("norm", (32,), dtype)
    k, v = (b.state(name, (2, 1, 8, 16), dtype) for name in ("k", "v"))
    q = ops.rope_kv(qkv, at, k, v, spec=ops.RopeSpec(2), name="rope")
    mixed = ops.attention(q, at, k, v, name="attend")
    b.output(mixed, ops.rmsnorm(mixed, norm, name="normed"))
    return b.build()


def given() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"qkv": torch.randn(2, 64), "at": torch.tensor([0, 3]), "norm": torch.rand(32),
            "k": torch.randn(2, 1, 8, 16), "v": torch.randn(2, 1, 8, 16)}  # fmt: skip


class Broken:
    def __dlpack__(self, **options: Any) -> Any:
        raise OSError("the other\nlibrary")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def freed() -> torch.Tensor:
    made = torch.ones(2, 64)
    made.untyped_storage().resize_(0)
    return made


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 64), 0.1, 0, torch.qint8)


def unaligned() -> Any:
    return np.frombuffer(bytearray(2 * 64 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(2, 64)


def read_only() -> Any:
    made = np.random.default_rng(0).random((2, 64), np.float32)
    made.flags.writeable = False
    return made


NEVER = {
    "a list": [[1.0] * 64] * 2, "a number": 3.0, "None": None, "text": "x", "a broken dlpack": Broken(),
    "big-endian": np.ones((2, 64), ">f4"), "objects": np.full((2, 64), 1.0, object),
    "records": np.zeros((2, 64), [("a", "f4")]), "dates": np.zeros((2, 64), "M8[s]"),
    "masked": np.ma.masked_array(np.ones((2, 64), np.float32), False), "complex": torch.ones(2, 64, dtype=torch.cfloat),
    "other shape": torch.ones(64, 2), "empty": torch.ones(0, 64), "0-d": torch.tensor(1.0), "f64": np.ones((2, 64)),
    "meta": torch.ones(2, 64, device="meta"), "sparse": torch.ones(2, 64).to_sparse(),
    "quantised": quantised(), "freed": freed(),
}  # fmt: skip
ONLY_COPIED = {
    "negative strides": np.ones((2, 64), np.float32)[::-1, ::-1], "a transpose": torch.ones(64, 2).t(),
    "every other": np.ones((2, 128), np.float32)[:, ::2], "broadcast": torch.ones(1, 64).expand(2, 64),
    "unaligned": unaligned(), "negated": torch._neg_view(torch.ones(2, 64)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", NEVER)
def test_what_is_no_such_tensor_is_refused_by_name(what: str) -> None:
    graph = cache_graph()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        for use in (exe, exe.bind):
            with pytest.raises(GraphError, match="'qkv'") as info:
                use(qkv=NEVER[what])
            assert "\n" not in str(info.value)
        exe(given())


@pytest.mark.parametrize("what", ONLY_COPIED)
def test_odd_layouts_are_copied_right_or_refused_in_place(what: str) -> None:
    graph = cache_graph()
    value = ONLY_COPIED[what]
    plain = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.resolve_neg().contiguous()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        want = {name: t.clone() for name, t in exe({**given(), "qkv": plain}).items()}
        got = exe({**given(), "qkv": value})
        assert all(torch.equal(got[name], want[name]) for name in want)
        with pytest.raises(GraphError, match="'qkv'"):
            exe.bind(qkv=value)


def test_read_only_memory_serves_readers_alone() -> None:
    graph = cache_graph()
    values, locked = given(), read_only()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        want = exe({**values, "qkv": torch.from_numpy(locked.copy())})["normed.out"]
        norm = values["norm"].numpy()
        norm.flags.writeable = False
        exe.bind(qkv=locked, norm=norm)
        exe.launch()
        torch.testing.assert_close(exe.outputs["normed.out"], want)
        exe(values)  # does not write to what was bound
        assert np.array_equal(locked, read_only())
        for name, shape in (("k", (2, 1, 8, 16)), ("normed.out", (2, 32))):
            blocked = np.zeros(shape, np.float32)
            blocked.flags.writeable = False
            with pytest.raises(GraphError, match=f"'{name}'.*read-only"):
                exe.bind({name: blocked})
            with pytest.raises(GraphError, match=f"'{name}'.*requires grad"):
                exe.bind({name: torch.zeros(shape, requires_grad=True)})


def test_a_bind_that_is_refused_binds_nothing() -> None:
    graph = cache_graph()
    values = given()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        want = exe(values)["normed.out"]
        with pytest.raises(GraphError, match="'norm'"):
            exe.bind(qkv=torch.zeros(2, 64), norm=torch.zeros(3))
        values = given()
        exe.bind(k=values["k"], v=values["v"])
        exe.launch()
        torch.testing.assert_close(exe.outputs["normed.out"], want)


SHARED = {
    "an output and an input": lambda v: {"attend.out": v["qkv"].view(-1)[:64].view(2, 32)},
    "an output and a part of a state": lambda v: {"attend.out": v["k"].view(-1)[10:74].view(2, 32)},
    "an output and a weight": lambda v: {"attend.out": (big := torch.rand(2, 32)), "norm": big[1]},
    "two outputs": lambda v: {"attend.out": (big := torch.zeros(3, 32))[:2], "normed.out": big[1:]},
    "two states": lambda v: {"v": v["k"]},
    "a state and an input": lambda v: {"qkv": v["v"].view(-1)[4:132].view(2, 64)},
}


@pytest.mark.parametrize("what", SHARED)
def test_written_memory_is_shared_with_nothing(what: str) -> None:
    graph = cache_graph()
    values = given()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        want = exe({name: t.clone() for name, t in values.items()})["normed.out"]
        shared = SHARED[what](values)
        exe.bind({**values, **shared})
        with pytest.raises(GraphError, match=f"'{next(iter(shared))}'.*own|own.*'{next(iter(shared))}'|shares memory"):
            exe.launch()
        exe.bind({name: torch.zeros(2, 32) for name in ("attend.out", "normed.out")} | given())
        exe.launch()
        torch.testing.assert_close(exe.outputs["normed.out"], want)


def test_readers_may_share_and_an_output_cannot_be_fed_back() -> None:
    b = tg.GraphBuilder("shared")
    x, w = b.input("x", (4, 4), "f32"), b.weight("w", (4, 4), "f32")
    b.output(ops.gemm(x, w, name="p"))
    graph = b.build()
    one = torch.rand(4, 4)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        exe.bind(x=one, w=one)
        exe.launch()
        torch.testing.assert_close(exe.outputs["p.out"], one @ one)
        exe.bind(x=exe.outputs["p.out"])
        with pytest.raises(GraphError, match="shares memory"):
            exe.launch()


def test_a_weight_that_was_changed_in_place_is_packed_anew() -> None:
    b = tg.GraphBuilder("changed")
    x, w = b.input("x", (4, 64), "f32"), b.weight("w", (64, 64), "f32")
    b.output(ops.gemm(x, w, name="p"))
    graph = b.build()
    x0, w0 = torch.rand(4, 64), torch.rand(64, 64)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        exe(x=x0, w=w0)
        w0.mul_(-2)
        torch.testing.assert_close(exe(x=x0, w=w0)["p.out"], x0 @ w0)


def test_the_cuda_backend_has_the_same_rules(on_virtual: Call) -> None:
    on_virtual(on_cuda)


def on_cuda() -> None:
    from taskgraph.runtime.gpu.arrays import DeviceTensors

    device = "virtual:h100_sxm"
    graph = cache_graph()
    made = tg.plan(graph, "h100_sxm")
    with tg.compile(graph, made, "cuda", device=device) as exe:
        for what, value in NEVER.items():
            for use in (exe, exe.bind):
                with pytest.raises(GraphError, match="'qkv'"):
                    use(qkv=value)
                    raise AssertionError(what)
        for what, value in ONLY_COPIED.items():
            plain = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.resolve_neg()
            want = exe({**given(), "qkv": plain.contiguous()})["normed.out"]
            assert torch.equal(exe({**given(), "qkv": value})["normed.out"], want), what
        with pytest.raises(GraphError, match=r"'attend\.out'.*host tensor"):
            exe.bind({"attend.out": torch.zeros(2, 32)})
        with DeviceTensors({**given(), "out": torch.zeros(2, 32)}, device) as held:
            for shared in ({"attend.out": held["out"], "normed.out": held["out"]}, {"v": held["k"]}):
                exe.bind({name: t for name, t in held.items() if name != "out"} | shared)
                with pytest.raises(GraphError, match="shares memory"):
                    exe.launch()
            exe.bind({name: t for name, t in held.items() if name != "out"} | {"attend.out": held["out"]})
            with pytest.raises(GraphError):
                held["k"].rows([2])
            late = held["k"]
        with pytest.raises(ExecutionError, match="freed"):
            exe.bind(k=late)
        with pytest.raises(ExecutionError, match="freed"):
            late.cpu()
    kept = tg.compile(graph, made, "cuda", device=device)
    buffer = kept.inputs["qkv"]  # type: ignore[attr-defined]
    kept.close()
    with pytest.raises(TaskgraphError, match="freed"):
        buffer.copy_(torch.zeros(2, 64))
