/* NCCL's communicators, made and ended, and what it says about itself. */
#include "null_nccl.h"
#include <stdarg.h>
#include <unistd.h>

static char last_error[512];
static __thread char own_error[512];

ncclResult_t null_nccl_fail(ncclResult_t result, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(own_error, sizeof own_error, format, values);
    va_end(values);
    memcpy(last_error, own_error, sizeof last_error);
    /* As with NCCL_DEBUG=WARN: who calls does not always ask. */
    fprintf(stderr, "null NCCL: %s\n", own_error);
    return result;
}

const char *null_nccl_name(enum Kind kind) {
    static const char *names[] = {"no operation", "ncclAllReduce", "ncclReduce", "ncclBroadcast", "ncclAllGather",
                                  "ncclReduceScatter", "ncclAlltoAll", "ncclGather", "ncclScatter", "ncclSend", "ncclRecv",
                                  "ncclCommSplit"};
    return names[kind];
}
const char *null_nccl_words(char *text, size_t size, const struct Call *call) {
    static const char *types[] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16",
                                  "float8e4m3", "float8e5m2"};
    static const char *reductions[] = {"sum", "prod", "max", "min", "avg", "scaled sum"};
    snprintf(text, size, "%s of %zu %s (%s, root or peer %d)", null_nccl_name(call->kind), call->count, types[call->type],
             reductions[call->reduction < ncclNumOps ? call->reduction : ncclNumOps], call->root);
    return text;
}

EXPORT ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
EXPORT const char *ncclGetErrorString(ncclResult_t result) {
    static const char *words[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
                                  "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
    return (unsigned)result < sizeof words / sizeof *words ? words[result] : "unknown result code";
}
EXPORT const char *ncclGetLastError(ncclComm_t comm) { return *own_error ? own_error : last_error; }

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static _Atomic int count;
    memset(id, 0, sizeof *id);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(id->internal, 64, "/null_nccl_%d_%d_%lx", (int)getpid(), atomic_fetch_add(&count, 1), now.tv_sec * 1000000000L + now.tv_nsec);
    return ncclSuccess;
}

static ncclResult_t make(ncclComm_t *comm, int size, const char *name, int rank) {
    if (size < 1 || rank < 0 || rank >= size)
        return null_nccl_fail(ncclInvalidArgument, "invalid rank requested : %d/%d", rank, size);
    if (size > MOST_RANKS) return null_nccl_fail(ncclInvalidArgument, "the null NCCL has at most %d ranks, not %d", MOST_RANKS, size);
    struct ncclComm *made = calloc(1, sizeof *made);
    made->rank = rank, made->size = size, made->device = null_device;
    snprintf(made->name, sizeof made->name, "%s", name);
    pthread_mutex_init(&made->busy, NULL);
    ncclResult_t result = null_nccl_enter(made);
    if (result) free(made);
    *comm = result ? NULL : made;
    return result;
}
EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    return make(comm, size, id.internal, rank);
}
EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) { return make(comm, size, id.internal, rank); }
EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int size, int rank, int n_id, ncclUniqueId *ids, ncclConfig_t *config) {
    return make(comm, size, ids->internal, rank);
}

struct Place {
    int color, key;
};
EXPORT ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *child, ncclConfig_t *config) {
    *child = NULL;
    if (!comm) return null_nccl_fail(ncclInvalidArgument, "ncclCommSplit : comm argument is NULL");
    if (comm->error) return comm->error;
    if (color < 0 && color != NCCL_SPLIT_NOCOLOR) return null_nccl_fail(ncclInvalidArgument, "ncclCommSplit : invalid color %d", color);
    pthread_mutex_lock(&comm->busy);
    struct Page *page = null_nccl_page(comm);
    page->call = (struct Call){SPLIT};
    *(struct Place *)page->data = (struct Place){color, key};
    ncclResult_t result = null_nccl_step(comm, SPLIT);
    int size = 0, rank = 0, number = comm->splits++;
    for (int i = 0; i < comm->size && !result; i++) {
        page = null_nccl_page_of(comm, i);
        struct Place *other = (struct Place *)page->data;
        if (page->call.kind != SPLIT)
            result = null_nccl_fail(ncclInvalidUsage, "rank %d calls ncclCommSplit, rank %d %s", comm->rank, i, null_nccl_name(page->call.kind));
        size += other->color == color;
        rank += other->color == color && (other->key < key || (other->key == key && i < comm->rank));
    }
    comm->error = result;
    pthread_mutex_unlock(&comm->busy);
    if (result || color == NCCL_SPLIT_NOCOLOR) return result;
    char name[sizeof comm->name];
    snprintf(name, sizeof name, "%.60s_%d_%d", comm->name, number, color);
    int before = null_device;
    null_device = comm->device;
    result = make(child, size, name, rank);
    null_device = before;
    return result;
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    comm->finalized = 1;
    return ncclSuccess;
}
static ncclResult_t end(struct ncclComm *comm) {
    if (!comm) return ncclSuccess;
    /* Someone may wait in it still, and is to stop before its memory goes. */
    pthread_mutex_lock(&comm->busy);
    null_nccl_leave(comm);
    pthread_mutex_unlock(&comm->busy);
    free(comm);
    return ncclSuccess;
}
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) { return end(comm); }
EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (comm) atomic_store(&comm->aborted, 1);
    return end(comm);
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    *error = comm->error;
    return ncclSuccess;
}
EXPORT ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    *count = comm->size;
    return ncclSuccess;
}
EXPORT ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) {
    *device = comm->device;
    return ncclSuccess;
}
EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclMemAlloc(void **memory, size_t size) {
    return cudaMalloc(memory, size) ? null_nccl_fail(ncclUnhandledCudaError, "out of memory") : ncclSuccess;
}
EXPORT ncclResult_t ncclMemFree(void *memory) {
    return cudaFree(memory) ? null_nccl_fail(ncclUnhandledCudaError, "not memory of ncclMemAlloc") : ncclSuccess;
}
EXPORT ncclResult_t ncclCommRegister(const ncclComm_t comm, void *memory, size_t size, void **handle) {
    *handle = memory;
    return ncclSuccess;
}
EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle) { return ncclSuccess; }

EXPORT ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *reduction, void *scalar, ncclDataType_t type, ncclScalarResidence_t where,
                                             ncclComm_t comm) {
    if ((unsigned)type >= ncclNumTypes) return null_nccl_fail(ncclInvalidArgument, "ncclRedOpCreatePreMulSum : invalid type %d", type);
    for (int i = 0; i < 32; i++) {
        struct Scalar *s = &comm->scalars[i];
        if (s->used) continue;
        s->used = 1, s->type = type;
        s->on_device = where == ncclScalarDevice ? scalar : NULL;
        if (!s->on_device) memcpy(s->value, scalar, null_nccl_size(type));
        *reduction = (ncclRedOp_t)(ncclNumOps + i);
        return ncclSuccess;
    }
    return null_nccl_fail(ncclInternalError, "the null NCCL keeps 32 scalars at a time");
}
EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t reduction, ncclComm_t comm) {
    int i = reduction - ncclNumOps;
    if (i < 0 || i >= 32 || !comm->scalars[i].used)
        return null_nccl_fail(ncclInvalidArgument, "ncclRedOpDestroy : operator unknown to communicator");
    comm->scalars[i].used = 0;
    return ncclSuccess;
}
