"""The CUDA backend: a plan becomes one CUDA graph whose nodes sit in the green contexts of its partitions.

It is captured (`recording`), read back from the driver and compared with the plan; a difference is CaptureMismatch,
never a wrong graph.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from taskgraph.cost.model import own_product_pays
from taskgraph.errors import CudaError, GraphError, PlanError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor
from taskgraph.ops import COLLECTIVES
from taskgraph.runtime.buffers import host_tensor
from taskgraph.runtime.distributed import check_collectives
from taskgraph.runtime.executable import Options, from_first
from taskgraph.runtime.gpu import captures, driver, torch_ops, virtual
from taskgraph.runtime.gpu.arrays import DeviceArray, DeviceExtent, device_buffer
from taskgraph.runtime.gpu.collectives import collective
from taskgraph.runtime.gpu.driver import Gpu, Memory
from taskgraph.runtime.gpu.kinds import Buffer, CopyLaunch, DrySite, made_by, runs_ahead, seen
from taskgraph.runtime.gpu.lanes import Lanes
from taskgraph.runtime.gpu.on_stream import bound_call
from taskgraph.runtime.gpu.readback import compare
from taskgraph.runtime.gpu.recording import Entry, Marks, Recorded, Recorder, run_now
from taskgraph.runtime.gpu.shared import Block, Bytes, Lease, SharedMemory, placed
from taskgraph.runtime.gpu.sites import Faults, LaneSite
from taskgraph.runtime.gpu.standard import launches
from taskgraph.runtime.tensors import TensorExecutable
from taskgraph.schedule.plan import Plan, Span, Timeline
from taskgraph.schedule.planner import replay_times


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What was captured and found equal to the plan."""

    nodes: int
    edges: int
    kernels: int
    partitions: tuple[int, ...]
    capability: str
    updated: bool = False
    """The executable graph was updated in place; else it was instantiated."""
    by: tuple[tuple[str, str], ...] = ()
    """What runs each kind of op: "Triton" (compiled ahead), "cuda/kernels" (the .cu files), "torch", "function" (a
    custom op's), "group" (collectives of several ranks), "copy engine"; a kind with two has two entries."""
    dependent: int = 0
    """Edges whose kernel may start while the kernel before it still runs, and waits for it by itself."""

    @property
    def runners(self) -> str:
        """What runs how many kinds of op, for people: "Triton 9, torch 1"."""
        return ", ".join(f"{name} {count}" for name, count in Counter(by for _, by in self.by).most_common())


