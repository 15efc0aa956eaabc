// SM resources, their splits, resource descriptors, green contexts. Rules: CUDA driver API, "Green Contexts", and the
// table of alignments by compute capability in the CUDA Programming Guide 4.6.
#include <algorithm>

#include "state.h"

namespace tgv {

constexpr unsigned MAGIC = 0x54475653;
constexpr unsigned FROM_DEVICE = 1, FROM_CONTEXT = 2;

static DevResource sm_resource(unsigned first, unsigned count, unsigned split, unsigned source) {
    auto& s = machine().settings;
    DevResource r{};
    r.type = RESOURCE_SM;
    r.origin = {MAGIC, split, first, source};
    r.sm.sm_count = count;
    if (s.version >= 13000) {  // read at run time from 13.0 on
        r.sm.min_partition = s.sm_min;
        r.sm.alignment = s.sm_align;
    }
    return r;
}

static DevResource workqueue(unsigned source, int type) {
    DevResource r{};
    r.type = type;
    r.origin = {MAGIC, 0, 0, source};
    if (type == RESOURCE_WQ_CONFIG) r.wq_config = {0, 4, 0};
    return r;
}

static DevResource resource_of(Context* context, int type, unsigned source) {
    if (type == RESOURCE_SM) return sm_resource(context->first_sm, context->sm_count, 0, source);
    if ((type == RESOURCE_WQ_CONFIG || type == RESOURCE_WQ) && machine().settings.version >= 13010)
        return workqueue(source, type);
    refuse(INVALID_RESOURCE_TYPE, "resource type %d does not exist on this driver", type);
}

static void check_input(const DevResource* input) {
    if (!input) refuse(INVALID_VALUE, "no input resource");
    if (input->type != RESOURCE_SM) refuse(INVALID_RESOURCE_TYPE, "only SM resources can be split");
    if (input->origin.magic != MAGIC) refuse(INVALID_RESOURCE_CONFIGURATION, "the input was not made by this driver");
    if (input->origin.split)
        refuse(INVALID_RESOURCE_CONFIGURATION,
               "the input is the result of a split; a result must become a green context before it is split again");
}

ENTRY(cuDeviceGetDevResource, 12040, 12040, int device, DevResource* out, int type) {
    check_device(device);
    *out = resource_of(&machine().primary, type, FROM_DEVICE);
    out->sm.sm_count = type == RESOURCE_SM ? machine().settings.sm_count : out->sm.sm_count;
    return SUCCESS;
}

ENTRY(cuCtxGetDevResource, 12040, 12040, void* context, DevResource* out, int type) {
    *out = resource_of(context ? as<Context>(context) : current_context(), type, FROM_CONTEXT);
    return SUCCESS;
}

ENTRY(cuGreenCtxGetDevResource, 12040, 12040, void* green, DevResource* out, int type) {
    *out = resource_of(as<Green>(green)->context, type, FROM_CONTEXT);
    return SUCCESS;
}

ENTRY(cuStreamGetDevResource, 13010, 13010, void* stream, DevResource* out, int type) {
    *out = resource_of(stream_of(stream)->context, type, FROM_CONTEXT);
    return SUCCESS;
}

// Equal groups of at least `min_count` SMs, rounded up to what the device can give; fewer groups than asked may come.
ENTRY(cuDevSmResourceSplitByCount, 12040, 12040, DevResource* result, unsigned* groups, const DevResource* input,
      DevResource* rest, unsigned flags, unsigned min_count) {
    check_input(input);
    auto& s = machine().settings;
    if (!groups) refuse(INVALID_VALUE, "nbGroups is NULL");
    if (flags & ~SPLIT_IGNORE_COSCHEDULING) refuse(INVALID_VALUE, "flags 0x%x are not known to the virtual driver", flags);
    unsigned least = s.sm_min, align = s.sm_align;
    if (flags & SPLIT_IGNORE_COSCHEDULING) least = align = std::min(2u, s.sm_align);
    unsigned each = std::max(least, (min_count + align - 1) / align * align);
    unsigned possible = input->sm.sm_count / each;
    // Some clusters of SMs have less than a multiple of the least group: an H200 gives 15 groups of 8 and a rest of 12.
    if (s.sm_groups && each == s.sm_min && input->sm.sm_count == s.sm_count) possible = std::min(possible, s.sm_groups);
    if (possible == 0)
        refuse(INVALID_RESOURCE_CONFIGURATION, "%u SMs rounded up to %u do not fit the %u of the input", min_count, each,
               input->sm.sm_count);
    unsigned count = result ? std::min(*groups, possible) : possible;
    *groups = count;
    if (!result) return SUCCESS;
    unsigned split = static_cast<unsigned>(++machine().splits), first = input->origin.first_sm;
    for (unsigned i = 0; i < count; i++) result[i] = sm_resource(first + i * each, each, split, FROM_DEVICE);
    if (rest) *rest = sm_resource(first + count * each, input->sm.sm_count - count * each, split, FROM_DEVICE);
    if (rest && rest->sm.sm_count == 0) *rest = DevResource{};
    return SUCCESS;
}

static unsigned group_count(const SmGroup& group, unsigned left, unsigned number) {
    auto& s = machine().settings;
    unsigned scheduled = group.coscheduled ? group.coscheduled : (s.cc_major >= 9 ? 8 : 2);
    if (scheduled < 2 || scheduled > 32 || scheduled % 2)
        refuse(INVALID_RESOURCE_CONFIGURATION, "group %u: coscheduledSmCount %u is not even within 2 to 32", number,
               scheduled);
    if (group.preferred_coscheduled && group.preferred_coscheduled % scheduled)
        refuse(INVALID_RESOURCE_CONFIGURATION, "group %u: preferredCoscheduledSmCount %u is no multiple of %u", number,
               group.preferred_coscheduled, scheduled);
    if (group.flags & ~GROUP_BACKFILL)
        refuse(INVALID_RESOURCE_CONFIGURATION, "group %u: flags 0x%x are not known to the virtual driver", number, group.flags);
    if (group.sm_count == 0) return left / scheduled * scheduled;
    bool backfill = group.flags & GROUP_BACKFILL;
    if (group.sm_count % 2 || (group.sm_count % scheduled && !backfill))
        refuse(INVALID_RESOURCE_CONFIGURATION, "group %u: smCount %u is no multiple of 2 and of coscheduledSmCount %u", number,
               group.sm_count, scheduled);
    return group.sm_count;
}

// Groups of exactly the sizes asked for, in order; nothing is rounded.
ENTRY(cuDevSmResourceSplit, 13010, 13010, DevResource* result, unsigned groups, const DevResource* input, DevResource* rest,
      unsigned flags, SmGroup* wanted) {
    check_input(input);
    if (flags) refuse(INVALID_VALUE, "flags must be 0");
    if (!groups || !wanted) refuse(INVALID_VALUE, "no groups are asked for");
    unsigned left = input->sm.sm_count, first = input->origin.first_sm;
    std::vector<unsigned> sizes;
    for (unsigned i = 0; i < groups; i++) {
        unsigned count = group_count(wanted[i], left, i);
        if (count == 0 || count > left)
            refuse(INVALID_RESOURCE_CONFIGURATION, "group %u asks for %u SMs; %u are left", i, wanted[i].sm_count, left);
        left -= count;
        sizes.push_back(count);
    }
    for (unsigned i = 0; i < groups; i++) wanted[i].sm_count = sizes[i];
    if (!result) return SUCCESS;  // a dry run
    unsigned split = static_cast<unsigned>(++machine().splits);
    for (unsigned i = 0; i < groups; first += sizes[i++]) result[i] = sm_resource(first, sizes[i], split, FROM_DEVICE);
    if (rest) *rest = left ? sm_resource(first, left, split, FROM_DEVICE) : DevResource{};
    return SUCCESS;
}

ENTRY(cuDevResourceGenerateDesc, 12040, 12040, void** desc, DevResource* resources, unsigned count) {
    if (!count || !resources) refuse(INVALID_VALUE, "a descriptor needs resources");
    unsigned split = 0, queues = 0, sms = 0;
    for (unsigned i = 0; i < count; i++) {
        auto& r = resources[i];
        if (r.origin.magic != MAGIC) refuse(INVALID_RESOURCE_CONFIGURATION, "resource %u was not made by this driver", i);
        if (r.type == RESOURCE_SM) {
            if (sms++ && r.origin.split != split)
                refuse(INVALID_RESOURCE_CONFIGURATION, "SM resources of one descriptor must come from one split");
            split = r.origin.split;
        } else if (r.type == RESOURCE_WQ_CONFIG || r.type == RESOURCE_WQ) {
            if (++queues > 1) refuse(INVALID_RESOURCE_CONFIGURATION, "a descriptor takes one workqueue resource");
            if (r.origin.reserved != FROM_DEVICE)
                refuse(INVALID_RESOURCE_CONFIGURATION,
                       "a workqueue resource beside SMs must come from cuDeviceGetDevResource, as they do");
        } else {
            refuse(INVALID_RESOURCE_TYPE, "resource %u has type %d", i, r.type);
        }
    }
    if (!sms) refuse(INVALID_RESOURCE_CONFIGURATION, "a descriptor needs an SM resource");
    auto* made_desc = made<Desc>();
    made_desc->resources.assign(resources, resources + count);
    *desc = made_desc;
    return SUCCESS;
}

static void warn_of_overlap(const Context* fresh) {
    for (auto& [handle, object] : machine().objects) {
        if (object->kind != Kind::context || !object->alive || object == fresh) continue;
        auto* other = static_cast<Context*>(object);
        bool apart = fresh->first_sm + fresh->sm_count <= other->first_sm || other->first_sm + other->sm_count <= fresh->first_sm;
        if (other->green() && !apart && other->split != fresh->split)
            note("warning", "green contexts " + std::to_string(other->id) + " and " + std::to_string(fresh->id) +
                                " share SMs: they come from separate splits of the device");
    }
}

ENTRY(cuGreenCtxCreate, 12040, 12040, void** out, void* desc_handle, int device, unsigned flags) {
    check_device(device);
    auto* desc = as<Desc>(desc_handle);
    if (flags != GREEN_CTX_DEFAULT_STREAM) refuse(INVALID_VALUE, "flags must be CU_GREEN_CTX_DEFAULT_STREAM");
    unsafe_call("cuGreenCtxCreate");
    auto* context = made<Context>();
    context->primary = &machine().primary;
    context->id = fresh_id();
    context->first_sm = ~0u;
    for (auto& r : desc->resources) {
        if (r.type != RESOURCE_SM) {
            context->has_workqueue = true;
            continue;
        }
        context->first_sm = std::min(context->first_sm, r.origin.first_sm);
        context->sm_count += r.sm.sm_count;
        context->split = r.origin.split;
    }
    auto* green = made<Green>();
    green->context = context;
    green->resources = desc->resources;
    desc->alive = false;  // consumed
    machine().primary.alive = true;
    warn_of_overlap(context);
    *out = green;
    return SUCCESS;
}

ENTRY(cuGreenCtxDestroy, 12040, 12040, void* handle) {
    auto* green = as<Green>(handle);
    if (green->context->current_on != std::thread::id{})
        note("warning", "a green context was destroyed while it was current to a thread");
    for (auto& [other, object] : machine().objects)
        if (object->kind == Kind::stream && object->alive && static_cast<Stream*>(object)->green == green) {
            note("warning", "a green context was destroyed before stream " +
                                std::to_string(static_cast<Stream*>(object)->id) + " of it");
        }
    drain();
    green->alive = green->context->alive = false;
    return SUCCESS;
}

ENTRY(cuCtxFromGreenCtx, 12040, 12040, void** context, void* green) {
    *context = as<Green>(green)->context;
    return SUCCESS;
}

ENTRY(cuGreenCtxGetId, 13000, 13000, void* green, unsigned long long* id) {
    *id = (green ? as<Green>(green)->context : current_context())->id;
    return SUCCESS;
}

ENTRY(cuGreenCtxStreamCreate, 12050, 12050, void** out, void* green, unsigned flags, int priority) {
    auto* context = as<Green>(green);
    if (flags != STREAM_NON_BLOCKING) refuse(INVALID_VALUE, "a stream of a green context must be CU_STREAM_NON_BLOCKING");
    auto* stream = made<Stream>();
    stream->context = context->context;
    stream->green = context;
    stream->flags = flags;
    stream->priority = std::clamp(priority, -5, 0);
    stream->id = fresh_id();
    *out = stream;
    return SUCCESS;
}

}  // namespace tgv
