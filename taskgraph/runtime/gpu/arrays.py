"""Tensors in device memory: ours, and those of other libraries by `__cuda_array_interface__` or DLPack."""

import ctypes
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from taskgraph.errors import BackendUnavailable, ExecutionError, GraphError
from taskgraph.graph.op import ITEMSIZE, Tensor
from taskgraph.runtime.buffers import Use, dtype_name, host_tensor, same
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.driver import Gpu, Memory
from taskgraph.runtime.gpu.kinds import Buffer, dense_strides

_TYPESTR = {
    "f64": "<f8", "f32": "<f4", "f16": "<f2", "bf16": "<V2", "i64": "<i8", "i32": "<i4", "i8": "|i1", "u8": "|u1",
    "bool": "|b1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A tensor in device memory that the executable owns; libraries take it by `__cuda_array_interface__`."""

    buffer: Buffer
    owner: object = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.buffer.shape

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    def check_open(self) -> None:
        """ExecutionError when its memory was freed, or belongs to the process that this one was forked from."""
        if getattr(self.owner, "closed", False):
            raise ExecutionError("the memory of a device tensor was freed: what it belongs to is closed.", op="")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the protocol; bf16 goes as two raw bytes."""
        self.check_open()
        b = self.buffer
        strides = tuple(n * ITEMSIZE[b.dtype] for n in b.strides) if b.strides else None
        data = (b.address, False)
        return {"shape": b.shape, "typestr": _TYPESTR[b.dtype], "data": data, "strides": strides, "version": 3}

    def numpy_bytes(self) -> npt.NDArray[np.uint8]:
        """A copy of the bytes on the host."""
        self.check_open()
        host = np.empty(self.buffer.nbytes, np.uint8)
        driver.download(host.ctypes.data, self.buffer.address, host.nbytes)
        return host

    def cpu(self) -> torch.Tensor:
        """A copy on the host."""
        return torch.from_numpy(self.numpy_bytes()).view(TORCH_DTYPE[self.dtype]).view(self.shape)

    def rows(self, which: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy of those rows on the host; of few, of a large tensor, it moves no more than them."""
        self.check_open()
        host = torch.empty((len(which), *self.shape[1:]), dtype=TORCH_DTYPE[self.dtype])
        size, rows = self.buffer.nbytes // self.shape[0], np.asarray(which, np.int64)
        _within(rows, self.shape[0], "row")
        runs = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # rows one after another come together
        for first, last in itertools.pairwise([*runs.tolist(), len(rows)]):
            source = self.buffer.address + int(rows[first]) * size
            driver.download(host.data_ptr() + first * size, source, (last - first) * size)
        return host

    def entries(self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy of entry columns[i] of each row rows[i] of a matrix on the host."""
        self.check_open()
        _within(rows, self.shape[0], "row")
        _within(columns, self.shape[1], "column")
        host = torch.empty(len(rows), dtype=TORCH_DTYPE[self.dtype])
        size, width = ITEMSIZE[self.dtype], self.shape[1]
        for i, at in enumerate((rows * width + columns).tolist()):
            driver.download(host.data_ptr() + i * size, self.buffer.address + at * size, size)
        return host

    def copy_(self, source: torch.Tensor) -> None:
        """Overwrite it by a host tensor of its shape and dtype; returns when it is done."""
        declared = Tensor("tensor", self.shape, self.dtype)
        self.check_open()
        host = host_tensor(declared, source, "copy")
        driver.upload(self.buffer.address, host.data_ptr(), self.buffer.nbytes)

    def torch(self) -> torch.Tensor:
        """The same memory as a torch tensor; BackendUnavailable where torch is built without CUDA."""
        if not torch.cuda.is_available():
            raise BackendUnavailable("this torch has no CUDA device; use cpu(), or `__cuda_array_interface__`.")
        raw = {"bf16": "|i2"}.get(self.dtype, _TYPESTR[self.dtype])  # torch knows no two raw bytes
        made = torch.as_tensor(_Typed({**self.__cuda_array_interface__, "typestr": raw}), device="cuda")
        return made.view(TORCH_DTYPE[self.dtype])

    def __dlpack__(self, **options: Any) -> Any:
        """A DLPack capsule, made by torch."""
        return self.torch().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)  # kDLCUDA, the device of this process


def _within(places: npt.NDArray[np.int64], count: int, what: str) -> None:
    """GraphError unless all `places` are from 0 to `count`."""
    if len(places) and not (places.min() >= 0 and places.max() < count):
        odd = places.min() if places.min() < 0 else places.max()
        raise GraphError(f"{what} {odd} of a device tensor with {count} of them does not exist.")


@dataclass(frozen=True, slots=True)
class _Typed:
    """A `__cuda_array_interface__` and nothing else."""

    __cuda_array_interface__: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeviceExtent:
    """A stretch of device memory, as bytes on the host."""

    address: int
    nbytes: int

    def get(self) -> npt.NDArray[np.uint8]:
        """A copy of its bytes."""
        host = np.empty(self.nbytes, np.uint8)
        driver.download(host.ctypes.data, self.address, self.nbytes)
        return host

    def put(self, values: npt.NDArray[np.uint8]) -> None:
        """Overwrite it whole."""
        packed = np.ascontiguousarray(values)
        driver.upload(self.address, packed.ctypes.data, self.nbytes)


class DeviceTensors(Mapping[str, DeviceArray]):
    """Host tensors that are on the device once, for many executables to bind: weights, caches. Closing frees them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: str | None = None) -> None:
        Gpu.open(device)
        self._memory: list[Memory] = []
        self._arrays: dict[str, DeviceArray] = {}
        names = {kind: name for name, kind in TORCH_DTYPE.items()}
        try:
            for name, tensor in tensors.items():
                host = tensor.detach().cpu().contiguous()
                memory = Memory(max(host.nbytes, 1))
                self._memory.append(memory)
                driver.upload(memory.address, host.data_ptr(), host.nbytes)
                self._arrays[name] = DeviceArray(Buffer(memory.address, tuple(host.shape), names[host.dtype]), self)
        except BaseException:
            self.close()
            raise

    def zeros(self, name: str, shape: tuple[int, ...], dtype: str, pinned: bool = False) -> None:
        """Add a tensor of zeros, on the device or in `pinned` host memory."""
        declared = Tensor(name, shape, dtype)
        memory = Memory(declared.nbytes, pinned)
        self._memory.append(memory)
        driver.clear(memory)
        self._arrays[name] = DeviceArray(Buffer(memory.address, shape, dtype, pinned), self)

    def on_host(self, name: str) -> torch.Tensor:
        """A tensor in pinned memory, in place, as one of the host."""
        buffer = self._arrays[name].buffer
        if not buffer.pinned:
            raise GraphError(f"tensor {name!r} is on the device; cpu() copies it.")
        raw = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address)
        return torch.frombuffer(raw, dtype=TORCH_DTYPE[buffer.dtype]).view(buffer.shape)

    def __getitem__(self, name: str) -> DeviceArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def closed(self) -> bool:
        """Whether its memory is gone."""
        return not self._memory

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device."""
        return sum(memory.nbytes for memory in self._memory)

    def close(self) -> None:
        """Free the memory; a second call does nothing."""
        for memory in reversed(self._memory):
            memory.close()
        self._memory, self._arrays = [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def device_buffer(declared: Tensor, value: Any, use: Use = "read") -> Buffer | None:
    """The buffer of a tensor in device memory; None for one on the host. GraphError when it cannot be used so."""
    if isinstance(value, DeviceArray):
        same(declared, value.shape, value.dtype)
        value.check_open()
        return _dense(declared, value.buffer)
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            return None
        if not value.is_contiguous():
            raise GraphError(f"tensor {declared.name!r} must be contiguous; call .contiguous() first.")
        if use == "write" and value.requires_grad:
            raise GraphError(f"tensor {declared.name!r} requires grad, but replays write to it; give .detach().")
        found = (tuple(value.shape), dtype_name(value.dtype), value.data_ptr())
    else:
        interface = getattr(value, "__cuda_array_interface__", None)
        if interface is None:
            return None
        found = _described(declared, interface, use)
    same(declared, *found[:2])
    if not found[2] or found[2] % ITEMSIZE[declared.dtype]:
        raise GraphError(
            f"tensor {declared.name!r} was given the address {found[2]:#x}, where none of its kind can lie."
        )
    return Buffer(found[2], declared.shape, declared.dtype)


def _described(declared: Tensor, interface: Any, use: Use) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and address of a `__cuda_array_interface__`."""
    names = {text: name for name, text in _TYPESTR.items()}
    try:
        shape, typestr = tuple(map(int, interface["shape"])), str(interface["typestr"])
        (address, read_only), strides = interface["data"], interface.get("strides")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraphError(
            f"tensor {declared.name!r} has a `__cuda_array_interface__` that does not fit its protocol: {error!r}."
        ) from error
    kind = names.get(typestr, typestr)
    dense = tuple(n * ITEMSIZE.get(kind, 1) for n in dense_strides(shape))
    if strides is not None and tuple(strides) != dense:
        raise GraphError(f"tensor {declared.name!r} must be contiguous.")
    if use == "write" and read_only:
        raise GraphError(f"tensor {declared.name!r} was given read-only memory, but replays write to it.")
    return shape, kind, int(address or 0)


def _dense(declared: Tensor, buffer: Buffer) -> Buffer:
    if buffer.strides is not None:
        raise GraphError(f"tensor {declared.name!r} must be contiguous.")
    return buffer
