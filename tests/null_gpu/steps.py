"""`run_train.py` on the null GPU; at its end it prints, as JSON, what the host started in each step, and its waits.

A step is what happens between two steps of the optimizer; the list has one entry for each but the first.
"""

import ctypes
import json
import os
import sys

from torch.optim.optimizer import register_optimizer_step_post_hook

from litgpt_moe_ext.cli.train import main

if __name__ == "__main__":
    gpu = ctypes.CDLL(os.environ["LD_PRELOAD"])
    gpu.null_gpu_names.restype = ctypes.c_char_p
    gpu.null_gpu_waited.restype = ctypes.c_long
    steps, waited = [], [0]

    def note(*_):
        before, waited[0] = waited[0], gpu.null_gpu_waited()
        steps.append({"started": gpu.null_gpu_names().decode().split("\n")[:-1], "waited": waited[0] - before})
        gpu.null_gpu_trace(1)

    register_optimizer_step_post_hook(note)
    main(sys.argv[1:])  # whose weights are nothing that it would save at its end
    print(json.dumps(steps[1:]), flush=True)
