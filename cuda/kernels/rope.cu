// Rotary embedding, halves rotated (Su et al. 2021; Hugging Face layout), alone and fused with the write of the KV
// cache.
#include "common.cuh"

using Index = long long;

struct Pair {
    float low, high;
};

__device__ __forceinline__ Pair rotated(float low, float high, float angle) {
    float c = cosf(angle), s = sinf(angle);
    return {low * c - high * s, high * c + low * s};
}

// One block a token and head.
template <class T>
__device__ void rope(Block block, const T* x, const Index* positions, const float* inverse, T* out, int heads,
                     int dim) {
    Index at = (static_cast<Index>(block.x) * heads + block.y) * dim;
    float position = static_cast<float>(positions[block.x]);
    for (int i = threadIdx.x; i < dim / 2; i += blockDim.x) {
        Pair r = rotated(widen(x[at + i]), widen(x[at + dim / 2 + i]), position * inverse[i]);
        out[at + i] = narrow<T>(r.low);
        out[at + dim / 2 + i] = narrow<T>(r.high);
    }
}

// One head of a fused row: normalised where there is a norm, rotated and multiplied by `size` where it is no value, written
// to `target`.
template <class T>
__device__ void turn_head(const T* row, const T* norm, const float* inverse, T* target, int dim, float eps, float size,
                          float place, bool is_value, bool writes) {
    float scale = 1.0f;
    if (norm && !is_value) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < dim; i += THREADS) squares += widen(row[i]) * widen(row[i]);
        scale = rsqrtf(over_block<Sum>(squares) / dim + eps);
    }
    if (!writes) return;
    for (int i = threadIdx.x; i < dim / 2; i += THREADS) {
        Pair p = {widen(row[i]), widen(row[dim / 2 + i])};
        if (norm && !is_value) p = {p.low * scale * widen(norm[i]), p.high * scale * widen(norm[dim / 2 + i])};
        if (!is_value) p = rotated(p.low * size, p.high * size, place * inverse[i]);
        target[i] = narrow<T>(p.low);
        target[dim / 2 + i] = narrow<T>(p.high);
    }
}

// One block a token (x) and a head of the fused row (y): queries, then keys, then values. The caches are
// (batch, kv heads, length, dim); a place beyond `length` is reported and left out. q_norm and k_norm may be null.
template <class T>
__device__ void rope_kv(Block block, const T* qkv, const Index* positions, T* keys, T* values, const T* q_norm,
                        const T* k_norm, const float* inverse, T* out, int heads, int kv_heads, int dim, int each,
                        Index length, float eps, float size, long long* fault) {
    int token = block.x, head = block.y, sequence = token / each;
    const T* row = qkv + (static_cast<Index>(token) * (heads + 2 * kv_heads) + head) * dim;
    Index place = positions[sequence] + token % each;
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    int kv_head = (head - heads) % kv_heads;
    T* cache =
        (is_value ? values : keys) + ((static_cast<Index>(sequence) * kv_heads + kv_head) * length + place) * dim;
    T* target = is_query ? out + (static_cast<Index>(token) * heads + head) * dim : cache;
    bool writes = is_query || (place >= 0 && place < length);
    if (!writes && threadIdx.x == 0) report(fault, POSITION, positions[sequence]);
    turn_head(row, is_query ? q_norm : k_norm, inverse, target, dim, eps, size, static_cast<float>(place), is_value,
              writes);
}

// The same on pages (page, kv head, page_rows, wide): token i stands at positions[i] and goes to slots[i], which is
// page * page_rows + row, or below 0 for nowhere; `slots_end` is beyond the last, and `context` beyond the last position.
template <class T>
__device__ void paged_rope(Block block, const T* qkv, const int* positions, const int* slots, T* keys, T* values,
                           const T* q_norm, const T* k_norm, const float* inverse, T* out, int heads, int kv_heads,
                           int dim, int page_rows, int wide, Index slots_end, int context, float eps, float size,
                           long long* fault) {
    int token = block.x, head = block.y;
    const T* row = qkv + (static_cast<Index>(token) * (heads + 2 * kv_heads) + head) * dim;
    Index slot = slots[token];
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    bool writes = is_query || (slot >= 0 && slot < slots_end);
    if (threadIdx.x == 0 && slot >= slots_end) report(fault, SLOT, slot);
    if (threadIdx.x == 0 && (positions[token] < 0 || positions[token] >= context)) report(fault, POSITION, positions[token]);
    int kv_head = (head - heads) % kv_heads;
    Index at = writes ? ((slot / page_rows * kv_heads + kv_head) * page_rows + slot % page_rows) * wide : 0;
    T* target = is_query ? out + (static_cast<Index>(token) * heads + head) * dim : (is_value ? values : keys) + at;
    float place = static_cast<float>(positions[token]);
    turn_head(row, is_query ? q_norm : k_norm, inverse, target, dim, eps, size, place, is_value, writes);
}

#define OF_TYPE(T, NAME)                                                                                               \
    extern "C" __global__ void rope_##NAME(const T* x, const long long* positions, const float* inverse, T* out,       \
                                           int heads, int dim, int nx, int ny, int nz) {                               \
        each_block(nx, ny, nz, [&](Block block) { rope(block, x, positions, inverse, out, heads, dim); });             \
    }                                                                                                                  \
    EXPORT(rope_##NAME)                                                                                                \
    extern "C" __global__ void paged_rope_##NAME(const T* qkv, const int* positions, const int* slots, T* keys,        \
                                                 T* values, const T* q_norm, const T* k_norm, const float* inverse,    \
                                                 T* out, int heads, int kv_heads, int dim, int page_rows, int wide,    \
                                                 long long slots_end, int context, float eps, float size,              \
                                                 long long* fault, int nx, int ny, int nz) {                           \
        each_block(nx, ny, nz, [&](Block block) {                                                                      \
            paged_rope(block, qkv, positions, slots, keys, values, q_norm, k_norm, inverse, out, heads, kv_heads, dim, \
                       page_rows, wide, slots_end, context, eps, size, fault);                                                         \
        });                                                                                                            \
    }                                                                                                                  \
    EXPORT(paged_rope_##NAME)                                                                                          \
    extern "C" __global__ void rope_kv_##NAME(const T* qkv, const long long* positions, T* keys, T* values,            \
                                              const T* q_norm, const T* k_norm, const float* inverse, T* out,          \
                                              int heads, int kv_heads, int dim, int each, long long length, float eps, \
                                              float size, long long* fault, int nx, int ny, int nz) {                  \
        each_block(nx, ny, nz, [&](Block block) {                                                                      \
            rope_kv(block, qkv, positions, keys, values, q_norm, k_norm, inverse, out, heads, kv_heads, dim, each,     \
                    length, eps, size, fault);                                                                                \
        });                                                                                                            \
    }                                                                                                                  \
    EXPORT(rope_kv_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
