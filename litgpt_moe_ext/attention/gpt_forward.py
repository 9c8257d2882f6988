"""Settings that affect the whole model: embeddings, positions, documents, padding, token ids, endless generation.

LitGPT's `GPT.forward` runs unchanged, on a stand-in that has the parts of the model, some of them wrapped. Layers get
what they need to know about a batch as arguments of their blocks, so that activation checkpointing recomputes every
batch with its own metadata, whatever ran in between.

Shape legend: B batch, T tokens, S positions of the cache, D model width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from litgpt import GPT
from torch import Tensor

from litgpt_moe_ext.attention.cache_positions import position_range
from litgpt_moe_ext.attention.documents import Documents, find_documents, remember_documents
from litgpt_moe_ext.attention.streaming_cache import positions_needed
from litgpt_moe_ext.config.features import MOE_CLASS_NAMES, changes_model, has_experts, routers_need
from litgpt_moe_ext.moe.batch_metadata import BatchMetadata, TokenIds
from litgpt_moe_ext.tokens.padding import real_tokens

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


def add_position_embedding(model: GPT) -> None:
    """Give a model with learned positions `transformer.wpe`, an embedding of `block_size` positions."""
    config = _config(model)
    if config.position_embedding == "learned":
        model.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)


def rope_length(model: GPT) -> int:
    """Return how many positions the rotary tables of a model need."""
    config, length = _config(model), model.max_seq_length
    if config.streaming_cache_window is None:
        return length
    # Positions of an endless text are counted within the cache, whose window in a sliding-window layer is the layer's.
    window = max(config.streaming_cache_window, config.sliding_window_size or 0)
    return max(min(length, config.block_size), positions_needed(config.streaming_cache_first, window))


def cache_length(model: GPT, max_seq_length: int | None) -> int:
    """Return how many positions the cache of a streaming model needs, given the caller's request."""
    config = _config(model)
    asked = model.max_seq_length if max_seq_length is None else max_seq_length
    return min(asked, config.streaming_cache_first + config.streaming_cache_window)


def forward(
    original: Callable[..., Any],
    model: GPT,
    idx: Tensor,
    input_pos: Tensor | None = None,
    input_pos_maxp1: int | None = None,
    lm_head_chunk_size: int = 0,
) -> Any:
    """Run a model whose configuration `changes_model`, or whose layers read token ids or padding, or ignore the mask.

    Args:
        original: LitGPT's `GPT.forward`.
        model: The model.
        idx: Token ids, (B, T). Without a cache, and where padding is accepted, ids below zero are padding.
        input_pos: As in LitGPT.
        input_pos_maxp1: As in LitGPT.
        lm_head_chunk_size: As in LitGPT.

    Returns:
        What `original` returns.
    """
    config = _config(model)
    real_BT = real_tokens(idx) if input_pos is None else None
    documents = _find_documents(model, idx, input_pos, input_pos_maxp1)
    ids = TokenIds(idx.flatten()) if routers_need(config, "token_ids") else None
    if real_BT is not None:
        # Any valid id will do: causal attention hides it from the tokens before it, and experts do not see it.
        idx = idx.clamp_min(0)
    has_metadata = ids is not None or (real_BT is not None and config.mlp_class_name in MOE_CLASS_NAMES)
    if not (changes_model(config) or has_metadata):
        stand_in = _StandIn(model, _transformer(model))
        return original(stand_in, idx, input_pos, input_pos_maxp1, lm_head_chunk_size)
    restart = documents is not None and config.attention_document_restart_positions
    position = None
    if restart or config.position_embedding == "learned":
        position = torch.arange(idx.size(1), device=idx.device) if input_pos is None else input_pos
        position = position - documents.start_BT if restart else position

    stand_in = _StandIn(model, _StandInTransformer(model, position, documents))
    if has_metadata:
        stand_in.transformer.h = [
            _with_metadata(block, real_BT, ids) if has_experts(config, i) else block
            for i, block in enumerate(stand_in.transformer.h)
        ]
    if documents is not None:
        # Looked up once, so that all layers keep the same tables for their backward passes.
        tables = (model.cos[position], model.sin[position]) if restart else None
        stand_in.transformer.h = [
            _within_documents(block, documents, tables and _tables_of(block_idx, tables, config.rope_indices))
            for block_idx, block in enumerate(stand_in.transformer.h)
        ]
    elif config.streaming_cache_window is not None and input_pos is not None:
        stand_in.transformer.h = [_streaming(block, model, input_pos) for block in stand_in.transformer.h]
        # LitGPT looks up rows at these positions; they must exist, but are not used.
        stand_in.max_seq_length = max(model.max_seq_length, idx.size(1))
        stand_in.mask_cache = model.cos.new_zeros(1, 1, 1, 1).expand(1, 1, model.cos.size(0), 1)
        input_pos = input_pos.clamp(max=model.cos.size(0) - 1)
    return original(stand_in, idx, input_pos, input_pos_maxp1, lm_head_chunk_size)


