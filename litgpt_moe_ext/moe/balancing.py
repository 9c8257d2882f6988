"""Counting tokens per expert, and the auxiliary-loss-free bias that balances them.

The balancing rule is that of Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"
(arXiv:2408.15664, algorithm 1), as used by DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): after every optimizer step
the bias of an expert that received more tokens than the mean falls by a fixed rate, and that of one that received
fewer rises. The bias enters the choice of experts only, never the gate values, so no gradient is disturbed.

Counting is done by the backward pass. Each router owns a leaf tensor that takes part in no computation; an autograd
function returns the token counts of the batch as the "gradient" of that leaf. Autograd then gives, for nothing, what
a counter in the forward pass has to be taught: a batch counts once however often activation checkpointing runs the
forward pass again, evaluation does not count, gradient accumulation adds up, and `torch.compile` sees a pure
function. The leaf is neither a parameter nor a buffer, so no optimizer, gradient clipping, precision conversion or
distributed wrapper touches it.

The bias moves in torch's global optimizer-step hook, which works in any training loop.

Shape legend: T tokens, K chosen experts per token, E experts, L layers.
"""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from litgpt_moe_ext.moe.auxiliary import forget_scale


class _CountInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights_TK: Tensor, leaf_E: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        ctx.leaf_dtype = leaf_E.dtype
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx, grad_TK: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts_E,) = ctx.saved_tensors
        return grad_TK, counts_E.to(ctx.leaf_dtype), None


class TokenCounter:
    """Counts, per expert, the tokens of all batches since the counts were last taken.

    Args:
        n_expert: Number of experts E.
    """

    def __init__(self, n_expert: int) -> None:
        self._leaf_E = _new_leaf(n_expert, None)

    def attach(self, weights_TK: Tensor, counts_E: Tensor) -> Tensor:
        """Return `weights_TK` unchanged; the backward pass through it adds `counts_E` to the counter.

        Args:
            weights_TK: Gate values, any floating dtype, part of the autograd graph of the loss.
            counts_E: Tokens routed to each expert in this batch, int64.
        """
        return _CountInBackward.apply(weights_TK, self._leaf_E, counts_E)

    @property
    def pending(self) -> bool:
        """Whether a backward pass has added counts that were not taken yet. Does not synchronise."""
        return self._leaf_E.grad is not None

    def take(self) -> Tensor:
        """Return the counts, (E,) in float64 (float32 on devices without it), and start again from zero."""
        counts_E = self._leaf_E.grad
        self._leaf_E.grad = None
        return torch.zeros_like(self._leaf_E.detach()) if counts_E is None else counts_E

    def to(self, device: torch.device) -> None:
        """Move to `device`, dropping counts that were not taken."""
        if self._leaf_E.device != device:
            self._leaf_E = _new_leaf(self._leaf_E.numel(), device)


def _new_leaf(n_expert: int, device: torch.device | None) -> Tensor:
    # float64 holds every integer up to 2**53; float32 only up to 2**24, which a large batch can exceed.
    device = torch.get_default_device() if device is None else device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(n_expert, dtype=dtype, device=device, requires_grad=True)


def updated_bias(bias_LE: Tensor, counts_LE: Tensor, rate: float) -> Tensor:
    """Return the balancing bias after one optimizer step (arXiv:2408.15664, algorithm 1), centred.

    `bias + rate * sign(mean(counts) - counts)`, minus its mean: only differences between experts matter for the choice,
    and a centred bias cannot drift away as a whole.

    Args:
        bias_LE: Bias before the step, float32, last dimension over experts.
        counts_LE: Tokens per expert during the step, summed over accumulation and all processes; any dtype, same shape.
        rate: Step size; 0.001 in the paper.
    """
    error_LE = counts_LE.mean(dim=-1, keepdim=True) - counts_LE
    bias_LE = bias_LE + rate * error_LE.sign().to(bias_LE.dtype)
    return bias_LE - bias_LE.mean(dim=-1, keepdim=True)


# Weak references in the order of construction, which is the same on every process; the order matters because the
# counts of all routers travel in one all-reduce.
_routers: list[weakref.ref] = []
_warned_unowned: weakref.WeakSet = weakref.WeakSet()


def watch(router: torch.nn.Module) -> None:
    """Let the optimizer hook look after `router` (a `litgpt_moe_ext.moe.routers.Router`) while it lives."""
    _routers[:] = [reference for reference in _routers if reference() is not None]
    _routers.append(weakref.ref(router))


def any_router_lives() -> bool:
    """Whether the process has a model with one of the plugin's routers."""
    return any(reference() is not None for reference in _routers)


def install_optimizer_hook() -> None:
    """Update router biases after every step of any optimizer, in any training loop. Called once, at registration."""
    register_optimizer_step_post_hook(_after_optimizer_step)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    forget_scale()
    pending = [router for reference in _routers if (router := reference()) is not None and router.counter.pending]
    if not pending:
        return
    # Two models, or two optimizers on one model, may step at different times: a router follows the optimizer that owns
    # its gate.
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = [router for router in pending if id(router.weight) in owned]
    if mine:
        update_routers(mine)
    else:
        _warn_unowned(pending, optimizer)


def _warn_unowned(routers: list[torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    new = [router for router in routers if router.load_E is None and router not in _warned_unowned]
    if new:
        _warned_unowned.update(new)
        warnings.warn(
            f"{len(new)} MoE routers were trained on tokens, but {type(optimizer).__name__} does not hold their "
            "weights: their balancing bias does not move. If another optimizer holds them, or they are frozen on "
            "purpose, all is well; otherwise call litgpt_moe_ext.moe.balancing.update_routers after each step.",
            RuntimeWarning,
            stacklevel=3,
        )


@torch.no_grad()
def update_routers(routers: Iterable[torch.nn.Module]) -> None:
    """Take the counts of `routers`, sum them over all processes in one all-reduce, and move their balancing biases.

    After it `router.load_E` holds the tokens per expert of the step. Nothing here waits for the device.

    Args:
        routers: Routers of one model, in the same order on every process.
    """
    routers = list(routers)
    counts = torch.cat([router.counter.take() for router in routers])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    by_settings = defaultdict(list)
    for router, load_E in zip(routers, counts.split([router.n_expert for router in routers]), strict=True):
        router.load_E = load_E
        if router.bias_update_rate:
            by_settings[router.n_expert, router.bias_update_rate].append(router)
    for (_, rate), group in by_settings.items():
        biases = [router.e_score_correction_bias for router in group]
        loads_LE = torch.stack([router.load_E for router in group])
        torch._foreach_copy_(biases, list(updated_bias(torch.stack(biases), loads_LE, rate)))
