"""DeepSpeed's ZeRO as a strategy: optimizer states, gradients and weights shared out, or kept on the CPU.

ZeRO stage 1 shares out the optimizer's states, stage 2 the gradients as well, stage 3 the weights too (Rajbhandari et
al., arXiv:1910.02054). LitGPT's loop stays as it is, and so does the checkpoint: `lit_model.pth` holds whole float32
weights and the states of a torch optimizer, so that `litgpt generate` opens it and a run can go on with another number
of processes, or with ddp.

| file           | what it does                                                                                   |
| -------------- | ---------------------------------------------------------------------------------------------- |
| `settings.py`  | what DeepSpeed is configured with                                                              |
| `strategy.py`  | Fabric's strategy, for a loop that sets up the model first and the optimizer after it           |
| `optimizer.py` | what LitGPT's loop sees as the optimizer                                                        |
| `shards.py`    | whole tensors from the pieces that every process has, and back                                  |

Run on CPUs (two processes over gloo, DeepSpeed's CPU accelerator, float32 and bfloat16) and on the GPUs and the NCCL of
`tests/null_gpu` (two and four processes, all stages, every precision); not run on real GPUs yet.
"""
