/* What the parts of the null GPU share. Each part answers for one header of CUDA. */
#ifndef NULL_GPU_H
#define NULL_GPU_H

#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda_runtime_api.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST_DEVICES 16
#define MOST_STREAMS 4096

struct Graph {
    long nodes;
    /* Among them those of NCCL, which cannot be replayed here. */
    long collectives;
};

struct Stream {
    int device;
    /* What was started in it up to this moment is done, as someone has waited for it. */
    long settled;
    unsigned flags;
    int priority;
    /* Of the capture that the stream is in, if any. */
    int capturing, broken;
    enum cudaStreamCaptureMode mode;
    unsigned long long id;
    struct Graph *graph;
    pthread_t thread;
};

extern pthread_mutex_t null_lock;
extern __thread int null_device;

long null_setting(const char *name, long otherwise);
int null_devices(void);
int null_capability(void);
size_t null_memory_size(void);
size_t null_shared_memory(void);
cudaError_t null_fail(cudaError_t error);

/* The device that memory is on, or -1. */
int null_device_of(const void *memory);
size_t null_memory_used(void);

/* The stream of a handle; the legacy stream is that of the present device. */
struct Stream *null_stream(cudaStream_t stream);
/* Fail where someone captures and this call, which may wait, is not allowed beside it. */
cudaError_t null_may_wait(void);
cudaError_t null_wait(struct Stream *stream);
/* Count what is started in a stream; within a capture, as a node of its graph. */
cudaError_t null_start(struct Stream *stream, const char *name);
/* The same for a kernel, which only streams of the present device take. */
cudaError_t null_launch(struct Stream *stream, const char *name);
int null_traces(void);

#endif
