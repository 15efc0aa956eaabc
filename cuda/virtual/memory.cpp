// Device and pinned host memory. Each allocation stands against a page that cannot be touched, freed memory becomes such
// a page, and fresh memory holds a pattern that reads as NaN: overruns, use after free and missing writes show.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "state.h"

namespace tgv {

constexpr size_t ALIGNMENT = 256;  // CUDA Programming Guide: cuMemAlloc aligns to at least 256 bytes
constexpr int FRESH = 0xFF;        // a NaN in every float format

const Allocation* allocation_at(uintptr_t address) {
    auto& memory = machine().memory;
    auto found = memory.upper_bound(address);  // keyed by the end of the bytes
    if (found == memory.end()) return nullptr;
    auto begin = reinterpret_cast<uintptr_t>(found->second.base);
    return address >= begin && address < begin + found->second.bytes ? &found->second : nullptr;
}

std::string describe(uintptr_t address) {
    char text[160];
    for (auto& [end, a] : machine().memory) {
        auto begin = reinterpret_cast<uintptr_t>(a.base), page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        if (address < begin - page || address >= end + page) continue;
        long long past = static_cast<long long>(address) - static_cast<long long>(begin + a.bytes);
        const char* state = a.alive ? "" : "freed ";
        if (address < begin) snprintf(text, sizeof text, "%zu bytes before the %sallocation of %zu bytes", begin - address, state, a.bytes);
        else if (past >= 0) snprintf(text, sizeof text, "%lld bytes past the %sallocation of %zu bytes", past, state, a.bytes);
        else snprintf(text, sizeof text, "byte %zu of the %sallocation of %zu bytes", address - begin, state, a.bytes);
        return text;
    }
    snprintf(text, sizeof text, "address 0x%zx, in no allocation", address);
    return text;
}

void check_range(uintptr_t address, size_t bytes, const char* what, bool device) {
    const auto* a = allocation_at(address);
    if (!a) {
        auto near_one = describe(address);
        bool known = near_one.find("in no allocation") == std::string::npos;
        if (!device && !known) return;  // pageable host memory
        refuse(ILLEGAL_ADDRESS, "%s %s", what, near_one.c_str());
    }
    if (!a->alive) refuse(ILLEGAL_ADDRESS, "%s memory after free: %s", what, describe(address).c_str());
    auto left = reinterpret_cast<uintptr_t>(a->base) + a->bytes - address;
    if (bytes > left)
        refuse(ILLEGAL_ADDRESS, "%s %zu bytes, out of bounds: %zu are left in the allocation of %zu", what, bytes, left, a->bytes);
}

static void* allocate(size_t bytes, char kind) {
    auto& m = machine();
    if (!bytes) refuse(INVALID_VALUE, "an allocation of 0 bytes");
    if (m.settings.fail_alloc > 0 && --m.settings.fail_alloc == 0) refuse(OUT_OF_MEMORY, "injected: allocation failed");
    if (kind == 'd' && bytes > m.settings.memory_bytes - m.used_bytes)
        refuse(OUT_OF_MEMORY, "%zu bytes asked for, %zu of %zu are free", bytes, m.settings.memory_bytes - m.used_bytes,
               m.settings.memory_bytes);
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t room = (bytes + page - 1) / page * page, mapped = room + 2 * page;
    void* raw = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) refuse(OUT_OF_MEMORY, "the host has no room for %zu bytes", bytes);
    auto* first = static_cast<unsigned char*>(raw) + page;
    mprotect(first, room, PROT_READ | PROT_WRITE);
    auto* base = first + (room - bytes) / ALIGNMENT * ALIGNMENT;
    std::memset(first, FRESH, room);
    m.memory[reinterpret_cast<uintptr_t>(base) + bytes] = {bytes, mapped, base, kind, true};
    if (kind == 'd') m.used_bytes += bytes;
    return base;
}

// The bytes go, the addresses stay taken: a later use is seen.
static void retire(Allocation& a) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    auto* first = reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(a.base) / page * page);
    madvise(first, a.mapped - 2 * page, MADV_DONTNEED);
    mprotect(first, a.mapped - 2 * page, PROT_NONE);
    a.alive = false;
    if (a.kind == 'd') machine().used_bytes -= a.bytes;
}

// While all memory is protected, whoever touches it faults.
void protect(bool everything) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (auto& [end, a] : machine().memory) {
        if (!a.alive) continue;
        auto* first = reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(a.base) / page * page);
        mprotect(first, a.mapped - 2 * page, everything ? PROT_NONE : PROT_READ | PROT_WRITE);
    }
}

void free_everything() {
    for (auto& [end, a] : machine().memory)
        if (a.alive) retire(a);
}

