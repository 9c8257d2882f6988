"""The attention layer that `attention_class_name: SinkAttention` puts into LitGPT's blocks.

Shape legend: B batch, T tokens of this call, S positions of the cache, D model width, H query heads, G key/value heads,
d head size.
"""

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn as nn
from litgpt.model import CausalSelfAttention, KVCache
from torch import Tensor

from litgpt_moe_ext.attention.cache_positions import position_range
from litgpt_moe_ext.attention.causal_attention import causal_attention, window_mask
from litgpt_moe_ext.attention.documents import Documents, document_mask
from litgpt_moe_ext.attention.kernels.choice import capability_of, choose
from litgpt_moe_ext.attention.kernels.kernel import Ability, Workload
from litgpt_moe_ext.attention.kernels.own import EAGER
from litgpt_moe_ext.attention.kernels.registry import KERNELS, load_functions
from litgpt_moe_ext.attention.rotation import Rotary, Tables, rotate, rotate_both, rotate_projection
from litgpt_moe_ext.attention.sinks import Softmax, sink_attention
from litgpt_moe_ext.attention.streaming_cache import Stream, StreamingKVCache, streaming_attention
from litgpt_moe_ext.config.features import has_sinks
from litgpt_moe_ext.kernels.gpu import vendor_kind

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

__all__ = ["SinkAttention"]

# With a cache and up to this many queries, a call takes as long as reading the cache, which the written-out softmax
# does only once.
_FEW_QUERIES = 16


