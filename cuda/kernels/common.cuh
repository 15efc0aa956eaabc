// What all kernels share: bf16 as bits, widening and narrowing, reductions over a block.
#pragma once
#ifndef EXPORT
#define EXPORT(NAME)  // a host build lists the kernel here
#if __CUDA_ARCH__ >= 900
#define FOLLOW asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory")
#else
#define FOLLOW
#endif
#endif

// What every kernel does before it touches memory, so that it may be launched while the kernel before it on its lane
// still runs: it waits until that one has ended and its memory is seen, and lets the next one be launched, which waits
// in turn. Without such a launch it waits for nothing (PTX ISA, "griddepcontrol").
__device__ __forceinline__ void follow() { FOLLOW; }

struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {  // round to nearest, ties to even; a NaN stays one
    unsigned bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    unsigned rounded = nan ? (bits | 0x400000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
    return bf16{static_cast<unsigned short>(rounded >> 16)};
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }  // NVRTC has no INFINITY
constexpr int WARP = 32;
constexpr int THREADS = 128;  // of a block, in the kernels that reduce over one

struct Sum {
    __device__ static float identity() { return 0.0f; }
    __device__ static float join(float a, float b) { return a + b; }
};
struct Max {
    __device__ static float identity() { return -infinity(); }
    __device__ static float join(float a, float b) { return fmaxf(a, b); }
};

// The reduction of one value a thread over a block of THREADS threads, given to all of them.
template <class Op>
__device__ __forceinline__ float over_block(float value) {
    __shared__ float parts[THREADS / WARP];
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        value = Op::join(value, __shfl_xor_sync(0xffffffffu, value, offset));
    __syncthreads();  // the parts of an earlier call have been read
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    float whole = Op::identity();
    for (int i = 0; i < THREADS / WARP; i++) whole = Op::join(whole, parts[i]);
    return whole;
}

// What an op was given that it cannot use. The word at `fault` is the op's own, in memory that the host reads after a
// replay: what it is, and its value in the lower 48 bits; one of them, where there are several. The kernel goes on
// without it, within its buffers.
enum Fault : long long { TOKEN = 1, POSITION, SLOT, PAGE, LENGTH, CHUNK, INDEX };

__device__ __forceinline__ void report(long long* fault, Fault what, long long value) {
    *static_cast<volatile long long*>(fault) = (static_cast<long long>(what) << 48) | (value & 0xffffffffffffll);
}

struct Block {
    int x, y, z;
};

// The blocks of a grid of nx by ny by nz, as many at a time as were launched: a small launch keeps to few SMs. They
// follow the kernel before.
template <class Body>
__device__ __forceinline__ void each_block(int nx, int ny, int nz, Body body) {
    follow();
    long long count = static_cast<long long>(nx) * ny * nz;
    for (long long i = blockIdx.x; i < count; i += gridDim.x) {
        if (i != blockIdx.x) __syncthreads();  // what the block before had in shared memory has been read
        body(Block{static_cast<int>(i % nx), static_cast<int>(i / nx % ny), static_cast<int>(i / nx / ny)});
    }
}
