// What a library of host-built kernels tells the virtual driver: its kernels by name.
#pragma once
#include <cstddef>

namespace tgv {

struct HostKernel {
    const char* name;
    unsigned param_count;
    const size_t* param_sizes;
    const char* param_kinds;  // 'p' pointer, 'v' value, one a parameter
    void (*run)(const unsigned grid[3], const unsigned block[3], void** params, char* error, size_t error_bytes);
    // Runs every thread as far as it comes without waiting for the kernel before; gives how many threads waited.
    size_t (*start)(const unsigned grid[3], const unsigned block[3], void** params);
};

// Exported by the library as `tgv_host_kernels`; the list ends with an entry without a name.
using HostKernelTable = const HostKernel* (*)();

}  // namespace tgv
