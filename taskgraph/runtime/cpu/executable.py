"""The CPU backend: lanes are persistent threads pinned to core sets; capture binds, replay runs a flat program.

A lane's program is a list of callables without arguments: ops, `acquire` of a lock for every wait on another
lane, and `release` of the locks that others wait for. Replay has no look-ups, branches or allocation of its own.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

import torch

from taskgraph.errors import BackendUnavailable, ExecutionError, GraphError, RankLost
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor
from taskgraph.runtime.buffers import Region, changed_names, check_apart, host_tensor, written_names
from taskgraph.runtime.check import HostSpace, Watch
from taskgraph.runtime.cpu import choose
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE, CpuSite, Entry
from taskgraph.runtime.cpu.lanes import Lane, alone, replay
from taskgraph.runtime.cpu.standard import bind
from taskgraph.runtime.cpu.ways import Ways
from taskgraph.runtime.distributed import Group, check_collectives
from taskgraph.runtime.turns import Turns, in_op
from taskgraph.schedule.plan import Plan, Span, Step, Timeline

_ALIGNMENT = 64


class CpuExecutable:
    """A plan captured on this machine's cores. Buffers are torch tensors on the CPU; activations live in one arena.

    Several threads may call it: a call waits for those before it, so that its answers belong to its inputs.

    With a `group`, capture and every replay are collective: all ranks of the group must make the same calls.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        functions: Mapping[str, Callable[..., Any]],
        group: Group | None = None,
        ways: Ways | None = None,
        check: bool = False,
    ) -> None:
        self._checks = check
        self._graph, self._plan, self._functions, self._group = graph.flat(), plan, dict(functions), group
        self._ways = choose.here() if ways is None else ways
        check_collectives(self._graph, plan, group)
        self._turns = Turns(self._graph.name)
        self._ops = {op.name: op for op in self._graph.ops}
        self._written = written_names(self._graph)
        self._constants = frozenset(t.name for t in self._graph.with_role("weight"))
        self._given: dict[str, torch.Tensor] = {}
        self._changes: dict[str, int] = {}
        self._inputs, self._set = {t.name for t in self._graph.with_role("input")}, set[str]()
        self._buffers = self._allocate()
        self._stale, self._closed = True, False
        self._names: list[list[str]] = []
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < plan.device.sm_count:
            cores = [cores[i % len(cores)] for i in range(plan.device.sm_count)]
        self._lanes: list[Lane] = []
        for i in range(len(plan.lanes)):
            part = plan.partition(i)
            self._lanes.append(Lane.open(cores[part.first_sm : part.end_sm], i))

    # -- buffers ---------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, torch.Tensor]:
        """Static inputs and outputs, and every activation as a view of the arena."""
        self._arena = arena = _aligned(max(self._plan.arena_bytes, 1))
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
        with self._turns.next():
            self._check_open()
            self._capture()
            return {name: self._tensor(name) for name in self._graph.outputs}

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """The input buffers by tensor name: write into them before `launch()`, or `bind` your own."""
        with self._turns.next():
            self._check_open()
            return {t.name: self._tensor(t.name) for t in self._graph.with_role("input")}

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arena, and of the inputs and outputs that are not bound."""
        tensors = self._graph.tensor
        arena = {slot.tensor for slot in self._plan.arena}
        own = [t for t in self._buffers if t not in arena and t not in self._given]
        return self._plan.arena_bytes + sum(tensors[name].nbytes for name in own)

    def _tensor(self, name: str) -> torch.Tensor:
        found = self._given.get(name)
        return self._buffers[name] if found is None else found

    def bind(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Use these CPU tensors (torch, or anything with DLPack) in place: inputs, weights, states or outputs.

        GraphError, and nothing is bound, when a name is unknown, a shape or dtype differs, or the memory cannot be used
        so; at the next replay, when what it writes to shares memory with anything else."""
        with self._turns.next():
            self._bind({**(tensors or {}), **named})

    def _bind(self, values: Mapping[str, Any]) -> None:
        self._check_open()
        checked = {
            name: host_tensor(self._declared(name), value, "write" if name in self._written else "read")
            for name, value in values.items()
        }
        for name, tensor in checked.items():
            self._set.add(name)
            change = 0 if tensor.is_inference() else tensor._version
            bound = self._given.get(name)
            if bound is None or bound.data_ptr() != tensor.data_ptr():
                self._given[name] = tensor
                self._stale = True
            elif name in self._constants and self._changes.get(name) != change:
                self._stale = True  # packed as it was
            self._changes[name] = change

    def _declared(self, name: str) -> Tensor:
        declared = self._graph.tensor.get(name)
        if declared is None or (declared.role == "activation" and name not in self._graph.outputs):
            raise GraphError(f"graph {self._graph.name!r} has no input, weight, state or output {name!r}.")
        return declared

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
        changed = changed_names(self._graph)
        tensors = {name: self._tensor(name) for name in {*self._given, *self._inputs, *self._graph.outputs}}
        check_apart(Region(t.data_ptr(), t.nbytes, name, name in changed) for name, t in tensors.items())
        with torch.inference_mode():
            entries = [self._entry(step) for step in self._plan.steps]
        self._entries = entries
        self._assemble(entries)
        self._stale = False

    def _entry(self, step: Step) -> Entry:
        op = self._ops[step.op]
        site = CpuSite(self._plan.partition(step.lane).sm_count, self._constants, self._group, self._ways)
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
        with self._turns.next():
            self._launch()

    def _launch(self) -> None:
        if self._stale:
            self._check_open()
            self._capture()
        if self._checks:
            self._check(None)
            return
        failed = replay(self._lanes, self._programs)
        if failed:
            self._raise([(error, self._names[lane][at]) for lane, at, error in failed])

    def eager(self) -> None:
        """Run the same ops one by one on the calling thread, in the plan's order and without lanes.

        Each op keeps its thread count. For debugging, and as the yardstick of `launch`."""
        with self._turns.next():
            self._check_open()
            self._capture()
            self._one_by_one(lambda _, run: run())

    def check(self, kinds: Collection[str] | None = None) -> None:
        """Replay once, op by op, and look at what each op does: see `Executable.check`."""
        with self._turns.next():
            self._check_open()
            self._capture()
            self._check(kinds)

    def _check(self, kinds: Collection[str] | None) -> None:
        names = {*self._given, *self._inputs, *self._graph.outputs}
        own = {name: HostSpace.of(self._tensor(name)) for name in names}
        watch = Watch(self._graph, self._plan, HostSpace.of(self._arena), own)
        self._one_by_one(lambda op, run: watch.run(op, run, kinds is None or op.kind in kinds))

    def _one_by_one(self, each: Callable[[Op, Entry], Any]) -> None:
        """`each` for every op in the plan's order, on this thread."""
        with alone(), torch.inference_mode(), in_op():
            for step, run in zip(self._plan.steps, self._entries, strict=True):
                try:
                    each(self._ops[step.op], run)
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
        if isinstance(error, ExecutionError) and error.op == op:
            raise error
        text = " ".join(" ".join(map(str, error.args)).split())
        raise ExecutionError(f"op {op!r} failed: {type(error).__name__}: {text}", op=op) from error

    def __call__(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> dict[str, torch.Tensor]:
        """Copy the given inputs into their buffers, bind weights and states, replay, return copies of the outputs."""
        with self._turns.next():
            self._check_open()
            values = {**(tensors or {}), **named}
            copied = {
                name: host_tensor(self._declared(name), value, "copy")
                for name, value in values.items()
                if name in self._inputs
            }
            self._bind({name: value for name, value in values.items() if name not in self._inputs})
            for name, tensor in copied.items():
                if self._given.pop(name, None) is not None:  # what was bound belongs to the caller
                    self._stale = True
                self._buffers[name].copy_(tensor)
                self._set.add(name)
            missing = sorted(self._inputs - self._set)
            if missing:
                raise GraphError(
                    f"input {missing[0]!r} of graph {self._graph.name!r} was never given; pass or bind() it."
                )
            self._launch()
            return {name: self._tensor(name).clone() for name in self._graph.outputs}

    def timeline(self) -> Timeline:
        """Replay once with a clock around every op; the measured timeline, from the start of the first op."""
        with self._turns.next():
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
                self._launch()
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
        """Stop the lanes and drop the buffers; a second call does nothing.

        It waits for a call that another thread is in. A forked child only drops its copies."""
        if self._turns.forked:
            self._lanes = []
            self._drop()
            return
        with self._turns.next():
            if not self._closed:
                with alone():
                    for lane in self._lanes:
                        lane.program = []
                for lane in reversed(self._lanes):
                    lane.close()
                self._drop()

    def _drop(self) -> None:
        self._closed = self._stale = True
        self._buffers, self._given, self._entries, self._programs = {}, {}, [], []
        self._arena = torch.empty(0, dtype=torch.uint8)

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
