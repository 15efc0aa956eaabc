// Multi-head latent attention (DeepSeek-V2): the cache row of a token is its latent, then the rotated key of all heads.
// Caches are static, (batch, length, rank + rotary), or in pages, (page, page_rows, rank + rotary).
#include "common.cuh"

using Index = long long;

constexpr int MAX_RANK = 1024, MAX_DIM = 512, EACH = MAX_RANK / THREADS;

// Channel pair i of `count` rotary channels: neighbours, or one of each half; it leaves as halves, times `size`.
template <class T>
__device__ void rotate(const T* source, T* target, const float* inverse, float place, int count, int interleaved, float size) {
    for (int i = threadIdx.x; i < count / 2; i += THREADS) {
        float low = widen(source[interleaved ? 2 * i : i]), high = widen(source[interleaved ? 2 * i + 1 : count / 2 + i]);
        float c = cosf(place * inverse[i]) * size, s = sinf(place * inverse[i]) * size;
        target[i] = narrow<T>(low * c - high * s);
        target[count / 2 + i] = narrow<T>(high * c + low * s);
    }
}

// One block a token (x), which stands at `place`, and a head of q (y), the last y for the cache: row `slot`, or none below 0.
template <class T>
__device__ void latent_rope(const T* q, const T* kv, const T* norm, Index place, Index slot, T* latents, const float* inverse,
                            T* out, int heads, int dim, int rank, int rotary, float eps, int interleaved, float size) {
    Index token = blockIdx.x;
    int head = blockIdx.y;
    if (head < heads) {
        const T* row = q + (token * heads + head) * dim;
        T* target = out + (token * heads + head) * dim;
        for (int i = threadIdx.x; i < dim - rotary; i += THREADS) target[i] = row[i];
        rotate(row + dim - rotary, target + dim - rotary, inverse, static_cast<float>(place), rotary, interleaved, size);
        return;
    }
    const T* row = kv + token * (rank + rotary);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < rank; i += THREADS) squares += widen(row[i]) * widen(row[i]);
    float scale = rsqrtf(over_block<Sum>(squares) / rank + eps);
    if (slot < 0) return;
    T* target = latents + slot * (rank + rotary);
    for (int i = threadIdx.x; i < rank; i += THREADS) target[i] = narrow<T>(widen(row[i]) * scale * widen(norm[i]));
    rotate(row + rank, target + rank, inverse, static_cast<float>(place), rotary, interleaved, size);
}

// The latents of a sequence, one after another or in pages.
template <class T>
struct Cache {
    const T* base;
    int wide;
    const int* pages;  // null: the rows lie one after another
    int page_rows, page_count;
    __device__ __forceinline__ const T* row(int key) const {
        if (!pages) return base + static_cast<Index>(key) * wide;
        int page = pages[key / page_rows];
        return base + (static_cast<Index>(page >= 0 && page < page_count ? page : 0) * page_rows + key % page_rows) * wide;
    }
};

