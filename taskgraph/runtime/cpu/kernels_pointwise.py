"""The CPU kernel of pointwise formulas: an interpreter whose steps are loops over a tile that stays in the cache.

A tile of every operand is widened to float32 into a register, which is a row of `TILE` numbers; each step makes one row
of others; the last is rounded into the output. So a formula costs one pass over memory, however long it is, and its
steps are compiled, and vectorised, once for all formulas.
"""

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import cgutils, types
from numba.extending import intrinsic

from taskgraph.jit import compiled
from taskgraph.runtime.cpu.tile import as_f32, fork, narrow, widen
from taskgraph.runtime.program import CODES, MOST_AXES, TYPES

TILE = 1024
_SHORT = 16
"""Runs along the last axis up to which several are taken together."""

_F32, _BF16, _F16, _BOOL, _I32, _I64 = (TYPES[name] for name in ("f32", "bf16", "f16", "bool", "i32", "i64"))
COPY, ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, POW = (
    CODES[name] for name in ("copy", "add", "sub", "mul", "div", "maximum", "minimum", "pow")
)
NEG, ABS, EXP, EXPM1, LOG, LOG1P, SQRT, RSQRT = (
    CODES[name] for name in ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt")
)
SIN, COS, TANH, SIGMOID, ERF, RELU, SILU, GELU, GELU_TANH = (
    CODES[name] for name in ("sin", "cos", "tanh", "sigmoid", "erf", "relu", "silu", "gelu", "gelu_tanh")
)
FLOOR, CEIL, ROUND, TRUNC = (CODES[name] for name in ("floor", "ceil", "round", "trunc"))
EQ, NE, LT, LE, GT, GE = (CODES[name] for name in ("eq", "ne", "lt", "le", "gt", "ge"))
AND, OR, NOT, WHERE, BF16, F16, LOAD = (CODES[name] for name in ("and", "or", "not", "where", "bf16", "f16", "load"))


def kernel(function: Any) -> Any:
    """Compiled without the freedoms of fast arithmetic: a formula gives the same numbers whole and in parts."""
    return compiled(function, error_model="numpy")


