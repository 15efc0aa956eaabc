// Layer norms, softmax, batched products and reductions: plain kernels for reference, sums in float.
#include "common.cuh"

using Index = long long;

namespace {

constexpr int TILE = 32, BATCH_BLOCK = 256;

// One block a row: (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016); weight and bias may be null.
template <class T>
__device__ void layer_norm(Block block, const T* x, const T* weight, const T* bias, T* out, int columns, float eps) {
    const T* row = x + static_cast<Index>(block.x) * columns;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += THREADS) sum += widen(row[i]);
    float mean = over_block<Sum>(sum) / columns, squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float apart = widen(row[i]) - mean;
        squares += apart * apart;
    }
    float scale = rsqrtf(over_block<Sum>(squares) / columns + eps);
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float value = (widen(row[i]) - mean) * scale;
        if (weight) value *= widen(weight[i]);
        if (bias) value += widen(bias[i]);
        out[static_cast<Index>(block.x) * columns + i] = narrow<T>(value);
    }
}

// One block a line of `length` entries, which lie `inner` apart.
template <class T>
__device__ void softmax(Block block, const T* x, T* out, int length, int inner, int logarithm) {
    Index line = static_cast<Index>(block.x), start = line / inner * inner * length + line % inner;
    float largest = -infinity();
    for (int i = threadIdx.x; i < length; i += THREADS) {
        float value = widen(x[start + static_cast<Index>(i) * inner]);
        largest = fmaxf(largest, value);
    }
    largest = over_block<Max>(largest);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < length; i += THREADS)
        sum += expf(widen(x[start + static_cast<Index>(i) * inner]) - largest);
    sum = over_block<Sum>(sum);
    float away = logarithm ? logf(sum) : 1.0f / sum;
    for (int i = threadIdx.x; i < length; i += THREADS) {
        Index at = start + static_cast<Index>(i) * inner;
        float apart = widen(x[at]) - largest;
        out[at] = narrow<T>(logarithm ? apart - away : expf(apart) * away);
    }
}

enum Reduction { SUM, MEAN, MAX, MIN };

// The entries of an output are at its place and `length` steps over the reduced axes. The table has, of the kept
// axes and then of the reduced ones, how many there are, their sizes and their strides, last axis first.
constexpr int REDUCED_AXES = 6, TABLE = 1 + 2 * REDUCED_AXES;

__device__ __forceinline__ Index placed(const Index* table, Index i) {
    int axes = static_cast<int>(__ldg(table));
    Index at = 0;
    for (int axis = 0; axis < axes; axis++) {
        Index size = __ldg(table + 1 + axis), step = __ldg(table + 1 + REDUCED_AXES + axis);
        Index rest = (i | size) >> 32 ? i / size : static_cast<unsigned>(i) / static_cast<unsigned>(size);
        at += (i - rest * size) * step;
        i = rest;
    }
    return at;
}

// What one thread has seen of entries that are reduced.
struct Reduced {
    float made, odd = 0.0f;
    bool sums;
    float sign;

    __device__ explicit Reduced(int operation)
        : made(operation == SUM || operation == MEAN ? 0.0f : -infinity()),
          sums(operation == SUM || operation == MEAN),
          sign(operation == MIN ? -1.0f : 1.0f) {}

    __device__ void take(float value) {
        if (value != value) odd = 1.0f;
        made = sums ? made + value : fmaxf(made, sign * value);
    }

    __device__ float over_all() {  // the result of the block's threads; not yet a mean
        if (sums) return over_block<Sum>(made);
        float whole = over_block<Max>(made);
        return over_block<Max>(odd) > 0.0f ? __uint_as_float(0x7fc00000u) : sign * whole;
    }
};

// One block a part of an output; of one part it writes the output, of several what the part is, for `reduce_parts`.
template <class T>
__device__ void reduce(Block block, const T* x, T* out, float* part, const Index* table, Index length, int parts,
                       int operation) {
    Index output = block.x / parts, number = block.x % parts, start = placed(table, output);
    Index from = length * number / parts, end = length * (number + 1) / parts;
    Reduced mine(operation);
    for (Index i = from + threadIdx.x; i < end; i += THREADS) mine.take(widen(x[start + placed(table + TABLE, i)]));
    float made = mine.over_all();
    if (threadIdx.x != 0) return;
    if (parts > 1)
        part[block.x] = made;
    else
        out[output] = narrow<T>(operation == MEAN ? made / static_cast<float>(length) : made);
}

template <class T>
__device__ void reduce_parts(Block block, const float* part, T* out, Index length, int parts, int operation) {
    Reduced mine(operation);
    for (int i = threadIdx.x; i < parts; i += THREADS) mine.take(part[static_cast<Index>(block.x) * parts + i]);
    float made = mine.over_all();
    if (threadIdx.x == 0) out[block.x] = narrow<T>(operation == MEAN ? made / static_cast<float>(length) : made);
}

