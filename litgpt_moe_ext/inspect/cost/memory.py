"""How much memory training and inference take, found out by running the model on tensors without content.

torch's fake tensors have shapes and dtypes, obey autograd and autocast, and allocate nothing. `LiveMemory` adds up the
storages that are alive while they pass by, which gives the peak as an allocator without waste would see it.

The routed experts are the one part that asks for values (how many rows each has). They are stood in for by what their
backends keep and allocate for any routing.

Shape legend: T tokens, K chosen experts per token, R = T * K routed rows, D model width, G width of an expert's first
projection, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels.backends import matmul_dtype
from litgpt_moe_ext.moe.metrics import routers_of
from litgpt_moe_ext.moe.router import Routing
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing, Mode
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss, require_torch

# Precision setting of training: dtype of the parameters, and dtype of autocast if there is any.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}


class TrainingMemory(NamedTuple):
    """Bytes during a training step.

    Attributes:
        weights: Parameters and buffers.
        gradients: Gradients of all parameters.
        optimizer: State of the optimizer.
        activations: What a micro batch adds to these at the worst moment of forward and backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class InferenceMemory(NamedTuple):
    """Bytes for one sequence.

    Attributes:
        weights: Parameters and buffers.
        kv_cache: Keys and values of a sequence of full length.
        activations: What reading a prompt of full length adds at the worst moment.
    """

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class LiveMemory(TorchDispatchMode):
    """Follows the storages that operators return, while it is entered.

    Attributes:
        peak: Most bytes that were alive after any operator since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[int, int] = {}
        self._references: dict[int, StorageWeakRef] = {}
        # With those that have died since `live` last looked, which takes a while.
        self._seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        if self._seen > self.peak:
            self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        """Return the bytes that are alive now."""
        for key in [key for key, reference in self._references.items() if reference.expired()]:
            del self._references[key]
            self._seen -= self._bytes.pop(key)
        return self._seen

    def reset(self) -> None:
        """Start looking for a new peak."""
        self.peak = self.live()

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._references:  # no other storage comes to be at an address to which there is a reference
            self._references[key] = StorageWeakRef(storage)
            self._bytes[key] = storage.nbytes()
            self._seen += self._bytes[key]


class _StandIn(torch.autograd.Function):
    """Keeps and allocates what `litgpt_moe_ext.moe.kernels.cpu` keeps and allocates, whatever the routing."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        up_EGD = weights[0]
        n_row = weights_TK.numel()
        h_RG = x_TD.new_empty(n_row, up_EGD.size(1), dtype=dtype)
        rows_2R = weights_TK.new_empty(2 * n_row, dtype=torch.int64)
        y_RD = x_TD.new_empty(n_row, x_TD.size(1))
        ctx.save_for_backward(x_TD.to(dtype), weights_TK, h_RG, rows_2R, *weights)
        ctx.x_dtype = x_TD.dtype
        return torch.empty_like(y_RD[: len(x_TD)])

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, h_RG, _rows_2R, *weights = ctx.saved_tensors
        dweights = [torch.empty_like(weight) for weight in weights]
        _dx_RD = x_TD.new_empty(weights_TK.numel(), x_TD.size(1), dtype=ctx.x_dtype)
        # What one expert needs at a time: rows of x and dy, dh, and two of the hidden width.
        down_EDF = [weight for weight in weights if weight.dim() == 3][-1]
        width = 2 * x_TD.size(1) + h_RG.size(1) + 2 * down_EDF.size(2)
        _scratch_NW = x_TD.new_empty(weights_TK.numel() // down_EDF.size(0), width)
        return torch.empty_like(x_TD, dtype=ctx.x_dtype), torch.empty_like(weights_TK), None, *dweights


def _stand_in_forward(experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
    weights = [weight for weight in experts.weights if weight is not None]
    return _StandIn.apply(x_TD, routing.weights_TK, matmul_dtype(x_TD), *weights)


def training_memory(
    config: Any,
    precision: str,
    micro_batch_size: int,
    sequence_length: int,
    optimizer: str | dict,
    activation_checkpointing: Mode = "none",
    fused_cross_entropy: bool = False,
    tie_embeddings: bool = False,
) -> TrainingMemory:
    """Return what a training step takes, without taking it.

    The activations are those of the CPU backend of the experts and of torch's fused attention.

    Args:
        config: A `litgpt.Config`.
        precision: One of `PRECISIONS`.
        micro_batch_size: Sequences in one forward pass.
        sequence_length: Tokens of each.
        optimizer: As in a recipe.
        activation_checkpointing: As in a recipe.
        fused_cross_entropy: As in a recipe.
        tie_embeddings: As `train.tie_embeddings`.

    Raises:
        ImportError: If `fused_cross_entropy` needs another torch.
        ValueError: If it does not go with the configuration.
    """
    from litgpt.utils import chunked_cross_entropy

    dtype, autocast = PRECISIONS[precision]
    ratio = state_ratio(optimizer, dtype)
    # 0: the whole cross-entropy at once, as LitGPT's pretraining does.
    cross_entropy = partial(chunked_cross_entropy, chunk_size=0)
    with _fake_model(config, dtype) as (model, memory):
        if tie_embeddings:
            model.lm_head.weight = model.transformer.wte.weight  # `parameters` lists it once
        cross_entropy = save_memory(model, cross_entropy, activation_checkpointing, fused_cross_entropy)
        weights = sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
        ids = torch.zeros(micro_batch_size, sequence_length + 1, dtype=torch.int64)
        context = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
        for parameter in model.parameters():
            # Gradients of earlier micro batches are there already when accumulating.
            parameter.grad = torch.empty_like(parameter)
        gradients = sum(_bytes(parameter.grad) for parameter in model.parameters())
        memory.reset()
        before = memory.live()
        with context:
            loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        activations = memory.peak - before
        for router in routers_of(model).values():
            router.tally.take()  # no optimizer will
        parameters = sum(_bytes(parameter) for parameter in model.parameters())
    return TrainingMemory(weights, gradients, parameters * ratio, activations)


def save_memory(
    model: torch.nn.Module,
    cross_entropy: Callable[..., Tensor],
    activation_checkpointing: Mode,
    fused_cross_entropy: bool,
) -> Callable[..., Tensor]:
    """Do to a model what training does to it for these settings, and return its loss function."""
    if activation_checkpointing != "none":
        ActivationCheckpointing(activation_checkpointing).on_before_setup(model)
    if not fused_cross_entropy:
        return cross_entropy
    require_torch()
    fused = FusedLoss()
    fused.on_before_setup(model)
    return fused.wrap(cross_entropy)


def inference_memory(config: Any, dtype: torch.dtype) -> InferenceMemory:
    """Return what it takes to read and continue one sequence of full length, without taking it.

    Args:
        config: A `litgpt.Config`.
        dtype: Of weights and cache.
    """
    with _fake_model(config, dtype) as (model, memory), torch.no_grad():
        model.eval()
        weights = sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
        model.set_kv_cache(batch_size=1, dtype=dtype)
        cache = sum(_bytes(buffer) for block in model.transformer.h for buffer in block.attn.kv_cache.buffers())
        memory.reset()
        before = memory.live()
        positions_T = torch.arange(config.block_size)
        model(torch.zeros(1, config.block_size, dtype=torch.int64), positions_T, input_pos_maxp1=config.block_size)
        return InferenceMemory(weights, cache, memory.peak - before)


def state_ratio(optimizer: str | dict, dtype: torch.dtype) -> int:
    """Return how many numbers an optimizer remembers for each parameter, by letting it make one step.

    Args:
        optimizer: As in a recipe: a name, or `class_path` and `init_args`.
        dtype: Of the parameters.
    """
    import copy

    from litgpt.utils import instantiate_torch_optimizer

    parameter = torch.nn.Parameter(torch.zeros(8, 16, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    if isinstance(optimizer, dict):
        optimizer = {"init_args": {}, **copy.deepcopy(optimizer)}
    made = instantiate_torch_optimizer(optimizer, [parameter])
    made.step()
    state = made.state[parameter].values()
    return sum(value.numel() for value in state if isinstance(value, Tensor)) // parameter.numel()


@contextlib.contextmanager
def _fake_model(config: Any, dtype: torch.dtype) -> Iterator[tuple[Any, LiveMemory]]:
    from litgpt.model import GPT, LLaMAMoE
    from torch._subclasses.fake_tensor import FakeTensorMode

    from litgpt_moe_ext.host.flops import dense_equivalent

    with FakeTensorMode(), LiveMemory() as memory:
        with _default_dtype(dtype):
            model = GPT(config)
        for module in model.modules():
            if isinstance(module, Experts):
                module.forward = _stand_in_forward.__get__(module)
            elif isinstance(module, LLaMAMoE):
                module.forward = dense_equivalent.__get__(module)
        yield model, memory


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # As Fabric makes models of low precision. Converting one afterwards cannot be done with fake tensors.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
