"""Keyword arguments of version 0.1 for `GraphBuilder.op` and `call`, which go on to work."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from taskgraph.errors import GraphError
from taskgraph.graph.op import Attr
from taskgraph.record import sequence, shown


class EarlierOp(TypedDict, total=False):
    """`writes`: the states among the inputs that the op changes, which `state.written()` says now; `attrs`: the static
    parameters, which stand beside the kind now."""

    writes: Sequence[Any]
    attrs: Mapping[str, Attr] | None


class EarlierCall(TypedDict, total=False):
    """`writes` as of an op; `split_axes` and `split_multiple`: the axes and the multiple of a `Splittable`."""

    writes: Sequence[Any]
    split_axes: Sequence[int | None] | None
    split_multiple: int


def only(taker: str, given: Mapping[str, object], known: type) -> None:
    """TypeError, as Python's own, for an argument that no version of `taker` has."""
    for name in given:
        if name not in known.__annotations__:
            raise TypeError(f"{taker}() got an unexpected keyword argument {name!r}")


def written(inputs: Sequence[Any], writes: Sequence[Any]) -> Sequence[Any]:
    """`inputs` with those of `writes` as states that are changed; GraphError for one that is no input."""
    left = [*sequence("writes", writes, GraphError)]
    if not left:
        return inputs
    made = []
    for value in sequence("inputs", inputs, GraphError):
        mine = [w for w in left if getattr(w, "tensor", w) == getattr(value, "tensor", None)]
        left = [w for w in left if w not in mine]
        made.append(value.written() if mine else value)
    if left:
        raise GraphError(
            f"an op writes {shown(getattr(left[0], 'name', left[0]))}, which must also be among its inputs."
        )
    return made
