"""Attention kernels: a registry, the choice between them, and one file for each.

| file             | what it holds                                                                 |
| ---------------- | ----------------------------------------------------------------------------- |
| `kernel.py`      | what a kernel is, as plain data                                                |
| `own.py`         | the kernels of this package, and what each can do                              |
| `registry.py`    | all kernels by name; `register_kernel`                                         |
| `choice.py`      | which kernel computes given tensors, and the log line about it                 |
| `calls.py`       | what a kernel is called with                                                   |
| `flash_cpu.py`   | PyTorch's flash attention for CPUs                                             |
| `flash_attn2.py` | the `flash-attn` package                                                       |
| `flash_attn4.py` | the `flash-attn-4` package                                                     |
| `flash_cuda.py`  | PyTorch's flash attention for GPUs                                             |
| `cudnn.py`       | cuDNN's attention                                                              |
| `efficient.py`   | PyTorch's memory-efficient attention                                           |
| `sink_epilogue.py` | the effect of sinks on a kernel's result, in Triton                          |
| `rotation.py`    | the rotary embedding of queries and keys, in Triton                            |
"""
