// Moving bytes: pages of a KV cache gathered and scattered, and a copy that takes only the SMs of its grid, for
// transfers between pinned host memory and the device beside other work.
#include "common.cuh"

using Index = long long;

struct alignas(16) Bytes16 {
    unsigned part[4];
};

// Page i of `out` is page table[i] of `pool`; a page is `units` times 16 bytes. One block a page.
extern "C" __global__ void gather_pages(const Bytes16* pool, const int* table, Bytes16* out, long long units) {
    follow();
    const Bytes16* from = pool + table[blockIdx.x] * units;
    Bytes16* to = out + static_cast<Index>(blockIdx.x) * units;
    for (Index i = threadIdx.x; i < units; i += blockDim.x) to[i] = from[i];
}
EXPORT(gather_pages)

// Page table[i] of `pool` becomes page i of `pages`.
extern "C" __global__ void scatter_pages(const Bytes16* pages, const int* table, Bytes16* pool, long long units) {
    follow();
    const Bytes16* from = pages + static_cast<Index>(blockIdx.x) * units;
    Bytes16* to = pool + table[blockIdx.x] * units;
    for (Index i = threadIdx.x; i < units; i += blockDim.x) to[i] = from[i];
}
EXPORT(scatter_pages)

// Page pairs[2i] of `source` becomes page pairs[2i + 1] of `target` for every i with neither below 0; `done` is how
// many. A page that does not exist is reported and left out. The grid bounds the SMs, and a page is `units` times 4 bytes.
extern "C" __global__ void copy_pages(const unsigned* source, unsigned* target, const int* pairs, int* done, int count,
                                      long long units, int source_pages, int target_pages, long long* fault) {
    follow();
    int copied = 0;
    for (int i = 0; i < count; i++) {
        int from = pairs[2 * i], to = pairs[2 * i + 1];
        if (from < 0 || to < 0) continue;
        if (from >= source_pages || to >= target_pages) {
            if (threadIdx.x == 0) report(fault, PAGE, from >= source_pages ? from : to);
            continue;
        }
        if (copied++ % gridDim.x != blockIdx.x) continue;
        for (Index at = threadIdx.x; at < units; at += blockDim.x) target[to * units + at] = source[from * units + at];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *done = copied;
}
EXPORT(copy_pages)

// The grid bounds the SMs: at most one block on each of gridDim.x of them is busy.
extern "C" __global__ void copy_on_sms(const Bytes16* from, Bytes16* to, long long units) {
    follow();
    Index stride = static_cast<Index>(gridDim.x) * blockDim.x;
    for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < units; i += stride) to[i] = from[i];
}
EXPORT(copy_on_sms)

extern "C" __global__ void copy_bytes_on_sms(const unsigned char* from, unsigned char* to, long long bytes) {
    follow();
    Index stride = static_cast<Index>(gridDim.x) * blockDim.x;
    for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) to[i] = from[i];
}
EXPORT(copy_bytes_on_sms)
