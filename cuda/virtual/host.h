// Builds CUDA kernels for the host. A grid is a loop over blocks; the threads of a block are fibers, so that barriers
// and warp exchanges mean what they mean on the device. Included before a .cu file; not part of the driver.
//
// Shared memory is static only: `extern __shared__` has no host build.
#pragma once
#include <setjmp.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernel_table.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static

namespace tgv {

struct Index {
    unsigned x, y, z;
};

enum class State { fresh, ready, at_block, at_warp, done };

struct Fiber {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    State state = State::fresh;
    unsigned thread = 0;  // its place in the block
    Index at{};
    uint64_t given = 0;  // what it offers to its warp
    jmp_buf back;        // where a thread goes on that only starts
};

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned WARP = 32;

struct Block {
    std::vector<Fiber> fibers;  // never grows past its reserve: threads hold pointers into it
    Fiber* of_thread[1024] = {};
    void* scheduler = nullptr;
    Fiber* current = nullptr;
    Index block{}, grid{}, size{};
    unsigned threads = 0, next = 0;
    void (*body)(void** params) = nullptr;
    void** params = nullptr;
    bool only_start = false;  // threads end where they wait for the kernel before
    size_t waited = 0;        // threads that did
};
inline Block block_state;

// Saves the callee-saved registers and the stack of one fiber and takes up those of another.
extern "C" void tgv_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.weak tgv_switch
.hidden tgv_switch
tgv_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void* fresh_stack(unsigned char* top, void (*entry)()) {
    auto* at = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 1;
    *at-- = 0;  // where entry would return to; it never does, and the stack is aligned as after a call
    *at = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; i++) *--at = 0;
    return at;
}
#elif defined(__aarch64__)
asm(R"(
.text
.weak tgv_switch
.hidden tgv_switch
tgv_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
inline void* fresh_stack(unsigned char* top, void (*entry)()) {
    auto* at = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 20;
    std::memset(at, 0, 160);
    at[11] = reinterpret_cast<uint64_t>(entry);
    return at;
}
#else
#error "the host build of kernels knows x86-64 and aarch64"
#endif

inline void yield(State state) {
    auto* fiber = block_state.current;
    fiber->state = state;
    tgv_switch(&fiber->stack_pointer, block_state.scheduler);
}

// A fiber runs one thread after another until one of them waits; that thread then keeps the fiber.
inline void fiber_main() {
    auto& b = block_state;
    for (;;) {
        auto* fiber = b.current;
        while (b.next < b.threads) {
            fiber->thread = b.next++;
            b.of_thread[fiber->thread] = fiber;
            fiber->at = {fiber->thread % b.size.x, fiber->thread / b.size.x % b.size.y, fiber->thread / (b.size.x * b.size.y)};
            if (_setjmp(fiber->back)) block_state.waited++;
            else b.body(b.params);
        }
        yield(State::done);
    }
}

inline void resume(Fiber& fiber) {
    auto& b = block_state;
    fiber.state = State::ready;
    b.current = &fiber;
    tgv_switch(&b.scheduler, fiber.stack_pointer);
}

// Wakes the threads of a barrier whose other threads have all arrived or ended. False: nobody could be woken.
inline bool release_barriers(size_t used) {
    auto& b = block_state;
    size_t waiting = 0, at_block = 0;
    bool woken = false;
    for (size_t i = 0; i < used; i++) {
        waiting += b.fibers[i].state == State::at_block || b.fibers[i].state == State::at_warp;
        at_block += b.fibers[i].state == State::at_block;
    }
    if (waiting && at_block == waiting) {
        for (size_t i = 0; i < used; i++)
            if (b.fibers[i].state == State::at_block) b.fibers[i].state = State::ready;
        return true;
    }
    std::vector<char> blocked(b.threads / WARP + 1, 0);
    for (size_t i = 0; i < used; i++)
        if (b.fibers[i].state == State::at_block) blocked[b.fibers[i].thread / WARP] = 1;
    for (size_t i = 0; i < used; i++)
        if (b.fibers[i].state == State::at_warp && !blocked[b.fibers[i].thread / WARP]) {
            b.fibers[i].state = State::ready;
            woken = true;
        }
    return woken;
}

// False: threads wait for each other at different barriers.
inline bool run_block() {
    auto& b = block_state;
    b.next = 0;
    size_t used = 0;
    for (;;) {
        while (b.next < b.threads) {
            if (used == b.fibers.size()) b.fibers.emplace_back();
            auto& fiber = b.fibers[used++];
            if (!fiber.stack) fiber.stack = new unsigned char[STACK_BYTES];
            if (fiber.state != State::done) fiber.stack_pointer = fresh_stack(fiber.stack + STACK_BYTES, fiber_main);
            resume(fiber);
        }
        size_t running = 0;
        for (size_t i = 0; i < used; i++) running += b.fibers[i].state != State::done;
        if (!running) return true;
        if (!release_barriers(used)) {
            for (auto& fiber : b.fibers) fiber.state = State::fresh;
            return false;
        }
        for (size_t i = 0; i < used; i++)
            if (b.fibers[i].state == State::ready) resume(b.fibers[i]);
    }
}

template <class T>
T exchanged(T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    auto& b = block_state;
    auto* me = b.current;
    std::memcpy(&me->given, &value, sizeof value);
    yield(State::at_warp);
    unsigned source = me->thread / WARP * WARP + from % WARP;
    T got = value;
    if (source < b.threads) std::memcpy(&got, &b.of_thread[source]->given, sizeof got);
    yield(State::at_warp);
    return got;
}

inline unsigned lane() { return block_state.current->thread % WARP; }

// -------------------------------------------------------------------------------- kernels in the table

template <class F>
struct Signature;
template <class... A>
struct Signature<void (*)(A...)> {
    static constexpr size_t sizes[] = {sizeof(A)..., 0};
    static constexpr char kinds[] = {(std::is_pointer_v<A> ? 'p' : 'v')..., 0};
    template <void (*K)(A...), size_t... I>
    static void call(void** params, std::index_sequence<I...>) {
        K(*static_cast<std::remove_reference_t<A>*>(params[I])...);
    }
    template <void (*K)(A...)>
    static void body(void** params) {
        call<K>(params, std::index_sequence_for<A...>{});
    }
    template <void (*K)(A...)>
    static size_t start(const unsigned grid[3], const unsigned block[3], void** params) {
        char ignored[160];
        block_state.only_start = true;
        block_state.waited = 0;
        all_blocks<K>(grid, block, params, ignored, sizeof ignored);
        return block_state.waited;
    }
    template <void (*K)(A...)>
    static void run(const unsigned grid[3], const unsigned block[3], void** params, char* error, size_t error_bytes) {
        block_state.only_start = false;
        all_blocks<K>(grid, block, params, error, error_bytes);
    }
    template <void (*K)(A...)>
    static void all_blocks(const unsigned grid[3], const unsigned block[3], void** params, char* error, size_t error_bytes) {
        auto& b = block_state;
        b.grid = {grid[0], grid[1], grid[2]};
        b.size = {block[0], block[1], block[2]};
        b.threads = block[0] * block[1] * block[2];
        b.fibers.reserve(1024);
        b.body = &body<K>;
        b.params = params;
        for (auto& fiber : b.fibers)
            if (fiber.state != State::done) fiber.state = State::fresh;  // a fault left it in the middle
        for (unsigned z = 0; z < grid[2]; z++)
            for (unsigned y = 0; y < grid[1]; y++)
                for (unsigned x = 0; x < grid[0]; x++) {
                    b.block = {x, y, z};
                    if (run_block()) continue;
                    snprintf(error, error_bytes, "block (%u, %u, %u): threads wait at different barriers", x, y, z);
                    return;
                }
    }
    template <void (*K)(A...)>
    static HostKernel kernel(const char* name) {
        return {name, sizeof...(A), sizes, kinds, &run<K>, &start<K>};
    }
};

inline std::vector<HostKernel>& table() {
    static std::vector<HostKernel> kernels;
    return kernels;
}
struct Listed {
    explicit Listed(HostKernel kernel) { table().push_back(kernel); }
};

}  // namespace tgv

#define EXPORT(NAME) static const tgv::Listed NAME##_listed(tgv::Signature<decltype(&NAME)>::kernel<&NAME>(#NAME));

#define threadIdx (tgv::block_state.current->at)
#define blockIdx (tgv::block_state.block)
#define blockDim (tgv::block_state.size)
#define gridDim (tgv::block_state.grid)
// What `griddepcontrol.wait` is on a device: see `follow` in common.cuh.
#define FOLLOW tgv::follow()
namespace tgv {
inline void follow() {
    if (block_state.only_start) _longjmp(block_state.current->back, 1);
}
}  // namespace tgv
inline void __syncthreads() { tgv::yield(tgv::State::at_block); }
inline void __syncwarp(unsigned = ~0u) { tgv::yield(tgv::State::at_warp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return tgv::exchanged(value, tgv::lane() ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return tgv::exchanged(value, static_cast<unsigned>(from));
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T __ldg(const T* at) {
    return *at;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
template <class T>
T atomicAdd(T* at, T value) {  // a thread runs until it waits, and blocks run one after another
    T before = *at;
    *at += value;
    return before;
}
inline long long clock64() {
    static long long ticks = 0;
    return ticks += 1000;
}
using std::fmaf;
using std::max;
using std::min;
