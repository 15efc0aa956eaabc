"""Matrix products on a CPU, by every way that `Ways` names.

A product is out = x w^T + bias + residual with x (m, k), w (n, k), bias (n,), residual and out (m, n). Ways that
change a weight's layout or dtype do so once, and executables that are bound to the same weight share the result.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.runtime.cpu import kernels
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE, Entry, bits
from taskgraph.runtime.cpu.tile import DOT
from taskgraph.runtime.cpu.ways import WAYS, Choice, Ways

_NAMES = {kind: name for name, kind in TORCH_DTYPE.items()}
_Copy = Callable[[torch.Tensor], object]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Product:
    """Operands of one product; `fixed` when no replay changes w."""

    x: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out: torch.Tensor
    fixed: bool
    threads: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All operands that there are."""
        return tuple(t for t in (self.x, self.w, self.bias, self.residual, self.out) if t is not None)


def entry(name: str, p: Product, ways: Ways) -> Entry:
    """The product of op `name` by the way that `ways` chooses for it, or by the next that is here and takes its
    operands. BackendUnavailable when none does."""
    chosen = ways.product(_NAMES[p.x.dtype], p.x.shape[0], fixed=p.fixed)
    for way in (chosen, *_INSTEAD):
        if way in able() and _TAKES[way](p):
            return _ENTRIES[way](p)
    kinds = ", ".join(_NAMES[t.dtype] for t in p.tensors)
    raise BackendUnavailable(f"op {name!r}: the cpu backend does not multiply {kinds}; convert first.")


class Linear:
    """x -> x w^T for any number of rows of x. A `fixed` w is in the layouts of the ways that it may go once and for
    all; one that is not is left as it is."""

    def __init__(self, name: str, w: torch.Tensor, fixed: bool, threads: int, ways: Ways) -> None:
        self._name, self._w, self._fixed, self._threads, self._ways = name, w, fixed, threads, ways
        self._kept: dict[str, _Packed] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor of x's dtype."""
        out = torch.empty(len(x), len(self._w), dtype=x.dtype)
        made = entry(self._name, Product(x, self._w, None, None, out, self._fixed, self._threads), self._ways)
        packed = made.__dict__.get("packed") if isinstance(made, partial) else None
        if packed is not None:
            self._kept[packed.way] = packed
        made()
        return out


def room_for(nbytes: int) -> bool:
    """Whether a copy of that many bytes leaves at least as many free on this machine."""
    return 2 * nbytes <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def widened(dtype: torch.dtype, rows: int, ways: Ways) -> bool:
    """Whether products of `rows` rows of operands that change are faster here when they are widened to float32."""
    return ways.product(_NAMES[dtype], rows, fixed=False) == "f32"


_INSTEAD = ("plain", "f32")
"""What runs when operands do not suit the way that was chosen: f32 takes all of them."""


# -- what this processor and this torch have --------------------------------------------------------------------------


@cache
def able() -> tuple[str, ...]:
    """The ways that exist here. oneDNN's is tried: its blocked bf16 weights need instructions that many lack."""
    missing = {"dot"} if not DOT else set()
    if not _reorders():
        missing.add("packed")
    return tuple(way for way in WAYS if way not in missing)


def _reorders() -> bool:
    """Whether torch can reorder a bf16 weight here; it says that it cannot by a RuntimeError alone."""
    if not torch._C._has_mkldnn:
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=torch.bfloat16), 32)
    except RuntimeError as error:
        if "cpu support" in str(error):
            return False
        raise
    return True


def by_capability() -> Ways:
    """The choices before anything is measured, from what the processor has."""
    here = able()
    tile = "dot" if "dot" in here else "tile"
    many = "packed" if "packed" in here and torch.cpu._is_amx_tile_supported() else tile
    changing = "plain" if "packed" in here else "f32"
    choices = [
        Choice("bf16", True, 1, tile), *([] if many == tile else [Choice("bf16", True, 65, many)]),
        Choice("bf16", False, 1, changing),
        Choice("f32", True, 1, "tile"), Choice("f32", False, 1, "plain"),
        Choice("f16", True, 1, "tile"), Choice("f16", False, 1, "f32"),
    ]  # fmt: skip
    return Ways(tuple(choices))


def forced(way: str) -> Ways:
    """Every product by one way, where it takes the operands: for tests and experiments. BackendUnavailable when this
    processor or this torch has no such way."""
    if way not in able():
        raise BackendUnavailable(f"no way {way!r} of multiplying here; there are {', '.join(able())}.")
    return Ways(tuple(Choice(dtype, fixed, 1, way) for dtype in ("bf16", "f16", "f32") for fixed in (True, False)))


# -- weights in the layout of a way -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Packed:
    """A weight in the layout of a product, and the weight itself, so that its address stays its own."""

    weight: torch.Tensor
    panels: Any
    way: str


_PACKED: WeakValueDictionary[tuple[Any, ...], _Packed] = WeakValueDictionary()