class CudaExecutable(TensorExecutable[Buffer]):
    """A plan captured on a GPU, real or virtual. Buffers are device memory that is allocated before capture.

    Device tensors (`__cuda_array_interface__`, torch's CUDA tensors) are bound in place; host tensors are uploaded
    once, into memory of our own. `launch(stream)` replays in the order of `stream` (anything with `__cuda_stream__`)
    and returns at once; without one it replays on a stream of our own and waits for it. An ExecutionError names an op
    that was given a token, position, slot or page that does not exist; after a replay on `stream`, the next launch says
    so. Nothing outside its buffers was touched then, but its outputs mean nothing.
    """

    takes = frozenset({"device", "group"})

    def __init__(self, graph: Graph, plan: Plan, options: Options | None = None) -> None:
        super().__init__(graph, plan, options)
        self._group = self._options.group
        if plan.device.kind != "gpu":
            raise PlanError(f"the plan is for {plan.device.name}, which is no GPU; plan with device='h100_sxm', say.")
        check_collectives(self._graph, plan, self._group)
        self._gpu = Gpu.open(self._options.device)
        if plan.device.sm_count > self._gpu.capability.sm_count:
            raise PlanError(
                f"the plan is for {plan.device.name} with {plan.device.sm_count} SMs; "
                f"{self._gpu.capability.device} has {self._gpu.capability.sm_count}. Plan for this device."
            )
        self._lanes = Lanes(self._gpu)
        self._torch = not self._gpu.capability.virtual and torch_ops.available()
        self._memory: list[Memory] = []
        self._exec: Any = None
        self._definition: captures.Capture | None = None
        self.origin: Any = None
        self._streams: list[Any] = []
        self._partitions: list[driver.Partitioned] = []
        self._kept: dict[str, Any] = {}
        """What was given in device memory by others, kept alive."""
        self._by: set[tuple[str, str]] = set()
        self._sites: dict[int, LaneSite] = {}
        self._scratch: list[list[Bytes]] = [[] for _ in plan.lanes]
        self._lease: Lease | None = None
        self.input_block: Block | None = None
        """Its inputs, where they lie in one stretch: after `share`."""
        try:
            self.origin = self._gpu.stream()
            self._stream_type = type(self.origin)
            self._open_lanes()
            self._own = self._allocate()
            words = self._memory_of(8 * len(plan.steps), pinned=True)
            self._faults = Faults([step.op for step in plan.steps], words)
        except BaseException:
            self.close()
            raise

    # -- lanes and buffers -----------------------------------------------------------------------

    def _open_lanes(self) -> None:
        self._partitions, self._streams = self._lanes.of(self._plan)
        self._contexts = [int(stream.context.handle) for stream in self._streams]

    def _memory_of(self, nbytes: int, pinned: bool = False) -> Memory:
        memory = Memory(max(nbytes, 1), pinned)
        self._memory.append(memory)
        return memory

    def _allocate(self) -> dict[str, Buffer]:
        """Inputs, outputs, states, weights each on their own; activations in the arena. What a copy op moves between
        host and device lies in pinned host memory on the host's side."""
        tensors, pinned = self._graph.tensor, self._pinned()
        self._arena: Bytes = self._memory_of(self._plan.arena_bytes)
        buffers = self._in_arena()
        for name in dict.fromkeys([*sorted(self._inputs), *self._graph.outputs]):
            t = tensors[name]
            if t.role in ("input", "activation"):
                memory = self._memory_of(t.nbytes, name in pinned)
                buffers[name] = Buffer(memory.address, t.shape, t.dtype, memory.pinned)
        return buffers

    def _in_arena(self) -> dict[str, Buffer]:
        tensors, arena = self._graph.tensor, self._arena.address
        return {
            slot.tensor: Buffer(arena + slot.offset, tensors[slot.tensor].shape, tensors[slot.tensor].dtype)
            for slot in self._plan.arena
        }

    def share(self, memory: SharedMemory) -> None:
        """Keep arena, inputs, outputs and scratch in memory that executables share of which one replays at a time, the
        inputs in one stretch (`input_block`), and run on lanes that they share. GraphError after it was captured."""
        with self._turns.next():
            self._begin()
            self._gpu.use()
            if self._exec is not None or self._lease is not None:
                raise GraphError(f"the plan of {self._graph.name!r} is captured; share memory before its first replay.")
            lease = self._lease = memory.lease()
            self._lanes.close()
            self._lanes = memory.lanes
            self._open_lanes()
            mine = {self._arena.address, *(b.address for b in self._own.values() if not b.pinned)}
            self._arena = lease.take(self._plan.arena_bytes)
            self.input_block, made = placed(self._graph, self._own, lease)
            self._own |= self._in_arena() | made
            for freed in [m for m in self._memory if m.address in mine]:
                freed.close()
                self._memory.remove(freed)

    def _pinned(self) -> set[str]:
        """What lies on the host: inputs and states that are copied to the device, and outputs and states that are
        copied to the host."""
        moves = [op for op in self._graph.ops if op.kind in ("copy", "copy_pages")]
        sources = {op.inputs[0] for op in moves if op.attr("direction") == "h2d"}
        targets = {
            op.outputs[0] if op.kind == "copy" else op.inputs[1] for op in moves if op.attr("direction") == "d2h"
        }
        given = {t.name for t in self._graph.with_role("input", "weight", "state")}
        return (sources & given) | (targets & (given | set(self._graph.outputs)))

    @property
    def memory_bytes(self) -> int:
        """Device and pinned memory that it holds itself: arena, inputs, outputs, scratch, and what it uploaded; without
        what it shares."""
        return sum(memory.nbytes for memory in self._memory)

    def state(self, name: str) -> DeviceArray:
        """A bound weight or state as it is now on the device."""
        with self._turns.next():
            self._begin()
            if name not in self._given:
                raise GraphError(f"{name!r} is not bound; bind() it first.")
            return self._shown(name)

    def _bind(self, values: Mapping[str, Any]) -> None:
        self._gpu.use()
        super()._bind(values)

    def _checked(self, declared: Tensor, value: Any) -> Buffer | torch.Tensor:
        """The device memory to use in place, or the host tensor to upload."""
        name = declared.name
        buffer = device_buffer(declared, value, "write" if name in self._written else "read")
        if buffer is None and declared.role == "activation":
            raise GraphError(f"output {name!r} was given a host tensor; bind device memory, or read outputs[{name!r}].")
        return host_tensor(declared, value, "copy") if buffer is None else buffer

    def _use(self, declared: Tensor, value: Any, checked: Buffer | torch.Tensor) -> None:
        name = declared.name
        if isinstance(checked, Buffer):
            self._kept[name] = value
            self._stale = self._stale or self._given.get(name) != checked
            self._given[name] = checked
            return
        if self._kept.pop(name, None) is not None:  # what is uploaded goes into our own, not into memory of others
            del self._given[name]
            self._stale = True
        self._upload(declared, checked)

    def _upload(self, declared: Tensor, host: torch.Tensor) -> None:
        """Copy a host tensor into a buffer of ours, made at its first use."""
        name = declared.name
        if name not in self._given and name not in self._own:
            memory = self._memory_of(declared.nbytes, name in self._pinned())
            self._given[name] = Buffer(memory.address, declared.shape, declared.dtype, memory.pinned)
            self._stale = True
        driver.upload(self._tensor(name).address, host.data_ptr(), declared.nbytes)

    def _shown(self, name: str) -> DeviceArray:
        return DeviceArray(self._tensor(name), self)

    def _results(self) -> dict[str, torch.Tensor]:
        return {name: self._shown(name).cpu() for name in self._graph.outputs}

    def _place(self, tensor: Buffer) -> tuple[int, int]:
        return tensor.address, tensor.nbytes

    def _extent(self, tensor: Buffer | None) -> DeviceExtent:
        found = self._arena if tensor is None else tensor
        return DeviceExtent(found.address, found.nbytes)

    # -- capture ---------------------------------------------------------------------------------

    def _launches(self) -> list[Entry]:
        """What every step runs, bound to its buffers; scratch and constants are allocated here, before capture."""
        self._check_given()
        self._by = set()
        return [self._bound(i, self._ops[step.op]) for i, step in enumerate(self._plan.steps)]

    def _bound(self, i: int, op: Op) -> Entry:
        ins, outs = seen(op, [self._tensor(n) for n in op.inputs]), [self._tensor(n) for n in op.outputs]
        if op.kind == "call":
            self._by.add((op.kind, "function"))
            return bound_call(
                op, self._options.functions, *([DeviceArray(b, self) for b in side] for side in (ins, outs))
            )
        if op.kind in COLLECTIVES and self._group is not None and op.integer("ranks") > 1:
            self._by.add((op.kind, "group"))
            return collective(op, DeviceArray(ins[0], self), DeviceArray(outs[0], self), self._group)
        if self._torch and op.kind in torch_ops.TORCH_OPS and not self._own_product(i, op, ins, outs):
            self._by.add((op.kind, "torch"))
            sides = [[DeviceArray(b, self) for b in side] for side in (ins, outs)]
            with self._lanes.pool.used():
                return torch_ops.bound(op, sides[0], sides[1], self._streams[self._plan.steps[i].lane])
        scratch = self._scratch[self._plan.steps[i].lane]
        fault, arch = self._faults.address(i), self._gpu.ahead(op.kind)
        room = None if self._lease is None else self._lease.take
        site = self._sites.setdefault(i, LaneSite(self._plan.sms(i), self._memory_of, scratch, fault, arch, room))
        made = launches(op, ins, outs, site.again())
        for launch in made:
            if not isinstance(launch, CopyLaunch):
                self._gpu.load(launch)  # before the capture
        self._by.add((op.kind, made_by(made)))
        return made

    def _own_product(self, i: int, op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
        """Whether a product runs by our own persistent kernel though a library has one."""
        site = DrySite(self._plan.sms(i), self._gpu.ahead(op.kind))
        pays = own_product_pays(op, self._graph.tensor, self._plan.device, site.sm_count)
        return pays and bool(site.arch) and runs_ahead(op, ins, outs, site)

    def capture(self) -> None:
        """Capture, compare, instantiate now; else the first replay does it, and one after `bind` moved a buffer.

        CudaError, which names the op, when one does what a capture forbids, and ExecutionError when its function
        raises; the capture is ended then, and the executable can be used again."""
        with self._turns.next():
            self._begin()
            self._capture()

    def graph_handle(self) -> int:
        """The plan as a CUgraph, for a graph of the caller's that takes it as a child (cuGraphAddChildGraphNode).

        It is ours: valid until `close`, or until the replay after a `bind` that moved a buffer. What its kernels were
        given and cannot use is told by the next launch of this executable. Errors as of `capture`."""
        with self._turns.next():
            self._begin()
            self._capture()
            if self._definition is None:
                self._definition = self._recorded(self._launches()).capture
            return int(self._definition.handle)

    def _forget_definition(self) -> None:
        if self._definition is not None:
            self._definition.close()
            self._definition = None

    def _capture(self) -> None:
        self._gpu.use()
        if not self._stale:
            return
        self._forget_definition()
        made = self._recorded(self._launches())
        try:
            facts = captures.read_graph(made.capture.handle)
            compare(self._plan, facts, made.owners, self._contexts, made.early)
            self._tell_times(made.owners)
            updated = self._renew(made.capture)
        finally:
            made.capture.close()
        kernels = sum(node.kind == "kernel" for node in facts.nodes)
        sizes = tuple(size for made in self._partitions for size in made.sm_counts)
        capability = self._gpu.capability.describe()
        by, dependent = tuple(sorted(self._by)), len(facts.dependent)
        self.report = CaptureReport(
            len(facts.nodes), len(facts.edges), kernels, sizes, capability, updated, by, dependent
        )
        self._stale = False

    def _recorded(self, bound: Sequence[Entry], marks: Marks | None = None) -> Recorded:
        return Recorder(self._gpu, self._plan, self.origin, self._lanes.pool).record(self._streams, bound, marks)

    def _renew(self, capture: captures.Capture) -> bool:
        """Update the executable graph in place where CUDA allows it (True); else instantiate a new one."""
        if self._exec is not None:
            try:
                with driver.driver_errors("update the graph"):
                    self._exec.update(capture.builder)
                return True
            except CudaError as error:
                if error.code != "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE":
                    raise
                self._exec.close()
        self._exec = capture.instantiate()
        return False

    def _tell_times(self, owners: Sequence[Sequence[int]]) -> None:
        """Give the virtual driver the evaluator's time of every op, in equal parts to the op's nodes."""
        control = virtual.loaded()
        if control is None:
            return
        spans = replay_times(self._graph, self._plan).spans
        nodes: list[int] = []
        seconds: list[float] = []
        for span, mine in zip(spans, owners, strict=True):
            nodes += mine
            seconds += [(span.end_s - span.start_s) / len(mine)] * len(mine)
        control.node_seconds(nodes, seconds)

    # -- replay ----------------------------------------------------------------------------------

    def _one_by_one(self, each: Callable[[Op, Callable[[], Any]], Any]) -> None:
        """`each` with every op, uncaptured."""
        self._gpu.use()
        bound = self._launches()
        for step, entry in zip(self._plan.steps, bound, strict=True):
            stream, pool = self._streams[step.lane], self._lanes.pool
            now = partial(run_now, self._gpu, step.op, entry, stream, pool, self._faults.check)
            each(self._ops[step.op], now)

    def _launch(self, stream: object) -> None:
        self._capture()
        self._faults.check()  # of replays on streams of others, which nobody has waited for here
        what = f"replay {self._graph.name!r}"
        if stream is None:
            with driver.driver_errors(what):
                self._exec.launch(self.origin)
                self.origin.sync()
            self._faults.check()
            return
        given = stream if isinstance(stream, self._stream_type) else self._gpu.foreign(stream)
        try:
            self._exec.launch(given)
        except Exception as error:
            driver.raise_typed(what, error)

    def check_faults(self) -> None:
        """ExecutionError for what replays on streams of others were given and cannot use, once they have ended: what
        the next launch would say."""
        self._faults.check()

    def replay_seconds(self, launches: int = 1) -> float:
        """Seconds of one replay, the mean of `launches` in a row, between two events. On a virtual device they are
        simulated, and the replays compute nothing."""
        with self._turns.next():
            self._begin()
            self._capture()
            begin, end = self._gpu.event(timing=True), self._gpu.event(timing=True)
            control = virtual.loaded()
            with driver.driver_errors(f"replay {self._graph.name!r}"), control.dry() if control else nullcontext():
                self.origin.record(begin)
                for _ in range(launches):
                    self._exec.launch(self.origin)
                self.origin.record(end)
                self.origin.sync()
            return driver.seconds_between(begin, end) / launches

    @property
    def kind(self) -> Literal["measured", "simulated"]:
        """What its times are: "measured", or "simulated" on a virtual device."""
        return "simulated" if self._gpu.capability.virtual else "measured"

    def _timeline(self) -> Timeline:
        """By a second graph with event records around every op; on the virtual device the times are simulated."""
        self._capture()
        steps = self._plan.steps
        marks = [(self._gpu.event(timing=True), self._gpu.event(timing=True)) for _ in steps]
        made = self._recorded(self._launches(), marks)
        executable = None
        try:
            self._tell_times(made.owners)
            executable = made.capture.instantiate()
            begin = self._gpu.event(timing=True)
            with driver.driver_errors("replay with events"):
                self.origin.record(begin)
                executable.launch(self.origin)
                self.origin.sync()
            self._faults.check()
            spans = [
                Span(s.op, s.lane, driver.seconds_between(begin, a), driver.seconds_between(begin, b))
                for s, (a, b) in zip(steps, marks, strict=True)
            ]
        finally:
            if executable is not None:
                executable.close()
            made.capture.close()
        return from_first(self.kind, self._gpu.capability.describe(), spans)

    # -- life ------------------------------------------------------------------------------------

    def _free(self) -> None:
        self._gpu.use()
        self._forget_definition()
        if self._exec is not None:
            self._exec.close()
        if self._lease is None:
            self._lanes.close()
        if self.origin is not None:
            self.origin.close()
        for memory in reversed(self._memory):
            memory.close()
        if self._lease is not None:
            self._lease.close()

    def _drop(self) -> None:
        if self._lease is None:
            self._lanes.forget()
        self._stale = True
        self._exec = self.origin = self._definition = None
        self._streams, self._partitions, self._memory = [], [], []
        self._given, self._kept, self._sites = {}, {}, {}
