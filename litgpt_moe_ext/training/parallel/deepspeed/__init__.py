"""DeepSpeed's ZeRO as a strategy: optimizer states, gradients and weights sharded, or offloaded to the CPU.

ZeRO stage 1 shards the optimizer's states, stage 2 the gradients as well, stage 3 the weights too (Rajbhandari et al.,
arXiv:1910.02054). LitGPT's loop and checkpoints stay as they are: `lit_model.pth` holds whole float32 weights and the
states of a torch optimizer, so `litgpt generate` can open it, and a run can continue with another number of processes
or with ddp.

| file           | what it does                                                                                   |
| -------------- | ---------------------------------------------------------------------------------------------- |
| `settings.py`  | DeepSpeed's configuration                                                                      |
| `strategy.py`  | Fabric's strategy, for a loop that sets up the model first and the optimizer after it           |
| `optimizer.py` | the optimizer that LitGPT's loop sees                                                           |
| `shards.py`    | whole tensors from every process's shards, and back                                             |

Run on CPUs (two processes over gloo, DeepSpeed's CPU accelerator, float32 and bfloat16) and on the GPUs and the NCCL of
`tests/null_gpu` (two and four processes, all stages, every precision); not run on real GPUs yet.
"""
