"""Corpora of any files and settings, prepared, cut into rows and handed out: no token is lost, and none comes twice.

What comes out is held against `plain_data`, which says the same in lists. What is random is compared without its order:
each row once in an epoch, the same rows for any number of processes, in any batches and from any position, and the same
files however often the preparation was killed.

`python -m tests.attack.corpora --count 300` tries more of them than a test may, and prints what came of them.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litgpt_moe_ext.data as data
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.errors import SettingsError
from tests.attack import plain_data
from tests.attack.by_seed import try_seeds
from tests.attack.files_of_text import FORMS, random_documents, write_files
from tests.attack.preparing import Sizes, prepare, prepare_and_die
from tests.attack.rows import check_mixture, check_rows, check_shards
from tests.attack.tokenizers_of_any_kind import write_tokenizer

SIDES = ("train", "val")
PACKINGS = ("stream", "best_fit", "pad")
_KILLS = 4
_NOTHING_TO_PREPARE = ("leaves no document to", "which would train and validate")


def random_settings(chance: random.Random, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Return settings of a corpus, but for where its files are.

    Args:
        chance: What chooses.
        folder: For a tokenizer.
        texts: What it learns from.
    """
    settings: dict[str, Any] = {
        "prepend_bos": chance.random() < 0.4,
        "seed": chance.choice((0, 42, 7)),
        "workers": chance.choice((1,) * 9 + (2,)),
    }
    if chance.random() < 0.4:
        special = chance.choice((("<|endoftext|>",), ("<s>", "</s>"), ("<pad>", "<|endoftext|>", "<s>")))
        ends = {"eos_token": chance.choice(special), "bos_token": chance.choice((None, *special))}
        byte_mode = chance.choice(("level", "fallback"))
        settings["bpe"] = BPESettings(chance.choice((270, 300, 400)), special, byte_mode=byte_mode, **ends)
    else:
        write_tokenizer(chance, folder / "tokenizer", plain_data.not_empty(texts))
        settings["tokenizer_dir"] = folder / "tokenizer"
    for side in SIDES:
        if chance.random() < 0.2:
            settings[f"{side}_count"] = chance.choice((1, 5, 50))
    return settings


def attack(seed: int, folder: Path) -> Iterator[str]:
    """Prepare a corpus and read it in many ways, and yield these ways.

    Args:
        seed: Of the files and the settings.
        folder: For both; must not be there.
    """
    folder.mkdir()
    chance = random.Random(seed)
    form = chance.choice(FORMS)
    found = write_files(chance, folder / "source", form, random_documents(chance, chance.choice((20, 40, 150))))
    settings = {**random_settings(chance, folder, found), **form.settings, "pattern": "**/[0-9]*"}
    settings |= {"source_path": folder / "source", "data_path": folder / "prepared"}
    validating: list[str] | None = None
    if chance.random() < 0.4:
        validating = write_files(chance, folder / "val", form, random_documents(chance, 20))
        settings["val_path"] = folder / "val"
    else:
        settings["val_fraction"] = chance.choice((0.1, 0.5))
    try:
        corpus = prepare(settings, Sizes.random(chance))
    except SettingsError as error:
        if not any(reason in str(error) for reason in _NOTHING_TO_PREPARE):
            raise
        yield "refused"
        return
    documents = check_documents(corpus, settings, found, validating)
    check_files(corpus)
    yield f"documents: {form.suffix}"
    yield from prepare_again(chance, folder, corpus, settings)
    packing, length = chance.choice(PACKINGS), chance.choice((1, 2, 7, 32, 200))
    module = data.PreparedCorpus(corpus_dir=corpus, packing=packing, shuffle=chance.random() < 0.7, seed=seed)
    yield from check_rows(chance, module, documents, length)
    with_another = {"tokenizer_dir": corpus / "tokenizer", "bpe": None, "val_fraction": 0.3, "val_path": None}
    write_files(chance, folder / "another", form, random_documents(chance, 40))
    another = prepare({**settings, **with_another, "source_path": folder / "another"}, Sizes.random(chance))
    yield from check_mixture(chance, (corpus, another), packing, length)
    (folder / "shards").mkdir()
    yield from check_shards(chance, folder / "shards", length)


