// Attention over a KV cache with grouped queries: causal over the static cache, and decode in splits of the keys with a
// combine step (Dao et al. 2023, "Flash-Decoding"), over a static or a paged cache.
#include "common.cuh"

using Index = long long;

constexpr int MAX_DIM = 256;  // two channels a thread

// Where the row of key (or value) number `key` begins.
template <class T>
struct Rows {
    const T* base;
    Index stride;
    const int* pages;  // null: the rows lie one after another
    int page_rows;
    Index page_stride;
    int page_count;
    __device__ __forceinline__ const T* row(int key) const {
        if (!pages) return base + key * stride;
        int page = pages[key / page_rows];
        return base + (page >= 0 && page < page_count ? page : 0) * page_stride + (key % page_rows) * stride;
    }
};

// Reports pages that do not exist among those of the first `seen` keys.
__device__ __forceinline__ void check_pages(const int* pages, int seen, int page_rows, int page_count, long long* fault) {
    for (int i = threadIdx.x; i * page_rows < seen; i += THREADS)
        if (pages[i] < 0 || pages[i] >= page_count) report(fault, PAGE, pages[i]);
}

struct Partial {
    float max, sum, mixed[2];
};

// Scores of one query against keys [begin, end), softmax kept running, values mixed; thread i holds channels i and
// i + THREADS of the result.
template <class T>
__device__ Partial attend(const T* query, const Rows<T>& keys, const Rows<T>& values, int begin, int end, int dim) {
    __shared__ float q[MAX_DIM];
    __shared__ float weight[THREADS];
    float scale = rsqrtf(static_cast<float>(dim));
    for (int i = threadIdx.x; i < dim; i += THREADS) q[i] = widen(query[i]) * scale;
    Partial state = {-infinity(), 0.0f, {0.0f, 0.0f}};
    __syncthreads();
    for (int first = begin; first < end; first += THREADS) {
        int key = first + threadIdx.x;
        float score = -infinity();
        if (key < end) {
            const T* row = keys.row(key);
            score = 0.0f;
            for (int i = 0; i < dim; i++) score = fmaf(q[i], widen(row[i]), score);
        }
        float largest = fmaxf(state.max, over_block<Max>(score));
        float mine = key < end ? expf(score - largest) : 0.0f;
        float shrink = expf(state.max - largest);
        weight[threadIdx.x] = mine;
        state.sum = state.sum * shrink + over_block<Sum>(mine);  // its barriers also publish the weights
        state.max = largest;
        int count = end - first < THREADS ? end - first : THREADS;
        for (int c = 0; c < 2; c++) {
            int channel = threadIdx.x + c * THREADS;
            if (channel >= dim) continue;
            float mixed = state.mixed[c] * shrink;
            for (int i = 0; i < count; i++) mixed = fmaf(weight[i], widen(values.row(first + i)[channel]), mixed);
            state.mixed[c] = mixed;
        }
        __syncthreads();
    }
    return state;
}

// One block a token (x) and query head (y); token j of a sequence sees positions[sequence] + j + 1 keys.
template <class T>
__device__ void attention(Block block, const T* q, const Index* positions, const T* keys, const T* values, T* out,
                          int heads, int kv_heads, int dim, int each, Index length, long long* fault) {
    int token = block.x, head = block.y, sequence = token / each, kv_head = head / (heads / kv_heads);
    Index base = (static_cast<Index>(sequence) * kv_heads + kv_head) * length * dim;
    Rows<T> k = {keys + base, dim, nullptr, 1, 0, 0}, v = {values + base, dim, nullptr, 1, 0, 0};
    if (threadIdx.x == 0 && (positions[sequence] < 0 || positions[sequence] > length - each))
        report(fault, POSITION, positions[sequence]);
    Index seen = positions[sequence] + token % each + 1;
    seen = seen < 1 ? 1 : seen > length ? length : seen;
    Index row = (static_cast<Index>(token) * heads + head) * dim;
    Partial state = attend(q + row, k, v, 0, static_cast<int>(seen), dim);
    for (int c = 0; c < 2; c++) {
        int channel = threadIdx.x + c * THREADS;
        if (channel < dim) out[row + channel] = narrow<T>(state.mixed[c] / state.sum);
    }
}

