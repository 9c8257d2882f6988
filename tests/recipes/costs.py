"""What a recipe costs, computed from its settings: the figures that stand in its header.

    uv run python -m tests.recipes.costs configs/code-moe-60m.yaml [SETTINGS AS FOR run_train.py]

Memory is that of one process. Weights, gradients and AdamW's two moments take 16 bytes a parameter in float32, and
mixed precision adds copies of 2 bytes; bf16-true takes 8. What a layer keeps for the backward pass is counted, not
guessed: two small models of the recipe's width run forward on a CPU and their saved tensors are added up. The output
head keeps the logits, whose place their gradient takes: 2 bytes per token and entry of the vocabulary, 4 in float32, or
nothing where it is fused with the loss. Fragmentation and the libraries' own memory come on top.

Work is 6 FLOP per token and active parameter that multiplies (a table of embeddings does not), and 6 * n_layer * T * C
for attention to T / 2 earlier tokens on average.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from litgpt_moe_ext.model_size import ModelSize, count_parameters
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from tests.models import initialized_model
from tests.recipes.files import values_of

A100_FLOPS = 312e12
UTILISATION = 0.3


class Costs(NamedTuple):
    """Figures of a recipe.

    Attributes:
        state_bytes: Weights, gradients, moments, low precision copies.
        activation_bytes: What one micro batch keeps for the backward pass.
        flops_per_token: Forward and backward.
        tokens: Of the whole training.
    """

    state_bytes: int
    activation_bytes: int
    flops_per_token: int
    tokens: int

    @property
    def gigabytes(self) -> float:
        """Memory of a process, in GB (1e9 bytes)."""
        return (self.state_bytes + self.activation_bytes) / 1e9

    def memory_line(self) -> str:
        """Return what a header says about memory."""
        return (
            f"Memory of a GPU: {self.gigabytes:.1f} GB ({self.state_bytes / 1e9:.1f} of weights, gradients and "
            f"optimizer, {self.activation_bytes / 1e9:.1f} of activations)."
        )

    def time_line(self) -> str:
        """Return what a header says about time."""
        hours = self.flops_per_token * self.tokens / (A100_FLOPS * UTILISATION) / 3600
        work = f"{self.flops_per_token / 1e9:.2f} GFLOP a token, {self.flops_per_token * self.tokens:.1e} FLOP in all"
        return f"Time: {hours:.1f} hours on an A100 ({work})."


def parameters_line(size: ModelSize) -> str:
    """Return what a header says about parameters."""
    if size.total == size.active:
        return f"Parameters: {size.total:,}, all of them active for every token."
    return f"Parameters: {size.total:,}, of which {size.active:,} are active for a token."


def size_of(values: dict[str, Any]) -> ModelSize:
    """Count the parameters of a recipe's model."""
    return count_parameters(values["model_config"], bool(values["train"].tie_embeddings))


def flops_per_token(values: dict[str, Any]) -> int:
    """Return the work of forward and backward pass on one token."""
    config, train = values["model_config"], values["train"]
    # A tied table multiplies as the head; rows that are only looked up do not.
    looked_up = 0 if train.tie_embeddings else config.padded_vocab_size * config.n_embd
    if config.position_embedding is not None:
        looked_up += config.block_size * config.n_embd
    length = train.max_seq_length or config.block_size
    return 6 * (size_of(values).active - looked_up) + 6 * config.n_layer * length * config.n_embd


def costs(values: dict[str, Any]) -> Costs:
    """Compute the figures of a recipe from the parser's values; runs small models, which takes seconds."""
    config, train, mode = values["model_config"], values["train"], values["activation_checkpointing"]
    layers = config.n_layer * kept_per_token(config, mode)
    if mode != "none":  # what one layer computes again is there while its gradients are computed
        layers += kept_per_token(config, "none")
    # The gradient of the logits takes their place.
    logit = 4 if values["precision"] == "32-true" else 2
    head = 0 if values["fused_cross_entropy"] else logit * config.padded_vocab_size
    activations = train.micro_batch_size * (train.max_seq_length or config.block_size) * (layers + head)
    bytes_per_parameter = {"bf16-true": 8, "32-true": 16}.get(values["precision"], 18)
    state = size_of(values).total * bytes_per_parameter
    return Costs(state, activations, flops_per_token(values), train.max_tokens)


def kept_per_token(config: Any, mode: str, length: int = 256) -> int:
    """Return the bytes that one layer keeps per token for the backward pass under bf16 autocast.

    Args:
        config: Model whose layer is meant.
        mode: Activation checkpointing: `none`, `selective` or `full`.
        length: Tokens, and twice as many, that are run to tell what grows with them from copies of weights.
    """
    one, two = ([_kept(config, mode, layers, n) for n in (length, 2 * length)] for layers in (1, 2))
    return ((two[1] - two[0]) - (one[1] - one[0])) // length


def _kept(config: Any, mode: str, layers: int, length: int) -> int:
    small = replace(config, n_layer=layers, vocab_size=64, padded_vocab_size=64)
    torch.manual_seed(0)
    model = initialized_model(small)  # which experts tokens choose decides how many rows are padded
    if mode != "none":
        ActivationCheckpointing(mode).on_before_setup(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (1, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
    del logits
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


if __name__ == "__main__":
    values = values_of(Path(sys.argv[1]).stem, *sys.argv[2:])
    found = costs(values)
    print(parameters_line(size_of(values)), found.memory_line(), found.time_line(), sep="\n")
