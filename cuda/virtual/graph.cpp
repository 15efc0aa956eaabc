// Graphs: nodes and edges, instantiation, launches, and what an update of an executable graph may change. Source: CUDA
// driver API reference, "Graph Management".
#include <algorithm>

#include "state.h"

namespace tgv {

void launch_exec(Exec* exec, Stream* stream);

static EdgeData checked(const Node* before, const Node* after, const EdgeData* data) {
    if (!data || (!data->from_port && !data->to_port && !data->type)) return EdgeData{};
    if (data->to_port || data->type != DEPENDENCY_PROGRAMMATIC || data->from_port != PORT_PROGRAMMATIC)
        refuse(NOT_SUPPORTED, "edges of type %d from port %d are not offered", data->type, data->from_port);
    if (before->work.type != NODE_KERNEL || after->work.type != NODE_KERNEL)
        refuse(INVALID_VALUE, "a programmatic edge leads from a kernel to a kernel");
    if (machine().settings.cc_major < 9) refuse(NOT_SUPPORTED, "programmatic edges need compute capability 9.0");
    return *data;
}

Node* add_node(Graph* graph, const std::vector<Node*>& deps, Work&& work, const EdgeData* data) {
    auto* node = made<Node>();
    node->graph = graph;
    node->work = std::move(work);
    node->index = graph->nodes.size();
    for (size_t i = 0; i < deps.size(); i++) {
        auto* before = deps[i];
        node->edges.push_back(checked(before, node, data ? data + i : nullptr));
        if (before->graph != graph) refuse(INVALID_VALUE, "a dependency belongs to another graph");
        if (std::find(node->deps.begin(), node->deps.end(), before) != node->deps.end())
            refuse(INVALID_VALUE, "a dependency is named twice");
        node->deps.push_back(before);
        before->successors.push_back(node);
    }
    graph->nodes.push_back(node);
    return node;
}

void release_user(void* handle, unsigned count) {
    auto* user = static_cast<UserObject*>(handle);
    if (!user->alive) return;
    user->count -= std::min(user->count, count);
    if (user->count) return;
    user->alive = false;
    user->destroy(user->data);
}

void destroy_graph(Graph* graph) {
    graph->alive = false;
    forget_graph(graph);
    for (auto* node : graph->nodes) {
        node->alive = false;
        if (node->work.child) destroy_graph(node->work.child);
        node->work = Work{};
    }
    for (auto* user : graph->users) release_user(user, 1);
    graph->users.clear();
}

static std::vector<Node*> nodes_of(void* const* handles, size_t count) {
    std::vector<Node*> nodes;
    for (size_t i = 0; i < count; i++) nodes.push_back(as<Node>(handles[i]));
    return nodes;
}

// ------------------------------------------------------------------------------- parameters <-> work

static Context* node_context(void* handle) { return handle ? as<Context>(handle) : current_context(); }

static KernelWork kernel_work(const KernelNodeParams& p) {
    KernelWork work;
    // "ctx is ignored if func is set": a CUfunction already belongs to a context.
    work.kernel = as<Kernel>(p.func ? p.func : p.kern);
    std::copy(p.grid, p.grid + 3, work.grid);
    std::copy(p.block, p.block + 3, work.block);
    work.shared_bytes = p.shared_bytes;
    if (p.extra) refuse(NOT_SUPPORTED, "kernel arguments in `extra` are not offered");
    const auto* host = host_kernel(work.kernel->name);
    if (!host) refuse(NOT_FOUND, "kernel %s has no host build, so its parameters are unknown", work.kernel->name.c_str());
    if (host->param_count && !p.params) refuse(INVALID_VALUE, "kernel %s takes %u parameters", work.kernel->name.c_str(), host->param_count);
    for (unsigned i = 0; i < host->param_count; i++) {
        auto* bytes = static_cast<unsigned char*>(p.params[i]);
        work.args.emplace_back(bytes, bytes + host->param_sizes[i]);
    }
    return work;
}

static Work work_of_kernel(const KernelNodeParams& p) {
    Work work;
    work.type = NODE_KERNEL;
    work.kernel = kernel_work(p);
    work.context = p.func ? current_context() : node_context(p.ctx);
    check_launch(work.kernel, work.context);
    return work;
}

static CopyWork copy_work(const Memcpy3D& c) {
    if (c.height > 1 || c.depth > 1 || c.src_type == 3 || c.dst_type == 3)
        refuse(NOT_SUPPORTED, "only flat copies are offered as graph nodes");
    auto* dst = reinterpret_cast<unsigned char*>(c.dst_type == 1 ? reinterpret_cast<DevicePtr>(c.dst_host) : c.dst_device);
    auto* src = reinterpret_cast<const unsigned char*>(c.src_type == 1 ? reinterpret_cast<DevicePtr>(c.src_host) : c.src_device);
    return {dst + c.dst_x, src + c.src_x, c.width};
}

static Memcpy3D copy_params(const CopyWork& copy) {
    Memcpy3D c{};
    c.src_type = c.dst_type = 4;  // CU_MEMORYTYPE_UNIFIED
    c.src_device = reinterpret_cast<DevicePtr>(copy.src);
    c.dst_device = reinterpret_cast<DevicePtr>(copy.dst);
    c.width = copy.bytes;
    c.height = c.depth = 1;
    return c;
}

static KernelNodeParams kernel_params(Node* node) {
    auto& work = node->work.kernel;
    KernelNodeParams p{};
    p.kern = work.kernel;
    p.ctx = node->work.context;
    std::copy(work.grid, work.grid + 3, p.grid);
    std::copy(work.block, work.block + 3, p.block);
    p.shared_bytes = work.shared_bytes;
    work.pointers.clear();
    for (auto& arg : work.args) work.pointers.push_back(arg.data());
    p.params = work.pointers.data();
    return p;
}

static Node* kernel_node(void* handle) {
    auto* node = as<Node>(handle);
    if (node->work.type != NODE_KERNEL) refuse(INVALID_VALUE, "the node is no kernel node");
    return node;
}

// -------------------------------------------------------------------------------------------- building

ENTRY(cuGraphCreate, 10000, 10000, void** out, unsigned flags) {
    if (flags) refuse(INVALID_VALUE, "flags must be 0");
    *out = made<Graph>();
    return SUCCESS;
}

ENTRY(cuGraphDestroy, 10000, 10000, void* handle) {
    destroy_graph(as<Graph>(handle));
    return SUCCESS;
}

ENTRY(cuGraphAddNode, 12020, 12030, void** out, void* graph_handle, void* const* deps, const EdgeData* data, size_t count,
      GraphNodeParams* p) {
    auto* graph = as<Graph>(graph_handle);
    Work work;
    work.type = static_cast<NodeType>(p->type);
    switch (p->type) {
        case NODE_KERNEL: work = work_of_kernel(p->kernel); break;
        case NODE_MEMCPY:
            work.copy = copy_work(p->memcpy.copy);
            work.context = node_context(p->memcpy.copy_ctx);
            break;
        case NODE_MEMSET:
            if (p->memset.height > 1) refuse(NOT_SUPPORTED, "only flat fills are offered as graph nodes");
            work.fill = {reinterpret_cast<unsigned char*>(p->memset.dst), p->memset.value, p->memset.element_size, p->memset.width};
            work.context = node_context(p->memset.ctx);
            break;
        case NODE_EMPTY: break;
        case NODE_EVENT_RECORD: case NODE_WAIT_EVENT: work.event = as<Event>(p->event.event); break;
        default: refuse(NOT_SUPPORTED, "graph nodes of type %d are not offered", p->type);
    }
    *out = add_node(graph, nodes_of(deps, count), std::move(work), data);
    return SUCCESS;
}

ENTRY(cuGraphAddKernelNode, 10000, 12000, void** out, void* graph, void* const* deps, size_t count, const KernelNodeParams* p) {
    auto params = *p;
    if (!params.func && !params.kern) refuse(INVALID_VALUE, "no kernel");
    *out = add_node(as<Graph>(graph), nodes_of(deps, count), work_of_kernel(params));
    return SUCCESS;
}

ENTRY(cuGraphAddEmptyNode, 10000, 10000, void** out, void* graph, void* const* deps, size_t count) {
    *out = add_node(as<Graph>(graph), nodes_of(deps, count), Work{});
    return SUCCESS;
}

ENTRY(cuGraphAddDependencies, 10000, 12030, void* graph_handle, void* const* from, void* const* to, const EdgeData* data, size_t count) {
    auto* graph = as<Graph>(graph_handle);
    for (size_t i = 0; i < count; i++) {
        auto *a = as<Node>(from[i]), *b = as<Node>(to[i]);
        if (a->graph != graph || b->graph != graph) refuse(INVALID_VALUE, "an edge leaves the graph");
        if (a->index >= b->index) refuse(NOT_SUPPORTED, "edges from a later to an earlier node are not offered");
        b->edges.push_back(checked(a, b, data ? data + i : nullptr));
        b->deps.push_back(a);
        a->successors.push_back(b);
    }
    return SUCCESS;
}

ENTRY(cuGraphGetNodes, 10000, 10000, void* handle, void** out, size_t* count) {
    auto* graph = as<Graph>(handle);
    size_t room = out ? *count : 0;
    for (size_t i = 0; i < room; i++) out[i] = i < graph->nodes.size() ? graph->nodes[i] : nullptr;
    *count = out ? std::min(room, graph->nodes.size()) : graph->nodes.size();
    return SUCCESS;
}

// "If edgeData is NULL and an edge has non-zero data, CUDA_ERROR_LOSSY_QUERY is returned" (cuGraphGetEdges).
static void tell(const EdgeData& edge, EdgeData* to) {
    if (!to && edge.type) refuse(LOSSY_QUERY, "an edge has data that was not asked for");
    if (to) *to = edge;
}

ENTRY(cuGraphGetEdges, 10000, 12030, void* handle, void** from, void** to, EdgeData* data, size_t* count) {
    size_t room = from ? *count : 0, n = 0;
    for (auto* node : as<Graph>(handle)->nodes)
        for (size_t i = 0; i < node->deps.size(); i++, n++)
            if (n < room) {
                from[n] = node->deps[i];
                to[n] = node;
                tell(node->edges[i], data ? data + n : nullptr);
            }
    *count = from ? std::min(room, n) : n;
    return SUCCESS;
}

static const EdgeData& edge_between(const Node* before, const Node* after) {
    auto at = std::find(after->deps.begin(), after->deps.end(), before) - after->deps.begin();
    return after->edges[static_cast<size_t>(at)];
}

// The neighbours of a node, of which some are before it; without one, nodes without edges.
static Result list_nodes(const std::vector<Node*>& nodes, void** out, EdgeData* data, size_t* count,
                         const Node* of = nullptr, bool before = false) {
    size_t room = out ? *count : 0;
    for (size_t i = 0; i < room; i++) {
        out[i] = i < nodes.size() ? nodes[i] : nullptr;
        if (of && i < nodes.size())
            tell(before ? edge_between(nodes[i], of) : edge_between(of, nodes[i]), data ? data + i : nullptr);
        else if (data)
            data[i] = EdgeData{};
    }
    *count = out ? std::min(room, nodes.size()) : nodes.size();
    return SUCCESS;
}

ENTRY(cuGraphNodeGetDependencies, 10000, 12030, void* node, void** out, EdgeData* data, size_t* count) {
    return list_nodes(as<Node>(node)->deps, out, data, count, as<Node>(node), true);
}

ENTRY(cuGraphNodeGetDependentNodes, 10000, 12030, void* node, void** out, EdgeData* data, size_t* count) {
    return list_nodes(as<Node>(node)->successors, out, data, count, as<Node>(node));
}

ENTRY(cuGraphGetRootNodes, 10000, 10000, void* handle, void** out, size_t* count) {
    std::vector<Node*> roots;
    for (auto* node : as<Graph>(handle)->nodes)
        if (node->deps.empty()) roots.push_back(node);
    return list_nodes(roots, out, nullptr, count);
}

ENTRY(cuGraphNodeGetType, 10000, 10000, void* node, int* type) {
    *type = as<Node>(node)->work.type;
    return SUCCESS;
}

ENTRY(cuGraphKernelNodeGetParams, 10000, 12000, void* node, KernelNodeParams* params) {
    *params = kernel_params(kernel_node(node));
    return SUCCESS;
}

ENTRY(cuGraphMemcpyNodeGetParams, 10000, 10000, void* handle, Memcpy3D* params) {
    auto* node = as<Node>(handle);
    if (node->work.type != NODE_MEMCPY) refuse(INVALID_VALUE, "the node is no copy node");
    *params = copy_params(node->work.copy);
    return SUCCESS;
}

ENTRY(cuGraphEventRecordNodeGetEvent, 11010, 11010, void* handle, void** event) {
    auto* node = as<Node>(handle);
    if (node->work.type != NODE_EVENT_RECORD) refuse(INVALID_VALUE, "the node records no event");
    *event = node->work.event;
    return SUCCESS;
}

ENTRY(cuGraphNodeGetParams, 13020, 13020, void* handle, GraphNodeParams* p) {
    auto* node = as<Node>(handle);
    std::memset(p, 0, sizeof *p);
    p->type = node->work.type;
    if (p->type == NODE_KERNEL) p->kernel = kernel_params(node);
    if (p->type == NODE_MEMCPY) {
        p->memcpy.copy = copy_params(node->work.copy);
        p->memcpy.copy_ctx = node->work.context;
    }
    if (p->type == NODE_MEMSET) {
        auto& f = node->work.fill;
        p->memset = {reinterpret_cast<DevicePtr>(f.dst), 0, f.value, f.element, f.count, 1, node->work.context};
    }
    if (p->type == NODE_EVENT_RECORD || p->type == NODE_WAIT_EVENT) p->event.event = node->work.event;
    return SUCCESS;
}

ENTRY(cuGraphKernelNodeSetParams, 10000, 12000, void* handle, const KernelNodeParams* p) {
    auto* node = kernel_node(handle);
    auto params = *p;
    if (!params.func && !params.ctx) params.ctx = node->work.context;
    auto seconds = node->work.seconds;
    node->work = work_of_kernel(params);
    node->work.seconds = seconds;
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------- user objects

ENTRY(cuUserObjectCreate, 11030, 11030, void** out, void* data, HostFunction destroy, unsigned count, unsigned) {
    auto* user = made<UserObject>();
    user->data = data;
    user->destroy = destroy;
    user->count = count;
    *out = user;
    return SUCCESS;
}

ENTRY(cuUserObjectRetain, 11030, 11030, void* user, unsigned count) {
    as<UserObject>(user)->count += count;
    return SUCCESS;
}

ENTRY(cuUserObjectRelease, 11030, 11030, void* user, unsigned count) {
    release_user(as<UserObject>(user), count);
    return SUCCESS;
}

ENTRY(cuGraphRetainUserObject, 11030, 11030, void* graph, void* user_handle, unsigned count, unsigned flags) {
    auto* user = as<UserObject>(user_handle);
    if (!(flags & 1)) user->count += count;  // CU_GRAPH_USER_OBJECT_MOVE hands the caller's references over
    for (unsigned i = 0; i < count; i++) as<Graph>(graph)->users.push_back(user);
    return SUCCESS;
}

ENTRY(cuGraphReleaseUserObject, 11030, 11030, void* handle, void* user, unsigned count) {
    auto& users = as<Graph>(handle)->users;
    for (unsigned i = 0; i < count; i++) {
        auto found = std::find(users.begin(), users.end(), user);
        if (found == users.end()) refuse(INVALID_VALUE, "the graph does not hold the object");
        users.erase(found);
        release_user(user, 1);
    }
    return SUCCESS;
}

// -------------------------------------------------------------------------------------- executable graphs

static std::vector<ExecNode> exec_nodes(Graph* graph) {
    std::vector<ExecNode> nodes;
    nodes.reserve(graph->nodes.size());
    for (auto* node : graph->nodes) {
        if (node->work.context && !node->work.context->alive)
            refuse(CONTEXT_IS_DESTROYED, "node %zu runs in a context that was destroyed", node->index);
        if (node->work.type == NODE_EVENT_RECORD && !node->work.event->alive)
            refuse(INVALID_VALUE, "node %zu records an event that was destroyed", node->index);
        ExecNode copy;
        copy.work = node->work;
        copy.source = node;
        for (auto* before : node->deps) {
            copy.programmatic.push_back(node->edges[copy.deps.size()].type == DEPENDENCY_PROGRAMMATIC);
            copy.deps.push_back(static_cast<uint32_t>(before->index));
            nodes[before->index].successors.push_back(static_cast<uint32_t>(node->index));
        }
        nodes.push_back(std::move(copy));
    }
    return nodes;
}

static Result instantiate(void** out, Graph* graph, uint64_t flags) {
    if (flags & ~15ull) refuse(INVALID_VALUE, "instantiation flags 0x%llx", (unsigned long long)flags);
    if (flags & 4) refuse(NOT_SUPPORTED, "device-launched graphs are not offered");
    auto* exec = made<Exec>();
    exec->alive = false;
    exec->nodes = exec_nodes(graph);
    exec->flags = flags;
    exec->users = graph->users;
    for (auto* user : exec->users) static_cast<UserObject*>(user)->count++;
    exec->alive = true;
    *out = exec;
    return SUCCESS;
}

ENTRY(cuGraphInstantiate, 11040, 11040, void** exec, void* graph, unsigned long long flags) {
    return instantiate(exec, as<Graph>(graph), flags);
}

ENTRY(cuGraphInstantiateWithFlags, 11040, 11040, void** exec, void* graph, unsigned long long flags) {
    return instantiate(exec, as<Graph>(graph), flags);
}

ENTRY(cuGraphInstantiateWithParams, 12000, 12000, void** exec, void* graph, InstantiateParams* params) {
    params->error_node = nullptr;
    params->result = 1;  // CUDA_GRAPH_INSTANTIATE_ERROR until it went well
    auto result = instantiate(exec, as<Graph>(graph), params->flags);
    params->result = 0;
    return result;
}

static Exec* exec_of(void* handle) { return as<Exec>(handle); }

ENTRY(cuGraphExecDestroy, 10000, 10000, void* handle) {
    auto* exec = exec_of(handle);
    drain();
    exec->alive = false;
    exec->nodes.clear();
    for (auto* user : exec->users) release_user(user, 1);
    exec->users.clear();
    return SUCCESS;
}

ENTRY(cuGraphExecGetFlags, 12000, 12000, void* exec, uint64_t* flags) {
    *flags = exec_of(exec)->flags;
    return SUCCESS;
}

ENTRY(cuGraphUpload, 11010, 11010, void* exec, void* stream) {
    exec_of(exec);
    stream_of(stream);
    return SUCCESS;
}

ENTRY(cuGraphLaunch, 10000, 10000, void* exec, void* stream_handle) {
    auto* stream = stream_of(stream_handle);
    if (stream->capture) {
        invalidate(stream->capture);
        refuse(NOT_SUPPORTED, "capturing the launch of a graph is not offered; the capture is invalid");
    }
    launch_exec(exec_of(exec), stream);
    return SUCCESS;
}

static bool is_pointer_update(const Work& old, const Work& fresh, int* why) {
    if (old.type != fresh.type) return *why = UPDATE_NODE_TYPE, false;
    if (old.type == NODE_KERNEL) {
        // "The owning context of the function cannot change", nor may a launch become cooperative or change its cluster.
        if (old.context != fresh.context) return *why = UPDATE_FUNCTION, false;
        if (old.kernel.cooperative != fresh.kernel.cooperative || old.kernel.cluster != fresh.kernel.cluster)
            return *why = UPDATE_ATTRIBUTES, false;
    }
    if (old.type == NODE_MEMCPY) {
        if (old.context != fresh.context) return *why = UPDATE_PARAMETERS, false;
        auto kind = [](const void* at) {
            auto* a = allocation_at(reinterpret_cast<uintptr_t>(at));
            return a ? a->kind : 'h';
        };
        if (kind(old.copy.src) != kind(fresh.copy.src) || kind(old.copy.dst) != kind(fresh.copy.dst))
            return *why = UPDATE_PARAMETERS, false;
    }
    if (old.type == NODE_MEMSET && old.context != fresh.context) return *why = UPDATE_PARAMETERS, false;
    return true;
}

ENTRY(cuGraphExecUpdate, 10020, 12000, void* exec_handle, void* graph_handle, UpdateResult* result) {
    auto* exec = exec_of(exec_handle);
    auto* graph = as<Graph>(graph_handle);
    drain();
    *result = {UPDATE_OK, nullptr, nullptr};
    auto fresh = exec_nodes(graph);
    auto failed = [&](int why, size_t at) {
        *result = {why, at < graph->nodes.size() ? graph->nodes[at] : nullptr, nullptr};
        refuse(GRAPH_EXEC_UPDATE_FAILURE, "update code %d at node %zu", why, at);
    };
    if (fresh.size() != exec->nodes.size()) failed(UPDATE_TOPOLOGY, fresh.size());
    for (size_t i = 0; i < fresh.size(); i++) {
        int why = UPDATE_OK;
        if (fresh[i].work.type != exec->nodes[i].work.type) failed(UPDATE_NODE_TYPE, i);
        if (fresh[i].deps != exec->nodes[i].deps || fresh[i].programmatic != exec->nodes[i].programmatic)
            failed(UPDATE_TOPOLOGY, i);
        if (!is_pointer_update(exec->nodes[i].work, fresh[i].work, &why)) failed(why, i);
    }
    for (size_t i = 0; i < fresh.size(); i++) {
        if (fresh[i].work.seconds < 0) fresh[i].work.seconds = exec->nodes[i].work.seconds;
        exec->nodes[i].work = std::move(fresh[i].work);
    }
    return SUCCESS;
}

static ExecNode& exec_node(void* exec_handle, void* node_handle) {
    auto* exec = exec_of(exec_handle);
    auto found = machine().objects.find(node_handle);
    if (found == machine().objects.end() || found->second->kind != Kind::node) refuse(INVALID_HANDLE, "not a graph node");
    auto* node = static_cast<Node*>(found->second);  // the graph may be gone; its nodes still name those of the executable
    if (node->index >= exec->nodes.size() || exec->nodes[node->index].source != node)
        refuse(INVALID_VALUE, "the node is not part of the executable graph");
    return exec->nodes[node->index];
}

ENTRY(cuGraphExecKernelNodeSetParams, 10010, 12000, void* exec, void* node, const KernelNodeParams* p) {
    auto& target = exec_node(exec, node);
    drain();
    auto params = *p;
    if (!params.func && !params.ctx) params.ctx = target.work.context;
    Work fresh;
    fresh.type = NODE_KERNEL;
    fresh.kernel = kernel_work(params);
    fresh.context = params.func ? target.work.context : as<Context>(params.ctx);
    fresh.kernel.cooperative = target.work.kernel.cooperative;
    fresh.kernel.cluster = target.work.kernel.cluster;
    fresh.kernel.dependent = target.work.kernel.dependent;
    int why = UPDATE_OK;
    if (!is_pointer_update(target.work, fresh, &why)) refuse(INVALID_VALUE, "the owning context of a kernel node cannot change");
    check_launch(fresh.kernel, fresh.context);
    fresh.seconds = target.work.seconds;
    target.work = std::move(fresh);
    return SUCCESS;
}

ENTRY(cuGraphNodeSetEnabled, 11060, 11060, void* exec, void* node, unsigned enabled) {
    auto& target = exec_node(exec, node);
    if (target.work.type > NODE_MEMSET) refuse(INVALID_VALUE, "only kernel, copy and fill nodes can be disabled");
    drain();
    target.enabled = enabled != 0;
    return SUCCESS;
}

ENTRY(cuGraphNodeGetEnabled, 11060, 11060, void* exec, void* node, unsigned* enabled) {
    *enabled = exec_node(exec, node).enabled;
    return SUCCESS;
}

}  // namespace tgv