// A tile of one product of the batch: out (m, n) = a (m, k) times b (k, n), or (n, k) where `transposed`. The table has
// where the product's operands begin, two numbers a product.
template <class T, class Out>
__device__ void matmul(Block block, const T* a, const T* b, Out* out, const Index* table, int m, int n, int k,
                       int transposed) {
    __shared__ float left[TILE][TILE + 1];
    __shared__ float right[TILE][TILE + 1];
    const T* x = a + __ldg(table + 2 * block.z);
    const T* w = b + __ldg(table + 2 * block.z + 1);
    int row0 = block.y * TILE, column0 = block.x * TILE, thread = threadIdx.x;
    int my_row = thread / TILE, my_column = thread % TILE;
    float sum[TILE * TILE / BATCH_BLOCK] = {};
    for (int k0 = 0; k0 < k; k0 += TILE) {
        for (int i = thread; i < TILE * TILE; i += BATCH_BLOCK) {
            int row = row0 + i / TILE, inner = k0 + i % TILE;
            left[i / TILE][i % TILE] = row < m && inner < k ? widen(x[static_cast<Index>(row) * k + inner]) : 0.0f;
            int c = transposed ? i / TILE : i % TILE, r = transposed ? i % TILE : i / TILE;
            int column = column0 + c, deep = k0 + r;
            Index at = transposed ? static_cast<Index>(column) * k + deep : static_cast<Index>(deep) * n + column;
            right[r][c] = column < n && deep < k ? widen(w[at]) : 0.0f;
        }
        __syncthreads();
        for (int inner = 0; inner < TILE; inner++)
            for (int i = 0; i < TILE * TILE / BATCH_BLOCK; i++)
                sum[i] = fmaf(left[my_row + i * (BATCH_BLOCK / TILE)][inner], right[inner][my_column], sum[i]);
        __syncthreads();
    }
    for (int i = 0; i < TILE * TILE / BATCH_BLOCK; i++) {
        int row = row0 + my_row + i * (BATCH_BLOCK / TILE), column = column0 + my_column;
        if (row < m && column < n)
            out[(static_cast<Index>(block.z) * m + row) * n + column] = narrow<Out>(sum[i]);
    }
}

}  // namespace

#define ALGEBRA(T, NAME)                                                                                            \
    extern "C" __global__ void layer_norm_##NAME(const T* x, const T* weight, const T* bias, T* out, int columns,   \
                                                 float eps, int nx, int ny, int nz) {                               \
        each_block(nx, ny, nz, [&](Block block) { layer_norm(block, x, weight, bias, out, columns, eps); });        \
    }                                                                                                               \
    EXPORT(layer_norm_##NAME)                                                                                       \
    extern "C" __global__ void softmax_##NAME(const T* x, T* out, int length, int inner, int logarithm, int nx,     \
                                              int ny, int nz) {                                                     \
        each_block(nx, ny, nz, [&](Block block) { softmax(block, x, out, length, inner, logarithm); });             \
    }                                                                                                               \
    EXPORT(softmax_##NAME)                                                                                          \
    extern "C" __global__ void reduce_##NAME(const T* x, T* out, float* part, const long long* table,               \
                                             long long length, int parts, int operation, int nx, int ny, int nz) {  \
        each_block(nx, ny, nz, [&](Block block) { reduce(block, x, out, part, table, length, parts, operation); }); \
    }                                                                                                               \
    EXPORT(reduce_##NAME)                                                                                           \
    extern "C" __global__ void reduce_parts_##NAME(const float* part, T* out, long long length, int parts,          \
                                                   int operation, int nx, int ny, int nz) {                         \
        each_block(nx, ny, nz, [&](Block block) { reduce_parts(block, part, out, length, parts, operation); });     \
    }                                                                                                               \
    EXPORT(reduce_parts_##NAME)
ALGEBRA(float, f32)
ALGEBRA(bf16, bf16)

#define MATMUL(T, NAME, OUT, OUT_NAME)                                                                               \
    extern "C" __global__ void __launch_bounds__(BATCH_BLOCK)                                                        \
        matmul_##NAME##_##OUT_NAME(const T* a, const T* b, OUT* out, const long long* table, int m, int n, int k,    \
                                   int transposed, int nx, int ny, int nz) {                                         \
        each_block(nx, ny, nz, [&](Block block) { matmul(block, a, b, out, table, m, n, k, transposed); });          \
    }                                                                                                                \
    EXPORT(matmul_##NAME##_##OUT_NAME)
MATMUL(float, f32, float, f32)
MATMUL(bf16, bf16, bf16, bf16)
MATMUL(bf16, bf16, float, f32)
