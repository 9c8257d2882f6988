"""The strategies under which every rank has the whole model: one process, and torch's DDP."""

from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy

from litgpt_moe_ext.training.checkpoint.io import checkpoint_io
from litgpt_moe_ext.training.parallel.behaviour import Behaviour
from litgpt_moe_ext.training.parallel.facts import STRATEGIES
from litgpt_moe_ext.training.settings import DistributedArgs


class SingleProcessStrategy(Behaviour, SingleDeviceStrategy):
    """Training in one process.

    Args:
        accelerator: Device type; of several devices the first is used.
    """

    facts = STRATEGIES["auto"]

    def __init__(self, accelerator: str) -> None:
        device = torch.device("cpu") if accelerator == "cpu" else torch.device(accelerator, 0)
        super().__init__(device, checkpoint_io=checkpoint_io(accelerator))


class ReplicatedStrategy(Behaviour, DDPStrategy):
    """torch's DDP: every rank has all weights, and gradients are averaged while the backward pass goes on.

    Args:
        accelerator: Device type.
        args: The knobs.
    """

    facts = STRATEGIES["ddp"]

    def __init__(self, accelerator: str, args: DistributedArgs) -> None:
        knobs: dict[str, Any] = {
            "bucket_cap_mb": args.bucket_mb,
            "gradient_as_bucket_view": args.gradient_as_bucket_view,
            "find_unused_parameters": args.find_unused_parameters,
        }
        super().__init__(
            checkpoint_io=checkpoint_io(accelerator),
            timeout=timedelta(minutes=args.timeout_minutes),
            **{name: value for name, value in knobs.items() if value is not None},
        )
