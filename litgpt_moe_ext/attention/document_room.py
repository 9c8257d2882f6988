"""Room for the documents of many batches when passes are captured once (`training/steps/graphs/dynamic_sizes.py`).

Shape legend: B batch, T tokens.
"""

from typing import TYPE_CHECKING, cast

import litgpt
from torch import Tensor

from litgpt_moe_ext.attention.documents import Boundary, Extent, needed_extent, reserve_extent

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# Room grows in quarters of a power of two, and by no less than this. A batch then seldom needs more than those before
# it, and unused room costs a kernel at most a quarter more blocks, which end at once.
_LEAST = 16


class DocumentRoom:
    """The number and the largest length of a batch's documents, rounded up.

    Args:
        boundary: Whether `token_id` ends a document or begins one.
        token_id: Id of the EOS or BOS token.
    """

    def __init__(self, boundary: Boundary, token_id: int) -> None:
        self._boundary: Boundary = boundary
        self._token_id = token_id

    def needed(self, ids_BT: Tensor) -> Extent:
        """Return the room for a batch and others like it, without reading from a device."""
        B, T = ids_BT.shape
        documents, longest = needed_extent(ids_BT, self._boundary, self._token_id)
        return Extent(min(_with_spare(documents), B * T), min(_with_spare(longest), T))

    def reserve(self, ids_BT: Tensor, sizes: tuple[int, ...]) -> None:
        """Use this room to find the documents of `ids_BT`, whose values will change."""
        reserve_extent(ids_BT, Extent(*sizes))


def document_room(config: litgpt.Config) -> DocumentRoom | None:
    """Return the room that a model's batches need, or None if its attention does not separate documents."""
    ours = cast("Config", config)
    boundary, token_id = ours.attention_document_boundary, ours.attention_document_token_id
    return None if boundary is None else DocumentRoom(boundary, token_id)


def _with_spare(n: int) -> int:
    step = max(_LEAST, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step
