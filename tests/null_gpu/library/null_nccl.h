/* What the parts of the null NCCL share. */
#ifndef NULL_NCCL_H
#define NULL_NCCL_H

#include "null_gpu.h"
#include <nccl.h>
#include <stdatomic.h>

#define MOST_RANKS 16
#define CHUNK ((size_t)256 << 10)

enum Kind { NOTHING, ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, GATHER, SCATTER, SEND, RECEIVE, SPLIT };

/* What all ranks have to say alike. */
struct Call {
    enum Kind kind;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t reduction;
    int root;
};

/* What a rank shows to the others for the step that it is in, and keeps until all are in the next. */
struct Page {
    struct Call call;
    _Alignas(16) char data[CHUNK];
};
struct Seat {
    /* 0 until the rank has come. */
    _Atomic int pid;
    _Atomic int gone;
    int device;
    /* On which machine: as in NCCL what NCCL_HOSTID says, so that one machine can be several. */
    char host[64];
    /* In which operation it waits. */
    _Atomic enum Kind waits_in;
    _Atomic unsigned step;
    struct Page pages[2];
};
/* Messages from one rank to another: `sent` of them, `taken` of which were read. */
struct Lane {
    _Atomic unsigned sent, taken;
    _Atomic int refused;
    struct Page page;
};
/* What the processes of a communicator share. */
struct Room {
    _Atomic int size;
    /* Changes whenever someone has done something for which others may wait. */
    _Atomic unsigned bell;
    struct Seat seats[MOST_RANKS];
    /* By sender and receiver. */
    struct Lane lanes[MOST_RANKS][MOST_RANKS];
};

struct ncclComm {
    int rank, size, device;
    char name[96];
    struct Room *room;
    unsigned step;
    int splits, finalized;
    _Atomic int aborted;
    ncclResult_t error;
    pthread_mutex_t busy;
    /* Scalars of the reductions that this rank has made, by number from ncclNumOps. */
    struct Scalar {
        int used;
        ncclDataType_t type;
        const void *on_device;
        char value[8];
    } scalars[32];
};

/* One call of one rank. */
struct Operation {
    struct ncclComm *comm;
    struct Call call;
    const void *from;
    void *to;
    struct Stream *stream;
    struct Scalar scalar;
};

/* Remember what ncclGetLastError says, and return `result`. */
ncclResult_t null_nccl_fail(ncclResult_t result, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *null_nccl_words(char *text, size_t size, const struct Call *call);
const char *null_nccl_name(enum Kind kind);

ncclResult_t null_nccl_enter(struct ncclComm *comm);
void null_nccl_leave(struct ncclComm *comm);
void null_nccl_ring(struct ncclComm *comm);
/* Wait until `missing` returns no rank (-1); it fails where the rank that it returns is gone, or takes too long. */
ncclResult_t null_nccl_wait(struct ncclComm *comm, enum Kind kind, int (*missing)(struct ncclComm *, void *), void *data);
/* The page of this rank for the next step, and the step: afterwards those of all ranks can be read. */
struct Page *null_nccl_page(struct ncclComm *comm);
ncclResult_t null_nccl_step(struct ncclComm *comm, enum Kind kind);
struct Page *null_nccl_page_of(struct ncclComm *comm, int rank);

size_t null_nccl_size(ncclDataType_t type);
int null_nccl_reduces(ncclDataType_t type);
/* Multiply what this rank has, where its reduction does before it adds. */
void null_nccl_scale(void *data, size_t count, const struct Operation *operation);
/* Add what rank `rank` has to what those before it had. */
void null_nccl_reduce(void *sum, const void *more, size_t count, const struct Operation *operation, int rank);

ncclResult_t null_nccl_collective(struct Operation *operation);
ncclResult_t null_nccl_messages(struct Operation *operations, int count);

#endif
