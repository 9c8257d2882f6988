"""Sliding-window attention: every token sees itself and the `window - 1` tokens before it.

Shape legend: B batch, H query heads, G key/value heads, T tokens, d head size. In comments W is the window and N the
number of blocks of W tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Attention over (q, k, v, mask), where a mask of None means causal.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sliding_window_attention(attend: Attend, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, window: int) -> Tensor:
    """Attend within a causal window, at a cost that grows with T * window instead of T * T.

    The sequence is cut into blocks of `window` tokens. The first block needs nothing but itself. Every other one sees
    itself and its predecessor through one mask of shape (W, 2W) that all of them share, so they run as one batch and no
    mask of T * T elements ever exists.

    Args:
        attend: Computes attention from (q, k, v, mask); no query may influence the result of another.
        q_BHTd: Queries, (B, H, T, d).
        k_BGTd: Keys, (B, G, T, d).
        v_BGTd: Values, (B, G, T, d).
        window: Number of visible tokens, the token itself included.

    Returns:
        The output of `attend`, (B, H, T, d).
    """
    B, _, T, _ = q_BHTd.shape
    if window >= T:
        return attend(q_BHTd, k_BGTd, v_BGTd, None)

    first = attend(q_BHTd[:, :, :window], k_BGTd[:, :, :window], v_BGTd[:, :, :window], None)
    q_blocks = _blocks(q_BHTd, window)[:, 1:]
    k_blocks, v_blocks = _blocks(k_BGTd, window), _blocks(v_BGTd, window)
    rest = attend(
        q_blocks.flatten(0, 1),
        torch.cat((k_blocks[:, :-1], k_blocks[:, 1:]), dim=3).flatten(0, 1),
        torch.cat((v_blocks[:, :-1], v_blocks[:, 1:]), dim=3).flatten(0, 1),
        _two_block_mask(window, q_BHTd.device),
    )
    rest = rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((first, rest[:, :, : T - window]), dim=2)


def window_mask(position: Tensor, n_keys: int, window: int) -> Tensor:
    """Tell which of the first `n_keys` positions lie in the causal window of each query.

    Args:
        position: Positions of the queries, (T,) or (B, T), integer.
        n_keys: Number of keys, S; key j has position j.
        window: Number of visible positions, the query's own included.

    Returns:
        True where a query may look, bool, (T, S) or (B, 1, T, S).
    """
    distance = position.unsqueeze(-1) - torch.arange(n_keys, device=position.device)
    visible = (distance >= 0) & (distance < window)
    return visible if position.dim() == 1 else visible.unsqueeze(1)


def _blocks(x_BHTd: Tensor, window: int) -> Tensor:
    # (B, N, H, W, d). Padding goes to the end, where only queries that are padding themselves can see it.
    padding = -x_BHTd.size(2) % window
    return F.pad(x_BHTd, (0, 0, 0, padding)).unflatten(2, (-1, window)).transpose(1, 2)


def _two_block_mask(window: int, device: torch.device) -> Tensor:
    # Query i of a block is key `window + i` of the two blocks it sees.
    return window_mask(torch.arange(window, 2 * window, device=device), 2 * window, window)
