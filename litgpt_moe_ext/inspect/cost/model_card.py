"""What a model costs: parameters, arithmetic, memory. Computed from its configuration, before anything is trained."""

from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F

from litgpt_moe_ext.inspect.cost.memory import PRECISIONS, TrainingMemory, inference_memory, training_memory
from litgpt_moe_ext.inspect.cost.sharding import STRATEGIES, block_sizes, process_memory
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.model_size import count_flops, count_parameters
from litgpt_moe_ext.training.callbacks.activation_checkpointing import Mode

INFERENCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelCard:
    """The figures of one model. Memory is in bytes.

    Attributes:
        name: Of the model.
        parameters_total: All parameters.
        parameters_active: Those that work on one token.
        parameters_embedding: Those of the token embedding.
        tie_embeddings: Whether it is the output head as well. Otherwise it is only looked up, without arithmetic.
        sequence_length: Tokens per sequence that the following are for.
        micro_batch_size: Sequences per forward pass in training.
        block_size: Tokens of the longest sequence the model takes.
        optimizer: Its name.
        activation_checkpointing: Setting that `training` and `processes` are for.
        fused_cross_entropy: Setting that `training` and `processes` are for.
        flops_per_token_forward: Floating point operations (two per multiply-add) of a forward pass over a sequence of
            full length, per token; attention included.
        flops_per_token_training: The same of forward and backward pass.
        training: Memory by precision setting: weights, gradients, optimizer, activations, total.
        precision: Precision setting that the next two are for: the recipe's, or float32.
        activations: Memory of the activations in training, by what is done against it: the values of
            `activation_checkpointing`, and "+ fused" with `fused_cross_entropy`.
        processes: Memory of one process by strategy, if there are several: weights, gradients, optimizer,
            communication, activations, total. Empty for a single process.
        devices: Processes on each node.
        num_nodes: Nodes.
        inference: Memory by dtype: weights, kv_cache, activations, total.
        kv_cache_per_token: By dtype.
        checkpoint_weights: Size of a file with the weights alone, by dtype.
        checkpoint_training: Size of a training checkpoint, which holds the optimizer's state, by precision setting.
    """

    name: str
    parameters_total: int
    parameters_active: int
    parameters_embedding: int
    tie_embeddings: bool
    sequence_length: int
    micro_batch_size: int
    block_size: int
    optimizer: str
    activation_checkpointing: str
    fused_cross_entropy: bool
    flops_per_token_forward: float
    flops_per_token_training: float
    training: dict[str, dict[str, int]]
    precision: str
    activations: dict[str, int]
    processes: dict[str, dict[str, int]]
    devices: int
    num_nodes: int
    inference: dict[str, dict[str, int]]
    kv_cache_per_token: dict[str, float]
    checkpoint_weights: dict[str, int]
    checkpoint_training: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def make_card(
    recipe: Recipe, micro_batch_size: int | None = None, devices: int | None = None, num_nodes: int | None = None
) -> ModelCard:
    """Compute the figures of a recipe's model.

    Args:
        recipe: The recipe.
        micro_batch_size: In place of the recipe's, which is 4 where it says nothing (LitGPT's default).
        devices: In place of the recipe's, which is 1 where it says nothing or auto.
        num_nodes: In place of the recipe's, which is 1 where it says nothing.

    Raises:
        ValueError: If settings of the recipe do not go together.
    """
    config, length = recipe.config, recipe.sequence_length
    batch = micro_batch_size or recipe.micro_batch_size
    devices, num_nodes = devices or recipe.devices or 1, num_nodes or recipe.num_nodes
    precision = recipe.precision if recipe.precision in PRECISIONS else "32-true"

    def training_in(name: str, savers: dict[str, Any]) -> TrainingMemory:
        return training_memory(
            config, name, batch, length, recipe.optimizer, tie_embeddings=recipe.tie_embeddings, **savers
        )

    size = count_parameters(config, recipe.tie_embeddings)
    training = {name: training_in(name, recipe.memory_savers) for name in PRECISIONS}
    inference = {name: inference_memory(config, dtype) for name, dtype in INFERENCE_DTYPES.items()}
    sizes = block_sizes(config, PRECISIONS[precision][0].itemsize)
    processes = {name: process_memory(training[precision], *sizes, name, devices, num_nodes) for name in STRATEGIES}
    return ModelCard(
        name=config.name or "model",
        parameters_total=size.total,
        parameters_active=size.active,
        parameters_embedding=config.padded_vocab_size * config.n_embd,
        tie_embeddings=recipe.tie_embeddings,
        sequence_length=length,
        micro_batch_size=batch,
        block_size=config.block_size,
        optimizer=_optimizer_name(recipe.optimizer),
        **recipe.memory_savers,
        flops_per_token_forward=count_flops(config, length, training=False) / length,
        flops_per_token_training=count_flops(config, length, training=True) / length,
        training={name: {**memory._asdict(), "total": memory.total} for name, memory in training.items()},
        precision=precision,
        activations={
            name: training_in(precision, savers).activations for name, savers in _memory_savers(config).items()
        },
        processes={
            name: {**memory._asdict(), "total": memory.total}
            for name, memory in processes.items()
            if devices * num_nodes > 1
        },
        devices=devices,
        num_nodes=num_nodes,
        inference={name: {**memory._asdict(), "total": memory.total} for name, memory in inference.items()},
        kv_cache_per_token={name: memory.kv_cache / config.block_size for name, memory in inference.items()},
        checkpoint_weights={
            name: _state_bytes(config, dtype, recipe.tie_embeddings) for name, dtype in INFERENCE_DTYPES.items()
        },
        checkpoint_training={
            name: _state_bytes(config, PRECISIONS[name][0], recipe.tie_embeddings) + memory.optimizer
            for name, memory in training.items()
        },
    )


def _memory_savers(config: Any) -> dict[str, dict[str, Any]]:
    made = {mode: {"activation_checkpointing": mode} for mode in get_args(Mode)}
    if hasattr(F, "linear_cross_entropy") and config.final_logit_softcapping is None:
        made |= {f"{mode} + fused": {**savers, "fused_cross_entropy": True} for mode, savers in made.items()}
    return made


def _optimizer_name(optimizer: str | dict) -> str:
    path = optimizer if isinstance(optimizer, str) else optimizer.get("class_path", "")
    return path.rpartition(".")[2]


def _state_bytes(config: Any, dtype: torch.dtype, tie_embeddings: bool) -> int:
    from litgpt.model import GPT

    with torch.device("meta"):
        model = GPT(config).to(dtype)
    state = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    # A table with two names is written once.
    table = model.lm_head.weight
    return state - tie_embeddings * table.numel() * table.itemsize
