// Work that streams have been given: the order it runs in, and the simulated time it takes.
//
// Nothing runs when it is submitted. A call that synchronises runs everything that is pending, in a random order that
// keeps the dependencies, so that a missing wait shows as a wrong result.
#include <algorithm>

#include "state.h"

namespace tgv {

static uint64_t random_number() {  // xorshift64*, Vigna 2016
    auto& x = machine().settings.seed;
    x = x ? x : 88172645463325252ull;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return x * 2685821657736338717ull;
}

ItemPtr submit(Stream* stream, double seconds, std::function<void()> run) {
    auto& m = machine();
    auto item = std::make_shared<Item>();
    if (stream->last) item->after.push_back(stream->last);
    // The legacy stream waits for the blocking streams of its context, and they for it.
    if (stream->legacy()) {
        for (auto& [handle, object] : m.objects)
            if (object->kind == Kind::stream && object->alive) {
                auto* other = static_cast<Stream*>(object);
                if (other->blocking() && other->context == stream->context && other->last) item->after.push_back(other->last);
            }
    } else if (stream->blocking() && stream->context->legacy && stream->context->legacy->last) {
        item->after.push_back(stream->context->legacy->last);
    }
    double start = m.host_s;
    for (auto& before : item->after) start = std::max(start, before->end_s);
    item->end_s = start + seconds;
    item->run = std::move(run);
    stream->last = item;
    m.pending.push_back(item);
    return item;
}

// Give `count` tasks to `run` in a random order in which every task follows its predecessors.
template <class Successors>
static void in_random_order(std::vector<uint32_t> missing, const Successors& successors, const std::function<void(uint32_t)>& run) {
    std::vector<uint32_t> ready;
    for (uint32_t i = 0; i < missing.size(); i++)
        if (!missing[i]) ready.push_back(i);
    while (!ready.empty()) {
        std::swap(ready[random_number() % ready.size()], ready.back());
        uint32_t task = ready.back();
        ready.pop_back();
        run(task);
        if (machine().sticky != SUCCESS) return;
        for (uint32_t next : successors(task))
            if (--missing[next] == 0) ready.push_back(next);
    }
}

void drain() {
    auto& m = machine();
    while (!m.pending.empty() && m.sticky == SUCCESS) {
        std::vector<ItemPtr> items;
        items.swap(m.pending);
        std::unordered_map<Item*, uint32_t> place;
        for (uint32_t i = 0; i < items.size(); i++) place[items[i].get()] = i;
        std::vector<uint32_t> missing(items.size(), 0);
        std::vector<std::vector<uint32_t>> successors(items.size());
        for (uint32_t i = 0; i < items.size(); i++)
            for (auto& before : items[i]->after) {
                auto found = place.find(before.get());
                if (found == place.end()) continue;
                successors[found->second].push_back(i);
                missing[i]++;
            }
        in_random_order(missing, [&](uint32_t i) -> std::vector<uint32_t>& { return successors[i]; }, [&](uint32_t i) {
            if (items[i]->run) items[i]->run();
            items[i]->done = true;
            items[i]->run = nullptr;
            m.host_s = std::max(m.host_s, items[i]->end_s);
        });
        for (auto& item : items) item->after.clear();
    }
    if (m.sticky != SUCCESS) m.pending.clear();
}

void sync_item(const ItemPtr& item) {
    drain();
    if (machine().sticky != SUCCESS) refuse(machine().sticky, "%s", machine().last_refusal.c_str());
    if (item) machine().host_s = std::max(machine().host_s, item->end_s);
}

static void fail_device(const Refusal& refusal) {
    auto& m = machine();
    m.sticky = refusal.code;
    m.last_refusal = refusal.text;
    note("error", refusal.text);
}

static bool comes_due(long& countdown) { return countdown > 0 && --countdown == 0; }

void run_work(Work& work) {
    auto& s = machine().settings;
    try {
        if (s.dry) return;
        if (comes_due(s.lose_device)) refuse(UNKNOWN, "injected: the device was lost");
        switch (work.type) {
            case NODE_KERNEL:
                if (comes_due(s.fail_launch)) refuse(LAUNCH_FAILED, "injected: kernel %s failed", work.kernel.kernel->name.c_str());
                run_kernel(work.kernel);
                break;
            case NODE_MEMCPY:
                check_range(reinterpret_cast<uintptr_t>(work.copy.dst), work.copy.bytes, "copy to", false);
                check_range(reinterpret_cast<uintptr_t>(work.copy.src), work.copy.bytes, "copy from", false);
                std::memmove(work.copy.dst, work.copy.src, work.copy.bytes);
                break;
            case NODE_MEMSET: {
                auto& f = work.fill;
                check_range(reinterpret_cast<uintptr_t>(f.dst), f.count * f.element, "memset of", true);
                for (size_t i = 0; i < f.count; i++) std::memcpy(f.dst + i * f.element, &f.value, f.element);
                break;
            }
            case NODE_HOST: work.host.function(work.host.data); break;
            default: break;
        }
    } catch (const Refusal& refusal) {
        fail_device(refusal);
    }
}

// Who knows a time says it: a node's, the thread's next launches', or taskgraph's clock for copies.
double seconds_of(const Work& work) {
    auto& m = machine();
    if (work.seconds >= 0) return work.seconds;
    if (work.type == NODE_KERNEL || work.type == NODE_MEMSET) {
        if (here().next_seconds >= 0) return here().next_seconds;
        m.untimed++;
    } else if (work.type == NODE_MEMCPY) {
        if (here().next_seconds >= 0) return here().next_seconds;
        if (!m.clock) return m.untimed++, 0.0;
        bool from_device = allocation_at(reinterpret_cast<uintptr_t>(work.copy.src)) &&
                           allocation_at(reinterpret_cast<uintptr_t>(work.copy.src))->kind == 'd';
        bool to_device = allocation_at(reinterpret_cast<uintptr_t>(work.copy.dst)) &&
                         allocation_at(reinterpret_cast<uintptr_t>(work.copy.dst))->kind == 'd';
        return m.clock(from_device && to_device ? 'm' : to_device ? 'h' : 'd', static_cast<double>(work.copy.bytes));
    }
    return 0.0;
}

void enqueue(Stream* stream, Work&& work) {
    double seconds = seconds_of(work);
    auto held = std::make_shared<Work>(std::move(work));
    submit(stream, seconds, [held] { run_work(*held); });
}

// ---------------------------------------------------------------------------------------- graph launch

// Fill the end of every node, relative to the launch: its predecessors' latest end and its own seconds.
static std::vector<double> node_ends(Exec* exec) {
    std::vector<double> ends(exec->nodes.size(), 0.0);
    for (size_t i = 0; i < exec->nodes.size(); i++) {
        auto& node = exec->nodes[i];
        double start = 0.0;
        for (uint32_t before : node.deps) start = std::max(start, ends[before]);
        ends[i] = start + (node.enabled ? seconds_of(node.work) : 0.0);
    }
    return ends;
}

// Keep when and where a graph runs, of the latest launches.
static void remember(Exec* exec, double begin_s, double end_s) {
    auto& spans = machine().graph_spans;
    GraphSpan span{begin_s, end_s, 0, machine().settings.sm_count, 0};
    for (auto& node : exec->nodes) {
        if (node.work.type != NODE_KERNEL || !node.work.context) continue;
        auto& c = *node.work.context;
        unsigned count = c.green() ? c.sm_count : machine().settings.sm_count;
        span.split = std::max(span.split, c.split);
        span.first_sm = std::min(span.first_sm, c.first_sm);
        span.end_sm = std::max(span.end_sm, c.first_sm + count);
    }
    spans.push_back(span);
    if (spans.size() > 256) spans.pop_front();
}

void launch_exec(Exec* exec, Stream* stream) {
    auto& m = machine();
    m.graph_launches++;
    auto ends = node_ends(exec);
    double whole = ends.empty() ? 0.0 : *std::max_element(ends.begin(), ends.end());
    if (exec->last && !exec->last->done && exec->last != stream->last) {
        auto bridge = submit(stream, 0.0, nullptr);  // an executable graph never runs beside itself
        bridge->after.push_back(exec->last);
        bridge->end_s = std::max(bridge->end_s, exec->last->end_s);
    }
    auto item = submit(stream, whole, [exec] {
        if (!exec->alive) {
            note("error", "an executable graph was destroyed before its launch ran");
            return;
        }
        std::vector<uint32_t> missing;
        for (auto& node : exec->nodes) missing.push_back(static_cast<uint32_t>(node.deps.size()));
        in_random_order(missing, [&](uint32_t i) -> std::vector<uint32_t>& { return exec->nodes[i].successors; },
                        [&](uint32_t i) {
                            if (exec->nodes[i].enabled) run_work(exec->nodes[i].work);
                        });
    });
    double begin = item->end_s - whole;
    remember(exec, begin, item->end_s);
    exec->last = item;
    for (size_t i = 0; i < exec->nodes.size(); i++) {
        auto* event = exec->nodes[i].work.event;
        if (exec->nodes[i].work.type != NODE_EVENT_RECORD || !event->alive) continue;
        event->recorded = true;
        event->capture = nullptr;
        event->item = item;
        event->at_s = begin + ends[i];
    }
}

}  // namespace tgv
