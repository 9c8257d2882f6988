"""Rows of token ids: which tensors know what they are in host memory, and when they no longer do."""

import pytest
import torch
from torch import Tensor

from litgpt_moe_ext.tokens.padding import PADDING, PaddedRows
from litgpt_moe_ext.tokens.rows import Rows, host_copy


def loaded(kind: type[Rows], B: int = 2) -> Rows:
    rows = torch.arange(B * 7).view(B, 7)
    rows[-1, 4:] = PADDING
    return rows.as_subclass(kind)


def as_fabric_moves(rows: Tensor) -> Tensor:
    return rows.to(torch.device("cpu"), non_blocking=True)


@pytest.mark.parametrize("kind", [Rows, PaddedRows])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("length", [6, 4])
def test_inputs_of_moved_rows_have_a_host_copy(kind: type[Rows], B: int, length: int) -> None:
    rows = loaded(kind, B)
    moved = as_fabric_moves(rows)
    assert type(moved) is kind
    # As LitGPT cuts them.
    inputs, targets = moved[:, 0:length].contiguous().long(), moved[:, 1 : length + 1].contiguous().long()
    assert type(inputs) is type(targets) is Tensor
    copy = host_copy(inputs)
    assert copy is not None
    assert torch.equal(copy, inputs)
    assert host_copy(targets) is host_copy(moved + 0) is host_copy(inputs + 0) is host_copy(inputs[:1]) is None
    if kind is Rows:
        assert copy.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_an_input_without_a_target_is_padding() -> None:
    """And no other: 0 is an id like all others."""
    rows = torch.tensor([[4, 0, 3, PADDING], [0, 0, 0, 0]]).as_subclass(PaddedRows)
    assert rows[:, :-1].tolist() == rows[:, 0:3].tolist() == [[4, 0, PADDING], [0, 0, 0]]
    assert rows[1:, :2].tolist() == [[0, 0]]
    assert rows[:, 1:].tolist() == [[0, 3, PADDING], [0, 0, 0]]


def test_copies_of_moved_rows_stay_copies_of_the_first() -> None:
    rows = loaded(PaddedRows)
    copy = host_copy(as_fabric_moves(as_fabric_moves(rows.pin_memory() if torch.cuda.is_available() else rows)).clone())
    assert copy is not None
    assert torch.equal(copy, rows)


def test_changes_in_place_end_it() -> None:
    moved = as_fabric_moves(loaded(Rows)).clone()
    early = moved[:, :-1]
    early[0, 0] = 5
    assert host_copy(early) is None
    moved[0, 0] = 5
    assert host_copy(moved) is None
    assert host_copy(moved[:, :-1]) is None


def test_tensors_without_one() -> None:
    assert host_copy(torch.zeros(2, 3)) is None
    assert host_copy(loaded(Rows)) is None
    assert host_copy(loaded(Rows)[:, :-1]) is None
    with torch.inference_mode():
        # torch does not count changes of tensors that are made here.
        assert host_copy(as_fabric_moves(loaded(Rows))[:, :-1].contiguous()) is None


@pytest.mark.parametrize(
    "operation",
    [
        lambda ids: ids.sum(dim=1, keepdim=True),
        lambda ids: ids.sort(dim=0, descending=True).values,
        lambda ids: torch.stack([ids, ids], dim=1),
        lambda ids: ids.to(dtype=torch.int32),
        lambda ids: ids.clone(memory_format=torch.contiguous_format),
        lambda ids: ids[:, 2:],
    ],
)
def test_operations_are_those_of_ordinary_tensors(operation) -> None:
    rows = loaded(Rows)
    found, expected = operation(rows), operation(rows.as_subclass(Tensor))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
