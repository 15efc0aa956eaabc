// Mixtures of experts: routing, and the grouped products of the rows that come to each expert. For reference: no tensor
// cores. Rows are grouped by expert through lists, so that an expert's weights meet only its own rows.
#include "common.cuh"

using Index = long long;

constexpr int MAX_EXPERTS = 512, MAX_GROUPS = 64;

// The best of choice[0..count) over the block, the first of equals; -1 when all are -inf or NaN.
__device__ __forceinline__ int best_of(const float* choice, int count) {
    float best = -infinity();
    int at = -1;
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (choice[i] > best) best = choice[i], at = i;
    float top = over_block<Max>(best);
    float first = over_block<Max>(at >= 0 && best == top ? -static_cast<float>(at) : -infinity());
    return first == -infinity() ? -1 : static_cast<int>(-first);
}

// Leaves in `choice` only the `kept` groups whose two best entries sum highest (DeepSeek-V3).
__device__ void keep_best_groups(float* choice, int count, int groups, int kept) {
    __shared__ float score[MAX_GROUPS];
    __shared__ int taken[MAX_GROUPS];
    int size = count / groups;
    for (int g = threadIdx.x; g < groups; g += THREADS) {
        float first = -infinity(), second = -infinity();
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > first) second = first, first = choice[i];
            else if (choice[i] > second) second = choice[i];
        }
        score[g] = first + second;
        taken[g] = 0;
    }
    __syncthreads();
    for (int k = 0; k < kept; k++) {
        int at = best_of(score, groups);
        __syncthreads();
        if (threadIdx.x == 0 && at >= 0) taken[at] = 1, score[at] = -infinity();
        __syncthreads();
    }
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (!taken[i / size]) choice[i] = -infinity();
    __syncthreads();
}

// One block a token: the weights of its top_k experts, zeros elsewhere, of columns first to first + held.
template <class T>
__device__ void route(const T* logits, const float* correction, const int* slots, float* out, int count, int top_k, int groups,
                      int kept, int first, int held, int sigmoid, int normalize, float scale) {
    __shared__ float score[MAX_EXPERTS];
    __shared__ float choice[MAX_EXPERTS];
    __shared__ float weight[MAX_EXPERTS];
    const T* row = logits + static_cast<Index>(blockIdx.x) * count;
    float largest = -infinity(), total = 0.0f;
    for (int i = threadIdx.x; i < count; i += THREADS) largest = fmaxf(largest, widen(row[i]));
    largest = over_block<Max>(largest);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        float x = widen(row[i]);
        score[i] = sigmoid ? 1.0f / (1.0f + expf(-x)) : expf(x - largest);
        total += score[i];
        weight[i] = 0.0f;
    }
    total = over_block<Sum>(total);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        if (!sigmoid) score[i] /= total;
        choice[i] = score[i] + (correction ? correction[i] : 0.0f);
    }
    __syncthreads();
    if (kept < groups) keep_best_groups(choice, count, groups, kept);
    float sum = 0.0f;
    for (int k = 0; k < top_k; k++) {
        int at = best_of(choice, count);
        if (at < 0) break;
        sum += score[at];
        __syncthreads();
        if (threadIdx.x == 0) weight[at] = score[at], choice[at] = -infinity();
        __syncthreads();
    }
    float factor = normalize ? scale / (sum + 1e-20f) : scale;
    bool goes = !slots || slots[blockIdx.x] >= 0;
    for (int i = threadIdx.x; i < held; i += THREADS)
        out[static_cast<Index>(blockIdx.x) * held + i] = goes ? weight[first + i] * factor : 0.0f;
}

