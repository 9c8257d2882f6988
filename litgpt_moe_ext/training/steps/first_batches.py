"""Checks that the first batch of a data loader, of any package's data module, suits LitGPT's loop.

The loop takes the first T tokens of each row as inputs, the same shifted by one as targets, and casts both to int64.
Unchecked, it would silently turn ids between 0 and 1 into 0, and drop the end of longer rows.

Shape legend: B batch, T tokens of a training sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError, refuse_first
from litgpt_moe_ext.tokens.padding import PADDING, accepts_padding
from litgpt_moe_ext.tokens.rows import host_copy


class FirstBatches:
    """Checks the first batch of each loader, without waiting for a device.

    Args:
        sequence_length: T, tokens of a training sequence.
        vocabulary: Number of ids that the model knows.
    """

    def __init__(self, sequence_length: int, vocabulary: int) -> None:
        self._row_length, self._vocabulary = sequence_length + 1, vocabulary
        self._seen: set[str] = set()

    def check(self, loader: str, batch: Any) -> None:
        """Check a batch if it is its loader's first.

        Args:
            loader: The data module's method that the batch comes from.
            batch: Should be token ids or `PADDING`, (B, T + 1), of any integer type.

        Raises:
            SettingsError: If it is anything else.
        """
        if loader in self._seen:
            return
        self._seen.add(loader)
        if not self._is_right(batch):
            raise SettingsError(
                f"data: a batch of {loader} is {_described(batch)}; it must be one tensor of token ids, integers of "
                f"the shape (train.micro_batch_size, {self._row_length}), a row being the tokens of a training "
                "sequence and the one after them"
            )
        # Ids that exist only on a GPU are not checked, as that would wait for it.
        if (ids := batch if batch.device.type == "cpu" else host_copy(batch)) is not None:
            refuse_first(self._unknown(loader, ids.long()))

    def _is_right(self, batch: Any) -> bool:
        return (
            isinstance(batch, Tensor)
            and not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool)
            and batch.ndim == 2
            and len(batch) > 0
            and batch.shape[1] == self._row_length
        )

    def _unknown(self, loader: str, ids: Tensor) -> Iterator[str]:
        if (largest := int(ids.max())) >= self._vocabulary:
            yield (
                f"data: a batch of {loader} has the token id {largest}, beyond the model's padded_vocab_size: "
                f"{self._vocabulary}; set model_config.padded_vocab_size to at least {largest + 1}, or give data of "
                "the model's tokenizer"
            )
        below = ids[(ids < 0) & ~(accepts_padding() & (ids == PADDING))]
        if below.numel():
            yield (
                f"data: a batch of {loader} has the token id {int(below[0])}; ids must not be below zero, except "
                f"{PADDING} for padding, where the data module calls litgpt_moe_ext.tokens.padding.accept_padding"
            )


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"of the type {str(batch.dtype).removeprefix('torch.')} and the shape {tuple(batch.shape)}"
    if isinstance(batch, dict):
        return f"a {type(batch).__name__} of {', '.join(map(str, batch))}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
