/* Memory of the device: pages of the host, which exist once they are written to. Copies are made at once. */
#include "null_gpu.h"
#include <sys/mman.h>

#define PAGE ((size_t)2 << 20)

struct Block {
    uintptr_t start;
    size_t size;
    int device;
    struct Block *next;
};
static struct Block *blocks, *pinned;
static size_t used[MOST_DEVICES];

static size_t whole_pages(size_t size) { return size ? (size + PAGE - 1) / PAGE * PAGE : PAGE; }

static struct Block *find(struct Block *list, const void *memory) {
    uintptr_t at = (uintptr_t)memory;
    while (list && (at < list->start || at >= list->start + list->size)) list = list->next;
    return list;
}
static void add(struct Block **list, void *memory, size_t size, int device) {
    struct Block *block = malloc(sizeof *block);
    *block = (struct Block){(uintptr_t)memory, size, device, *list};
    *list = block;
}
static struct Block *take(struct Block **list, void *memory) {
    while (*list && (*list)->start != (uintptr_t)memory) list = &(*list)->next;
    struct Block *block = *list;
    if (block) *list = block->next;
    return block;
}

int null_device_of(const void *memory) {
    pthread_mutex_lock(&null_lock);
    struct Block *block = find(blocks, memory);
    int device = block ? block->device : -1;
    pthread_mutex_unlock(&null_lock);
    return device;
}
size_t null_memory_used(void) { return used[null_device]; }

EXPORT cudaError_t cudaMalloc(void **memory, size_t size) {
    cudaError_t error = null_may_wait();
    if (error) return error;
    if (used[null_device] + size > null_memory_size()) return null_fail(cudaErrorMemoryAllocation);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *memory = mmap(NULL, whole_pages(size), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (*memory == MAP_FAILED) return null_fail(cudaErrorMemoryAllocation);
    pthread_mutex_lock(&null_lock);
    add(&blocks, *memory, size, null_device);
    used[null_device] += size;
    pthread_mutex_unlock(&null_lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void *memory) {
    cudaError_t error = memory ? null_may_wait() : cudaSuccess;
    if (error || !memory) return error;
    pthread_mutex_lock(&null_lock);
    struct Block *block = take(&blocks, memory);
    if (block) used[block->device] -= block->size;
    pthread_mutex_unlock(&null_lock);
    if (!block) return null_fail(cudaErrorInvalidValue);
    munmap(memory, whole_pages(block->size));
    free(block);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMallocManaged(void **memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
EXPORT cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t stream) { return cudaMalloc(memory, size); }
EXPORT cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { return cudaFree(memory); }
EXPORT cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = null_memory_size();
    *available = *total - null_memory_used();
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void *memory, size_t size, unsigned flags) {
    pthread_mutex_lock(&null_lock);
    add(&pinned, memory, size, -1);
    pthread_mutex_unlock(&null_lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void *memory) {
    pthread_mutex_lock(&null_lock);
    free(take(&pinned, memory));
    pthread_mutex_unlock(&null_lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
    if (posix_memalign(memory, 4096, size ? size : 1)) return null_fail(cudaErrorMemoryAllocation);
    return cudaHostRegister(*memory, size, 0);
}
EXPORT cudaError_t cudaMallocHost(void **memory, size_t size) { return cudaHostAlloc(memory, size, 0); }
EXPORT cudaError_t cudaFreeHost(void *memory) {
    cudaHostUnregister(memory);
    free(memory);
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *memory) {
    memset(a, 0, sizeof *a);
    pthread_mutex_lock(&null_lock);
    struct Block *block = find(blocks, memory);
    a->type = block ? cudaMemoryTypeDevice : find(pinned, memory) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = block ? block->device : a->type == cudaMemoryTypeHost ? null_device : -1;
    a->devicePointer = a->type == cudaMemoryTypeUnregistered ? NULL : (void *)memory;
    a->hostPointer = block ? NULL : (void *)memory;
    pthread_mutex_unlock(&null_lock);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = null_start(null_stream(stream), "memcpy");
    if (!error && !null_stream(stream)->capturing) memmove(to, from, size);
    return error;
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t error = null_wait(null_stream(0));
    return error ? error : cudaMemcpyAsync(to, from, size, kind, 0);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int device, const void *from, int other, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}

static void fill(void *to, int value, size_t size) {
    /* Pages of zeros are given back, to be there again when they are written to. */
    uintptr_t start = (uintptr_t)to, end = start + size, page = 4096;
    uintptr_t first = (start + page - 1) / page * page, last = end / page * page;
    if (value || size < (1 << 20)) {
        memset(to, value, size);
        return;
    }
    memset(to, 0, first - start);
    madvise((void *)first, last - first, MADV_DONTNEED);
    memset((void *)last, 0, end - last);
}
EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    cudaError_t error = null_start(null_stream(stream), "memset");
    if (!error && !null_stream(stream)->capturing) fill(to, value, size);
    return error;
}
EXPORT cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, 0); }

EXPORT cudaError_t cudaGetSymbolAddress(void **memory, const void *symbol) {
    *memory = calloc(1, 1 << 16);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t size) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) { return cudaSuccess; }
