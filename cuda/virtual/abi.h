// The part of the CUDA driver's binary interface that the virtual driver offers: types, numbers, layouts.
// Facts from NVIDIA's driver API reference 13.x; tests/test_virtual_build.py compares them with cuda.h where a toolkit
// is installed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace abi {

using Handle = void*;
using DevicePtr = unsigned long long;

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    CONTEXT_ALREADY_IN_USE = 216,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    LOSSY_QUERY = 402,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_MERGE = 902,
    STREAM_CAPTURE_UNMATCHED = 903,
    STREAM_CAPTURE_UNJOINED = 904,
    STREAM_CAPTURE_ISOLATION = 905,
    STREAM_CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    STREAM_CAPTURE_WRONG_THREAD = 908,
    GRAPH_EXEC_UPDATE_FAILURE = 910,
    INVALID_CLUSTER_SIZE = 912,
    INVALID_RESOURCE_TYPE = 914,
    INVALID_RESOURCE_CONFIGURATION = 915,
    UNKNOWN = 999,
};

// ---------------------------------------------------------------------------- streams, capture
constexpr uintptr_t STREAM_LEGACY = 1, STREAM_PER_THREAD = 2;
constexpr unsigned STREAM_NON_BLOCKING = 1;
constexpr unsigned EVENT_BLOCKING_SYNC = 1, EVENT_DISABLE_TIMING = 2, EVENT_INTERPROCESS = 4;
constexpr unsigned EVENT_RECORD_EXTERNAL = 1, EVENT_WAIT_EXTERNAL = 1;
enum CaptureMode : int { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };
enum CaptureStatus : int { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_INVALIDATED = 2 };

// ---------------------------------------------------------------------------- device resources
enum ResourceType : int { RESOURCE_INVALID = 0, RESOURCE_SM = 1, RESOURCE_WQ_CONFIG = 1000, RESOURCE_WQ = 10000 };
constexpr unsigned SPLIT_IGNORE_COSCHEDULING = 1, SPLIT_MAX_CLUSTER = 2, GROUP_BACKFILL = 1;
constexpr unsigned GREEN_CTX_DEFAULT_STREAM = 1;

struct SmResource {
    unsigned sm_count, min_partition, alignment, flags, locality_domain;
};
struct WqConfig {
    int device;
    unsigned concurrency_limit;
    int sharing_scope;
};
// Where a resource comes from, kept in the struct's internal padding.
struct Origin {
    unsigned magic, split, first_sm, reserved;
};
struct DevResource {
    int type;
    union {
        unsigned char padding[92];
        Origin origin;
    };
    union {
        SmResource sm;
        WqConfig wq_config;
        unsigned char oversize[40];
    };
    DevResource* next;
};
struct SmGroup {
    unsigned sm_count, coscheduled, preferred_coscheduled, flags, locality_domain, reserved[11];
};
static_assert(sizeof(DevResource) == 144 && sizeof(SmGroup) == 64);

// ---------------------------------------------------------------------------- graphs
enum NodeType : int {
    NODE_KERNEL = 0, NODE_MEMCPY = 1, NODE_MEMSET = 2, NODE_HOST = 3, NODE_GRAPH = 4, NODE_EMPTY = 5,
    NODE_WAIT_EVENT = 6, NODE_EVENT_RECORD = 7,
};

struct KernelNodeParams {
    Handle func;
    unsigned grid[3], block[3], shared_bytes;
    void** params;
    void** extra;
    Handle kern;
    Handle ctx;
};
struct Memcpy3D {
    size_t src_x, src_y, src_z, src_lod;
    int src_type;
    const void* src_host;
    DevicePtr src_device;
    Handle src_array;
    void* reserved0;
    size_t src_pitch, src_height;
    size_t dst_x, dst_y, dst_z, dst_lod;
    int dst_type;
    void* dst_host;
    DevicePtr dst_device;
    Handle dst_array;
    void* reserved1;
    size_t dst_pitch, dst_height;
    size_t width, height, depth;
};
struct MemcpyNodeParams {
    int flags, reserved;
    Handle copy_ctx;
    Memcpy3D copy;
};
struct MemsetNodeParams {
    DevicePtr dst;
    size_t pitch;
    unsigned value, element_size;
    size_t width, height;
    Handle ctx;
};
struct EventNodeParams {
    Handle event, ctx, green;
};
struct GraphNodeParams {
    int type, reserved0[3];
    union {
        long long reserved1[29];
        KernelNodeParams kernel;
        MemcpyNodeParams memcpy;
        MemsetNodeParams memset;
        EventNodeParams event;
        Handle graph;
    };
    long long reserved2;
};
struct EdgeData {
    unsigned char from_port, to_port, type, reserved[5];
};
constexpr unsigned char DEPENDENCY_PROGRAMMATIC = 1, PORT_PROGRAMMATIC = 1;
struct InstantiateParams {
    uint64_t flags;
    Handle upload_stream, error_node;
    int result;
};
struct UpdateResult {
    int result;
    Handle error_node, error_from_node;
};
enum UpdateCode : int {
    UPDATE_OK = 0, UPDATE_TOPOLOGY = 2, UPDATE_NODE_TYPE = 3, UPDATE_PARAMETERS = 5, UPDATE_UNSUPPORTED = 6,
    UPDATE_FUNCTION = 7, UPDATE_ATTRIBUTES = 8,
};
struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        char value[64];
        unsigned cluster[3];
        int cooperative;
        int programmatic;
    };
};
constexpr int ATTRIBUTE_COOPERATIVE = 2, ATTRIBUTE_CLUSTER = 4, ATTRIBUTE_PROGRAMMATIC = 6;
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    LaunchAttribute* attrs;
    unsigned attr_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(KernelNodeParams) == 72 && sizeof(GraphNodeParams) == 256);

}  // namespace abi
