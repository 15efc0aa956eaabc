"""Custom ops that are machine code from end to end: a lane runs rows of them, and waits between them, outside Python.

An op in Python takes the interpreter's lock before and after its kernel. Where two lanes ask for it at once one of them
sleeps, and waking costs 60 to 100 us in a virtual machine (measured): as much as many a small op. So consecutive native
ops of a lane are one entry of its program, a table of calls, waits and posts that one compiled loop runs. A wait spins
for some tens of microseconds before it sleeps.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from taskgraph.errors import BackendUnavailable, ExecutionError
from taskgraph.graph.op import Op
from taskgraph.jit import compiled, kernel
from taskgraph.runtime.cpu.tile import inlined

Body = Callable[..., Any]
Refuse = Callable[..., None]
_CALL, _CALL_WIDE, _WAIT, _POST = 0, 1, 2, 3
_RAISED = -(1 << 62)
"""What a call gives where compiled code raised."""
_SPINS, _YIELDS = 500, 200
_SEMAPHORE = 64
"""Bytes: a sem_t, on a cache line of its own."""
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_NARROW, _WIDE = types.int64(*[types.int64] * 2), types.int64(*[types.int64] * 5)
_semaphore = types.int32(types.int64)
_sem_wait: Any = types.ExternalFunction("sem_wait", _semaphore)
_sem_try: Any = types.ExternalFunction("sem_trywait", _semaphore)
_sem_post: Any = types.ExternalFunction("sem_post", _semaphore)
_sem_init: Any = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.int32))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_CLOCK_MONOTONIC = 1  # what time.perf_counter reads
_NOBODY = np.zeros((0, _SEMAPHORE // 8), np.int64)
"""The memory of no team: a lane of one thread."""


# -- what functions of native ops are written with -----------------------------------------------------------------


@intrinsic
def _word(typingctx: Any, address: Any) -> Any:  # pragma: no cover - compiled
    """The int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()))

    return types.int64(types.int64), codegen


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:  # pragma: no cover - compiled
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), codegen


@inlined
def flat(tensors: Any, k: Any, dtype: Any) -> Any:
    """Tensor `k` of a native op as an array of one axis, in place; `dtype` is a NumPy type, as np.float64."""
    return numba.carray(_pointer(_word(tensors + 16 * k)), _word(tensors + 16 * k + 8), dtype)


@intrinsic
def _load(typingctx: Any, address: Any) -> Any:  # pragma: no cover - compiled
    """The int64 that another thread may write."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _add(typingctx: Any, address: Any, value: Any) -> Any:  # pragma: no cover - compiled
    """Add to the int64 at an address that other threads add to; what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@inlined
def barrier(team: Any) -> None:
    """Within a wide native op: wait until all threads of the lane have come here."""
    if team == 0:
        return
    round_at, parts = team + 8, _word(team + 16)
    now = _load(round_at)
    if _add(team, 1) == parts - 1:
        _add(team, -parts)
        _add(round_at, 1)
        return
    spins = 0
    while _load(round_at) == now:
        spins += 1
        if spins > _SPINS:
            _sched_yield()


class Native:
    """A function of a custom op that lanes of the CPU call without the interpreter; made by `native`.

    It can be called like any other, with CPU tensors. It needs no look after every call, for it sees addresses alone.
    """

    def __init__(self, body: Body, refuse: Refuse | None, wide: bool) -> None:
        self.__module__, self.__doc__ = body.__module__, body.__doc__
        self.__name__, self.__qualname__ = body.__name__, body.__qualname__
        self._body: Any = compiled(body, error_model="numpy")
        self._refuse, self.wide = refuse, wide

    @functools.cached_property
    def address(self) -> int:
        """Of the machine code, compiled when it is first asked for."""
        made = self._body.get_compile_result(_WIDE if self.wide else _NARROW)
        found: int = made.library.get_pointer_to_function(made.fndesc.llvm_func_name)
        return found

    def __call__(self, *tensors: torch.Tensor) -> None:
        table = _table(self.__qualname__, tensors)
        code = self._body(table.ctypes.data, len(table), *((0, 1, 0) if self.wide else ()))
        if code:
            self.refused(self.__qualname__, code, tensors)

    def refused(self, op: str, code: int, tensors: Sequence[torch.Tensor]) -> None:
        """Raise what `refuse` says of a code that is not 0, else ExecutionError."""
        if code == _RAISED:
            raise ExecutionError(
                f"op {op!r} raised in compiled code, where there are no messages; return a number and say in "
                "refuse= what it means.", op=op,
            )  # fmt: skip
        if self._refuse is not None:
            self._refuse(code, *tensors)
        raise ExecutionError(f"op {op!r} returned {code}, which is no success; 0 is.", op=op)


