"""What MoE layers need to know about a batch besides its hidden states.

It is passed as an argument of their blocks, so neither threads that share a model nor activation checkpointing, which
recomputes a batch after others, can mix up batches.

Shape legend: B batch, T tokens (of one sequence, or all of a batch once flattened), E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Odd 64-bit constants of the finaliser of MurmurHash3, as signed integers.
_MIX = (-49064778989728563, -4265267296055464877)


class TokenIds:
    """The ids of the tokens of a batch, and their hashes, which all layers of a model share.

    Args:
        ids_T: The ids, int64.

    Attributes:
        ids_T: The same.
    """

    def __init__(self, ids_T: Tensor) -> None:
        self.ids_T = ids_T
        self._hashes: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.ids_T)

    def hashes(self, n_expert: int) -> Tensor:
        """Return a pseudo-random number for each token and expert, int64 (T, E); computed once for all layers."""
        if torch.compiler.is_compiling():
            # A compiler merges equal computations itself, and does not allow caching in recomputed code.
            return self._hash(n_expert)
        if n_expert not in self._hashes:
            self._hashes[n_expert] = self._hash(n_expert)
        return self._hashes[n_expert]

    def _hash(self, n_expert: int) -> Tensor:
        experts_E = torch.arange(n_expert, device=self.ids_T.device)
        return _mixed(self.ids_T.unsqueeze(1) * n_expert + experts_E)


@dataclass(frozen=True, slots=True)
class BatchMetadata:
    """Replaces a block's attention mask if its MoE layer needs more than hidden states.

    Attributes:
        mask: The mask itself.
        real_BT: True for text, False for padding, bool; None if all is text.
        ids: The token ids, for routers that need them; otherwise None.
    """

    mask: Any
    real_BT: Tensor | None
    ids: TokenIds | None


def _mixed(x: Tensor) -> Tensor:
    # The finaliser of MurmurHash3 spreads neighbouring integers evenly over all 64 bits; int64 wraps around.
    for factor in _MIX:
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return x ^ ((x >> 33) & 0x7FFFFFFF)
