"""The CPU kernels of the LLM ops: numba functions over preallocated arrays that split their work over threads.

bf16 tensors come as uint16 arrays of their bits and float32 tensors as they are; sums are float32. Every kernel
takes `threads` last and runs that many parts in one OpenMP region of the libgomp that torch has loaded: each calling
thread owns a pool there, pinned as that thread was when it first used it, and shared with its torch ops. (numba's
own parallel layers would bring a second pool that spins against torch's, or one that two lanes may not share.)

Products run on one register tile of up to 12 rows by 32 columns, written in LLVM IR: with AVX512-BF16 each
`vdpbf16ps` multiplies 32 bf16 pairs; elsewhere bf16 is widened by a shift. Weights are packed once for it.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

COLUMNS = 32
"""Columns of a weight panel: two 512-bit registers of float32."""

_FAST = {"reassoc", "contract", "arcp", "nsz"}
_HOST = llvm.get_host_cpu_features()
_DOT_BF16 = bool(_HOST.get("avx512bf16"))
ROWS = 12 if _HOST.get("avx512f") else 2
_AHEAD = 16384  # bytes from the words in use to those being fetched; measured best of 0 to 36864 on Zen 5
_ROW_BLOCK = 8 * ROWS  # rows of x that stay in the second-level cache while the panels pass by

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


_OPENMP = _link_openmp()
_set_affinity: Any = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))


def _kernel(function: Any) -> Any:
    """Compiled at first call for each dtype, cached on disk; releases the GIL."""
    return numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")(function)


# -- bits, threads and the register tile, as LLVM IR --------------------------------------------------------------


@intrinsic
def _bits_to_f32(typingctx: Any, bits: Any) -> Any:  # pragma: no cover - compiled
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@intrinsic
def _fork(typingctx: Any, body: Any, args: Any, threads: Any) -> Any:
    """body(*args, part, parts) on `threads` threads: outlined and given to GOMP_parallel, as a C compiler does."""
    called = body.get_call_type(typingctx, (*args.types, types.intp, types.intp), {})

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled = body.dispatcher.get_compile_result(called)
        context.active_code_library.add_linking_library(compiled.library)
        module, parts = builder.module, context.cast(builder, values[2], threads, types.intp)
        state = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, (values[1], parts)))
        address = ir.IntType(8).as_pointer()
        name = context.mangler(f"{compiled.fndesc.llvm_func_name}.part", ())
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

    if pairs and _DOT_BF16:
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


@_kernel
def _tile(rows: Any, x: Any, x_stride: Any, w: Any, steps: Any, out: Any, out_stride: Any, pairs: Any) -> None:
    """out[r, c] = sum_k x[r, k] w[k, c] for 1..ROWS rows and COLUMNS columns; addresses and strides in bytes."""
    if pairs:
        _tile_pairs(rows, x, x_stride, w, steps, out, out_stride)
    else:
        _tile_single(rows, x, x_stride, w, steps, out, out_stride)


# -- elements -----------------------------------------------------------------------------------------------------


@intrinsic
def _widen(typingctx: Any, x: Any) -> Any:
    """float32 of a stored element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x != types.uint16:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(x), codegen


@intrinsic
def _narrow(typingctx: Any, x: Any, like: Any) -> Any:
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
def _exp(x: Any) -> Any:
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


# -- the pool of the calling thread -------------------------------------------------------------------------------


@_kernel
def _bind(masks: Any, part: Any, parts: Any) -> None:
    _set_affinity(0, masks.strides[0], masks.ctypes.data + part * masks.strides[0])


@_kernel
def _bind_all(masks: Any) -> None:
    _fork(_bind, (masks,), len(masks))


