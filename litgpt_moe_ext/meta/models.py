"""Models on torch's meta device, which have shapes and no memory."""

from typing import TYPE_CHECKING, Any

import torch

from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.meta.registrations import asking_again

if TYPE_CHECKING:
    from litgpt.model import GPT

META = torch.device("meta")


def meta_model(config: Any, tie_embeddings: bool = False) -> "GPT":
    """Return the model of a `litgpt.Config` on the meta device.

    Args:
        config: The configuration.
        tie_embeddings: Whether output head and token embeddings are one parameter, which `parameters` yields once.
    """
    from litgpt.model import GPT

    with without_compiler(), META:
        model = asking_again(GPT, config)
    if tie_embeddings:
        model.lm_head.weight = model.get_submodule("transformer.wte").get_parameter("weight")
    return model
