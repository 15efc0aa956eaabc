"""What the CPU kernels are made of: OpenMP regions in torch's libgomp, stored elements, a register tile, as LLVM IR.

The tile multiplies a few rows by a panel of 32 columns. It is made for the processor that numba compiles for: how many
rows it takes, and how many columns at a time, follow from the number and the width of that processor's registers.
numba compiles it into the kernels that call it.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, registry, types
from numba.core.types import containers
from numba.extending import intrinsic

from taskgraph.errors import BackendUnavailable
from taskgraph.jit import compiled

COLUMNS = 32
"""Columns of a weight panel, on every processor: caches and packed weights lie in panels."""

FAST = {"reassoc", "contract", "arcp", "nsz"}
_AHEAD = 16384  # bytes from the words in use to those being fetched; measured best of 0 to 36864 on Zen 5


@dataclass(frozen=True, slots=True)
class Target:
    """The vector registers of a processor: how many, of how many float32; and whether it multiplies bf16 pairs."""

    registers: int
    lanes: int
    dot: bool

    @property
    def rows(self) -> int:
        """Rows of the tile: their sums fill most registers, and wider vectors need more of them to hide latency."""
        return 12 if self.lanes == 16 else 6

    def width(self, rows: int) -> int:
        """Columns that a tile of `rows` rows takes at a time: sums, words of the panel and two more fit registers."""
        wide = COLUMNS
        while wide > self.lanes and (rows + 1) * wide // self.lanes + 2 > self.registers:
            wide //= 2
        return wide


def target_of(triple: str, features: str) -> Target:
    """The registers of what an LLVM triple and feature string ("+avx2,-avx512f") name."""
    has = {name[1:] for name in features.split(",") if name.startswith("+")}
    if triple.startswith(("aarch64", "arm64")):
        return Target(32, 4, False)
    if "avx512f" in has:
        return Target(32, 16, "avx512bf16" in has)
    return Target(16, 8 if "avx" in has else 4, False)


def _compiled_for() -> tuple[str, str, str]:
    """Triple, processor and features that numba compiles for: this machine's, unless its settings say otherwise."""
    made: tuple[str, str, str] = registry.cpu_target.target_context.codegen().magic_tuple()
    return made


TRIPLE, PROCESSOR, _FEATURES = _compiled_for()
TARGET = target_of(TRIPLE, _FEATURES)
DOT = TARGET.dot
"""Whether the tile can multiply bf16 by the processor's own dot products."""

ROWS = TARGET.rows

SINGLE, PAIRS, WIDE = 0, 1, 2
"""What the tile multiplies: float32 by float32, bf16 pairs by bf16 pairs (needs DOT), float32 by bf16 pairs."""