def element(function: Any) -> Any:
    """A function of one element, compiled into the loops."""
    return numba.njit(inline="always", error_model="numpy")(function)


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def _round(typingctx: Any, x: Any) -> Any:
    """The nearest integer, of two the even one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.f32"), args)

    return types.float32(types.float32), codegen


# -- functions of one element --------------------------------------------------------------------------------------


@element
def _exp(x: Any) -> Any:
    """e^x, of a float32: 2^n times a polynomial of the fraction (Cephes expf); 2^n in two factors, for its ends."""
    y = min(max(x, np.float32(-104.0)), np.float32(89.0))
    n = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
    r = y - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    whole = np.int32(n)
    half = whole >> np.int32(1)
    one = as_f32(np.uint32(np.uint32(half + np.int32(127)) << np.uint32(23)))
    two = as_f32(np.uint32(np.uint32(whole - half + np.int32(127)) << np.uint32(23)))
    made = p * one * two
    return made if x == x else x


@element
def _tanh(x: Any) -> Any:
    """By a polynomial near 0 and by e^2x elsewhere (Cephes tanhf)."""
    size = abs(x)
    square = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * square + np.float32(2.06390887954e-2)
    p = p * square + np.float32(-5.37397155531e-2)
    p = p * square + np.float32(1.33314422036e-1)
    p = p * square + np.float32(-3.33332819422e-1)
    near = p * square * x + x
    far = np.float32(1.0) - np.float32(2.0) / (_exp(size + size) + np.float32(1.0))
    far = far if x > np.float32(0.0) else -far
    made = near if size < np.float32(0.625) else far
    return made if x == x else x


@element
def _erf(x: Any) -> Any:
    """By a rational function (Eigen's generic_fast_erf_float): an odd polynomial over an even one on [-4, 4]."""
    y = min(max(x, np.float32(-4.0)), np.float32(4.0))
    s = y * y
    p = np.float32(-2.72614225801306e-10)
    p = p * s + np.float32(2.77068142495902e-08)
    p = p * s + np.float32(-2.10102402082508e-06)
    p = p * s + np.float32(-5.69250639462346e-05)
    p = p * s + np.float32(-7.34990630326855e-04)
    p = p * s + np.float32(-2.95459980854025e-03)
    p = p * s + np.float32(-1.60960333262415e-02)
    q = np.float32(-1.45660718464996e-05)
    q = q * s + np.float32(-2.13374055278905e-04)
    q = q * s + np.float32(-1.68282697438203e-03)
    q = q * s + np.float32(-7.37332916720468e-03)
    q = q * s + np.float32(-1.42647390514189e-02)
    made = min(max(y * p / q, np.float32(-1.0)), np.float32(1.0))
    return made if x == x else x


@element
def _sigmoid(x: Any) -> Any:
    small = _exp(-abs(x))
    return (np.float32(1.0) if x >= np.float32(0.0) else small) / (np.float32(1.0) + small)


@element
def _larger(a: Any, b: Any) -> Any:
    """A NaN if one of them is one."""
    return a if a > b or a != a else b


@element
def _smaller(a: Any, b: Any) -> Any:
    return a if a < b or a != a else b


@element
def _brain(x: Any, like: Any) -> Any:
    """The bits of a bf16; a NaN stays one, whatever its lower bits."""
    return narrow(x, like) if x == x else np.uint16(0x7FC0)


@element
def _truth(x: Any) -> Any:
    return np.float32(1.0) if x else np.float32(0.0)


# -- operands ------------------------------------------------------------------------------------------------------


@kernel
def _fill(row: Any, source: Any, step: Any) -> None:
    """row[i] = source[i * step]."""
    if step == 1:
        for i in range(len(row)):
            row[i] = widen(source[i])
    elif step == 0:
        value = widen(source[0])
        for i in range(len(row)):
            row[i] = value
    else:
        for i in range(len(row)):
            row[i] = widen(source[i * step])


@kernel
def _fill_runs(row: Any, source: Any, size: Any, step: Any, jump: Any) -> None:
    """row[j * size + i] = source[i * step + j * jump]: runs of a few elements, taken across."""
    runs = len(row) // size
    for i in range(size):
        first = i * step
        for j in range(runs):
            row[j * size + i] = widen(source[first + j * jump])


@kernel
def _fill_whole(row: Any, source: Any, step: Any) -> None:
    """As `_fill`, of integers."""
    for i in range(len(row)):
        row[i] = np.float32(source[i * step])


@kernel
def _load(row: Any, address: Any, operand: Any, start: Any) -> None:
    """row[i] = element start + i of the output, as the operand has it: along its last axis in one go."""
    kind, axes = operand[0], operand[1]
    size, step = operand[2], operand[2 + MOST_AXES]
    done = 0
    while done < len(row):
        at = start + done
        inner = at % size
        rest, first = at // size, inner * step
        for axis in range(1, axes):
            first += rest % operand[2 + axis] * operand[2 + MOST_AXES + axis]
            rest //= operand[2 + axis]
        count = min(size - inner, len(row) - done)
        runs = (len(row) - done) // size if axes > 1 and size <= _SHORT and inner == 0 and kind == _F32 else 0
        if runs > 1:
            runs = min(operand[3] - at // size % operand[3], runs)
            jump, count = operand[3 + MOST_AXES], runs * size
            span = (size - 1) * step + (runs - 1) * jump + 1
            source = carray(_pointer(address + 4 * first), (span,), np.float32)
            _fill_runs(row[done : done + count], source, size, step, jump)
            done += count
            continue
        part, span = row[done : done + count], (count - 1) * step + 1
        if kind == _F32:
            _fill(part, carray(_pointer(address + 4 * first), (span,), np.float32), step)
        elif kind == _BF16:
            _fill(part, carray(_pointer(address + 2 * first), (span,), np.uint16), step)
        elif kind == _F16:
            _fill(part, carray(_pointer(address + 2 * first), (span,), np.int16), step)
        elif kind == _BOOL:
            _fill_whole(part, carray(_pointer(address + first), (span,), np.uint8), step)
        elif kind == _I32:
            _fill_whole(part, carray(_pointer(address + 4 * first), (span,), np.int32), step)
        else:
            _fill_whole(part, carray(_pointer(address + 8 * first), (span,), np.int64), step)
        done += count


@kernel
def _narrowed(row: Any, made: Any) -> None:
    """made[i] = row[i], rounded to its type."""
    for i in range(len(made)):
        made[i] = narrow(row[i], made)


@kernel
def _store(row: Any, address: Any, kind: Any, start: Any) -> None:
    """Element start + i of the output from row[i]."""
    n = len(row)
    if kind == _F32:
        _narrowed(row, carray(_pointer(address + 4 * start), (n,), np.float32))
    elif kind == _BF16:
        brain = carray(_pointer(address + 2 * start), (n,), np.uint16)
        for i in range(n):
            brain[i] = _brain(row[i], brain)
    elif kind == _F16:
        _narrowed(row, carray(_pointer(address + 2 * start), (n,), np.int16))
    else:
        truth = carray(_pointer(address + start), (n,), np.uint8)
        for i in range(n):
            truth[i] = np.uint8(row[i] != np.float32(0.0))


# -- steps ---------------------------------------------------------------------------------------------------------


@kernel
def _rounded(code: Any, a: Any, out: Any, halves: Any, brains: Any) -> None:
    """out = a rounded as `code` says, to a whole number or to a narrower type."""
    n, zero = len(out), np.float32(0.0)
    if code == FLOOR:
        for i in range(n):
            out[i] = np.floor(a[i])
    elif code == CEIL:
        for i in range(n):
            out[i] = np.ceil(a[i])
    elif code == ROUND:
        for i in range(n):
            out[i] = _round(a[i])
    elif code == TRUNC:
        for i in range(n):
            out[i] = np.ceil(a[i]) if a[i] < zero else np.floor(a[i])
    elif code == BF16:
        for i in range(n):
            out[i] = widen(_brain(a[i], brains))
    elif code == F16:
        for i in range(n):
            out[i] = widen(narrow(a[i], halves))


@kernel
def _one(code: Any, a: Any, out: Any, halves: Any, brains: Any) -> None:
    """out = code(a): the operations of one argument. `halves` and `brains` are empty, for their types."""
    n = len(out)
    zero, one, half = np.float32(0.0), np.float32(1.0), np.float32(0.5)
    if code == COPY:
        for i in range(n):
            out[i] = a[i]
    elif code == NEG:
        for i in range(n):
            out[i] = -a[i]
    elif code == ABS:
        for i in range(n):
            out[i] = abs(a[i])
    elif code == EXP:
        for i in range(n):
            out[i] = _exp(a[i])
    elif code == EXPM1:
        for i in range(n):
            out[i] = math.expm1(a[i])
    elif code == LOG:
        for i in range(n):
            out[i] = math.log(a[i])
    elif code == LOG1P:
        for i in range(n):
            out[i] = math.log1p(a[i])
    elif code == SQRT:
        for i in range(n):
            out[i] = np.sqrt(a[i])
    elif code == RSQRT:
        for i in range(n):
            out[i] = one / np.sqrt(a[i])
    elif code == SIN:
        for i in range(n):
            out[i] = math.sin(a[i])
    elif code == COS:
        for i in range(n):
            out[i] = math.cos(a[i])
    elif code == TANH:
        for i in range(n):
            out[i] = _tanh(a[i])
    elif code == SIGMOID:
        for i in range(n):
            out[i] = _sigmoid(a[i])
    elif code == ERF:
        for i in range(n):
            out[i] = _erf(a[i])
    elif code == RELU:
        for i in range(n):
            out[i] = _larger(a[i], zero)
    elif code == SILU:
        for i in range(n):
            out[i] = a[i] * _sigmoid(a[i])
    elif code == GELU:
        for i in range(n):
            out[i] = half * a[i] * (one + _erf(a[i] * np.float32(0.70710678118654752)))
    elif code == GELU_TANH:
        for i in range(n):
            inner = np.float32(0.79788456080286536) * (a[i] + np.float32(0.044715) * a[i] * a[i] * a[i])
            out[i] = half * a[i] * (one + _tanh(inner))
    elif code == NOT:
        for i in range(n):
            out[i] = _truth(a[i] == zero)
    else:
        _rounded(code, a, out, halves, brains)


@kernel
def _two(code: Any, a: Any, b: Any, out: Any) -> None:
    """out = code(a, b): the operations of two arguments."""
    n = len(out)
    zero = np.float32(0.0)
    if code == ADD:
        for i in range(n):
            out[i] = a[i] + b[i]
    elif code == SUB:
        for i in range(n):
            out[i] = a[i] - b[i]
    elif code == MUL:
        for i in range(n):
            out[i] = a[i] * b[i]
    elif code == DIV:
        for i in range(n):
            out[i] = a[i] / b[i]
    elif code == MAXIMUM:
        for i in range(n):
            out[i] = _larger(a[i], b[i])
    elif code == MINIMUM:
        for i in range(n):
            out[i] = _smaller(a[i], b[i])
    elif code == POW:
        for i in range(n):
            out[i] = math.pow(a[i], b[i])
    elif code == EQ:
        for i in range(n):
            out[i] = _truth(a[i] == b[i])
    elif code == NE:
        for i in range(n):
            out[i] = _truth(a[i] != b[i])
    elif code == LT:
        for i in range(n):
            out[i] = _truth(a[i] < b[i])
    elif code == LE:
        for i in range(n):
            out[i] = _truth(a[i] <= b[i])
    elif code == GT:
        for i in range(n):
            out[i] = _truth(a[i] > b[i])
    elif code == GE:
        for i in range(n):
            out[i] = _truth(a[i] >= b[i])
    elif code == AND:
        for i in range(n):
            out[i] = _truth(a[i] != zero and b[i] != zero)
    elif code == OR:
        for i in range(n):
            out[i] = _truth(a[i] != zero or b[i] != zero)


@kernel
def _where(a: Any, b: Any, c: Any, out: Any) -> None:
    zero = np.float32(0.0)
    for i in range(len(out)):
        one, other = b[i], c[i]
        out[i] = one if a[i] != zero else other


@kernel
def _pointwise(steps: Any, numbers: Any, operands: Any, addresses: Any, total: Any, part: Any, parts: Any) -> None:
    most = 0
    for s in range(len(steps)):
        most = max(most, steps[s, 1] + 1)
    rows = np.empty((most + len(numbers), TILE), np.float32)
    brains, halves = np.empty(0, np.uint16), np.empty(0, np.int16)
    for i in range(len(numbers)):
        rows[most + i, :] = numbers[i]
    tiles = (total + TILE - 1) // TILE
    last = len(addresses) - 1
    for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
        start = tile * TILE
        n = min(TILE, total - start)
        for s in range(len(steps)):
            code = steps[s, 0]
            out = rows[steps[s, 1], :n]
            if code == LOAD:
                _load(out, addresses[steps[s, 2]], operands[steps[s, 2]], start)
                continue
            a = rows[steps[s, 2] if steps[s, 2] >= 0 else most - 1 - steps[s, 2], :n]
            b = rows[steps[s, 3] if steps[s, 3] >= 0 else most - 1 - steps[s, 3], :n]
            if code == WHERE:
                c = rows[steps[s, 4] if steps[s, 4] >= 0 else most - 1 - steps[s, 4], :n]
                _where(a, b, c, out)
            else:
                _one(code, a, out, halves, brains)
                _two(code, a, b, out)
        _store(rows[steps[len(steps) - 1, 1], :n], addresses[last], operands[last, 0], start)


@kernel
def pointwise(steps: Any, numbers: Any, operands: Any, addresses: Any, total: Any, threads: Any = 1) -> None:
    """Run the steps (n, 5) on every of `total` elements; `numbers` float32, as `runtime.program` makes them. `operands`
    (k + 1, 2 + 2 axes) and `addresses` (k + 1,) int64 are those of the k inputs, and of the dense output last."""
    fork(_pointwise, (steps, numbers, operands, addresses, total), threads)