// One block an expert: the tokens that come to it, in order, how many, and each one's place among them.
extern "C" __global__ void expert_lists(const float* routing, int* tokens, int* places, int* counts, int rows, int held) {
    follow();
    __shared__ int before[THREADS + 1];
    int expert = blockIdx.x, share = (rows + THREADS - 1) / THREADS;
    int begin = threadIdx.x * share, end = begin + share < rows ? begin + share : rows, mine = 0;
    for (int t = begin; t < end; t++) mine += routing[static_cast<Index>(t) * held + expert] != 0.0f;
    before[threadIdx.x + 1] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        before[0] = 0;
        for (int i = 1; i <= THREADS; i++) before[i] += before[i - 1];
        counts[expert] = before[THREADS];
    }
    __syncthreads();
    int place = before[threadIdx.x];
    for (int t = begin; t < end; t++)
        if (routing[static_cast<Index>(t) * held + expert] != 0.0f) {
            places[static_cast<Index>(t) * held + expert] = place;
            tokens[static_cast<Index>(expert) * rows + place++] = t;
        }
}
EXPORT(expert_lists)

// One thread: where each expert's rows begin among all of them.
extern "C" __global__ void expert_offsets(const int* counts, int* offsets, int held) {
    follow();
    int sum = 0;
    for (int e = 0; e < held; e++) offsets[e] = sum, sum += counts[e];
}
EXPORT(expert_offsets)

constexpr int ROWS = 16, COLUMNS = 64, DEPTH = 16, BLOCK = 256;

// The tile of ROWS rows from row0 and COLUMNS columns from column0 of rows times w (n, k) transposed; row r of the tile is
// row(r) of x, or null for none. Thread i has row i / 16 and columns i % 16, + 16, + 32, + 48.
template <class T, class Row>
__device__ void tile(Row row, const T* w, int column0, int n, int k, float (&sum)[4]) {
    __shared__ float left[DEPTH][ROWS + 1];
    __shared__ float right[DEPTH][COLUMNS + 1];
    int thread = threadIdx.x;
    for (int j = 0; j < 4; j++) sum[j] = 0.0f;
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
        int inner = k0 + thread % DEPTH;
        const T* source = row(thread / DEPTH);
        left[thread % DEPTH][thread / DEPTH] = source && inner < k ? widen(source[inner]) : 0.0f;
        for (int i = thread; i < COLUMNS * DEPTH; i += BLOCK) {
            int column = column0 + i / DEPTH, at = k0 + i % DEPTH;
            right[i % DEPTH][i / DEPTH] = column < n && at < k ? widen(w[static_cast<Index>(column) * k + at]) : 0.0f;
        }
        __syncthreads();
        for (int i = 0; i < DEPTH; i++)
            for (int j = 0; j < 4; j++) sum[j] = fmaf(left[i][thread / 16], right[i][thread % 16 + 16 * j], sum[j]);
        __syncthreads();
    }
}

// One block a tile of columns (x) and an expert (y): silu(gate) * up of its rows, gate first.
template <class T>
__device__ void expert_up(const T* x, const T* gate_up, const int* tokens, const int* counts, const int* offsets, T* active,
                          int rows, int hidden, int inner, int room) {
    int expert = blockIdx.y, column0 = blockIdx.x * COLUMNS;
    const T* gate = gate_up + static_cast<Index>(expert) * 2 * inner * hidden;
    for (int row0 = 0; row0 < counts[expert]; row0 += ROWS) {
        auto row = [&](int r) {
            return row0 + r < counts[expert] ? x + static_cast<Index>(tokens[static_cast<Index>(expert) * rows + row0 + r]) * hidden
                                             : static_cast<const T*>(nullptr);
        };
        float g[4], u[4];
        tile(row, gate, column0, inner, hidden, g);
        tile(row, gate + static_cast<Index>(inner) * hidden, column0, inner, hidden, u);
        int r = row0 + threadIdx.x / 16, target = offsets[expert] + r;
        if (r >= counts[expert] || target >= room) continue;
        for (int j = 0; j < 4; j++) {
            int column = column0 + threadIdx.x % 16 + 16 * j;
            if (column < inner) active[static_cast<Index>(target) * inner + column] = narrow<T>(g[j] / (1.0f + expf(-g[j])) * u[j]);
        }
    }
}

