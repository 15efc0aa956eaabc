"""Replays of captured plans one behind another: each takes one upload of its inputs from pinned memory, one launch and
one download of an output, all on one stream, and the host waits for nothing but what came down."""

import ctypes
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from taskgraph.errors import ExecutionError, GraphError
from taskgraph.runtime.executable import Executable
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.driver import Gpu, Memory
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.runtime.gpu.kinds import Buffer
from taskgraph.runtime.gpu.shared import Block, SharedMemory

_NUMPY = {"f64": np.float64, "f32": np.float32, "i64": np.int64, "i32": np.int32, "i8": np.int8, "u8": np.uint8}
"""What inputs and outputs are on the host; those of other types as their bytes."""
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(slots=True)
class _Slot:
    """Pinned memory of a replay under way, and the event that says it has ended."""

    event: Any
    up: Memory
    down: Memory
    views: "WeakKeyDictionary[CudaExecutable, Arrays]" = field(default_factory=WeakKeyDictionary)

    def reserve(self, up: int, down: int) -> None:
        """Room for so many bytes each way; nothing may be under way."""
        if up > self.up.nbytes:
            self.up.close()
            self.up, self.views = Memory(2 * up, pinned=True), WeakKeyDictionary()
        if down > self.down.nbytes:
            self.down.close()
            self.down = Memory(2 * down, pinned=True)


@dataclass(frozen=True, slots=True)
class _Added:
    """Where an executable's inputs lie, and the output that comes down."""

    block: Block
    output: Buffer


class Pipeline:
    """A queue of replays on one stream; `depth` of them may be under way. Close it after its executables.

    `add` an executable before its first replay: it lives in the pipeline's `memory` from then on. A replay is `inputs`
    (arrays in pinned memory, to be written whole), `launch`, and in its turn `wait`.

    A pipeline `beside` another one, which is closed later, runs at the same time: the plans of both have partitions of
    the same splits, and each pipeline its own stream, memory and lanes. `behind` orders a replay after one of there."""

    def __init__(self, device: str | None = None, depth: int = 2, beside: "Pipeline | None" = None) -> None:
        self._gpu = Gpu.open(device)
        self.memory: SharedMemory = SharedMemory(device, None if beside is None else beside.memory)
        self.stream = self._gpu.stream()
        self._slots = [
            _Slot(self._gpu.event(), Memory(1, pinned=True), Memory(1, pinned=True)) for _ in range(max(depth, 1))
        ]
        self._added: WeakKeyDictionary[CudaExecutable, _Added] = WeakKeyDictionary()
        self._under_way: deque[tuple[_Slot, CudaExecutable]] = deque()
        self._launched = 0

    def add(self, executable: Executable, output: str) -> None:
        """Make an executable of the cuda backend one of the pipeline's; the output named so is what `wait` gives.
        GraphError for another backend's, and as of `CudaExecutable.share`."""
        if not isinstance(executable, CudaExecutable):
            raise GraphError(f"a {type(executable).__name__} replays on no stream; compile the plan for cuda.")
        executable.share(self.memory)
        assert executable.input_block is not None
        self._added[executable] = _Added(executable.input_block, executable.outputs[output].buffer)

    @property
    def under_way(self) -> int:
        """Replays that were launched and not waited for."""
        return len(self._under_way)

    @property
    def launched(self) -> int:
        """Replays that were launched so far."""
        return self._launched

    @property
    def ended(self) -> bool:
        """Whether the replay launched first of those not waited for has ended; asks once, and waits for nothing.
        ExecutionError when none is under way."""
        if not self._under_way:
            raise ExecutionError("no replay is under way; launch one.", op="")
        with driver.driver_errors("ask for a replay"):
            return bool(self._under_way[0][0].event.is_done)

    def behind(self, other: "Pipeline", number: int) -> None:
        """The next replay begins on the device when replay `number` of another pipeline, counted from 0, has ended;
        nothing is asked of the device where it was waited for already."""
        if number >= other._launched - other.under_way:
            with driver.driver_errors("wait for a replay of another pipeline"):
                self.stream.wait(other._slots[number % len(other._slots)].event)

    def _next(self) -> _Slot:
        if len(self._under_way) == len(self._slots):
            raise ExecutionError(f"{len(self._slots)} replays are under way, which is the most; wait for one.", op="")
        return self._slots[self._launched % len(self._slots)]

    def inputs(self, executable: CudaExecutable) -> Arrays:
        """The inputs of the next replay on the host: what is written there is uploaded by `launch`. ExecutionError when
        `depth` replays are under way."""
        slot, added = self._next(), self._added[executable]
        slot.reserve(added.block.nbytes, added.output.nbytes)
        found = slot.views.get(executable)
        if found is None:
            found = slot.views[executable] = {
                name: _array(slot.up.address + at, shape, dtype)
                for name, (at, shape, dtype) in added.block.tensors.items()
            }
        return found

    def launch(self, executable: CudaExecutable) -> None:
        """Upload what `inputs` gave, replay, and send the output on its way; returns at once."""
        self._gpu.use()
        slot, added = self._next(), self._added[executable]
        driver.copy_on(self.stream, added.block.address, slot.up.address, added.block.nbytes)
        executable.launch(self.stream)
        driver.copy_on(self.stream, slot.down.address, added.output.address, added.output.nbytes)
        with driver.driver_errors("record an event"):
            self.stream.record(slot.event)
        self._launched += 1
        self._under_way.append((slot, executable))

    def wait(self) -> npt.NDArray[Any]:
        """A copy of the output of the replay launched first of those not waited for, when it has ended. ExecutionError
        as of its launch, or when none is under way."""
        if not self._under_way:
            raise ExecutionError("no replay is under way; launch one.", op="")
        self._gpu.use()
        slot, executable = self._under_way.popleft()
        with driver.driver_errors("wait for a replay"):
            slot.event.sync()
        executable.check_faults()
        output = self._added[executable].output
        return _array(slot.down.address, output.shape, output.dtype).copy()

    def sync(self) -> None:
        """Wait for all that is under way, and forget it."""
        if self._slots:
            self._gpu.use()
            self._under_way.clear()
            with driver.driver_errors("wait for what is under way"):
                self.stream.sync()

    def close(self) -> None:
        """Free everything, when what is under way has ended; a second call does nothing."""
        if not self._slots:
            return
        self.sync()
        for slot in self._slots:
            slot.event.close()
            slot.up.close()
            slot.down.close()
        self._slots = []
        self.stream.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _array(address: int, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Pinned memory as an array; of a type that numpy has not, as bytes."""
    nbytes = Buffer(address, shape, dtype).nbytes
    raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    found = np.frombuffer(raw, np.uint8)
    return found.view(_NUMPY[dtype]).reshape(shape) if dtype in _NUMPY else found