// One block a row (x) and query head (y); rows starts[i] to starts[i + 1] are the last tokens of the lengths[i] that
// sequence i has in its pages. Rows of no sequence give zeros.
template <class T>
__device__ void paged_prefill(Block block, const T* q, const int* starts, const int* lengths, const int* pages,
                              const T* keys, const T* values, T* out, int heads, int kv_heads, int dim, int chunks,
                              Index head_stride, Index key_stride, int page_rows, int pages_each, Index page_stride,
                              int page_count, int tokens, long long* fault) {
    int token = block.x, head = block.y, chunk = 0;
    if (threadIdx.x == 0 && starts[chunks] > tokens) report(fault, CHUNK, starts[chunks]);
    Index row = (static_cast<Index>(token) * heads + head) * dim;
    while (chunk < chunks && starts[chunk + 1] <= token) chunk++;
    if (chunk == chunks || token < starts[0]) {
        for (int channel = threadIdx.x; channel < dim; channel += THREADS) out[row + channel] = narrow<T>(0.0f);
        return;
    }
    int seen = lengths[chunk] - (starts[chunk + 1] - token) + 1;
    if (threadIdx.x == 0 && starts[chunk + 1] - starts[chunk] > lengths[chunk]) report(fault, CHUNK, starts[chunk + 1]);
    if (threadIdx.x == 0 && lengths[chunk] > pages_each * page_rows) report(fault, LENGTH, lengths[chunk]);
    seen = seen < 1 ? 1 : seen > pages_each * page_rows ? pages_each * page_rows : seen;
    Index at = (head / (heads / kv_heads)) * head_stride;
    const int* mine = pages + static_cast<Index>(chunk) * pages_each;
    check_pages(mine, seen, page_rows, page_count, fault);
    Rows<T> k = {keys + at, key_stride, mine, page_rows, page_stride, page_count},
            v = {values + at, key_stride, mine, page_rows, page_stride, page_count};
    Partial state = attend(q + row, k, v, 0, seen, dim);
    for (int c = 0; c < 2; c++) {
        int channel = threadIdx.x + c * THREADS;
        if (channel < dim) out[row + channel] = narrow<T>(state.mixed[c] / state.sum);
    }
}

// One block a sequence (x), query head (y) and split (z). `parts` is (batch, heads, splits, dim + 2): max, sum, mixed.
// Keys in use: lengths[sequence], or positions[sequence] + 1, or `length` where both are null.
template <class T>
__device__ void decode_split(Block block, const T* q, const T* keys, const T* values, const int* pages,
                             const int* lengths, const Index* positions, float* parts, int splits, int heads,
                             int kv_heads, int dim, int length, Index sequence_stride, Index head_stride,
                             Index key_stride, int page_rows, int pages_each, Index page_stride, int page_count,
                             long long* fault) {
    int sequence = block.x, head = block.y, split = block.z;
    int kv_head = head / (heads / kv_heads);
    Index at = (pages ? 0 : sequence * sequence_stride) + kv_head * head_stride;
    const int* mine = pages ? pages + static_cast<Index>(sequence) * pages_each : nullptr;
    Rows<T> k = {keys + at, key_stride, mine, page_rows, page_stride, page_count},
            v = {values + at, key_stride, mine, page_rows, page_stride, page_count};
    Index asked = lengths ? lengths[sequence] : positions ? positions[sequence] + 1 : length;
    if (threadIdx.x == 0 && (asked > length || asked < (positions ? 1 : 0)))
        report(fault, lengths ? LENGTH : POSITION, lengths ? asked : asked - 1);
    int seen = static_cast<int>(asked > length ? length : asked < 0 ? 0 : asked);
    if (pages) check_pages(mine, seen, page_rows, page_count, fault);
    int share = (seen + splits - 1) / splits, begin = split * share, end = begin + share < seen ? begin + share : seen;
    Partial state = attend(q + (static_cast<Index>(sequence) * heads + head) * dim, k, v, begin, end, dim);
    float* part = parts + ((static_cast<Index>(sequence) * heads + head) * splits + split) * (dim + 2);
    if (threadIdx.x == 0) part[0] = state.max, part[1] = state.sum;
    for (int c = 0; c < 2; c++) {
        int channel = threadIdx.x + c * THREADS;
        if (channel < dim) part[2 + channel] = state.mixed[c];
    }
}

