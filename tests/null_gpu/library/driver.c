/* The driver, by which Triton and PyTorch's runtime compiler load and start kernels. */
#define cuTensorMapEncodeTiled declared_otherwise
#include "null_gpu.h"
#include <cuda.h>
#include <dlfcn.h>
#undef cuTensorMapEncodeTiled
#undef cuLinkCreate
#undef cuLinkAddData
#undef cuModuleGetGlobal

struct Function {
    int device;
    char name[256];
};

static int nothing(void) { return 0; }

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int *count) { return (CUresult)cudaGetDeviceCount(count); }
EXPORT CUresult cuDeviceGet(CUdevice *device, int number) {
    if (number < 0 || number >= null_devices()) return CUDA_ERROR_INVALID_DEVICE;
    *device = number;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}

/* Tables that NVIDIA does not document: there are none. */
EXPORT CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

/* A context is the number of its device, from 1. */
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(uintptr_t)(device + 1);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, null_device); }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    if (context) null_device = (int)(uintptr_t)context - 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = null_device;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *name) { return cuModuleLoadData(module, name); }
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetGlobal_v2(CUdeviceptr *memory, size_t *size, CUmodule module, const char *name) {
    *memory = (CUdeviceptr)calloc(1, 1 << 16);
    if (size) *size = 1 << 16;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    struct Function *f = calloc(1, sizeof *f);
    f->device = null_device;
    snprintf(f->name, sizeof f->name, "%s", name);
    *function = (CUfunction)f;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    int too_much = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && (size_t)value > null_shared_memory();
    return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuLinkCreate_v2(unsigned count, CUjit_option *options, void **values, CUlinkState *state) {
    *state = (CUlinkState)1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name, unsigned count,
                                 CUjit_option *options, void **values) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuLinkComplete(CUlinkState state, void **image, size_t *size) {
    static char none[64];
    *image = none;
    *size = sizeof none;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuTensorMapEncodeTiled(void) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t shared) {
    *count = 2;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                               unsigned z, unsigned shared, CUstream stream, void **args, void **extra) {
    if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || x * y * z > 1024) return CUDA_ERROR_INVALID_VALUE;
    struct Function *f = (struct Function *)function;
    /* A module is loaded into the context of one device. */
    if (f->device != null_device) return CUDA_ERROR_INVALID_HANDLE;
    return (CUresult)null_launch(null_stream((cudaStream_t)stream), f->name);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **args, void **extra) {
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                          c->sharedMemBytes, c->hStream, args, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x,
                                          unsigned y, unsigned z, unsigned shared, CUstream stream, void **args) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, x, y, z, shared, stream, args, NULL);
}
EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr memory) {
    /* As on a GPU, for whose kernels the memory of the host, or of another GPU, is no argument. */
    if (null_device_of((void *)memory) != null_device) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)data = memory;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return (CUresult)cudaStreamIsCapturing((cudaStream_t)stream, (enum cudaStreamCaptureStatus *)status);
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *status) {
    Dl_info self;
    dladdr((void *)nothing, &self);
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void *found = library ? dlsym(library, symbol) : NULL;
    *function = found ? found : (void *)nothing;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