class SinkAttention(CausalSelfAttention):
    """Causal self-attention with a learnable sink logit per head, as in gpt-oss.

    Parameters have the names and shapes of LitGPT's `CausalSelfAttention`, plus `sinks` of shape (H,) unless
    `attention_sinks` is false, which means ordinary softmax attention. Keys and values of grouped queries are never
    repeated. The reference is Hugging Face's `GptOssAttention`.

    Three things differ from the parent class. YaRN follows Hugging Face (see `rope.py`), with its attention factor in
    the rotary tables only. A layer with a sliding window keeps a cache of full length, so that prompts longer than the
    window work. And with a cache, positions alone decide what a token sees: LitGPT's mask says the same in more bytes.

    Args:
        config: The model configuration.
        block_idx: Index of the block that this layer belongs to.
    """

    config: "Config"  # pyrefly: ignore[bad-override-mutable-attribute]: with the fields of this package

    def __init__(self, config: "Config", block_idx: int) -> None:
        load_functions()  # of kernels registered in the meantime
        super().__init__(config, block_idx)
        self.mscale = 1.0
        sinks = nn.Parameter(torch.zeros(config.n_head)) if has_sinks(config, block_idx) else None
        self.register_parameter("sinks", sinks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the sinks to `attention_sink_init`. The projections reset themselves."""
        if self.sinks is not None:
            # At 0 a sink weighs as much as one token of score 0.
            nn.init.constant_(self.sinks, self.config.attention_sink_init or 0.0)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | Documents | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """Apply attention.

        Args:
            x: Input, (B, T, D).
            cos: Rotary cosines of the tokens, (1 or B, T, rope_n_elem); with a streaming cache, of positions from 0 on.
            sin: Rotary sines, same shape.
            mask: Bool or additive mask that broadcasts to (B, H, T, T), or the documents of the tokens. `None` means
                causal. The sliding window applies on top. With `input_pos`, a mask tensor is ignored: a token sees the
                positions up to its own.
            input_pos: Positions of the tokens in the cache, (T,) without gaps or (B, T); `None` for a forward without
                cache.
            input_pos_maxp1: The largest of `input_pos` plus 1, if known; the cache is read up to it.

        Returns:
            Output, (B, T, D).

        Raises:
            TypeError: If `input_pos` is given and there is no cache.
            ValueError: If a streaming cache is asked to go back.
        """
        if input_pos is not None and isinstance(self.kv_cache, StreamingKVCache):
            q_BHTd, k_BGTd, v_BGTd = self._split(self.qkv(x))
            y_BHTd = self._attend_streaming(q_BHTd, k_BGTd, v_BGTd, (cos, sin), input_pos, input_pos_maxp1)
            return self.proj(y_BHTd.transpose(1, 2).flatten(2))
        q_BHTd, k_BGTd, v_BGTd = self._project(x, self._rotary((cos, sin)))
        if input_pos is not None:
            documents = mask if isinstance(mask, Documents) else None
            y_BHTd = self._attend_to_cache(q_BHTd, k_BGTd, v_BGTd, documents, input_pos, input_pos_maxp1)
        elif mask is None or isinstance(mask, Documents):
            y_BHTd = causal_attention(q_BHTd, k_BGTd, v_BGTd, self._softmax(), self._window, mask)
        else:
            if self._window is not None:
                position_T = torch.arange(x.size(1), device=x.device)
                mask = _combine(mask, window_mask(position_T, x.size(1), self._window))
            y_BHTd = sink_attention(q_BHTd, k_BGTd, v_BGTd, self._softmax(), mask)
        return self.proj(y_BHTd.transpose(1, 2).flatten(2))

    def build_kv_cache(  # pyrefly: ignore[bad-override]
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache | StreamingKVCache:
        """Build a cache for all positions, with or without a sliding window, or a streaming cache.

        LitGPT's ring buffer of window length cannot take a prompt longer than the window, because its entries leave
        their positions; here the window is a mask.

        Args:
            batch_size: Largest batch the cache is for.
            max_seq_length: Number of positions, S.
            rope_cache_length: Number of columns of the rotary tables, which exceeds a `rope_n_elem` of 1; by default
                `rope_n_elem`.
            device: Where to put the buffers.
            dtype: Their type.

        Returns:
            Zeroed buffers: k of shape (B, G, S, d) (d + 1 with a single rotated element), v of shape (B, G, S, d).
            With `streaming_cache_window`, buffers for the first and last tokens, whatever `max_seq_length`.
        """
        config, G, d = self.config, self.config.n_query_groups, self.config.head_size
        if self._streams is not None:
            # A sliding window sees only the last tokens, so its cache is exact and needs no first tokens.
            first, window = self._streams if self._window is None else (0, self._window)
            return StreamingKVCache((batch_size, G, d), first, window, device, dtype)
        n_elem = config.rope_n_elem
        if rope_cache_length is None or n_elem == 0:
            rope_cache_length = n_elem
        k_size = rope_cache_length + d - n_elem
        shape = (batch_size, G, max_seq_length)
        return KVCache((*shape, k_size), (*shape, d), device=device, dtype=dtype)

    def kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the name of the kernel that computes this layer in training, for the announcement before it starts.

        Args:
            device: Where the layer runs.
            dtype: The type of queries, keys and values; under autocast, autocast's.

        Returns:
            A name in `KERNELS`, or "scaled_dot_product_attention", which makes PyTorch's own choice.

        Raises:
            SettingsError: If the kernel that `attention_backend` names cannot compute it.
        """
        softmax, name = self._softmax(), str(dtype).removeprefix("torch.")
        patterns: list[Ability] = [] if self._window is None else ["window"]
        if self.config.attention_document_boundary is not None:
            patterns.append("documents")
        others: list[Ability] = ["gradient"]
        if self.config.attention_dropout:
            others.append("dropout")
        d, capability = self.config.head_size, capability_of(device)

        def choice(needs: list[Ability]) -> str:
            return choose(Workload(vendor_kind(device), capability, name, d, (*needs, *others)), softmax.backend)

        can_fuse = softmax.backend is None or KERNELS[softmax.backend].abilities.issuperset(patterns)
        if patterns and device.type == "cuda" and can_fuse and (fused := choice(patterns)) != EAGER:
            return fused
        if softmax.sinks_H is None and softmax.backend is None:
            return "scaled_dot_product_attention"
        return choice(["mask"] if patterns else [])

    def _project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        config, qkv = self.config, self.qkv(x)
        if self.norm_q is None and config.clip_qkv is None:
            heads = config.n_head, config.n_query_groups
            if (rotated := rotate_projection(qkv, heads, rotary)) is not None:
                return rotated
        q_BHTd, k_BGTd, v_BGTd = self._split(qkv)
        return *rotate_both(q_BHTd, k_BGTd, rotary), v_BGTd

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, d = self.config, self.config.head_size
        shared = config.n_query_groups * d
        q, k, v = qkv.split((config.n_head * d, shared, shared), dim=-1)
        norm_q, norm_k = self.norm_q, self.norm_k
        is_normed = norm_q is not None and norm_k is not None
        if is_normed and config.norm_qk_type == "olmo2":
            q, k = norm_q(q), norm_k(k)
        if (limit := config.clip_qkv) is not None:
            q, k, v = (y.clamp(-limit, limit) for y in (q, k, v))
        q_BHTd, k_BGTd, v_BGTd = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
        if is_normed and config.norm_qk_type == "default":
            q_BHTd, k_BGTd = norm_q(q_BHTd), norm_k(k_BGTd)
        return q_BHTd, k_BGTd, v_BGTd

    def _attend_to_cache(
        self,
        q_BHTd: Tensor,
        k_BGTd: Tensor,
        v_BGTd: Tensor,
        documents: Documents | None,
        input_pos: Tensor,
        input_pos_maxp1: int | None,
    ) -> Tensor:
        if self.kv_cache is None:
            raise TypeError("input_pos needs a cache: call `gpt.set_kv_cache()` first")
        k_BGSd, v_BGSd = self.kv_cache(input_pos, k_BGTd, v_BGTd)
        T, window, per_sequence = q_BHTd.size(2), self._window, input_pos.dim() > 1
        begin, end = position_range(input_pos, input_pos_maxp1)
        end = k_BGSd.size(2) if end is None else end
        if not per_sequence and begin == 0 and end == T:
            return causal_attention(q_BHTd, k_BGTd, v_BGTd, self._softmax(), window, documents)

        low = 0 if begin is None or window is None else max(0, begin - window + 1)
        k_BGSd, v_BGSd = k_BGSd[:, :, low:end], v_BGSd[:, :, low:end]
        # A single query sees all remaining keys.
        mask = None
        if begin is None or per_sequence or T > 1:
            mask = window_mask(input_pos - low, end - low, end if window is None else window)
        if documents is not None:
            visible = document_mask(input_pos - low, documents.start_BT - low, end - low)
            mask = visible if mask is None else mask & visible
        softmax = self._softmax()._replace(dropout=0.0, backend=EAGER if T <= _FEW_QUERIES else None)
        return sink_attention(q_BHTd, k_BGSd, v_BGSd, softmax, mask, causal=False)

    def _attend_streaming(
        self,
        q_BHTd: Tensor,
        k_BGTd: Tensor,
        v_BGTd: Tensor,
        tables: Tables,
        input_pos: Tensor,
        input_pos_maxp1: int | None,
    ) -> Tensor:
        begin, _ = position_range(input_pos, input_pos_maxp1)
        if begin is None or input_pos.dim() > 1:
            raise ValueError(
                f"input_pos of shape {tuple(input_pos.shape)} does not tell a streaming cache where the text goes "
                "on: it needs one position per token for the whole batch, and input_pos_maxp1 unless on a CPU. Set "
                "streaming_cache_first and streaming_cache_window to null for a full cache"
            )
        cos, sin = tables

        def rotate_to(x_BHTd: Tensor, position_T: Tensor) -> Tensor:
            return rotate(x_BHTd, self._rotary((cos[:, position_T], sin[:, position_T])))

        stream = Stream(cast(StreamingKVCache, self.kv_cache), begin, rotate_to)
        return streaming_attention(q_BHTd, k_BGTd, v_BGTd, self._softmax(), stream)

    def _rotary(self, tables: Tables) -> Rotary:
        return Rotary(tables, self.config.rope_n_elem, self.config.rope_interleave)

    @property
    def _window(self) -> int | None:
        return self.config.sliding_window_size if self.apply_sliding_window_attention else None

    @property
    def _streams(self) -> tuple[int, int] | None:
        # Numbers of first and last tokens that a streaming cache keeps.
        config = self.config
        if config.streaming_cache_window is None:
            return None
        return config.streaming_cache_first, config.streaming_cache_window

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)

    def _softmax(self) -> Softmax:
        dropout = self.config.attention_dropout if self.training else None
        return Softmax(self.sinks, self._scale, dropout or 0.0, self.config.attention_backend)


def _combine(mask: Tensor, visible: Tensor) -> Tensor:
    # An additive mask becomes minus infinity where `visible` is false.
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, -math.inf)
