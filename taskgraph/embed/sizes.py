"""Sizes of a Dynamo graph that change from call to call: where they are found, and the buckets that they are padded to.

Dynamo names such a size by a symbol, gives it as an argument of its own, and compiles once for all its values.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

_NUMBERS: Final = (torch.SymInt, torch.SymFloat, torch.SymBool)
Sizes = tuple[Any, ...]
"""The value of each symbol of a graph, in the order of `Symbols.names`, then of arguments that are numbers."""


def bucket_of(size: int) -> int:
    """The size of the plan that runs `size`: itself up to 8, then four steps an octave, a quarter more at most."""
    step = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // step) * step


@dataclass(frozen=True, slots=True)
class Symbol:
    """A size that changes: the arguments that are it, and the (argument, axis) pairs that have it."""

    name: str
    numbers: tuple[int, ...]
    axes: tuple[tuple[int, int], ...]


class Symbols:
    """The sizes of a graph that change, `changing` for short; numbers that are none are part of its key too."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> None:
        numbers: dict[str, list[int]] = {}
        axes: dict[str, list[tuple[int, int]]] = {}
        self._plain: list[int] = []
        """Numbers among the arguments that are no bare symbol."""
        self._floats: list[int] = []
        """Scalars that stand for a float of the module's, which Dynamo takes out of them again."""
        self._dims: list[int] = []
        """Tensors among the arguments that have a size that is no bare symbol, but changes."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        for i, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
            seen: Any = node.meta.get("example_value", example)
            if isinstance(seen, torch.Tensor):
                if seen.dim() == 0 and node.users and all(map(_takes_out, node.users)):
                    self._floats.append(i)
                for axis, size in enumerate[Any](seen.shape):
                    if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                        name = bare(size)
                        if name:
                            axes.setdefault(name, []).append((i, axis))
                        elif i not in self._dims:
                            self._dims.append(i)
            elif isinstance(seen, torch.SymInt) and bare(seen):
                numbers.setdefault(bare(seen), []).append(i)
            else:
                self._plain.append(i)
        names = dict.fromkeys([*numbers, *axes])
        self.all = [Symbol(n, tuple(numbers.get(n, ())), tuple(axes.get(n, ()))) for n in names]
        self._first = [(s.numbers[0], -1) if s.numbers else s.axes[0] for s in self.all]
        self._rest = bool(self._plain or self._floats or self._dims)
        self.changing = bool(self.all or self._rest)

    def of(self, args: Sequence[Any]) -> Sizes:
        """What the sizes are in a call."""
        found: list[Any] = [args[i] if axis < 0 else args[i].shape[axis] for i, axis in self._first]
        if self._rest:
            found += [args[i] for i in self._plain] + [args[i].item() for i in self._floats]
            found += [tuple(args[i].shape) for i in self._dims]
        return tuple(found)

    def resized(self, args: Sequence[Any], sizes: Sizes) -> list[Any]:
        """Arguments as those of a call, but of other sizes: new tensors without content where a size is another."""
        given = list(args)
        shapes: dict[int, list[int]] = {}
        for symbol, size in zip(self.all, sizes, strict=False):
            for i in symbol.numbers:
                given[i] = size
            for i, axis in symbol.axes:
                if args[i].shape[axis] != size:
                    shapes.setdefault(i, list(args[i].shape))[axis] = size
        for i, shape in shapes.items():
            given[i] = like(args[i], shape)
        return given

    def fixed(self, gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
        """The graph with the floats of a call as constants."""
        if not self._floats:
            return gm
        graph = copy.deepcopy(gm.graph)
        placeholders = graph.find_nodes(op="placeholder")
        for i in self._floats:
            value = args[i].item()
            for node in list(placeholders[i].users):
                for user in list(node.users):
                    kept = {n: n for n in user.all_input_nodes} | {node: value}
                    user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), kept.__getitem__)
                graph.erase_node(node)
        return fx.GraphModule(gm, graph)


def _takes_out(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def bare(size: Any) -> str:
    """The name of a symbol that is a size; empty for one that is computed."""
    expr = size.node.expr
    return str(expr) if getattr(expr, "is_symbol", False) else ""


def like(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An empty tensor of another shape, dense, its axes in the order in which `tensor` has them in memory."""
    order = sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    made = tensor.new_empty([shape[axis] for axis in order])
    return made.permute([order.index(axis) for axis in range(tensor.dim())])


# ------------------------------------------------------------------------------------------ what depends on a size


def proportional(gm: fx.GraphModule, name: str) -> bool:
    """Whether all that tensors are computed of, and that the graph returns, depends on the symbol by multiples of it
    alone: then two values of it show what depends on it and what does not."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" or (node.op != "output" and isinstance(node.meta.get("example_value"), _NUMBERS)):
            continue
        for given in node.all_input_nodes:
            if not all(_is_multiple(number, name) for number in _numbers(given.meta.get("example_value"))):
                return False
    return all(
        _is_multiple(size, name)
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(seen := node.meta.get("example_value"), torch.Tensor)
        for size in _numbers(tuple(seen.shape))
    )


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, _NUMBERS):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _numbers(one)


def _is_multiple(number: Any, name: str) -> bool:
    """Whether it is a constant (another symbol is one) or a constant times the symbol."""
    expr: Any = number.node.expr
    mine = [s for s in getattr(expr, "free_symbols", ()) if str(s) == name]
    if not mine:
        return True
    (symbol,) = mine
    if isinstance(number, torch.SymBool):
        return False
    rest = expr / symbol
    return symbol not in rest.free_symbols
