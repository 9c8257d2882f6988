/* Graphs: how many nodes they have. A replay is one launch. */
#include "null_gpu.h"

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((struct Graph *)graph)->nodes;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *copy, cudaGraph_t graph, unsigned long long flags) {
    if (((struct Graph *)graph)->collectives) {
        fprintf(stderr, "null GPU: a graph with collective operations of NCCL cannot be replayed here\n");
        return null_fail(cudaErrorNotSupported);
    }
    *copy = malloc(sizeof(struct Graph));
    memcpy(*copy, graph, sizeof(struct Graph));
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *copy, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(copy, graph, flags);
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return null_start(null_stream(stream), "graph"); }
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    free(graph);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) { return cudaSuccess; }
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *data, cudaHostFn_t destroy, unsigned count, unsigned flags) {
    *object = (cudaUserObject_t)1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) { return cudaSuccess; }
