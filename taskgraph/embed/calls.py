"""Calls of torch's aten operators as values: what one is given, and the text that an op of a graph keeps of it.

The text is JSON, so that a graph holds no callable, has a fingerprint and can be read from a file. Tensors stand in it
as an input or an output of the op and the views that are taken of it; views are taken once, at capture.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from taskgraph.errors import GraphError
from taskgraph.graph.op import ITEMSIZE
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

OpOverload = torch._ops.OpOverload
_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPE.items()}
_ATEN: Final = ("default", "out")


# ----------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True, slots=True)
class Strided:
    """How a tensor lies in its memory, from the first byte on: sizes and strides in elements, as torch has them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    lazy: bool = False
    """Whether torch conjugates or negates the elements only when it reads them."""

    @staticmethod
    def of(tensor: torch.Tensor) -> "Strided":
        """The layout of a tensor; its offset is not part of it."""
        lazy = tensor.is_conj() or tensor.is_neg()
        return Strided(tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype, lazy)

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.elements * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements from the first to the last in memory."""
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) if self.elements else 0

    @property
    def plain(self) -> bool:
        """Whether the elements lie row by row and we have a name for their dtype."""
        steps = [math.prod(self.size[i + 1 :]) for i in range(len(self.size))]
        rows = all(n == 1 or a == b for n, a, b in zip(self.size, self.stride, steps, strict=True))
        return self.dtype in _NAMES and rows and self.elements > 0 and not self.lazy

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory, in whatever order."""
        count = 1
        for step, n in sorted((step, n) for n, step in zip(self.size, self.stride, strict=True) if n > 1):
            if step != count:
                return False
            count *= n
        return True

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape as rows: all axes but the last as one; of integers, all axes as one."""
        if not self.dtype.is_floating_point and self.dtype != torch.bool:
            return (self.elements,) if len(self.size) > 1 else self.size
        return (self.elements // self.size[-1], self.size[-1]) if len(self.size) > 2 else self.size

    def spec(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of the graph's tensor: `shape`, which has the elements in the order of their memory, else
        rows, else one axis; the bytes of the memory where it has gaps or a dtype that we have not."""
        if self.dtype in _NAMES and self.dense and self.elements:
            fits = shape is not None and math.prod(shape) == self.elements
            return shape if fits and shape is not None else self.rows if self.plain else (self.elements,), self.name
        return (max(self.extent, 1) * self.dtype.itemsize,), "u8"

    @property
    def name(self) -> str:
        """Our name of the dtype."""
        return _NAMES[self.dtype]

    def on(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor that lies so in `buffer`, a contiguous tensor of `spec`."""
        if self.plain:
            return buffer if buffer.shape == self.size else buffer.view(self.size)
        if not self.elements:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=buffer.device)
        return buffer.view(-1).view(self.dtype).as_strided(self.size, self.stride)

    def to_json(self) -> list[Any]:
        """Its part of an op's text."""
        return [list(self.size), list(self.stride), str(self.dtype).removeprefix("torch.")]

    @staticmethod
    def from_json(body: list[Any]) -> "Strided":
        """What `to_json` wrote."""
        return Strided(tuple(body[0]), tuple(body[1]), getattr(torch, body[2]))


def our_dtype(dtype: torch.dtype) -> str | None:
    """Our name of a dtype, None for one that we do not have."""
    return _NAMES.get(dtype)


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return ITEMSIZE[dtype]


# ----------------------------------------------------------------------------------------------- targets


def name_of(target: OpOverload) -> str:
    """ "aten.add.Tensor": what `target_of` finds again."""
    return f"{target.namespace}.{target._opname}.{target._overloadname}"


@cache
def target_of(name: str) -> OpOverload:
    """The operator of that name; GraphError where torch has none (its package may have to be imported first)."""
    space, opname, overload = name.split(".")
    try:
        found: OpOverload = getattr(getattr(getattr(torch.ops, space), opname), overload)
    except AttributeError as error:
        raise GraphError(f"torch has no operator {name!r}; import the package that brings it.") from error
    return found


@cache
def out_variant(target: OpOverload) -> OpOverload | None:
    """The overload of `target` that writes its one result into a tensor that it is given as `out`; None if none."""
    wanted = _signature(target)
    if len(target._schema.returns) != 1 or str(target._schema.returns[0].type) != "Tensor":
        return None
    packet = target.overloadpacket
    for overload in packet.overloads():
        other = getattr(packet, overload)
        outs = [a for a in other._schema.arguments if a.is_out]
        if len(outs) == 1 and outs[0].name == "out" and _signature(other) == wanted:
            return other  # type: ignore[no-any-return]
    return None


def _signature(target: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]


def written_arguments(target: OpOverload) -> list[str]:
    """The names of the arguments that a call of `target` changes in place."""
    return [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def by_name(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The given arguments by their names."""
    return {**{a.name: v for a, v in zip(target._schema.arguments, args, strict=False)}, **kwargs}


def argument(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument `name` of a call, or its default."""
    given = by_name(target, args, kwargs)
    if name in given:
        return given[name]
    return next((a.default_value for a in target._schema.arguments if a.name == name and a.has_default_value()), None)


# ------------------------------------------------------------------------------------------------- text


def encoded(value: Any, tensor: Callable[[Any], Any]) -> Any:
    """An argument as JSON has it; `tensor` is asked for what stands for a tensor, and says None for anything else.

    GraphError for what has no text."""
    stands = tensor(value)
    if stands is not None:
        return stands
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [encoded(v, tensor) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise GraphError(f"an argument of type {type(value).__name__} cannot be kept in a graph.")


def decoded(body: Any, tensor: Callable[[dict[str, Any]], Any]) -> Any:
    """What `encoded` wrote; `tensor` gives what stands for a tensor."""
    if isinstance(body, list):
        return [decoded(v, tensor) for v in body]
    if not isinstance(body, dict):
        return body
    ((key, value), *more) = body.items()
    if not more:
        if key == "float":
            return float(value)
        if key in ("dtype", "layout", "memory_format"):
            return getattr(torch, value)
        if key == "device":
            return torch.device(value)
        if key == "complex":
            return complex(*value)
    return tensor(body)


def text_of(body: Any) -> str:
    """JSON, short and always the same."""
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


def leaves(value: Any) -> Iterator[Any]:
    """What is no list, tuple or dict in `value`, in order."""
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    else:
        yield value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with every leaf changed."""
    if isinstance(value, (list, tuple)):
        return (
            type(value)(mapped(v, change) for v in value)
            if type(value) in (list, tuple)
            else [mapped(v, change) for v in value]
        )
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return change(value)
