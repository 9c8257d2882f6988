/* What NCCL has and this has not: windows, signals, communicators that change. It says so, whatever it is called with. */
#include "null_gpu.h"

#define UNSUPPORTED 5 /* ncclInvalidUsage */
int null_nccl_fail(int result, const char *format, ...);

#define MISSING(name) \
    EXPORT int name(void) { return null_nccl_fail(UNSUPPORTED, "the null NCCL has no %s", #name); }
MISSING(ncclCommInitAll)
MISSING(ncclCommShrink)
MISSING(ncclCommGrow)
MISSING(ncclCommRevoke)
MISSING(ncclCommSuspend)
MISSING(ncclCommResume)
MISSING(ncclCommGetUniqueId)
MISSING(ncclCommMemStats)
MISSING(ncclCommWindowRegister)
MISSING(ncclCommWindowDeregister)
MISSING(ncclWinGetUserPtr)
MISSING(ncclPutSignal)
MISSING(ncclSignal)
MISSING(ncclWaitSignal)
MISSING(ncclGroupSimulateEnd)
MISSING(ncclDevCommCreate)
MISSING(ncclDevCommDestroy)
MISSING(ncclGetLsaMultimemDevicePointer)
MISSING(ncclGetPeerDevicePointer)