def bind_threads(cores: Sequence[int]) -> None:
    """Make the calling thread's pool len(cores) threads, itself the first, each on its own core.

    Two threads of a pool that meet on one core spin against each other for whole time slices (8 to 24 ms an op,
    measured beside one busy process), so a lane calls this once, before its first op, in place of sched_setaffinity.
    """
    masks = np.zeros((len(cores), max(cores) // 64 + 1), np.uint64)
    for i, core in enumerate(cores):
        masks[i, core // 64] = np.uint64(1 << core % 64)
    _bind_all(masks)


def release_threads() -> None:
    """End the calling thread's pool (omp_pause_resource_all); its next parallel op starts a new one.

    libgomp stops spinning, for wakes of 20 us and more, while the pools of a process hold more threads than it has
    cores. So a thread that ran parallel ops and will wait for lanes calls this first, and so does a lane at its end.
    """
    _OPENMP.omp_pause_resource_all(1)


# -- products -----------------------------------------------------------------------------------------------------


def pack_weight(w: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Panels of a weight (n, k): (n / 32, k, 32) float32, or for bf16 (n / 32, k / 2, 32) uint32 of two k each.

    n is padded with zeros to whole panels; a bf16 weight needs an even k.
    """
    n, k = w.shape
    if w.dtype == np.uint16 and k % 2:
        raise ValueError(f"a bf16 weight needs an even inner size; got {k}. Use float32.")
    words = np.ascontiguousarray(w).view(np.uint32 if w.dtype == np.uint16 else np.float32)
    panels = -(-n // COLUMNS)
    packed = torch.zeros(panels, words.shape[1], COLUMNS, dtype=torch.float32).numpy().view(words.dtype)
    whole = n // COLUMNS
    packed[:whole] = words[: whole * COLUMNS].reshape(whole, COLUMNS, words.shape[1]).transpose(0, 2, 1)
    if whole < panels:
        packed[whole, :, : n - whole * COLUMNS] = words[whole * COLUMNS :].T
    return packed


@_kernel
def _gemm(x: Any, packed: Any, bias: Any, residual: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    panels, steps, _ = packed.shape
    first, last = panels * part // parts, panels * (part + 1) // parts
    pairs = x.itemsize == 2
    sums = np.empty((ROWS, COLUMNS), np.float32)
    for block in range(0, m, _ROW_BLOCK):
        end = min(block + _ROW_BLOCK, m)
        for panel in range(first, last):
            column = panel * COLUMNS
            width = min(COLUMNS, n - column)
            w = packed.ctypes.data + panel * packed.strides[0]
            for top in range(block, end, ROWS):
                rows = min(ROWS, end - top)
                _tile(rows, x.ctypes.data + top * x.strides[0], x.strides[0], w, steps, sums.ctypes.data, 128, pairs)
                for r in range(rows):
                    if bias.size > 0:
                        for c in range(width):
                            sums[r, c] += _widen(bias[column + c])
                    if residual.size > 0:
                        for c in range(width):
                            sums[r, c] += _widen(residual[top + r, column + c])
                    if width == COLUMNS:
                        for c in range(COLUMNS):
                            out[top + r, column + c] = _narrow(sums[r, c], out)
                    else:
                        for c in range(width):
                            out[top + r, column + c] = _narrow(sums[r, c], out)


@_kernel
def gemm(x: Any, packed: Any, bias: Any, residual: Any, out: Any, threads: Any = 1) -> None:
    """out = x w^T + bias + residual; x (m, k), packed from `pack_weight` of w (n, k), out (m, n).

    bias (n,) and residual (m, n) may be empty arrays, (0,) and (0, 0), for none. All of one dtype.
    Threads take columns, so each byte of the weight is read by one core.
    """
    _fork(_gemm, (x, packed, bias, residual, out), threads)


# -- elementwise and row kernels ----------------------------------------------------------------------------------


@_kernel
def _rmsnorm(x: Any, residual: Any, weight: Any, total: Any, out: Any, eps: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        square = np.float32(0.0)
        if residual.size > 0:
            for j in range(n):
                total[i, j] = _narrow(_widen(x[i, j]) + _widen(residual[i, j]), total)
            row = total[i]
        else:
            row = x[i]
        for j in range(n):
            value = _widen(row[j])
            square += value * value
        scale = np.float32(1.0) / np.sqrt(square / np.float32(n) + np.float32(eps))
        for j in range(n):
            out[i, j] = _narrow(_widen(row[j]) * scale * _widen(weight[j]), out)


@_kernel
def rmsnorm(x: Any, weight: Any, out: Any, eps: Any, threads: Any = 1) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); x and out (m, n), weight (n,), one dtype."""
    _fork(_rmsnorm, (x, x[:0], weight, x[:0], out, eps), threads)


@_kernel
def add_rmsnorm(x: Any, residual: Any, weight: Any, total: Any, out: Any, eps: Any, threads: Any = 1) -> None:
    """total = x + residual (rounded to the dtype), out = rmsnorm(total); all (m, n), weight (n,), one dtype."""
    _fork(_rmsnorm, (x, residual, weight, total, out, eps), threads)


@_kernel
def _swiglu(x: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    one = np.float32(1.0)
    for i in range(m * part // parts, m * (part + 1) // parts):
        gate, up, row = x[i, :n], x[i, n:], out[i]
        for j in range(n):
            value = _widen(gate[j])
            small = _exp(-abs(value))
            share = (one if value >= np.float32(0.0) else small) / (one + small)
            row[j] = _narrow(value * share * _widen(up[j]), out)


@_kernel
def swiglu(x: Any, out: Any, threads: Any = 1) -> None:
    """out = silu(gate) * up (Shazeer 2020); x (m, 2 n) holds gate then up, out (m, n), one dtype."""
    _fork(_swiglu, (x, out), threads)


@_kernel
def _add(x: Any, y: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = out.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        for j in range(n):
            out[i, j] = _narrow(_widen(x[i, j]) + _widen(y[i, j]), out)


@_kernel
def add(x: Any, y: Any, out: Any, threads: Any = 1) -> None:
    """out = x + y, each (m, n) of one dtype."""
    _fork(_add, (x, y, out), threads)


@_kernel
def embedding(tokens: Any, table: Any, out: Any) -> None:
    """out[i] = table[tokens[i]]; tokens (m,) int64, table (vocabulary, n) and out (m, n) of one dtype.

    ValueError when a token is not in the vocabulary.
    """
    for i in range(len(tokens)):
        if tokens[i] < 0 or tokens[i] >= len(table):
            raise ValueError("a token is outside the vocabulary")
        for j in range(out.shape[1]):
            out[i, j] = table[tokens[i], j]


@_kernel
def _argmax(x: Any, out: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    for i in range(m * part // parts, m * (part + 1) // parts):
        row = x[i]
        top, at = np.float32(-np.inf), 0
        for start in range(0, n, 1024):
            stop = min(start + 1024, n)
            best = np.float32(-np.inf)
            for j in range(start, stop):
                best = max(best, _widen(row[j]))
            if best > top:
                top, at = best, start
        while at < n - 1 and _widen(row[at]) != top:
            at += 1
        out[i] = at


@_kernel
def argmax(x: Any, out: Any, threads: Any = 1) -> None:
    """out[i] = the first index of the largest of x[i]; x (m, n), out (m,) int64. NaN is not supported."""
    _fork(_argmax, (x, out), threads)


# -- attention ----------------------------------------------------------------------------------------------------


@_kernel
def _rope_kv(
    qkv: Any,
    positions: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    out: Any,
    part: Any,
    parts: Any,
) -> None:
    tokens, heads, dim = out.shape
    batch, kv_heads, _, _ = keys.shape
    each, half = tokens // batch, dim // 2
    head = np.empty(dim, np.float32)
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        b = token // each
        at = positions[b] + token % each
        turn_cos, turn_sin = cos[at], sin[at]
        for h in range(heads + kv_heads):
            norm = q_norm if h < heads else k_norm
            source = qkv[token, h * dim : (h + 1) * dim]
            for j in range(dim):
                head[j] = _widen(source[j])
            if len(norm) > 0:
                total = np.float32(0.0)
                for j in range(dim):
                    total += head[j] * head[j]
                scale = np.float32(1.0) / np.sqrt(total / np.float32(dim) + np.float32(eps))
                for j in range(dim):
                    head[j] = head[j] * scale * norm[j]
            target = out[token, h] if h < heads else keys[b, h - heads, at]
            low, high = target[:half], target[half:]
            for j in range(half):
                low[j] = _narrow(head[j] * turn_cos[j] - head[j + half] * turn_sin[j], out)
                high[j] = _narrow(head[j + half] * turn_cos[j] + head[j] * turn_sin[j], out)
        for h in range(kv_heads):
            values[b, h, at] = qkv[token, (heads + kv_heads + h) * dim : (heads + kv_heads + h + 1) * dim]


@_kernel
def rope_kv(
    qkv: Any,
    positions: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    out: Any,
    threads: Any = 1,
) -> None:
    """Split qkv (b*t, (h + 2 kv) * d); rotate q into out (b*t, h, d) and k into keys, copy v into values.

    keys and values are (b, kv, len, d), written at positions[b] + j; positions (b,) int64 counts the tokens already
    there; cos and sin (len, d / 2) float32; q_norm and k_norm (d,) float32, empty for none. RoFormer (Su et al.
    2021), halves as in Llama. ValueError when a position is outside the cache.
    """
    each = len(out) // len(keys)
    for b in range(len(keys)):
        if positions[b] < 0 or positions[b] + each > keys.shape[2]:
            raise ValueError("a position is outside the KV cache; make the cache longer or stop earlier")
    _fork(_rope_kv, (qkv, positions, keys, values, cos, sin, q_norm, k_norm, eps, out), threads)


@_kernel
def _softmax(scores: Any, seen: Any) -> None:
    """exp(scores - max) over the first `seen`, divided by their sum, in place."""
    top = np.float32(-np.inf)
    for i in range(seen):
        top = max(top, scores[i])
    total = np.float32(0.0)
    for i in range(seen):
        scores[i] = _exp(scores[i] - top)
        total += scores[i]
    scale = np.float32(1.0) / total
    for i in range(seen):
        scores[i] *= scale


@numba.njit(forceinline=True, fastmath=_FAST, error_model="numpy")
def _attend(query: Any, k: Any, v: Any, scores: Any, mixed: Any, seen: Any, dim: Any) -> None:
    """mixed = softmax(query k^T) v over the first `seen` rows; inlined, so that a constant `dim` unrolls."""
    for i in range(seen):
        dot, row = np.float32(0.0), k[i]
        for j in range(dim):
            dot += query[j] * _widen(row[j])
        scores[i] = dot
    _softmax(scores, seen)
    for j in range(dim):
        mixed[j] = np.float32(0.0)
    for i in range(seen):
        share, row = scores[i], v[i]
        for j in range(dim):
            mixed[j] += share * _widen(row[j])


@_kernel
def _decode(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, part: Any, parts: Any) -> None:
    batch, heads, dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    scores = scratch[part * length : (part + 1) * length]
    query, mixed = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for task in range(batch * heads * part // parts, batch * heads * (part + 1) // parts):
        b, h = task // heads, task % heads
        k, v, seen = keys[b, h // group], values[b, h // group], positions[b] + 1
        for j in range(dim):
            query[j] = _widen(q[b, h, j]) / np.sqrt(np.float32(dim))
        if dim == 64:
            _attend(query, k, v, scores, mixed, seen, 64)
        elif dim == 128:
            _attend(query, k, v, scores, mixed, seen, 128)
        else:
            _attend(query, k, v, scores, mixed, seen, dim)
        for j in range(dim):
            out[b, h * dim + j] = _narrow(mixed[j], out)


@_kernel
def decode_attention(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, threads: Any = 1) -> None:
    """One query token a sequence: q (b, h, d) over keys, values (b, kv, len, d) up to positions[b] -> out (b, h * d).

    scratch is float32 of at least threads * len. Threads take (sequence, head) pairs.
    """
    _fork(_decode, (q, positions, keys, values, out, scratch), threads)


def prefill_scratch_size(length: int, dim: int, threads: int) -> int:
    """float32 elements that `prefill_attention` needs as scratch: packed keys and values, scores and weights."""
    length, dim = -(-length // COLUMNS) * COLUMNS, -(-dim // COLUMNS) * COLUMNS
    return threads * (2 * length * dim + 2 * ROWS * length + ROWS * dim)


@_kernel
def _pack_cache(k: Any, v: Any, seen: Any, panels: Any, panels_v: Any) -> None:
    """The first `seen` keys as the weight of q k^T and values as the weight of p v, in the panels of `pack_weight`."""
    dim = k.shape[1]
    words = k.view(panels.dtype)
    for i in range(seen):
        panel, column = i // COLUMNS, i % COLUMNS
        for s in range(words.shape[1]):
            panels[panel, s, column] = words[i, s]
    if k.itemsize == 2:
        for i in range(0, seen, 2):
            for j in range(dim):
                high = np.uint32(v[i + 1, j]) << np.uint32(16) if i + 1 < seen else np.uint32(0)
                panels_v[j // COLUMNS, i // 2, j % COLUMNS] = np.uint32(v[i, j]) | high
    else:
        for i in range(seen):
            for j in range(dim):
                panels_v[j // COLUMNS, i, j % COLUMNS] = v.view(panels.dtype)[i, j]


@_kernel
def _prefill(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, part: Any, parts: Any) -> None:
    tokens, heads, dim = q.shape
    batch, kv_heads, length, _ = keys.shape
    group, each, pack = heads // kv_heads, tokens // batch, 4 // q.itemsize
    wide, deep = (length + COLUMNS - 1) // COLUMNS, (dim + COLUMNS - 1) // COLUMNS
    mine = scratch[len(scratch) // parts * part : len(scratch) // parts * (part + 1)].view(np.uint32)
    cut, cut_v = wide * COLUMNS * dim // pack, deep * COLUMNS * (wide * COLUMNS // pack)
    k_panels = mine[:cut].reshape(wide, dim // pack, COLUMNS)
    v_panels = mine[cut : cut + cut_v].reshape(deep, wide * COLUMNS // pack, COLUMNS)
    rest = mine[cut + cut_v :].view(np.float32)
    scores = rest[: ROWS * wide * COLUMNS].reshape(ROWS, wide * COLUMNS)
    rest = rest[ROWS * wide * COLUMNS :]
    mixed = rest[: ROWS * deep * COLUMNS].reshape(ROWS, deep * COLUMNS)
    shares = rest[ROWS * deep * COLUMNS :].view(q.dtype)[: ROWS * wide * COLUMNS].reshape(ROWS, wide * COLUMNS)
    scale, pairs = np.float32(1.0) / np.sqrt(np.float32(dim)), q.itemsize == 2
    blocks = (each + ROWS - 1) // ROWS
    total, packed = batch * heads * blocks, -1
    for task in range(total * part // parts, total * (part + 1) // parts):
        head, top = task // blocks, task % blocks * ROWS
        b, h = head // heads, head % heads
        if packed != b * kv_heads + h // group:
            packed = b * kv_heads + h // group
            _pack_cache(keys[b, h // group], values[b, h // group], positions[b] + each, k_panels, v_panels)
        rows, token = min(ROWS, each - top), b * each + top
        seen = positions[b] + top + rows
        for panel in range((seen + COLUMNS - 1) // COLUMNS):
            _tile(
                rows, q.ctypes.data + token * q.strides[0] + h * q.strides[1], q.strides[0],
                k_panels.ctypes.data + panel * k_panels.strides[0], dim // pack,
                scores.ctypes.data + panel * 128, scores.strides[0], pairs,
            )  # fmt: skip
        padded = (seen + pack - 1) // pack * pack
        for r in range(rows):
            row, share, visible = scores[r], shares[r], positions[b] + top + r + 1
            for i in range(visible):
                row[i] *= scale
            _softmax(row, visible)
            for i in range(visible):
                share[i] = _narrow(row[i], out)
            for i in range(visible, padded):
                share[i] = _narrow(np.float32(0.0), out)
        for panel in range(deep):
            _tile(
                rows, shares.ctypes.data, shares.strides[0], v_panels.ctypes.data + panel * v_panels.strides[0],
                padded // pack, mixed.ctypes.data + panel * 128, mixed.strides[0], pairs,
            )  # fmt: skip
        for r in range(rows):
            for j in range(dim):
                out[token + r, h * dim + j] = _narrow(mixed[r, j], out)


@_kernel
def prefill_attention(q: Any, positions: Any, keys: Any, values: Any, out: Any, scratch: Any, threads: Any = 1) -> None:
    """Causal attention of t tokens a sequence: q (b*t, h, d), token j of b sees keys up to positions[b] + j.

    keys and values (b, kv, len, d) with even d, out (b*t, h * d); scratch float32 of `prefill_scratch_size` elements.
    Threads take blocks of queries; each packs the keys and values of its heads for the product tile.
    """
    _fork(_prefill, (q, positions, keys, values, out, scratch), threads)
