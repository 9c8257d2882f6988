"""How many parameters a model has, and how many of them work on one token."""

from typing import Any, NamedTuple


class ModelSize(NamedTuple):
    """Number of parameters.

    Attributes:
        total: All of them.
        active: Those that take part in computing one token: all but the experts it does not visit.
    """

    total: int
    active: int


def count_parameters(config: Any, tie_embeddings: bool = False) -> ModelSize:
    """Count the parameters of the model that a `litgpt.Config` describes, without allocating any.

    Args:
        config: The configuration.
        tie_embeddings: Whether output head and token embeddings are one table (`train.tie_embeddings`).
    """
    import torch
    from litgpt.model import GPT, LLaMAMoE

    from litgpt_moe_ext.moe.layer import MoE

    with torch.device("meta"):
        model = GPT(config)
    if tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight  # `parameters` lists it once
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, (MoE, LLaMAMoE))
        for parameter in module.experts.parameters()
    )
    idle = 0 if routed == 0 else routed * (config.n_expert - config.n_expert_per_token) // config.n_expert
    return ModelSize(total, total - idle)
