"""Custom ops on the CPU: each runs on tensors of its own and is looked at after every call.

What can be seen at once is an error at once: a result that is returned in place of written, a buffer that was resized
or replaced, an input that torch changed though `writes` does not name it, and a buffer that outlives the call. What
costs as much as the op itself is looked for by `compile(check=True)`: see `runtime.check`.
"""

import gc
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import isawaitable
from typing import Any

import numpy as np
import torch

from taskgraph.errors import ExecutionError
from taskgraph.graph.functions import check_arity, find_function
from taskgraph.graph.op import Op

_USES: Callable[[int], int] = torch._C._storage_Use_Count
"""How many tensors share a storage, which its address names."""
_VERSION: Callable[[torch.Tensor], int] = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_ADDRESS: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
Function = Callable[..., Any]
Tensors = Sequence[torch.Tensor]


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor over storage of its own that can neither grow nor reach beyond it, outside inference
    mode, so that torch counts its changes."""
    kind = tensor.dtype
    with torch.inference_mode(False):
        raw = (tensor.view(torch.int16) if kind == torch.bfloat16 else tensor).numpy()
        made = torch.from_numpy(raw)
        return made.view(kind) if made.dtype != kind else made


def function_of(op: Op, functions: Mapping[str, Function]) -> Function:
    """The function of a custom op: among `functions`, else the one that is imported by its name; GraphError if none."""
    key = op.attr("function")
    return functions.get(str(key)) or find_function(key if isinstance(key, str) else str(key))


def bound(op: Op, function: Function, ins: Tensors, outs: Tensors) -> Callable[[], None]:
    """The program entry of a custom op; GraphError when its function takes other arguments.

    The entry raises ExecutionError, which names the op, for what is said above.
    """
    check_arity(op.name, function, len(ins) + len(outs))
    names = (*op.inputs, *op.outputs)
    kept = [i < len(ins) and name not in op.writes for i, name in enumerate(names)]
    look: _Look | None = None

    def run() -> None:
        nonlocal look
        if look is None:
            look = _Look([own(t) for t in (*ins, *outs)], kept)
        before = look.usual or look.references()
        try:
            result = function(*look.tensors)
        except BaseException:
            look = None  # its traceback holds the tensors: the next call gets others
            raise
        if result is not None:
            refuse_result(op.name, result, look.tensors[len(ins) :])
            result = None
        if look.same():
            now = look.references()
            if now == before or not any(map(operator.gt, now, before)):
                look.usual = before
                return
        seen, look = look, None
        fault = seen.fault(names, before)
        if fault:
            raise ExecutionError(f"op {op.name!r} {fault}", op=op.name)

    return run


class _Look:
    """The tensors of one custom op and what must be true of them after a call.

    A look costs as much as many a small op, so it begins with what is quickly asked: whatever torch does to a tensor in
    place, its data, its shape or its storage, counts in its version. `usual` are the references that others never had
    more of, once a call has shown them.
    """

    def __init__(self, tensors: list[torch.Tensor], kept: Sequence[bool]) -> None:
        self.tensors, self._kept = tensors, kept
        self._places, self._addresses = self._where(), [*map(_ADDRESS, tensors)]
        self._versions = [*map(_VERSION, tensors)]
        self._storages = [t.untyped_storage()._cdata for t in tensors]
        self.usual: list[int] = []

    def _where(self) -> list[Any]:
        return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self.tensors]

    def references(self) -> list[int]:
        """How often each tensor is referred to, and each one's memory: by views and by NumPy arrays too."""
        return [*map(sys.getrefcount, self.tensors), *map(_USES, self._storages)]

    def same(self) -> bool:
        """Whether all tensors are where they were, and torch changed none that is only read."""
        if [*map(_ADDRESS, self.tensors)] != self._addresses:
            return False
        versions = [*map(_VERSION, self.tensors)]
        if versions != self._versions:
            if self._where() != self._places or any(map(self._wrote, versions, self._versions, self._kept)):
                return False
            self._versions = versions
        return True

    @staticmethod
    def _wrote(now: int, before: int, kept: bool) -> bool:
        """Whether torch changed a tensor that is only read."""
        return kept and now != before

    def fault(self, names: Sequence[str], before: Sequence[int]) -> str:
        """What is wrong, for people; empty where only a reference cycle held a tensor for a moment."""
        return self._changed(names) or self._held(names, before)

    def _changed(self, names: Sequence[str]) -> str:
        for name, t, place, before, keep in zip(
            names, self.tensors, self._places, self._versions, self._kept, strict=True
        ):
            if (t.shape, t.stride(), t.dtype) != place[1:]:
                return (
                    f"changed {name!r} from {list(place[1])} to {list(t.shape)}: buffers have a fixed size. Fill the "
                    "output that is given, or declare the shape that it needs."
                )
            if t.data_ptr() != place[0]:
                return f"put another tensor in place of {name!r}; fill the one that is given: out.copy_(result)."
            if self._wrote(t._version, before, keep):
                return (
                    f"wrote to its input {name!r}, which other ops may read at that moment; write to an output, or "
                    "make it a state and give it as STATE.written()."
                )
        return ""

    def _held(self, names: Sequence[str], before: Sequence[int]) -> str:
        gc.collect()
        for name, now, once in zip((*names, *names), self.references(), before, strict=True):
            if now > once:
                return (
                    f"keeps a reference to the buffer of {name!r}, which other ops overwrite after it; keep a copy: "
                    f"{name.rpartition('/')[2].partition('.')[0]}.clone()."
                )
        return ""


def refuse_result(op: str, result: Any, outs: Sequence[Any]) -> None:
    """ExecutionError unless what a custom op returned is its outputs, which is harmless."""
    if all(_within(part, outs) for part in (result if isinstance(result, (tuple, list)) else (result,))):
        return
    what = f"a {type(result).__name__}"
    if isawaitable(result):
        close = getattr(result, "close", None)
        if close is not None:
            close()
        what += ", of which nothing has run,"
    raise ExecutionError(
        f"op {op!r} returned {what} in place of filling its output; write into the tensor that it is given last "
        "(out.copy_(result)) and return nothing.", op=op,
    )  # fmt: skip


def _within(part: Any, outs: Sequence[Any]) -> bool:
    """Whether it is an output, or a part of one."""
    if part is None or any(part is out for out in outs):
        return True
    if isinstance(part, torch.Tensor):
        address, size = part.data_ptr(), part.nbytes
    elif isinstance(part, np.ndarray):
        address, size = part.ctypes.data, part.nbytes
    else:
        return False
    spans = [(out.data_ptr(), out.nbytes) for out in outs if isinstance(out, torch.Tensor)]
    return any(first <= address and address + size <= first + room for first, room in spans)
