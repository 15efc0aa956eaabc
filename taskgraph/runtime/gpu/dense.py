"""How each op kind runs on a GPU through our own kernels: a table from kind to a function that gives its launches.

A rule runs once, before capture, with the op and the addresses of its buffers. It imports nothing of CUDA.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import ITEMSIZE, Op, Rows
from taskgraph.ops import COLLECTIVES
from taskgraph.runtime import rotary

THREADS = 128
"""Of a block in the kernels that reduce over one; `common.cuh` has the same number."""
_GEMM_TILE, _GEMM_FEW_ROWS, _GEMM_COLUMNS, _GEMM_BLOCK = 64, 16, 64, 256
_SM_THREADS = 2048
"""Resident threads of an SM (CUDA Programming Guide, compute capabilities 8.0, 9.0, 10.0)."""
_SPLIT_KEYS, _MAX_SPLITS, _MAX_DIM = 256, 32, 256


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from entry to entry along each axis, last axis fastest."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor on the device: where it is and what it is. `pinned`: it lies in pinned host memory. `strides`, in
    elements, where its rows do not lie one after another."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    pinned: bool = False
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def part(self, rows: Rows) -> "Buffer":
        """The rows of this tensor, in place."""
        shape = (*self.shape[: rows.axis], rows.stop - rows.start, *self.shape[rows.axis + 1 :])
        strides = self.strides or dense_strides(self.shape)
        offset = rows.start * strides[rows.axis] * ITEMSIZE[self.dtype]
        dense = self.strides is None and math.prod(self.shape[: rows.axis]) == 1
        return replace(self, address=self.address + offset, shape=shape, strides=None if dense else strides)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel of the file `source` on a grid of blocks of `block` threads."""

    kernel: str
    source: str
    grid: tuple[int, ...]
    block: int
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class CopyLaunch:
    """A copy by a copy engine."""

    target: int
    source: int
    nbytes: int


class Site(Protocol):
    """What a rule may ask for: the SMs of the lane, scratch memory, and constants on the device."""

    @property
    def sm_count(self) -> int: ...

    def scratch(self, nbytes: int) -> int:
        """Address of bytes that belong to this op alone."""
        ...

    def constant(self, values: npt.NDArray[Any]) -> int:
        """Address of a copy of `values`."""
        ...

    def fault(self) -> int:
        """Address of this op's word in pinned memory, where its kernels `report` what they cannot use (common.cuh)."""
        ...


Launches = list[Launch | CopyLaunch]
Rule = Callable[[Op, Sequence[Buffer], Sequence[Buffer], Site], Launches]

LAUNCH_RULES: dict[str, Rule] = {}
"""kind -> its launches."""
_STRIDED = ("decode_attention",)
"""Kinds whose kernels take the strides of their operands."""


def launch_rule(kind: str) -> Callable[[Rule], Rule]:
    """Register the rule of `kind`."""

    def register(rule: Rule) -> Rule:
        LAUNCH_RULES[kind] = rule
        return rule

    return register


def launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    """The launches of one op; BackendUnavailable when we have no kernel for its kind, types or shape."""
    if op.kind not in LAUNCH_RULES:
        raise BackendUnavailable(
            f"op {op.name!r}: the cuda backend has no kernel for kind {op.kind!r}; use GraphBuilder.call with a "
            "function that launches on the stream it is given."
        )
    strided = next((name for name, b in zip(op.inputs, ins, strict=True) if b.strides is not None), None)
    if strided is not None and op.kind not in _STRIDED:
        raise BackendUnavailable(
            f"op {op.name!r}: the {op.kind} kernel reads dense rows; its view of {strided!r} is not. Copy it first."
        )
    return LAUNCH_RULES[op.kind](op, ins, outs, site)


def seen(op: Op, ins: Sequence[Buffer]) -> list[Buffer]:
    """The inputs of `op` narrowed to the rows that it takes of them."""
    views = op.views
    return [b.part(views[i]) if i in views else b for i, b in enumerate(ins)]