def _config(model: GPT) -> "Config":
    return cast("Config", model.config)


def _transformer(model: GPT) -> Any:
    # A `ModuleDict`, whose parts LitGPT reads as attributes.
    return model.transformer


class _StandIn:
    # The attributes that LitGPT's forward reads.

    def __init__(self, model: GPT, transformer: Any) -> None:
        self.config = model.config
        self.max_seq_length = model.max_seq_length
        self.cos = model.cos
        self.sin = model.sin
        self.mask_cache = model.mask_cache
        if self.mask_cache is not None and _config(model).attention_class_name is not None:
            # LitGPT copies a row of the mask for every token, as long as the cache. Nothing reads it.
            self.mask_cache = self.mask_cache[..., :1]
        self.lm_head = model.lm_head
        self.transformer = transformer


class _StandInTransformer:
    def __init__(self, model: GPT, position: Tensor | None, documents: Documents | None) -> None:
        self.wte = _Embedding(model, position, documents)
        self.h: Any = _transformer(model).h
        self.ln_f = _transformer(model).ln_f


class _Embedding:
    # The token embedding, the embedding of the position, and dropout (Radford et al. 2019, as in nanoGPT).

    def __init__(self, model: GPT, position: Tensor | None, documents: Documents | None) -> None:
        self.model = model
        self.position = position
        self.overflow = None if documents is None else documents.overflow

    def __call__(self, idx: Tensor) -> Tensor:
        transformer, config = _transformer(self.model), _config(self.model)
        x_BTD = transformer.wte(idx)
        if config.position_embedding == "learned":
            x_BTD = x_BTD + transformer.wpe(self.position)
        if self.overflow is not None:
            x_BTD = x_BTD + self.overflow
        return F.dropout(x_BTD, config.embedding_dropout or 0.0, self.model.training)


# Stand-ins for blocks are called as LitGPT calls blocks: x, cos, sin, mask, input_pos, input_pos_maxp1.
_Block = Callable[..., Tensor]


def _with_metadata(block: _Block, real_BT: Tensor | None, ids: TokenIds | None) -> _Block:
    """Give a block the padding or the token ids along with its mask."""
    return lambda x, cos, sin, mask, *positions: block(x, cos, sin, BatchMetadata(mask, real_BT, ids), *positions)


def _within_documents(block: _Block, documents: Documents, tables: tuple[Tensor, ...] | None) -> _Block:
    """Give a block documents as its mask, and its own rotary tables if there are any."""
    return lambda x, cos, sin, _mask, *positions: block(x, *(tables or (cos, sin)), documents, *positions)


def _streaming(block: _Block, model: GPT, input_pos: Tensor) -> _Block:
    """Give a block the whole rotary tables and the positions in the text, as it counts positions itself."""
    tables = model.cos.unsqueeze(0), model.sin.unsqueeze(0)
    return lambda x, _cos, _sin, _mask, _pos, input_pos_maxp1: block(x, *tables, None, input_pos, input_pos_maxp1)


def _tables_of(block_idx: int, tables: tuple[Tensor, ...], indices: list[int] | None) -> tuple[Tensor, ...]:
    return tables if indices is None else tuple(table[..., indices[block_idx]] for table in tables)


def _find_documents(model: GPT, idx: Tensor, input_pos: Tensor | None, input_pos_maxp1: int | None) -> Documents | None:
    config = _config(model)
    boundary, token_id = config.attention_document_boundary, config.attention_document_token_id
    if boundary is None:
        return None
    if input_pos is None:
        return find_documents(idx, boundary, token_id)
    remembered = remember_documents(_starts_in_cache(model, idx), idx, input_pos, boundary, token_id)
    if input_pos.dim() == 1 and position_range(input_pos, input_pos_maxp1) == (0, idx.size(1)):
        return find_documents(idx, boundary, token_id)
    return remembered


def _starts_in_cache(model: GPT, idx: Tensor) -> Tensor:
    # Lives and dies with the cache of the first layer, and is never saved.
    cache = _transformer(model).h[0].attn.kv_cache
    if cache is None:
        raise TypeError("input_pos needs a cache: call `gpt.set_kv_cache()` first")
    if not hasattr(cache, "document_starts"):
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            starts_BS = torch.zeros(cache.k.size(0), cache.k.size(2) + 1, dtype=torch.long, device=idx.device)
        cache.register_buffer("document_starts", starts_BS, persistent=False)
    return cache.document_starts[: idx.size(0)]
