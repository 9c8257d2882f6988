"""A model's parameters, those that are active for one token, and its FLOPs."""

from typing import Any, NamedTuple


class ModelSize(NamedTuple):
    """Number of parameters.

    Attributes:
        total: All parameters.
        active: Those used for one token: all but the experts that it does not visit.
    """

    total: int
    active: int


def count_parameters(config: Any, tie_embeddings: bool = False) -> ModelSize:
    """Count the parameters of the model that a `litgpt.Config` describes, without allocating them.

    Args:
        config: The configuration.
        tie_embeddings: Whether output head and token embeddings are one table (`train.tie_embeddings`).
    """
    from litgpt.model import LLaMAMoE

    from litgpt_moe_ext.meta.models import meta_model
    from litgpt_moe_ext.moe.layer import MoE

    model = meta_model(config, tie_embeddings)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, (MoE, LLaMAMoE))
        for parameter in module.experts.parameters()
    )
    idle = 0 if routed == 0 else routed * (config.n_expert - config.n_expert_per_token) // config.n_expert
    return ModelSize(total, total - idle)


def count_flops(config: Any, length: int, training: bool) -> int:
    """Return the floating point operations of one sequence, counted by torch on tensors without memory.

    Only matrix products count, two per multiply-add: of experts only those that a token visits, and of attention as if
    every token saw all `length` positions (the half that a causal mask hides is included).

    Args:
        config: A `litgpt.Config`.
        length: Tokens of the sequence.
        training: Whether to count the backward pass as well.
    """
    forward, both = count_flops_of_passes(config, length, backward=training)
    return both if training else forward


def count_flops_of_passes(config: Any, length: int, backward: bool = True) -> tuple[int, int]:
    """Return the same for the forward pass, and for both passes together.

    Args:
        config: A `litgpt.Config`.
        length: Tokens of the sequence.
        backward: Whether to count the backward pass; without it, both numbers are those of the forward pass.
    """
    import torch
    import torch.nn.functional as F

    from litgpt_moe_ext.host.without_compiler import without_compiler
    from litgpt_moe_ext.meta.flop_counter import FlopCounter
    from litgpt_moe_ext.meta.models import META, meta_model

    model = meta_model(config)
    ids = torch.zeros(1, length + 1, dtype=torch.int64, device=META)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with without_compiler(), FlopCounter() as counter:
        logits = model(inputs)
        forward = counter.total
        if backward:
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return forward, counter.total
