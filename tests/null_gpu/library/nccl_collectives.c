/* Collective operations, chunk by chunk: each rank shows a part of what it has, then reads what it needs of the others. */
#include "null_nccl.h"

static int is_root(const struct Operation *o, int rank) { return o->call.root == rank; }

/* How many pieces of `count` elements a rank has to show. */
static int pieces(const struct Operation *o) {
    switch (o->call.kind) {
    case REDUCE_SCATTER: case ALL_TO_ALL: return o->comm->size;
    case SCATTER: return is_root(o, o->comm->rank) ? o->comm->size : 0;
    case BROADCAST: return is_root(o, o->comm->rank) ? 1 : 0;
    default: return 1;
    }
}

static ncclResult_t all_alike(const struct Operation *o) {
    for (int rank = 0; rank < o->comm->size; rank++) {
        const struct Call *other = &null_nccl_page_of(o->comm, rank)->call;
        /* Each rank has made scalars of its own. */
        int reductions = other->reduction == o->call.reduction || (other->reduction >= ncclNumOps && o->call.reduction >= ncclNumOps);
        if (other->kind == o->call.kind && other->count == o->call.count && other->type == o->call.type &&
            other->root == o->call.root && reductions)
            continue;
        char ours[128], theirs[128];
        return null_nccl_fail(ncclInvalidUsage, "the ranks do not do the same: rank %d calls %s, rank %d %s", o->comm->rank,
                              null_nccl_words(ours, sizeof ours, &o->call), rank, null_nccl_words(theirs, sizeof theirs, other));
    }
    return ncclSuccess;
}

/* Put `count` elements from `start` of every piece into this rank's page, one piece after the other. */
static void show(const struct Operation *o, size_t start, size_t count) {
    struct Page *page = null_nccl_page(o->comm);
    size_t size = null_nccl_size(o->call.type);
    page->call = o->call;
    int n = pieces(o);
    for (int i = 0; i < n; i++)
        memcpy(page->data + i * count * size, (const char *)o->from + (i * o->call.count + start) * size, count * size);
    if (o->call.kind == ALL_REDUCE || o->call.kind == REDUCE || o->call.kind == REDUCE_SCATTER)
        null_nccl_scale(page->data, n * count, o);
}

/* Take what this rank needs of the chunk out of everybody's pages. */
static void take(const struct Operation *o, size_t start, size_t count) {
    struct ncclComm *comm = o->comm;
    size_t size = null_nccl_size(o->call.type), bytes = count * size, whole = o->call.count * size;
    char *to = (char *)o->to + start * size;
    for (int rank = 0; rank < comm->size; rank++) {
        const char *data = null_nccl_page_of(comm, rank)->data, *own = data + comm->rank * bytes;
        switch (o->call.kind) {
        case ALL_REDUCE: null_nccl_reduce(to, data, count, o, rank); break;
        case REDUCE: if (is_root(o, comm->rank)) null_nccl_reduce(to, data, count, o, rank); break;
        case REDUCE_SCATTER: null_nccl_reduce(to, own, count, o, rank); break;
        case BROADCAST: if (is_root(o, rank)) memcpy(to, data, bytes); break;
        case ALL_GATHER: memcpy(to + rank * whole, data, bytes); break;
        case GATHER: if (is_root(o, comm->rank)) memcpy(to + rank * whole, data, bytes); break;
        case ALL_TO_ALL: memcpy(to + rank * whole, own, bytes); break;
        case SCATTER: if (is_root(o, rank)) memcpy(to, own, bytes); break;
        default: break;
        }
    }
}

ncclResult_t null_nccl_collective(struct Operation *o) {
    size_t most = CHUNK / null_nccl_size(o->call.type) / (size_t)o->comm->size, start = 0;
    do {
        size_t count = o->call.count - start < most ? o->call.count - start : most;
        show(o, start, count);
        ncclResult_t result = null_nccl_step(o->comm, o->call.kind);
        if (!result) result = all_alike(o);
        if (result) return result;
        take(o, start, count);
        start += count;
    } while (start < o->call.count);
    return ncclSuccess;
}
