"""The CPU backend against torch eager, its errors and its life; the sim backend."""

import gc
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import BackendUnavailable, ExecutionError, GraphError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work, spec
from taskgraph.runtime.cpu.executable import CpuExecutable
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.cpu.standard import CPU_KINDS
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan
from tests import cases_experts, cases_sampling, cases_standard
from tests.paged_cases import CASES as PAGED_CASES
from tests.paged_cases import PLACES, keys_of, values_of

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
"""A made-up device of two cores, so that no test here waits for the probe or depends on it."""
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}
ONE = Work(flops=1.0)
Tensors = dict[str, torch.Tensor]


# --------------------------------------------------------------------- every kind against torch eager


def rotated(x: torch.Tensor, at: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """x (tokens, heads, dim) at positions `at`, float32."""
    dim = x.shape[-1]
    angle = at.float()[:, None] * theta ** (-torch.arange(0, dim, 2).float() / dim)
    cos, sin = (t.repeat(1, 2)[:, None, :] for t in (angle.cos(), angle.sin()))
    half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
    return x * cos + half * sin


def attended(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """q (tokens, heads, dim) of one sequence over keys (kv, len, dim); `seen` (tokens,) keys each."""
    group = q.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("thd,hld->thl", q, keys) / math.sqrt(q.shape[2])
    hidden = torch.arange(keys.shape[1])[None, :] >= seen[:, None]
    return torch.einsum("thl,hld->thd", scores.masked_fill(hidden[:, None, :], -torch.inf).softmax(-1), values)


def _embedding(b: GraphBuilder, d: str) -> Value:
    return ops.embedding(b.input("ids", (5,), "i64"), b.weight("table", (11, 8), d))


def _gemm(**kinds: bool) -> Callable[[GraphBuilder, str], Value]:
    def make(b: GraphBuilder, d: str) -> Value:
        w = b.weight("w", (12, 16) if kinds.get("transpose_w") else (16, 12), d)
        bias = b.weight("bias", (12,), d) if kinds.get("bias") else None
        residual = b.input("residual", (5, 12), d) if kinds.get("residual") else None
        return ops.gemm(b.input("x", (5, 16), d), w, bias, residual, transpose_w=kinds.get("transpose_w", False))

    return make


def _gemm_reference(t: Tensors) -> torch.Tensor:
    w = t["w"].t() if t["w"].shape[0] == 12 else t["w"]
    return t["x"] @ w + t.get("bias", torch.zeros(())) + t.get("residual", torch.zeros(()))


def _rope_kv(each: int, normed: bool) -> Callable[[GraphBuilder, str], Value]:
    def make(b: GraphBuilder, d: str) -> Value:
        qkv, at = b.input("qkv", (2 * each, 8 * 16), d), b.input("at", (2,), "i64")
        keys, values = b.state("keys", (2, 2, 32, 16), d), b.state("values", (2, 2, 32, 16), d)
        norms = [b.weight(n, (16,), d) for n in ("q_norm", "k_norm")] if normed else []
        return ops.rope_kv(qkv, at, keys, values, norms, spec=ops.RopeSpec(4))

    return make


def _rope_kv_reference(t: Tensors) -> torch.Tensor:
    """The queries; and writes the caches in `t` as the op must."""
    each = t["qkv"].shape[0] // 2
    q, k, v = t["qkv"].view(-1, 8, 16).split((4, 2, 2), dim=1)
    if "q_norm" in t:
        q, k = (F.rms_norm(y, (16,), t[n], 1e-6) for y, n in ((q, "q_norm"), (k, "k_norm")))
    at = (t["at"][:, None] + torch.arange(each)).reshape(-1)
    q, k = rotated(q, at), rotated(k, at)
    for row, place in enumerate(at.tolist()):
        t["keys"][row // each, :, place] = k[row]
        t["values"][row // each, :, place] = v[row]
    return q


def _attention(each: int) -> Callable[[GraphBuilder, str], Value]:
    def make(b: GraphBuilder, d: str) -> Value:
        keys, values = b.state("keys", (2, 2, 32, 16), d), b.state("values", (2, 2, 32, 16), d)
        return ops.attention(b.input("q", (2 * each, 4, 16), d), b.input("at", (2,), "i64"), keys, values)

    return make


def _attention_reference(t: Tensors) -> torch.Tensor:
    each = t["q"].shape[0] // 2
    rows = [
        attended(t["q"][s * each : (s + 1) * each], t["keys"][s], t["values"][s], t["at"][s] + 1 + torch.arange(each))
        for s in range(2)
    ]
    return torch.cat(rows).flatten(1)


def _decode_attention(b: GraphBuilder, d: str) -> Value:
    return ops.decode_attention(b.input("q", (2, 4, 16), d), b.state("kv", (2, 2, 9, 2, 16), d))


def _decode_reference(t: Tensors) -> torch.Tensor:
    keys, values = (t["kv"][i].transpose(1, 2) for i in (0, 1))
    whole = torch.tensor([9])
    return torch.cat([attended(t["q"][s : s + 1], keys[s], values[s], whole) for s in range(2)])


CASES: dict[str, tuple[Callable[[GraphBuilder, str], Value], Callable[[Tensors], torch.Tensor]]] = {
    "embedding": (_embedding, lambda t: t["table"][t["ids"]]),
    "gemm": (_gemm(), _gemm_reference),
    "gemm transposed": (_gemm(transpose_w=True), _gemm_reference),
    "gemm bias": (_gemm(bias=True), _gemm_reference),
    "gemm residual": (_gemm(residual=True, transpose_w=True), _gemm_reference),
    "gemm bias residual": (_gemm(bias=True, residual=True, transpose_w=True), _gemm_reference),
    "rmsnorm": (
        lambda b, d: ops.rmsnorm(b.input("x", (5, 48), d), b.weight("w", (48,), d), eps=1e-3),
        lambda t: F.rms_norm(t["x"], (48,), t["w"], 1e-3),
    ),
    "rope": (
        lambda b, d: ops.rope(b.input("x", (5, 3, 8), d), b.input("at", (5,), "i64"), theta=500.0),
        lambda t: rotated(t["x"], t["at"], 500.0),
    ),
    "rope_kv": (_rope_kv(3, False), _rope_kv_reference),
    "rope_kv decode": (_rope_kv(1, False), _rope_kv_reference),
    "rope_kv norms": (_rope_kv(2, True), _rope_kv_reference),
    "attention": (_attention(4), _attention_reference),
    "attention decode": (_attention(1), _attention_reference),
    "decode_attention": (_decode_attention, _decode_reference),
    "swiglu": (
        lambda b, d: ops.swiglu(b.input("x", (5, 32), d)), lambda t: F.silu(t["x"][:, :16]) * t["x"][:, 16:],
    ),
    "add": (lambda b, d: ops.add(b.input("x", (5, 7), d), b.input("y", (5, 7), d)), lambda t: t["x"] + t["y"]),
    "argmax": (lambda b, d: ops.argmax(b.input("x", (5, 33), d)), lambda t: t["x"].argmax(1)),
    "copy": (lambda b, d: ops.copy(b.input("x", (5, 7), d), direction="h2d"), lambda t: t["x"]),
    "slice_rows": (lambda b, d: ops.slice_rows(b.input("x", (9, 7), d), 2, 9, 3), lambda t: t["x"][2:9:3]),
    "slice_rows of rows": (
        lambda b, d: ops.slice_rows(b.input("x", (9, 7), d).rows(3, 9), 1, 6, 2), lambda t: t["x"][4:9:2],
    ),
    "concat_rows": (
        lambda b, d: ops.concat_rows([b.input("x", (5, 7), d), b.input("y", (6, 7), d).rows(2, 4)]),
        lambda t: torch.cat([t["x"], t["y"][2:4]]),
    ),
    "all_gather": (lambda b, d: ops.all_gather(b.input("x", (5, 7), d), ranks=1), lambda t: t["x"]),
    "all_reduce": (lambda b, d: ops.all_reduce(b.input("x", (5, 7), d), ranks=1), lambda t: t["x"]),
    "reduce_scatter": (lambda b, d: ops.reduce_scatter(b.input("x", (5, 7), d), ranks=1), lambda t: t["x"]),
    **cases_experts.CASES,
    **cases_standard.CASES,
    **PAGED_CASES,
    **cases_sampling.CASES,
}  # fmt: skip
STATES = ("keys", "values", "pages_k", "pages_v", "pages_l", "kept")


def random_tensors(graph: Graph, seed: int = 0) -> Tensors:
    """Values for all that the graph does not make; places and ids are small integers."""
    made = torch.Generator().manual_seed(seed)
    return {
        t.name: torch.tensor(PLACES[t.name], dtype=torch.int32)
        if t.dtype == "i32"
        else torch.randint(0, 11, t.shape, generator=made)
        if t.dtype == "i64"
        else torch.randn(t.shape, generator=made).to(TORCH_DTYPE[t.dtype])
        for t in graph.with_role("input", "weight", "state")
    }


def widened(tensors: Tensors) -> Tensors:
    """Floats in float32; pages in plain order, and as they are stored too."""
    plain = {name: t.float() if t.is_floating_point() else t.clone() for name, t in tensors.items()}
    for name, read in (("pages_k", keys_of), ("pages_v", values_of)):
        if name in tensors:
            plain[f"{name}_stored"], plain[name] = tensors[name].clone(), read(tensors[name]).float()
    return plain


def test_every_kind_has_a_case() -> None:
    own = {name for name, kind in CPU_KINDS.items() if kind.bind.__module__.startswith("taskgraph.runtime.")}
    assert {case.split()[0] for case in CASES} == own


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch_eager(case: str, dtype: str) -> None:
    make, reference = CASES[case]
    b = GraphBuilder(case)
    b.output(make(b, dtype))
    graph = b.build()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        for seed in range(2):
            given = random_tensors(graph, seed)
            expected = widened(given)
            wanted = reference(expected)
            got = exe({name: t if name in STATES else t.clone() for name, t in given.items()})[graph.outputs[0]]
            torch.testing.assert_close(got.float(), wanted.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            after = widened(given)
            for name in STATES:
                if name in given:
                    tolerance = TOLERANCE[dtype]
                    torch.testing.assert_close(after[name], expected[name], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------- lanes, call ops


def increment(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(x, 1.0, out=out)


_MEETING = threading.Barrier(2)


def pause(x: torch.Tensor, out: torch.Tensor) -> None:
    """Waits for the op beside it: that both came shows that they ran at once, however busy the machine is."""
    _MEETING.wait(600)
    time.sleep(0.02)
    out.copy_(x)


def explode(x: torch.Tensor, out: torch.Tensor) -> None:
    if x[0] < 0:
        raise KeyError("negative")
    out.copy_(x)


def braid(function: Callable[..., Any] = increment, width: int = 3, depth: int = 6) -> Graph:
    """`width` chains that mix at every second level: many waits between lanes."""
    b = GraphBuilder("braid")
    rows = [b.input(f"x{i}", (64,), "f32") for i in range(width)]
    for level in range(depth):
        made = []
        for i in range(width):
            name = f"n{level}_{i}"
            if level % 2:
                made.append(ops.add(rows[i], rows[(i + 1) % width], name=name))
            else:
                out, work = [spec(f"{name}.out", (64,), "f32")], Work(flops=1e9 if i % 2 else 0, hbm_bytes=1e7)
                made.append(b.call(function, [rows[i]], out, work=work, name=name))
        rows = made
    b.output(*rows)
    return b.build()


def listed(graph: Graph, device: Device = CPU) -> Plan:
    p = plan(graph, device, "list")
    assert len(p.lanes) > 1
    assert any(step.waits for step in p.steps)
    return p


def test_a_plan_of_many_lanes_equals_the_sequential_one() -> None:
    graph = braid()
    given = random_tensors(graph)
    with tg.compile(graph, plan(graph, CPU, "sequential")) as exe:
        wanted = exe(given)
    with tg.compile(graph, listed(graph)) as exe:
        for _ in range(50):
            got = exe(given)
            assert all(torch.equal(got[name], wanted[name]) for name in graph.outputs)


def test_on_the_probed_machine() -> None:
    graph = braid()
    with tg.compile(graph, plan(graph, "cpu", "list")) as one, tg.compile(graph, plan(graph, CPU)) as two:
        given = random_tensors(graph)
        got, wanted = one(given), two(given)
    assert all(torch.equal(got[name], wanted[name]) for name in graph.outputs)


def test_a_state_lives_across_calls() -> None:
    b = GraphBuilder("counter")
    x, total = b.input("x", (2,), "f32"), b.state("total", (2,), "f32")

    def accumulate(x: torch.Tensor, total: torch.Tensor, out: torch.Tensor) -> None:
        total.add_(x)
        out.copy_(total)

    b.output(b.call(accumulate, [x, total.written()], [spec("out", (2,), "f32")], work=ONE))
    graph = b.build()
    state = torch.zeros(2)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        first = exe(x=torch.ones(2), total=state)["out"]
        second = exe(x=torch.ones(2))["out"]
    assert first.tolist() == [1, 1]
    assert second.tolist() == state.tolist() == [2, 2]


def test_functions_may_be_given_at_compile() -> None:
    b = GraphBuilder("given")
    b.output(b.op(("call", {"function": "no:f"}), [b.input("x", (2,), "f32")], [spec("o", (2,), "f32")], ONE, "f")[0])
    graph = b.build()
    with tg.compile(graph, plan(graph, CPU), functions={"no:f": increment}) as exe:
        assert exe(x=torch.zeros(2))["o"].tolist() == [1, 1]
    with tg.compile(graph, plan(graph, CPU)) as exe, pytest.raises(GraphError, match="no:f"):
        exe(x=torch.zeros(2))


@pytest.mark.parametrize("make", [lambda g: plan(g, CPU, "sequential"), listed], ids=["one lane", "many lanes"])
def test_an_exception_names_its_op_and_the_executable_lives_on(make: Callable[[Graph], Plan]) -> None:
    graph = braid(explode)
    good = random_tensors(graph)
    good = {name: t.abs() + 1 for name, t in good.items()}
    with tg.compile(graph, make(graph)) as exe:
        wanted = exe(good)
        for bad in ("x0", "x2"):
            for measure in (False, True):
                with pytest.raises(ExecutionError, match="negative") as caught:
                    exe({**good, bad: -good[bad]})
                    if measure:
                        exe.timeline()
                assert caught.value.op == f"n0_{bad[1]}"
                assert f"'n0_{bad[1]}'" in str(caught.value)
                assert isinstance(caught.value.__cause__, KeyError)
                assert all(torch.equal(exe(good)[name], wanted[name]) for name in graph.outputs)


def test_an_exception_while_measuring() -> None:
    graph = braid(explode)
    good = {name: t.abs() + 1 for name, t in random_tensors(graph).items()}
    with tg.compile(graph, listed(graph)) as exe:
        wanted = exe(good)
        exe.bind(x1=-torch.ones(64))
        with pytest.raises(ExecutionError) as caught:
            exe.timeline()
        assert caught.value.op == "n0_1"
        exe.bind(x1=good["x1"])
        assert all(torch.equal(exe(good)[name], wanted[name]) for name in graph.outputs)


def test_eager_is_the_same_ops_one_by_one() -> None:
    graph = braid(explode)
    good = {name: t.abs() + 1 for name, t in random_tensors(graph).items()}
    with tg.compile(graph, listed(graph)) as exe:
        assert isinstance(exe, CpuExecutable)
        wanted = exe(good)
        for out in exe.outputs.values():
            out.zero_()
        exe.eager()
        assert all(torch.equal(exe.outputs[name], wanted[name]) for name in graph.outputs)
        exe.bind(x1=-torch.ones(64))
        with pytest.raises(ExecutionError, match="negative") as caught:
            exe.eager()
        assert caught.value.op == "n0_1"


def test_a_plan_for_one_core_runs_on_the_calling_thread() -> None:
    seen: list[tuple[int, int]] = []

    def watched(x: torch.Tensor, y: torch.Tensor) -> None:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        if float(x.min()) < 0:
            raise ValueError("negative")
        torch.sqrt(x, out=y)

    b = GraphBuilder("root")
    x = b.input("x", (64,), "f32")
    b.output(b.call(watched, [x], [spec("y", (64,), "f32")], name="root", work=ONE))
    graph = b.build()
    threads, given = torch.get_num_threads(), torch.rand(64)
    with tg.compile(graph, plan(graph, specs.make(CPU, name="one core", sm_count=1), "sequential")) as exe:
        assert isinstance(exe, CpuExecutable)
        wanted = exe(x=given)["y"]
        exe.outputs["y"].zero_()
        exe.launch_here()
        assert torch.equal(exe.outputs["y"], wanted)
        assert seen[-1] == (threading.get_ident(), 1)
        assert torch.get_num_threads() == threads
        exe.bind(x=-torch.ones(64))
        with pytest.raises(ExecutionError, match="negative") as caught:
            exe.launch_here()
        assert caught.value.op == "root"
        exe.bind(x=given)
        exe.launch_here()
        assert torch.equal(exe.outputs["y"], wanted)
    with pytest.raises(ExecutionError):
        exe.launch_here()


# ------------------------------------------------------------------------------------------- binding


def product() -> Graph:
    b = GraphBuilder("product")
    b.output(ops.gemm(b.input("x", (2, 4), "f32"), b.weight("w", (4, 3), "f32"), name="p"))
    return b.build()


@pytest.mark.parametrize(
    ("tensors", "pattern"),
    [
        ({"x": torch.zeros(2, 5)}, r"'x'.*\[2, 4\].*\[2, 5\]"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, "'x'.*f32.*f64"),
        ({"w": torch.zeros(3, 4)}, "'w'"),
        ({"w": torch.zeros(3, 4).t()}, "'w'.*contiguous"),
        ({"z": torch.zeros(2, 4)}, "'z'"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tensors: Tensors, pattern: str) -> None:
    graph = product()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        with pytest.raises(GraphError, match=pattern):
            exe.bind(tensors)
        with pytest.raises(GraphError, match=pattern):
            exe({"x": torch.zeros(2, 4), "w": torch.zeros(4, 3), **tensors})


def test_activations_cannot_be_bound() -> None:
    graph = braid()
    with tg.compile(graph, plan(graph, CPU)) as exe, pytest.raises(GraphError, match=r"n0_0\.out"):
        exe.bind({"n0_0.out": torch.zeros(64)})


def test_unbound_weights_are_named() -> None:
    graph = product()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        with pytest.raises(GraphError, match="'w'"):
            exe(x=torch.zeros(2, 4))
        assert exe(x=torch.ones(2, 4), w=torch.ones(4, 3))["p.out"].tolist() == [[4.0] * 3] * 2


def test_numpy_arrays_come_in_through_dlpack() -> None:
    graph = product()
    x, w = np.ones((2, 4), np.float32), np.full((4, 3), 2.0, np.float32)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        assert exe(x=x, w=w)["p.out"].tolist() == [[8.0] * 3] * 2
        exe.bind(x=x)
        x[:] = 3.0  # bound in place
        exe.launch()
        assert exe.outputs["p.out"].tolist() == [[24.0] * 3] * 2


def test_bound_outputs_are_written_in_place() -> None:
    graph = product()
    mine = torch.zeros(2, 3)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        exe.bind({"p.out": mine, "w": torch.ones(4, 3), "x": torch.ones(2, 4)})
        exe.launch()
    assert mine.tolist() == [[4.0] * 3] * 2


def test_outputs_of_a_call_are_copies_and_inputs_are_not_kept() -> None:
    graph = product()
    x = torch.ones(2, 4)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        first = exe(x=x, w=torch.ones(4, 3))["p.out"]
        x.zero_()
        second = exe()["p.out"]
        third = exe(x=x)["p.out"]
    assert first.tolist() == second.tolist() == [[4.0] * 3] * 2
    assert third.tolist() == [[0.0] * 3] * 2


# ------------------------------------------------------------------------------------ life, timeline


def alone_on(cores: int) -> tuple[tg.Executable, list[threading.Thread]]:
    """An executable on so many cores that no other test shares its lane, run once, and the threads that it brought."""
    graph, here = product(), set(threading.enumerate())
    exe = tg.compile(graph, plan(graph, specs.make(CPU, name=f"{cores} cores", sm_count=cores)))
    lanes = [t for t in threading.enumerate() if t not in here and t.name.startswith("taskgraph-lane")]
    assert lanes
    exe(x=torch.ones(2, 4), w=torch.ones(4, 3))
    return exe, lanes


def test_an_executable_that_is_dropped_gives_its_lanes_back_by_the_next_compile() -> None:
    exe, lanes = alone_on(9)
    del exe
    gc.collect()
    other, _ = alone_on(11)
    other.close()
    assert not any(lane.is_alive() for lane in lanes)


def test_close_twice_and_use_after_close() -> None:
    exe, lanes = alone_on(7)
    exe.close()
    exe.close()
    assert not any(lane.is_alive() for lane in lanes)
    for use in (exe, exe.launch, exe.timeline):
        with pytest.raises(ExecutionError, match="closed"):
            use()


@pytest.mark.parametrize("use", ["bind", "outputs"])
def test_buffers_after_close(use: str) -> None:
    graph = product()
    exe = tg.compile(graph, plan(graph, CPU))
    exe.close()
    with pytest.raises(ExecutionError, match="closed"):
        exe.bind(x=torch.ones(2, 4)) if use == "bind" else exe.outputs


def test_the_error_of_the_body_is_not_masked() -> None:
    graph = product()
    with pytest.raises(ZeroDivisionError), tg.compile(graph, plan(graph, CPU)):
        raise ZeroDivisionError


def test_measured_timeline() -> None:
    graph = braid(pause, width=2, depth=2)
    p = listed(graph)
    with tg.compile(graph, p) as exe:
        exe(random_tensors(graph))
        timeline = exe.timeline()
    assert timeline.kind == "measured"
    assert [(s.op, s.lane) for s in timeline.spans] == [(s.op, s.lane) for s in p.steps]
    assert min(s.start_s for s in timeline.spans) == 0.0
    spans = timeline.spans
    for i, step in enumerate(p.steps):
        assert spans[i].start_s <= spans[i].end_s
        earlier = [j for j in range(i) if p.steps[j].lane == step.lane][-1:]
        assert all(spans[j].end_s <= spans[i].start_s for j in (*step.waits, *earlier))
    slept = [s for s in spans if s.op.startswith("n0")]
    assert all(s.end_s - s.start_s >= 0.019 for s in slept)
    assert max(s.start_s for s in slept) < min(s.end_s for s in slept)  # the lanes did overlap


@pytest.mark.parametrize("device", ["h100_sxm", "l40s", CPU], ids=str)
def test_sim_returns_the_timeline_of_the_plan(device: str | Device) -> None:
    graph = braid()
    for scheduler in ("sequential", "list"):
        p = plan(graph, device, scheduler)
        with tg.compile(graph, p, backend="sim") as exe:
            timeline = exe.timeline()
            assert timeline.kind == "simulated"
            assert [(s.op, s.lane) for s in timeline.spans] == [(s.op, s.lane) for s in p.timeline.spans]
            times = [t for s in timeline.spans for t in (s.start_s, s.end_s)]
            assert times == pytest.approx([t for s in p.timeline.spans for t in (s.start_s, s.end_s)], rel=1e-9)
            assert exe() == exe.outputs == {}
            exe.launch()
            assert exe.elapsed_s == pytest.approx(2 * p.makespan_s)  # type: ignore[attr-defined]
        with pytest.raises(ExecutionError, match="closed"):
            exe.launch()


def test_absent_backends() -> None:
    graph = product()
    with pytest.raises(BackendUnavailable, match=r"tpu.*cpu, sim, cuda"):
        tg.compile(graph, plan(graph, CPU), backend="tpu")
    with pytest.raises(BackendUnavailable, match=r"virtual:h100_sxm.*cuda"):
        tg.compile(graph, plan(graph, CPU), backend="cpu", device="virtual:h100_sxm")


@pytest.mark.parametrize("kind", ops.COLLECTIVES)
def test_collectives_of_several_ranks_need_a_process_group(kind: str) -> None:
    b = GraphBuilder("ranks")
    b.output(getattr(ops, kind)(b.input("x", (4, 6), "f32"), ranks=2, name="exchange"))
    graph = b.build()
    linked = specs.make("h100_sxm", name="linked", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1)
    with pytest.raises(BackendUnavailable, match=f"exchange.*{kind} over 2 ranks"):
        tg.compile(graph, plan(graph, linked))


def test_a_kind_without_an_implementation() -> None:
    b = GraphBuilder("exotic")
    b.output(*b.op("fft", [b.input("x", (4,), "f32")], [spec("y", (4,), "f32")], ONE, "spectrum"))
    graph = b.build()
    with tg.compile(graph, plan(graph, CPU)) as exe, pytest.raises(BackendUnavailable, match=r"spectrum.*fft"):
        exe(x=torch.ones(4))