// One block a tile of columns (x) and an expert (y): its rows through its down product.
template <class T>
__device__ void expert_down(const T* active, const T* down, const int* counts, const int* offsets, float* made, int hidden,
                            int inner, int room) {
    int expert = blockIdx.y, column0 = blockIdx.x * COLUMNS;
    for (int row0 = 0; row0 < counts[expert]; row0 += ROWS) {
        auto row = [&](int r) {
            int at = offsets[expert] + row0 + r;
            return row0 + r < counts[expert] && at < room ? active + static_cast<Index>(at) * inner : static_cast<const T*>(nullptr);
        };
        float sum[4];
        tile(row, down + static_cast<Index>(expert) * hidden * inner, column0, hidden, inner, sum);
        int r = row0 + threadIdx.x / 16, target = offsets[expert] + r;
        if (r >= counts[expert] || target >= room) continue;
        for (int j = 0; j < 4; j++) {
            int column = column0 + threadIdx.x % 16 + 16 * j;
            if (column < hidden) made[static_cast<Index>(target) * hidden + column] = sum[j];
        }
    }
}

// One block a token: residual (or nothing) plus the weighted rows of its experts.
template <class T>
__device__ void expert_sum(const float* routing, const int* places, const int* offsets, const float* made, const T* residual,
                           T* out, int held, int hidden, int room) {
    Index token = blockIdx.x;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float sum = residual ? widen(residual[token * hidden + i]) : 0.0f;
        for (int e = 0; e < held; e++) {
            float weight = routing[token * held + e];
            if (weight == 0.0f) continue;
            int row = offsets[e] + places[token * held + e];
            if (row < room) sum = fmaf(weight, made[static_cast<Index>(row) * hidden + i], sum);
        }
        out[token * hidden + i] = narrow<T>(sum);
    }
}

// base + sigmoid(gate) * x, one gate a row.
template <class T>
__device__ void gated_add(const T* x, const T* gate, const T* base, T* out, Index count, int columns) {
    for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += static_cast<Index>(gridDim.x) * blockDim.x)
        out[i] = narrow<T>(widen(base[i]) + widen(x[i]) / (1.0f + expf(-widen(gate[i / columns]))));
}

#define OF_TYPE(T, NAME)                                                                                                   \
    extern "C" __global__ void route_##NAME(const T* logits, const float* correction, const int* slots, float* out,        \
                                            int count, int top_k, int groups, int kept, int first, int held,               \
                                            int sigmoid, int normalize, float scale) {                                     \
        follow();                                                                                                          \
        route(logits, correction, slots, out, count, top_k, groups, kept, first, held, sigmoid, normalize, scale);         \
    }                                                                                                                      \
    EXPORT(route_##NAME)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK) expert_up_##NAME(                                                  \
        const T* x, const T* gate_up, const int* tokens, const int* counts, const int* offsets, T* active, int rows,       \
        int hidden, int inner, int room) {                                                                                 \
        follow();                                                                                                          \
        expert_up(x, gate_up, tokens, counts, offsets, active, rows, hidden, inner, room);                                 \
    }                                                                                                                      \
    EXPORT(expert_up_##NAME)                                                                                               \
    extern "C" __global__ void __launch_bounds__(BLOCK) expert_down_##NAME(                                                \
        const T* active, const T* down, const int* counts, const int* offsets, float* made, int hidden, int inner,         \
        int room) {                                                                                                        \
        follow();                                                                                                          \
        expert_down(active, down, counts, offsets, made, hidden, inner, room);                                             \
    }                                                                                                                      \
    EXPORT(expert_down_##NAME)                                                                                             \
    extern "C" __global__ void expert_sum_##NAME(const float* routing, const int* places, const int* offsets,              \
                                                 const float* made, const T* residual, T* out, int held, int hidden,       \
                                                 int room) {                                                               \
        follow();                                                                                                          \
        expert_sum(routing, places, offsets, made, residual, out, held, hidden, room);                                     \
    }                                                                                                                      \
    EXPORT(expert_sum_##NAME)                                                                                              \
    extern "C" __global__ void gated_add_##NAME(const T* x, const T* gate, const T* base, T* out, long long count,         \
                                                int columns) {                                                             \
        follow();                                                                                                          \
        gated_add(x, gate, base, out, count, columns);                                                                     \
    }                                                                                                                      \
    EXPORT(gated_add_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
