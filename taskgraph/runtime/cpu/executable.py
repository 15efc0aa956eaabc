"""The CPU backend: lanes are persistent threads pinned to core sets; capture binds, replay runs a flat program.

A lane's program is a list of callables without arguments: ops, `acquire` of a lock for every wait on another
lane, and `release` of the locks that others wait for; native ops and what is between them are one callable. Replay has
no look-ups, branches or allocation of its own.
"""

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch

from taskgraph.errors import BackendUnavailable, ExecutionError, RankLost
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor
from taskgraph.runtime.buffers import host_tensor
from taskgraph.runtime.check import HostExtent
from taskgraph.runtime.cpu import choose
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE, CpuSite, Entry
from taskgraph.runtime.cpu.lanes import LaneProgram, LaneThread, alone, replay, replay_here
from taskgraph.runtime.cpu.native import NativeEntry, Row, Semaphores
from taskgraph.runtime.cpu.standard import bind
from taskgraph.runtime.distributed import check_collectives
from taskgraph.runtime.executable import Options, from_first
from taskgraph.runtime.tensors import TensorExecutable
from taskgraph.runtime.turns import in_op
from taskgraph.schedule.plan import Lane, Plan, Span, Step, Timeline

_ALIGNMENT = 64


class CpuExecutable(TensorExecutable[torch.Tensor]):
    """A plan captured on this machine's cores. Buffers are torch tensors on the CPU; activations live in one arena.

    What is bound are CPU tensors (torch, or anything with DLPack), used in place. `launch` returns when every lane is
    done. With a `group`, capture and every replay are collective: all ranks of the group must make the same calls.
    """

    takes = frozenset({"group", "ways"})

    def __init__(self, graph: Graph, plan: Plan, options: Options | None = None) -> None:
        super().__init__(graph, plan, options)
        self._group, ways = self._options.group, self._options.ways
        self._ways = choose.here() if ways is None else ways
        check_collectives(self._graph, plan, self._group)
        self._constants = frozenset(t.name for t in self._graph.with_role("weight"))
        self._changes: dict[str, int] = {}
        self._arena = _aligned(max(plan.arena_bytes, 1))
        self._own = self._allocate()
        self._entries: list[Entry] = []
        self._programs: list[list[Entry]] = []
        self._names: list[list[str]] = []
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < plan.device.sm_count:
            cores = [cores[i % len(cores)] for i in range(plan.device.sm_count)]
        self._lanes: list[LaneThread] = []
        sharing: Counter[Lane] = Counter()
        for i, lane in enumerate(plan.lanes):
            part = plan.partition(i)
            mine, number = cores[part.first_sm : part.end_sm], sharing[lane]
            turn = number % part.sm_count  # lanes of one partition begin on different cores
            self._lanes.append(LaneThread.open([*mine[turn:], *mine[:turn]], number))
            sharing[lane] += 1
        self._alone = len(plan.lanes) == 1 and plan.partition(0).sm_count == 1 and self._group is None
        self._left = weakref.finalize(self, LaneThread.leave, tuple(self._lanes))
        self._left.atexit = False

    # -- buffers ---------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, torch.Tensor]:
        """Static inputs and outputs, and every activation as a view of the arena."""
        tensors = self._graph.tensor
        strange = next((t for t in self._graph.tensors if t.dtype not in TORCH_DTYPE), None)
        if strange is not None:
            raise BackendUnavailable(f"tensor {strange.name!r}: the cpu backend has no dtype {strange.dtype!r}.")
        buffers = {t.name: _empty(t) for t in self._graph.with_role("input")}
        buffers |= {name: _empty(tensors[name]) for name in self._graph.outputs if tensors[name].role == "activation"}
        for slot in self._plan.arena:
            t = tensors[slot.tensor]
            view = self._arena[slot.offset : slot.offset + t.nbytes].view(TORCH_DTYPE[t.dtype]).view(t.shape)
            buffers.setdefault(slot.tensor, view)
        return buffers

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arena, and of the inputs and outputs that are not bound."""
        tensors = self._graph.tensor
        arena = {slot.tensor for slot in self._plan.arena}
        own = [t for t in self._own if t not in arena and t not in self._given]
        return self._plan.arena_bytes + sum(tensors[name].nbytes for name in own)

    def _checked(self, declared: Tensor, value: Any) -> torch.Tensor:
        return host_tensor(declared, value, "write" if declared.name in self._written else "read")

    def _use(self, declared: Tensor, value: Any, checked: torch.Tensor) -> None:
        name = declared.name
        change = 0 if checked.is_inference() else checked._version
        bound = self._given.get(name)
        if bound is None or bound.data_ptr() != checked.data_ptr():
            self._given[name] = checked
            self._stale = True
        elif name in self._constants and self._changes.get(name) != change:
            self._stale = True  # packed as it was
        self._changes[name] = change

    def _give(self, values: Mapping[str, Any]) -> None:
        copied = {
            name: host_tensor(self._declared(name), value, "copy")
            for name, value in values.items()
            if name in self._inputs
        }
        self._bind({name: value for name, value in values.items() if name not in self._inputs})
        for name, tensor in copied.items():
            if self._given.pop(name, None) is not None:  # what was bound belongs to the caller
                self._stale = True
            self._own[name].copy_(tensor)
            self._set.add(name)
        self._check_inputs()

    def _shown(self, name: str) -> torch.Tensor:
        return self._tensor(name)

    def _results(self) -> dict[str, torch.Tensor]:
        return {name: self._tensor(name).clone() for name in self._graph.outputs}

    def _place(self, tensor: torch.Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.nbytes

    def _extent(self, tensor: torch.Tensor | None) -> HostExtent:
        return HostExtent.of(self._arena if tensor is None else tensor)

    # -- capture ---------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Bind buffers and callables once; again only after a `bind` changed an address."""
        if not self._stale:
            return
        self._check_given()
        with torch.inference_mode():
            entries = [self._entry(step) for step in self._plan.steps]
        self._entries = entries
        self._assemble(entries)
        self._stale = False

    def _entry(self, step: Step) -> Entry:
        op = self._ops[step.op]
        site = CpuSite(self._plan.partition(step.lane).sm_count, self._constants, self._group, self._ways)
        return bind(
            op, [*map(self._tensor, op.inputs)], [*map(self._tensor, op.outputs)], site, self._options.functions
        )

    def _assemble(self, entries: list[Entry], stamps: bool = False) -> None:
        """Programs of all lanes: for each step its waits, its op, and the release of those who wait for it.

        An edge between native ops is a semaphore of their rows, any other a lock between entries."""
        steps = self._plan.steps
        edges = [(w, i) for i, step in enumerate(steps) for w in step.waits]
        inner = [edge for edge in edges if all(isinstance(entries[i], NativeEntry) for i in edge)]
        semaphores = Semaphores(len(inner))
        number = {edge: k for k, edge in enumerate(inner)}
        locks = {edge: threading.Lock() for edge in edges if edge not in number}
        for lock in locks.values():
            lock.acquire()
        wanted: dict[int, list[tuple[int, int]]] = {}
        for edge in edges:
            wanted.setdefault(edge[0], []).append(edge)
        programs = [LaneProgram(lane, stamps) for lane in self._lanes]
        for i, (step, entry) in enumerate(zip(steps, entries, strict=True)):
            lane, waits, posts = programs[step.lane], [(w, i) for w in step.waits], wanted.get(i, ())
            lane.add(step.op, *(locks[edge].acquire for edge in waits if edge in locks))
            lane.add_items(semaphores.wait(number[edge]) for edge in waits if edge in number)
            lane.add(step.op, entry)
            lane.add_items(semaphores.post(number[edge]) for edge in posts if edge in number)
            lane.add(step.op, *(locks[edge].release for edge in posts if edge in locks))
        self._semaphores = semaphores
        self._programs, self._names = [lane.finish() for lane in programs], [lane.names for lane in programs]

    # -- replay ----------------------------------------------------------------------------------

    def _launch(self, stream: object) -> None:
        if self._stale:
            self._capture()
        failed = replay(self._lanes, self._programs)
        if failed:
            self._raise([(error, self._failed_op(lane, at)) for lane, at, error in failed])

    def launch_here(self) -> None:
        """As `launch`; a plan of one lane on one core runs on the calling thread: nobody is woken and waited for, and
        the caller's pool of threads stays as it is. ExecutionError names the op that raised."""
        if not self._alone:
            return self.launch()
        with self._turns.next():
            if self._closed or self._options.check:
                self._begin()
                return self._replay(None)
            if self._stale:
                self._capture()
            failed = replay_here(self._programs[0])
            if failed is not None:
                self._raise([(failed[1], self._failed_op(0, failed[0]))])
        return None

    def _failed_op(self, lane: int, at: int) -> str:
        entry = self._programs[lane][at]
        return entry.op if isinstance(entry, Row) else self._names[lane][at]

    def eager(self) -> None:
        """Run the same ops one by one on the calling thread, in the plan's order and without lanes.

        Each op keeps its thread count. For debugging, and as the yardstick of `launch`."""
        with self._turns.next():
            self._begin()
            self._one_by_one(lambda _, run: run())

    def _one_by_one(self, each: Callable[[Op, Entry], Any]) -> None:
        """`each` for every op in the plan's order, on this thread."""
        self._capture()
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

    def _timeline(self) -> Timeline:
        self._capture()
        spans: dict[str, Span] = {}
        lanes = {step.op: step.lane for step in self._plan.steps}

        def timed(name: str, entry: Entry) -> None:
            begin = time.perf_counter()
            entry()
            spans[name] = Span(name, lanes[name], begin, time.perf_counter())

        steps = self._plan.steps
        entries: list[Entry] = [
            e if isinstance(e, NativeEntry) else partial(timed, s.op, e)
            for s, e in zip(steps, self._entries, strict=True)
        ]
        self._assemble(entries, stamps=True)
        try:
            self._launch(None)
            for row in (entry for program in self._programs for entry in program if isinstance(entry, Row)):
                spans |= {name: Span(name, lanes[name], begin, end) for name, begin, end in row.spans()}
        finally:
            self._assemble(self._entries)
        origin = f"this machine, {self._plan.device.name}"
        return from_first("measured", origin, (spans[step.op] for step in steps))

    # -- life ------------------------------------------------------------------------------------

    def _free(self) -> None:
        self._left.detach()
        with alone():
            for lane in self._lanes:
                lane.program = []
        for lane in reversed(self._lanes):
            lane.close()

    def _drop(self) -> None:
        self._stale, self._lanes = True, []
        self._own, self._given, self._entries, self._programs = {}, {}, [], []
        self._arena = torch.empty(0, dtype=torch.uint8)


def _aligned(nbytes: int) -> torch.Tensor:
    raw = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % _ALIGNMENT
    return raw[start : start + nbytes]


def _empty(tensor: Tensor) -> torch.Tensor:
    return _aligned(tensor.nbytes).view(TORCH_DTYPE[tensor.dtype]).view(tensor.shape)
