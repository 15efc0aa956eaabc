"""What every standard kind takes: its inputs by their numbers of axes, and its attributes by what they are.

Checked before a kind's own rules, which may therefore index shapes and read attributes as they please, whether an op
comes from Python or from a file. A kind that is registered from elsewhere and has no line here is not checked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from taskgraph.errors import GraphError
from taskgraph.graph.op import ITEMSIZE, ROWS, TURN, Attr, Tensor
from taskgraph.record import shown

Shapes = Sequence[Tensor]
Attrs = dict[str, Attr]

COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter")

SCALING = ("factor", "low_freq", "high_freq", "original_context")
"""The attributes of Llama 3's scaling of frequencies, each after "scaling_"."""
YARN = ("factor", "low", "high", "attention")
"""The attributes of a YaRN scaling, each after "yarn_": see `rope_kv`."""


def need(condition: bool, kind: str, inputs: Shapes, text: str) -> None:
    """GraphError with the shapes of `inputs` and `text` unless `condition`."""
    if not condition:
        shapes = ", ".join(f"{t.name}: {t.dtype}{list(t.shape)}" for t in inputs)
        raise GraphError(f"{kind}({shapes}): {text}.")


FLOATS, INTEGERS = ("f64", "f32", "f16", "bf16", "f8"), ("i32", "i64")


def need_floats(kind: str, inputs: Shapes, *operands: Tensor) -> None:
    """GraphError unless all `operands` are of one float dtype."""
    kinds = {t.dtype for t in operands}
    names = ", ".join(dict.fromkeys(t.name for t in operands))
    need(len(kinds) == 1 and kinds <= set(FLOATS), kind, inputs, f"{names} must be floats of one dtype")


def need_integers(kind: str, inputs: Shapes, places: Tensor) -> None:
    """GraphError unless `places` are i32 or i64."""
    need(places.dtype in INTEGERS, kind, inputs, f"{places.name} must be i32 or i64")


def made_dtype(kind: str, inputs: Shapes, attrs: Attrs, default: str) -> str:
    """The dtype of the output: `out_dtype` where the op has one; GraphError unless it is a float."""
    made = str(attrs.get("out_dtype", default))
    need(made in FLOATS, kind, inputs, f"out_dtype is one of {', '.join(FLOATS)}; got {made!r}")
    return made


def _is_integer(value: Attr, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Attr) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


COUNT, PLACE, FLAG, NUMBER, POSITIVE, SMALL, WORD, DTYPE = (
    "an integer of at least 1", "an integer of at least 0", "true or false", "a finite number",
    "a finite number above 0", "a finite number of at least 0", "a text", f"one of {', '.join(ITEMSIZE)}",
)  # fmt: skip
"""What an attribute can be, in the words of its error."""

_IS: Final[Mapping[str, Callable[[Attr], bool]]] = {
    COUNT: lambda v: _is_integer(v, 1),
    PLACE: lambda v: _is_integer(v, 0),
    FLAG: lambda v: isinstance(v, bool),
    NUMBER: _is_number,
    POSITIVE: lambda v: _is_number(v) and v > 0,  # type: ignore[operator]
    SMALL: lambda v: _is_number(v) and v >= 0,  # type: ignore[operator]
    WORD: lambda v: isinstance(v, str),
    DTYPE: lambda v: isinstance(v, str) and v in ITEMSIZE,
}


_NONE: Final[Mapping[str, str]] = {}


@dataclass(frozen=True, slots=True)
class Signature:
    """`axes` of each input, "+" for any number but none and "*" for any; the last `spare` inputs may be absent, and
    with `many` the only one may stand any number of times. `must` and `may` are attributes by name."""

    axes: str
    must: Mapping[str, str]
    may: Mapping[str, str]
    spare: int = 0
    many: bool = False


def _takes(axes: str, spare: int, may: Mapping[str, str], must: Mapping[str, str] = _NONE) -> Signature:
    return Signature(axes, must, may, spare)


_SCALING = {f"scaling_{key}": POSITIVE for key in SCALING}
_YARN = {f"yarn_{key}": NUMBER for key in YARN}
_ROPE = {"theta": POSITIVE, "eps": SMALL}
_LATENT_ROPE = {"heads": COUNT, "rotary": COUNT, "interleaved": FLAG, **_ROPE}
_LATENT = {"rotary": COUNT, "scale": NUMBER, "context": COUNT}
_GROUPS = {"groups": COUNT, "top_groups": COUNT, "first": PLACE, "held": COUNT}
_OUT = {"out_dtype": DTYPE}

