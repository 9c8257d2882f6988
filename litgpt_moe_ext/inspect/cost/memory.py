"""The memory of training and inference, measured by running the model on tensors without content.

Such tensors have shapes and dtypes, obey autograd and autocast, and allocate nothing. The sizes of live tensors are
added up, which gives the peak of an allocator without waste. Of many equal layers, only two are run
(`litgpt_moe_ext.inspect.cost.layers`).
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_moe_ext.attention.kernels.own import EAGER
from litgpt_moe_ext.inspect.cost.experts import without_values
from litgpt_moe_ext.inspect.cost.layers import ShortModel
from litgpt_moe_ext.inspect.cost.optimizer_state import state_of_modules, state_ratio
from litgpt_moe_ext.inspect.cost.peak import PeakOverLayers
from litgpt_moe_ext.inspect.cost.recompute import recomputed
from litgpt_moe_ext.inspect.cost.weightless import WeightlessMemory, weightless
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing, Mode
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss, require_torch

if TYPE_CHECKING:
    from litgpt.model import GPT

    from litgpt_moe_ext.config.types import Config

# By precision setting of training: dtype of the parameters, and dtype of autocast, if any.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}


class TrainingMemory(NamedTuple):
    """Bytes during a training step.

    Attributes:
        weights: Parameters and buffers, and their moving average, if any.
        gradients: Gradients of all parameters.
        optimizer: State of the optimizer.
        activations: Additional memory of a micro-batch at the peak of its forward and backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)


class InferenceMemory(NamedTuple):
    """Bytes for one sequence.

    Attributes:
        weights: Parameters and buffers.
        kv_cache: Keys and values of a sequence of full length.
        activations: Additional memory at the peak of reading a prompt of full length: on a CPU for evenly loaded
            experts, on a GPU for any load; with LitGPT's own attention including a square mask.
    """

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)


@dataclass(frozen=True)
class Step:
    """A training step, by the names of its settings in a recipe.

    Attributes:
        precision: One of `PRECISIONS`.
        micro_batch_size: Sequences in one forward pass.
        sequence_length: Tokens per sequence.
        optimizer: Name of the optimizer, or its `class_path` and `init_args`.
        activation_checkpointing: As in a recipe.
        fused_cross_entropy: As in a recipe.
        tie_embeddings: As `train.tie_embeddings`.
        averages: Whether there is a moving average of the weights (`ema.decay`).
        kernel_loss: Whether the loss is the kernel for GPUs with Triton, which makes no copy of the logits.
    """

    precision: str
    micro_batch_size: int
    sequence_length: int
    optimizer: str | dict[str, Any] = "AdamW"
    activation_checkpointing: Mode = "none"
    fused_cross_entropy: bool = False
    tie_embeddings: bool = False
    averages: bool = False
    kernel_loss: bool = False


def fusing_choices(config: "Config") -> tuple[bool, ...]:
    """Return the values of `fused_cross_entropy` that a configuration and the installed torch allow."""
    can_fuse = hasattr(F, "linear_cross_entropy") and config.final_logit_softcapping is None
    return (False, True) if can_fuse else (False,)


def training_memory(short: ShortModel, step: Step) -> TrainingMemory:
    """Return the memory of a training step without allocating it.

    The activations are those of the experts' CPU backend and of torch's fused attention.

    Args:
        short: The model, from `shorten`.
        step: The training step.

    Raises:
        SettingsError: If `fused_cross_entropy` needs another torch, or does not work with the configuration.
    """
    dtype, autocast = PRECISIONS[step.precision]
    ratio = state_ratio(step.optimizer, dtype)
    with _weightless_model(short, dtype) as (model, memory):
        if step.tie_embeddings:
            model.lm_head.weight = model.get_parameter("transformer.wte.weight")  # `parameters` lists it once
        remembered = short.total(model, state_of_modules(step.optimizer, model, ratio))
        if step.activation_checkpointing != "none":
            ActivationCheckpointing(step.activation_checkpointing, recomputed).on_before_setup(model)
        cross_entropy = _kernel_cross_entropy if step.kernel_loss else _cross_entropy
        if step.fused_cross_entropy:
            require_torch()
            fused = FusedLoss()
            fused.on_before_setup(model)
            cross_entropy = fused.wrap(cross_entropy)
        ids = torch.zeros(step.micro_batch_size, step.sequence_length + 1, dtype=torch.int64)
        for parameter in model.parameters():
            # With accumulation, gradients of earlier micro-batches already exist.
            parameter.grad = torch.empty_like(parameter)
        activations = PeakOverLayers(memory, model, short)
        with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        activations.start_backward()
        loss.backward()
        forget_scale()  # of a loss that has no value
        peak = activations.peak()
        return TrainingMemory(
            weights=short.total(model, module_bytes) + step.averages * short.total(model, average_bytes),
            gradients=short.total(model, parameter_bytes),
            optimizer=remembered * dtype.itemsize,
            activations=peak,
        )


