"""Room for documents in passes that are captured once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litgpt_moe_ext.attention.document_room import DocumentRoom, document_room
from litgpt_moe_ext.attention.documents import Extent, largest_extent, needed_extent
from litgpt_moe_ext.tokens.rows import Rows, host_copy
from tests.models import moe_config

EOS = 1


def inputs(rows_BT: torch.Tensor) -> torch.Tensor:
    """Return ids that know their copy in host memory, as those of a loader on a device do."""
    ids_BT = rows_BT.as_subclass(Rows).clone()[:, :-1]
    assert host_copy(ids_BT) is not None
    return ids_BT


@given(st.integers(1, 4), st.integers(1, 700), st.floats(0, 1), st.integers(0, 99))
def test_there_is_room_for_the_batch_and_little_more(B, T, share, seed):
    generator = torch.Generator().manual_seed(seed)
    ids_BT = inputs((torch.rand(B, T + 1, generator=generator) < share).long())
    exact = needed_extent(ids_BT, "eos", EOS)
    room = DocumentRoom("eos", EOS).needed(ids_BT)
    for size, needed, most in zip(room, exact, (B * T, T), strict=True):
        assert needed <= size <= min(most, max(needed + 15, 1.25 * needed))


@pytest.mark.parametrize(
    ("documents", "room"),
    [(1, 16), (16, 16), (17, 32), (127, 128), (128, 128), (129, 160), (160, 160), (1000, 1024), (1025, 1280)],
)
def test_room_grows_in_quarters_of_a_power_of_two(documents, room):
    """So that few sizes do for all batches."""
    ids_BT = torch.zeros(1, 4001, dtype=torch.int64)
    ids_BT[0, : documents - 1] = EOS
    assert DocumentRoom("eos", EOS).needed(inputs(ids_BT)).documents == room


def test_room_is_kept_with_the_very_ids():
    room = DocumentRoom("eos", EOS)
    ids_BT = torch.zeros(2, 200, dtype=torch.int64)
    assert room.needed(ids_BT) == Extent(160, 200)  # without a copy in host memory, for any batch
    room.reserve(ids_BT, (24, 128))
    ids_BT[:, ::2] = EOS  # a graph's ids change
    assert needed_extent(ids_BT, "eos", EOS) == Extent(24, 128)
    assert needed_extent(ids_BT.clone(), "eos", EOS) == largest_extent(2, 200)


def test_models_without_documents_need_none():
    assert document_room(moe_config()) is None
    documents = {"attention_document_boundary": "bos", "attention_document_token_id": 5}
    room = document_room(moe_config(attention_class_name="SinkAttention", **documents))
    ids_BT = inputs(torch.tensor([[0, 5, 0, 0, 5, 0, 0]]))
    assert room.needed(ids_BT) == (6, 6)
