"""Trains under DeepSpeed without GPUs: `python -m tests.training.parallel.deepspeed_on_cpus RUNS`.

DeepSpeed itself runs on CPUs, with processes over gloo; only Fabric's strategy and our check of recipes insist on CUDA
devices. Both checks are lifted here. torch, LitGPT and DeepSpeed are imported once; every process of every run is a
fork.

Args (one, as JSON):
    RUNS: A list of `[number of processes, exit status, [argument of run_train.py, ...]]`, done one after the other.
"""

import dataclasses
import importlib
import json
import os
import sys
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from litgpt_moe_ext.training.callback import Callback
from tests.training.processes import free_port


class NotFinite(Callback):
    """Make the gradients of the second step NaN on the last process."""

    def __init__(self) -> None:
        self._now = False

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Look at what goes back from the output head."""
        if fabric.global_rank == fabric.world_size - 1:
            module.module.lm_head.register_forward_hook(self._spoil)

    def _spoil(self, head: nn.Module, given: Any, logits: Tensor) -> Tensor:
        if self._now and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Know which step it is."""
        self._now = state["step_count"] == 1


def allow_cpus() -> None:
    """Let DeepSpeed train on CPUs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from lightning.fabric.strategies import Strategy
    from lightning.fabric.strategies import deepspeed as fabrics

    from litgpt_moe_ext.training.parallel import facts
    from litgpt_moe_ext.training.parallel.deepspeed.strategy import ZeroStrategy

    for name, row in facts.STRATEGIES.items():
        facts.STRATEGIES[name] = dataclasses.replace(row, cuda_only=False)
    fabrics._validate_device_index_selection = lambda devices: None
    # Its shared-memory reduction would be compiled first. (As an attribute, `deepspeed.comm.torch` is torch.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

    def setup_environment(strategy: ZeroStrategy) -> None:
        Strategy.setup_environment(strategy)
        strategy._setup_distributed()

    ZeroStrategy.setup_environment = setup_environment
    initialize = deepspeed.initialize

    def initialize_on_cpu(args: Any, **options: Any) -> Any:
        args.device_rank = int(os.environ["LOCAL_RANK"])  # CPUs have no index
        return initialize(args=args, **options)

    deepspeed.initialize = initialize_on_cpu


def run(processes: int, status: int, arguments: list[str]) -> None:
    """Train in forked processes; raises RuntimeError unless all of them end with `status`."""
    port, children = free_port(), []
    for rank in range(processes):
        if not (pid := os.fork()):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in {**place, **where}.items()})
            os._exit(_train(arguments))
        children.append(pid)
    found = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if found != [status] * processes:
        raise RuntimeError(f"exit status {found} instead of {status}: {arguments}")


def _train(arguments: list[str]) -> int:
    from litgpt_moe_ext.cli.train import main

    try:
        return main(arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    allow_cpus()
    import litgpt_moe_ext.training.run  # noqa: F401  (before the forks)

    for processes, status, arguments in json.loads(sys.argv[1]):
        run(processes, status, arguments)
