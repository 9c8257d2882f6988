"""What is said of files that LitGPT's own data modules do not find."""

import pytest
from litgpt.data import Alpaca, LitData, MicroLlama, TextFiles

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.phases.litgpt_data import check_litgpt_data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").touch()
    (tmp_path / "val").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: LitData(folder, ("train", "val")), r"data.data_path: .* '\S*val' has no index.json of litdata"),
        (lambda folder: LitData(folder, ("train", "test")), r"data.data_path: .* '\S*test' does not exist"),
        (lambda folder: MicroLlama(folder), r"data.data_path: .* MicroLlama reads: '\S*train' does not exist"),
        (lambda folder: LitData(folder / "train", num_workers=-1), "data.num_workers: -1 must be at least 0"),
        (lambda folder: TextFiles(folder / "one"), r"data.train_data_path: .* has 1 .txt file; it needs 2 or more, of"),
        (lambda folder: TextFiles(folder / "one", folder), r"data.val_data_path: .* has 0 .txt files; it needs 1 or"),
    ],
)
def test_files_that_are_not_there(folder, make, message):
    with pytest.raises(SettingsError, match=message):
        check_litgpt_data(make(folder))


def test_what_may_be_there(folder):
    """Where it cannot be seen, litdata will say."""
    for data in (LitData(folder / "train"), LitData("s3://x", ("a", "b")), TextFiles(folder / "one", folder / "one")):
        check_litgpt_data(data)
    check_litgpt_data(Alpaca())