// One block a token (x) and head (y), with the up-projection folded into query and result; softmax kept running. Thread i
// mixes channels i, i + THREADS, ... of the latents. A token that sees none gives zeros.
template <class T>
__device__ void latent_attention(const T* q, const Cache<T>& cache, int seen, const T* up, T* out, int heads, int dim, int rank,
                                 int rotary, int values, float scale) {
    __shared__ float query[MAX_RANK + MAX_DIM];
    __shared__ float weight[THREADS];
    Index token = blockIdx.x;
    int head = blockIdx.y, plain = dim - rotary, wide = rank + rotary;
    if (seen < 1) {
        for (int v = threadIdx.x; v < values; v += THREADS) out[(token * heads + head) * values + v] = narrow<T>(0.0f);
        return;
    }
    const T* mine = q + (token * heads + head) * dim;
    const T* keys_up = up + static_cast<Index>(head) * (plain + values) * rank;
    for (int r = threadIdx.x; r < rank; r += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < plain; i++) sum = fmaf(widen(mine[i]), widen(keys_up[static_cast<Index>(i) * rank + r]), sum);
        query[r] = sum * scale;
    }
    for (int i = threadIdx.x; i < rotary; i += THREADS) query[rank + i] = widen(mine[plain + i]) * scale;
    float top = -infinity(), total = 0.0f, mixed[EACH] = {};
    __syncthreads();
    for (int first = 0; first < seen; first += THREADS) {
        int key = first + threadIdx.x, count = seen - first < THREADS ? seen - first : THREADS;
        float score = -infinity();
        if (key < seen) {
            const T* row = cache.row(key);
            score = 0.0f;
            for (int i = 0; i < wide; i++) score = fmaf(query[i], widen(row[i]), score);
        }
        float largest = fmaxf(top, over_block<Max>(score)), shrink = expf(top - largest);
        weight[threadIdx.x] = key < seen ? expf(score - largest) : 0.0f;
        total = total * shrink + over_block<Sum>(weight[threadIdx.x]);  // its barriers also publish the weights
        top = largest;
        for (int c = 0; c < EACH; c++) {
            int channel = threadIdx.x + c * THREADS;
            if (channel >= rank) continue;
            mixed[c] *= shrink;
            for (int i = 0; i < count; i++) mixed[c] = fmaf(weight[i], widen(cache.row(first + i)[channel]), mixed[c]);
        }
        __syncthreads();
    }
    for (int c = 0; c < EACH; c++)
        if (threadIdx.x + c * THREADS < rank) query[threadIdx.x + c * THREADS] = mixed[c] / total;
    __syncthreads();
    for (int v = threadIdx.x; v < values; v += THREADS) {
        float sum = 0.0f;
        for (int r = 0; r < rank; r++) sum = fmaf(query[r], widen(keys_up[static_cast<Index>(plain + v) * rank + r]), sum);
        out[(token * heads + head) * values + v] = narrow<T>(sum);
    }
}

// Token j of a sequence stands at positions[sequence] + j. A place beyond `length` is reported and left out.
template <class T>
__device__ void rope_static(const T* q, const T* kv, const T* norm, const Index* positions, T* latents, const float* inverse, T* out,
                            int heads, int dim, int rank, int rotary, int each, Index length, float eps, int interleaved, float size,
                            long long* fault) {
    Index token = blockIdx.x, sequence = token / each, place = positions[sequence] + token % each;
    Index slot = place >= 0 && place < length ? sequence * length + place : -1;
    if (threadIdx.x == 0 && slot < 0) report(fault, POSITION, positions[sequence]);
    latent_rope(q, kv, norm, place, slot, latents, inverse, out, heads, dim, rank, rotary, eps, interleaved, size);
}

template <class T>
__device__ void attention_static(const T* q, const Index* positions, const T* latents, const T* up, T* out, int heads, int dim, int rank,
                                 int rotary, int values, int each, Index length, float scale, long long* fault) {
    Index token = blockIdx.x, sequence = token / each, last = positions[sequence] + token % each + 1;
    int wide = rank + rotary, seen = static_cast<int>(last < 1 ? 1 : last > length ? length : last);
    Cache<T> cache = {latents + sequence * length * wide, wide, nullptr, 1, 0};
    if (threadIdx.x == 0 && (positions[sequence] < 0 || positions[sequence] > length - each))
        report(fault, POSITION, positions[sequence]);
    latent_attention(q, cache, seen, up, out, heads, dim, rank, rotary, values, scale);
}

// Token i stands at positions[i], below `context`, and goes to slots[i], below `slots_end`.
template <class T>
__device__ void rope_paged(const T* q, const T* kv, const T* norm, const int* positions, const int* slots, T* latents,
                           const float* inverse, T* out, int heads, int dim, int rank, int rotary, Index slots_end, int context,
                           float eps, int interleaved, float size, long long* fault) {
    Index slot = slots[blockIdx.x] < slots_end ? slots[blockIdx.x] : -1;
    int place = positions[blockIdx.x];
    if (threadIdx.x == 0 && slots[blockIdx.x] >= slots_end) report(fault, SLOT, slots[blockIdx.x]);
    if (threadIdx.x == 0 && (place < 0 || place >= context)) report(fault, POSITION, place);
    latent_rope(q, kv, norm, static_cast<Index>(positions[blockIdx.x]), slot, latents, inverse, out, heads, dim, rank, rotary, eps,
                interleaved, size);
}

