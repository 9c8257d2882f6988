"""The cost of a model (parameters, arithmetic, memory), computed from its configuration before training."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.inspect.cost.layers import ShortModel, shorten
from litgpt_moe_ext.inspect.cost.memory import (
    PRECISIONS,
    InferenceMemory,
    Step,
    TrainingMemory,
    average_bytes,
    fusing_choices,
    inference_memory,
    training_memory,
)
from litgpt_moe_ext.inspect.cost.sharding import STRATEGIES, ProcessMemory, block_sizes, process_memory
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.kernels.launch import triton_installed
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.model_size import count_flops_of_passes, count_parameters
from litgpt_moe_ext.recipe_files import class_path_of
from litgpt_moe_ext.training.callbacks.activation_checkpointing import Mode

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

INFERENCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Whether the device is a GPU, which computes all experts at once.
INFERENCE_DEVICES = {"CPU": False, "GPU": True}


@dataclass(frozen=True)
class ModelCard:
    """The cost of a model. Memory is in bytes.

    Attributes:
        name: Name of the model.
        parameters_total: Number of parameters.
        parameters_active: Number of parameters active for one token.
        parameters_embedding: Number of parameters of the token embedding.
        tie_embeddings: Whether the token embedding is also the output head; otherwise it is only looked up, without
            arithmetic.
        sequence_length: Tokens of a training sequence.
        micro_batch_size: Sequences per forward pass in training.
        block_size: Maximum tokens of a sequence.
        optimizer: Name of the optimizer.
        activation_checkpointing: Setting assumed by `training` and `processes`.
        fused_cross_entropy: Setting assumed by `training` and `processes`.
        kernel_loss: Whether `training`, `activations` and `processes` assume the loss kernel for GPUs with Triton,
            which, unlike LitGPT's loss, makes no copy of the logits.
        flops_per_token_forward: Floating point operations (two per multiply-add) of a forward pass over a training
            sequence, per token; attention included.
        flops_per_token_training: Floating point operations of forward and backward pass, per token.
        training: Memory by precision setting: weights, gradients, optimizer, activations, total.
        precision: Precision setting assumed by `activations` and `processes`: the recipe's, or float32.
        activations: Memory of the activations in training by `activation_checkpointing`, with " + fused" appended for
            `fused_cross_entropy`.
        processes: Memory of one rank by strategy: weights, gradients, optimizer, communication, activations, total.
            Empty for a single process.
        devices: Processes on each node.
        num_nodes: Number of nodes.
        inference: Memory by dtype and device (`INFERENCE_DEVICES`): weights, kv_cache, activations, total.
        kv_cache_per_token: Memory of the cache per token, by dtype.
        checkpoint_weights: Size of a file with only the weights, by dtype.
        checkpoint_training: Size of a training checkpoint, including the optimizer's state and a moving average of the
            weights, if any, by precision setting.
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
    kernel_loss: bool
    flops_per_token_forward: float
    flops_per_token_training: float
    training: dict[str, dict[str, int]]
    precision: str
    activations: dict[str, int]
    processes: dict[str, dict[str, int]]
    devices: int
    num_nodes: int
    inference: dict[str, dict[str, dict[str, int]]]
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
        micro_batch_size: Sequences per forward pass. Default: as in the recipe, or 4, LitGPT's default.
        devices: Processes on each node. Default: as in the recipe, or 1.
        num_nodes: Number of nodes. Default: as in the recipe, or 1.

    Raises:
        SettingsError: If the recipe's settings do not go together.
    """
    config, settings, length = recipe.config, recipe.settings, recipe.sequence_length
    devices, num_nodes = devices or recipe.devices or 1, num_nodes or settings.num_nodes
    precision = settings.precision if settings.precision in PRECISIONS else "32-true"
    micro_batch_size = micro_batch_size or settings.train.micro_batch_size
    step = replace(recipe.step(precision), micro_batch_size=micro_batch_size, kernel_loss=triton_installed())
    short = shorten(config)
    memory_of = _training_memory(short)
    size = count_parameters(config, recipe.tie_embeddings)
    training = {name: memory_of(replace(step, precision=name)) for name in PRECISIONS}
    inference = {
        name: {device: inference_memory(short, dtype, on_gpu) for device, on_gpu in INFERENCE_DEVICES.items()}
        for name, dtype in INFERENCE_DTYPES.items()
    }
    sizes = block_sizes(short, PRECISIONS[precision][0].itemsize)
    processes = {name: process_memory(training[precision], sizes, name, devices, num_nodes) for name in STRATEGIES}
    state_bytes = functools.cache(partial(_state_bytes, short, tie_embeddings=recipe.tie_embeddings))
    averages = short.total(meta_model(short.config), average_bytes) if recipe.averages else 0
    forward, both = short.extrapolate_each(partial(count_flops_of_passes, length=length))
    return ModelCard(
        name=config.name or "model",
        parameters_total=size.total,
        parameters_active=size.active,
        parameters_embedding=(config.padded_vocab_size or 0) * config.n_embd,
        tie_embeddings=recipe.tie_embeddings,
        sequence_length=length,
        micro_batch_size=step.micro_batch_size,
        kernel_loss=step.kernel_loss,
        block_size=config.block_size,
        optimizer=str(class_path_of(settings.optimizer)).rpartition(".")[2],
        activation_checkpointing=step.activation_checkpointing,
        fused_cross_entropy=step.fused_cross_entropy,
        flops_per_token_forward=forward / length,
        flops_per_token_training=both / length,
        training={name: _parts(memory) for name, memory in training.items()},
        precision=precision,
        activations={
            name: memory_of(replace(step, **savers)).activations for name, savers in _memory_savers(config).items()
        },
        processes={name: _parts(memory) for name, memory in processes.items() if devices * num_nodes > 1},
        devices=devices,
        num_nodes=num_nodes,
        inference={
            name: {device: _parts(memory) for device, memory in memories.items()}
            for name, memories in inference.items()
        },
        kv_cache_per_token={name: memories["CPU"].kv_cache / config.block_size for name, memories in inference.items()},
        checkpoint_weights={name: state_bytes(dtype) for name, dtype in INFERENCE_DTYPES.items()},
        checkpoint_training={
            name: state_bytes(PRECISIONS[name][0]) + memory.optimizer + averages for name, memory in training.items()
        },
    )


def _parts(memory: TrainingMemory | InferenceMemory | ProcessMemory) -> dict[str, int]:
    return {**memory._asdict(), "total": memory.total}


def _training_memory(short: ShortModel) -> Callable[[Step], TrainingMemory]:
    # Measure each step once. Both 16-bit formats take the same memory.
    known: dict[Step, TrainingMemory] = {}

    def memory_of(step: Step) -> TrainingMemory:
        if step.precision == "16-mixed":
            step = replace(step, precision="bf16-mixed")
        key = replace(step, optimizer=str(step.optimizer))
        if key not in known:
            known[key] = training_memory(short, step)
        return known[key]

    return memory_of


def _memory_savers(config: "Config") -> dict[str, dict[str, Any]]:
    return {
        f"{mode}{' + fused' if fuses else ''}": {"activation_checkpointing": mode, "fused_cross_entropy": fuses}
        for fuses in fusing_choices(config)
        for mode in get_args(Mode)
    }


def _state_bytes(short: ShortModel, dtype: torch.dtype, tie_embeddings: bool) -> int:
    def size(module: nn.Module) -> int:
        return sum(tensor.nbytes for tensor in module.state_dict().values())

    with without_compiler():
        model = meta_model(short.config).to(dtype)
    # A tied table is written only once.
    return short.total(model, size) - tie_embeddings * model.lm_head.weight.nbytes
