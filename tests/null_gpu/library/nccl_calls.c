/* NCCL's operations as they are called: checked, gathered into groups, counted in their streams, and made. */
#include "null_nccl.h"

static __thread int depth;
static __thread struct Operation *waiting;
static __thread int n_waiting, room_waiting;
static __thread ncclResult_t group_result;

static ncclResult_t check(const struct Operation *o) {
    struct ncclComm *comm = o->comm;
    const struct Call *call = &o->call;
    const char *name = null_nccl_name(call->kind);
    if (!comm) return null_nccl_fail(ncclInvalidArgument, "%s : comm argument is NULL", name);
    if (comm->error) return comm->error;
    if (comm->finalized) return null_nccl_fail(ncclInvalidUsage, "%s : the communicator was finalized", name);
    if ((unsigned)call->type >= ncclNumTypes) return null_nccl_fail(ncclInvalidArgument, "%s : invalid type %d", name, call->type);
    if (call->root < 0 || call->root >= comm->size)
        return null_nccl_fail(ncclInvalidArgument, "%s : invalid root %d (root should be in the 0..%d range)", name, call->root, comm->size);
    int reduces = call->kind == ALL_REDUCE || call->kind == REDUCE || call->kind == REDUCE_SCATTER, made = call->reduction - ncclNumOps;
    if (reduces && (call->reduction < 0 || made >= 32 || (made >= 0 && !comm->scalars[made].used)))
        return null_nccl_fail(ncclInvalidArgument, "%s : invalid reduction operation %d", name, call->reduction);
    if (reduces && made >= 0 && comm->scalars[made].type != call->type)
        return null_nccl_fail(ncclInvalidArgument, "%s : the scalar of the reduction has another type", name);
    if (reduces && !null_nccl_reduces(call->type))
        return null_nccl_fail(ncclInvalidArgument, "%s : the null NCCL has no arithmetic for type %d", name, call->type);
    int reads = call->kind != RECEIVE && !((call->kind == BROADCAST || call->kind == SCATTER) && comm->rank != call->root);
    int writes = call->kind != SEND && !((call->kind == REDUCE || call->kind == GATHER) && comm->rank != call->root);
    /* As with NCCL_CHECK_POINTERS=1; without it, NCCL's kernels come to grief. */
    if (call->count && ((reads && null_device_of(o->from) != comm->device) || (writes && null_device_of(o->to) != comm->device)))
        return null_nccl_fail(ncclInvalidArgument, "%s : a buffer is not in the memory of device %d, which is the communicator's", name,
                              comm->device);
    if (o->stream->device != comm->device)
        return null_nccl_fail(ncclUnhandledCudaError, "%s : the stream is of device %d, the communicator of device %d", name,
                              o->stream->device, comm->device);
    return ncclSuccess;
}

static int is_message(const struct Operation *o) { return o->call.kind == SEND || o->call.kind == RECEIVE; }

/* Count it; what is captured is only that. */
static ncclResult_t start(const struct Operation *o, int *captured) {
    if (null_start(o->stream, null_nccl_name(o->call.kind))) return null_nccl_fail(ncclUnhandledCudaError, "CUDA refuses the launch");
    *captured = o->stream->capturing;
    if (*captured) o->stream->graph->collectives++;
    return ncclSuccess;
}

static ncclResult_t run(struct Operation *operations, int count) {
    ncclResult_t result = ncclSuccess;
    struct Operation messages[count];
    int n_message = 0;
    for (int i = 0; i < count && !result; i++) {
        struct Operation *o = &operations[i];
        int captured = 0;
        pthread_mutex_lock(&o->comm->busy);
        result = start(o, &captured);
        if (!result && !captured && is_message(o)) messages[n_message++] = *o;
        if (!result && !captured && !is_message(o)) result = o->comm->error = null_nccl_collective(o);
        pthread_mutex_unlock(&o->comm->busy);
    }
    if (!result && n_message) {
        struct ncclComm *comm = messages[0].comm;
        pthread_mutex_lock(&comm->busy);
        result = comm->error = null_nccl_messages(messages, n_message);
        pthread_mutex_unlock(&comm->busy);
    }
    return result;
}

static ncclResult_t call(struct Operation o, cudaStream_t stream) {
    /* The legacy stream is that of the communicator's device, which NCCL makes the present one for the launch. */
    int before = null_device;
    if (o.comm) null_device = o.comm->device;
    o.stream = null_stream(stream);
    null_device = before;
    ncclResult_t result = check(&o);
    if (!result && o.call.reduction >= ncclNumOps) o.scalar = o.comm->scalars[o.call.reduction - ncclNumOps];
    if (!depth) return result ? result : run(&o, 1);
    if (result) return group_result = result;
    if (n_waiting == room_waiting) waiting = realloc(waiting, (room_waiting = 2 * room_waiting + 8) * sizeof *waiting);
    waiting[n_waiting++] = o;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGroupStart(void) {
    depth++;
    return ncclSuccess;
}
EXPORT ncclResult_t ncclGroupEnd(void) {
    if (!depth) return null_nccl_fail(ncclInvalidUsage, "ncclGroupEnd: not in a group call");
    if (--depth) return ncclSuccess;
    ncclResult_t result = group_result ? group_result : n_waiting ? run(waiting, n_waiting) : ncclSuccess;
    n_waiting = 0;
    group_result = ncclSuccess;
    return result;
}

#define CALL(kind, count, type, reduction, root, from, to) \
    return call((struct Operation){comm, {kind, count, type, reduction, root}, from, to}, stream)

EXPORT ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
                                  ncclComm_t comm, cudaStream_t stream) {
    CALL(ALL_REDUCE, count, type, reduction, 0, from, to);
}
EXPORT ncclResult_t ncclReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t reduction, int root,
                               ncclComm_t comm, cudaStream_t stream) {
    CALL(REDUCE, count, type, reduction, root, from, to);
}
EXPORT ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
                                      ncclComm_t comm, cudaStream_t stream) {
    CALL(REDUCE_SCATTER, count, type, reduction, 0, from, to);
}
EXPORT ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                                  cudaStream_t stream) {
    CALL(BROADCAST, count, type, 0, root, from, to);
}
EXPORT ncclResult_t ncclBcast(void *memory, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    CALL(BROADCAST, count, type, 0, root, memory, memory);
}
EXPORT ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    CALL(ALL_GATHER, count, type, 0, 0, from, to);
}
EXPORT ncclResult_t ncclAlltoAll(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    CALL(ALL_TO_ALL, count, type, 0, 0, from, to);
}
EXPORT ncclResult_t ncclGather(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                               cudaStream_t stream) {
    CALL(GATHER, count, type, 0, root, from, to);
}
EXPORT ncclResult_t ncclScatter(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                                cudaStream_t stream) {
    CALL(SCATTER, count, type, 0, root, from, to);
}
EXPORT ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    CALL(SEND, count, type, 0, peer, from, NULL);
}
EXPORT ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    CALL(RECEIVE, count, type, 0, peer, NULL, to);
}
