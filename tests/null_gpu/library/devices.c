/* Devices, their properties, and errors. */
#include "null_gpu.h"

pthread_mutex_t null_lock = PTHREAD_MUTEX_INITIALIZER;
__thread int null_device;
static __thread cudaError_t last_error;

long null_setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value && *value ? atol(value) : otherwise;
}

int null_capability(void) { return (int)null_setting("NULL_GPU_CAPABILITY", 89); }
int null_devices(void) {
    long count = null_setting("NULL_GPU_DEVICES", 1);
    return count < 1 ? 1 : count > MOST_DEVICES ? MOST_DEVICES : (int)count;
}
size_t null_memory_size(void) { return (size_t)null_setting("NULL_GPU_MIB", 8 * 1024) << 20; }

size_t null_shared_memory(void) {
    int capability = null_capability();
    int kib = capability == 75 ? 64 : capability == 80 || capability == 87 ? 163 : capability >= 90 && capability < 120 ? 227 : 99;
    return (size_t)kib << 10;
}

cudaError_t null_fail(cudaError_t error) { return last_error = error; }

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorName(cudaError_t error) { return error ? "an error of the null GPU" : "cudaSuccess"; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return "an error that the null GPU has no words for";
    }
}

static int exists(int device) { return device >= 0 && device < null_devices(); }

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    *count = null_devices();
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = null_device;
    return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int device) {
    if (!exists(device)) return null_fail(cudaErrorInvalidDevice);
    null_device = device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    if (!exists(device)) return null_fail(cudaErrorInvalidDevice);
    snprintf(p->name, sizeof p->name, "null GPU");
    p->uuid.bytes[0] = (char)(device + 1);
    p->major = null_capability() / 10;
    p->minor = null_capability() % 10;
    p->totalGlobalMem = null_memory_size();
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = null_shared_memory();
    p->reservedSharedMemPerBlock = 1 << 10;
    p->sharedMemPerMultiprocessor = null_shared_memory() + p->reservedSharedMemPerBlock;
    p->regsPerBlock = p->regsPerMultiprocessor = 1 << 16;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->multiProcessorCount = 128;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 384;
    p->totalConstMem = 1 << 16;
    p->textureAlignment = 512;
    p->pciBusID = device + 1;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->canMapHostMemory = 1;
    p->cooperativeLaunch = p->memoryPoolsSupported = p->streamPrioritiesSupported = 1;
    p->clusterLaunch = p->major >= 9;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)p.reservedSharedMemPerBlock; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrPciBusId: *value = p.pciBusID; break;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: *value = 1800000; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels: case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported: case cudaDevAttrStreamPrioritiesSupported: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    if (!exists(device)) return null_fail(cudaErrorInvalidDevice);
    snprintf(id, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int other) {
    *can = exists(device) && exists(other) && device != other;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned flags) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize(void) { return null_wait(NULL); }
EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
EXPORT cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
