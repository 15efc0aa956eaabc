// Libraries and kernels. An image is checked as a driver would check it; what runs is the host build of the kernel of
// that name, on memory of the host.
#include <dlfcn.h>
#include <elf.h>
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "state.h"

namespace tgv {

std::string add_host_kernels(const std::string& path) {
    auto& m = machine();
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    auto table = reinterpret_cast<HostKernelTable>(dlsym(library, "tgv_host_kernels"));
    if (!table) return path + " has no table";
    for (auto* kernel = table(); kernel->name; kernel++)
        if (m.host_kernels.count(kernel->name))
            return std::string("another file has a kernel ") + kernel->name + "; give it another name";
    for (auto* kernel = table(); kernel->name; kernel++) m.host_kernels[kernel->name] = kernel;
    m.kernel_libraries.push_back(library);
    return "";
}

void load_host_kernels() {
    for (auto& path : machine().settings.host_kernels) {
        std::string wrong = add_host_kernels(path);
        if (!wrong.empty()) note("error", "host kernels: " + wrong);
    }
}

const HostKernel* host_kernel(const std::string& name) {
    auto found = machine().host_kernels.find(name);
    return found == machine().host_kernels.end() ? nullptr : found->second;
}

// ----------------------------------------------------------------------------------------------- images

// The machine code of a cubin says its architecture in e_flags: bits 8 to 15 from ABI version 8 on (CUDA 13), else 0 to 7.
static unsigned cubin_arch(const Elf64_Ehdr* head) {
    unsigned old = head->e_flags & 0xff, fresh = (head->e_flags >> 8) & 0xff;
    return head->e_ident[EI_ABIVERSION] >= 8 ? fresh : old;
}

static void read_cubin(Library* library, const char* data) {
    auto* head = reinterpret_cast<const Elf64_Ehdr*>(data);
    auto& s = machine().settings;
    unsigned arch = cubin_arch(head), own = s.cc_major * 10 + s.cc_minor;
    if (arch / 10 != s.cc_major || arch > own)
        refuse(NO_BINARY_FOR_GPU, "the cubin is for sm_%u; the device is sm_%u", arch, own);
    auto* sections = reinterpret_cast<const Elf64_Shdr*>(data + head->e_shoff);
    const char* names = data + sections[head->e_shstrndx].sh_offset;
    for (int i = 0; i < head->e_shnum; i++) {
        const char* name = names + sections[i].sh_name;
        if (!std::strncmp(name, ".text.", 6)) library->names.insert(name + 6);
    }
    library->lists_names = true;
}

// PTX names its kernels in `.visible .entry name(`.
static void read_ptx(Library* library, const char* text) {
    std::string ptx = text;
    for (size_t at = ptx.find(".entry "); at != std::string::npos; at = ptx.find(".entry ", at + 1)) {
        size_t begin = at + 7, end = ptx.find_first_of(" (\n", begin);
        library->names.insert(ptx.substr(begin, end - begin));
    }
    library->lists_names = true;
}

static Result load(void** out, const char* data) {
    unsafe_call("cuLibraryLoadData");
    auto* library = made<Library>();
    library->alive = false;
    if (!std::memcmp(data, ELFMAG, SELFMAG)) read_cubin(library, data);
    else if (std::strstr(data, ".version")) read_ptx(library, data);
    else refuse(INVALID_IMAGE, "the image is neither a cubin nor PTX");
    library->alive = true;
    *out = library;
    return SUCCESS;
}

ENTRY(cuLibraryLoadData, 12000, 12000, void** out, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
    return load(out, static_cast<const char*>(code));
}

ENTRY(cuLibraryLoadFromFile, 12000, 12000, void** out, const char* path, void*, void*, unsigned, void*, void*, unsigned) {
    std::ifstream file(path, std::ios::binary);
    if (!file) refuse(FILE_NOT_FOUND, "no file %s", path);
    std::stringstream text;
    text << file.rdbuf();
    return load(out, text.str().c_str());
}

ENTRY(cuLibraryUnload, 12000, 12000, void* handle) {
    auto* library = as<Library>(handle);
    drain();
    for (auto* kernel : library->kernels) kernel->alive = false;
    library->alive = false;
    return SUCCESS;
}

ENTRY(cuLibraryGetKernel, 12000, 12000, void** out, void* handle, const char* name) {
    auto* library = as<Library>(handle);
    for (auto* known : library->kernels)
        if (known->name == name) return *out = known, SUCCESS;
    if (library->lists_names && !library->names.count(name)) refuse(NOT_FOUND, "the image has no kernel %s", name);
    auto* kernel = made<Kernel>();
    kernel->library = library;
    kernel->name = name;
    kernel->host = host_kernel(name);
    library->kernels.push_back(kernel);
    *out = kernel;
    return SUCCESS;
}

ENTRY(cuKernelGetFunction, 12000, 12000, void** function, void* kernel) {
    *function = as<Kernel>(kernel);
    return SUCCESS;
}

ENTRY(cuKernelGetLibrary, 12050, 12050, void** library, void* kernel) {
    *library = as<Kernel>(kernel)->library;
    return SUCCESS;
}

ENTRY(cuKernelGetName, 12030, 12030, const char** name, void* kernel) {
    *name = as<Kernel>(kernel)->name.c_str();
    return SUCCESS;
}

ENTRY(cuFuncGetName, 12030, 12030, const char** name, void* kernel) {
    *name = as<Kernel>(kernel)->name.c_str();
    return SUCCESS;
}

ENTRY(cuKernelGetAttribute, 12000, 12000, int* value, int attribute, void* kernel, int device) {
    check_device(device);
    as<Kernel>(kernel);
    auto& s = machine().settings;
    switch (attribute) {  // numbers of CUfunction_attribute
        case 0: *value = static_cast<int>(s.max_threads); break;
        case 5: case 6: *value = static_cast<int>(s.cc_major * 10 + s.cc_minor); break;
        default: *value = 0;
    }
    return SUCCESS;
}

static const HostKernel* need_host(Kernel* kernel) {
    if (!kernel->host) kernel->host = host_kernel(kernel->name);
    if (!kernel->host)
        refuse(NOT_FOUND, "kernel %s has no host build; write EXPORT(%s) below it in its .cu file", kernel->name.c_str(),
               kernel->name.c_str());
    return kernel->host;
}

ENTRY(cuKernelGetParamInfo, 12040, 12040, void* kernel, size_t index, size_t* offset, size_t* bytes) {
    const auto* host = need_host(as<Kernel>(kernel));
    if (index >= host->param_count) refuse(INVALID_VALUE, "the kernel has %u parameters", host->param_count);
    size_t at = 0;
    for (size_t i = 0; i <= index; i++) {
        size_t size = host->param_sizes[i], align = std::min<size_t>(size, 8);
        at = (at + align - 1) / align * align;
        if (i == index) *offset = at;
        at += size;
    }
    if (bytes) *bytes = host->param_sizes[index];
    return SUCCESS;
}

ENTRY(cuKernelGetParamCount, 13020, 13020, void* kernel, size_t* count) {
    *count = need_host(as<Kernel>(kernel))->param_count;
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------------ launch

void check_launch(const KernelWork& work, const Context* context) {
    auto& s = machine().settings;
    unsigned long long threads = 1ull * work.block[0] * work.block[1] * work.block[2];
    unsigned long long blocks = 1ull * work.grid[0] * work.grid[1] * work.grid[2];
    if (!threads || !blocks) refuse(INVALID_VALUE, "kernel %s: an empty grid or block", work.kernel->name.c_str());
    if (threads > s.max_threads || work.block[2] > 64)
        refuse(INVALID_VALUE, "kernel %s: %llu threads a block, at most %u", work.kernel->name.c_str(), threads, s.max_threads);
    if (work.grid[1] > 65535 || work.grid[2] > 65535) refuse(INVALID_VALUE, "kernel %s: the grid is too large", work.kernel->name.c_str());
    if (work.shared_bytes > s.shared_bytes)
        refuse(INVALID_VALUE, "kernel %s: %u bytes of shared memory, at most %u", work.kernel->name.c_str(), work.shared_bytes, s.shared_bytes);
    if (work.cluster > 1 && s.cc_major < 9) refuse(INVALID_VALUE, "clusters need compute capability 9.0");
    if (work.dependent && s.cc_major < 9) refuse(NOT_SUPPORTED, "dependent launches need compute capability 9.0");
    if (work.cluster > std::min(8u, context->sm_count))
        refuse(INVALID_CLUSTER_SIZE, "a cluster of %u blocks does not fit", work.cluster);
    if (work.cooperative && blocks > 1ull * context->sm_count * (s.sm_threads / threads))
        refuse(static_cast<Result>(720), "%llu blocks cannot run at once in the partition's %u SMs", blocks, context->sm_count);
}

ENTRY(cuLaunchKernelEx, 11060, 11060, const LaunchConfig* config, void* function, void** params, void** extra) {
    auto* stream = stream_of(config->stream);
    auto* kernel = as<Kernel>(function);
    const auto* host = need_host(kernel);
    if (extra) refuse(NOT_SUPPORTED, "kernel arguments in `extra` are not offered");
    Work work;
    work.type = NODE_KERNEL;
    work.context = stream->context;
    auto& k = work.kernel;
    k.kernel = kernel;
    std::copy(config->grid, config->grid + 3, k.grid);
    std::copy(config->block, config->block + 3, k.block);
    k.shared_bytes = config->shared_bytes;
    for (unsigned i = 0; i < config->attr_count; i++) {
        auto& attribute = config->attrs[i];
        if (attribute.id == ATTRIBUTE_COOPERATIVE) k.cooperative = attribute.cooperative != 0;
        if (attribute.id == ATTRIBUTE_PROGRAMMATIC) k.dependent = attribute.programmatic != 0;
        if (attribute.id == ATTRIBUTE_CLUSTER) k.cluster = attribute.cluster[0] * attribute.cluster[1] * attribute.cluster[2];
    }
    if (host->param_count && !params) refuse(INVALID_VALUE, "kernel %s takes %u parameters", kernel->name.c_str(), host->param_count);
    for (unsigned i = 0; i < host->param_count; i++) {
        auto* bytes = static_cast<unsigned char*>(params[i]);
        k.args.emplace_back(bytes, bytes + host->param_sizes[i]);
    }
    check_launch(k, stream->context);
    if (stream->capture) {
        capturing(stream, std::move(work));
        return SUCCESS;
    }
    Work nothing;
    capturing(stream, std::move(nothing));  // the rules of the legacy stream
    enqueue(stream, std::move(work));
    return SUCCESS;
}

ENTRY(cuLaunchHostFunc, 10000, 10000, void* handle, HostFunction function, void* data) {
    auto* stream = stream_of(handle);
    Work work;
    work.type = NODE_HOST;
    work.host = {function, data};
    if (stream->capture) {
        capturing(stream, std::move(work));
        return SUCCESS;
    }
    enqueue(stream, std::move(work));
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------------- running

static thread_local sigjmp_buf* escape = nullptr;
static thread_local uintptr_t fault_address = 0;
static struct sigaction former;

static void on_fault(int signal, siginfo_t* info, void* context) {
    if (escape) {
        fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
        siglongjmp(*escape, 1);
    }
    if (former.sa_flags & SA_SIGINFO) former.sa_sigaction(signal, info, context);
    else if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) former.sa_handler(signal);
    else {
        sigaction(SIGSEGV, &former, nullptr);
        raise(signal);
    }
}

// Pointers must lie in live memory: null is allowed, pageable host memory is not.
static void check_pointers(const KernelWork& work, const HostKernel* host) {
    for (unsigned i = 0; i < host->param_count; i++) {
        if (host->param_kinds[i] != 'p') continue;
        uintptr_t address;
        std::memcpy(&address, work.args[i].data(), sizeof address);
        if (!address) continue;
        const auto* a = allocation_at(address);
        if (!a)
            refuse(ILLEGAL_ADDRESS, "kernel %s: argument %u is %s", host->name, i, describe(address).c_str());
        if (!a->alive)
            refuse(ILLEGAL_ADDRESS, "kernel %s: argument %u points to memory after free: %s", host->name, i, describe(address).c_str());
    }
}

// Whether `body` ran without touching memory that it may not.
static bool without_fault(const std::function<void()>& body) {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &former);
    sigjmp_buf here_buf;
    bool faulted = sigsetjmp(here_buf, 1) != 0;
    if (!faulted) {
        escape = &here_buf;
        body();
    }
    escape = nullptr;
    sigaction(SIGSEGV, &former, nullptr);
    return !faulted;
}

// A dependent launch may begin while the kernel before it runs: until its threads wait (`griddepcontrol.wait`) they may
// touch no memory, and one of them must wait, or this kernel could end, and what follows it begin, before that one has.
static void check_start(const KernelWork& work, const HostKernel* host, void** params) {
    size_t waited = 0;
    protect(true);
    bool clean = without_fault([&] { waited = host->start(work.grid, work.block, params); });
    protect(false);
    if (!clean)
        refuse(LAUNCH_FAILED, "kernel %s, launched dependent, touches %s before it waits for the kernel before it", host->name,
               describe(fault_address).c_str());
    if (!waited) refuse(LAUNCH_FAILED, "kernel %s, launched dependent, never waits for the kernel before it", host->name);
}

void run_kernel(KernelWork& work) {
    const auto* host = need_host(work.kernel);
    check_pointers(work, host);
    std::vector<void*> params;
    for (auto& arg : work.args) params.push_back(arg.data());
    if (work.dependent && !work.start_checked) check_start(work, host, params.data());
    work.start_checked = true;
    char error[256] = "";
    bool clean = without_fault([&] { host->run(work.grid, work.block, params.data(), error, sizeof error); });
    machine().launches++;
    if (!clean) refuse(ILLEGAL_ADDRESS, "kernel %s: out-of-bounds access at %s", host->name, describe(fault_address).c_str());
    if (error[0]) refuse(LAUNCH_FAILED, "kernel %s: %s", host->name, error);
}

}  // namespace tgv
