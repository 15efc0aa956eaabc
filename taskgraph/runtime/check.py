"""The dear checks of `compile(check=True)`: ops run one by one, and everything near them is compared before and after.

Of each op: it changes nothing but its outputs and the states that it names in `writes`, it fills its outputs whole, and
it makes no NaN out of inputs that have none. To see what is left unwritten, an op runs twice, over two patterns, with
its states put back in between; a function that counts its calls counts two.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from taskgraph.errors import ExecutionError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.schedule.plan import Plan

Bytes = npt.NDArray[np.uint8]
PATTERNS = (0xA5, 0x5A)


class Extent(Protocol):
    """A stretch of memory, on the host or on a device."""

    def get(self) -> Bytes:
        """A copy of its bytes."""
        ...

    def put(self, values: Bytes) -> None:
        """Overwrite it whole."""
        ...


@dataclass(frozen=True, slots=True)
class HostExtent:
    """The memory of a contiguous CPU tensor."""

    view: Bytes

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "HostExtent":
        """The bytes of `tensor`, in place."""
        return cls(tensor.reshape(-1).view(torch.uint8).numpy())

    def get(self) -> Bytes:
        return self.view.copy()

    def put(self, values: Bytes) -> None:
        self.view[:] = values


class Watch:
    """The memory of one executable: `arena` and, by name, the tensors that have memory of their own."""

    def __init__(self, graph: Graph, plan: Plan, arena: Extent, own: Mapping[str, Extent]) -> None:
        self._graph, self._arena, self._own = graph, arena, own
        self._slots = {s.tensor: slice(s.offset, s.offset + graph.tensor[s.tensor].nbytes) for s in plan.arena}
        self._slots = {name: span for name, span in self._slots.items() if name not in own}
        weights = {t.name for t in graph.with_role("weight", "state")}
        self._always = [name for name in own if name not in weights]
        self._made: list[str] = []
        self._live = np.zeros(len(arena.get()), bool)

    def run(self, op: Op, run: Callable[[], Any], look: bool = True) -> None:
        """Run an op twice and look; ExecutionError, which names it, for what an op must not do. Else just run it."""
        spans = [self._slots[name] for name in op.outputs if name in self._slots]
        for span in spans:
            self._live[span] = False
        if look:
            self._look(op, run)
        else:
            run()
        for span in spans:
            self._live[span] = True
        self._made += op.outputs

    def _look(self, op: Op, run: Callable[[], Any]) -> None:
        states = {name: self._own[name].get() for name in op.writes}
        first = self._once(op, run, PATTERNS[0], states)
        self._nothing_new_is_nan(op)
        second = self._once(op, run, PATTERNS[1], states)
        for name in op.outputs:
            left = np.flatnonzero((first[name] == PATTERNS[0]) & (second[name] == PATTERNS[1]))
            if len(left):
                at = int(left[0]) // (len(first[name]) // math.prod(self._graph.tensor[name].shape))
                raise _wrong(
                    op,
                    f"left {len(left)} of the {len(first[name])} bytes of its output {name!r} unwritten, from element "
                    f"{at} on; what stood there before would be read as a result",
                )

    def _once(self, op: Op, run: Callable[[], Any], pattern: int, states: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """Run it once with `pattern` in its outputs and wherever in the arena nothing is; the bytes of its outputs."""
        for name, values in states.items():
            self._own[name].put(values)
        for name in op.outputs:
            if name not in self._slots:
                self._own[name].put(np.full(self._graph.tensor[name].nbytes, pattern, np.uint8))
        arena = np.where(self._live, self._arena.get(), np.uint8(pattern))
        self._arena.put(arena)
        watched = dict.fromkeys([*self._always, *(name for name in op.inputs if name in self._own)])
        may = {*op.outputs, *op.writes}
        before = {name: self._own[name].get() for name in watched if name not in may}
        run()
        for name, values in before.items():
            if not np.array_equal(values, self._own[name].get()):
                role = "its input" if name in op.inputs else "the buffer of another op,"
                raise _wrong(op, f"wrote to {role} {name!r}, which is not given to it as written()")
        after = self._arena.get()
        changed = arena != after
        for name in op.outputs:
            if name in self._slots:
                changed[self._slots[name]] = False
        where = np.flatnonzero(changed)
        if len(where):
            raise _wrong(op, f"wrote to {self._owner(op, int(where[0]))}, outside its outputs")
        return {name: after[self._slots[name]] if name in self._slots else self._own[name].get() for name in op.outputs}

    def _owner(self, op: Op, at: int) -> str:
        """Whose byte of the arena that is, for people: an input of the op, else the tensor that was made last there."""
        for name in (*op.inputs, *reversed(self._made)):
            span = self._slots.get(name)
            if span is not None and span.start <= at < span.stop:
                return f"its input {name!r}" if name in op.inputs else f"{name!r}, another op's"
        return "memory of no tensor"

    def _bytes(self, name: str) -> Bytes:
        return self._arena.get()[self._slots[name]] if name in self._slots else self._own[name].get()

    def _nothing_new_is_nan(self, op: Op) -> None:
        for name in op.outputs:
            count = self._nans(name)
            if count and not any(self._nans(given) for given in op.inputs):
                raise _wrong(op, f"made {count} NaN in {name!r} out of inputs that have none")

    def _nans(self, name: str) -> int:
        kind = TORCH_DTYPE[self._graph.tensor[name].dtype]
        return int(torch.from_numpy(self._bytes(name)).view(kind).isnan().sum()) if kind.is_floating_point else 0


def _wrong(op: Op, what: str) -> ExecutionError:
    return ExecutionError(f"op {op.name!r} {what}.", op=op.name)
