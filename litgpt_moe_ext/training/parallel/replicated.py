"""torch's DDP, extended to passes that bypass autograd.

DDP exchanges gradients when autograd's accumulation nodes run. A CUDA graph writes gradients without these nodes, so
they are run afterwards with nothing to add: DDP then exchanges the existing gradients. Buckets, their order and all
options are those of an ordinary pass, so some ranks may use graphs and others not.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from litgpt_moe_ext.training.checkpoint.io import DirectCheckpointIO
from litgpt_moe_ext.training.parallel.behaviour import Behaviour
from litgpt_moe_ext.training.parallel.facts import STRATEGIES
from litgpt_moe_ext.training.settings import DistributedArgs


class ReplicatedStrategy(Behaviour, DDPStrategy):
    """torch's DDP: every rank has all weights, and gradients are averaged while the backward pass goes on.

    Args:
        accelerator: Device type.
        args: The options.
    """

    facts = STRATEGIES["ddp"]

    def __init__(self, accelerator: str, args: DistributedArgs) -> None:
        super().__init__(
            checkpoint_io=DirectCheckpointIO(mmap=accelerator != "cpu"),
            timeout=timedelta(minutes=args.timeout_minutes),
        )
        options: dict[str, Any] = {
            "bucket_cap_mb": args.bucket_mb,
            "gradient_as_bucket_view": args.gradient_as_bucket_view,
            "find_unused_parameters": args.find_unused_parameters,
        }
        self._options = {name: value for name, value in options.items() if value is not None}
        self._replica: DistributedDataParallel
        self._exchanged: list[nn.Parameter]
        self._stream: torch.cuda.Stream | None = None

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Return the module in DDP."""
        # On a side stream, as in Lightning, so that passes can be captured: gradient accumulation and DDP's hooks run
        # there. The stream is kept because it must wait for gradients that graphs write.
        device = self.root_device
        if device.type != "cuda":
            self._replica = DistributedDataParallel(module, **self._options)
        else:
            usual, self._stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            # DDP broadcasts the first process's weights, whose initialisation may still be running.
            self._stream.wait_stream(usual)
            with torch.cuda.stream(self._stream):
                self._replica = DistributedDataParallel(module, device_ids=[device.index], **self._options)
            usual.wait_stream(self._stream)
        self._exchanged = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return self._replica

    def in_place_of_forward(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """See `Behaviour.in_place_of_forward`."""
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
        """See `Behaviour.exchange_gradients`."""
        if not self._replica.require_backward_grad_sync:
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.enable_grad():
            _NothingToAdd.apply(torch.zeros((), requires_grad=True), *self._exchanged).backward()


class _NothingToAdd(torch.autograd.Function):
    """Runs the accumulation nodes of its inputs with no gradient to add."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inputs = 1 + len(parameters)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.inputs