def graph_memory(short: ShortModel, memory: TrainingMemory, precision: str) -> int:
    """Return the additional memory of CUDA graphs: their own activations, and the casts of the experts' weights.

    Args:
        short: The model, from `shorten`.
        memory: Memory of a training step without graphs.
        precision: One of `PRECISIONS`.
    """
    autocast = PRECISIONS[precision][1]
    cast = 0 if autocast is None else autocast.itemsize * short.total(meta_model(short.config), _numbers_in_experts)
    return memory.activations + cast


def _numbers_in_experts(module: nn.Module) -> int:
    experts = [part.weights for part in module.modules() if isinstance(part, Experts)]
    return sum(weights.up_EGD.numel() + weights.down_EDF.numel() for weights in experts)


def inference_memory(short: ShortModel, dtype: torch.dtype, on_gpu: bool = False) -> InferenceMemory:
    """Return the memory of reading and continuing one sequence of full length, without allocating it.

    Args:
        short: The model, from `shorten`.
        dtype: Type of weights and cache.
        on_gpu: Whether a GPU computes all experts at once; a CPU computes them one by one, in less memory.
    """
    config = cast("Config", short.config)
    with _weightless_model(short, dtype, on_gpu) as (model, memory), torch.no_grad():
        model.eval()
        weights = short.total(model, module_bytes)
        activations = PeakOverLayers(memory, model, short)
        model.set_kv_cache(batch_size=1, dtype=dtype)
        # Before the forward pass, because documents are also kept in a cache, but only of the first layer.
        cache, held = short.total(model, _cache_bytes), _cache_bytes(model)
        ids = torch.zeros(1, config.block_size, dtype=torch.int64)
        if config.attention_class_name is None and config.sliding_window_size is not None:
            model(ids)  # the cache of LitGPT's windows reads values
        else:
            model(ids, torch.arange(config.block_size), input_pos_maxp1=config.block_size)
        return InferenceMemory(weights, cache, activations.peak() - held)


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters of a module."""
    return sum(parameter.nbytes for parameter in module.parameters())


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a module."""
    return parameter_bytes(module) + sum(buffer.nbytes for buffer in module.buffers())


def average_bytes(module: nn.Module) -> int:
    """Return the bytes of a moving average of a module's weights, in float32, tied weights counted by each name."""
    return sum(4 * tensor.numel() for tensor in module.state_dict().values() if tensor.is_floating_point())


def _cache_bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for name, buffer in module.named_buffers() if ".kv_cache." in name)


@contextlib.contextmanager
def _weightless_model(
    short: ShortModel, dtype: torch.dtype, on_gpu: bool = False
) -> "Iterator[tuple[GPT, WeightlessMemory]]":
    from litgpt.model import GPT

    config: Any = copy.copy(short.config)
    if config.attention_backend != EAGER:
        config.attention_backend = None  # it may need another device, and keeps as much as torch's attention
    with weightless() as memory:
        with _default_dtype(dtype):
            model = GPT(config)
        without_values(model, on_gpu)
        yield model, memory


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # As in LitGPT's pretraining, without chunks. LitGPT's own function is in a module that imports lightning.
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-100)


def _kernel_cross_entropy(logits: Tensor, _targets: Tensor) -> Tensor:
    return _KernelLoss.apply(logits)


class _KernelLoss(torch.autograd.Function):
    """What `litgpt_moe_ext.loss.cross_entropy` keeps, and where its gradient is."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor) -> Tensor:
        normalizers_BT = logits_BTV.new_empty(logits_BTV.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(logits_BTV, normalizers_BT)
        return logits_BTV.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del grads
        return ctx.saved_tensors[0].detach()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # As Fabric creates models in low precision. Fake tensors cannot be converted afterwards.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