def float_type(op: Op, *buffers: Buffer) -> str:
    """The one float type of all buffers, for the kernel's name."""
    found = {b.dtype for b in buffers}
    if len(found) != 1 or not found <= {"f32", "bf16"}:
        raise BackendUnavailable(
            f"op {op.name!r}: the {op.kind} kernels take one type, f32 or bf16; got {', '.join(sorted(found))}."
        )
    return found.pop()


def blocks(kernel: str, source: str, grid: tuple[int, ...], block: int, args: tuple[Any, ...], site: Site) -> Launch:
    """A launch of a kernel that loops over the blocks of `grid` (`each_block` in common.cuh): no more blocks than the
    SMs that the op is launched on hold at a time."""
    nx, ny, nz = (*grid, 1, 1)[:3]
    at_once = site.sm_count * (_SM_THREADS // block)
    launched = min(nx * ny * nz, at_once)
    return Launch(kernel, source, (launched,), block, (*args, np.int32(nx), np.int32(ny), np.int32(nz)))


def spread(elements: int, site: Site) -> tuple[int, ...]:
    """A grid for grid-stride loops: enough blocks to fill the lane's SMs, not more than there is work."""
    return (max(1, min(-(-elements // 256), 8 * site.sm_count)),)


@launch_rule("add")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    a, b = ins
    kind, count = float_type(op, a, b, outs[0]), math.prod(a.shape)
    args = (a.address, b.address, outs[0].address, np.int64(count))
    return [Launch(f"add_{kind}", "elementwise", spread(count, site), 256, args)]


@launch_rule("swiglu")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    kind, (rows, features) = float_type(op, ins[0], outs[0]), outs[0].shape
    args = (ins[0].address, outs[0].address, np.int64(rows), np.int32(features))
    return [Launch(f"swiglu_{kind}", "elementwise", spread(rows * features, site), 256, args)]


@launch_rule("rmsnorm")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    x, weight = ins
    columns = x.shape[-1]
    args = (x.address, weight.address, outs[0].address, np.int32(columns), np.float32(op.number("eps")))
    name = f"rmsnorm_{float_type(op, x, weight, outs[0])}"
    return [blocks(name, "elementwise", (math.prod(x.shape[:-1]),), THREADS, args, site)]


@launch_rule("embedding")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    tokens, table = ins
    kinds = (tokens.dtype, table.dtype, outs[0].dtype)
    if kinds[1:] not in (("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")):
        raise BackendUnavailable(f"op {op.name!r}: no embedding kernel from {kinds[1]} to {kinds[2]}.")
    sizes = (np.int32(table.shape[1]), np.int64(table.shape[0]))
    args = (tokens.address, table.address, outs[0].address, *sizes, site.fault())
    return [blocks(f"embedding_{'_'.join(kinds)}", "elementwise", (tokens.shape[0],), THREADS, args, site)]


@launch_rule("argmax")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    args = (ins[0].address, outs[0].address, np.int32(ins[0].shape[1]))
    return [blocks(f"argmax_{float_type(op, ins[0])}", "elementwise", (ins[0].shape[0],), THREADS, args, site)]


def _move_rows(source: Buffer, start: int, step: int, rows: int, target: int, site: Site) -> Launch:
    """Rows start, start + step, ... of `source`, `rows` of them, one after another to `target`."""
    row = source.nbytes // source.shape[0]
    unit = 4 if row % 4 == 0 else 1
    places = (start, step, row // unit, rows)
    args = (source.address, target, *map(np.int64, places))
    return Launch(f"slice_rows_b{unit}", "elementwise", spread(rows * row // unit, site), 256, args)


@launch_rule("slice_rows")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    rows = outs[0].shape[0]
    return [_move_rows(ins[0], op.integer("start"), op.integer("step"), rows, outs[0].address, site)]


@launch_rule("concat_rows")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    """A launch a part: they follow each other on the lane."""
    targets = accumulate((b.nbytes for b in ins[:-1]), initial=outs[0].address)
    return [_move_rows(b, 0, 1, b.shape[0], target, site) for b, target in zip(ins, targets, strict=True)]


@launch_rule("copy")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    """A copy engine's work, or a kernel on at most the SMs that the demand pins."""
    source, target, nbytes = ins[0].address, outs[0].address, ins[0].nbytes
    if op.demand.sm is None:
        return [CopyLaunch(target, source, nbytes)]
    wide = (nbytes | source | target) % 16 == 0
    grid = (min(op.demand.sm[1], site.sm_count),)
    name = "copy_on_sms" if wide else "copy_bytes_on_sms"
    return [Launch(name, "pages", grid, 1024, (source, target, np.int64(nbytes // 16 if wide else nbytes)))]


def _collective(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    """Of one rank: a copy. More ranks go through NCCL (`runtime.collective`)."""
    return [_move_rows(ins[0], 0, 1, ins[0].shape[0], outs[0].address, site)]


LAUNCH_RULES |= dict.fromkeys(COLLECTIVES, _collective)


@launch_rule("gemm")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    x, w, *extra = ins
    (m, k), n = x.shape, outs[0].shape[1]
    kinds = (x.dtype, w.dtype, outs[0].dtype)
    if kinds not in (("f32",) * 3, ("bf16",) * 3, ("bf16", "bf16", "f32"), ("f32", "bf16", "f32")):
        raise BackendUnavailable(f"op {op.name!r}: no product of {kinds[0]} and {kinds[1]} into {kinds[2]}.")
    if any(t.dtype != x.dtype for t in extra):
        raise BackendUnavailable(f"op {op.name!r}: bias and residual must be {x.dtype} like x.")
    bias = extra[0].address if op.attr("bias") else 0
    residual = extra[-1].address if op.attr("residual") else 0
    few = m <= _GEMM_FEW_ROWS
    grid = (-(-n // _GEMM_COLUMNS), -(-m // (_GEMM_FEW_ROWS if few else _GEMM_TILE)))
    numbers = (np.int32(m), np.int32(n), np.int32(k), np.int32(bool(op.attr("transpose_w"))))
    args = (x.address, w.address, bias, residual, outs[0].address, *numbers)
    name = f"gemm_{'few_rows_' if few else ''}{'_'.join(kinds)}"
    return [blocks(name, "gemm", grid, _GEMM_BLOCK, args, site)]


@launch_rule("rope")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    x, positions = ins
    need_i64(op, positions)
    tokens, heads, dim = x.shape
    args = (x.address, positions.address, site.constant(rotary.inverse_frequencies(op, dim)), outs[0].address)
    name = f"rope_{float_type(op, x, outs[0])}"
    return [blocks(name, "rope", (tokens, heads), THREADS, (*args, np.int32(heads), np.int32(dim)), site)]


@launch_rule("rope_kv")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    qkv, positions, keys, values, *norms = ins
    need_i64(op, positions)
    batch, kv_heads, length, dim = keys.shape
    tokens, heads, _ = outs[0].shape
    kind = float_type(op, qkv, keys, values, outs[0], *norms)
    q_norm, k_norm = (t.address for t in norms) if norms else (0, 0)
    pointers = (qkv.address, positions.address, keys.address, values.address, q_norm, k_norm)
    last = np.float32(op.number("eps")), np.float32(rotary.size(op))
    numbers = (*map(np.int32, (heads, kv_heads, dim, tokens // batch)), np.int64(length), *last)
    args = (*pointers, site.constant(rotary.inverse_frequencies(op, dim)), outs[0].address, *numbers, site.fault())
    return [blocks(f"rope_kv_{kind}", "rope", (tokens, heads + 2 * kv_heads), THREADS, args, site)]


def need_i64(op: Op, positions: Buffer) -> None:
    """BackendUnavailable unless the positions are what the kernels read."""
    if positions.dtype != "i64":
        raise BackendUnavailable(f"op {op.name!r}: positions must be i64 on the cuda backend; got {positions.dtype}.")


@launch_rule("attention")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    q, positions, keys, values = ins
    need_i64(op, positions)
    batch, kv_heads, length, dim = keys.shape
    tokens, heads, _ = q.shape
    kind = float_type(op, q, keys, values, outs[0])
    need_dim(op, dim)
    if tokens == batch:
        strides = (kv_heads * length * dim, length * dim, dim)
        cache = DecodeCache(keys.address, values.address, positions.address, kv_heads, dim, length, strides)
        return split_decode(kind, q.address, cache, batch, heads, outs[0].address, site)
    pointers = (q.address, positions.address, keys.address, values.address, outs[0].address)
    numbers = (*map(np.int32, (heads, kv_heads, dim, tokens // batch)), np.int64(length))
    args = (*pointers, *numbers, site.fault())
    return [blocks(f"attention_{kind}", "attention", (tokens, heads), THREADS, args, site)]


@launch_rule("decode_attention")
def _(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: Site) -> Launches:
    q, kv = ins
    _, batch, length, kv_heads, dim = kv.shape
    need_dim(op, dim)
    half, sequence, key, head, _ = kv.strides or dense_strides(kv.shape)
    values = kv.address + half * ITEMSIZE[kv.dtype]
    strides = (sequence, head, key)
    cache = DecodeCache(kv.address, values, 0, kv_heads, dim, length, strides)
    return split_decode(float_type(op, q, kv, outs[0]), q.address, cache, batch, q.shape[1], outs[0].address, site)


def at_most(op: Op, what: str, number: int, limit: int) -> None:
    """BackendUnavailable beyond what the kernels' arrays hold."""
    if number > limit:
        raise BackendUnavailable(f"op {op.name!r}: the {op.kind} kernels take up to {limit} {what}; got {number}.")


def need_dim(op: Op, dim: int) -> None:
    if dim > _MAX_DIM:
        raise BackendUnavailable(f"op {op.name!r}: the attention kernels take head dims up to {_MAX_DIM}; got {dim}.")


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the keys of a sequence lie: addresses of the block tables and of the lengths (i32), the rows of a page, the
    pages of a table, elements from page to page, and how many pages there are."""

    blocks: int
    lengths: int
    rows: int
    each: int
    stride: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class DecodeCache:
    """Keys and values; `strides` in elements from sequence to sequence, head to head, key to key. Keys in use are
    positions[sequence] + 1 or those that `pages` say, else all `length`."""

    keys: int
    values: int
    positions: int
    kv_heads: int
    dim: int
    length: int
    strides: tuple[int, int, int]
    pages: Pages = Pages(0, 0, 1, 0, 0)


def split_decode(kind: str, q: int, cache: DecodeCache, batch: int, heads: int, out: int, site: Site) -> Launches:
    """Splits of the keys, as many as fill the lane's SMs, and a combine step."""
    wanted = -(-site.sm_count // (batch * heads))
    splits = max(1, min(_MAX_SPLITS, wanted, -(-cache.length // _SPLIT_KEYS)))
    parts = site.scratch(4 * batch * heads * splits * (cache.dim + 2))
    shape = map(np.int32, (heads, cache.kv_heads, cache.dim, cache.length))
    p = cache.pages
    places = (*map(np.int64, cache.strides), np.int32(p.rows), np.int32(p.each), np.int64(p.stride), np.int32(p.count))
    args = (q, cache.keys, cache.values, p.blocks, p.lengths, cache.positions, parts, *shape, *places, site.fault())
    combine = (parts, out, np.int32(heads), np.int32(cache.dim), np.int32(splits))
    return [
        blocks(f"decode_split_{kind}", "attention", (batch, heads, splits), THREADS, args, site),
        blocks(f"decode_combine_{kind}", "attention", (batch, heads), THREADS, combine, site),
    ]
