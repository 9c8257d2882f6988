"""Generation of any length: a cache of the first and last tokens (StreamingLLM, arXiv:2309.17453).

Positions are counted within the cache: the last tokens keep their distances, and the first ones move along, so that
they are never further away than the cache is long. Keys are therefore stored before their rotation.

Shape legend: B batch, H query heads, G key/value heads, T queries, S keys, d head size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.attention.sinks import Softmax, grouped_matmul, sink_softmax

# Queries are processed in chunks of this many, which bounds memory and the number of positions.
CHUNK = 256

# Rotates (B, heads, T, d) to the given positions, (T,).
Rotate = Callable[[Tensor, Tensor], Tensor]


def positions_needed(first: int, window: int) -> int:
    """Return how many rows the rotary tables need for a streaming cache."""
    return first + window + CHUNK


class StreamingKVCache(nn.Module):
    """Keys, not rotated yet, and values of the first and last tokens.

    Args:
        shape: Largest batch, number of key/value heads, head size: (B, G, d).
        first: Number of first tokens to keep.
        window: Number of last tokens to keep, including the query itself.
        device: Where to put the buffers.
        dtype: Their type.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        first: int,
        window: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        B, G, d = shape
        self.k: Tensor
        self.v: Tensor
        for name in ("k", "v"):
            zeros_BGSd = torch.zeros(B, G, first + window, d, device=device, dtype=dtype)
            self.register_buffer(name, zeros_BGSd, persistent=False)
        self.first = first
        self.window = window
        self.n_seen = 0

    def reset_parameters(self) -> None:
        """Empty the cache."""
        nn.init.zeros_(self.k)
        nn.init.zeros_(self.v)
        self.n_seen = 0

    def extend(self, k_BGTd: Tensor, v_BGTd: Tensor, begin: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add new tokens.

        Args:
            k_BGTd: Their keys.
            v_BGTd: Their values.
            begin: Position in the text of the first new token; 0 starts a new text.

        Returns:
            Keys and values, (B, G, S, d), of the cached and the new tokens, and their positions in the text, (S,). The
            first tokens of the text come first, the others in any order.

        Raises:
            ValueError: If tokens are skipped or repeated.
        """
        if begin not in (0, self.n_seen):
            raise ValueError(
                f"the streaming cache has seen {self.n_seen} tokens and cannot go on at position {begin}, because it "
                "drops tokens for good. Speculative decoding and continuing an earlier text need a full cache: set "
                "streaming_cache_first and streaming_cache_window to null"
            )
        if self.k.dtype != k_BGTd.dtype:
            self.k, self.v = self.k.to(k_BGTd.dtype), self.v.to(v_BGTd.dtype)
        first, window, device = self.first, self.window, self.k.device
        B, end = k_BGTd.size(0), begin + k_BGTd.size(2)
        n_old = min(begin, first + window)
        position_S = torch.cat((self._position(torch.arange(n_old, device=device), begin),
                                torch.arange(begin, end, device=device)))  # fmt: skip
        k_BGSd = torch.cat((self.k[:B, :, :n_old], k_BGTd), dim=2)
        v_BGSd = torch.cat((self.v[:B, :, :n_old], v_BGTd), dim=2)

        stay = torch.cat((torch.arange(begin, min(end, first), device=device) if begin < first else position_S[:0],
                          torch.arange(max(begin, first, end - window), max(end, first), device=device)))  # fmt: skip
        slot = torch.where(stay < first, stay, first + (stay - first) % window)
        self.k[:B].index_copy_(2, slot, k_BGTd.index_select(2, stay - begin))
        self.v[:B].index_copy_(2, slot, v_BGTd.index_select(2, stay - begin))
        self.n_seen = end
        return k_BGSd, v_BGSd, position_S

    def _position(self, slot: Tensor, n_seen: int) -> Tensor:
        # The last tokens are in a ring buffer after the first ones.
        newest = n_seen - 1
        in_ring = newest - (newest - slot) % self.window
        return torch.where(slot < self.first, slot, in_ring)


class Stream(NamedTuple):
    """Where a text continues.

    Attributes:
        cache: The preceding tokens; the new keys and values are added to it.
        begin: Position of the first new token in the text.
        rotate: Applies the rotary embedding.
    """

    cache: StreamingKVCache
    begin: int
    rotate: Rotate


def streaming_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, softmax: Softmax, stream: Stream) -> Tensor:
    """Attend to the first tokens and to the last tokens up to the query.

    Args:
        q_BHTd: Queries, not rotated.
        k_BGTd: Keys, not rotated.
        v_BGTd: Values.
        softmax: How scores become weights; its dropout and kernel are ignored.
        stream: Where the text continues.

    Returns:
        (B, H, T, d).
    """
    cache, begin, rotate = stream
    outs = []
    for offset in range(0, q_BHTd.size(2), CHUNK):
        piece = slice(offset, offset + CHUNK)
        k_BGSd, v_BGSd, position_S = cache.extend(k_BGTd[:, :, piece], v_BGTd[:, :, piece], begin + offset)
        query_T = torch.arange(begin + offset, cache.n_seen, device=q_BHTd.device)
        scores_BHTS = _scores(q_BHTd[:, :, piece], k_BGSd, query_T, position_S, cache, rotate) * softmax.scale
        share_BHTS = sink_softmax(scores_BHTS, softmax.sinks_H).to(v_BGSd.dtype)
        outs.append(grouped_matmul(share_BHTS, v_BGSd))
    return torch.cat(outs, dim=2)


def _scores(
    q_BHTd: Tensor,
    k_BGSd: Tensor,
    query_T: Tensor,
    position_S: Tensor,
    cache: StreamingKVCache,
    rotate: Rotate,
) -> Tensor:
    n_first = min(cache.first, cache.n_seen)
    first_F, recent_R = position_S[:n_first], position_S[n_first:]
    # Only distances matter, and small positions keep the tables short.
    origin = max(0, cache.n_seen - query_T.numel() - cache.window)

    # Seen from the first tokens, a query is at most at the end of the cache; from the others, at its true distance.
    far_q = rotate(q_BHTd, query_T.clamp(max=cache.first + cache.window - 1))
    near_q = rotate(q_BHTd, query_T - origin)
    far_BHTF = grouped_matmul(far_q, rotate(k_BGSd[:, :, :n_first], first_F).mT)
    near_BHTR = grouped_matmul(near_q, rotate(k_BGSd[:, :, n_first:], recent_R - origin).mT)

    distance_TR = query_T.unsqueeze(-1) - recent_R
    far_BHTF = far_BHTF.masked_fill(first_F > query_T.unsqueeze(-1), -math.inf)
    near_BHTR = near_BHTR.masked_fill((distance_TR < 0) | (distance_TR >= cache.window), -math.inf)
    return torch.cat((far_BHTF, near_BHTR), dim=-1)