_OPENMP_NAMES = ("libgomp", "libomp", "libiomp5")
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _link_openmp() -> ctypes.CDLL:
    """Let compiled code call the OpenMP runtime that torch has loaded, GNU's or one with its entry points.

    LLVM resolves the names when it loads a kernel. BackendUnavailable when torch has none.
    """
    mapped = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in mapped if any(name in line for name in _OPENMP_NAMES)}
    if not paths:
        raise BackendUnavailable(f"this torch {torch.__version__} has loaded no OpenMP runtime; install one from PyPI.")
    library = ctypes.CDLL(min(paths, key=lambda path: "torch" not in path))
    for name in ("GOMP_parallel", "omp_get_thread_num"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return library


OPENMP = _link_openmp()


def kernel(function: Any) -> Any:
    """Compiled at first call for each dtype, cached on disk; releases the GIL."""
    return compiled(function, fastmath=FAST, error_model="numpy")


def inlined(function: Any) -> Any:
    """A part of kernels, compiled into each that calls it."""
    return numba.njit(forceinline=True, fastmath=FAST, error_model="numpy")(function)


# -- bits, threads and the register tile, as LLVM IR --------------------------------------------------------------


@intrinsic
def as_f32(typingctx: Any, bits: Any) -> Any:  # pragma: no cover - compiled
    """The float32 of 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@intrinsic
def fork(typingctx: Any, body: Any, args: Any, threads: Any) -> Any:
    """body(*args, part, parts) on `threads` threads: outlined and given to GOMP_parallel, as a C compiler does."""
    called = body.get_call_type(typingctx, (*args.types, types.intp, types.intp), {})

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled = body.dispatcher.get_compile_result(called)
        context.active_code_library.add_linking_library(compiled.library)
        module, parts = builder.module, context.cast(builder, values[2], threads, types.intp)
        state = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, (values[1], parts)))
        address = ir.IntType(8).as_pointer()
        name = module.get_unique_name(context.mangler(f"{compiled.fndesc.llvm_func_name}.part", ()))
        outlined = ir.Function(module, ir.FunctionType(ir.VoidType(), [address]), name)
        outlined.linkage = "internal"
        inner = ir.IRBuilder(outlined.append_basic_block())
        given = inner.load(inner.bitcast(outlined.args[0], state.type))
        which = cgutils.get_or_insert_function(module, ir.FunctionType(_I32, []), "omp_get_thread_num")
        part = inner.sext(inner.call(which, []), _I64)
        row = [*cgutils.unpack_tuple(inner, inner.extract_value(given, 0)), part, inner.extract_value(given, 1)]
        context.call_internal_no_propagate(inner, compiled.fndesc, called, row)
        inner.ret_void()
        kind = ir.FunctionType(ir.VoidType(), [outlined.type, address, _I32, _I32])
        launch = cgutils.get_or_insert_function(module, kind, "GOMP_parallel")
        count = builder.trunc(parts, _I32)
        builder.call(launch, [outlined, builder.bitcast(state, address), count, ir.Constant(_I32, 0)])
        return context.get_dummy_value()

    return types.void(body, args, threads), codegen


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        single, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    )


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    pointer = builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), kind.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


@dataclass(frozen=True, slots=True)
class _Loop:
    """The loop over k of a tile of `rows` rows and `width` columns, from column `first` of the panel on."""

    rows: int
    width: int
    first: int
    mode: int
    target: Target

    @property
    def vectors(self) -> int:
        return self.width // self.target.lanes

    def floats(self) -> Any:
        return ir.VectorType(_F32, self.target.lanes)

    def words(self) -> Any:
        return ir.VectorType(_I32, self.target.lanes)

    def multiply_add(self, builder: Any, x: list[Any], w: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
        """sums + the outer product of a float32 of every row and a row of the panel."""
        lanes, kind = self.target.lanes, self.floats()
        name = f"llvm.fmuladd.v{lanes}f32"  # one instruction where there is one, a product and a sum elsewhere
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        spread = [_splat(builder, value, lanes) for value in x]
        return [[builder.call(fma, [v, p, s]) for s, p in zip(row, w, strict=True)]
                for row, v in zip(sums, spread, strict=True)]  # fmt: skip

    def step(self, builder: Any, x: list[Any], w: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """sums + one step: a k, or a pair of k. `x` are the addresses of the rows there, `w` that of the panel."""
        at = [4 * (self.first + v * self.target.lanes) for v in range(self.vectors)]
        if self.mode == SINGLE:
            panel = [_load(builder, w, offset, self.floats()) for offset in at]
            return self.multiply_add(builder, [_load(builder, row, 0, _F32) for row in x], panel, sums)
        panel = [_load(builder, w, offset, self.words()) for offset in at]
        if self.mode == PAIRS:
            kind = ir.FunctionType(self.floats(), [self.floats(), self.words(), self.words()])
            dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            spread = [_splat(builder, _load(builder, row, 0, _I32), self.target.lanes) for row in x]
            return [[builder.call(dot, [s, v, p]) for s, p in zip(row, panel, strict=True)]
                    for row, v in zip(sums, spread, strict=True)]  # fmt: skip
        shift, mask = (ir.Constant(self.words(), [bits] * self.target.lanes) for bits in (16, 0xFFFF0000))
        low = [builder.bitcast(builder.shl(words, shift), self.floats()) for words in panel]
        sums = self.multiply_add(builder, [_load(builder, row, 0, _F32) for row in x], low, sums)
        high = [builder.bitcast(builder.and_(words, mask), self.floats()) for words in panel]
        return self.multiply_add(builder, [_load(builder, row, 4, _F32) for row in x], high, sums)

    def emit(self, builder: Any, args: Any) -> None:
        """The loop, and the sums into `out`; with `more` they begin at what stands there, as if it were one loop."""
        x, x_stride, w, steps, out, out_stride, more = args
        places = [[self.place(builder, out, out_stride, r, v) for v in range(self.vectors)] for r in range(self.rows)]
        begin = [[self.started(builder, place, more) for place in row] for row in places]
        entry, loop = builder.basic_block, builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(ir.Constant(_I64, 0), entry)
        kind = self.floats()
        sums = [[builder.phi(kind) for _ in range(self.vectors)] for _ in range(self.rows)]
        x_at = builder.add(x, builder.shl(step, ir.Constant(_I64, 3 if self.mode == WIDE else 2)))
        w_at = builder.add(w, builder.shl(step, ir.Constant(_I64, 7)))
        rows = [builder.add(x_at, builder.mul(x_stride, ir.Constant(_I64, r))) for r in range(self.rows)]
        self.fetch(builder, w_at)
        new = self.step(builder, rows, w_at, sums)
        following = builder.add(step, ir.Constant(_I64, 1))
        step.add_incoming(following, loop)
        for phis, values, firsts in zip(sums, new, begin, strict=True):
            for phi, value, first in zip(phis, values, firsts, strict=True):
                phi.add_incoming(first, entry)
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        for row, values in zip(places, new, strict=True):
            for place, value in zip(row, values, strict=True):
                builder.store(value, place).align = 4

    def place(self, builder: Any, out: Any, out_stride: Any, row: int, vector: int) -> Any:
        """Where a vector of sums is kept."""
        address = builder.add(out, builder.mul(out_stride, ir.Constant(_I64, row)))
        address = builder.add(address, ir.Constant(_I64, 4 * (self.first + vector * self.target.lanes)))
        return builder.inttoptr(address, self.floats().as_pointer())

    def started(self, builder: Any, place: Any, more: Any) -> Any:
        """The first value of a vector of sums."""
        before = builder.load(place)
        before.align = 4
        return builder.select(more, before, ir.Constant(self.floats(), [0.0] * self.target.lanes))

    def fetch(self, builder: Any, w: Any) -> None:
        """Ask for the panel's words ahead: the hardware's prefetcher stops at pages, this one does not."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        hints = [ir.Constant(_I32, value) for value in (0, 3, 1)]
        for line in range(4 * self.first, 4 * (self.first + self.width), 64):
            ahead = builder.add(w, ir.Constant(_I64, _AHEAD + line))
            builder.call(prefetch, [builder.inttoptr(ahead, byte), *hints])


def emit_tile(builder: Any, mode: int, target: Target, rows: Any, args: Any) -> None:
    """The tile of every number of rows, and the switch between them."""
    end = builder.append_basic_block()
    choice = builder.switch(rows, end)
    for count in range(1, target.rows + 1):
        block = builder.append_basic_block()
        choice.add_case(ir.Constant(_I64, count), block)
        builder.position_at_end(block)
        width = target.width(count)
        for first in range(0, COLUMNS, width):
            _Loop(count, width, first, mode, target).emit(builder, args)
        builder.branch(end)
    builder.position_at_end(end)


def _tile_intrinsic(mode: int) -> Any:
    rows_at = containers.UniTuple(types.intp, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, x, w, steps, out, more = args
        x, out = cgutils.unpack_tuple(builder, x), cgutils.unpack_tuple(builder, out)
        emit_tile(builder, mode, TARGET, rows, [*x, w, steps, *out, more])
        return context.get_dummy_value()

    def typed(typingctx: Any, rows: Any, x: Any, w: Any, steps: Any, out: Any, more: Any) -> Any:
        return types.void(types.intp, rows_at, types.intp, types.intp, rows_at, types.boolean), codegen

    return intrinsic(typed)


_tile_single = _tile_intrinsic(SINGLE)
_tile_pairs = _tile_intrinsic(PAIRS if DOT else WIDE)
_tile_wide = _tile_intrinsic(WIDE)


@kernel
def tile(rows: Any, x: Any, w: Any, steps: Any, out: Any, mode: Any, more: Any = False) -> None:
    """out[r, c] = sum_k x[r, k] w[k, c] for 1..ROWS rows and COLUMNS columns, each of x, w and out by its address.

    x and out are an address and the bytes from row to row; `steps` are the words of a column of w. `mode` is SINGLE,
    PAIRS or WIDE; PAIRS only where DOT. `more` adds to what is in out."""
    source, target = (np.intp(x[0]), np.intp(x[1])), (np.intp(out[0]), np.intp(out[1]))
    if mode == SINGLE:
        _tile_single(rows, source, w, steps, target, more)
    elif mode == WIDE:
        _tile_wide(rows, source, w, steps, target, more)
    else:
        _tile_pairs(rows, source, w, steps, target, more)


@intrinsic
def unpack(typingctx: Any, words: Any, count: Any, wide: Any) -> Any:
    """Widen `count` (a multiple of COLUMNS) words of bf16 pairs in panels at address `words` into float32 at `wide`:
    a row of the low halves, then one of the high halves."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, number, target = args
        lanes = TARGET.lanes
        kind, floats = ir.VectorType(_I32, lanes), ir.VectorType(_F32, lanes)
        shift, mask = (ir.Constant(kind, [bits] * lanes) for bits in (16, 0xFFFF0000))
        with cgutils.for_range_slice(builder, number.type(0), number, number.type(COLUMNS), inc=True) as (at, _):
            row = builder.add(source, builder.shl(at, ir.Constant(_I64, 2)))
            pair = builder.add(target, builder.shl(at, ir.Constant(_I64, 3)))
            for first in range(0, COLUMNS, lanes):
                loaded = _load(builder, row, 4 * first, kind)
                for half, value in enumerate((builder.shl(loaded, shift), builder.and_(loaded, mask))):
                    offset = ir.Constant(_I64, 4 * (first + half * COLUMNS))
                    address = builder.inttoptr(builder.add(pair, offset), floats.as_pointer())
                    builder.store(builder.bitcast(value, floats), address).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


# -- elements -----------------------------------------------------------------------------------------------------


@intrinsic
def widen(typingctx: Any, x: Any) -> Any:
    """float32 of a stored element: uint16 are the bits of a bf16, int16 those of an f16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)
        return _from_half(builder, args[0]) if x == types.int16 else args[0]

    return types.float32(x), codegen


@intrinsic
def narrow(typingctx: Any, x: Any, like: Any) -> Any:
    """A float32 as an element of the array `like`; bf16 and f16 are rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like.dtype == types.int16:
            return _to_half(builder, args[0])
        if like.dtype != types.uint16:
            return args[0]
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), ir.IntType(16))

    return like.dtype(types.float32, like), codegen


def _from_half(builder: Any, half: Any) -> Any:
    """By integers and a product, since not every processor converts: 2^112 moves the exponent, subnormals' too."""
    word = builder.zext(half, _I32)
    shifted = builder.shl(builder.and_(word, ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 13))
    scaled = builder.fmul(builder.bitcast(shifted, _F32), ir.Constant(_F32, 2.0**112))
    endless = builder.icmp_unsigned(">=", shifted, ir.Constant(_I32, 0x7C00 << 13))
    infinite = builder.or_(builder.bitcast(scaled, _I32), ir.Constant(_I32, 0x7F800000))
    size = builder.select(endless, infinite, builder.bitcast(scaled, _I32))
    sign = builder.shl(builder.and_(word, ir.Constant(_I32, 0x8000)), ir.Constant(_I32, 16))
    return builder.bitcast(builder.or_(size, sign), _F32)


def _to_half(builder: Any, value: Any) -> Any:
    """By a sum with a power of two that makes the processor round at the right bit."""

    def number(bits: int) -> Any:
        return ir.Constant(_I32, bits)

    word = builder.bitcast(value, _I32)
    size = builder.and_(word, number(0x7FFFFFFF))
    scaled = builder.fmul(builder.bitcast(size, _F32), ir.Constant(_F32, 4.0))
    exponent = builder.and_(builder.shl(size, number(1)), number(0xFF000000))
    least = number(0x71000000)
    exponent = builder.select(builder.icmp_unsigned("<", exponent, least), least, exponent)
    magic = builder.add(builder.lshr(exponent, number(1)), number(0x07800000))
    rounded = builder.bitcast(builder.fadd(builder.bitcast(magic, _F32), scaled), _I32)
    high = builder.and_(builder.lshr(rounded, number(13)), number(0x7C00))
    made = builder.add(high, builder.and_(rounded, number(0x0FFF)))
    made = builder.select(builder.icmp_unsigned(">=", size, number(0x477FF000)), number(0x7C00), made)  # 65520 and on
    made = builder.select(builder.icmp_unsigned(">", size, number(0x7F800000)), number(0x7E00), made)
    sign = builder.and_(builder.lshr(word, number(16)), number(0x8000))
    return builder.trunc(builder.or_(made, sign), ir.IntType(16))


@numba.njit(inline="always")
def exp(x: Any) -> Any:
    """e^x of a float32 <= 0: 2^n times a polynomial of the fraction (Cephes expf), so that loops vectorise."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * as_f32(np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))
