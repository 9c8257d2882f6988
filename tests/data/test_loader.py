import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from litgpt.utils import CycleIterator

from litgpt_moe_ext.data.loader import Order, Replica, TokenLoader
from litgpt_moe_ext.data.windows import StreamWindows


def tokens_of(windows: int, block_size: int, rest: int = 0) -> np.ndarray:
    """Ids 0, 1, 2, ...: a window's first id tells which window it is."""
    return np.arange(windows * block_size + 1 + rest, dtype=np.uint16)


def make(windows=11, block_size=4, batch_size=2, train=True, replica=None, **order) -> TokenLoader:
    data = StreamWindows([tokens_of(windows, block_size)], block_size)
    return TokenLoader(data, batch_size, train, Order(**order), replica)


def take(loader, count: int) -> list[list[list[int]]]:
    iterator = CycleIterator(loader)
    return [next(iterator).tolist() for _ in range(count)]


def window_ids(batches, block_size: int) -> list[int]:
    ids = []
    for batch in batches:
        assert batch.dtype == torch.int64
        assert batch.shape[1] == block_size + 1
        for row in batch.tolist():
            assert row == list(range(row[0], row[0] + block_size + 1))
            ids.append(row[0] // block_size)
    return ids


def test_windows_share_their_border_token():
    loader = TokenLoader(StreamWindows([np.arange(10, dtype=np.uint32)], 4), 2, train=False)
    assert [batch.tolist() for batch in loader] == [[[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]]
    assert [row.tolist() for row in loader.dataset] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_order_is_fixed_by_seed_and_epoch():
    first, second = take(make(seed=3), 15), take(make(seed=3), 15)
    assert first == second
    assert take(make(seed=4), 15) != first
    assert take(make(seed=4), 5) != first[5:10], "no seed repeats the epochs of another"
    assert first[:5] != first[5:10] != first[10:]


def test_the_order_stays_that_of_earlier_checkpoints():
    """They hold the seed and the epoch alone; in another order a resumed run would see some windows twice."""
    assert Order(7).of_epoch(2, 10).tolist() == [1, 5, 3, 4, 6, 9, 0, 8, 2, 7]


def test_training_is_shuffled_and_evaluation_is_not():
    assert window_ids(make(train=False), 4) == list(range(11))
    assert window_ids(make(), 4) != sorted(window_ids(make(), 4))
    in_order = make(shuffle=False)
    assert window_ids([*in_order, *in_order], 4) == 2 * list(range(10))


@settings(max_examples=150, deadline=None)
@given(
    windows=st.integers(1, 60),
    block_size=st.integers(1, 9),
    batch_size=st.integers(1, 7),
    world=st.integers(1, 6),
    seed=st.integers(0, 5),
    rest=st.integers(0, 8),
    shards=st.integers(1, 9),
)
def test_every_window_once_over_all_ranks(windows, block_size, batch_size, world, seed, rest, shards):
    rest = min(rest, block_size - 1)
    data = np.array_split(tokens_of(windows, block_size, rest), shards)
    assume(windows >= world)

    def loaders(train):
        windows = StreamWindows(data, block_size)
        return [TokenLoader(windows, batch_size, train, Order(seed), Replica(r, world)) for r in range(world)]

    evaluation = [list(loader) for loader in loaders(False)]
    assert len({len(batches) for batches in evaluation}) == 1
    assert len(loaders(False)[0]) == len(evaluation[0])
    ids = [i for batches in evaluation for i in window_ids(batches, block_size)]
    assert sorted(ids) == list(range(windows))
    sizes = [len(batch) for batches in evaluation for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size + (world > 1)

    if windows < world * batch_size:
        with pytest.raises(ValueError, match="train.micro_batch_size: .* needs"):
            loaders(True)
        return
    training = loaders(True)
    for _epoch in range(2):
        epoch = [list(loader) for loader in training]
        expected = windows // (world * batch_size)
        assert all(len(batches) == len(loader) == expected for batches, loader in zip(epoch, training, strict=True))
        ids = [i for batches in epoch for i in window_ids(batches, block_size)]
        assert len(ids) == len(set(ids)) == expected * world * batch_size
        assert all(len(batch) == batch_size for batches in epoch for batch in batches)


def test_ranks_cut_the_batch_of_a_single_process():
    single = list(make(windows=24, batch_size=6))
    ranks = [list(make(windows=24, batch_size=2, replica=Replica(r, 3))) for r in range(3)]
    assert all(torch.equal(one, torch.cat(parts)) for one, *parts in zip(single, *ranks, strict=True))


@pytest.mark.parametrize("consumed", range(17))
def test_resume_at_every_position(consumed):
    whole = take(make(), 25)
    loader = make()
    assert take(loader, consumed) == whole[:consumed]
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == divmod(consumed, 5)
    resumed = make()
    resumed.load_state_dict(state)
    assert take(resumed, 25 - consumed) == whole[consumed:]


@pytest.mark.parametrize("consumed", [0, 1, 4, 5, 6, 13])
def test_resume_through_fabric(tmp_path, consumed):
    fabric = Fabric(accelerator="cpu", devices=1)
    whole = take(make(), 20)

    loader = fabric.setup_dataloaders(make())
    assert take(loader, consumed) == whole[:consumed]
    fabric.save(tmp_path / "checkpoint.pth", {"train_dataloader": loader, "iter_num": consumed})

    resumed, _ = fabric.setup_dataloaders(make(), make(train=False))
    state = {"train_dataloader": resumed, "iter_num": 0}
    fabric.load(tmp_path / "checkpoint.pth", state)
    assert state["iter_num"] == consumed
    assert take(resumed, 20 - consumed) == whole[consumed:]
    # The file holds numbers and strings only, so the safe loader reads it.
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["train_dataloader"]["epoch"] == consumed // 5


def test_len_through_fabric():
    fabric = Fabric(accelerator="cpu", devices=1)
    train, val = fabric.setup_dataloaders(make(), make(train=False))
    assert (len(train), len(val)) == (5, 6)


def test_evaluation_starts_over_after_a_break():
    loader = make(train=False)
    first = next(iter(loader))
    assert torch.equal(next(iter(loader)), first)
    assert loader.state_dict()["position"] == 0


def test_a_new_iterator_goes_on_and_an_old_one_ends_with_its_epoch():
    whole = take(make(), 6)
    loader = make()
    old = iter(loader)
    assert next(old).tolist() == whole[0]
    assert [batch.tolist() for batch in loader] == whole[1:5]
    assert list(old) == []
    assert next(iter(loader)).tolist() == whole[5]
    assert loader.epoch == 1


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_have_their_own_memory():
    data = tokens_of(11, 4)
    iterator = iter(TokenLoader(StreamWindows([data], 4), 2, train=True))
    first = next(iterator)
    copy = first.clone()
    next(iterator)
    assert torch.equal(first, copy)
    first.fill_(0)
    assert np.array_equal(data, tokens_of(11, 4))


def test_rank_and_world_come_from_torch_distributed_when_iteration_starts(monkeypatch):
    loader = make(windows=12, seed=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert len(loader) == 3
    assert loader.state_dict()["fingerprint"]["world_size"] == 2
    expected = [batch.tolist() for batch in make(windows=12, seed=1, replica=Replica(1, 2))]
    assert [batch.tolist() for batch in loader] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 12}, "windows: 11 in the checkpoint, 12 now"),
        ({"block_size": 5}, "block_size: 4 in the checkpoint, 5 now"),
        ({"batch_size": 3}, "batch_size: 2 in the checkpoint, 3 now"),
        ({"replica": Replica(0, 2)}, "world_size: 1 in the checkpoint, 2 now"),
        ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
        ({"shuffle": False}, "shuffle: True in the checkpoint, False now"),
        ({"corpus": "other"}, "corpus: '' in the checkpoint, 'other' now"),
    ],
)
def test_a_state_of_other_settings_is_refused(change, message):
    state = make().state_dict()
    with pytest.raises(ValueError, match=message) as error:
        make(**change).load_state_dict(state)
    assert "resume with the original values" in str(error.value)


def test_a_foreign_or_damaged_state_is_refused():
    with pytest.raises(ValueError, match="another kind of data loader"):
        make().load_state_dict({"num_samples_yielded": 3})
    with pytest.raises(ValueError, match="damaged .epoch 0, batch 5 of 5"):
        make().load_state_dict({**make().state_dict(), "position": 5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"windows": 1, "block_size": 4, "batch_size": 2},
            "micro_batch_size: 2 on 1 process needs 2 windows .*has 1 .5",
        ),
        ({"batch_size": 0}, "batch_size should be a positive"),
        ({"windows": 2, "train": False, "replica": Replica(0, 3)}, "on 3 processes needs 3"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_data_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"max_seq_length: 4 needs .* 5 tokens, but the validation data has 4;"):
        StreamWindows([np.arange(4, dtype=np.uint16)], 4, "validation data")
    with pytest.raises(ValueError, match="but the data has 1; give more data$"):  # no length would do
        StreamWindows([np.arange(1, dtype=np.uint16)], 4)
    with pytest.raises(ValueError, match="max_seq_length: 0 must be at least 1"):
        StreamWindows([np.arange(4, dtype=np.uint16)], 0)
