// The control channel: settings beside the library, faults, the sanitizer's log, and the functions that taskgraph calls.
#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <sstream>

#include "state.h"

namespace tgv {

Machine& machine() {
    static auto* one = new Machine;  // never destroyed: Python threads may call until the very end
    return *one;
}

ThreadState& here() {
    static thread_local ThreadState state;
    return state;
}

std::vector<Entry>& entries() {
    static auto* all = new std::vector<Entry>;
    return *all;
}

const char* name_of(Kind kind) {
    static const char* names[] = {"context", "green context", "stream", "event", "graph", "graph node",
                                  "executable graph", "library", "kernel", "resource descriptor", "user object"};
    return names[static_cast<int>(kind)];
}

Object::Object(Kind k) : kind(k) {}

void refuse(Result code, const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw Refusal{code, text};
}

void note(const char* level, const std::string& text) { machine().log.emplace_back(level, text); }

Object* find(void* handle, Kind kind) {
    auto& objects = machine().objects;
    auto found = objects.find(handle);
    if (found == objects.end() || found->second->kind != kind)
        refuse(kind == Kind::context ? INVALID_CONTEXT : INVALID_HANDLE, "%p is not a %s", handle, name_of(kind));
    if (!found->second->alive) {
        note("error", std::string("use of a destroyed ") + name_of(kind));
        refuse(kind == Kind::context ? CONTEXT_IS_DESTROYED : INVALID_HANDLE, "the %s %p was destroyed", name_of(kind),
               handle);
    }
    return found->second;
}

bool survives_sticky(const char* name) {
    static const std::set<std::string> names = {
        "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuDevicePrimaryCtxReset",
        "cuDevicePrimaryCtxRelease", "cuStreamDestroy", "cuEventDestroy", "cuGraphDestroy", "cuGraphExecDestroy",
        "cuGreenCtxDestroy", "cuMemFree", "cuMemFreeHost", "cuLibraryUnload", "cuUserObjectRelease",
        "cuCtxPopCurrent", "cuCtxPushCurrent", "cuCtxSetCurrent", "cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGet",
        "cuDeviceGetCount", "cuDeviceGetAttribute", "cuDeviceGetName", "cuDevicePrimaryCtxGetState",
    };
    return names.count(name) > 0;
}

static void settings_line(const std::string& line) {
    auto& s = machine().settings;
    std::istringstream in(line);
    std::string key;
    if (!(in >> key) || key[0] == '#') return;
    std::string text;
    std::getline(in >> std::ws, text);
    static const std::map<std::string, std::function<void(Settings&, const std::string&)>> known = {
        {"device", [](Settings& to, const std::string& v) { to.device = v; }},
        {"origin", [](Settings& to, const std::string& v) { to.origin = v; }},
        {"sm_count", [](Settings& to, const std::string& v) { to.sm_count = std::stoul(v); }},
        {"sm_min", [](Settings& to, const std::string& v) { to.sm_min = std::stoul(v); }},
        {"sm_groups", [](Settings& to, const std::string& v) { to.sm_groups = std::stoul(v); }},
        {"sm_align", [](Settings& to, const std::string& v) { to.sm_align = std::stoul(v); }},
        {"cc_major", [](Settings& to, const std::string& v) { to.cc_major = std::stoul(v); }},
        {"cc_minor", [](Settings& to, const std::string& v) { to.cc_minor = std::stoul(v); }},
        {"driver_version", [](Settings& to, const std::string& v) { to.version = std::stoul(v); }},
        {"memory_bytes", [](Settings& to, const std::string& v) { to.memory_bytes = std::stoull(v); }},
        {"seed", [](Settings& to, const std::string& v) { to.seed = std::stoull(v); }},
        {"fail_alloc", [](Settings& to, const std::string& v) { to.fail_alloc = std::stol(v); }},
        {"fail_launch", [](Settings& to, const std::string& v) { to.fail_launch = std::stol(v); }},
        {"lose_device", [](Settings& to, const std::string& v) { to.lose_device = std::stol(v); }},
        {"host_kernels", [](Settings& to, const std::string& v) { to.host_kernels.push_back(v); }},
    };
    auto rule = known.find(key);
    if (rule == known.end()) {
        note("error", "control: unknown setting " + key);
        return;
    }
    try {
        rule->second(s, text);
    } catch (const std::exception&) {
        note("error", "control: cannot read " + line);
    }
}

// The file `control` beside the library, as it was found on the library path.
static void read_control() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(&read_control), &info) || !info.dli_fname) return;
    std::string path = info.dli_fname;
    auto slash = path.rfind('/');
    std::ifstream file((slash == std::string::npos ? "." : path.substr(0, slash)) + "/control");
    for (std::string line; std::getline(file, line);) settings_line(line);
}

