"""Who calls an executable when: several threads, signals, ops that call executables, and forked children."""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import BackendUnavailable, ExecutionError
from taskgraph.graph import device as specs
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Work, spec
from taskgraph.runtime.cpu.executable import CpuExecutable
from taskgraph.schedule.planner import plan

Call = Callable[..., Any]
CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
ONE = Work(hbm_bytes=8.0)


def product() -> Graph:
    b = tg.GraphBuilder("product")
    x, w = b.input("x", (8, 64), "f32"), b.weight("w", (64, 64), "f32")
    b.output(ops.add(ops.gemm(x, w, name="p"), ops.gemm(x, w, name="q"), name="sum"))
    return b.build()


def opened(scheduler: str = "list") -> Any:
    graph = product()
    return tg.compile(graph, plan(graph, CPU, scheduler))


def right(executable: Any, seed: int) -> bool:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    return torch.allclose(executable(x=x)["sum.out"], 2 * (x @ W), atol=1e-3)


@pytest.mark.parametrize("scheduler", ["sequential", "list"])
def test_answers_belong_to_the_thread_that_asks(scheduler: str) -> None:
    with opened(scheduler) as first, opened(scheduler) as second, ThreadPoolExecutor(6) as pool:
        for each in (first, second):
            each(x=torch.zeros(8, 64), w=W)
        pair = (first, second)
        work = [pool.submit(right, pair[i % 2], i) for i in range(120)]
        others = [pool.submit(call) for call in (first.timeline, first.eager, lambda: first.outputs) for _ in range(5)]
        assert all(future.result() for future in work)
        assert all(future.exception() is None for future in others)


def test_a_close_waits_for_the_call_and_later_calls_are_refused() -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(x: torch.Tensor, out: torch.Tensor) -> None:
        inside.set()
        go.wait(30)
        out.copy_(x)

    with custom(slow) as exe, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(exe, x=torch.ones(4))
        inside.wait(30)
        closing = pool.submit(exe.close)
        assert not closing.done()
        go.set()
        assert answer.result()["y"].tolist() == [1.0] * 4
        closing.result()
        with pytest.raises(ExecutionError, match="closed"):
            exe(x=torch.ones(4))


@contextmanager
def custom(function: Call) -> Iterator[Any]:
    b = tg.GraphBuilder("custom")
    x = b.input("x", (4,), "f32")
    b.output(b.call(function, [x], [spec("y", (4,), "f32")], work=ONE, name="mine"))
    graph = b.build()
    with tg.compile(graph, plan(graph, CPU)) as exe:
        yield exe


@pytest.mark.parametrize("method", ["launch", "bind", "timeline", "close", "other"])
@pytest.mark.parametrize("way", ["launch", "eager"])
def test_an_op_that_calls_an_executable_is_refused_by_name(method: str, way: str) -> None:
    found: list[Any] = []

    def nested(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)
        getattr(found[method == "other"], "launch" if method == "other" else method)()

    with opened() as other, custom(nested) as exe:
        found += [exe, other]
        exe.bind(x=torch.ones(4))
        with pytest.raises(ExecutionError, match=r"'mine'.*an op called the executable of '(custom|product)'"):
            getattr(exe, way)()
        assert right_after(other)


def right_after(exe: Any) -> bool:
    exe.bind(w=W)
    return right(exe, 1)


def test_a_signal_handler_that_calls_the_executable_is_refused() -> None:
    seen: list[BaseException] = []

    def handler(*_: Any) -> None:
        try:
            exe.launch()
        except ExecutionError as error:
            seen.append(error)

    def slow(x: torch.Tensor, out: torch.Tensor) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(0.2)
        out.copy_(x)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with custom(slow) as exe:
            assert exe(x=torch.ones(4))["y"].tolist() == [1.0] * 4
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "still inside a call" in str(seen[0])


