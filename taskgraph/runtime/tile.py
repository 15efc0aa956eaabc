"""What the CPU kernels are made of: OpenMP regions in torch's libgomp, bf16 bits, and a register tile, as LLVM IR.

The tile is up to 12 rows by 32 columns: with AVX512-BF16 each `vdpbf16ps` multiplies 32 bf16 pairs; elsewhere
bf16 is widened by a shift. numba compiles it into the kernels that call it.
"""

import ctypes
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from taskgraph.jit import compiled

COLUMNS = 32
"""Columns of a weight panel: two 512-bit registers of float32."""

FAST = {"reassoc", "contract", "arcp", "nsz"}
_HOST = llvm.get_host_cpu_features()
DOT = bool(_HOST.get("avx512bf16"))
ROWS = 12 if _HOST.get("avx512f") else 2
_AHEAD = 16384  # bytes from the words in use to those being fetched; measured best of 0 to 36864 on Zen 5
ROW_BLOCK = 8 * ROWS  # rows of x that stay in the second-level cache while the panels pass by

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VI, _VF = ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)


def _link_openmp() -> ctypes.CDLL:
    """Let compiled code call the libgomp in this process; LLVM resolves the names when it loads a kernel."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in mapped if "libgomp" in line}
    library = ctypes.CDLL(min(paths, key=lambda path: "torch" not in path))
    for name in ("GOMP_parallel", "omp_get_thread_num"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return library


OPENMP = _link_openmp()


def kernel(function: Any) -> Any:
    """Compiled at first call for each dtype, cached on disk; releases the GIL."""
    return compiled(function, fastmath=FAST, error_model="numpy")


# -- bits, threads and the register tile, as LLVM IR --------------------------------------------------------------


@intrinsic
def _bits_to_f32(typingctx: Any, bits: Any) -> Any:  # pragma: no cover - compiled
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


def _splat(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, 16)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), ir.Constant(_VI, [0] * 16))


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    pointer = builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), kind.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


def _halves(builder: Any, pair: Any) -> tuple[Any, Any]:
    """The two bf16 of each 32-bit word as float32: low half first."""
    vector = isinstance(pair.type, ir.VectorType)
    shift, mask = (ir.Constant(pair.type, [bits] * 16 if vector else bits) for bits in (16, 0xFFFF0000))
    kind = _VF if vector else _F32
    low, high = builder.shl(pair, shift), builder.and_(pair, mask)
    return builder.bitcast(low, kind), builder.bitcast(high, kind)


def _step(builder: Any, x: list[Any], w: list[Any], sums: list[list[Any]], pairs: bool) -> list[list[Any]]:
    """sums + one 32-bit word of each row of x times one row of words of w: outer product, k or pair of k."""

    def declare(name: str, *kinds: Any) -> Any:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VF, list(kinds)), name)

    if pairs and DOT:
        dot = declare("llvm.x86.avx512bf16.dpbf16ps.512", _VF, _VI, _VI)
        spread = [_splat(builder, word) for word in x]
        return [[builder.call(dot, [s, v, p]) for s, p in zip(row, w, strict=True)]
                for row, v in zip(sums, spread, strict=True)]  # fmt: skip
    fma = declare("llvm.fma.v16f32", _VF, _VF, _VF)
    left = [_halves(builder, word) if pairs else (builder.bitcast(word, _F32),) for word in x]
    right = [_halves(builder, word) if pairs else (builder.bitcast(word, _VF),) for word in w]
    for half in range(2 if pairs else 1):
        spread = [_splat(builder, row[half]) for row in left]
        sums = [[builder.call(fma, [v, p[half], s]) for s, p in zip(row, right, strict=True)]
                for row, v in zip(sums, spread, strict=True)]  # fmt: skip
    return sums


def _tile_loop(builder: Any, rows: int, pairs: bool, args: Any) -> None:
    x, x_stride, w, steps, out, out_stride = args
    before, loop = builder.basic_block, builder.append_basic_block()
    after = builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(ir.Constant(_I64, 0), before)
    sums = [[builder.phi(_VF) for _ in range(2)] for _ in range(rows)]
    x_at = builder.add(x, builder.shl(step, ir.Constant(_I64, 2)))
    w_at = builder.add(w, builder.shl(step, ir.Constant(_I64, 7)))
    words = [
        _load(builder, builder.add(x_at, builder.mul(x_stride, ir.Constant(_I64, r))), 0, _I32) for r in range(rows)
    ]
    panel = [_load(builder, w_at, 64 * c, _VI) for c in range(2)]
    fetch = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
    for c in range(2):  # the hardware prefetcher stops at pages; this one does not
        ahead = builder.inttoptr(builder.add(w_at, ir.Constant(_I64, _AHEAD + 64 * c)), ir.IntType(8).as_pointer())
        hints = [ir.Constant(_I32, value) for value in (0, 3, 1)]
        builder.call(cgutils.get_or_insert_function(builder.module, fetch, "llvm.prefetch.p0i8"), [ahead, *hints])
    new = _step(builder, words, panel, sums, pairs)
    following = builder.add(step, ir.Constant(_I64, 1))
    step.add_incoming(following, loop)
    for phis, values in zip(sums, new, strict=True):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(ir.Constant(_VF, [0.0] * 16), before)
            phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
    builder.position_at_end(after)
    for r, values in enumerate(new):
        row = builder.add(out, builder.mul(out_stride, ir.Constant(_I64, r)))
        for c, value in enumerate(values):
            address = builder.inttoptr(builder.add(row, ir.Constant(_I64, 64 * c)), _VF.as_pointer())
            builder.store(value, address).align = 4


def _tile_codegen(pairs: bool) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, *rest = args
        end = builder.append_basic_block()
        choice = builder.switch(rows, end)
        for count in range(1, ROWS + 1):
            block = builder.append_basic_block()
            choice.add_case(ir.Constant(_I64, count), block)
            builder.position_at_end(block)
            _tile_loop(builder, count, pairs, rest)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return codegen


@intrinsic
def _tile_pairs(typingctx: Any, rows: Any, x: Any, x_stride: Any, w: Any, steps: Any, out: Any, out_stride: Any) -> Any:
    return types.void(*[types.intp] * 7), _tile_codegen(pairs=True)


@intrinsic
def _tile_single(
    typingctx: Any, rows: Any, x: Any, x_stride: Any, w: Any, steps: Any, out: Any, out_stride: Any
) -> Any:
    return types.void(*[types.intp] * 7), _tile_codegen(pairs=False)


@kernel
def tile(rows: Any, x: Any, x_stride: Any, w: Any, steps: Any, out: Any, out_stride: Any, pairs: Any) -> None:
    """out[r, c] = sum_k x[r, k] w[k, c] for 1..ROWS rows and COLUMNS columns; addresses and strides in bytes."""
    if pairs:
        _tile_pairs(rows, x, x_stride, w, steps, out, out_stride)
    else:
        _tile_single(rows, x, x_stride, w, steps, out, out_stride)


# -- elements -----------------------------------------------------------------------------------------------------


@intrinsic
def widen(typingctx: Any, x: Any) -> Any:
    """float32 of a stored element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x != types.uint16:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(x), codegen


@intrinsic
def narrow(typingctx: Any, x: Any, like: Any) -> Any:
    """A float32 as an element of the array `like`; bf16 is rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like.dtype != types.uint16:
            return args[0]
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), ir.IntType(16))

    return like.dtype(types.float32, like), codegen


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
    return p * _bits_to_f32(np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))