// One block a sequence (x) and query head (y). A sequence without keys gives zeros.
template <class T>
__device__ void decode_combine(Block block, const float* parts, T* out, int heads, int dim, int splits) {
    Index head = static_cast<Index>(block.x) * heads + block.y;
    const float* mine = parts + head * splits * (dim + 2);
    float largest = -infinity(), sum = 0.0f;
    for (int s = 0; s < splits; s++) largest = fmaxf(largest, mine[s * (dim + 2)]);
    for (int s = 0; s < splits; s++)
        if (mine[s * (dim + 2) + 1] > 0.0f) sum += mine[s * (dim + 2) + 1] * expf(mine[s * (dim + 2)] - largest);
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
        float mixed = 0.0f;
        for (int s = 0; s < splits; s++)
            if (mine[s * (dim + 2) + 1] > 0.0f)
                mixed += mine[s * (dim + 2) + 2 + channel] * expf(mine[s * (dim + 2)] - largest);
        out[head * dim + channel] = narrow<T>(sum > 0.0f ? mixed / sum : 0.0f);
    }
}

#define OF_TYPE(T, NAME)                                                                                              \
    extern "C" __global__ void attention_##NAME(const T* q, const long long* positions, const T* keys,                \
                                                const T* values, T* out, int heads, int kv_heads, int dim, int each,  \
                                                long long length, long long* fault, int nx, int ny, int nz) {         \
        each_block(nx, ny, nz, [&](Block block) {                                                                     \
            attention(block, q, positions, keys, values, out, heads, kv_heads, dim, each, length, fault);             \
        });                                                                                                           \
    }                                                                                                                 \
    EXPORT(attention_##NAME)                                                                                          \
    extern "C" __global__ void paged_prefill_##NAME(                                                                  \
        const T* q, const int* starts, const int* lengths, const int* pages, const T* keys, const T* values, T* out,  \
        int heads, int kv_heads, int dim, int chunks, long long head_stride, long long key_stride, int page_rows,     \
        int pages_each, long long page_stride, int page_count, long long* fault, int nx, int ny, int nz) {            \
        each_block(nx, ny, nz, [&](Block block) {                                                                     \
            paged_prefill(block, q, starts, lengths, pages, keys, values, out, heads, kv_heads, dim, chunks,          \
                          head_stride, key_stride, page_rows, pages_each, page_stride, page_count, nx, fault);        \
        });                                                                                                           \
    }                                                                                                                 \
    EXPORT(paged_prefill_##NAME)                                                                                      \
    extern "C" __global__ void decode_split_##NAME(                                                                   \
        const T* q, const T* keys, const T* values, const int* pages, const int* lengths, const long long* positions, \
        float* parts, int heads, int kv_heads, int dim, int length, long long sequence_stride, long long head_stride, \
        long long key_stride, int page_rows, int pages_each, long long page_stride, int page_count, long long* fault, \
        int nx, int ny, int nz) {                                                                                     \
        each_block(nx, ny, nz, [&](Block block) {                                                                     \
            decode_split(block, q, keys, values, pages, lengths, positions, parts, nz, heads, kv_heads, dim, length,  \
                         sequence_stride, head_stride, key_stride, page_rows, pages_each, page_stride, page_count,    \
                         fault);                                                                                      \
        });                                                                                                           \
    }                                                                                                                 \
    EXPORT(decode_split_##NAME)                                                                                       \
    extern "C" __global__ void decode_combine_##NAME(const float* parts, T* out, int heads, int dim, int splits,      \
                                                     int nx, int ny, int nz) {                                        \
        each_block(nx, ny, nz, [&](Block block) { decode_combine(block, parts, out, heads, dim, splits); });          \
    }                                                                                                                 \
    EXPORT(decode_combine_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
