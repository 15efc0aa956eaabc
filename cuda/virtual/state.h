// The objects behind the driver's handles, and the few rules that every entry point shares.
#pragma once
#include <cstdarg>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "abi.h"
#include "kernel_table.h"

namespace tgv {

using namespace abi;

// An entry point refuses by throwing Refusal; its wrapper logs the text and returns the code.
struct Refusal {
    Result code;
    std::string text;
};
[[noreturn]] void refuse(Result code, const char* format, ...) __attribute__((format(printf, 2, 3)));
void note(const char* level, const std::string& text);

enum class Kind { context, green, stream, event, graph, node, exec, library, kernel, desc, user_object };
const char* name_of(Kind kind);

struct Object {
    Kind kind;
    bool alive = true;
    explicit Object(Kind k);
    virtual ~Object() = default;
};

struct Item;
struct Graph;
struct Node;
struct Capture;
struct Stream;
using ItemPtr = std::shared_ptr<Item>;

struct Context : Object {
    static constexpr Kind KIND = Kind::context;
    Context* primary = nullptr;  // of a green context
    unsigned first_sm = 0, sm_count = 0, split = 0;
    bool has_workqueue = false;
    uint64_t id = 0;
    int users = 0;  // of the primary context
    Stream* legacy = nullptr;
    std::thread::id current_on{};
    Context() : Object(Kind::context) {}
    bool green() const { return primary != nullptr; }
};

struct Green : Object {
    static constexpr Kind KIND = Kind::green;
    Context* context = nullptr;
    std::vector<DevResource> resources;
    Green() : Object(Kind::green) {}
};

struct Desc : Object {
    static constexpr Kind KIND = Kind::desc;
    std::vector<DevResource> resources;
    Desc() : Object(Kind::desc) {}
};

struct Stream : Object {
    static constexpr Kind KIND = Kind::stream;
    Context* context = nullptr;
    Green* green = nullptr;
    unsigned flags = 0;
    int priority = 0;
    uint64_t id = 0;
    Capture* capture = nullptr;
    std::vector<Node*> deps;  // of the next captured node
    std::vector<EdgeData> edges;
    ItemPtr last;             // the newest work
    Stream() : Object(Kind::stream) {}
    bool legacy() const { return context && context->legacy == this; }
    bool blocking() const { return !(flags & STREAM_NON_BLOCKING); }
};

struct Capture {
    uint64_t id = 0;
    int mode = 0;
    Stream* origin = nullptr;
    std::thread::id thread{};
    Graph* graph = nullptr;
    bool invalid = false, into_existing = false;
    std::set<Stream*> members;
    std::set<Node*> made;
};

struct Event : Object {
    static constexpr Kind KIND = Kind::event;
    Context* context = nullptr;
    unsigned flags = 0;
    bool recorded = false;
    ItemPtr item;      // the work it marks
    double at_s = 0;   // simulated time of the mark
    Capture* capture = nullptr;
    uint64_t capture_id = 0;
    std::vector<Node*> deps;
    Event() : Object(Kind::event) {}
};

struct Library : Object {
    static constexpr Kind KIND = Kind::library;
    std::string image;  // empty: PTX, names are not checked
    bool lists_names = false;
    std::set<std::string> names;
    std::vector<struct Kernel*> kernels;
    Library() : Object(Kind::library) {}
};

struct Kernel : Object {
    static constexpr Kind KIND = Kind::kernel;
    Library* library = nullptr;
    std::string name;
    const HostKernel* host = nullptr;
    Kernel() : Object(Kind::kernel) {}
};

struct KernelWork {
    Kernel* kernel = nullptr;
    unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, shared_bytes = 0;
    bool cooperative = false, dependent = false;  // dependent: it may start before the kernel before it has ended
    bool start_checked = false;
    unsigned cluster = 1;
    std::vector<std::vector<unsigned char>> args;
    std::vector<void*> pointers;  // into args, for callers that ask for kernelParams
};
struct CopyWork {
    unsigned char* dst = nullptr;
    const unsigned char* src = nullptr;
    size_t bytes = 0;
};
struct FillWork {
    unsigned char* dst = nullptr;
    unsigned value = 0, element = 1;
    size_t count = 0;
};
using HostFunction = void (*)(void*);
struct HostWork {
    HostFunction function = nullptr;
    void* data = nullptr;
};

// One piece of work, captured or free-standing. `seconds` < 0: nobody has told its time.
struct Work {
    NodeType type = NODE_EMPTY;
    Context* context = nullptr;
    KernelWork kernel;
    CopyWork copy;
    FillWork fill;
    HostWork host;
    Event* event = nullptr;
    Graph* child = nullptr;
    double seconds = -1;
};

struct Node : Object {
    static constexpr Kind KIND = Kind::node;
    Graph* graph = nullptr;
    Work work;
    std::vector<Node*> deps, successors;
    std::vector<EdgeData> edges;  // one a dependency
    size_t index = 0;
    Node() : Object(Kind::node) {}
};

struct Graph : Object {
    static constexpr Kind KIND = Kind::graph;
    std::vector<Node*> nodes;  // in order of creation, so topological
    std::vector<void*> users;  // retained user objects
    bool child = false;
    Graph() : Object(Kind::graph) {}
};

struct ExecNode {
    Work work;
    Node* source = nullptr;
    bool enabled = true;
    std::vector<uint32_t> deps, successors;
    std::vector<bool> programmatic;  // one a dependency
};
struct Exec : Object {
    static constexpr Kind KIND = Kind::exec;
    std::vector<ExecNode> nodes;
    std::vector<uint32_t> ended_order;
    uint64_t flags = 0;
    ItemPtr last;
    std::vector<void*> users;
    Exec() : Object(Kind::exec) {}
};

struct UserObject : Object {
    static constexpr Kind KIND = Kind::user_object;
    void* data = nullptr;
    HostFunction destroy = nullptr;
    unsigned count = 0;
    UserObject() : Object(Kind::user_object) {}
};

// Work given to the device and not run yet. It runs when somebody synchronises, in a random order that keeps `after`.
struct Item {
    std::vector<ItemPtr> after;
    std::function<void()> run;
    bool done = false;
    double end_s = 0;
};

struct Allocation {
    size_t bytes = 0, mapped = 0;
    unsigned char* base = nullptr;
    char kind = 'd';  // device, pinned host
    bool alive = true;
};

struct Settings {
    std::string device = "h100_sxm", origin;
    unsigned sm_count = 132, sm_min = 8, sm_align = 8, sm_groups = 0, cc_major = 9, cc_minor = 0, version = 13050, warp = 32;
    unsigned max_threads = 1024, shared_bytes = 49152, sm_threads = 2048;
    size_t memory_bytes = 80000000000ull;
    uint64_t seed = 1;
    long fail_alloc = 0, fail_launch = 0, lose_device = 0;  // the n-th from now on; 0 is never
    bool dry = false;                                       // work takes its time and does nothing
    std::vector<std::string> host_kernels;
};

// A graph launch: its simulated time, and the SMs that its kernels may use, by the split that those are numbered in (0:
// the device's own).
struct GraphSpan {
    double begin_s, end_s;
    unsigned split, first_sm, end_sm;
};

using Clock = double (*)(int kind, double bytes);  // seconds of a copy: 'h' to device, 'd' to host, 'm' within

struct Machine {
    std::recursive_mutex lock;
    Settings settings;
    bool ready = false;
    Context primary;
    Stream legacy;
    Result sticky = SUCCESS;
    std::string last_refusal;
    std::vector<std::pair<std::string, std::string>> log;
    std::unordered_map<void*, Object*> objects;
    std::map<uintptr_t, Allocation> memory;  // by end address, so that lower_bound finds the range
    size_t used_bytes = 0;
    std::vector<ItemPtr> pending;
    std::deque<GraphSpan> graph_spans;  // of the latest launches
    double host_s = 0;  // simulated time that the host has seen
    std::vector<Capture*> captures;
    uint64_t next_id = 1, splits = 0, launches = 0, untimed = 0, graph_launches = 0;
    Clock clock = nullptr;
    std::vector<void*> kernel_libraries;
    std::map<std::string, const HostKernel*> host_kernels;
    std::unordered_map<const char*, uint64_t> calls;  // by entry point, whose names are literals
};
Machine& machine();

// Per thread: current contexts, the capture mode, the time told for the next launches.
struct ThreadState {
    std::vector<Context*> contexts;
    int capture_mode = CAPTURE_GLOBAL;
    double next_seconds = -1;
};
ThreadState& here();

Object* find(void* handle, Kind kind);
template <class T>
T* as(void* handle) {
    return static_cast<T*>(find(handle, T::KIND));
}
template <class T>
T* made() {
    auto* object = new T;
    machine().objects[object] = object;
    return object;
}

// device.cpp
Context* current_context();
void check_device(int device);
uint64_t fresh_id();
// stream.cpp
Stream* stream_of(void* handle);
Capture* capture_of(Stream* stream);
void invalidate(Capture* capture);
void unsafe_call(const char* name);
bool capturing(Stream* stream, Work&& work);
void forget_stream(Stream* stream);
void drop_captures();
void forget_graph(Graph* graph);
// graph.cpp
Node* add_node(Graph* graph, const std::vector<Node*>& deps, Work&& work, const EdgeData* data = nullptr);
void destroy_graph(Graph* graph);
void release_user(void* object, unsigned count);
// work.cpp
ItemPtr submit(Stream* stream, double seconds, std::function<void()> run);
void drain();
void sync_item(const ItemPtr& item);
void run_work(Work& work);
double seconds_of(const Work& work);
void enqueue(Stream* stream, Work&& work);
// kernel.cpp
void run_kernel(KernelWork& work);
void check_launch(const KernelWork& work, const Context* context);
void load_host_kernels();
// Makes the kernels of a host-built library known; what is wrong with it, empty if nothing is.
std::string add_host_kernels(const std::string& path);
const HostKernel* host_kernel(const std::string& name);
// memory.cpp
const Allocation* allocation_at(uintptr_t address);
void check_range(uintptr_t address, size_t bytes, const char* what, bool device);
std::string describe(uintptr_t address);
void protect(bool everything);
void free_everything();

// Every entry point registers itself by name, with the driver that brought it and the interface version it speaks.
struct Entry {
    const char* name;
    unsigned since, speaks;
    void* function;
};
std::vector<Entry>& entries();
struct Register {
    Register(const char* name, unsigned since, unsigned speaks, void* function) {
        entries().push_back({name, since, speaks, function});
    }
};

Result guarded(const char* name, const std::function<Result()>& body);
bool survives_sticky(const char* name);

template <auto F>
struct Wrapped;
template <class... A, Result (*F)(A...)>
struct Wrapped<F> {
    static inline const char* name = "";
    static Result call(A... args) {
        return guarded(name, [&] { return F(args...); });
    }
    explicit Wrapped(const char* n, unsigned since, unsigned speaks) {
        name = n;
        Register(n, since, speaks, reinterpret_cast<void*>(&call));
    }
};

// ENTRY(name, driver that brought it, interface version it speaks, parameters) { body; may refuse(); return SUCCESS; }
#define ENTRY(NAME, SINCE, SPEAKS, ...)                                                \
    static Result NAME(__VA_ARGS__);                                                   \
    static const Wrapped<&NAME> NAME##_entry(#NAME, SINCE, SPEAKS);                    \
    static Result NAME(__VA_ARGS__)

}  // namespace tgv
