"""What a caller may give as a tensor: checked once, where it is given, so that a replay can trust every address."""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Tensor
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

Use = Literal["copy", "read", "write"]
"""A value is copied from, or used in place and only read, or used in place and written."""


def host_tensor(declared: Tensor, value: Any, use: Use) -> torch.Tensor:
    """`value` (torch, NumPy, or anything with DLPack) as a contiguous CPU tensor outside autograd: the same memory
    unless `use` is "copy", where any strides will do.

    GraphError, which names the tensor, when it is not what was declared or cannot be what it is used for.
    """
    if isinstance(value, np.ndarray):
        tensor = _of_numpy(declared, value, use)
    elif isinstance(value, torch.Tensor):
        tensor = _of_torch(declared, value, use)
    else:
        tensor = _of_torch(declared, _imported(declared, value), use)
    return tensor


def same(declared: Tensor, shape: tuple[int, ...], dtype: str) -> None:
    """GraphError unless shape and dtype are those declared."""
    if (shape, dtype) != (declared.shape, declared.dtype):
        raise GraphError(
            f"tensor {declared.name!r} is {declared.dtype}{list(declared.shape)}; got {dtype}{list(shape)}."
        )


def _refused(declared: Tensor, what: str) -> GraphError:
    return GraphError(f"tensor {declared.name!r} was given {what}.")


def _imported(declared: Tensor, value: Any) -> torch.Tensor:
    if not hasattr(value, "__dlpack__"):
        raise _refused(declared, f"a {type(value).__name__}; give a tensor (torch, NumPy, DLPack)")
    if hasattr(value, "__cuda_array_interface__"):
        raise _refused(declared, "device memory where host memory is needed; copy it to the host first: .cpu()")
    try:
        return torch.utils.dlpack.from_dlpack(value)
    except Exception as error:  # the other library's own, of any type
        text = " ".join(str(error).split())[:200]
        raise _refused(
            declared, f"a {type(value).__name__} whose __dlpack__ fails ({type(error).__name__}: {text})"
        ) from error


def _of_torch(declared: Tensor, value: torch.Tensor, use: Use) -> torch.Tensor:
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise _refused(declared, f"a {type(value).__name__}, which has no plain memory; give a torch.Tensor")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise _refused(declared, f"a {kind} tensor; give a dense one: .to_dense() or .dequantize()")
    if value.device.type != "cpu":
        way = "it has no data" if value.is_meta else "call .cpu() first"
        raise _refused(declared, f"a tensor on {value.device}; {way}")
    same(declared, tuple(value.shape), dtype_name(value.dtype))
    if use == "write" and value.requires_grad:
        raise _refused(declared, "a tensor that requires grad, but replays write to it; give .detach()")
    tensor = value.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg() if use == "copy" else _lazy(declared)
    if tensor.untyped_storage().nbytes() < (tensor.storage_offset() * tensor.itemsize + _reach(tensor)):
        raise _refused(declared, "a tensor whose memory was freed or shrunk")
    if use == "copy":
        return tensor.contiguous()
    if not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:
        raise GraphError(f"tensor {declared.name!r} must be contiguous and on the CPU; call .cpu().contiguous() first.")
    return tensor


def _lazy(declared: Tensor) -> torch.Tensor:
    raise _refused(declared, "a tensor that torch negates lazily; call .resolve_neg() first")


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.itemsize) if tensor.numel() else 0


def dtype_name(kind: torch.dtype) -> str:
    """Our name of a torch dtype; torch's own for one that we do not have."""
    return next((name for name, known in TORCH_DTYPE.items() if known == kind), str(kind).removeprefix("torch."))


_NUMPY_DTYPE = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int8": "i8", "uint8": "u8", "bool": "bool",
}  # fmt: skip


def _of_numpy(declared: Tensor, value: npt.NDArray[Any], use: Use) -> torch.Tensor:
    kind = value.dtype
    if isinstance(value, np.ma.MaskedArray):
        raise _refused(declared, "a masked array, whose mask would be lost; give .filled(value)")
    if kind.hasobject or kind.names:
        raise _refused(declared, f"an array of {'objects' if kind.hasobject else 'records'}; give plain numbers")
    if not kind.isnative:
        raise _refused(
            declared, f"an array in foreign byte order ({kind.str}); give x.astype(x.dtype.newbyteorder('='))"
        )
    same(declared, value.shape, _NUMPY_DTYPE.get(kind.name, kind.name))
    plain = np.asarray(value)
    if use == "copy":
        plain = np.array(plain, order="C", copy=None)
        plain = plain if plain.flags.aligned and plain.flags.writeable else plain.copy()
    elif not (plain.flags.c_contiguous and plain.flags.aligned):
        raise GraphError(f"tensor {declared.name!r} must be contiguous; call numpy.ascontiguousarray first.")
    elif use == "write" and not plain.flags.writeable:
        raise _refused(declared, "a read-only array, but replays write to it; give a copy of it")
    elif not plain.flags.writeable:
        plain = _unlocked(plain)
    if kind.name == "bfloat16":  # of ml_dtypes: torch takes the bits
        return torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(plain)


def _unlocked(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory without the flag, for readers: torch has no read-only tensors."""
    raw: Any = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    raw.owner = array
    return np.frombuffer(raw, array.dtype).reshape(array.shape)


# ------------------------------------------------------------------------------------------------ sharing


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """The memory of a tensor; `written` if a replay writes to it."""

    address: int
    nbytes: int
    name: str
    written: bool

    @property
    def end(self) -> int:
        return self.address + self.nbytes


def written_names(graph: Graph) -> frozenset[str]:
    """Tensors that a caller gives and a replay writes to: outputs that ops make, and states."""
    roles = {t.name: t.role for t in graph.tensors}
    made = {name for name in graph.outputs if roles[name] == "activation"}
    return frozenset(made | {t.name for t in graph.with_role("state")})


def changed_names(graph: Graph) -> frozenset[str]:
    """The same without states that no op of the (flat) graph changes."""
    changed = {name for op in graph.ops for name in op.writes}
    return written_names(graph) - ({t.name for t in graph.with_role("state")} - changed)


def check_apart(regions: Iterable[Region]) -> None:
    """GraphError when what is written shares memory with anything else. Inputs and weights may share theirs."""
    furthest: Region | None = None
    written: Region | None = None
    for region in sorted(regions):
        other = furthest if region.written else written
        if other is not None and region.address < other.end:
            first, second = (other, region) if other.written else (region, other)
            raise GraphError(
                f"{first.name!r}, which a replay writes to, shares memory with {second.name!r}; other ops would read "
                "what was overwritten. Give each memory of its own."
            )
        furthest = region if furthest is None or region.end > furthest.end else furthest
        if region.written:
            written = region if written is None or region.end > written.end else written
