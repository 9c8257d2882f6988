"""Whatever happens to a file of a checkpoint, a run resumes from one that is as it was written, or says which is not.

`MOE_TEST_DAMAGES` says how many times a file is damaged, `MOE_TEST_SEED` which and how.
"""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, load_model, load_tokenizer
from litgpt_moe_ext.files.checksums import FILE_NAME
from litgpt_moe_ext.training.checkpoint.progress import newest_first
from litgpt_moe_ext.training.checkpoint.resume import find_resume_file

DAMAGES = int(os.environ.get("MOE_TEST_DAMAGES", "40"))
SEED = int(os.environ.get("MOE_TEST_SEED", "0"))


class Runs:
    """An object that a pickle runs when it is opened carelessly."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def flip_a_bit(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(max(1, file.stat().st_size)))


def append(file: Path, chance: random.Random) -> None:
    with open(file, "ab") as stream:
        stream.write(chance.randbytes(chance.randint(1, 100)))


def zero_a_page(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = chance.randrange(max(1, len(content)))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "a flipped bit": flip_a_bit,
    "cut off": cut,
    "appended": append,
    "zeros": zero_a_page,
    "empty": lambda file, _chance: file.write_bytes(b""),
    "gone": lambda file, _chance: file.unlink(),
    "other bytes": lambda file, chance: file.write_bytes(chance.randbytes(chance.randint(1, 3000))),
    "a foreign pickle": lambda file, _chance: file.write_bytes(pickle.dumps(Runs())),
    "a directory": lambda file, _chance: (file.unlink(), file.mkdir()),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_settings) -> Path:
    """The directory of a run with several checkpoints and an averaged model."""
    from tests.runs import recipe_writer

    folder = tmp_path_factory.mktemp("finished")
    file = recipe_writer(folder, corpus_settings)(ema={"decay": 0.9})
    assert main(["--config", str(file)]) == 0
    return folder / "out"


def files_of(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def content_of(directory: Path) -> dict[Path, bytes]:
    return {name: (directory / name).read_bytes() for name in files_of(directory) if name.name != FILE_NAME}


def test_resuming_from_damaged_checkpoints(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chance = random.Random(SEED)
    whole = {directory.name: content_of(directory) for directory in newest_first(finished)}
    order = [directory.name for directory in newest_first(finished)]
    assert len(order) >= 4
    for _ in range(DAMAGES):
        out_dir = tmp_path / "out"
        shutil.copytree(finished, out_dir)
        done: list[tuple[str, str]] = []
        for name in order[: chance.choice((1, 1, 1, 2, 3))]:  # the newest, and sometimes some after it
            file = chance.choice(files_of(out_dir / name))
            kind = chance.choice(list(DAMAGE))
            DAMAGE[kind](out_dir / name / file, chance)
            done.append((name, f"{kind}: {file}"))
        said: list[str] = []
        found = find_resume_file("auto", out_dir, said.append)
        assert found, done
        chosen = found.parent.name
        assert content_of(found.parent) == whole[chosen], (done, chosen)
        # Only damaged ones were passed over, and each is named.
        passed = set(order[: order.index(chosen)])
        assert passed <= {name for name, _ in done}, (done, said)
        assert all(any(f"/{name}: " in line for line in said) for name in passed), (done, said)
        shutil.rmtree(out_dir)
    assert not (tmp_path / "ran").exists()


def test_all_damaged(finished, tmp_path):
    """Nothing starts anew over a run that was meant to go on."""
    shutil.copytree(finished, tmp_path / "out")
    for directory in newest_first(tmp_path / "out"):
        (directory / FILE_NAME).write_bytes(b"")
    with pytest.raises(SettingsError, match="resume: 'auto' found only damaged checkpoints") as error:
        find_resume_file("auto", tmp_path / "out", lambda _line: None)
    assert all(directory.name in str(error.value) for directory in newest_first(finished))


def test_without_checksums(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    newest, *older = newest_first(tmp_path / "out")
    (newest / FILE_NAME).unlink()
    said: list[str] = []
    found = find_resume_file("auto", tmp_path / "out", said.append)
    assert found
    assert found.parent == older[0]
    assert said == [f"Skipping checkpoint {newest}: SHA256SUMS is missing"]


def problem_of(directory: Path) -> str | None:
    try:
        check_checkpoint_dir(directory)
        load_model(directory, torch.device("cpu"))
        load_tokenizer(directory)
    except SettingsError as error:
        return str(error)
    return None


def test_opening_damaged_checkpoints(finished, tmp_path, monkeypatch):
    """Commands that look at a checkpoint name what is wrong with it, and never run what is in it."""
    monkeypatch.chdir(tmp_path)
    chance = random.Random(SEED)
    directory = tmp_path / "final"
    for _ in range(DAMAGES):
        shutil.copytree(finished / "final", directory)
        file = chance.choice([path for path in files_of(directory) if path.suffix in (".pth", ".yaml", ".json")])
        kind = chance.choice(list(DAMAGE))
        DAMAGE[kind](directory / file, chance)
        message = problem_of(directory)
        assert message is None or (message.startswith("checkpoint_dir: ") and "\n" not in message), (
            kind,
            file,
            message,
        )
        shutil.rmtree(directory)
    assert not (tmp_path / "ran").exists()