def check_documents(
    corpus: Path, settings: dict[str, Any], found: list[str], validating: list[str] | None
) -> dict[str, list[list[int]]]:
    """Check that shards hold the documents and nothing else, and return their tokens by side.

    Args:
        corpus: The prepared corpus.
        settings: Of it.
        found: The documents of its files.
        validating: Those of the files to validate on, if there are any.
    """
    encoded = [
        plain_data.encode(corpus / "tokenizer", plain_data.not_empty(texts), settings["prepend_bos"])
        for texts in (found, validating or [])
    ]
    shards = {side: plain_data.read_shards(corpus, side) for side in SIDES}
    counts = {side: settings.get(f"{side}_count") for side in SIDES}
    if validating is not None:
        sides = {"train": encoded[0][: counts["train"]], "val": encoded[1][: counts["val"]]}
    else:
        sides = _split(plain_data.not_empty(found), encoded[0], shards, counts)
    for side, documents in sides.items():
        expected = [token for document in documents for token in document]
        assert shards[side] == expected, f"{side}: {_difference(shards[side], expected)}"
    manifest = json.loads((corpus / "manifest.json").read_text())
    for side, documents in sides.items():
        assert manifest[f"documents_{side}"] == len(documents)
        assert manifest[f"tokens_{side}"] == len(shards[side])
    return sides


def _split(
    texts: list[str], encoded: list[list[int]], shards: dict[str, list[int]], counts: dict[str, int | None]
) -> dict[str, list[list[int]]]:
    # Which documents validate is a matter of a hash: each is the next one of one side, and equal ones of the same.
    sides: dict[str, list[list[int]]] = {side: [] for side in SIDES}
    at, known = dict.fromkeys(SIDES, 0), {}
    for text, tokens in zip(texts, encoded, strict=True):
        full = [side for side in SIDES if counts[side] is not None and len(sides[side]) >= counts[side]]
        fitting = [s for s in SIDES if s not in full and shards[s][at[s] : at[s] + len(tokens)] == tokens]
        if text in known:
            fitting = [side for side in fitting if side == known[text]]
        if not fitting:
            assert full, f"{text[:50]!r} is on neither side, where it belongs"
            continue
        known[text] = fitting[0]
        sides[fitting[0]].append(tokens)
        at[fitting[0]] += len(tokens)
    return sides


def _difference(ours: list[int], theirs: list[int]) -> str:
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((number for number, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return f"{len(ours)} and {len(theirs)} tokens, others from {at}: {ours[at : at + 8]} for {theirs[at : at + 8]}"


def check_files(corpus: Path) -> None:
    """Check that a finished corpus has its files, and each its checksum."""
    sums = dict(reversed(line.split("  ", 1)) for line in (corpus / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file()}
    # Of one that was killed after it had got its name, how far it was is still there.
    assert files - {"state.json"} == {*sums, "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((corpus / name).read_bytes()).hexdigest() == digest


def prepare_again(chance: random.Random, folder: Path, corpus: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Prepare a corpus in other ways, which must come to the same, and yield these ways.

    Args:
        chance: What chooses.
        folder: For the corpora.
        corpus: It.
        settings: Of it.
    """
    other = {**settings, "data_path": folder / "other"}
    if chance.random() < 0.15:
        other["workers"] = 3 - settings["workers"]
        yield "other number of processes"
    check_same(prepare(other, Sizes.random(chance)), corpus)
    killed, sizes = {**settings, "data_path": folder / "killed"}, Sizes.random(chance)
    kills = 0
    while kills < _KILLS and not prepare_and_die(killed, sizes, chance.randrange(1, 60)):
        kills += 1
    finished = prepare(killed, sizes)
    check_same(finished, corpus)
    check_files(finished)
    left = [path for path in finished.parent.iterdir() if path.is_dir()]
    assert left == [finished], f"left over: {left}"
    yield f"killed {kills} times"


def check_same(ours: Path, theirs: Path) -> None:
    """Check that two corpora have the same tokens and tokenizers."""
    assert ours != theirs
    for side in SIDES:
        assert plain_data.read_shards(ours, side) == plain_data.read_shards(theirs, side)
    for file in (theirs / "tokenizer").iterdir():
        assert (ours / "tokenizer" / file.name).read_bytes() == file.read_bytes()


if __name__ == "__main__":
    try_seeds(__doc__, 50, attack)
