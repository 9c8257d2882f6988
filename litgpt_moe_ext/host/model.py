"""Changes to LitGPT's model definition: the plugin's layers, positions, documents and caches.

Every function takes the imported module `litgpt.model` and changes one name in it. A model that names none of the
plugin's classes takes LitGPT's own path in all of them.
"""

import copy
import importlib
from functools import wraps
from types import ModuleType
from typing import Any

from litgpt_moe_ext.config.features import MLP_CLASS_NAMES
from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.errors import SettingsError


def offer_mlp_classes(model: ModuleType) -> None:
    """Let LitGPT find the MLP classes, which it looks up by name in its module."""

    # The layers build on LitGPT's model definition, so they can only be imported after it; the module's `__getattr__`
    # (PEP 562) does so at the first access.
    def __getattr__(name: str) -> type:
        if name not in MLP_CLASS_NAMES:
            raise AttributeError(f"module {model.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("litgpt_moe_ext.moe.layer"), name)

    vars(model)["__getattr__"] = __getattr__


def extend_blocks(model: ModuleType) -> None:
    """Put dense layers between MoE layers, and dropout on the residual stream."""
    from litgpt_moe_ext.config.features import is_dense_layer

    original = model.Block.__init__

    @wraps(original)
    def __init__(self: Any, config: Any, block_idx: int) -> None:
        if is_dense_layer(config, block_idx):
            # LitGPT would build the MoE layer first and then discard it.
            config = copy.copy(config)
            config.mlp_class_name, config.first_k_dense_replace = "FeedForward", None
        original(self, config, block_idx)
        if config.residual_dropout:
            import torch

            # Both are applied right before the output of a layer is added to the residual stream.
            self.post_attention_norm = torch.nn.Dropout(config.residual_dropout)
            self.post_mlp_norm = torch.nn.Dropout(config.residual_dropout)

    model.Block.__init__ = __init__


def pass_batch_metadata(model: ModuleType) -> None:
    """Let a block pass padding and token ids on to its MoE layer, as arguments.

    Activation checkpointing then recomputes each batch with its own metadata, whatever ran in between.
    """
    from litgpt_moe_ext.moe.batch_metadata import BatchMetadata

    original = model.Block.forward

    @wraps(original)
    def forward(
        self: Any,
        x: Any,
        cos: Any,
        sin: Any,
        mask: Any = None,
        input_pos: Any = None,
        input_pos_maxp1: int | None = None,
    ) -> Any:
        if not isinstance(mask, BatchMetadata):
            return original(self, x, cos, sin, mask, input_pos, input_pos_maxp1)
        return original(_WithMetadata(self, mask), x, cos, sin, mask.mask, input_pos, input_pos_maxp1)

    model.Block.forward = forward


class _WithMetadata:
    # The attributes that LitGPT's block reads of itself.

    def __init__(self, block: Any, metadata: Any) -> None:
        self.config = block.config
        self.norm_1, self.attn, self.post_attention_norm = block.norm_1, block.attn, block.post_attention_norm
        self.norm_2, self.post_mlp_norm = block.norm_2, block.post_mlp_norm
        self._mlp, self._inputs = block.mlp, (metadata.real_BT, metadata.ids)

    def mlp(self, x: Any) -> Any:
        return self._mlp(x, *self._inputs)


def choose_attention(model: ModuleType) -> None:
    """Build the attention class that a configuration names.

    LitGPT's blocks call `CausalSelfAttention(config, block_idx)`. Choosing the class in `__new__` keeps every name and
    every isinstance check of LitGPT as it is.
    """
    attention_class = model.CausalSelfAttention

    # Copying and unpickling call `__new__` without a configuration.
    def __new__(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = getattr(config, "attention_class_name", None)
        if name is None:
            if cls is not attention_class and getattr(config, "latent_attention", None) and uses_plugin(config):
                # LitGPT's adapters put their own attention in its place, whose weights would be random.
                raise _no_other_attention("latent_attention", cls)
            return object.__new__(cls)
        from litgpt_moe_ext.attention.layer import SinkAttention

        if issubclass(cls, SinkAttention):
            return object.__new__(cls)
        if cls is attention_class:
            if not issubclass(SinkAttention, cls):
                raise RuntimeError(
                    f"{cls.__module__} was executed again, as by importlib.reload, and the layers of litgpt_moe_ext "
                    "build on its first classes; start Python (in a notebook: the kernel) anew"
                )
            return object.__new__(SinkAttention)
        raise _no_other_attention(f"attention_class_name: {name!r}", cls)

    attention_class.__new__ = __new__


def _no_other_attention(setting: str, other: type) -> SettingsError:
    return SettingsError(
        f"{setting} cannot be combined with {other.__module__}.{other.__name__}, which would compute something else. "
        "Finetune all weights instead (litgpt finetune_full)."
    )


def choose_rope_cache(model: ModuleType) -> None:
    """Use the plugin's rotary tables for its attention, and for latent attention in models with its other layers."""
    original = model.GPT.rope_cache

    @wraps(original)
    def rope_cache(self: Any, device: Any = None) -> Any:
        config = self.config
        latent = config.latent_attention is not None and uses_plugin(config)
        if config.attention_class_name is None and not latent:
            return original(self, device=device)
        from litgpt_moe_ext.attention.gpt_forward import rope_length
        from litgpt_moe_ext.attention.rope import build_rope_cache

        return build_rope_cache(config, rope_length(self), device=device)

    model.GPT.rope_cache = rope_cache


def fuse_norms(model: ModuleType) -> None:
    """Run RMSNorms of the plugin's models as one kernel each way on GPUs, where LitGPT takes six forward and more back.

    `extend_model_init` marks these norms.
    """
    original = model.RMSNorm.forward

    @wraps(original)
    def forward(self: Any, x: Any) -> Any:
        import torch

        fusible = getattr(self, "is_fusible", False) and x.is_cuda and x.dtype == self.weight.dtype
        # A compiler fuses better, with the surrounding operators.
        if not fusible or x.dtype == torch.float64 or torch.compiler.is_compiling():
            return original(self, x)
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    model.RMSNorm.forward = forward


def extend_model_init(model: ModuleType) -> None:
    """Add learned positions, and let norms be fused."""
    from litgpt_moe_ext.config.features import changes_model

    original = model.GPT.__init__

    @wraps(original)
    def __init__(self: Any, config: Any) -> None:
        original(self, config)
        if changes_model(config):
            from litgpt_moe_ext.attention.gpt_forward import add_position_embedding

            add_position_embedding(self)
        if uses_plugin(config):
            for module in self.modules():
                if isinstance(module, model.RMSNorm):
                    module.is_fusible = not module.add_unit_offset

    model.GPT.__init__ = __init__


def extend_model_forward(model: ModuleType) -> None:
    """Pass learned positions, documents, padding, ids and embedding dropout through the model, and no unread mask."""
    from litgpt_moe_ext.config.features import changes_model, routers_need
    from litgpt_moe_ext.tokens.padding import accepts_padding

    original = model.GPT.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        has_mask = self.mask_cache is not None and getattr(self.config, "attention_class_name", None) is not None
        special = changes_model(self.config) or routers_need(self.config, "token_ids")
        if not (special or accepts_padding() or has_mask):
            return original(self, *args, **kwargs)
        from litgpt_moe_ext.attention.gpt_forward import forward

        return forward(original, self, *args, **kwargs)

    model.GPT.forward = forward


def allow_any_length(model: ModuleType) -> None:
    """Let a model with a streaming cache accept a text longer than its context, and say that others cannot."""
    original = model.GPT.max_seq_length

    def set_max_seq_length(self: Any, value: int) -> None:
        streams = getattr(self.config, "streaming_cache_window", None) is not None
        if not streams and value > self.config.block_size and uses_plugin(self.config):
            raise SettingsError(
                f"max_seq_length: {value} tokens are more than the model's block_size: {self.config.block_size}; give "
                "a shorter prompt or fewer --max_new_tokens, in a training a smaller --train.max_seq_length"
            )
        original.fset(self, min(value, self.config.block_size) if streams else value)
        self._max_seq_length = value

    model.GPT.max_seq_length = original.setter(set_max_seq_length)


def size_kv_cache(model: ModuleType) -> None:
    """Size a streaming cache by what it keeps, not by the text, and build no mask for layers that do not read it."""
    original = model.GPT.set_kv_cache

    @wraps(original)
    def set_kv_cache(
        self: Any,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if getattr(self.config, "streaming_cache_window", None) is not None:
            from litgpt_moe_ext.attention.gpt_forward import cache_length

            # `LLM.generate`, and thereby `litgpt serve`, state the length of the text only here.
            if max_seq_length is not None and max_seq_length > self.max_seq_length:
                self.max_seq_length = max_seq_length
            max_seq_length = cache_length(self, max_seq_length)
        if getattr(self.config, "attention_class_name", None) is not None:
            import torch

            # LitGPT builds a mask unless there is one of this size, square; this one has a single element in memory.
            size = self.max_seq_length if max_seq_length is None else max_seq_length
            self.mask_cache = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, size, size)
        original(self, batch_size, max_seq_length, rope_cache_length, device, dtype)

    model.GPT.set_kv_cache = set_kv_cache


def mark_loss(loop: Any) -> None:
    """Let auxiliary losses know by what a training loop of LitGPT scales its loss."""
    from litgpt_moe_ext.moe.balancing.bias import any_router_lives
    from litgpt_moe_ext.moe.balancing.gradient_injection import remember_scale

    original = loop.chunked_cross_entropy

    @wraps(original)
    def chunked_cross_entropy(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        return remember_scale(loss) if any_router_lives() else loss

    loop.chunked_cross_entropy = chunked_cross_entropy


def move_router_biases(_optimizer: ModuleType) -> None:
    """Move the balancing biases once per optimizer step, whoever owns the loop."""
    from litgpt_moe_ext.moe.balancing.bias import install_optimizer_hook

    install_optimizer_hook()
