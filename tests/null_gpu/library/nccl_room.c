/* Where the processes of a communicator meet: shared memory, in which each leaves what the others wait for. */
#include "null_nccl.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void null_nccl_ring(struct ncclComm *comm) {
    atomic_fetch_add(&comm->room->bell, 1);
    syscall(SYS_futex, &comm->room->bell, FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
}

/* Whether a process has ended, also where its parent has not asked for its status yet. */
static int has_ended(int pid) {
    char name[64], text[512];
    if (kill(pid, 0) && errno == ESRCH) return 1;
    snprintf(name, sizeof name, "/proc/%d/stat", pid);
    FILE *file = fopen(name, "r");
    if (!file) return 0;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    char *state = strrchr(text, ')');
    return state && (state[2] == 'Z' || state[2] == 'X');
}
static int is_gone(struct Seat *seat) {
    int pid = atomic_load(&seat->pid);
    return atomic_load(&seat->gone) || (pid && has_ended(pid));
}

static ncclResult_t give_up(struct ncclComm *comm, enum Kind kind, int rank, int gone, long seconds) {
    struct Seat *seat = &comm->room->seats[rank];
    const char *in = null_nccl_name(kind), *there = null_nccl_name(atomic_load(&seat->waits_in));
    int pid = atomic_load(&seat->pid);
    if (gone)
        return null_nccl_fail(ncclRemoteError, "rank %d waits in %s for rank %d (process %d), which is gone", comm->rank, in, rank, pid);
    if (!pid) return null_nccl_fail(ncclRemoteError, "rank %d has not come within %ld seconds", rank, seconds);
    return null_nccl_fail(ncclRemoteError, "rank %d has waited %ld seconds in %s for rank %d (process %d), which is in %s", comm->rank,
                          seconds, in, rank, pid, there);
}

ncclResult_t null_nccl_wait(struct ncclComm *comm, enum Kind kind, int (*missing)(struct ncclComm *, void *), void *data) {
    long seconds = null_setting("NULL_GPU_SECONDS", 300);
    time_t end = time(NULL) + seconds;
    struct Seat *mine = &comm->room->seats[comm->rank];
    atomic_store(&mine->waits_in, kind);
    ncclResult_t result = ncclSuccess;
    int rank;
    for (;;) {
        unsigned bell = atomic_load(&comm->room->bell);
        if ((rank = missing(comm, data)) < 0) break;
        if (atomic_load(&comm->aborted)) {
            result = null_nccl_fail(ncclInvalidUsage, "rank %d aborted its communicator while it waited", comm->rank);
            break;
        }
        int gone = is_gone(&comm->room->seats[rank]);
        /* What it did last comes before its end. */
        if (gone && (rank = missing(comm, data)) < 0) break;
        if (gone || time(NULL) >= end) {
            result = give_up(comm, kind, rank, is_gone(&comm->room->seats[rank]), seconds);
            break;
        }
        struct timespec moment = {0, 100000000};
        syscall(SYS_futex, &comm->room->bell, FUTEX_WAIT, bell, &moment, NULL, 0);
    }
    atomic_store(&mine->waits_in, NOTHING);
    return result;
}

static int absent(struct ncclComm *comm, void *data) {
    for (int rank = 0; rank < comm->size; rank++)
        if (!atomic_load(&comm->room->seats[rank].pid)) return rank;
    return -1;
}

static ncclResult_t take_seat(struct ncclComm *comm) {
    int nobody = 0, size = 0;
    if (!atomic_compare_exchange_strong(&comm->room->size, &size, comm->size) && size != comm->size)
        return null_nccl_fail(ncclInvalidArgument, "rank %d says %d ranks, another says %d", comm->rank, comm->size, size);
    struct Seat *mine = &comm->room->seats[comm->rank];
    mine->device = comm->device;
    const char *host = getenv("NCCL_HOSTID");
    snprintf(mine->host, sizeof mine->host, "%s", host ? host : "");
    if (!atomic_compare_exchange_strong(&mine->pid, &nobody, getpid()))
        return null_nccl_fail(ncclInvalidUsage, "two processes (%d, %d) are rank %d", nobody, getpid(), comm->rank);
    null_nccl_ring(comm);
    ncclResult_t result = null_nccl_wait(comm, NOTHING, absent, NULL);
    if (result) return result;
    for (int a = 0; a < comm->size; a++)
        for (int b = 0; b < a; b++)
            if (comm->room->seats[a].device == comm->room->seats[b].device && !strcmp(comm->room->seats[a].host, comm->room->seats[b].host))
                return null_nccl_fail(ncclInvalidUsage, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %d", b, a,
                                      comm->room->seats[a].device);
    return ncclSuccess;
}

ncclResult_t null_nccl_enter(struct ncclComm *comm) {
    int file = shm_open(comm->name, O_CREAT | O_RDWR, 0600);
    if (file < 0) return null_nccl_fail(ncclSystemError, "%s: %s", comm->name, strerror(errno));
    /* New memory is all zeros, and its pages exist once they are written to. */
    void *memory = MAP_FAILED;
    if (!ftruncate(file, sizeof(struct Room)))
        memory = mmap(NULL, sizeof(struct Room), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return null_nccl_fail(ncclSystemError, "%s: %s", comm->name, strerror(errno));
    comm->room = memory;
    ncclResult_t result = take_seat(comm);
    shm_unlink(comm->name);
    if (result) null_nccl_leave(comm);
    return result;
}

void null_nccl_leave(struct ncclComm *comm) {
    struct Seat *mine = &comm->room->seats[comm->rank];
    if (atomic_load(&mine->pid) == getpid()) atomic_store(&mine->gone, 1);
    null_nccl_ring(comm);
    munmap(comm->room, sizeof(struct Room));
}

/* There are two pages for turns: who writes one knows that all have read what it held two steps ago. */
struct Page *null_nccl_page(struct ncclComm *comm) { return &comm->room->seats[comm->rank].pages[(comm->step + 1) % 2]; }
struct Page *null_nccl_page_of(struct ncclComm *comm, int rank) { return &comm->room->seats[rank].pages[comm->step % 2]; }

static int behind(struct ncclComm *comm, void *data) {
    for (int rank = 0; rank < comm->size; rank++)
        if ((int)(atomic_load(&comm->room->seats[rank].step) - comm->step) < 0) return rank;
    return -1;
}
ncclResult_t null_nccl_step(struct ncclComm *comm, enum Kind kind) {
    atomic_store(&comm->room->seats[comm->rank].step, ++comm->step);
    null_nccl_ring(comm);
    return null_nccl_wait(comm, kind, behind, NULL);
}
