"""Generation of any length: a cache of the first tokens and the last ones (StreamingLLM, Xiao et al. 2023,
arXiv:2309.17453).

Positions are counted within the cache: the last tokens keep their distances, and the first ones move along, never
further away than the cache is long. The cache therefore holds keys before their rotation.

Shape suffixes: B batch, H query heads, G key/value heads, T queries, S keys, D head size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn

from litgpt_moe_ext.attention.sinks import grouped_matmul, sink_softmax

# Queries are worked off in pieces of this many, which bounds the memory and the number of positions that are needed.
CHUNK = 256

# Rotates (B, heads, T, D) to the given positions, (T,).
Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def positions_needed(first: int, window: int) -> int:
    """Return how many rows the rotary tables need for a streaming cache."""
    return first + window + CHUNK


class StreamingKVCache(nn.Module):
    """Keys, not rotated yet, and values of the first tokens and the last ones.

    Args:
        batch_size: Largest batch the cache is for.
        n_query_groups: Number of key/value heads, G.
        head_size: D.
        first: Number of first tokens to keep.
        window: Number of last tokens to keep, which for every query includes itself.
        device: Where to put the buffers.
        dtype: Their type.
    """

    def __init__(
        self,
        batch_size: int,
        n_query_groups: int,
        head_size: int,
        first: int,
        window: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (batch_size, n_query_groups, first + window, head_size)
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.first = first
        self.window = window
        self.n_seen = 0

    def reset_parameters(self) -> None:
        """Forget everything."""
        nn.init.zeros_(self.k)
        nn.init.zeros_(self.v)
        self.n_seen = 0

    def extend(
        self, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, begin: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take in new tokens.

        Args:
            k_BGTD: Their keys.
            v_BGTD: Their values.
            begin: Position of the first of them in the text; 0 starts a new text.

        Returns:
            Keys and values, (B, G, S, D), of what was in the cache and of the new tokens, and their positions in the
            text, (S,). The first tokens of the text come first, the others in any order.

        Raises:
            ValueError: If tokens are left out or come again.
        """
        if begin not in (0, self.n_seen):
            raise ValueError(
                f"the streaming cache has seen {self.n_seen} tokens and cannot go on at position {begin}, because it "
                "drops tokens for good. Speculative decoding and continuing an earlier text need a full cache: set "
                "streaming_cache_first and streaming_cache_window to null"
            )
        if self.k.dtype != k_BGTD.dtype:
            self.k, self.v = self.k.to(k_BGTD.dtype), self.v.to(v_BGTD.dtype)
        first, window, device = self.first, self.window, self.k.device
        B, end = k_BGTD.size(0), begin + k_BGTD.size(2)
        n_old = min(begin, first + window)
        position_S = torch.cat((self._position(torch.arange(n_old, device=device), begin),
                                torch.arange(begin, end, device=device)))  # fmt: skip
        k_BGSD = torch.cat((self.k[:B, :, :n_old], k_BGTD), dim=2)
        v_BGSD = torch.cat((self.v[:B, :, :n_old], v_BGTD), dim=2)

        stay = torch.cat((torch.arange(begin, min(end, first), device=device) if begin < first else position_S[:0],
                          torch.arange(max(begin, first, end - window), max(end, first), device=device)))  # fmt: skip
        slot = torch.where(stay < first, stay, first + (stay - first) % window)
        self.k[:B].index_copy_(2, slot, k_BGTD.index_select(2, stay - begin))
        self.v[:B].index_copy_(2, slot, v_BGTD.index_select(2, stay - begin))
        self.n_seen = end
        return k_BGSD, v_BGSD, position_S

    def _position(self, slot: torch.Tensor, n_seen: int) -> torch.Tensor:
        # The last tokens go round in a ring behind the first ones.
        newest = n_seen - 1
        in_ring = newest - (newest - slot) % self.window
        return torch.where(slot < self.first, slot, in_ring)


def streaming_attention(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    cache: StreamingKVCache,
    begin: int,
    rotate: Rotate,
    sinks_H: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attend to the first tokens and to the last ones up to the query.

    Args:
        q_BHTD: Queries, not rotated.
        k_BGTD: Keys, not rotated.
        v_BGTD: Values.
        cache: What came before; takes in the keys and values.
        begin: Position of the first query in the text.
        rotate: Applies the rotary embedding.
        sinks_H: One logit per query head, or `None`.
        scale: Multiplied to the scores.

    Returns:
        (B, H, T, D).
    """
    outs = []
    for offset in range(0, q_BHTD.size(2), CHUNK):
        piece = slice(offset, offset + CHUNK)
        k_BGSD, v_BGSD, position_S = cache.extend(k_BGTD[:, :, piece], v_BGTD[:, :, piece], begin + offset)
        query_T = torch.arange(begin + offset, cache.n_seen, device=q_BHTD.device)
        scores_BHTS = _scores(q_BHTD[:, :, piece], k_BGSD, query_T, position_S, cache, rotate) * scale
        share_BHTS = sink_softmax(scores_BHTS, sinks_H).to(v_BGSD.dtype)
        outs.append(grouped_matmul(share_BHTS, v_BGSD))
    return torch.cat(outs, dim=2)


def _scores(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    query_T: torch.Tensor,
    position_S: torch.Tensor,
    cache: StreamingKVCache,
    rotate: Rotate,
) -> torch.Tensor:
    n_first = min(cache.first, cache.n_seen)
    first_F, recent_R = position_S[:n_first], position_S[n_first:]
    # Only distances count, and small positions keep the tables short.
    origin = max(0, cache.n_seen - query_T.numel() - cache.window)

    # To the first tokens, queries stand at the end of the cache at most; to the others at their true distance.
    far_q = rotate(q_BHTD, query_T.clamp(max=cache.first + cache.window - 1))
    near_q = rotate(q_BHTD, query_T - origin)
    far_BHTF = grouped_matmul(far_q, rotate(k_BGSD[:, :, :n_first], first_F).mT)
    near_BHTR = grouped_matmul(near_q, rotate(k_BGSD[:, :, n_first:], recent_R - origin).mT)

    distance_TR = query_T.unsqueeze(-1) - recent_R
    far_BHTF = far_BHTF.masked_fill(first_F > query_T.unsqueeze(-1), -math.inf)
    near_BHTR = near_BHTR.masked_fill((distance_TR < 0) | (distance_TR >= cache.window), -math.inf)
    return torch.cat((far_BHTF, near_BHTR), dim=-1)
