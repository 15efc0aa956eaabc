// A plain tiled product for reference: shared-memory tiles, float accumulators, no tensor cores.
#include "common.cuh"

using Index = long long;

constexpr int TILE_N = 64, TILE_K = 16, BLOCK = 256;

// out (m, n) = x (m, k) times w (k, n), or (n, k) where `transposed`; plus bias (n) and residual (m, n) unless null.
template <int TILE_M, class X, class W, class Out>
__device__ void gemm(Block block, const X* x, const W* w, const X* bias, const X* residual, Out* out, int m, int n,
                     int k, int transposed) {
    constexpr int ROWS = TILE_M / 16;  // of 16 x 16 threads, each with four columns
    __shared__ float left[TILE_K][TILE_M + 1];
    __shared__ float right[TILE_K][TILE_N + 1];
    int row0 = block.y * TILE_M, column0 = block.x * TILE_N, thread = threadIdx.x;
    int my_row = thread / 16, my_column = thread % 16;
    float sum[ROWS][4] = {};
    for (int k0 = 0; k0 < k; k0 += TILE_K) {
        for (int i = thread; i < TILE_M * TILE_K; i += BLOCK) {
            int row = row0 + i / TILE_K, inner = k0 + i % TILE_K;
            left[i % TILE_K][i / TILE_K] = row < m && inner < k ? widen(x[static_cast<Index>(row) * k + inner]) : 0.0f;
        }
        for (int i = thread; i < TILE_N * TILE_K; i += BLOCK) {
            int c = transposed ? i / TILE_K : i % TILE_N, r = transposed ? i % TILE_K : i / TILE_N;
            int column = column0 + c, inner = k0 + r;
            Index at = transposed ? static_cast<Index>(column) * k + inner : static_cast<Index>(inner) * n + column;
            right[r][c] = column < n && inner < k ? widen(w[at]) : 0.0f;
        }
        __syncthreads();
        for (int inner = 0; inner < TILE_K; inner++)
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 4; j++)
                    sum[i][j] = fmaf(left[inner][my_row + 16 * i], right[inner][my_column + 16 * j], sum[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 4; j++) {
            int row = row0 + my_row + 16 * i, column = column0 + my_column + 16 * j;
            if (row >= m || column >= n) continue;
            float value = sum[i][j];
            if (bias) value += widen(bias[column]);
            if (residual) value += widen(residual[static_cast<Index>(row) * n + column]);
            out[static_cast<Index>(row) * n + column] = narrow<Out>(value);
        }
}

#define GEMM(X, X_NAME, W, W_NAME, OUT, OUT_NAME)                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                \
        gemm_##X_NAME##_##W_NAME##_##OUT_NAME(const X* x, const W* w, const X* bias, const X* residual, OUT* out,      \
                                              int m, int n, int k, int transposed, int nx, int ny, int nz) {           \
        each_block(nx, ny, nz, [&](Block block) { gemm<64>(block, x, w, bias, residual, out, m, n, k, transposed); }); \
    }                                                                                                                  \
    EXPORT(gemm_##X_NAME##_##W_NAME##_##OUT_NAME)                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK) gemm_few_rows_##X_NAME##_##W_NAME##_##OUT_NAME(                \
        const X* x, const W* w, const X* bias, const X* residual, OUT* out, int m, int n, int k, int transposed,       \
        int nx, int ny, int nz) {                                                                                      \
        each_block(nx, ny, nz, [&](Block block) { gemm<16>(block, x, w, bias, residual, out, m, n, k, transposed); }); \
    }                                                                                                                  \
    EXPORT(gemm_few_rows_##X_NAME##_##W_NAME##_##OUT_NAME)
GEMM(float, f32, float, f32, float, f32)
GEMM(bf16, bf16, bf16, bf16, bf16, bf16)
GEMM(bf16, bf16, bf16, bf16, float, f32)
GEMM(float, f32, bf16, bf16, float, f32)