def native(refuse: Refuse | None = None, wide: bool = False) -> Callable[[Body], Native]:
    """Make `body(tensors, count)`, which numba compiles, the function of a custom op that runs outside Python.

    `flat(tensors, k, dtype)` is its tensor k of `count`, inputs then outputs, whose elements it must not go beyond. It
    returns 0, or a number that `refuse(number, *tensors)`, ordinary Python, raises an error for. It must not raise. A
    `wide` op is `body(tensors, count, part, parts, team)`, which every thread of its lane calls at the same time, with
    `part` from 0 to `parts` - 1; `barrier(team)` is for all of them alike. What part 0 returns counts.
    """
    return lambda body: Native(body, refuse, wide)


def _table(name: str, tensors: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
    """Address and elements of each; BackendUnavailable for what is no contiguous memory of the host."""
    for t in tensors:
        if not isinstance(t, torch.Tensor) or t.device.type != "cpu" or not t.is_contiguous():
            raise BackendUnavailable(f"native op {name!r} takes contiguous CPU tensors; run it on the cpu backend.")
    return np.array([(t.data_ptr(), t.numel()) for t in tensors], np.int64).reshape(-1, 2)


# -- programs -------------------------------------------------------------------------------------------------------


class NativeEntry:
    """One native op, bound to its tensors. A program runs it in a row with others; it can also be called alone."""

    def __init__(self, op: Op, function: Native, tensors: Sequence[torch.Tensor]) -> None:
        self.name, self.function, self.tensors = op.name, function, tensors
        self.table = _table(op.name, tensors)
        self.row = (_CALL_WIDE if function.wide else _CALL, function.address, self.table.ctypes.data, len(self.table))

    def __call__(self) -> None:
        self.function(*self.tensors)


class Row:
    """Native ops of one lane with the waits and posts between them: one entry of its program.

    Where an op fails the waits and posts that are left are taken and given, no op is run, and `op` is its name.
    """

    def __init__(
        self, items: Sequence[tuple[int, ...]], entries: Sequence[NativeEntry | None], team: "Team | None", stamps: bool
    ) -> None:
        self._items = np.array(items, np.int64)
        self._team = _NOBODY if team is None else team.memory
        self._entries = entries
        self._stamps = np.zeros((len(items) if stamps else 0, 4), np.int64)
        self._clocks = self._stamps.ctypes.data if stamps else 0
        self._status = np.zeros(2, np.int64)
        self.op = ""

    def __call__(self) -> None:
        at = _run(self._items, 0, False, self._team, self._clocks, self._status)
        if at >= 0:
            self.drain(at + 1)
            entry = self._entries[at]
            assert entry is not None
            self.op = entry.name
            entry.function.refused(entry.name, int(self._status[1]), entry.tensors)

    def drain(self, at: int = 0) -> None:
        """Take and give what is left from item `at` on, after an error."""
        _run(self._items, at, True, _NOBODY, 0, self._status)

    def spans(self) -> Iterable[tuple[str, float, float]]:
        """(op, begin, end) of every op in the last run, in seconds of `time.perf_counter`."""
        for entry, row in zip(self._entries, self._stamps.tolist(), strict=True):
            if entry is not None:
                yield entry.name, row[0] + 1e-9 * row[1], row[2] + 1e-9 * row[3]


class Semaphores:
    """One for each edge between native ops of two lanes."""

    def __init__(self, count: int) -> None:
        self._memory = np.zeros((count, _SEMAPHORE // 8), np.int64)
        _begin(self._memory)

    def wait(self, k: int) -> tuple[int, ...]:
        """The item of a row that takes semaphore `k`."""
        return (_WAIT, self._memory[k].ctypes.data, 0, 0)

    def post(self, k: int) -> tuple[int, ...]:
        """The item of a row that gives it."""
        return (_POST, self._memory[k].ctypes.data, 0, 0)


def _caller(signature: Any) -> Any:
    """call(address, *arguments) of a compiled function, as numba's own code would: what it returns, or _RAISED."""

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kind = context.call_conv.get_function_type(types.int64, signature.args)
        function = builder.inttoptr(args[0], kind.as_pointer())
        returned, raised = builder.alloca(_I64), builder.alloca(kind.args[1].pointee)
        status = builder.call(function, [returned, raised, *args[1:]])
        fine = builder.icmp_signed("==", status, ir.Constant(_I32, 0))
        return builder.select(fine, builder.load(returned), ir.Constant(_I64, _RAISED))

    return codegen


@intrinsic
def _call(typingctx: Any, address: Any, tensors: Any, count: Any) -> Any:  # pragma: no cover - compiled
    return types.int64(*[types.int64] * 3), _caller(_NARROW)


@intrinsic
def _call_part(
    typingctx: Any, address: Any, tensors: Any, count: Any, part: Any, parts: Any, team: Any
) -> Any:  # pragma: no cover - compiled
    return types.int64(*[types.int64] * 6), _caller(_WIDE)


class Team:
    """Threads that help a lane with its wide ops, one on each of its cores but the first. Close it."""

    def __init__(self, cores: Sequence[int], name: str) -> None:
        self.memory = np.zeros((2 + len(cores), _SEMAPHORE // 8), np.int64)
        self.memory[0, 2] = len(cores)
        _begin(self.memory[1:])
        self._threads = [
            threading.Thread(target=self._work, args=(core, part), name=name, daemon=True)
            for part, core in enumerate(cores[1:], 1)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, core: int, part: int) -> None:
        os.sched_setaffinity(0, {core})
        _help(self.memory, part)

    def close(self) -> None:
        """Stop the threads; none of them runs anything."""
        self.memory[0, 3] = 0
        _wake(self.memory)
        for thread in self._threads:
            thread.join()


# Words of a team: how many are at a barrier, its round, threads, function, tensors, count, error of a helper. Then a
# line for the semaphore of those who are done, and one for each part to begin.


@kernel
def _help(memory: Any, part: Any) -> None:
    team = memory.ctypes.data
    while True:
        _wait(team + (1 + part) * _SEMAPHORE)
        if memory[0, 3] == 0:
            return
        code = _call_part(memory[0, 3], memory[0, 4], memory[0, 5], part, memory[0, 2], team)
        if code == _RAISED:
            memory[0, 6] = code
        _sem_post(team + _SEMAPHORE)


@kernel
def _wake(memory: Any) -> None:
    for part in range(1, memory[0, 2]):
        _sem_post(memory.ctypes.data + (1 + part) * _SEMAPHORE)


@kernel
def _call_team(memory: Any, address: Any, tensors: Any, count: Any) -> int:
    """Run a wide op on all threads of its lane."""
    parts, team = memory[0, 2], memory.ctypes.data
    memory[0, 3], memory[0, 4], memory[0, 5], memory[0, 6] = address, tensors, count, 0
    _wake(memory)
    code = _call_part(address, tensors, count, 0, parts, team)
    for _ in range(1, parts):
        _wait(team + _SEMAPHORE)
    return code if code else int(memory[0, 6])


@kernel
def _begin(memory: Any) -> None:
    for k in range(len(memory)):
        _sem_init(memory.ctypes.data + k * _SEMAPHORE, 0, 0)


@kernel
def _wait(semaphore: Any) -> None:
    for k in range(_SPINS + _YIELDS):
        if _sem_try(semaphore) == 0:
            return
        if k >= _SPINS:
            _sched_yield()  # whom it waits for may need this core
    while _sem_wait(semaphore) != 0:  # interrupted by a signal
        pass


@kernel
def _run(items: Any, at: Any, skip: Any, team: Any, clocks: Any, status: Any) -> int:
    """Run a table of items from `at` on, without its calls if `skip`; -1, or the item of the op that failed, whose code
    is in `status[1]`."""
    for k in range(at, len(items)):
        if items[k, 0] == _WAIT:
            _wait(items[k, 1])
        elif items[k, 0] == _POST:
            _sem_post(items[k, 1])
        elif not skip:
            if clocks:
                _clock_gettime(_CLOCK_MONOTONIC, clocks + 32 * k)
            if items[k, 0] == _CALL:
                code = _call(items[k, 1], items[k, 2], items[k, 3])
            elif len(team) == 0:
                code = _call_part(items[k, 1], items[k, 2], items[k, 3], 0, 1, 0)
            else:
                code = _call_team(team, items[k, 1], items[k, 2], items[k, 3])
            if clocks:
                _clock_gettime(_CLOCK_MONOTONIC, clocks + 32 * k + 16)
            if code != 0:
                status[1] = code
                return k
    return -1
