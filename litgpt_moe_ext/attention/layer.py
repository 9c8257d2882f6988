"""The attention layer that `attention_class_name: SinkAttention` puts into LitGPT's blocks.

Shape suffixes: B batch, T tokens of this call, S positions of the cache, C model width, H query heads,
G key/value heads, D head size.
"""

import math

import torch
import torch.nn as nn
from litgpt.config import Config
from litgpt.model import CausalSelfAttention, KVCache, apply_rope, apply_rope_interleave

from litgpt_moe_ext.attention.causal import Softmax, causal_attention
from litgpt_moe_ext.attention.documents import Documents, document_mask
from litgpt_moe_ext.attention.positions import position_range
from litgpt_moe_ext.attention.sinks import sink_attention
from litgpt_moe_ext.attention.streaming import StreamingKVCache, streaming_attention
from litgpt_moe_ext.attention.window import window_mask
from litgpt_moe_ext.config.features import has_sinks
from litgpt_moe_ext.config.rules import check_derived

__all__ = ["SinkAttention"]

# Up to this many queries to a cache are limited by reading it once, which the written-out softmax does.
_FEW_QUERIES = 16


class SinkAttention(CausalSelfAttention):
    """Causal self-attention with a learnable sink logit per head, as in gpt-oss.

    Parameters have the names and shapes of LitGPT's `CausalSelfAttention`, plus `sinks` of shape (H,) unless
    `attention_sinks` is false, in which case this is ordinary softmax attention. Keys and values of grouped queries are
    never repeated. The reference is Hugging Face's `GptOssAttention`.

    Three things differ from the parent class. YaRN is computed as Hugging Face does (see `rope.py`), and its attention
    factor sits in the rotary tables alone. A layer with a sliding window keeps a cache of full length, so that prompts
    longer than the window work. And with a cache, only positions count: LitGPT's mask says the same in more bytes.

    Args:
        config: The model configuration.
        block_idx: Index of the block that this layer belongs to.

    Raises:
        ValueError: If the configuration asks for something this layer cannot do.
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        check_derived(config)
        super().__init__(config, block_idx)
        self.mscale = 1.0
        sinks = nn.Parameter(torch.zeros(config.n_head)) if has_sinks(config, block_idx) else None
        self.register_parameter("sinks", sinks)

    def reset_parameters(self) -> None:
        """Set the sinks to `attention_sink_init`. The projections reset themselves."""
        if self.sinks is not None:
            # At 0 a sink weighs as much as one token of score 0.
            nn.init.constant_(self.sinks, getattr(self.config, "attention_sink_init", None) or 0.0)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | Documents | None = None,
        input_pos: torch.Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> torch.Tensor:
        """Apply attention.

        Args:
            x: Input, (B, T, C).
            cos: Rotary cosines of the tokens, (1 or B, T, rope_n_elem). With a streaming cache, of positions from 0.
            sin: Rotary sines, same shape.
            mask: Bool or additive mask that broadcasts to (B, H, T, T), or the documents of the tokens. `None` means
                causal. The sliding window applies on top of it. With `input_pos`, a mask tensor is not read: a token
                sees the positions up to its own.
            input_pos: Positions of the tokens in the cache, (T,) without gaps or (B, T); `None` for a forward without
                cache.
            input_pos_maxp1: The largest of `input_pos` and 1, if known: no more of the cache is read.

        Returns:
            Output, (B, T, C).

        Raises:
            TypeError: If `input_pos` is given and there is no cache.
            ValueError: If a streaming cache is asked to go back.
        """
        q_BHTD, k_BGTD, v_BGTD = self._project(x)
        if input_pos is not None and isinstance(self.kv_cache, StreamingKVCache):
            y_BHTD = self._attend_streaming(q_BHTD, k_BGTD, v_BGTD, cos, sin, input_pos, input_pos_maxp1)
            return self.proj(y_BHTD.transpose(1, 2).flatten(2))
        q_BHTD, k_BGTD = self._rotate(q_BHTD, cos, sin), self._rotate(k_BGTD, cos, sin)
        documents = mask if isinstance(mask, Documents) else None
        if input_pos is not None:
            y_BHTD = self._attend_to_cache(q_BHTD, k_BGTD, v_BGTD, documents, input_pos, input_pos_maxp1)
        elif mask is None or documents is not None:
            y_BHTD = causal_attention(q_BHTD, k_BGTD, v_BGTD, self._softmax(), self._window, documents)
        else:
            if self._window is not None:
                position_T = torch.arange(x.size(1), device=x.device)
                mask = _combine(mask, window_mask(position_T, x.size(1), self._window))
            y_BHTD = self._softmax().attend(q_BHTD, k_BGTD, v_BGTD, mask)
        return self.proj(y_BHTD.transpose(1, 2).flatten(2))

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
        return self._softmax().attend(q, k, v, mask).transpose(1, 2)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache | StreamingKVCache:
        """Build a cache for all positions, with or without a sliding window, or a streaming cache.

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
            With `streaming_cache_window`, buffers for the first and the last tokens, however many positions there are.
        """
        config = self.config
        if getattr(config, "streaming_cache_window", None) is not None:
            # A sliding window is a streaming cache of its own, exact and without first tokens.
            first, window = (
                (config.streaming_cache_first, config.streaming_cache_window)
                if self._window is None
                else (0, self._window)
            )
            return StreamingKVCache(batch_size, config.n_query_groups, config.head_size, first, window, device, dtype)
        if rope_cache_length is None or config.rope_n_elem == 0:
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
        if n_elem == 0:
            return x_BHTD
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
        documents: Documents | None,
        input_pos: torch.Tensor,
        input_pos_maxp1: int | None,
    ) -> torch.Tensor:
        if self.kv_cache is None:
            raise TypeError("input_pos needs a cache: call `gpt.set_kv_cache()` first")
        k_BGSD, v_BGSD = self.kv_cache(input_pos, k_BGTD, v_BGTD)
        T, window, per_sequence = q_BHTD.size(2), self._window, input_pos.dim() > 1
        begin, end = position_range(input_pos, input_pos_maxp1)
        end = k_BGSD.size(2) if end is None else end
        if not per_sequence and begin == 0 and end == T:
            return causal_attention(q_BHTD, k_BGTD, v_BGTD, self._softmax(), window, documents)

        low = 0 if begin is None or window is None else max(0, begin - window + 1)
        k_BGSD, v_BGSD = k_BGSD[:, :, low:end], v_BGSD[:, :, low:end]
        # A single query sees all that is left.
        mask = None
        if begin is None or per_sequence or T > 1:
            mask = window_mask(input_pos - low, end - low, end if window is None else window)
        if documents is not None:
            visible = document_mask(input_pos - low, documents.start_BT - low, end - low)
            mask = visible if mask is None else mask & visible
        return sink_attention(
            q_BHTD, k_BGSD, v_BGSD, self.sinks,
            scale=self._scale, mask=mask, causal=False, backend="eager" if T <= _FEW_QUERIES else None,
        )  # fmt: skip

    def _attend_streaming(
        self,
        q_BHTD: torch.Tensor,
        k_BGTD: torch.Tensor,
        v_BGTD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        input_pos: torch.Tensor,
        input_pos_maxp1: int | None,
    ) -> torch.Tensor:
        begin, _ = position_range(input_pos, input_pos_maxp1)
        if begin is None or input_pos.dim() > 1:
            raise ValueError(
                f"input_pos of shape {tuple(input_pos.shape)} does not tell a streaming cache where the text goes "
                "on: it needs one position per token for the whole batch, and input_pos_maxp1 unless on a CPU. Set "
                "streaming_cache_first and streaming_cache_window to null for a full cache"
            )

        def rotate(x_BHTD: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
            return self._rotate(x_BHTD, cos[:, position_T], sin[:, position_T])

        return streaming_attention(q_BHTD, k_BGTD, v_BGTD, self.kv_cache, begin, rotate, self.sinks, self._scale)

    @property
    def _window(self) -> int | None:
        return self.config.sliding_window_size if self.apply_sliding_window_attention else None

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)

    def _softmax(self) -> Softmax:
        dropout = getattr(self.config, "attention_dropout", None) if self.training else None
        return Softmax(self.sinks, self._scale, dropout or 0.0, getattr(self.config, "attention_backend", None))


def _combine(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    # A bool mask keeps what both allow; an additive one is closed where the second does not allow.
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, -math.inf)
