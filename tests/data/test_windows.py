import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litgpt_moe_ext.data.packing import best_fit, cut_documents, document_lengths, first_documents, pack
from litgpt_moe_ext.data.windows import DocumentWindows, StreamWindows, TokenStream
from litgpt_moe_ext.tokens.padding import PADDING


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 7), st.randoms(use_true_random=False))
def test_shards_read_like_one_array(sizes, block_size, random):
    whole = np.arange(sum(sizes), dtype=np.uint32)
    shards = np.split(whole, np.cumsum(sizes)[:-1])
    shards = [shard.astype(random.choice([np.uint16, np.uint32])) for shard in shards]
    if len(whole) < block_size + 1:
        with pytest.raises(ValueError, match=f"the data has {len(whole)};"):
            StreamWindows(shards, block_size)
        return
    windows = StreamWindows(shards, block_size)
    indices = np.array([random.randrange(len(windows)) for _ in range(10)])
    expected = [list(range(i * block_size, (i + 1) * block_size + 1)) for i in indices]
    assert windows.gather(indices).tolist() == expected
    everything = [row.tolist() for row in windows]
    assert [token for row in everything for token in row[1:]] == list(range(1, len(windows) * block_size + 1))
    start = random.randrange(len(whole))
    out = np.empty(random.randrange(len(whole) - start + 1), np.int64)
    TokenStream(shards).copy_to(out, start)
    assert out.tolist() == list(range(start, start + len(out)))


def test_document_lengths():
    shards = [np.array([5, 0, 7]), np.array([8, 0]), np.array([0, 9])]
    assert document_lengths(shards, 0).tolist() == [2, 3, 1, 1]
    assert document_lengths(shards[:2], 0).tolist() == [2, 3]
    assert document_lengths([np.array([4, 5])], 0).tolist() == [2]
    # One token begins and ends documents, as in GPT-2.
    assert document_lengths([np.array([0, 5, 0, 0, 0]), np.array([0, 7, 8])], 0, bos_id=0).tolist() == [3, 2, 3]
    assert document_lengths([np.array([1, 5, 0, 1, 0])], 0, bos_id=1).tolist() == [3, 2]


def test_first_documents_of_several_shards():
    shards = [np.array([5, 0, 7, 0]), np.array([8, 0, 6, 6, 0]), np.array([9, 0])]
    assert [shard.tolist() for shard in first_documents(shards, 3, 0)] == [[5, 0, 7, 0], [8, 0]]
    assert [shard.tolist() for shard in first_documents(shards, 2, 0)] == [[5, 0, 7, 0]]
    assert len(first_documents(shards, 9, 0)) == 3


def test_long_documents_share_one_token_between_pieces():
    starts, lengths = cut_documents(np.array([3, 1, 10, 5, 6]), block_size=4)
    assert list(zip(starts, lengths, strict=True)) == [(0, 3), (4, 5), (8, 5), (12, 2), (14, 5), (19, 5), (23, 2)]


def test_best_fit_by_hand():
    # 7 opens a window (room 3 left), 6 another (4); the first 3 fits the fuller one exactly, the second the other.
    assert best_fit(np.array([6, 7, 3, 3]), 10).tolist() == [0, 1, 1, 0]
    # 2 goes where 3 are left, not where 4 are, although that window opened later.
    assert best_fit(np.array([2, 6, 7]), 10).tolist() == [0, 1, 0]
    assert best_fit(np.array([10, 10]), 10).tolist() == [0, 1]
    assert best_fit(np.array([1, 10, 1]), 10).tolist() == [0, 1, 0]
    assert best_fit(np.array([], np.int64), 10).tolist() == []


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(2, 11), st.booleans())
def test_every_token_is_a_target_once(lengths, block_size, together):
    """Of every document all tokens but the first are targets exactly once, after the token that precedes them."""
    documents, position = [], 1
    for length in lengths:
        documents.append([*range(position, position + length - 1), 0])
        position += length - 1
    stream = np.array(sum(documents, []))
    assert document_lengths([stream], 0).tolist() == lengths
    shards = np.array_split(stream, 3)
    windows = DocumentWindows(shards, pack(np.array(lengths), block_size, together), block_size)
    pairs, targets = [], 0
    for row in windows:
        row = row.tolist()
        pairs += [(a, b) for a, b in zip(row, row[1:], strict=False) if a > 0 and b != PADDING]
        used = [token for token in row if token != PADDING]
        assert row == used + [PADDING] * (len(row) - len(used))
        targets += len(used) - 1
    expected = [(a, b) for document in documents for a, b in zip(document, document[1:], strict=False)]
    assert sorted(pairs) == sorted(expected)
    assert windows.targets == targets
    if not together:
        assert len(windows) == sum(-(-(length - 1) // block_size) for length in lengths)


def test_best_fit_pads_little():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5000).astype(np.int64) + 2
    capacity = 1025
    _, pieces = cut_documents(lengths, capacity - 1)
    windows = best_fit(pieces, capacity).max() + 1
    assert windows * capacity < pieces.sum() * 1.005


def test_batches_of_document_windows():
    packing = pack(np.array([3, 2, 4]), 3, together=True)
    windows = DocumentWindows([np.array([7, 8, 0, 9, 0]), np.array([1, 2, 3, 0])], packing, 3, "data")
    assert windows.gather(np.array([2, 0, 1])).tolist() == [[1, 2, 3, 0], [7, 8, 0, -100], [9, 0, -100, -100]]
