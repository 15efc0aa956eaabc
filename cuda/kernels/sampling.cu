// Tokens from logits at a temperature, cut to top-k and top-p, and the feed of tokens that were drawn before.
//
// Weights are whole numbers, floor(2^40 exp((x - max) / temperature)), so that sums do not depend on their order: a draw
// is the same on every backend, but for the last bit of an exponential. A cut row is not sorted. The place where sums of
// the likeliest entries cross a border is found digit by digit of the entries' bits, as a radix sort would go.
#include "common.cuh"

using Weight = unsigned long long;

constexpr int DRAWERS = 512;  // threads of a block
constexpr int BITS = 11, BINS = 1 << BITS, GROUPS = 64, IN_GROUP = BINS / GROUPS;
constexpr unsigned NO_COUNT = 0xffffffffu;
constexpr Weight NO_WEIGHT = ~0ull;

// The first bin at which the sum of counts reaches one border or that of weights the other; what is before it, and in it.
struct Found {
    int bin;  // BINS: there is none
    unsigned before, count;
    Weight weight_before, weight;
};

struct Bins {
    Weight weight[BINS], group_weight[GROUPS];
    unsigned count[BINS], group_count[GROUPS];
    Found found;
};

template <class T>
struct Row {
    const T* x;
    int columns;
    float peak, temperature;

    __device__ Weight weight(float x) const {
        return static_cast<Weight>(expf((x - peak) / temperature) * 1099511627776.0f);  // by a power of two: exact
    }
    // Whole numbers in the order of the likeliest first; equal for equal entries.
    __device__ static unsigned key(float x) {
        unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
        return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
    }
};

__device__ void clear(Bins& bins) {
    __syncthreads();  // what was there has been read
    for (int i = threadIdx.x; i < BINS; i += DRAWERS) bins.weight[i] = 0, bins.count[i] = 0;
    __syncthreads();
}

// Sums of the groups of bins, and of all bins, once they are full.
__device__ Weight sum(Bins& bins) {
    __syncthreads();
    if (threadIdx.x < GROUPS) {
        Weight weight = 0;
        unsigned count = 0;
        for (int i = 0; i < IN_GROUP; i++) {
            weight += bins.weight[threadIdx.x * IN_GROUP + i];
            count += bins.count[threadIdx.x * IN_GROUP + i];
        }
        bins.group_weight[threadIdx.x] = weight;
        bins.group_count[threadIdx.x] = count;
    }
    __syncthreads();
    Weight whole = 0;
    for (int i = 0; i < GROUPS; i++) whole += bins.group_weight[i];
    return whole;
}

__device__ bool crossed(unsigned count, Weight weight, unsigned most, Weight heaviest) {
    return count >= most || weight >= heaviest;
}

// After `sum`; given to all threads.
__device__ Found find(Bins& bins, unsigned most, Weight heaviest) {
    if (threadIdx.x == 0) {
        unsigned count = 0;
        Weight weight = 0;
        int group = 0, bin = BINS;
        while (group < GROUPS && !crossed(count + bins.group_count[group], weight + bins.group_weight[group], most, heaviest))
            count += bins.group_count[group], weight += bins.group_weight[group], group++;
        if (group < GROUPS) {
            bin = group * IN_GROUP;
            while (!crossed(count + bins.count[bin], weight + bins.weight[bin], most, heaviest))
                count += bins.count[bin], weight += bins.weight[bin], bin++;
            bins.found = Found{bin, count, bins.count[bin], weight, bins.weight[bin]};
        } else {
            bins.found = Found{BINS, count, 0, weight, 0};
        }
    }
    __syncthreads();
    return bins.found;
}

// Bins by one digit of the keys, of the entries whose higher digits are `prefix`.
template <class T>
__device__ void fill(Bins& bins, const Row<T>& row, int shift, int bits, unsigned prefix) {
    clear(bins);
    for (int i = threadIdx.x; i < row.columns; i += DRAWERS) {
        float x = widen(row.x[i]);
        unsigned key = Row<T>::key(x);
        if (shift + bits < 32 && key >> (shift + bits) != prefix) continue;
        unsigned bin = key >> shift & ((1u << bits) - 1);
        atomicAdd(&bins.weight[bin], row.weight(x));
        atomicAdd(&bins.count[bin], 1u);
    }
}

// The entries with one key at which sums cross a border; `none`: they stay below it.
struct Level {
    bool none;
    unsigned key;
    Found at;
};

template <class T>
__device__ Level descend(Bins& bins, const Row<T>& row, unsigned most, Weight heaviest) {
    unsigned key = 0, before = 0;
    Weight weight_before = 0;
    Found at{};
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
        int bits = shift ? BITS : 10;
        fill(bins, row, shift, bits, key);
        sum(bins);
        at = find(bins, most == NO_COUNT ? NO_COUNT : most - before, heaviest == NO_WEIGHT ? NO_WEIGHT : heaviest - weight_before);
        if (at.bin == BINS) return Level{true, 0, at};
        before += at.before;
        weight_before += at.weight_before;
        key = key << bits | static_cast<unsigned>(at.bin);
    }
    at.before = before;
    at.weight_before = weight_before;
    return Level{false, key, at};
}

__device__ Weight whole_part(double x, Weight least, Weight most) {
    if (!(x > static_cast<double>(least))) return least;
    return x >= static_cast<double>(most) ? most : static_cast<Weight>(x);
}

