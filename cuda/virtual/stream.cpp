// Streams and events: order, and the rules of stream capture. Sources: CUDA Programming Guide, "CUDA Graphs: stream
// capture", and the driver API reference of the functions named here.
#include <algorithm>

#include "state.h"

namespace tgv {

Stream* stream_of(void* handle) {
    auto value = reinterpret_cast<uintptr_t>(handle);
    if (value == 0 || value == STREAM_LEGACY || value == STREAM_PER_THREAD) {
        auto* context = current_context();
        if (!context->legacy) refuse(INVALID_CONTEXT, "the default stream of a green context is not offered");
        return context->legacy;
    }
    auto* stream = as<Stream>(handle);
    if (!stream->context->alive) {
        note("error", "use of a stream whose context was destroyed");
        refuse(CONTEXT_IS_DESTROYED, "the context of stream %llu was destroyed", (unsigned long long)stream->id);
    }
    return stream;
}

Capture* capture_of(Stream* stream) { return stream->capture; }

void invalidate(Capture* capture) { capture->invalid = true; }

// A call that is "potentially unsafe" during capture (cuThreadExchangeStreamCaptureMode): it is refused by the mode of
// the calling thread, and the captures that forbid it are invalidated.
void unsafe_call(const char* name) {
    if (here().capture_mode == CAPTURE_RELAXED) return;
    bool refused = false;
    for (auto* capture : machine().captures) {
        bool mine = capture->thread == std::this_thread::get_id() && capture->mode != CAPTURE_RELAXED;
        bool others = capture->mode == CAPTURE_GLOBAL && here().capture_mode == CAPTURE_GLOBAL;
        if (!mine && !others) continue;
        invalidate(capture);
        refused = true;
    }
    if (refused) refuse(STREAM_CAPTURE_UNSUPPORTED, "%s is not permitted while a stream captures", name);
}

static void forbid_when_capturing(Stream* stream, const char* name) {
    if (!stream->capture) return;
    invalidate(stream->capture);
    refuse(STREAM_CAPTURE_UNSUPPORTED, "%s on a stream that is capturing", name);
}

// The legacy stream would order itself after every blocking stream that captures.
static void forbid_implicit(Stream* stream, bool adds_work = true) {
    if (!stream->legacy()) return;
    for (auto* capture : machine().captures)
        for (auto* member : capture->members)
            if (member->blocking()) {
                invalidate(capture);
                refuse(STREAM_CAPTURE_IMPLICIT, "the legacy stream would depend on a blocking stream that captures");
            }
    if (adds_work && !machine().captures.empty())
        note("warning", "work on the legacy stream while a stream captures: it is not part of the graph");
}

// Adds `work` to the capture of `stream`, if it has one.
bool capturing(Stream* stream, Work&& work) {
    forbid_implicit(stream);
    auto* capture = stream->capture;
    if (!capture) return false;
    if (capture->invalid) refuse(STREAM_CAPTURE_INVALIDATED, "the capture was invalidated by an earlier call");
    work.context = stream->context;  // a node runs in the context of the stream that captured it
    if (here().next_seconds >= 0) work.seconds = here().next_seconds;
    // A launch with programmatic stream serialization gets a programmatic edge from the kernel before it on its stream
    // (CUDA Programming Guide, "Programmatic Dependent Launch: use in CUDA Graphs"). What it gets where it waits for more
    // is not written there.
    bool follows = work.type == NODE_KERNEL && work.kernel.dependent && !stream->deps.empty();
    if (follows && (stream->deps.size() > 1 || stream->deps[0]->work.context != stream->context))
        refuse(NOT_SUPPORTED, "a dependent launch that follows more than the kernel before it on its stream is not offered");
    EdgeData edge{PORT_PROGRAMMATIC, 0, DEPENDENCY_PROGRAMMATIC, {}};
    bool after_kernel = follows && stream->deps[0]->work.type == NODE_KERNEL;  // after all else the edge is full
    auto* node = add_node(capture->graph, stream->deps, std::move(work), after_kernel ? &edge : nullptr);
    capture->made.insert(node);
    stream->deps = {node};
    return true;
}

static void end_capture(Capture* capture) {
    for (auto* member : capture->members) {
        member->capture = nullptr;
        member->deps.clear();
    }
    auto& all = machine().captures;
    all.erase(std::remove(all.begin(), all.end(), capture), all.end());
}

// A destroyed graph leaves no events that point into it.
void forget_graph(Graph* graph) {
    for (auto& [handle, object] : machine().objects) {
        if (object->kind != Kind::event || !object->alive) continue;
        auto* event = static_cast<Event*>(object);
        event->deps.erase(std::remove_if(event->deps.begin(), event->deps.end(),
                                         [&](Node* node) { return node->graph == graph; }),
                          event->deps.end());
    }
}

// ------------------------------------------------------------------------------------------- streams

static Result create_stream(void** out, unsigned flags, int priority) {
    if (flags & ~STREAM_NON_BLOCKING) refuse(INVALID_VALUE, "stream flags 0x%x", flags);
    auto* context = current_context();
    if (context->green() && !(flags & STREAM_NON_BLOCKING))
        refuse(INVALID_VALUE, "a stream of a green context must be CU_STREAM_NON_BLOCKING");
    auto* stream = made<Stream>();
    stream->context = context;
    stream->flags = flags;
    stream->priority = std::clamp(priority, -5, 0);
    stream->id = fresh_id();
    *out = stream;
    return SUCCESS;
}

ENTRY(cuStreamCreate, 2000, 2000, void** out, unsigned flags) { return create_stream(out, flags, 0); }

ENTRY(cuStreamCreateWithPriority, 5050, 5050, void** out, unsigned flags, int priority) {
    return create_stream(out, flags, priority);
}

ENTRY(cuStreamDestroy, 2000, 4000, void* handle) {
    auto* stream = as<Stream>(handle);
    if (stream->capture) {
        note("warning", "a stream was destroyed while it captured; its capture is invalid");
        invalidate(stream->capture);
        if (stream->capture->origin == stream) end_capture(stream->capture);
        else stream->capture->members.erase(stream);
    }
    stream->alive = false;
    return SUCCESS;
}

ENTRY(cuStreamGetCtx, 9020, 9020, void* handle, void** context) {
    *context = stream_of(handle)->context;
    return SUCCESS;
}

// cuStreamGetCtx_v2: tells green contexts apart.
static Result contexts_of_stream(void* handle, void** context, void** green) {
    return guarded("cuStreamGetCtx", [&] {
        auto* stream = stream_of(handle);
        *context = stream->green ? nullptr : stream->context;
        if (green) *green = stream->green;
        return SUCCESS;
    });
}
static const Register contexts_entry("cuStreamGetCtx", 12050, 12050, reinterpret_cast<void*>(&contexts_of_stream));

ENTRY(cuStreamGetGreenCtx, 12040, 12040, void* handle, void** green) {
    *green = stream_of(handle)->green;
    return SUCCESS;
}

ENTRY(cuStreamGetDevice, 12080, 12080, void* handle, int* device) {
    stream_of(handle);
    *device = 0;
    return SUCCESS;
}

ENTRY(cuStreamGetFlags, 5050, 5050, void* handle, unsigned* flags) {
    *flags = stream_of(handle)->flags;
    return SUCCESS;
}

ENTRY(cuStreamGetPriority, 5050, 5050, void* handle, int* priority) {
    *priority = stream_of(handle)->priority;
    return SUCCESS;
}

ENTRY(cuStreamGetId, 12000, 12000, void* handle, unsigned long long* id) {
    *id = stream_of(handle)->id;
    return SUCCESS;
}

ENTRY(cuStreamSynchronize, 2000, 2000, void* handle) {
    auto* stream = stream_of(handle);
    forbid_when_capturing(stream, "cuStreamSynchronize");
    forbid_implicit(stream, false);
    sync_item(stream->last);
    return SUCCESS;
}

ENTRY(cuStreamQuery, 2000, 2000, void* handle) {
    auto* stream = stream_of(handle);
    forbid_when_capturing(stream, "cuStreamQuery");
    forbid_implicit(stream, false);
    sync_item(stream->last);
    return SUCCESS;
}

ENTRY(cuStreamWaitEvent, 3020, 3020, void* handle, void* event_handle, unsigned flags) {
    auto* stream = stream_of(handle);
    auto* event = as<Event>(event_handle);
    forbid_implicit(stream);
    auto* capture = stream->capture;
    if (capture && capture->invalid) refuse(STREAM_CAPTURE_INVALIDATED, "the capture was invalidated by an earlier call");
    if (capture && (flags & EVENT_WAIT_EXTERNAL)) {
        Work work;
        work.type = NODE_WAIT_EVENT;
        work.event = event;
        capturing(stream, std::move(work));
        return SUCCESS;
    }
    if (!event->capture) {
        if (capture) {
            invalidate(capture);
            refuse(STREAM_CAPTURE_ISOLATION, "the event was not recorded in this capture");
        }
        if (event->recorded && event->item) {
            auto item = submit(stream, 0.0, nullptr);
            item->after.push_back(event->item);
            item->end_s = std::max(item->end_s, event->at_s);
        }
        return SUCCESS;
    }
    auto& open = machine().captures;
    bool running = std::find(open.begin(), open.end(), event->capture) != open.end() && event->capture->id == event->capture_id;
    if (!running) refuse(CAPTURED_EVENT, "the event was recorded in a capture that has ended");
    if (event->capture->invalid) refuse(STREAM_CAPTURE_INVALIDATED, "the capture of the event is invalid");
    if (stream->legacy()) {
        invalidate(event->capture);
        refuse(STREAM_CAPTURE_IMPLICIT, "the legacy stream cannot join a capture");
    }
    if (capture && capture != event->capture) {
        invalidate(capture);
        invalidate(event->capture);
        refuse(STREAM_CAPTURE_MERGE, "the event belongs to another capture");
    }
    stream->capture = event->capture;
    event->capture->members.insert(stream);
    for (auto* node : event->deps)
        if (std::find(stream->deps.begin(), stream->deps.end(), node) == stream->deps.end()) stream->deps.push_back(node);
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------- capture

static Result begin_capture(Stream* stream, int mode, Graph* graph, std::vector<Node*> deps) {
    if (mode < CAPTURE_GLOBAL || mode > CAPTURE_RELAXED) refuse(INVALID_VALUE, "capture mode %d", mode);
    if (stream->legacy()) refuse(STREAM_CAPTURE_UNSUPPORTED, "the legacy stream cannot capture");
    if (stream->capture) refuse(ILLEGAL_STATE, "the stream is capturing already");
    auto* capture = new Capture;
    capture->id = fresh_id();
    capture->mode = mode;
    capture->origin = stream;
    capture->thread = std::this_thread::get_id();
    capture->into_existing = graph != nullptr;
    capture->graph = graph ? graph : made<Graph>();
    capture->members.insert(stream);
    stream->capture = capture;
    stream->deps = std::move(deps);
    machine().captures.push_back(capture);
    return SUCCESS;
}

ENTRY(cuStreamBeginCapture, 10000, 10010, void* handle, int mode) {
    return begin_capture(stream_of(handle), mode, nullptr, {});
}

ENTRY(cuStreamBeginCaptureToGraph, 12030, 12030, void* handle, void* graph, void* const* deps, const EdgeData*, size_t count,
      int mode) {
    std::vector<Node*> start;
    for (size_t i = 0; i < count; i++) start.push_back(as<Node>(deps[i]));
    return begin_capture(stream_of(handle), mode, as<Graph>(graph), start);
}

// Work is joined when the origin's next node would follow it: every node without successors is a dependency of it.
static bool joined(const Capture* capture) {
    auto& last = capture->origin->deps;
    for (auto* node : capture->made)
        if (node->successors.empty() && std::find(last.begin(), last.end(), node) == last.end()) return false;
    return true;
}

ENTRY(cuStreamEndCapture, 10000, 10000, void* handle, void** graph) {
    auto* stream = stream_of(handle);
    *graph = nullptr;
    auto* capture = stream->capture;
    if (!capture) refuse(ILLEGAL_STATE, "the stream is not capturing");
    if (capture->mode != CAPTURE_RELAXED && capture->thread != std::this_thread::get_id())
        refuse(STREAM_CAPTURE_WRONG_THREAD, "a capture that is not relaxed ends in the thread that began it");
    if (capture->origin != stream) {
        invalidate(capture);
        refuse(STREAM_CAPTURE_UNMATCHED, "the capture began in another stream");
    }
    Result result = capture->invalid ? STREAM_CAPTURE_INVALIDATED : joined(capture) ? SUCCESS : STREAM_CAPTURE_UNJOINED;
    end_capture(capture);
    if (result != SUCCESS) {
        if (!capture->into_existing) destroy_graph(capture->graph);
        refuse(result, result == STREAM_CAPTURE_UNJOINED ? "work of a forked stream was not joined to the origin"
                                                         : "an earlier call invalidated the capture");
    }
    *graph = capture->graph;
    return SUCCESS;
}

// A reset of the device ends every capture; what was captured is lost.
void drop_captures() {
    auto open = machine().captures;
    for (auto* capture : open) {
        end_capture(capture);
        if (!capture->into_existing) destroy_graph(capture->graph);
    }
}

static int status_of(const Capture* capture) {
    return !capture ? CAPTURE_NONE : capture->invalid ? CAPTURE_INVALIDATED : CAPTURE_ACTIVE;
}

ENTRY(cuStreamIsCapturing, 10000, 10000, void* handle, int* status) {
    auto* stream = stream_of(handle);
    forbid_implicit(stream, false);
    *status = status_of(stream->capture);
    return SUCCESS;
}

ENTRY(cuStreamGetCaptureInfo, 12030, 12030, void* handle, int* status, uint64_t* id, void** graph, Node* const** deps,
      const EdgeData** edges, size_t* count) {
    auto* stream = stream_of(handle);
    forbid_implicit(stream, false);
    auto* capture = stream->capture;
    *status = status_of(capture);
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? capture->graph : nullptr;
    if (deps) *deps = capture ? stream->deps.data() : nullptr;
    stream->edges.resize(stream->deps.size());  // full dependencies, all of them
    if (edges) *edges = capture ? stream->edges.data() : nullptr;
    if (count) *count = capture ? stream->deps.size() : 0;
    return SUCCESS;
}

ENTRY(cuStreamUpdateCaptureDependencies, 11030, 12030, void* handle, void* const* deps, const EdgeData*, size_t count,
      unsigned flags) {
    auto* stream = stream_of(handle);
    if (!stream->capture) refuse(ILLEGAL_STATE, "the stream is not capturing");
    if (flags == 1) stream->deps.clear();  // CU_STREAM_SET_CAPTURE_DEPENDENCIES
    for (size_t i = 0; i < count; i++) stream->deps.push_back(as<Node>(deps[i]));
    return SUCCESS;
}

ENTRY(cuThreadExchangeStreamCaptureMode, 10010, 10010, int* mode) {
    if (*mode < CAPTURE_GLOBAL || *mode > CAPTURE_RELAXED) refuse(INVALID_VALUE, "capture mode %d", *mode);
    std::swap(*mode, here().capture_mode);
    return SUCCESS;
}

// -------------------------------------------------------------------------------------------- events

ENTRY(cuEventCreate, 2000, 2000, void** out, unsigned flags) {
    if (flags & ~(EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING | EVENT_INTERPROCESS)) refuse(INVALID_VALUE, "event flags 0x%x", flags);
    auto* event = made<Event>();
    event->context = current_context();
    event->flags = flags;
    *out = event;
    return SUCCESS;
}

ENTRY(cuEventDestroy, 2000, 4000, void* handle) {
    as<Event>(handle)->alive = false;
    return SUCCESS;
}

static Result record(Event* event, Stream* stream, unsigned flags) {
    forbid_implicit(stream);
    if (event->context != stream->context && event->context != stream->context->primary &&
        event->context->primary != stream->context && event->context->primary != stream->context->primary)
        refuse(INVALID_HANDLE, "event and stream belong to different devices");
    auto* capture = stream->capture;
    if (!capture) {
        auto item = submit(stream, 0.0, nullptr);
        event->recorded = true;
        event->capture = nullptr;
        event->item = item;
        event->at_s = item->end_s;
        return SUCCESS;
    }
    if (capture->invalid) refuse(STREAM_CAPTURE_INVALIDATED, "the capture was invalidated by an earlier call");
    if (flags & EVENT_RECORD_EXTERNAL) {
        Work work;
        work.type = NODE_EVENT_RECORD;
        work.event = event;
        capturing(stream, std::move(work));
        return SUCCESS;
    }
    event->recorded = true;
    event->item = nullptr;
    event->capture = capture;
    event->capture_id = capture->id;
    event->deps = stream->deps;
    return SUCCESS;
}

ENTRY(cuEventRecord, 2000, 2000, void* event, void* stream) { return record(as<Event>(event), stream_of(stream), 0); }

ENTRY(cuEventRecordWithFlags, 11010, 11010, void* event, void* stream, unsigned flags) {
    if (flags & ~EVENT_RECORD_EXTERNAL) refuse(INVALID_VALUE, "record flags 0x%x", flags);
    return record(as<Event>(event), stream_of(stream), flags);
}

static void forbid_captured(Event* event) {
    if (!event->capture) return;
    auto& open = machine().captures;
    if (std::find(open.begin(), open.end(), event->capture) != open.end()) invalidate(event->capture);
    refuse(CAPTURED_EVENT, "the event was last recorded in a stream that captures");
}

ENTRY(cuEventQuery, 2000, 2000, void* handle) {
    auto* event = as<Event>(handle);
    forbid_captured(event);
    unsafe_call("cuEventQuery");
    sync_item(event->item);
    return SUCCESS;
}

ENTRY(cuEventSynchronize, 2000, 2000, void* handle) {
    auto* event = as<Event>(handle);
    forbid_captured(event);
    unsafe_call("cuEventSynchronize");
    sync_item(event->item);
    return SUCCESS;
}

ENTRY(cuEventElapsedTime, 2000, 2000, float* milliseconds, void* first, void* second) {
    auto *begin = as<Event>(first), *end = as<Event>(second);
    forbid_captured(begin);
    forbid_captured(end);
    if ((begin->flags | end->flags) & EVENT_DISABLE_TIMING) refuse(INVALID_HANDLE, "an event was made without timing");
    if (!begin->recorded || !end->recorded) refuse(INVALID_HANDLE, "an event was never recorded");
    if (!begin->item->done || !end->item->done) refuse(NOT_READY, "the events have not been reached");
    *milliseconds = static_cast<float>((end->at_s - begin->at_s) * 1e3);
    return SUCCESS;
}

}  // namespace tgv
