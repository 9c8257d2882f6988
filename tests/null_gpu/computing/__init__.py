"""Makes the null GPU compute, by the CPU and in the same memory: `pytest -p tests.null_gpu.computing`.

Every kernel of PyTorch's is started as ever, and then the operator is computed by its CPU kernel on tensors that share
the memory of those on the GPU; Triton's kernels go through its interpreter. What is captured is computed when its
graph is replayed, in the memory that it had. Rounding and the order of sums are the CPU's. With PyTorch's own variable
`TORCH_CUDA_SANITIZER=1` a race between streams ends the process.
"""

import os

from tests.null_gpu.computing import capture, operators

capture.install()
operators.install()
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.null_gpu.computing import triton_kernels

    triton_kernels.install()
if os.environ.get("TORCH_CUDA_SANITIZER") == "1":
    from tests.null_gpu.computing import races

    races.install()