// The weight of the entries that both cuts leave, of `total` in all.
template <class T>
__device__ Weight kept_weight(Bins& bins, const Row<T>& row, int top_k, double top_p, Weight total) {
    unsigned most = top_k > 0 ? static_cast<unsigned>(top_k) : NO_COUNT;
    Weight heaviest = top_p < 1.0 ? whole_part(ceil(top_p * static_cast<double>(total)), 1, total) : NO_WEIGHT;
    Level last = descend(bins, row, most, heaviest);
    if (last.none) return total;
    Weight each = last.at.weight / last.at.count, left = last.at.count;
    if (most != NO_COUNT && most - last.at.before < left) left = most - last.at.before;
    if (heaviest != NO_WEIGHT && each > 0) {
        Weight needed = (heaviest - last.at.weight_before + each - 1) / each;
        if (needed < left) left = needed;
    }
    return last.at.weight_before + left * each;
}

// Bins by stretches of columns, of what `part(x, weight, count)` says of an entry; the columns of a stretch.
template <class T, class Part>
__device__ int fill_stretches(Bins& bins, const Row<T>& row, Part part) {
    int length = (row.columns + BINS - 1) / BINS;
    length = (length + WARP - 1) / WARP * WARP;
    clear(bins);
    int lane = threadIdx.x % WARP;
    for (int stretch = threadIdx.x / WARP; stretch * length < row.columns; stretch += DRAWERS / WARP) {
        Weight weight = 0;
        unsigned count = 0;
        for (int i = lane; i < length; i += WARP)
            if (stretch * length + i < row.columns) part(widen(row.x[stretch * length + i]), weight, count);
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            weight += __shfl_xor_sync(0xffffffffu, weight, offset);
            count += __shfl_xor_sync(0xffffffffu, count, offset);
        }
        if (lane == 0) bins.weight[stretch] = weight, bins.count[stretch] = count;
    }
    return length;
}

// The column at which the sums over all columns cross a border, after `sum`; of thread 0.
template <class T, class Part>
__device__ int column(Bins& bins, const Row<T>& row, int length, unsigned most, Weight heaviest, Part part) {
    Found in = find(bins, most, heaviest);
    if (threadIdx.x != 0 || in.bin == BINS) return row.columns - 1;
    unsigned count = in.before;
    Weight weight = in.weight_before;
    int at = in.bin * length;
    for (; at < row.columns - 1; at++) {
        part(widen(row.x[at]), weight, count);
        if (crossed(count, weight, most, heaviest)) break;
    }
    return at;
}

template <class T>
__device__ int drawn(Bins& bins, const Row<T>& row, int top_k, double top_p, double uniform) {
    auto weigh = [&](float x, Weight& weight, unsigned&) { weight += row.weight(x); };
    int length = fill_stretches(bins, row, weigh);
    Weight total = sum(bins);
    if (top_k <= 0 && !(top_p < 1.0))
        return column(bins, row, length, NO_COUNT, whole_part(uniform * static_cast<double>(total), 0, total - 1) + 1, weigh);
    Weight kept = kept_weight(bins, row, top_k, top_p, total);
    Weight target = whole_part(uniform * static_cast<double>(kept), 0, kept - 1);
    Level at = descend(bins, row, NO_COUNT, target + 1);
    Weight each = at.none ? 0 : at.at.weight / at.at.count;
    unsigned place = each ? static_cast<unsigned>((target - at.at.weight_before) / each) : 0;  // among equal entries
    auto same = [&](float x, Weight&, unsigned& count) { count += Row<T>::key(x) == at.key; };
    length = fill_stretches(bins, row, same);
    sum(bins);
    return column(bins, row, length, place + 1, NO_WEIGHT, same);
}

// One block a row.
template <class T>
__device__ void draw(Block block, const T* logits, const long long* likeliest, const float* temperature, const int* top_k,
                     const double* top_p, const double* uniform, long long* out, long long* kept, int columns,
                     long long* fault) {
    __shared__ Bins bins;
    int r = block.x;
    long long token = likeliest[r];
    const T* x = logits + static_cast<long long>(r) * columns;
    if (token < 0 || token >= columns) {
        if (threadIdx.x == 0) report(fault, INDEX, token);
        token = -1;
    } else {
        float peak = widen(x[token]);
        if (peak != peak || peak == infinity() || peak == -infinity()) token = -1;
        else if (temperature[r] >= 1e-5f)
            token = drawn(bins, Row<T>{x, columns, peak, temperature[r]}, top_k[r], top_p[r], uniform[r]);
    }
    if (threadIdx.x != 0) return;
    out[r] = token;
    if (kept) kept[r] = token;
}

#define OF_TYPE(T, NAME)                                                                                              \
    extern "C" __global__ void __launch_bounds__(DRAWERS)                                                             \
        draw_##NAME(const T* logits, const long long* likeliest, const float* temperature, const int* top_k,          \
                    const double* top_p, const double* uniform, long long* out, long long* kept, int columns,         \
                    long long* fault, int nx, int ny, int nz) {                                                       \
        each_block(nx, ny, nz, [&](Block block) {                                                                     \
            draw(block, logits, likeliest, temperature, top_k, top_p, uniform, out, kept, columns, fault);            \
        });                                                                                                           \
    }                                                                                                                 \
    EXPORT(draw_##NAME)
OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)

// Tokens, or what was drawn last; -1 there is a token too, for its sequence ends.
extern "C" __global__ void feed(const long long* tokens, const int* sources, const long long* kept, long long* out,
                                int count, int kept_count, long long vocabulary, long long* fault) {
    follow();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        int source = sources[i];
        long long token = tokens[i];
        if (source >= kept_count) report(fault, INDEX, source);
        else if (source >= 0) {
            token = kept[source];
            token = token < 0 ? 0 : token >= vocabulary ? vocabulary - 1 : token;
        }
        out[i] = token;
    }
}
EXPORT(feed)
