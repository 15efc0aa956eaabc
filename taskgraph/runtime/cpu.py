"""The CPU backend: lanes are persistent threads pinned to core sets; capture binds, replay runs a flat program.

A lane's program is a list of callables without arguments: ops, `acquire` of a lock for every wait on another
lane, and `release` of the locks that others wait for. Replay has no look-ups, branches or allocation of its own.
"""

import operator
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

import torch

from taskgraph.errors import BackendUnavailable, ExecutionError, GraphError, RankLost
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Tensor
from taskgraph.runtime import choose, kernels
from taskgraph.runtime.distributed import Group, check_collectives
from taskgraph.runtime.impls import TORCH_DTYPE, Entry, Site, bind
from taskgraph.runtime.ways import Ways
from taskgraph.schedule.plan import Plan, Span, Step, Timeline

_ALIGNMENT = 64


class _Lane:
    """A persistent thread pinned to a core set, shared by all executables that have a lane there.

    One thread a core set and lane number, however many plans are captured: pools of idle threads that outnumber the
    cores would slow every parallel op down.
    """

    _alive: ClassVar[dict[tuple[tuple[int, ...], int], "_Lane"]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, key: tuple[tuple[int, ...], int]) -> None:
        self.program: list[Entry] = []
        self.failed: tuple[int, BaseException] | None = None
        self._key, self._users = key, 0
        self._start, self._done = threading.Lock(), threading.Lock()
        self._start.acquire()
        self._done.acquire()
        self.start, self.wait = self._start.release, self._done.acquire
        self._closing = False
        cores, number = key
        name = f"taskgraph-lane-{number}"
        self._thread = threading.Thread(target=self._work, args=(cores,), name=name, daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, cores: Sequence[int], number: int) -> "_Lane":
        """Lane `number` on `cores`, started if it is the first there."""
        key = (tuple(cores), number)
        with cls._guard:
            lane = cls._alive.get(key) or cls._alive.setdefault(key, cls(key))
            lane._users += 1
            return lane

    def close(self) -> None:
        """One user less; the last one stops the thread."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
            del self._alive[self._key]
        self._closing = True
        self._start.release()
        self._thread.join()

    def _work(self, cores: Sequence[int]) -> None:
        broken: BaseException | None = None
        try:
            kernels.bind_threads(cores)
            torch.set_num_threads(len(cores))
        except BaseException as error:  # handed to whoever replays first: a dead lane would hang them
            broken = error
        with torch.inference_mode():
            while True:
                self._start.acquire()
                if self._closing:
                    break
                entries = iter(self.program)
                try:
                    if broken is not None:
                        next(entries)
                        raise broken
                    for run in entries:
                        run()
                except BaseException as error:
                    at = len(self.program) - operator.length_hint(entries) - 1
                    self.failed = (at, error)
                    self._drain(at + 1)
                self._done.release()
        kernels.release_threads()

    def _drain(self, at: int) -> None:
        """Keep the other lanes going after an error: take and give every remaining lock, run no op."""
        for entry in self.program[at:]:
            if isinstance(getattr(entry, "__self__", None), _LOCK):
                entry()


_LOCK = type(threading.Lock())
_REPLAY = threading.Lock()
"""One replay at a time: executables share the lanes and the cores."""


class CpuExecutable:
    """A plan captured on this machine's cores. Buffers are torch tensors on the CPU; activations live in one arena.

    With a `group`, capture and every replay are collective: all ranks of the group must make the same calls.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        functions: Mapping[str, Callable[..., Any]],
        group: Group | None = None,
        ways: Ways | None = None,
    ) -> None:
        self._graph, self._plan, self._functions, self._group = graph.flat(), plan, dict(functions), group
        self._ways = choose.here() if ways is None else ways
        check_collectives(self._graph, plan, group)
        self._ops = {op.name: op for op in self._graph.ops}
        self._constants = frozenset(t.name for t in self._graph.with_role("weight"))
        self._given: dict[str, torch.Tensor] = {}
        self._inputs, self._set = {t.name for t in self._graph.with_role("input")}, set[str]()
        self._buffers = self._allocate()
        self._stale, self._closed = True, False
        self._names: list[list[str]] = []
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < plan.device.sm_count:
            cores = [cores[i % len(cores)] for i in range(plan.device.sm_count)]
        self._lanes: list[_Lane] = []
        for i in range(len(plan.lanes)):
            part = plan.partition(i)
            self._lanes.append(_Lane.open(cores[part.first_sm : part.end_sm], i))

    # -- buffers ---------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, torch.Tensor]:
        """Static inputs and outputs, and every activation as a view of the arena."""
        arena = _aligned(max(self._plan.arena_bytes, 1))
        tensors = self._graph.tensor
        strange = next((t for t in self._graph.tensors if t.dtype not in TORCH_DTYPE), None)
        if strange is not None:
            raise BackendUnavailable(f"tensor {strange.name!r}: the cpu backend has no dtype {strange.dtype!r}.")
        buffers = {t.name: _empty(t) for t in self._graph.with_role("input")}
        buffers |= {name: _empty(tensors[name]) for name in self._graph.outputs if tensors[name].role == "activation"}
        for slot in self._plan.arena:
            t = tensors[slot.tensor]
            view = arena[slot.offset : slot.offset + t.nbytes].view(TORCH_DTYPE[t.dtype]).view(t.shape)
            buffers.setdefault(slot.tensor, view)
        return buffers

    @property
    def outputs(self) -> Mapping[str, torch.Tensor]:
        """The output buffers by tensor name; each replay overwrites them."""
        self._check_open()
        self._capture()
        return {name: self._tensor(name) for name in self._graph.outputs}

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """The input buffers by tensor name: write into them before `launch()`, or `bind` your own."""
        self._check_open()
        return {t.name: self._tensor(t.name) for t in self._graph.with_role("input")}

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arena, and of the inputs and outputs that are not bound."""
        tensors = self._graph.tensor
        arena = {slot.tensor for slot in self._plan.arena}
        own = (t for t in self._buffers if t not in arena and t not in self._given)
        return self._plan.arena_bytes + sum(tensors[name].nbytes for name in own)

    def _tensor(self, name: str) -> torch.Tensor:
        found = self._given.get(name)
        return self._buffers[name] if found is None else found

    def bind(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Use these CPU tensors (torch, or anything with DLPack) in place: inputs, weights, states or outputs.

        GraphError when a name is unknown or a shape or dtype differs."""
        self._check_open()
        for name, value in {**(tensors or {}), **named}.items():
            tensor = self._checked(name, value)
            self._set.add(name)
            bound = self._given.get(name)
            if bound is None or bound.data_ptr() != tensor.data_ptr():
                self._given[name] = tensor
                self._stale = True

    def _checked(self, name: str, value: Any) -> torch.Tensor:
        declared = self._graph.tensor.get(name)
        if declared is None or (declared.role == "activation" and name not in self._graph.outputs):
            raise GraphError(f"graph {self._graph.name!r} has no input, weight, state or output {name!r}.")
        if not isinstance(value, torch.Tensor) and not hasattr(value, "__dlpack__"):
            raise GraphError(
                f"tensor {name!r} was given a {type(value).__name__}; give a tensor (torch, NumPy, DLPack)."
            )
        tensor = value if isinstance(value, torch.Tensor) else torch.utils.dlpack.from_dlpack(value)
        if tuple(tensor.shape) != declared.shape or tensor.dtype != TORCH_DTYPE[declared.dtype]:
            raise GraphError(
                f"tensor {name!r} is {declared.dtype}{list(declared.shape)}; "
                f"got {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}."
            )
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise GraphError(f"tensor {name!r} must be contiguous and on the CPU; call .cpu().contiguous() first.")
        return tensor.detach()  # a view of the same memory, outside autograd

    # -- capture ---------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Bind buffers and callables once; again only after a `bind` changed an address."""
        if not self._stale:
            return
        missing = [t.name for t in self._graph.with_role("weight", "state") if t.name not in self._given]
        if missing:
            raise GraphError(
                f"{len(missing)} weights or states are not bound, the first is {missing[0]!r}; bind() them."
            )
        with torch.inference_mode():
            entries = [self._entry(step) for step in self._plan.steps]
        self._entries = entries
        self._assemble(entries)
        self._stale = False

    def _entry(self, step: Step) -> Entry:
        op = self._ops[step.op]
        site = Site(self._plan.partition(step.lane).sm_count, self._constants, self._group, self._ways)
        return bind(op, [*map(self._tensor, op.inputs)], [*map(self._tensor, op.outputs)], site, self._functions)

    def _assemble(self, entries: list[Entry]) -> None:
        """Programs of all lanes: for each step its waits, its op, and the release of those who wait for it."""
        locks = {(w, i): threading.Lock() for i, step in enumerate(self._plan.steps) for w in step.waits}
        wanted: dict[int, list[Entry]] = {}
        for (source, _), lock in locks.items():
            lock.acquire()
            wanted.setdefault(source, []).append(lock.release)
        self._names = [[] for _ in self._lanes]
        programs: list[list[Entry]] = [[] for _ in self._lanes]
        for i, (step, entry) in enumerate(zip(self._plan.steps, entries, strict=True)):
            row = [*(locks[w, i].acquire for w in step.waits), entry, *wanted.get(i, ())]
            programs[step.lane] += row
            self._names[step.lane] += [step.op] * len(row)
        self._programs = programs

    # -- replay ----------------------------------------------------------------------------------

    def launch(self, stream: object = None) -> None:
        """Replay once; returns when every lane is done. ExecutionError names the op that raised."""
        if self._stale:
            self._check_open()
            self._capture()
        kernels.release_threads()  # the caller's own pool would slow the lanes' pools down
        with _REPLAY:
            for lane, program in zip(self._lanes, self._programs, strict=True):
                lane.program = program
                lane.start()
            for lane in self._lanes:
                lane.wait()
            failed = [(lane.failed, i) for i, lane in enumerate(self._lanes) if lane.failed is not None]
            for _, i in failed:
                self._lanes[i].failed = None
        if failed:
            self._raise([(error, self._names[i][at]) for (at, error), i in failed])

    def eager(self) -> None:
        """Run the same ops one by one on the calling thread, in the plan's order and without lanes.

        Each op keeps its thread count. For debugging, and as the yardstick of `launch`."""
        self._check_open()
        self._capture()
        with _REPLAY, torch.inference_mode():
            for step, run in zip(self._plan.steps, self._entries, strict=True):
                try:
                    run()
                except Exception as error:
                    self._raise([(error, step.op)])

    def _raise(self, failures: list[tuple[BaseException, str]]) -> NoReturn:
        """The first failure in the plan's order. The other ranks must not go on with a rank that skipped ops."""
        position = {step.op: i for i, step in enumerate(self._plan.steps)}
        error, op = min(failures, key=lambda failure: position[failure[1]])
        if self._group is not None:
            self._group.leave(f"op {op!r} failed")
        if isinstance(error, RankLost):
            raise RankLost(f"op {op!r} failed: {error}") from error
        raise ExecutionError(f"op {op!r} failed: {type(error).__name__}: {error}", op=op) from error

    def __call__(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> dict[str, torch.Tensor]:
        """Copy the given inputs into their buffers, bind weights and states, replay, return copies of the outputs."""
        self._check_open()
        for name, value in {**(tensors or {}), **named}.items():
            if name in self._inputs:
                self._tensor(name).copy_(self._checked(name, value))
                self._set.add(name)
            else:
                self.bind({name: value})
        missing = sorted(self._inputs - self._set)
        if missing:
            raise GraphError(f"input {missing[0]!r} of graph {self._graph.name!r} was never given; pass or bind() it.")
        self.launch()
        return {name: self._tensor(name).clone() for name in self._graph.outputs}

    def timeline(self) -> Timeline:
        """Replay once with a clock around every op; the measured timeline, from the start of the first op."""
        self._check_open()
        self._capture()
        spans: dict[str, Span] = {}

        def timed(name: str, lane: int, entry: Entry) -> None:
            begin = time.perf_counter()
            entry()
            spans[name] = Span(name, lane, begin, time.perf_counter())

        steps = self._plan.steps
        self._assemble([partial(timed, s.op, s.lane, e) for s, e in zip(steps, self._entries, strict=True)])
        try:
            self.launch()
        finally:
            self._assemble(self._entries)
        zero = min(s.start_s for s in spans.values())
        ordered = (spans[step.op] for step in steps)
        shifted = tuple(Span(s.op, s.lane, s.start_s - zero, s.end_s - zero) for s in ordered)
        return Timeline("measured", f"this machine, {self._plan.device.name}", shifted)

    # -- life ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ExecutionError("the executable is closed; compile the plan again.", op="")

    def close(self) -> None:
        """Stop the lanes and drop the buffers; a second call does nothing."""
        if not self._closed:
            self._closed = self._stale = True
            with _REPLAY:
                for lane in self._lanes:
                    lane.program = []
            for lane in reversed(self._lanes):
                lane.close()
            self._buffers, self._given, self._entries, self._programs = {}, {}, [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _aligned(nbytes: int) -> torch.Tensor:
    raw = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % _ALIGNMENT
    return raw[start : start + nbytes]


def _empty(tensor: Tensor) -> torch.Tensor:
    return _aligned(tensor.nbytes).view(TORCH_DTYPE[tensor.dtype]).view(tensor.shape)
