"""Triton kernels without a GPU: an op's launches, as its rule makes them, run by Triton's interpreter in a process of
its own, for TRITON_INTERPRET is read when a function is decorated. Importing this imports neither Triton nor its users.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import taskgraph as tg
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op

Tensors = dict[str, torch.Tensor]
Interpret = Callable[["Job"], "Done"]
_MARGIN = 8192
"""Bytes before and behind every tensor: not a number to whoever reads them, and looked at after the run."""
_TYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i64": torch.int64, "i32": torch.int32,
    "i8": torch.int8, "i1": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One op, its tensors by name (outputs are made), and the SMs of its lane."""

    op: Op
    tensors: Mapping[str, torch.Tensor]
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    sm_count: int = 4
    arch: str = "sm_90"


@dataclass(frozen=True)
class Done:
    """Every tensor after the run, the word of faults, the launches' grids, and whether a margin was written."""

    tensors: Tensors
    fault: int
    grids: tuple[tuple[int, ...], ...]
    torn: tuple[str, ...]


@contextmanager
def interpreter() -> Iterator[Interpret]:
    """A process whose Triton interprets; what it gives runs a `Job` there."""
    with ProcessPoolExecutor(1, get_context("spawn"), _begin) as pool:
        yield lambda job: pool.submit(_run, job).result()


def _begin() -> None:
    """In the new process. Triton 3.9's interpreter multiplies the bits of bf16 where a product wants their values."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime import interpreter as interpreted

    plain, named = interpreted.InterpreterBuilder.create_dot, interpreted.TensorHandle

    def widened(operand: Any) -> Any:
        if str(operand.dtype.scalar) != "bf16":
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return named(bits.view(np.float32), import_module("triton.language").float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    interpreted.InterpreterBuilder.create_dot = create_dot


def jobs(graph: Graph, values: Mapping[str, torch.Tensor], kind: str, sm_count: int = 4) -> Iterator[Job]:
    """The ops of `kind` in a graph of which all else is given in `values`."""
    flat = graph.flat()
    for op in flat.ops:
        if op.kind == kind:
            made = {n: flat.tensor[n] for n in op.outputs}
            outputs = {n: (t.shape, _dtype(t.dtype)) for n, t in made.items()}
            yield Job(op, {n: values[n] for n in op.inputs}, outputs, sm_count)


def _dtype(name: str) -> torch.dtype:
    from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

    return TORCH_DTYPE[name]


# ------------------------------------------------------------------------------------------ in the process


class _Guarded:
    """A tensor in memory of its own between margins."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.nbytes = nbytes
        self.raw = np.full(nbytes + 2 * _MARGIN + 256, 0xFF, np.uint8)
        self.begin = _MARGIN + -(self.raw.ctypes.data + _MARGIN) % 256
        view = self.raw[self.begin : self.begin + nbytes]
        self.tensor = torch.from_numpy(view).view(dtype).reshape(tuple(shape))

    @property
    def torn(self) -> bool:
        return bool((self.raw[: self.begin] != 0xFF).any() or (self.raw[self.begin + self.nbytes :] != 0xFF).any())


class _Site:
    """What a rule asks for, in host memory."""

    def __init__(self, sm_count: int, arch: str) -> None:
        self.sm_count, self.arch = sm_count, arch
        self.kept: list[_Guarded] = []
        self.word = torch.zeros(1, dtype=torch.int64)

    def scratch(self, nbytes: int) -> int:
        self.kept.append(_Guarded((nbytes,), torch.uint8))
        return self.kept[-1].tensor.data_ptr()

    def constant(self, values: npt.NDArray[Any]) -> int:
        given = torch.from_numpy(np.ascontiguousarray(values).copy())
        self.kept.append(_Guarded(given.shape, given.dtype))
        self.kept[-1].tensor.copy_(given)
        return self.kept[-1].tensor.data_ptr()

    def fault(self) -> int:
        return self.word.data_ptr()


def _run(job: Job) -> Done:
    from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
    from taskgraph.runtime.gpu.kinds import AHEAD_KINDS, Buffer, Launch, seen
    from taskgraph.runtime.gpu.standard import GPU_KINDS

    assert job.op.kind in GPU_KINDS
    names = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    memory: dict[str, _Guarded] = {}
    for name, given in job.tensors.items():
        memory[name] = _Guarded(given.shape, given.dtype)
        memory[name].tensor.copy_(given)
    for name, (shape, dtype) in job.outputs.items():
        memory[name] = _Guarded(shape, dtype)
    buffers = {n: Buffer(m.tensor.data_ptr(), tuple(m.tensor.shape), names[m.tensor.dtype]) for n, m in memory.items()}
    ins, outs = seen(job.op, [buffers[n] for n in job.op.inputs]), [buffers[n] for n in job.op.outputs]
    kind, site = AHEAD_KINDS[job.op.kind], _Site(job.sm_count, job.arch)
    assert kind.takes(job.op, ins, outs), f"{job.op.kind} is not taken"
    grids = []
    for made in kind.launches(job.op, ins, outs, site):
        if isinstance(made, Launch):
            grids.append(made.grid)
            _interpret(made)
    torn = [n for n, m in memory.items() if m.torn] + ["scratch" for m in site.kept if m.torn]
    return Done({n: m.tensor.clone() for n, m in memory.items()}, int(site.word), tuple(grids), tuple(torn))


def _interpret(made: Any) -> None:
    """Run a launch with its own grid and arguments."""
    spec = made.source
    module, _, name = spec.function.partition(":")
    given = dict(spec.constants)
    for (parameter, kind), value in zip(spec.types, made.args, strict=True):
        given[parameter] = _pointed(value, kind) if kind.startswith("*") else value.item()
    getattr(import_module(module), name)[made.grid](**given)


def _pointed(address: int, kind: str) -> torch.Tensor:
    """A tensor that begins at an address, of which the interpreter takes no more than that and the type."""
    assert address
    one = (ctypes.c_char * 16).from_address(address)
    return torch.frombuffer(one, dtype=_TYPES[kind.strip("*").partition(":")[0]])


# ---------------------------------------------------------------------------------------------- comparing


def by_cpu(graph: Graph, values: Mapping[str, torch.Tensor]) -> Tensors:
    """Outputs and states of the graph on the cpu backend."""
    held = {n: v.clone() for n, v in values.items()}
    with tg.compile(graph, tg.plan(graph, "cpu", "list"), "cpu") as exe:
        return held | exe(held)
