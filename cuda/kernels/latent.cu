// Multi-head latent attention (DeepSeek-V2): the cache row of a token is its latent, then the rotated key of all heads.
#include "common.cuh"

using Index = long long;

constexpr int MAX_RANK = 1024, MAX_DIM = 512, EACH = MAX_RANK / THREADS;

// Channel pair i of `count` rotary channels: neighbours, or one of each half; it leaves as halves.
template <class T>
__device__ void rotate(const T* source, T* target, const float* inverse, float place, int count, int interleaved) {
    for (int i = threadIdx.x; i < count / 2; i += THREADS) {
        float low = widen(source[interleaved ? 2 * i : i]), high = widen(source[interleaved ? 2 * i + 1 : count / 2 + i]);
        float c = cosf(place * inverse[i]), s = sinf(place * inverse[i]);
        target[i] = narrow<T>(low * c - high * s);
        target[count / 2 + i] = narrow<T>(high * c + low * s);
    }
}

// One block a token (x) and a head of q (y), the last y for the cache. A place beyond `length` is left out.
template <class T>
__device__ void latent_rope(const T* q, const T* kv, const T* norm, const Index* positions, T* latents, const float* inverse, T* out,
                            int heads, int dim, int rank, int rotary, int each, Index length, float eps, int interleaved) {
    Index token = blockIdx.x;
    int head = blockIdx.y, sequence = static_cast<int>(token / each);
    Index place = positions[sequence] + token % each;
    if (head < heads) {
        const T* row = q + (token * heads + head) * dim;
        T* target = out + (token * heads + head) * dim;
        for (int i = threadIdx.x; i < dim - rotary; i += THREADS) target[i] = row[i];
        rotate(row + dim - rotary, target + dim - rotary, inverse, static_cast<float>(place), rotary, interleaved);
        return;
    }
    const T* row = kv + token * (rank + rotary);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < rank; i += THREADS) squares += widen(row[i]) * widen(row[i]);
    float scale = rsqrtf(over_block<Sum>(squares) / rank + eps);
    if (place < 0 || place >= length) return;
    T* target = latents + (sequence * length + place) * (rank + rotary);
    for (int i = threadIdx.x; i < rank; i += THREADS) target[i] = narrow<T>(widen(row[i]) * scale * widen(norm[i]));
    rotate(row + rank, target + rank, inverse, static_cast<float>(place), rotary, interleaved);
}

// One block a token (x) and head (y), with the up-projection folded into query and result; softmax kept running. Thread i
// mixes channels i, i + THREADS, ... of the latents.
template <class T>
__device__ void latent_attention(const T* q, const Index* positions, const T* latents, const T* up, T* out, int heads, int dim,
                                 int rank, int rotary, int values, int each, Index length, float scale) {
    __shared__ float query[MAX_RANK + MAX_DIM];
    __shared__ float weight[THREADS];
    Index token = blockIdx.x;
    int head = blockIdx.y, sequence = static_cast<int>(token / each), plain = dim - rotary, wide = rank + rotary;
    const T* mine = q + (token * heads + head) * dim;
    const T* keys_up = up + static_cast<Index>(head) * (plain + values) * rank;
    for (int r = threadIdx.x; r < rank; r += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < plain; i++) sum = fmaf(widen(mine[i]), widen(keys_up[static_cast<Index>(i) * rank + r]), sum);
        query[r] = sum * scale;
    }
    for (int i = threadIdx.x; i < rotary; i += THREADS) query[rank + i] = widen(mine[plain + i]) * scale;
    Index last = positions[sequence] + token % each + 1;
    int seen = static_cast<int>(last < 1 ? 1 : last > length ? length : last);
    const T* cache = latents + sequence * length * wide;
    float top = -infinity(), total = 0.0f, mixed[EACH] = {};
    __syncthreads();
    for (int first = 0; first < seen; first += THREADS) {
        int key = first + threadIdx.x, count = seen - first < THREADS ? seen - first : THREADS;
        float score = -infinity();
        if (key < seen) {
            score = 0.0f;
            for (int i = 0; i < wide; i++) score = fmaf(query[i], widen(cache[static_cast<Index>(key) * wide + i]), score);
        }
        float largest = fmaxf(top, over_block<Max>(score)), shrink = expf(top - largest);
        weight[threadIdx.x] = key < seen ? expf(score - largest) : 0.0f;
        total = total * shrink + over_block<Sum>(weight[threadIdx.x]);  // its barriers also publish the weights
        top = largest;
        for (int c = 0; c < EACH; c++) {
            int channel = threadIdx.x + c * THREADS;
            if (channel >= rank) continue;
            mixed[c] *= shrink;
            for (int i = 0; i < count; i++)
                mixed[c] = fmaf(weight[i], widen(cache[static_cast<Index>(first + i) * wide + channel]), mixed[c]);
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

#define OF_TYPE(T, NAME)                                                                                                     \
    extern "C" __global__ void latent_rope_##NAME(const T* q, const T* kv, const T* norm, const long long* positions,        \
                                                  T* latents, const float* inverse, T* out, int heads, int dim, int rank,    \
                                                  int rotary, int each, long long length, float eps, int interleaved) {      \
        latent_rope(q, kv, norm, positions, latents, inverse, out, heads, dim, rank, rotary, each, length, eps, interleaved); \
    }                                                                                                                        \
    EXPORT(latent_rope_##NAME)                                                                                               \
    extern "C" __global__ void latent_attention_##NAME(const T* q, const long long* positions, const T* latents,             \
                                                       const T* up, T* out, int heads, int dim, int rank, int rotary,        \
                                                       int values, int each, long long length, float scale) {                \
        latent_attention(q, positions, latents, up, out, heads, dim, rank, rotary, values, each, length, scale);             \
    }                                                                                                                        \
    EXPORT(latent_attention_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
