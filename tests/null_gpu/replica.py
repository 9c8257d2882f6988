"""A rank on a null GPU: draw weights, give them to DDP, and print the sum that a model has of them.

Run by `test_races.py`. Nothing waits for the device between these.
"""

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import nn

import tests.null_gpu.computing  # noqa: F401  # before anything is computed
from litgpt_moe_ext.training.parallel.replicated import ReplicatedStrategy
from litgpt_moe_ext.training.settings import DistributedArgs

RANK = int(os.environ["RANK"])
CARD = torch.device("cuda", RANK)

if __name__ == "__main__":
    torch.cuda.set_device(CARD)
    dist.init_process_group("nccl", device_id=CARD)
    strategy = ReplicatedStrategy("cuda", DistributedArgs())
    strategy.parallel_devices = [torch.device("cuda", rank) for rank in range(dist.get_world_size())]
    strategy.cluster_environment = LightningEnvironment()
    ones, linear = torch.ones(3, device=CARD), nn.Linear(3, 1, bias=False, device=CARD)
    nn.init.constant_(linear.weight, 2 + RANK)
    print(strategy.setup_module(linear)(ones).item(), flush=True)
    dist.destroy_process_group()