def _panels(w: torch.Tensor) -> npt.NDArray[Any]:
    """Panels of bf16 stay bf16; those of f16 are float32."""
    return kernels.pack_weight(bits((w.float() if w.dtype == torch.float16 else w).contiguous()))


def in_panels(w: torch.Tensor) -> "_Packed":
    """A weight that stays in panels, shared by all who have it so; `panels` are good while what this returns lives."""
    return _packed(w, _panels)


def _blocked(w: torch.Tensor) -> torch.Tensor:
    """oneDNN's layout for 256 rows serves other numbers of rows as well (measured, 96 to 512)."""
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), 256)
    return made


def _widened(w: torch.Tensor) -> torch.Tensor:
    return w.float()


def _packed(w: torch.Tensor, pack: Callable[[torch.Tensor], Any]) -> _Packed:
    """`w` packed, shared by all executables that are bound to it: a graph bank would hold a copy a bucket.

    torch counts changes in place, but not for inference tensors, which are packed anew every time.
    """
    if w.is_inference():
        return _Packed(w, pack(w), pack.__name__)
    key = (pack, w.data_ptr(), tuple(w.shape), w.stride(), w.dtype, w._version)
    found = _PACKED.get(key)
    if found is None:
        found = _PACKED[key] = _Packed(w, pack(w), pack.__name__)
    return found


# -- the ways ---------------------------------------------------------------------------------------------------------


def _takes_panels(p: Product) -> bool:
    kinds = {t.dtype for t in p.tensors if t is not p.out}
    fits = p.w.dtype != torch.bfloat16 or p.x.shape[1] % 2 == 0
    return p.fixed and fits and kinds <= set(_FLOATS) and p.out.dtype in _FLOATS and len(kinds) == 1


def _kept(packed: _Packed | None, function: Callable[..., object], *args: object) -> Entry:
    """An entry that has its weight's layout as attribute: as long as someone runs on it, others may share it."""
    made = partial(function, *args)
    made.__dict__["packed"] = packed
    return made


def _tile(p: Product, dot: bool) -> Entry:
    """The kernel that streams the weight, packed once, past a register tile."""
    kind = bits(p.x).dtype
    first = np.empty(0, kind) if p.bias is None else bits(p.bias)
    second = np.empty((0, 0), kind) if p.residual is None else bits(p.residual)
    packed = _packed(p.w, _panels)
    return _kept(packed, kernels.gemm, bits(p.x), packed.panels, first, second, bits(p.out), dot, p.threads)


def _takes_blocks(p: Product) -> bool:
    return p.fixed and all(t.dtype == torch.bfloat16 for t in p.tensors)


def _blocks(p: Product) -> Entry:
    """oneDNN with the weight reordered once into the blocked layout of many rows."""
    packed = _packed(p.w, _blocked)
    if p.residual is None:
        return _kept(packed, _linear, p.out.copy_, p.x, packed.panels, p.bias)
    return _kept(packed, _linear_residual, p.out.copy_, p.x, p.residual, packed.panels, p.bias)


def _linear(
    copy: Callable[[torch.Tensor], object], x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> None:
    copy(torch.ops.mkldnn._linear_pointwise.default(x, w, bias, "none", [], ""))


def _linear_residual(
    copy: _Copy, x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> None:
    copy(torch.ops.mkldnn._linear_pointwise.binary(x, residual, w, bias, "add"))


def _takes_plain(p: Product) -> bool:
    return len({t.dtype for t in p.tensors}) == 1


def _plain(p: Product) -> Entry:
    right = p.w.t()
    if p.bias is not None and p.residual is not None:
        return partial(_bias_residual, p.x, right, p.bias, p.residual, p.out)
    added = p.bias if p.residual is None else p.residual
    if added is None:
        return partial(torch.mm, p.x, right, out=p.out)
    return partial(torch.addmm, added, p.x, right, out=p.out)


def _bias_residual(
    x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, out: torch.Tensor
) -> None:
    torch.addmm(bias, x, right, out=out)
    out.add_(residual)


def _f32(p: Product) -> Entry:
    """Everything in float32: weights that stay are widened once, the result is rounded once."""
    packed = _packed(p.w, _widened) if p.fixed and p.w.dtype != torch.float32 else None
    return _kept(packed, _by_f32, p, p.w if packed is None else packed.panels)


def _by_f32(p: Product, w: torch.Tensor) -> None:
    made = torch.mm(p.x.float(), w.float().t())
    for more in (p.bias, p.residual):
        if more is not None:
            made += more
    p.out.copy_(made)


_TAKES: dict[str, Callable[[Product], bool]] = {
    "dot": lambda p: _takes_panels(p) and p.x.dtype == torch.bfloat16,
    "tile": _takes_panels,
    "packed": _takes_blocks,
    "plain": _takes_plain,
    "f32": lambda p: all(t.dtype in _FLOATS for t in p.tensors),
}
_ENTRIES: dict[str, Callable[[Product], Entry]] = {
    "dot": partial(_tile, dot=True),
    "tile": partial(_tile, dot=False),
    "packed": _blocks,
    "plain": _plain,
    "f32": _f32,
}
