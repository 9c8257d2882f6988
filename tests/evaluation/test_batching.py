"""The `batch_size` setting."""

import pytest
import torch

from litgpt_moe_ext.evaluation.batching import BatchSize, pad_right

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only named, never used


def run_with_memory_for(limit, batch_size: BatchSize, n_items: int) -> list[int]:
    """Return the sizes of the batches that fit if `limit(first item)` requests fit into memory."""

    def function(batch):
        if len(batch) > limit(batch[0]):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch

    batches = list(batch_size.run(range(n_items), function))
    assert [item for batch in batches for item in batch] == list(range(n_items))
    return [len(batch) for batch in batches]


def test_fixed_size(capsys):
    assert run_with_memory_for(lambda _: 100, BatchSize.parse(4, CUDA), 10) == [4, 4, 2]
    assert BatchSize.parse("3", CPU) == BatchSize(3)
    assert capsys.readouterr().out == "", "nothing was chosen"


def test_automatic_size_is_halved_until_it_fits(capsys):
    assert run_with_memory_for(lambda _: 20, BatchSize.parse("auto", CUDA), 40) == [16, 16, 8]
    assert capsys.readouterr().out == "batch_size: auto chose 16.\n"


def test_no_batch_that_did_not_fit_is_tried_again():
    """As few requests as there are fill no larger one."""
    tried = []

    def function(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    list(BatchSize.parse("auto", CUDA).run(range(9), function))
    assert tried == [9, 8, 4, 2, 2, 2, 2, 1]


def test_automatic_size_is_searched_again_as_requests_get_shorter():
    def limit(item):
        return 16 if item < 64 else 32

    assert run_with_memory_for(limit, BatchSize.parse("auto", CUDA), 128) == [16] * 8
    assert run_with_memory_for(limit, BatchSize.parse("auto:2", CUDA), 128) == [16] * 4 + [32] * 2
    assert BatchSize.parse("auto:1", CUDA) == BatchSize.parse("auto", CUDA)


def test_automatic_size_on_cpu_is_fixed_and_announced(capsys):
    assert BatchSize.parse("auto:4", CPU) == BatchSize(8)
    assert capsys.readouterr().out == "batch_size: auto:4 means 8 on the CPU.\n"


def test_running_out_of_memory_names_the_setting():
    for batch_size, limit in ((BatchSize.parse(8, CUDA), 4), (BatchSize.parse("auto", CUDA), 0)):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run_with_memory_for(lambda _, limit=limit: limit, batch_size, 20)
        assert "batch_size: " in caught.value.__notes__[0]


def test_other_errors_pass_through():
    def function(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(BatchSize.parse("auto", CUDA).run(range(3), function))


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many", "auto:", "auto:0", "auto:x", "autos", ""])
def test_malformed_setting_is_refused(value):
    with pytest.raises(ValueError, match="batch_size: "):
        BatchSize.parse(value, CUDA)


def test_pad_right():
    assert pad_right([[1, 2, 3], [4]], CPU).tolist() == [[1, 2, 3], [4, 0, 0]]
