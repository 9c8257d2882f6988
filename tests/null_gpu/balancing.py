"""Print, as JSON, what moves the balancing biases of a model on the null GPU, and what a line of a log then takes.

Run by a test, on that GPU.
"""

import ctypes
import json
import os
import sys

import litgpt
import torch

import litgpt_moe_ext  # noqa: F401  # registers the layers
from litgpt_moe_ext.moe.balancing.bias import update_routers
from litgpt_moe_ext.moe.balancing.metrics import load_metrics, routers_of

if __name__ == "__main__":
    gpu = ctypes.CDLL(os.environ["LD_PRELOAD"])
    gpu.null_gpu_names.restype = ctypes.c_char_p
    gpu.null_gpu_waited.restype = ctypes.c_long
    with torch.device("cuda"):
        model = litgpt.GPT(litgpt.Config(**json.load(sys.stdin)))
    routers = routers_of(model).values()
    found = {}
    for _ in range(2):  # the kernel is compiled for the first
        for router in routers:
            leaf = router.tally.leaf_on(torch.device("cuda"))
            leaf.grad = torch.zeros_like(leaf)
        for name, act in (("moving", lambda: update_routers(routers)), ("logging", lambda: load_metrics(model))):
            waited = gpu.null_gpu_waited()
            gpu.null_gpu_trace(1)
            act()
            started = gpu.null_gpu_names().decode().split("\n")[:-1]
            gpu.null_gpu_trace(0)
            found[name] = {"started": started, "waited": gpu.null_gpu_waited() - waited}
    print(json.dumps(found))
