"""Print, as JSON, what a step of Muon for a recipe's model starts on the null GPU: run by a test, on that GPU."""

import ctypes
import json
import os
import sys

import litgpt
import torch
import yaml

import litgpt_moe_ext  # noqa: F401  # registers the layers
from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters
from litgpt_moe_ext.training.settings import ParameterGroupArgs

if __name__ == "__main__":
    gpu = ctypes.CDLL(os.environ["LD_PRELOAD"])
    gpu.null_gpu_names.restype = ctypes.c_char_p
    gpu.null_gpu_waited.restype = ctypes.c_long
    with open(sys.argv[1], encoding="utf-8") as file:
        config = litgpt.Config(**yaml.safe_load(file)["model_config"])
    with torch.device("cuda"):
        model = litgpt.GPT(config)
    optimizer = MuonAdamW(group_parameters(model, ParameterGroupArgs(), split_matrices=True), lr=0.1)
    GpuStep(optimizer).install()
    for _ in range(2):  # states are made in the first
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        waited = gpu.null_gpu_waited()
        gpu.null_gpu_trace(1)
        optimizer.step()
        started = gpu.null_gpu_names().decode().split("\n")[:-1]
        gpu.null_gpu_trace(0)
    print(json.dumps({"started": started, "waited": gpu.null_gpu_waited() - waited}))