static void release(uintptr_t address, char kind) {
    auto& m = machine();
    for (auto& [end, a] : m.memory) {
        if (reinterpret_cast<uintptr_t>(a.base) != address || (a.alive && a.kind != kind)) continue;
        if (!a.alive) {
            note("error", "freed twice: " + describe(address));
            refuse(INVALID_VALUE, "the memory was freed before");
        }
        size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        auto* first = reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(a.base) / page * page);
        size_t room = a.mapped - 2 * page;
        for (auto* at = first; at < a.base; at++)
            if (*at != FRESH) {
                note("error", "bytes before an allocation were overwritten: " + describe(reinterpret_cast<uintptr_t>(at)));
                break;
            }
        for (auto* at = a.base + a.bytes; at < first + room; at++)
            if (*at != FRESH) {
                note("error", "bytes past an allocation were overwritten: " + describe(reinterpret_cast<uintptr_t>(at)));
                break;
            }
        retire(a);
        return;
    }
    refuse(INVALID_VALUE, "%s is not the start of an allocation", describe(address).c_str());
}

ENTRY(cuMemAlloc, 2000, 3020, DevicePtr* out, size_t bytes) {
    current_context();
    unsafe_call("cuMemAlloc");
    *out = reinterpret_cast<DevicePtr>(allocate(bytes, 'd'));
    return SUCCESS;
}

ENTRY(cuMemFree, 2000, 3020, DevicePtr address) {
    if (!address) return SUCCESS;
    unsafe_call("cuMemFree");
    drain();
    release(static_cast<uintptr_t>(address), 'd');
    return SUCCESS;
}

ENTRY(cuMemHostAlloc, 2020, 2020, void** out, size_t bytes, unsigned flags) {
    current_context();
    unsafe_call("cuMemHostAlloc");
    if (flags & ~7u) refuse(INVALID_VALUE, "host allocation flags 0x%x", flags);
    *out = allocate(bytes, 'p');
    return SUCCESS;
}

ENTRY(cuMemFreeHost, 2000, 2000, void* address) {
    unsafe_call("cuMemFreeHost");
    drain();
    release(reinterpret_cast<uintptr_t>(address), 'p');
    return SUCCESS;
}

ENTRY(cuMemGetInfo, 2000, 3020, size_t* free_bytes, size_t* total) {
    current_context();
    *total = machine().settings.memory_bytes;
    *free_bytes = *total - machine().used_bytes;
    return SUCCESS;
}

ENTRY(cuMemGetAddressRange, 2000, 3020, DevicePtr* base, size_t* bytes, DevicePtr address) {
    const auto* a = allocation_at(static_cast<uintptr_t>(address));
    if (!a || !a->alive) refuse(NOT_FOUND, "%s", describe(static_cast<uintptr_t>(address)).c_str());
    if (base) *base = reinterpret_cast<DevicePtr>(a->base);
    if (bytes) *bytes = a->bytes;
    return SUCCESS;
}

// Numbers of CUpointer_attribute.
static bool pointer_attribute(void* out, int attribute, DevicePtr address) {
    const auto* a = allocation_at(static_cast<uintptr_t>(address));
    if (!a || !a->alive) return false;
    switch (attribute) {
        case 1: *static_cast<void**>(out) = &machine().primary; return true;
        case 2: *static_cast<int*>(out) = a->kind == 'd' ? 2 : 1; return true;
        case 3: *static_cast<DevicePtr*>(out) = address; return true;
        case 4: *static_cast<void**>(out) = a->kind == 'd' ? nullptr : reinterpret_cast<void*>(address); return a->kind != 'd';
        case 8: *static_cast<unsigned*>(out) = 0; return true;   // managed
        case 9: *static_cast<int*>(out) = 0; return true;        // device ordinal
        case 11: *static_cast<DevicePtr*>(out) = reinterpret_cast<DevicePtr>(a->base); return true;
        case 12: *static_cast<size_t*>(out) = a->bytes; return true;
        case 13: *static_cast<unsigned*>(out) = 1; return true;  // mapped
        default: return false;
    }
}

ENTRY(cuPointerGetAttribute, 4000, 4000, void* out, int attribute, DevicePtr address) {
    if (!pointer_attribute(out, attribute, address)) refuse(INVALID_VALUE, "%s", describe(static_cast<uintptr_t>(address)).c_str());
    return SUCCESS;
}

ENTRY(cuPointerGetAttributes, 7000, 7000, unsigned count, int* attributes, void** out, DevicePtr address) {
    for (unsigned i = 0; i < count; i++)
        if (!pointer_attribute(out[i], attributes[i], address)) std::memset(out[i], 0, attributes[i] == 9 || attributes[i] == 2 || attributes[i] == 8 ? 4 : 8);
    return SUCCESS;
}

// ----------------------------------------------------------------------------------- copies and fills

