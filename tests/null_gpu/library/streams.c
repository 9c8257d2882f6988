/* Streams, events, and captures with the errors that CUDA documents for them. */
#include "null_gpu.h"
#include <time.h>

static struct Stream legacy[MOST_DEVICES], *streams[MOST_STREAMS];
static int n_stream, captures;
static unsigned long long last_id;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static long launched, waited, moments, last_wait;
static int tracing;
static char *names;
static size_t names_size, names_used;

EXPORT long null_gpu_launched(void) { return launched; }
EXPORT long null_gpu_waited(void) { return waited; }
/* From now on, write down the names of what is started, one on each line; or no longer. */
EXPORT void null_gpu_trace(int on) {
    tracing = on;
    if (on) names_used = 0;
}
EXPORT const char *null_gpu_names(void) { return names_used ? names : ""; }
int null_traces(void) { return tracing; }

struct Stream *null_stream(cudaStream_t stream) {
    if ((uintptr_t)stream > 2) return (struct Stream *)stream;
    legacy[null_device].device = null_device;
    return &legacy[null_device];
}
static int is_legacy(struct Stream *stream) { return stream >= legacy && stream < legacy + MOST_DEVICES; }

static cudaError_t spoil(struct Stream *stream, cudaError_t error) {
    stream->broken = 1;
    return null_fail(error);
}
/* A capturing stream for which the legacy stream would have to wait, or NULL. */
static struct Stream *blocked_by(struct Stream *stream) {
    if (!captures || !is_legacy(stream)) return NULL;
    for (int i = 0; i < n_stream; i++) {
        struct Stream *s = streams[i];
        if (s->capturing && s->device == stream->device && !(s->flags & cudaStreamNonBlocking)) return s;
    }
    return NULL;
}
cudaError_t null_may_wait(void) {
    if (!captures || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (int i = 0; i < n_stream; i++) {
        struct Stream *s = streams[i];
        int mine = s->mode == cudaStreamCaptureModeThreadLocal && pthread_equal(s->thread, pthread_self());
        if (s->capturing && (s->mode == cudaStreamCaptureModeGlobal || mine)) return spoil(s, cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}
static long now(void) { return __atomic_add_fetch(&moments, 1, __ATOMIC_RELAXED); }
cudaError_t null_wait(struct Stream *stream) {
    if (stream && stream->capturing) return spoil(stream, cudaErrorStreamCaptureUnsupported);
    cudaError_t error = null_may_wait();
    if (error) return error;
    __atomic_add_fetch(&waited, 1, __ATOMIC_RELAXED);
    last_wait = now();
    if (stream) stream->settled = last_wait;
    return cudaSuccess;
}
cudaError_t null_start(struct Stream *stream, const char *name) {
    struct Stream *other = blocked_by(stream);
    if (other) return spoil(other, cudaErrorStreamCaptureImplicit);
    if (stream->capturing) stream->graph->nodes++;
    __atomic_add_fetch(&launched, 1, __ATOMIC_RELAXED);
    if (tracing) {
        pthread_mutex_lock(&null_lock);
        size_t length = strlen(name) + 2;
        if (names_used + length > names_size) names = realloc(names, names_size = 2 * (names_used + length));
        names_used += sprintf(names + names_used, "%s\n", name);
        pthread_mutex_unlock(&null_lock);
    }
    return cudaSuccess;
}

cudaError_t null_launch(struct Stream *stream, const char *name) {
    return stream->device == null_device ? null_start(stream, name) : null_fail(cudaErrorInvalidResourceHandle);
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    struct Stream *s = calloc(1, sizeof *s);
    s->device = null_device;
    s->flags = flags;
    s->priority = priority;
    pthread_mutex_lock(&null_lock);
    int full = n_stream == MOST_STREAMS;
    if (!full) streams[n_stream++] = s;
    pthread_mutex_unlock(&null_lock);
    *stream = (cudaStream_t)s;
    return full ? null_fail(cudaErrorMemoryAllocation) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = null_stream(stream)->priority;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return null_wait(null_stream(stream)); }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
    struct Stream *s = null_stream(stream);
    return s->capturing ? spoil(s, cudaErrorStreamCaptureUnsupported) : null_may_wait();
}

/* While something is captured: which events were recorded in which streams, and which streams wait for them. */
struct Sync {
    cudaEvent_t event;
    struct Stream *stream;
    int waits;
};
static struct Sync *syncs;
static size_t syncs_size, syncs_used;
static void note_sync(cudaEvent_t event, struct Stream *stream, int waits) {
    if (!captures) return;
    pthread_mutex_lock(&null_lock);
    if (syncs_used == syncs_size) syncs = realloc(syncs, (syncs_size = 2 * syncs_size + 64) * sizeof *syncs);
    syncs[syncs_used++] = (struct Sync){event, stream, waits};
    pthread_mutex_unlock(&null_lock);
}
/* Those since the last call, in order; they are there until the next. */
EXPORT size_t null_gpu_syncs(struct Sync **found) {
    size_t n = syncs_used;
    syncs_used = 0;
    *found = syncs;
    return n;
}

struct Event {
    int device;
    struct timespec at;
    int recorded;
    /* Where and when it was. */
    struct Stream *in;
    long moment;
    /* The capture in which it was recorded, if any. */
    struct Stream *stream;
    unsigned long long id;
};
static int captured(struct Event *e) { return e->stream && e->stream->capturing && e->stream->id == e->id; }

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    struct Event *e = calloc(1, sizeof *e);
    e->device = null_device;
    *event = (cudaEvent_t)e;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    struct Event *e = (struct Event *)event;
    struct Stream *s = null_stream(stream);
    if (e->device != s->device) return null_fail(cudaErrorInvalidResourceHandle);
    clock_gettime(CLOCK_MONOTONIC, &e->at);
    e->recorded = 1;
    e->in = s, e->moment = now();
    e->stream = s->capturing ? s : NULL;
    e->id = s->id;
    note_sync(event, s, 0);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    struct Event *e = (struct Event *)event;
    if (captured(e)) return null_fail(cudaErrorCapturedEvent);
    cudaError_t error = null_may_wait();
    /* A GPU that lags is behind the host by so many seconds, unless that waits for it. */
    long lag = null_setting("NULL_GPU_LAG", 0);
    if (error || !lag || !e->recorded || e->moment < last_wait) return error;
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec - e->at.tv_sec > lag ? cudaSuccess : cudaErrorNotReady;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    struct Event *e = (struct Event *)event;
    if (captured(e)) return null_fail(cudaErrorCapturedEvent);
    /* What comes before something that was waited for holds nobody up. */
    int is_over = !e->recorded || e->moment < e->in->settled;
    return is_over ? null_may_wait() : null_wait(NULL);
}
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    struct Event *a = (struct Event *)from, *b = (struct Event *)to;
    if (!a->recorded || !b->recorded || a->device != b->device) return null_fail(cudaErrorInvalidResourceHandle);
    *ms = 1e3f * (b->at.tv_sec - a->at.tv_sec) + 1e-6f * (b->at.tv_nsec - a->at.tv_nsec);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    struct Stream *s = null_stream(stream);
    struct Event *e = (struct Event *)event;
    if (captured(e) && !s->capturing) {
        /* The stream joins the capture. */
        struct Stream *first = e->stream;
        s->mode = first->mode, s->id = first->id, s->graph = first->graph, s->thread = first->thread;
        s->capturing = 1;
    } else if (s->capturing && e->recorded && !captured(e)) {
        return spoil(s, cudaErrorStreamCaptureIsolation);
    }
    note_sync(event, s, 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    struct Stream *s = null_stream(stream);
    if (is_legacy(s)) return null_fail(cudaErrorStreamCaptureUnsupported);
    if (s->capturing) return null_fail(cudaErrorIllegalState);
    s->mode = mode, s->id = ++last_id, s->thread = pthread_self(), s->broken = 0;
    s->graph = calloc(1, sizeof(struct Graph));
    s->capturing = 1;
    captures++;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    struct Stream *s = null_stream(stream);
    *graph = NULL;
    if (!s->capturing) return null_fail(cudaErrorIllegalState);
    int broken = 0;
    for (int i = 0; i < n_stream; i++)
        if (streams[i]->capturing && streams[i]->id == s->id) {
            broken |= streams[i]->broken;
            streams[i]->capturing = streams[i]->broken = 0;
        }
    captures--;
    if (broken) return null_fail(cudaErrorStreamCaptureInvalidated);
    *graph = (cudaGraph_t)s->graph;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    struct Stream *s = null_stream(stream);
    if (blocked_by(s)) return null_fail(cudaErrorStreamCaptureImplicit);
    *status = s->broken      ? cudaStreamCaptureStatusInvalidated
              : s->capturing ? cudaStreamCaptureStatusActive
                             : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                            cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                            const cudaGraphEdgeData **edges, size_t *count) {
    cudaError_t error = cudaStreamIsCapturing(stream, status);
    if (error) return error;
    if (id) *id = null_stream(stream)->id;
    if (graph) *graph = (cudaGraph_t)null_stream(stream)->graph;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *dependencies,
                                                       const cudaGraphEdgeData *edges, size_t count, unsigned flags) {
    return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    cudaError_t error = null_start(null_stream(stream), "host function");
    if (!error && !null_stream(stream)->capturing) function(data);
    return error;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
    struct Stream *s = null_stream(stream);
    if (s->capturing) return spoil(s, cudaErrorStreamCaptureUnsupported);
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}