Result guarded(const char* name, const std::function<Result()>& body) {
    auto& m = machine();
    std::lock_guard<std::recursive_mutex> hold(m.lock);
    static bool once = (read_control(), true);
    (void)once;
    m.calls[name]++;
    try {
        if (!m.ready && std::strcmp(name, "cuInit") && std::strncmp(name, "cuGet", 5) && std::strcmp(name, "cuDriverGetVersion"))
            refuse(NOT_INITIALIZED, "cuInit was not called");
        if (m.sticky != SUCCESS && !survives_sticky(name)) return m.sticky;
        return body();
    } catch (const Refusal& refusal) {
        m.last_refusal = std::string(name) + ": " + refusal.text;
        if (refusal.code != NOT_READY) note("refused", m.last_refusal);
        return refusal.code;
    }
}

static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if (c == '\n') {
            out += "\\n";
            continue;
        }
        out += c;
    }
    return out + "\"";
}

static std::string report() {
    auto& m = machine();
    std::map<std::string, size_t> live;
    size_t allocations = 0, bytes = 0;
    for (auto& [handle, object] : m.objects)
        if (object->alive && object->kind != Kind::node) live[name_of(object->kind)]++;
    for (auto& [end, a] : m.memory)
        if (a.alive) allocations++, bytes += a.bytes;
    std::ostringstream out;
    out.precision(12);
    out << "{\"device\": " << quoted(m.settings.device) << ", \"host_s\": " << m.host_s << ", \"launches\": " << m.launches
        << ", \"graph_launches\": " << m.graph_launches << ", \"untimed\": " << m.untimed << ", \"pending\": "
        << m.pending.size() << ", \"allocations\": " << allocations << ", \"allocated_bytes\": " << bytes << ", \"live\": {";
    const char* comma = "";
    for (auto& [name, count] : live) out << comma << quoted(name) << ": " << count, comma = ", ";
    out << "}, \"calls\": {";
    std::map<std::string, uint64_t> calls;  // an entry point may have several versions
    for (auto& [name, count] : m.calls) calls[name] += count;
    comma = "";
    for (auto& [name, count] : calls) out << comma << quoted(name) << ": " << count, comma = ", ";
    out << "}, \"log\": [";
    comma = "";
    for (auto& [level, text] : m.log) out << comma << "[" << quoted(level) << ", " << quoted(text) << "]", comma = ", ";
    out << "], \"graph_spans\": [";
    comma = "";
    for (auto& s : m.graph_spans) {
        out << comma << "[" << s.begin_s << ", " << s.end_s << ", " << s.split << ", " << s.first_sm << ", " << s.end_sm << "]";
        comma = ", ";
    }
    out << "], \"last_refusal\": " << quoted(m.last_refusal) << "}";
    return out.str();
}

}  // namespace tgv

using namespace tgv;

// What taskgraph calls beside the driver interface; a real driver has none of it.
#pragma GCC visibility push(default)
extern "C" {

void tgv_control(const char* lines) {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    std::istringstream in(lines);
    for (std::string line; std::getline(in, line);) settings_line(line);
}

// The report as JSON; returns the bytes it needs, so call twice.
size_t tgv_report(char* out, size_t bytes) {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    std::string text = report();
    if (out && bytes) {
        std::strncpy(out, text.c_str(), bytes - 1);
        out[bytes - 1] = 0;
    }
    return text.size() + 1;
}

// Makes the kernels of a host-built library known; 1, and what is wrong with it, if they cannot be.
int tgv_add_kernels(const char* path, char* error, size_t bytes) {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    std::string wrong = add_host_kernels(path);
    std::snprintf(error, bytes, "%s", wrong.c_str());
    return !wrong.empty();
}

void tgv_clear_log() {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    machine().log.clear();
}

// Seconds of the launches and fills of this thread from now on; below zero ends it.
void tgv_next_seconds(double seconds) { here().next_seconds = seconds; }

// From here on work takes its time and does nothing, or does it again; what was given before is done first.
void tgv_dry(int on) {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    drain();
    machine().settings.dry = on != 0;
}

// Seconds of nodes of a graph, before it is instantiated. Returns how many handles were no node.
size_t tgv_node_seconds(void** nodes, const double* seconds, size_t count) {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    size_t strange = 0;
    for (size_t i = 0; i < count; i++) {
        auto found = machine().objects.find(nodes[i]);
        if (found == machine().objects.end() || found->second->kind != Kind::node) {
            strange++;
            continue;
        }
        static_cast<Node*>(found->second)->work.seconds = seconds[i];
    }
    return strange;
}

void tgv_clock(Clock clock) { machine().clock = clock; }

double tgv_simulated_s() {
    std::lock_guard<std::recursive_mutex> hold(machine().lock);
    return machine().host_s;
}
}
#pragma GCC visibility pop
