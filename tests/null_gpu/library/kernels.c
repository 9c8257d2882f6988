/* PyTorch's kernels: known by name, counted when started. */
#include "null_gpu.h"

struct Name {
    const void *function;
    const char *name;
};
static struct Name *kernels;
static size_t n_kernel, room;
static int sorted;

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT void __cudaRegisterVar(void **handle, char *var, char *address, const char *name, int ext, size_t size, int constant, int global) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int threads,
                                   void *thread, void *block, void *block_size, void *grid_size, int *warp) {
    if (n_kernel == room) kernels = realloc(kernels, (room = room ? 2 * room : 4096) * sizeof *kernels);
    kernels[n_kernel++] = (struct Name){function, name};
    sorted = 0;
}
static int by_function(const void *a, const void *b) {
    const void *x = ((const struct Name *)a)->function, *y = ((const struct Name *)b)->function;
    return x < y ? -1 : x > y;
}
static const char *name_of(const void *function) {
    if (!null_traces()) return "";
    if (!sorted) qsort(kernels, n_kernel, sizeof *kernels, by_function);
    sorted = 1;
    struct Name key = {function, NULL}, *found = bsearch(&key, kernels, n_kernel, sizeof *kernels, by_function);
    return found ? found->name : "kernel without a name";
}

static cudaError_t run(const void *function, dim3 grid, dim3 block, cudaStream_t stream) {
    /* PyTorch for CUDA 13 has no code for older ones. */
    if (null_capability() < 75) return null_fail(cudaErrorNoKernelImageForDevice);
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024)
        return null_fail(cudaErrorInvalidConfiguration);
    return null_launch(null_stream(stream), name_of(function));
}
EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return run(function, grid, block, stream);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return run(function, grid, block, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **args) {
    return run(function, config->gridDim, config->blockDim, config->stream);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

struct Call {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
static __thread struct Call calls[8];
static __thread int n_call;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    calls[n_call++] = (struct Call){grid, block, shared, stream};
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    struct Call call = calls[--n_call];
    *grid = call.grid, *block = call.block, *shared = call.shared, *(cudaStream_t *)stream = call.stream;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    /* Code for the nearest architecture for which PyTorch is built. */
    static const int built[] = {120, 100, 90, 86, 80, 75};
    int i = 0;
    while (i < 5 && built[i] > null_capability()) i++;
    memset(a, 0, sizeof *a);
    a->ptxVersion = a->binaryVersion = built[i];
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->maxDynamicSharedSizeBytes = (int)null_shared_memory();
    return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function, int threads, size_t shared) {
    *count = 2;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int threads,
                                                                          size_t shared, unsigned flags) {
    *count = 2;
    return cudaSuccess;
}
