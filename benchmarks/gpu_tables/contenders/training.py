"""A model in training."""

from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from gpu_tables.measuring.bench import Bench
from litgpt_moe_ext.moe.balancing.gradient_injection import remember_scale
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from litgpt_moe_ext.training.optim.gpu_step import GpuStep
from litgpt_moe_ext.training.steps.graphs.capture import Loss
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, run_now
from litgpt_moe_ext.training.steps.graphs.graphed_loss import GraphedLoss, GraphOptions
from litgpt_moe_ext.training.steps.handover import loss_of_logits


def _litgpts_loss(logits: Tensor, targets: Tensor) -> Tensor:
    # Marked, as training marks its loss: routers need not ask what a loss nobody scales is scaled by.
    return remember_scale(chunked_cross_entropy(logits, targets, chunk_size=0))


# That of training, which has the kernel where it works. Nothing here converts logits for LitGPT's.
_cross_entropy = loss_of_logits(_litgpts_loss, Precision())


class Trainee:
    """A model in training, one optimizer step at a time.

    Args:
        settings: Fields of its configuration.
        bench: Where.
        batches: Token ids of the micro-batches of a step, (A, B, T + 1).
        how: eager, compiled, graphs, "graphs, unshared", whose micro-batches share nothing of the experts' weights,
            "graphs, one stream", in which no parts of layers run side by side, "graphs, passes only", which leave out
            clipping and the optimizer, or with activations of experts and MLPs computed again: recomputed,
            "graphs, recomputed".
    """

    def __init__(self, settings: dict[str, Any], bench: Bench, batches: Tensor, how: str = "eager") -> None:
        torch.manual_seed(0)
        self.config, self.batches = Config(**settings), batches
        with bench.device:
            model = GPT(self.config)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if how.endswith("recomputed"):
            ActivationCheckpointing("selective").on_before_setup(model)
        self.autocast = partial(torch.autocast, bench.device.type, bench.dtype)
        if how == "compiled":
            # Otherwise the compiler would assume that the next recipe's sizes change from step to step.
            torch._dynamo.reset()
        self.model = torch.compile(model) if how == "compiled" else model
        self.loss, self.run_task, self.validated = self.plain_loss, run_now, None
        graphs = how.startswith("graphs") and bench.is_cuda
        if graphs:
            options = GraphOptions(True, sharing=how != "graphs, unshared", abreast=how != "graphs, one stream")
            self.loss = GraphedLoss(self.plain_loss, model, partial(_note_if_off, bench), options)
            self.validated = self.loss.validated
            if how != "graphs, passes only":
                self.run_task = self.loss.run_task
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        GpuStep(self.optimizer, self.run_task).install()
        # The optimizer's, as Fabric takes: to look for those of a model takes the host longer the more modules it has.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.clipping = GradientTask("clipping", partial(nn.utils.clip_grad_norm_, parameters, 1.0), tuple)

        # The first steps run as they are, then passes are captured, and in the next step what follows them.
        for _ in range(4 if graphs else 0):
            self.step()

    def plain_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with self.autocast():
            return _cross_entropy(self.model(ids), targets)

    @torch.no_grad()
    def validate(self, loss: Loss) -> None:
        """Compute a loss of the first micro-batch, with the model in evaluation mode."""
        loss(self.batches[0, :, :-1], self.batches[0, :, 1:].contiguous())

    def step(self) -> None:
        for batch in self.batches:
            (self.loss(batch[:, :-1], batch[:, 1:].contiguous()) / len(self.batches)).backward()
        self.run_task(self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _note_if_off(bench: Bench, text: str) -> None:
    """Note that CUDA graphs were not used, or not for everything."""
    if ": off" in text or ": not for" in text:
        bench.note(text)
