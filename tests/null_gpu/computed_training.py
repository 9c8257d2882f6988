"""`run_train.py` on the null GPU that computes; at its end it prints how often the host waited in each step.

Waits are counted between two steps of the optimizer, on every rank: `waits: 3 1 1 1`.
"""

import ctypes
import os
import sys

from torch.optim.optimizer import register_optimizer_step_post_hook

import tests.null_gpu.computing  # noqa: F401  # before anything is computed
from litgpt_moe_ext.cli.train import main

if __name__ == "__main__":
    _gpu = ctypes.CDLL(os.environ["LD_PRELOAD"])
    _gpu.null_gpu_waited.restype = ctypes.c_long
    counts = [0]
    register_optimizer_step_post_hook(lambda *_: counts.append(_gpu.null_gpu_waited()))
    status = main(sys.argv[1:])
    print("waits:", *(after - before for before, after in zip(counts, counts[1:], strict=False)), flush=True)
    sys.exit(status)
