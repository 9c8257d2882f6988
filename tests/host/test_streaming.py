"""What litdata streams, read as LitGPT's data modules read it."""

import litgpt.model  # noqa: F401 applies the seams
import torch
from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming.writer import BinaryWriter


def test_sequences_outlive_their_chunks(tmp_path):
    """Each chunk has a single sequence, so litdata unmaps it while its batch is being made."""
    size, count = 4096, 6
    writer = BinaryWriter(str(tmp_path), chunk_size=size, item_loader=TokensLoader())
    for number in range(count):
        writer[number] = torch.full((size,), number)
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(tmp_path), item_loader=TokensLoader(block_size=size), shuffle=True, seed=1)
    # Views of one place would end this process below.
    first, again = dataset[0], dataset[0]
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()
    rows = torch.cat(list(StreamingDataLoader(dataset, batch_size=3)))
    assert sorted(rows[:, 0].tolist()) == list(range(count))
    assert (rows == rows[:, :1]).all()