static Result copy_now(void* dst, const void* src, size_t bytes, const char* name) {
    current_context();
    unsafe_call(name);
    if (!bytes) return SUCCESS;
    check_range(reinterpret_cast<uintptr_t>(dst), bytes, "copy to", false);
    check_range(reinterpret_cast<uintptr_t>(src), bytes, "copy from", false);
    Work work;
    work.type = NODE_MEMCPY;
    work.copy = {static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), bytes};
    auto* legacy = machine().primary.legacy;
    enqueue(legacy, std::move(work));
    sync_item(legacy->last);
    return SUCCESS;
}

static void* at(DevicePtr address) { return reinterpret_cast<void*>(address); }

static Result copy_later(void* dst, const void* src, size_t bytes, void* handle) {
    auto* stream = stream_of(handle);
    Work work;
    work.type = NODE_MEMCPY;
    work.copy = {static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), bytes};
    check_range(reinterpret_cast<uintptr_t>(dst), bytes, "copy to", false);
    check_range(reinterpret_cast<uintptr_t>(src), bytes, "copy from", false);
    if (stream->capture) {
        capturing(stream, std::move(work));
        return SUCCESS;
    }
    bool pageable_source = !allocation_at(reinterpret_cast<uintptr_t>(src));
    bool pageable_target = !allocation_at(reinterpret_cast<uintptr_t>(dst));
    enqueue(stream, std::move(work));
    if (pageable_source || pageable_target) sync_item(stream->last);  // pageable memory is staged: the call waits
    return SUCCESS;
}

static void need_device(DevicePtr address, size_t bytes, const char* what) {
    check_range(static_cast<uintptr_t>(address), bytes, what, true);
}

ENTRY(cuMemcpy, 4000, 4000, DevicePtr dst, DevicePtr src, size_t bytes) { return copy_now(at(dst), at(src), bytes, "cuMemcpy"); }

ENTRY(cuMemcpyHtoD, 2000, 3020, DevicePtr dst, const void* src, size_t bytes) {
    need_device(dst, bytes, "copy to");
    return copy_now(at(dst), src, bytes, "cuMemcpyHtoD");
}

ENTRY(cuMemcpyDtoH, 2000, 3020, void* dst, DevicePtr src, size_t bytes) {
    need_device(src, bytes, "copy from");
    return copy_now(dst, at(src), bytes, "cuMemcpyDtoH");
}

ENTRY(cuMemcpyDtoD, 2000, 3020, DevicePtr dst, DevicePtr src, size_t bytes) {
    need_device(dst, bytes, "copy to");
    need_device(src, bytes, "copy from");
    return copy_now(at(dst), at(src), bytes, "cuMemcpyDtoD");
}

ENTRY(cuMemcpyAsync, 4000, 4000, DevicePtr dst, DevicePtr src, size_t bytes, void* stream) { return copy_later(at(dst), at(src), bytes, stream); }

ENTRY(cuMemcpyHtoDAsync, 2000, 3020, DevicePtr dst, const void* src, size_t bytes, void* stream) {
    need_device(dst, bytes, "copy to");
    return copy_later(at(dst), src, bytes, stream);
}

ENTRY(cuMemcpyDtoHAsync, 2000, 3020, void* dst, DevicePtr src, size_t bytes, void* stream) {
    need_device(src, bytes, "copy from");
    return copy_later(dst, at(src), bytes, stream);
}

ENTRY(cuMemcpyDtoDAsync, 3000, 3020, DevicePtr dst, DevicePtr src, size_t bytes, void* stream) {
    need_device(dst, bytes, "copy to");
    need_device(src, bytes, "copy from");
    return copy_later(at(dst), at(src), bytes, stream);
}

static Result fill(Stream* stream, DevicePtr dst, unsigned value, unsigned element, size_t count, bool now) {
    need_device(dst, count * element, "memset of");
    Work work;
    work.type = NODE_MEMSET;
    work.fill = {static_cast<unsigned char*>(at(dst)), value, element, count};
    if (stream->capture) {
        capturing(stream, std::move(work));
        return SUCCESS;
    }
    enqueue(stream, std::move(work));
    if (now) sync_item(stream->last);
    return SUCCESS;
}

ENTRY(cuMemsetD8, 2000, 3020, DevicePtr dst, unsigned char value, size_t count) {
    unsafe_call("cuMemsetD8");
    return fill(current_context()->legacy, dst, value, 1, count, true);
}
ENTRY(cuMemsetD8Async, 3020, 3020, DevicePtr dst, unsigned char value, size_t count, void* stream) {
    return fill(stream_of(stream), dst, value, 1, count, false);
}
ENTRY(cuMemsetD16Async, 3020, 3020, DevicePtr dst, unsigned short value, size_t count, void* stream) {
    return fill(stream_of(stream), dst, value, 2, count, false);
}
ENTRY(cuMemsetD32Async, 3020, 3020, DevicePtr dst, unsigned value, size_t count, void* stream) {
    return fill(stream_of(stream), dst, value, 4, count, false);
}

}  // namespace tgv
