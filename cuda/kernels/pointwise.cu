// Pointwise formulas: an interpreter of the steps that taskgraph/runtime/program.py writes, with the same codes.
#include "common.cuh"

using Index = long long;

namespace {

enum Code {
    COPY, ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, POW, NEG, ABS, EXP, EXPM1, LOG, LOG1P, SQRT, RSQRT, SIN, COS, TANH,
    SIGMOID, ERF, RELU, SILU, GELU, GELU_TANH, FLOOR, CEIL, ROUND, TRUNC, EQ, NE, LT, LE, GT, GE, AND, OR, NOT, WHERE,
    TO_BF16, TO_F16, LOAD
};  // in the order of OPERATIONS in taskgraph/ops/formula.py
enum Type { F32, BF16, F16, BOOL, I32, I64 };

constexpr int WORDS = 5, MOST_AXES = 6, MOST_INPUTS = 8, REGISTERS = 8, EACH = 4;

struct Operands {
    const void* at[MOST_INPUTS];
};

template <class T>
struct Elements {  // those of one thread: EACH of them, which lie a block's threads apart
    T of[EACH];
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float half_of(float x) {  // rounded to 11 bits and the range of f16, ties to even
    unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return x;
    if (size >= 0x477ff000u) return __uint_as_float((bits & 0x80000000u) | 0x7f800000u);
    if (size < 0x38800000u) {  // below 2^-14: multiples of 2^-24
        float magic = __uint_as_float(0x3f000000u), sum = __uint_as_float(size) + magic;
        return __uint_as_float((bits & 0x80000000u) | __float_as_uint(sum - magic));
    }
    unsigned rounded = size + 0xfffu + ((size >> 13) & 1u);
    return __uint_as_float((bits & 0x80000000u) | (rounded & 0xffffe000u));
}

__device__ __forceinline__ float applied(int code, float a, float b, float c) {
    switch (code) {
        case COPY: return a;
        case ADD: return a + b;
        case SUB: return a - b;
        case MUL: return a * b;
        case DIV: return a / b;
        case MAXIMUM: return a > b || a != a ? a : b;
        case MINIMUM: return a < b || a != a ? a : b;
        case POW: return powf(a, b);
        case NEG: return -a;
        case ABS: return fabsf(a);
        case EXP: return expf(a);
        case EXPM1: return expm1f(a);
        case LOG: return logf(a);
        case LOG1P: return log1pf(a);
        case SQRT: return sqrtf(a);
        case RSQRT: return 1.0f / sqrtf(a);
        case SIN: return sinf(a);
        case COS: return cosf(a);
        case TANH: return tanhf(a);
        case SIGMOID: return sigmoid(a);
        case ERF: return erff(a);
        case RELU: return a > 0.0f || a != a ? a : 0.0f;
        case SILU: return a * sigmoid(a);
        case GELU: return 0.5f * a * (1.0f + erff(a * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * a * (1.0f + tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a)));
        case FLOOR: return floorf(a);
        case CEIL: return ceilf(a);
        case ROUND: return rintf(a);
        case TRUNC: return truncf(a);
        case EQ: return a == b ? 1.0f : 0.0f;
        case NE: return a != b ? 1.0f : 0.0f;
        case LT: return a < b ? 1.0f : 0.0f;
        case LE: return a <= b ? 1.0f : 0.0f;
        case GT: return a > b ? 1.0f : 0.0f;
        case GE: return a >= b ? 1.0f : 0.0f;
        case AND: return a != 0.0f && b != 0.0f ? 1.0f : 0.0f;
        case OR: return a != 0.0f || b != 0.0f ? 1.0f : 0.0f;
        case NOT: return a == 0.0f ? 1.0f : 0.0f;
        case WHERE: return a != 0.0f ? b : c;
        case TO_BF16: return widen(narrow<bf16>(a));
        default: return half_of(a);
    }
}

__device__ __forceinline__ Index applied(int code, Index a, Index b, Index c) {
    switch (code) {
        case COPY: return a;
        case ADD: return a + b;
        case SUB: return a - b;
        case MUL: return a * b;
        case MAXIMUM: return a > b ? a : b;
        case MINIMUM: return a < b ? a : b;
        case NEG: return -a;
        case ABS: return a < 0 ? -a : a;
        case RELU: return a > 0 ? a : 0;
        case EQ: return a == b;
        case NE: return a != b;
        case LT: return a < b;
        case LE: return a <= b;
        case GT: return a > b;
        case GE: return a >= b;
        case AND: return a && b;
        case OR: return a || b;
        case NOT: return !a;
        default: return a ? b : c;
    }
}

template <class C>
__device__ __forceinline__ C loaded(const void* at, int type, Index i) {
    switch (type) {
        case F32: return static_cast<C>(static_cast<const float*>(at)[i]);
        case BF16: return static_cast<C>(widen(static_cast<const bf16*>(at)[i]));
        case BOOL: return static_cast<C>(static_cast<const unsigned char*>(at)[i]);
        case I32: return static_cast<C>(static_cast<const int*>(at)[i]);
        default: return static_cast<C>(static_cast<const Index*>(at)[i]);
    }
}

template <class C>
__device__ __forceinline__ void stored(void* at, int type, Index i, C value) {
    switch (type) {
        case F32: static_cast<float*>(at)[i] = static_cast<float>(value); return;
        case BF16: static_cast<bf16*>(at)[i] = narrow<bf16>(static_cast<float>(value)); return;
        case BOOL: static_cast<unsigned char*>(at)[i] = value != C(0); return;
        case I32: static_cast<int*>(at)[i] = static_cast<int>(value); return;
        default: static_cast<Index*>(at)[i] = static_cast<Index>(value);
    }
}

// Where element i of the output is in an operand: its row of the table has its type, its axes, sizes, strides.
__device__ __forceinline__ Index place(const Index* operand, Index i) {
    int axes = static_cast<int>(__ldg(operand + 1));
    Index at = 0;
    for (int axis = 0; axis < axes; axis++) {
        Index step = __ldg(operand + 2 + MOST_AXES + axis);
        if (axis + 1 == axes) return at + i * step;
        Index size = __ldg(operand + 2 + axis);
        Index rest = (i | size) >> 32 ? i / size : static_cast<unsigned>(i) / static_cast<unsigned>(size);
        at += (i - rest * size) * step;
        i = rest;
    }
    return at;
}

// All elements: EACH of a thread at a time, so that a step is read once for them.
template <class C>
__device__ void pointwise(Operands in, const Index* table, const int* steps, const C* numbers, void* out, int count,
                          int inputs, Index total) {
    C registers[REGISTERS][EACH];
    Index across = static_cast<Index>(gridDim.x) * blockDim.x * EACH;
    for (Index first = static_cast<Index>(blockIdx.x) * blockDim.x * EACH + threadIdx.x; first < total; first += across) {
        int into = 0;
        for (int s = 0; s < count; s++) {
            const int* step = steps + WORDS * s;
            int code = __ldg(step);
            into = __ldg(step + 1);
            int from[3] = {__ldg(step + 2), __ldg(step + 3), __ldg(step + 4)};
            if (code == LOAD) {
                const Index* operand = table + from[0] * (2 + 2 * MOST_AXES);
                const void* at = in.at[0];
                for (int k = 1; k < MOST_INPUTS; k++)
                    if (k == from[0]) at = in.at[k];
                int type = static_cast<int>(__ldg(operand));
                for (int e = 0; e < EACH; e++) {
                    Index i = first + static_cast<Index>(e) * blockDim.x;
                    registers[into][e] = i < total ? loaded<C>(at, type, place(operand, i)) : C(0);
                }
                continue;
            }
            C constant[3];
            for (int k = 0; k < 3; k++) constant[k] = from[k] < 0 ? numbers[-1 - from[k]] : C(0);
            for (int e = 0; e < EACH; e++) {
                C a = from[0] < 0 ? constant[0] : registers[from[0]][e];
                C b = from[1] < 0 ? constant[1] : registers[from[1]][e];
                C c = from[2] < 0 ? constant[2] : registers[from[2]][e];
                registers[into][e] = applied(code, a, b, c);
            }
        }
        int type = static_cast<int>(__ldg(table + inputs * (2 + 2 * MOST_AXES)));
        for (int e = 0; e < EACH; e++) {
            Index i = first + static_cast<Index>(e) * blockDim.x;
            if (i < total) stored<C>(out, type, i, registers[into][e]);
        }
    }
}

}  // namespace

#define POINTWISE(C, NAME)                                                                                           \
    extern "C" __global__ void pointwise_##NAME(                                                                     \
        const void* x0, const void* x1, const void* x2, const void* x3, const void* x4, const void* x5,              \
        const void* x6, const void* x7, const long long* table, const int* steps, const C* numbers, void* out,       \
        int count, int inputs, long long total) {                                                                    \
        follow();                                                                                                    \
        pointwise<C>(Operands{{x0, x1, x2, x3, x4, x5, x6, x7}}, table, steps, numbers, out, count, inputs, total);  \
    }                                                                                                                \
    EXPORT(pointwise_##NAME)
POINTWISE(float, f32)
POINTWISE(long long, i64)
