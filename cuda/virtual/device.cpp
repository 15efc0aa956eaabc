// Initialisation, look-up of entry points, device properties, contexts, error texts.
#include <cstdio>
#include <utility>

#include "state.h"

namespace tgv {

uint64_t fresh_id() { return machine().next_id++; }

void check_device(int device) {
    if (device != 0) refuse(INVALID_DEVICE, "device %d does not exist; there is one virtual device", device);
}

Context* current_context() {
    auto& stack = here().contexts;
    if (stack.empty() || !stack.back()) refuse(INVALID_CONTEXT, "no context is current to this thread");
    if (!stack.back()->alive) refuse(CONTEXT_IS_DESTROYED, "the current context was destroyed");
    return stack.back();
}

ENTRY(cuInit, 2000, 2000, unsigned flags) {
    auto& m = machine();
    if (flags) refuse(INVALID_VALUE, "flags must be 0");
    if (m.settings.sm_count == 0) refuse(NO_DEVICE, "the control file gives no SMs");
    if (!m.ready) {
        m.ready = true;
        auto& p = m.primary;
        p.sm_count = m.settings.sm_count;
        p.id = fresh_id();
        p.legacy = &m.legacy;
        p.alive = false;
        m.legacy.context = &p;
        m.legacy.id = fresh_id();
        m.objects[&p] = &p;
        load_host_kernels();
    }
    return SUCCESS;
}

ENTRY(cuDriverGetVersion, 2020, 2020, int* version) {
    *version = static_cast<int>(machine().settings.version);
    return SUCCESS;
}

ENTRY(cuDeviceGetCount, 2000, 2000, int* count) {
    *count = 1;
    return SUCCESS;
}

ENTRY(cuDeviceGet, 2000, 2000, int* device, int ordinal) {
    check_device(ordinal);
    *device = 0;
    return SUCCESS;
}

ENTRY(cuDeviceGetName, 2000, 2000, char* name, int length, int device) {
    check_device(device);
    snprintf(name, static_cast<size_t>(length), "taskgraph virtual %s", machine().settings.device.c_str());
    return SUCCESS;
}

ENTRY(cuDeviceGetUuid, 9020, 11040, unsigned char* uuid, int device) {
    check_device(device);
    std::memcpy(uuid, "taskgraphvirtual", 16);
    return SUCCESS;
}

ENTRY(cuDeviceTotalMem, 2000, 3020, size_t* bytes, int device) {
    check_device(device);
    *bytes = machine().settings.memory_bytes;
    return SUCCESS;
}

ENTRY(cuDeviceGetAttribute, 2000, 2000, int* value, int attribute, int device) {
    check_device(device);
    auto& s = machine().settings;
    // Numbers of CUdevice_attribute; whatever is not listed the virtual device does not offer, and says 0.
    static const std::map<int, int> fixed = {
        {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {9, 65536}, {10, 32}, {12, 65536},
        {15, 1}, {19, 1}, {31, 1}, {40, 2}, {41, 1}, {78, 1}, {82, 65536}, {95, 1},
    };
    switch (attribute) {
        case 1: *value = static_cast<int>(s.max_threads); break;
        case 8: *value = static_cast<int>(s.shared_bytes); break;
        case 13: *value = 1000000; break;  // clock, kHz
        case 16: *value = static_cast<int>(s.sm_count); break;
        case 39: *value = static_cast<int>(s.sm_threads); break;
        case 75: *value = static_cast<int>(s.cc_major); break;
        case 76: *value = static_cast<int>(s.cc_minor); break;
        case 81: case 97: *value = 101376; break;
        case 106: *value = 32; break;
        default: *value = fixed.count(attribute) ? fixed.at(attribute) : 0;
    }
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------ contexts

ENTRY(cuDevicePrimaryCtxRetain, 7000, 7000, Context** context, int device) {
    check_device(device);
    auto& p = machine().primary;
    p.alive = true;
    p.users++;
    *context = &p;
    return SUCCESS;
}

static void reset_primary() {
    auto& m = machine();
    drop_captures();
    m.pending.clear();
    m.legacy.last = nullptr;
    free_everything();
    for (auto& [handle, object] : m.objects)
        if (object->kind == Kind::green && object->alive) {
            auto* green = static_cast<Green*>(object);
            green->alive = green->context->alive = false;
        }
    m.primary.alive = false;
    m.sticky = SUCCESS;
}

ENTRY(cuDevicePrimaryCtxRelease, 7000, 11000, int device) {
    check_device(device);
    auto& p = machine().primary;
    if (p.users <= 0) refuse(INVALID_CONTEXT, "the primary context is not retained");
    if (--p.users == 0) reset_primary();
    return SUCCESS;
}

ENTRY(cuDevicePrimaryCtxReset, 7000, 11000, int device) {
    check_device(device);
    reset_primary();
    return SUCCESS;
}

ENTRY(cuDevicePrimaryCtxGetState, 7000, 7000, int device, unsigned* flags, int* active) {
    check_device(device);
    *flags = 0;
    *active = machine().primary.alive;
    return SUCCESS;
}

static void leave(Context* context) {
    if (context && context->green() && context->current_on == std::this_thread::get_id()) context->current_on = {};
}

static void enter(Context* context) {
    if (!context || !context->green()) return;
    // "a context may be current to one thread at a time" holds for green contexts: cuCtxFromGreenCtx.
    if (context->current_on != std::thread::id{} && context->current_on != std::this_thread::get_id())
        refuse(CONTEXT_ALREADY_IN_USE, "the green context is current to another thread");
    context->current_on = std::this_thread::get_id();
}

ENTRY(cuCtxPushCurrent, 4000, 4000, void* handle) {
    auto* context = as<Context>(handle);
    enter(context);
    here().contexts.push_back(context);
    return SUCCESS;
}

ENTRY(cuCtxPopCurrent, 4000, 4000, void** handle) {
    auto& stack = here().contexts;
    if (stack.empty()) refuse(INVALID_CONTEXT, "no context is current to this thread");
    if (handle) *handle = stack.back();
    leave(stack.back());
    stack.pop_back();
    return SUCCESS;
}

ENTRY(cuCtxSetCurrent, 4000, 4000, void* handle) {
    auto& stack = here().contexts;
    auto* context = handle ? as<Context>(handle) : nullptr;
    enter(context);
    if (!stack.empty()) {
        if (stack.back() != context) leave(stack.back());
        stack.pop_back();
    }
    if (context) stack.push_back(context);
    return SUCCESS;
}

ENTRY(cuCtxGetCurrent, 4000, 4000, void** handle) {
    auto& stack = here().contexts;
    *handle = stack.empty() ? nullptr : stack.back();
    return SUCCESS;
}

ENTRY(cuCtxGetDevice, 2000, 2000, int* device) {
    current_context();
    *device = 0;
    return SUCCESS;
}

// cuCtxGetDevice_v2, of any context.
static Result device_of_context(int* device, void* handle) {
    return guarded("cuCtxGetDevice", [&] {
        if (handle) as<Context>(handle);
        *device = 0;
        return SUCCESS;
    });
}
static const Register device_of_context_entry("cuCtxGetDevice", 13000, 13000, reinterpret_cast<void*>(&device_of_context));

ENTRY(cuCtxGetId, 12000, 12000, void* handle, unsigned long long* id) {
    *id = (handle ? as<Context>(handle) : current_context())->id;
    return SUCCESS;
}

ENTRY(cuCtxGetStreamPriorityRange, 5050, 5050, int* least, int* greatest) {
    current_context();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

ENTRY(cuCtxGetApiVersion, 3020, 3020, void*, unsigned* version) {
    *version = 3020;
    return SUCCESS;
}

ENTRY(cuCtxSynchronize, 2000, 2000) {
    current_context();
    unsafe_call("cuCtxSynchronize");
    for (auto* capture : machine().captures)
        if (capture->thread == std::this_thread::get_id()) {
            invalidate(capture);
            refuse(STREAM_CAPTURE_UNSUPPORTED, "a stream of this context is capturing");
        }
    drain();
    return machine().sticky;
}

// -------------------------------------------------------------------------------------- error texts

static const std::map<int, std::pair<const char*, const char*>> ERRORS = {
    {0, {"CUDA_SUCCESS", "no error"}},
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {216, {"CUDA_ERROR_CONTEXT_ALREADY_IN_USE", "exclusive-thread device already in use by a different thread"}},
    {301, {"CUDA_ERROR_FILE_NOT_FOUND", "file not found"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {401, {"CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {709, {"CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"}},
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {800, {"CUDA_ERROR_NOT_PERMITTED", "operation not permitted"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {901, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"}},
    {902, {"CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"}},
    {903, {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"}},
    {904, {"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"}},
    {905, {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"}},
    {906, {"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"}},
    {907, {"CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"}},
    {908, {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture from another thread"}},
    {910, {"CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE", "the graph update was not performed: it breaks update constraints"}},
    {912, {"CUDA_ERROR_INVALID_CLUSTER_SIZE", "invalid cluster size"}},
    {914, {"CUDA_ERROR_INVALID_RESOURCE_TYPE", "invalid resource type"}},
    {915, {"CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION", "invalid resource configuration"}},
    {999, {"CUDA_ERROR_UNKNOWN", "unknown error"}},
};

ENTRY(cuGetErrorName, 6000, 6000, int code, const char** text) {
    auto found = ERRORS.find(code);
    *text = found == ERRORS.end() ? "CUDA_ERROR_UNKNOWN" : found->second.first;
    return SUCCESS;
}

ENTRY(cuGetErrorString, 6000, 6000, int code, const char** text) {
    auto found = ERRORS.find(code);
    *text = found == ERRORS.end() ? "unknown error" : found->second.second;
    return SUCCESS;
}

// --------------------------------------------------------------------------- look-up of entry points

// A name that the virtual driver does not have gets a function of its own, which reports that name when it is called.
constexpr size_t STUBS = 1024;
static std::vector<std::string>& missing() {
    static auto* names = new std::vector<std::string>;
    return *names;
}

template <size_t I>
static Result stub() {
    return guarded("cuGetMissing", [&]() -> Result {
        note("error", "missing entry point " + missing()[I]);
        refuse(NOT_SUPPORTED, "the virtual driver has no entry point %s", missing()[I].c_str());
    });
}

template <size_t... I>
static Result (*stub_at(size_t index, std::index_sequence<I...>))() {
    static Result (*all[])() = {&stub<I>...};
    return all[index];
}

static void* stub_named(const std::string& name) {
    auto& names = missing();
    size_t index = 0;
    while (index < names.size() && names[index] != name) index++;
    if (index == names.size()) names.push_back(name);
    if (index >= STUBS) return nullptr;
    return reinterpret_cast<void*>(stub_at(index, std::make_index_sequence<STUBS>{}));
}

}  // namespace tgv

using namespace tgv;

extern "C" __attribute__((visibility("default"))) Result cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                                                             uint64_t, int* status) {
    guarded("cuGetProcAddress", [] { return SUCCESS; });  // reads the control file
    auto& m = machine();
    std::lock_guard<std::recursive_mutex> hold(m.lock);
    *function = nullptr;
    if (status) *status = 0;
    std::string name = symbol;
    if (name == "cuGetProcAddress") {
        *function = reinterpret_cast<void*>(&cuGetProcAddress_v2);
        return SUCCESS;
    }
    const Entry* best = nullptr;
    bool newer = false;
    for (auto& entry : entries()) {
        if (name != entry.name || entry.speaks > static_cast<unsigned>(version)) continue;
        if (entry.since > m.settings.version) newer = true;
        else if (!best || entry.speaks > best->speaks) best = &entry;
    }
    if (best) {
        *function = best->function;
        return SUCCESS;
    }
    if (newer) {  // CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
        if (status) *status = 2;
        return NOT_FOUND;
    }
    *function = stub_named(name);
    return *function ? SUCCESS : NOT_FOUND;
}

extern "C" __attribute__((visibility("default"))) Result cuGetProcAddress(const char* symbol, void** function, int version,
                                                                          uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

#define EXPORTED(NAME, PARAMETERS, ...)                                                    \
    extern "C" __attribute__((visibility("default"))) Result NAME PARAMETERS {             \
        void* function = nullptr;                                                          \
        cuGetProcAddress_v2(#NAME, &function, 13050, 0, nullptr);                          \
        return reinterpret_cast<Result(*) PARAMETERS>(function)(__VA_ARGS__);              \
    }
EXPORTED(cuInit, (unsigned flags), flags)
EXPORTED(cuDriverGetVersion, (int* version), version)
EXPORTED(cuDeviceGetCount, (int* count), count)
EXPORTED(cuDeviceGet, (int* device, int ordinal), device, ordinal)
EXPORTED(cuDeviceGetAttribute, (int* value, int attribute, int device), value, attribute, device)

// NVRTC asks for tables of private functions. It crashes where this look-up is missing, and does without the tables
// where it is refused.
extern "C" __attribute__((visibility("default"))) Result cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}