SIGNATURES: Final[Mapping[str, Signature]] = {
    "embedding": _takes("12", 0, _OUT),
    "gemm": _takes("22++", 2, _OUT, {"transpose_w": FLAG, "bias": FLAG, "residual": FLAG}),
    "rmsnorm": _takes("+1", 0, {}, {"eps": SMALL}),
    "rope": _takes("31", 0, {}, {"theta": POSITIVE}),
    "rope_kv": _takes("214411", 2, _SCALING | _YARN, {"heads": COUNT, **_ROPE}),
    "attention": _takes("3144", 0, {}, {"context": COUNT}),
    "decode_attention": _takes("35", 0, {}),
    "swiglu": _takes("2", 0, {}),
    "add": _takes("**", 0, {}),
    "argmax": _takes("2", 0, {}),
    "copy": _takes("*", 0, {}, {"direction": WORD}),
    "concat_rows": Signature("+", {}, {}, many=True),
    "slice_rows": _takes("+", 0, {}, {"start": PLACE, "stop": COUNT, "step": COUNT}),
    **{kind: _takes("+", 0, {}, {"ranks": COUNT, "axis": PLACE}) for kind in COLLECTIVES},
    "route": _takes("211", 2, {}, {"top_k": COUNT, "scoring": WORD, "normalize": FLAG, "scale": NUMBER, **_GROUPS}),
    "experts": _takes("22332", 1, {}, {"top_k": COUNT, "ranks": COUNT}),
    "gated_add": _takes("222", 0, {}),
    "latent_rope": _takes("22113", 0, _YARN, _LATENT_ROPE),
    "latent_attention": _takes("3132", 0, {}, _LATENT),
    "paged_latent_rope": _takes("221113", 0, _YARN, {"context": COUNT, **_LATENT_ROPE}),
    "paged_latent_decode": _takes("31232", 0, {}, _LATENT),
    "paged_latent_prefill": _takes("311232", 0, {}, _LATENT),
    "paged_rope": _takes("2114411", 2, _SCALING | _YARN, {"heads": COUNT, "context": COUNT, **_ROPE}),
    "paged_decode": _takes("31244", 0, {}, {"context": COUNT}),
    "paged_prefill": _takes("311244", 0, {}, {"context": COUNT}),
    "copy_pages": _takes("++2", 0, {"expected_pages": SMALL}, {"direction": WORD}),
}  # fmt: skip
"""Kind -> what it takes."""


def check_signature(kind: str, ins: Shapes, attrs: Attrs) -> None:
    """GraphError, with the shapes, unless inputs and attributes are of the kind's Signature."""
    takes = SIGNATURES.get(kind)
    if takes is None:
        return
    wrong = _wrong_input(takes, ins) or _wrong_attribute(takes, attrs)
    if not wrong and kind == "gemm" and len(ins) != 2 + bool(attrs["bias"]) + bool(attrs["residual"]):
        wrong = "its flags bias and residual are not as its inputs"
    need(not wrong, kind, ins, wrong)


def _wrong_input(takes: Signature, ins: Shapes) -> str:
    """What is wrong with the inputs; empty if nothing is."""
    most, least = len(takes.axes), len(takes.axes) - takes.spare
    if not (ins if takes.many else least <= len(ins) <= most):
        return f"takes {'1 or more' if takes.many else least if least == most else f'{least} to {most}'} inputs"
    for i, t in enumerate(ins):
        axes = takes.axes[0 if takes.many else i]
        if axes != "*" and (not t.shape if axes == "+" else len(t.shape) != int(axes)):
            return f"input {i}, {t.name!r}, must have {axes.replace('+', '1 or more')} axes"
    return ""


def _wrong_attribute(takes: Signature, attrs: Attrs) -> str:
    """What is wrong with the attributes; empty if nothing is."""
    if lost := [key for key in takes.must if key not in attrs]:
        return f"the attribute {lost[0]!r} is missing"
    for key, value in attrs.items():
        wanted = takes.must.get(key) or takes.may.get(key)
        if wanted is None and key not in (ROWS, TURN):
            return f"there is no attribute {key!r}; there are {', '.join((*takes.must, *takes.may)) or 'none'}"
        if wanted is not None and not _IS[wanted](value):
            return f"{key} is {shown(value)}; it must be {wanted}"
    for family in (_SCALING, _YARN):
        if len(attrs.keys() & family.keys()) not in (0, len(family)):
            return f"{', '.join(family)} go together"
    return ""
