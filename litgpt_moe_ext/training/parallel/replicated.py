"""torch's DDP, also for passes that it does not see.

DDP exchanges gradients when the autograd nodes that accumulate them run. A CUDA graph writes gradients without these
nodes, so they are run after it with nothing to add: DDP then exchanges the gradients that the parameters have. Buckets,
their order and all knobs are those of an ordinary pass, so ranks may even differ in how they compute theirs.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from litgpt_moe_ext.training.checkpoint.io import checkpoint_io
from litgpt_moe_ext.training.parallel.behaviour import Behaviour
from litgpt_moe_ext.training.parallel.facts import STRATEGIES
from litgpt_moe_ext.training.settings import DistributedArgs


class ReplicatedStrategy(Behaviour, DDPStrategy):
    """torch's DDP: every rank has all weights, and gradients are averaged while the backward pass goes on.

    Args:
        accelerator: Device type.
        args: The knobs.
    """

    facts = STRATEGIES["ddp"]

    def __init__(self, accelerator: str, args: DistributedArgs) -> None:
        super().__init__(
            checkpoint_io=checkpoint_io(accelerator),
            timeout=timedelta(minutes=args.timeout_minutes),
        )
        knobs: dict[str, Any] = {
            "bucket_cap_mb": args.bucket_mb,
            "gradient_as_bucket_view": args.gradient_as_bucket_view,
            "find_unused_parameters": args.find_unused_parameters,
        }
        self._knobs = {name: value for name, value in knobs.items() if value is not None}
        self._replica: DistributedDataParallel
        self._exchanged: list[nn.Parameter]
        self._stream: torch.cuda.Stream | None = None

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Return the module in DDP."""
        # On a side stream, as Lightning does it, so that passes can be captured. The nodes that accumulate gradients,
        # and DDP's hooks with them, run there. It is kept because it has to wait for gradients that graphs write.
        device = self.root_device
        if device.type != "cuda":
            self._replica = DistributedDataParallel(module, **self._knobs)
        else:
            usual, self._stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            # It sends the weights of the first process to the others, which may still be being drawn.
            self._stream.wait_stream(usual)
            with torch.cuda.stream(self._stream):
                self._replica = DistributedDataParallel(module, device_ids=[device.index], **self._knobs)
            usual.wait_stream(self._stream)
        self._exchanged = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return self._replica

    def in_place_of_forward(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return what a function returns; see `Behaviour`."""
        module = self._replica.module
        before = vars(module).get("forward")

        def once(*given: Tensor) -> Tensor:
            restore()
            return function(*given)

        def restore() -> None:
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before

        module.forward = once
        try:
            return self._replica(*inputs)
        finally:
            restore()

    def exchange_gradients(self) -> None:
        """Exchange gradients that are there; see `Behaviour`."""
        if not self._replica.require_backward_grad_sync:
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.enable_grad():
            _NothingToAdd.apply(torch.zeros((), requires_grad=True), *self._exchanged).backward()


class _NothingToAdd(torch.autograd.Function):
    """Has no gradient for its inputs, but lets their nodes run."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inputs = 1 + len(parameters)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.inputs
