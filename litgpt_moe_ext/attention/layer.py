"""The attention layer that `attention_class_name: SinkAttention` puts into LitGPT's blocks.

Shape suffixes: B batch, T tokens of this call, S positions of the cache, C model width, H query heads,
G key/value heads, D head size.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import CausalSelfAttention, KVCache, apply_rope, apply_rope_interleave

from litgpt_moe_ext.attention.sinks import sink_attention
from litgpt_moe_ext.attention.validation import validate_attention_config
from litgpt_moe_ext.attention.window import sliding_window_attention, window_mask

__all__ = ["SinkAttention", "validate_attention_config"]


class SinkAttention(CausalSelfAttention):
    """Causal self-attention with a learnable sink logit per head, as in gpt-oss.

    Parameters have the names and shapes of LitGPT's `CausalSelfAttention`, plus `sinks` of shape (H,) unless
    `attention_sinks` is false, in which case this is ordinary softmax attention. Keys and values of grouped queries are
    never repeated. The reference is Hugging Face's `GptOssAttention`.

    Two things differ from the parent class. YaRN's attention factor sits in the rotary tables alone, and does not enter
    the softmax scale once more. A layer with a sliding window keeps a cache of full length, so that prompts longer than
    the window work.

    Args:
        config: The model configuration.
        block_idx: Index of the block that this layer belongs to.

    Raises:
        ValueError: If the configuration asks for something this layer cannot do.
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        validate_attention_config(config)
        super().__init__(config, block_idx)
        self.mscale = 1.0
        has_sinks = getattr(config, "attention_sinks", None) is not False
        self.register_parameter("sinks", nn.Parameter(torch.zeros(config.n_head)) if has_sinks else None)

    def reset_parameters(self) -> None:
        """Set the sinks to 0, where a sink weighs as much as one token of score 0. The projections reset themselves."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> torch.Tensor:
        """Apply attention.

        Args:
            x: Input, (B, T, C).
            cos: Rotary cosines of the tokens, (1 or B, T, rope_n_elem).
            sin: Rotary sines, same shape.
            mask: Bool or additive mask that broadcasts to (B, H, T, S), where S is T without cache. `None` means
                causal. The sliding window applies on top of it.
            input_pos: Positions of the tokens in the cache, (T,) or (B, T); `None` for a forward without cache.
            input_pos_maxp1: Number of cache positions to look at, if known; by default all of them.

        Returns:
            Output, (B, T, C).

        Raises:
            TypeError: If `input_pos` is given and there is no cache.
        """
        q_BHTD, k_BGTD, v_BGTD = self._project(x)
        q_BHTD, k_BGTD = self._rotate(q_BHTD, cos, sin), self._rotate(k_BGTD, cos, sin)
        window = self.config.sliding_window_size if self.apply_sliding_window_attention else None

        if input_pos is not None:
            y_BTHD = self._attend_to_cache(q_BHTD, k_BGTD, v_BGTD, mask, input_pos, input_pos_maxp1, window)
        elif window is None:
            y_BTHD = self.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, mask)
        elif mask is None:
            y_BHTD = sliding_window_attention(self._attend, q_BHTD, k_BGTD, v_BGTD, window)
            y_BTHD = y_BHTD.transpose(1, 2)
        else:
            position_T = torch.arange(x.size(1), device=x.device)
            mask = _combine(mask, window_mask(position_T, x.size(1), window))
            y_BTHD = self.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, mask)
        return self.proj(y_BTHD.flatten(2))

    def scaled_dot_product_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend with grouped queries, with sinks if there are any.

        Args:
            q: Queries, (B, H, T, D).
            k: Keys, (B, G, S, D).
            v: Values, (B, G, S, D).
            mask: Bool or additive mask that broadcasts to (B, H, T, S); `None` means causal.

        Returns:
            (B, T, H, D), as in the parent class.
        """
        return self._attend(q, k, v, mask).transpose(1, 2)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Build a cache for all positions, with or without a sliding window.

        LitGPT's ring buffer of window length cannot take a prompt longer than the window, because its entries no longer
        stand at their positions; here the window is a mask.

        Args:
            batch_size: Largest batch the cache is for.
            max_seq_length: Number of positions, S.
            rope_cache_length: Number of columns of the rotary tables, which are more than `rope_n_elem` where that
                is 1; the default takes them to be as many.
            device: Where to put the buffers.
            dtype: Their type.

        Returns:
            Zeroed buffers: k of shape (B, G, S, D) (D + 1 with a single rotated element), v of shape (B, G, S, D).
        """
        config = self.config
        if rope_cache_length is None:
            rope_cache_length = config.rope_n_elem
        shape = (batch_size, config.n_query_groups, max_seq_length)
        k_size = rope_cache_length + config.head_size - config.rope_n_elem
        return KVCache((*shape, k_size), (*shape, config.head_size), device=device, dtype=dtype)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        G_size = config.n_query_groups * config.head_size
        q, k, v = self.qkv(x).split((config.n_head * config.head_size, G_size, G_size), dim=-1)
        if config.norm_qk and config.norm_qk_type == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        q_BHTD, k_BGTD, v_BGTD = (y.unflatten(-1, (-1, config.head_size)).transpose(1, 2) for y in (q, k, v))
        if config.norm_qk and config.norm_qk_type == "default":
            q_BHTD, k_BGTD = self.norm_q(q_BHTD), self.norm_k(k_BGTD)
        return q_BHTD, k_BGTD, v_BGTD

    def _rotate(self, x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n_elem = self.config.rope_n_elem
        rotate = apply_rope_interleave if self.config.rope_interleave else apply_rope
        rotated = rotate(x_BHTD[..., :n_elem], cos, sin)
        if n_elem == x_BHTD.size(-1):
            return rotated
        return torch.cat((rotated, x_BHTD[..., n_elem:]), dim=-1)

    def _attend_to_cache(
        self,
        q_BHTD: torch.Tensor,
        k_BGTD: torch.Tensor,
        v_BGTD: torch.Tensor,
        mask: torch.Tensor | None,
        input_pos: torch.Tensor,
        input_pos_maxp1: int | None,
        window: int | None,
    ) -> torch.Tensor:
        if self.kv_cache is None:
            raise TypeError("input_pos needs a cache: call `gpt.set_kv_cache()` first")
        k_BGSD, v_BGSD = self.kv_cache(input_pos, k_BGTD, v_BGTD)
        if input_pos_maxp1 is not None:
            k_BGSD, v_BGSD = k_BGSD[:, :, :input_pos_maxp1], v_BGSD[:, :, :input_pos_maxp1]
        S = k_BGSD.size(2)
        if mask is None:
            mask = window_mask(input_pos, S, S if window is None else window)
        elif window is not None:
            mask = _combine(mask, window_mask(input_pos, S, window))
        return self.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, mask)

    def _attend(
        self, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        scale = 1.0 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)
        if self.sinks is not None:
            return sink_attention(q_BHTD, k_BGSD, v_BGSD, self.sinks, scale=scale, mask=mask)
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )


def _combine(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    # A bool mask keeps what both allow; an additive one is closed where the second does not allow.
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, -math.inf)