@pytest.fixture
def python_hears_interrupts() -> Iterator[None]:
    """Python's own handler of Ctrl-C, whatever this process was started with or other tests have left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


def press_ctrl_c() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def main_thread_is_in(function: str) -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def interrupt_until_main_is_in(function: str) -> None:
    """Once, but again for a signal that came just before the main thread began to wait: that does not wake it."""
    while not main_thread_is_in(function):
        press_ctrl_c()
        until = time.monotonic() + 1.0
        while not main_thread_is_in(function) and time.monotonic() < until:
            time.sleep(0.001)


@pytest.mark.usefixtures("python_hears_interrupts")
def test_an_interrupted_replay_ends_and_the_next_is_right() -> None:
    def slow(x: torch.Tensor, out: torch.Tensor) -> None:
        if x[0] > 0:
            press_ctrl_c()
            time.sleep(0.2)
        out.copy_(x)

    with custom(slow) as exe, opened() as other:
        other(x=torch.zeros(8, 64), w=W)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                exe(x=torch.ones(4))
            assert exe(x=-torch.ones(4))["y"].tolist() == [-1.0] * 4
            assert right(other, 3)


@pytest.mark.usefixtures("python_hears_interrupts")
def test_a_second_interrupt_leaves_an_op_that_does_not_end() -> None:
    given_up = threading.Event()

    def stubborn(x: torch.Tensor, out: torch.Tensor) -> None:
        if x[0] > 0:
            interrupt_until_main_is_in("settled")  # it waits for this op to end
            press_ctrl_c()
            given_up.wait(60)
        out.copy_(x)

    with custom(stubborn) as exe:
        with pytest.raises(KeyboardInterrupt):
            exe(x=torch.ones(4))
        with pytest.raises(ExecutionError, match="compile the plan again"):
            exe(x=-torch.ones(4))
        given_up.set()
    with custom(stubborn) as exe:
        assert exe(x=-torch.ones(4))["y"].tolist() == [-1.0] * 4


# --------------------------------------------------------------------------------------------- children


def in_child(work: Call, *args: Any) -> Any:
    """What `work` gives in a forked child, or the error as text."""
    context: Any = multiprocessing.get_context("fork")
    answers = context.Queue()

    def run() -> None:
        try:
            answers.put(work(*args))
        except tg.TaskgraphError as error:
            answers.put(f"{type(error).__name__}: {error}")

    child = context.Process(target=run)
    child.start()
    try:
        return answers.get(timeout=60)
    finally:
        child.join(30)


def torch_and_executable(seed: int) -> bool:
    torch.mm(torch.randn(400, 400), torch.randn(400, 400))  # torch's own threads, in the child
    with opened() as mine:
        mine(x=torch.zeros(8, 64), w=W)
        return right(mine, seed)


def test_a_child_makes_its_own_executable_and_cannot_use_its_parents() -> None:
    torch.mm(torch.randn(400, 400), torch.randn(400, 400))
    with opened() as exe:
        exe(x=torch.zeros(8, 64), w=W)
        assert in_child(torch_and_executable, 5) is True
        for use in (right, lambda e, _: e.launch(), lambda e, _: e.timeline(), lambda e, _: e.bind(w=W)):
            assert "ExecutionError: " in in_child(use, exe, 1)
            assert "compile the plan again in this process" in in_child(use, exe, 1)
        assert in_child(lambda e: e.close(), exe) is None
        assert right(exe, 6)


def test_children_of_a_pool_that_is_made_during_replays_work() -> None:
    with opened() as exe, ThreadPoolExecutor(1) as replays:
        exe(x=torch.zeros(8, 64), w=W)
        done = threading.Event()
        going = replays.submit(lambda: [exe.launch() for _ in iter(done.is_set, True)])
        with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            assert list(pool.map(torch_and_executable, range(4))) == [True] * 4
        done.set()
        assert going.result()


def test_a_child_that_forks_has_its_own() -> None:
    assert in_child(lambda: in_child(torch_and_executable, 7)) is True


def test_a_sim_executable_is_the_makers_too() -> None:
    graph = product()
    with tg.compile(graph, plan(graph, "h100_sxm"), "sim") as exe, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: exe.launch(), range(100)))
        assert exe.elapsed_s == pytest.approx(100 * exe.timeline().makespan_s)  # type: ignore[attr-defined]
        assert "ExecutionError" in in_child(exe.launch)


# ------------------------------------------------------------------------------------------------- cuda


def test_threads_and_children_on_the_cuda_backend(on_virtual: Call) -> None:
    on_virtual(threads_and_children)


def threads_and_children() -> None:
    graph = product()
    made = tg.plan(graph, "h100_sxm", "list")
    with tg.compile(graph, made, "cuda", device="virtual:h100_sxm") as exe, ThreadPoolExecutor(4) as pool:
        exe(x=torch.zeros(8, 64), w=W)
        assert all(pool.map(lambda i: right(exe, i), range(40)))
        assert "ExecutionError" in in_child(right, exe, 1)
        assert in_child(exe.close) is None
        told = in_child(lambda: tg.compile(graph, made, "cuda", device="virtual:h100_sxm"))
        assert told.startswith(BackendUnavailable.__name__)
        assert "spawn" in told
        assert right(exe, 41)


def test_replays_cost_no_more_than_a_lock() -> None:
    """A turn takes a small part of the shortest replay: counted in Python calls, not in seconds."""
    calls: list[str] = []

    def profiler(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    with opened() as exe:
        assert isinstance(exe, CpuExecutable)
        exe(x=torch.zeros(8, 64), w=W)
        before = sys.getprofile()
        sys.setprofile(profiler)
        try:
            exe.launch()
        finally:
            sys.setprofile(before)
    assert len(calls) <= 6, calls
