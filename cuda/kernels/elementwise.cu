// Row-wise and element-wise ops: add, swiglu, rmsnorm, embedding, argmax, rows and plain copies.
#include "common.cuh"

using Index = long long;

__device__ __forceinline__ Index first_element() { return static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ Index element_stride() { return static_cast<Index>(gridDim.x) * blockDim.x; }

template <class T>
__device__ void add(const T* a, const T* b, T* out, Index count) {
    for (Index i = first_element(); i < count; i += element_stride()) out[i] = narrow<T>(widen(a[i]) + widen(b[i]));
}

// silu(gate) * up, gate first (Shazeer 2020).
template <class T>
__device__ void swiglu(const T* gate_up, T* out, Index rows, int features) {
    for (Index i = first_element(); i < rows * features; i += element_stride()) {
        Index row = i / features, column = i % features;
        float gate = widen(gate_up[row * 2 * features + column]);
        float up = widen(gate_up[row * 2 * features + features + column]);
        out[i] = narrow<T>(gate / (1.0f + expf(-gate)) * up);
    }
}

// One block a row: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019).
template <class T>
__device__ void rmsnorm(Block block, const T* x, const T* weight, T* out, int columns, float eps) {
    const T* row = x + static_cast<Index>(block.x) * columns;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += THREADS) squares += widen(row[i]) * widen(row[i]);
    float scale = rsqrtf(over_block<Sum>(squares) / columns + eps);
    for (int i = threadIdx.x; i < columns; i += THREADS)
        out[static_cast<Index>(block.x) * columns + i] = narrow<T>(widen(row[i]) * scale * widen(weight[i]));
}

// One block a token. A token outside the table is reported and gives zeros.
template <class Token, class In, class Out>
__device__ void embedding(Block block, const Token* tokens, const In* table, Out* out, int columns, Index vocabulary,
                          long long* fault) {
    Index token = static_cast<Index>(tokens[block.x]);
    bool known = token >= 0 && token < vocabulary;
    if (!known && threadIdx.x == 0) report(fault, TOKEN, token);
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
        out[static_cast<Index>(block.x) * columns + i] = narrow<Out>(known ? widen(table[token * columns + i]) : 0.0f);
}

// One block a row; of equal entries the first wins, and a NaN is larger than any number.
template <class T>
__device__ void argmax(Block block, const T* x, Index* out, int columns) {
    __shared__ float best_value[THREADS];
    __shared__ int best_index[THREADS];
    float best = -infinity();
    int at = columns;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float value = widen(x[static_cast<Index>(block.x) * columns + i]);
        bool larger = value > best || at == columns || (value != value && best == best);
        if (larger) best = value, at = i;
    }
    best_value[threadIdx.x] = best;
    best_index[threadIdx.x] = at;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < THREADS; i++) {
        float value = best_value[i];
        int index = best_index[i];
        if (index == columns) continue;
        bool nan = value != value, best_nan = best != best;
        bool larger = nan ? !best_nan || index < at : !best_nan && (value > best || (value == best && index < at));
        if (larger) best = value, at = index;
    }
    out[block.x] = at;
}

// Rows start, start + step, ... of a matrix whose rows are `columns` units.
template <class Unit>
__device__ void slice_rows(const Unit* x, Unit* out, Index start, Index step, Index columns, Index rows) {
    for (Index i = first_element(); i < rows * columns; i += element_stride())
        out[i] = x[(start + i / columns * step) * columns + i % columns];
}

#define OF_TYPE(T, NAME)                                                                                              \
    extern "C" __global__ void add_##NAME(const T* a, const T* b, T* out, long long count) {                          \
        follow();                                                                                                     \
        add(a, b, out, count);                                                                                        \
    }                                                                                                                 \
    EXPORT(add_##NAME)                                                                                                \
    extern "C" __global__ void swiglu_##NAME(const T* gate_up, T* out, long long rows, int features) {                \
        follow();                                                                                                     \
        swiglu(gate_up, out, rows, features);                                                                         \
    }                                                                                                                 \
    EXPORT(swiglu_##NAME)                                                                                             \
    extern "C" __global__ void rmsnorm_##NAME(const T* x, const T* weight, T* out, int columns, float eps, int nx,    \
                                              int ny, int nz) {                                                       \
        each_block(nx, ny, nz, [&](Block block) { rmsnorm(block, x, weight, out, columns, eps); });                   \
    }                                                                                                                 \
    EXPORT(rmsnorm_##NAME)                                                                                            \
    extern "C" __global__ void argmax_##NAME(const T* x, long long* out, int columns, int nx, int ny, int nz) {       \
        each_block(nx, ny, nz, [&](Block block) { argmax(block, x, out, columns); });                                 \
    }                                                                                                                 \
    EXPORT(argmax_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)

#define EMBEDDING(TOKEN, TOKEN_NAME, IN, IN_NAME, OUT, OUT_NAME)                                                     \
    extern "C" __global__ void embedding_##TOKEN_NAME##_##IN_NAME##_##OUT_NAME(                                      \
        const TOKEN* tokens, const IN* table, OUT* out, int columns, long long vocabulary, long long* fault, int nx, \
        int ny, int nz) {                                                                                            \
        each_block(nx, ny, nz,                                                                                       \
                   [&](Block block) { embedding(block, tokens, table, out, columns, vocabulary, fault); });          \
    }                                                                                                                \
    EXPORT(embedding_##TOKEN_NAME##_##IN_NAME##_##OUT_NAME)
EMBEDDING(long long, i64, float, f32, float, f32)
EMBEDDING(long long, i64, bf16, bf16, bf16, bf16)
EMBEDDING(long long, i64, bf16, bf16, float, f32)
EMBEDDING(int, i32, float, f32, float, f32)
EMBEDDING(int, i32, bf16, bf16, bf16, bf16)
EMBEDDING(int, i32, bf16, bf16, float, f32)

#define SLICE_ROWS(UNIT, NAME)                                                                              \
    extern "C" __global__ void slice_rows_##NAME(const UNIT* x, UNIT* out, long long start, long long step, \
                                                 long long columns, long long rows) {                       \
        follow();                                                                                           \
        slice_rows(x, out, start, step, columns, rows);                                                     \
    }                                                                                                       \
    EXPORT(slice_rows_##NAME)
SLICE_ROWS(unsigned char, b1)
SLICE_ROWS(unsigned, b4)
