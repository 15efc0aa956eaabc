// Elements that move between axes: strided copies, and entries picked by an index.
#include "common.cuh"

using Index = long long;

namespace {

constexpr int MOST_AXES = 6, ROW = 1 + 2 * MOST_AXES;

struct Sixteen {
    unsigned words[4];
};

// Element i along axes whose number, sizes and strides are in `table`, last axis first.
__device__ __forceinline__ Index place(const Index* table, Index i) {
    int axes = static_cast<int>(__ldg(table));
    Index at = 0;
    for (int axis = 0; axis < axes; axis++) {
        Index step = __ldg(table + 1 + MOST_AXES + axis);
        if (axis + 1 == axes) return at + i * step;
        Index size = __ldg(table + 1 + axis);
        Index rest = (i | size) >> 32 ? i / size : static_cast<unsigned>(i) / static_cast<unsigned>(size);
        at += (i - rest * size) * step;
        i = rest;
    }
    return at;
}

template <class Unit>
__device__ void move(const Unit* x, Unit* out, const Index* table, Index total) {
    Index across = static_cast<Index>(gridDim.x) * blockDim.x;
    for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += across)
        out[place(table + ROW, i)] = x[place(table, i)];
}

// out (outer, n, inner) = x (outer, length, inner) at index (n), or at index (outer, n, inner) where `along`. An index
// outside is reported and gives zeros.
template <class Unit, class Number>
__device__ void gather(const Unit* x, const Number* index, Unit* out, Index n, Index length, Index inner, int along,
                       Index total, long long* fault) {
    Index across = static_cast<Index>(gridDim.x) * blockDim.x;
    for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += across) {
        Index row = i / inner, outer = row / n;
        Index at = static_cast<Index>(index[along ? i : row - outer * n]);
        bool known = at >= 0 && at < length;
        if (!known) report(fault, INDEX, at);
        out[i] = known ? x[(outer * length + at) * inner + (i - row * inner)] : Unit{};
    }
}

}  // namespace

#define MOVE(UNIT, NAME)                                                                                             \
    extern "C" __global__ void move_##NAME(const UNIT* x, UNIT* out, const long long* table, long long total) {      \
        follow();                                                                                                    \
        move(x, out, table, total);                                                                                  \
    }                                                                                                                \
    EXPORT(move_##NAME)
MOVE(unsigned char, b1)
MOVE(unsigned short, b2)
MOVE(unsigned, b4)
MOVE(long long, b8)
MOVE(Sixteen, b16)

#define GATHER(UNIT, NAME, NUMBER, NUMBER_NAME)                                                                      \
    extern "C" __global__ void gather_##NAME##_##NUMBER_NAME(                                                        \
        const UNIT* x, const NUMBER* index, UNIT* out, long long n, long long length, long long inner, int along,    \
        long long total, long long* fault) {                                                                         \
        follow();                                                                                                    \
        gather(x, index, out, n, length, inner, along, total, fault);                                                \
    }                                                                                                                \
    EXPORT(gather_##NAME##_##NUMBER_NAME)
#define GATHERS(UNIT, NAME)           \
    GATHER(UNIT, NAME, int, i32)      \
    GATHER(UNIT, NAME, long long, i64)
GATHERS(unsigned char, b1)
GATHERS(unsigned short, b2)
GATHERS(unsigned, b4)
GATHERS(long long, b8)
GATHERS(Sixteen, b16)
