/* Messages between two ranks: those of a group go on side by side, chunk by chunk. */
#include "null_nccl.h"

struct Messages {
    struct Operation *operations;
    int count;
    /* How many elements of each are through, and whether its last chunk is. */
    size_t *moved;
    char *over;
    ncclResult_t result;
};

static ncclResult_t mismatch(const struct Operation *o, const struct Call *other) {
    char ours[128], theirs[128];
    return null_nccl_fail(ncclInvalidUsage, "rank %d calls %s, which rank %d answers with %s", o->comm->rank,
                          null_nccl_words(ours, sizeof ours, &o->call), o->call.root, null_nccl_words(theirs, sizeof theirs, other));
}

static int send_chunk(struct Operation *o, struct Lane *lane, size_t *moved, size_t most) {
    if (atomic_load(&lane->sent) != atomic_load(&lane->taken)) return 0;
    /* Everything is sent, and the last of it was taken. */
    if (*moved == o->call.count + 1) return 1;
    size_t size = null_nccl_size(o->call.type), left = o->call.count - *moved, count = left < most ? left : most;
    lane->page.call = o->call;
    memcpy(lane->page.data, (const char *)o->from + *moved * size, count * size);
    *moved += count == left ? count + 1 : count;
    atomic_fetch_add(&lane->sent, 1);
    null_nccl_ring(o->comm);
    return 0;
}

static int receive_chunk(struct Operation *o, struct Lane *lane, size_t *moved, size_t most) {
    if (atomic_load(&lane->sent) == atomic_load(&lane->taken)) return 0;
    size_t size = null_nccl_size(o->call.type), left = o->call.count - *moved, count = left < most ? left : most;
    memcpy((char *)o->to + *moved * size, lane->page.data, count * size);
    *moved += count;
    atomic_fetch_add(&lane->taken, 1);
    null_nccl_ring(o->comm);
    return count == left;
}

/* Move what can be moved; return the rank that the first of the others waits for. */
static int go_on(struct ncclComm *comm, void *data) {
    struct Messages *m = data;
    int missing = -1;
    for (int i = 0; i < m->count && !m->result; i++) {
        struct Operation *o = &m->operations[i];
        int sends = o->call.kind == SEND, peer = o->call.root, earlier = 0;
        /* A second message to the same rank comes after the first. */
        for (int j = 0; j < i; j++)
            earlier |= !m->over[j] && m->operations[j].comm == o->comm && m->operations[j].call.kind == o->call.kind &&
                       m->operations[j].call.root == peer;
        if (m->over[i] || earlier) continue;
        struct Lane *lane = sends ? &o->comm->room->lanes[o->comm->rank][peer] : &o->comm->room->lanes[peer][o->comm->rank];
        const struct Call *there = &lane->page.call;
        size_t most = CHUNK / null_nccl_size(o->call.type);
        if (!sends && atomic_load(&lane->sent) != atomic_load(&lane->taken) &&
            (there->count != o->call.count || there->type != o->call.type)) {
            m->result = mismatch(o, there);
            atomic_store(&lane->refused, 1);
            null_nccl_ring(o->comm);
        } else if (sends && atomic_load(&lane->refused)) {
            m->result = null_nccl_fail(ncclInvalidUsage, "rank %d receives something else than rank %d sends", peer, o->comm->rank);
        } else {
            while (!m->over[i]) {
                size_t before = m->moved[i];
                m->over[i] = (char)(sends ? send_chunk : receive_chunk)(o, lane, &m->moved[i], most);
                if (m->moved[i] == before) break;
            }
        }
        if (!m->over[i] && missing < 0) missing = peer;
    }
    return m->result ? -1 : missing;
}

ncclResult_t null_nccl_messages(struct Operation *operations, int count) {
    size_t moved[count];
    char over[count];
    memset(moved, 0, sizeof moved);
    memset(over, 0, sizeof over);
    struct Messages m = {operations, count, moved, over, ncclSuccess};
    ncclResult_t result = null_nccl_wait(operations[0].comm, operations[0].call.kind, go_on, &m);
    return result ? result : m.result;
}