// Rows starts[i] to starts[i + 1] are the last tokens of the lengths[i] that sequence i has in its pages; without starts every
// row is a sequence. Rows of no sequence give zeros.
template <class T>
__device__ void attention_paged(const T* q, const int* starts, const int* lengths, const int* pages, const T* latents, const T* up,
                                T* out, int heads, int dim, int rank, int rotary, int values, int chunks, int page_rows,
                                int pages_each, int page_count, float scale, long long* fault) {
    int token = blockIdx.x, chunk = starts ? 0 : token;
    while (starts && chunk < chunks && starts[chunk + 1] <= token) chunk++;
    bool some = chunk < chunks && (!starts || token >= starts[0]) && lengths[chunk] > 0;
    int behind = starts && some ? starts[chunk + 1] - token - 1 : 0, seen = some ? lengths[chunk] - behind : 0;
    if (threadIdx.x == 0 && starts && starts[chunks] > static_cast<int>(gridDim.x)) report(fault, CHUNK, starts[chunks]);
    if (threadIdx.x == 0 && chunk < chunks && (lengths[chunk] < 0 || lengths[chunk] > pages_each * page_rows))
        report(fault, LENGTH, lengths[chunk]);
    if (threadIdx.x == 0 && starts && some && starts[chunk + 1] - starts[chunk] > lengths[chunk])
        report(fault, CHUNK, starts[chunk + 1]);
    seen = seen > pages_each * page_rows ? pages_each * page_rows : seen;
    const int* mine = pages + static_cast<Index>(some ? chunk : 0) * pages_each;
    for (int i = threadIdx.x; i * page_rows < seen; i += THREADS)
        if (mine[i] < 0 || mine[i] >= page_count) report(fault, PAGE, mine[i]);
    Cache<T> cache = {latents, rank + rotary, mine, page_rows, page_count};
    latent_attention(q, cache, seen, up, out, heads, dim, rank, rotary, values, scale);
}

#define OF_TYPE(T, NAME)                                                                                                     \
    extern "C" __global__ void latent_rope_##NAME(const T* q, const T* kv, const T* norm, const long long* positions,        \
                                                  T* latents, const float* inverse, T* out, int heads, int dim, int rank,    \
                                                  int rotary, int each, long long length, float eps, int interleaved,        \
                                                  float size, long long* fault) {                                            \
        follow();                                                                                                            \
        rope_static(q, kv, norm, positions, latents, inverse, out, heads, dim, rank, rotary, each, length, eps, interleaved, \
                    size, fault);                                                                                            \
    }                                                                                                                        \
    EXPORT(latent_rope_##NAME)                                                                                               \
    extern "C" __global__ void latent_attention_##NAME(const T* q, const long long* positions, const T* latents,             \
                                                       const T* up, T* out, int heads, int dim, int rank, int rotary,        \
                                                       int values, int each, long long length, float scale,                  \
                                                       long long* fault) {                                                   \
        follow();                                                                                                            \
        attention_static(q, positions, latents, up, out, heads, dim, rank, rotary, values, each, length, scale, fault);      \
    }                                                                                                                        \
    EXPORT(latent_attention_##NAME)                                                                                          \
    extern "C" __global__ void paged_latent_rope_##NAME(const T* q, const T* kv, const T* norm, const int* positions,        \
                                                        const int* slots, T* latents, const float* inverse, T* out,          \
                                                        int heads, int dim, int rank, int rotary, long long slots_end,       \
                                                        int context, float eps, int interleaved, float size,                 \
                                                        long long* fault) {                                                  \
        follow();                                                                                                            \
        rope_paged(q, kv, norm, positions, slots, latents, inverse, out, heads, dim, rank, rotary, slots_end, context, eps,  \
                   interleaved, size, fault);                                                                                \
    }                                                                                                                        \
    EXPORT(paged_latent_rope_##NAME)                                                                                         \
    extern "C" __global__ void paged_latent_attention_##NAME(                                                                \
        const T* q, const int* starts, const int* lengths, const int* pages, const T* latents, const T* up, T* out,          \
        int heads, int dim, int rank, int rotary, int values, int chunks, int page_rows, int pages_each, int page_count, float scale, long long* fault) {      \
        follow();                                                                                                                                              \
        attention_paged(q, starts, lengths, pages, latents, up, out, heads, dim, rank, rotary, values, chunks, page_rows,    \
                        pages_each, page_count, scale, fault);                                                               \
    }                                                                                                                        \
    EXPORT(paged_latent_attention_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
