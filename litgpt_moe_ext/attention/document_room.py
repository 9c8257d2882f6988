"""Room for the documents of many batches, where a model's passes are captured once (`training/steps/room.py`).

Shape legend: B batch, T tokens.
"""

from typing import TYPE_CHECKING, cast

import litgpt
from torch import Tensor

from litgpt_moe_ext.attention.documents import Boundary, Extent, needed_extent, reserve_extent

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# Steps by which room grows: quarters of a power of two, and no less than this. A batch seldom needs more than those
# before it then, and what is not needed costs a kernel a quarter more blocks at most, which end at once.
_LEAST = 16


class DocumentRoom:
    """As many documents as a batch has, and as long ones, rounded up.

    Args:
        boundary: Whether `token_id` ends a document or begins one.
        token_id: Id of the EOS or BOS token.
    """

    def __init__(self, boundary: Boundary, token_id: int) -> None:
        self._boundary: Boundary = boundary
        self._token_id = token_id

    def needed(self, ids_BT: Tensor) -> Extent:
        """Return the room for a batch and others like it; a device is not asked."""
        B, T = ids_BT.shape
        documents, longest = needed_extent(ids_BT, self._boundary, self._token_id)
        return Extent(min(_with_spare(documents), B * T), min(_with_spare(longest), T))

    def reserve(self, ids_BT: Tensor, sizes: tuple[int, ...]) -> None:
        """Have the documents of `ids_BT`, whose values will change, found in this room."""
        reserve_extent(ids_BT, Extent(*sizes))


def document_room(config: litgpt.Config) -> DocumentRoom | None:
    """Return the room that a model's batches need, or None if its attention knows no documents."""
    ours = cast("Config", config)
    boundary, token_id = ours.attention_document_boundary, ours.attention_document_token_id
    return None if boundary is None else DocumentRoom(boundary, token_id)


def _with_spare(n: int) -> int:
    step = max(_LEAST, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step
