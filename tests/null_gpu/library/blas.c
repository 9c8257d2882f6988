/* cuBLAS: a handle is a stream, a product is one launch. */
#include "null_gpu.h"

EXPORT int cublasCreate_v2(cudaStream_t **handle) {
    *handle = calloc(1, sizeof **handle);
    return 0;
}
EXPORT int cublasDestroy_v2(cudaStream_t *handle) {
    free(handle);
    return 0;
}
EXPORT int cublasSetStream_v2(cudaStream_t *handle, cudaStream_t stream) {
    *handle = stream;
    return 0;
}
EXPORT int cublasGetMathMode(cudaStream_t *handle, int *mode) { return *mode = 0; }
EXPORT int cublasSetMathMode(cudaStream_t *handle, int mode) { return 0; }
EXPORT int cublasGetPointerMode_v2(cudaStream_t *handle, int *mode) { return *mode = 0; }
EXPORT int cublasSetPointerMode_v2(cudaStream_t *handle, int mode) { return 0; }
EXPORT int cublasSetSmCountTarget(cudaStream_t *handle, int count) { return 0; }
EXPORT int cublasSetWorkspace_v2(cudaStream_t *handle, void *memory, size_t size) { return 0; }

#define FAILED 14
#define PRODUCT(name) \
    EXPORT int name(cudaStream_t *handle) { return null_launch(null_stream(*handle), #name) ? FAILED : 0; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

static int make(void **thing) {
    *thing = calloc(1, 64);
    return 0;
}
static int drop(void *thing) {
    free(thing);
    return 0;
}
EXPORT size_t cublasLtGetVersion(void) { return 130000; }
EXPORT int cublasLtMatmulDescCreate(void **thing) { return make(thing); }
EXPORT int cublasLtMatrixLayoutCreate(void **thing) { return make(thing); }
EXPORT int cublasLtMatmulPreferenceCreate(void **thing) { return make(thing); }
EXPORT int cublasLtMatmulDescDestroy(void *thing) { return drop(thing); }
EXPORT int cublasLtMatrixLayoutDestroy(void *thing) { return drop(thing); }
EXPORT int cublasLtMatmulPreferenceDestroy(void *thing) { return drop(thing); }
EXPORT int cublasLtMatmulDescSetAttribute(void *thing) { return 0; }
EXPORT int cublasLtMatrixLayoutSetAttribute(void *thing) { return 0; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void *thing) { return 0; }

/* As in cublasLt.h, which is C++. */
struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                          int most, struct Heuristic *found, int *count) {
    memset(found, 0, sizeof *found);
    *count = 1;
    return 0;
}
EXPORT int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *a_layout, const void *b,
                          void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                          const void *algorithm, void *workspace, size_t size, cudaStream_t stream) {
    return null_launch(null_stream(stream), "cublasLtMatmul") ? FAILED : 0;
}
