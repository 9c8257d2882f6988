"""The rows of a corpus and of a mixture: held against plain ones, and handed out to any number of processes."""

import collections
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import litgpt_moe_ext.data as data
from litgpt_moe_ext.data.loader import Order, Replica, TokenLoader
from litgpt_moe_ext.data.mixture.loader import MixtureLoader
from litgpt_moe_ext.data.mixture.settings import Annealing
from litgpt_moe_ext.data.windows import Windows
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.checkpoint.resharding import convert_position
from tests.attack import plain_data

Row = tuple[int, ...]
_SPLITS = {"train": "training", "val": "validation"}
_WORLDS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
"""Processes, and rows of a batch."""
_MIXED = 300
"""Rows of a mixture that are looked at."""


def check_rows(
    chance: random.Random, module: Any, documents: Mapping[str, Sequence[Sequence[int]]], length: int
) -> Iterator[str]:
    """Read a corpus as a training does, and yield what could be checked.

    Args:
        chance: What chooses.
        module: The corpus, a data module.
        documents: Its documents by side.
        length: Inputs of a row.
    """
    first = {side: chance.choice((None, None, 1, 3, 10_000)) for side in _SPLITS}
    module.train_count, module.val_count = first.values()
    module.connect(batch_size=1, max_seq_length=length)
    module.setup()
    plain = plain_data.stream_rows if module.packing == "stream" else plain_data.pieces
    expected = {side: plain(documents[side][: first[side]], length) for side in _SPLITS}
    if not all(expected.values()):
        return  # which is refused
    for side, split in _SPLITS.items():
        windows = module.windows_of(split, split)
        rows = [_without_padding(row) for row in _all_rows(windows)]
        assert windows.targets == sum(len(row) - 1 for row in rows)
        _check_packing(module.packing, rows, expected[side], length)
    yield f"rows: {module.packing}"
    _check_validation(module.windows_of("validation", "validation"))
    yield "validation: every row once"
    _check_training(module.windows_of("training", "training"), Order(module.seed, module.shuffle, module.corpus_id))
    loader = module.train_dataloader()
    if len(loader.windows) > 1:
        _check_resuming(chance, lambda size, replica: TokenLoader(loader.windows, size, True, loader.order, replica))
        yield "training: every row once, resumed"


def check_mixture(chance: random.Random, corpora: Sequence[Path], packing: str, length: int) -> Iterator[str]:
    """Mix two corpora of one tokenizer, and yield what could be checked.

    Args:
        chance: What chooses.
        corpora: They.
        packing: How both become rows.
        length: Inputs of a row.
    """
    parts = {
        name: data.PreparedCorpus(corpus_dir=corpus, packing=packing, shuffle=chance.random() < 0.7)
        for name, corpus in zip("ab", corpora, strict=True)
    }
    weights = [dict(zip("ab", chance.choice(((1, 1), (0.3, 0.7), (5, 1), (1e-3, 1))), strict=True)) for _ in range(2)]
    border = chance.choice((0, 10, 33))
    annealing = chance.choice((None, Annealing(weights[1], from_tokens=border * length)))
    mixture = data.Mixture(corpora=parts, weights=weights[0], annealing=annealing, seed=chance.randrange(9))
    mixture.connect(batch_size=1, max_seq_length=length)
    mixture.setup()
    try:
        counts = [[len(module.windows_of(split, split)) for module in parts.values()] for split in _SPLITS.values()]
    except SettingsError:
        counts = [[]]  # there is less text than one row
    if not all(map(all, counts)) or sum(counts[0]) < max(world * size for world, size in _WORLDS):
        return  # which is refused
    windows: Any = mixture.train_dataloader().windows
    rows = [tuple(row) for row in windows.gather(np.arange(_MIXED)).tolist()]
    alone = [_endless(part.windows, part.order) for part in windows.parts]
    phases = [(0, _MIXED, weights[0])]
    if annealing is not None:
        phases = [(0, border, weights[0]), (border, _MIXED, weights[1])]
    _check_shares(rows, alone, phases, [len(p.windows) / p.windows.targets for p in windows.parts])
    for world, size in _WORLDS:
        ranks = [MixtureLoader(windows, size, Replica(rank, world)) for rank in range(world)]
        steps = [[next(iter(rank)) for rank in ranks] for _ in range(_MIXED // (world * size))]
        assert [tuple(row) for step in steps for batch in step for row in batch.tolist()] == rows[
            : len(steps) * world * size
        ]
    _check_resuming(chance, lambda size, replica: MixtureLoader(windows, size, replica))
    yield "mixture: shares, resumed"


def check_shards(chance: random.Random, folder: Path, length: int) -> Iterator[str]:
    """Read shards of tokens in any form that circulates, and yield what could be checked.

    Args:
        chance: What chooses.
        folder: For them.
        length: Inputs of a row.
    """
    draw, stream = np.random.default_rng(chance.randrange(2**32)), dict.fromkeys(_SPLITS, ())
    vocabulary = chance.choice((300, 50_257, 128_256))
    forms = ("llm.c", "npy", "raw") if vocabulary < 2**16 else ("llm.c", "npy")
    for number, split in itertools.product(range(chance.choice((1, 3, 12))), _SPLITS):
        tokens = draw.integers(vocabulary, size=chance.choice((1, 50, 2000)))
        form = chance.choice(forms)
        path = folder / f"{split}_{number}{'.npy' if form == 'npy' else '.bin'}"
        if form == "npy":
            np.save(path, tokens.astype("<u2" if vocabulary < 2**16 else "<u4"))
        elif form == "raw":
            tokens.astype("<u2").tofile(path)
        else:
            magic, version, kind = (20240520, 1, "<u2") if vocabulary < 2**16 else (20240801, 7, "<u4")
            header = np.array([magic, version, len(tokens), *[0] * 253], "<i4")
            path.write_bytes(header.tobytes() + tokens.astype(kind).tobytes())
        stream[split] += tuple(tokens.tolist())
    module = data.TokenShards(data_path=folder, vocab_size=vocabulary)
    module.connect(batch_size=1, max_seq_length=length)
    if min(map(len, stream.values())) <= length:
        with pytest.raises(SettingsError, match="needs windows of"):
            module.prepare_data()
        return
    module.prepare_data()
    module.setup()
    for side, split in _SPLITS.items():
        assert _all_rows(module.windows_of(split, split)) == plain_data.stream_rows([stream[side]], length)
    yield "token shards"


def _all_rows(windows: Windows) -> list[Row]:
    return [tuple(row) for row in windows.gather(np.arange(len(windows))).tolist()]


def _without_padding(row: Row) -> Row:
    kept = tuple(token for token in row if token >= 0)
    assert row[: len(kept)] == kept, "padding is not at the end"
    return kept


def _check_packing(packing: str, rows: list[Row], expected: list[Row], length: int) -> None:
    if packing in ("stream", "pad"):
        assert rows == expected
        return
    assert sorted(map(len, rows)) == sorted(plain_data.best_fit_sizes([len(piece) for piece in expected], length + 1))
    tokens = [collections.Counter(token for part in parts for token in part) for parts in (rows, expected)]
    assert tokens[0] == tokens[1], "a token was lost, or came twice"
    if len(expected) < 60:
        assert all(plain_data.made_of(row, expected) for row in rows)


def _check_validation(windows: Windows) -> None:
    rows = collections.Counter(_all_rows(windows))
    for world, size in _WORLDS:
        if len(windows) >= world:
            ranks = [list(TokenLoader(windows, size, False, replica=Replica(rank, world))) for rank in range(world)]
            assert len(set(map(len, ranks))) == 1
            assert collections.Counter(tuple(row) for own in ranks for batch in own for row in batch.tolist()) == rows


def _check_training(windows: Windows, order: Order) -> None:
    rows = _all_rows(windows)
    single: list[list[Row]] = []
    for world, size in _WORLDS:
        if len(windows) < world * size:
            continue
        ranks = [TokenLoader(windows, size, True, order, Replica(rank, world)) for rank in range(world)]
        epochs = [_epoch(ranks) for _ in range(3)]
        single = single or epochs
        for number, epoch in enumerate(epochs):
            assert not collections.Counter(epoch) - collections.Counter(rows), "a row came twice"
            assert len(epoch) == len(rows) - len(rows) % (world * size), "a row is missing"
            assert epoch == single[number][: len(epoch)], "another number of processes sees other rows"
        if not order.shuffle:
            assert epochs[0] == rows[: len(epochs[0])]


def _epoch(ranks: Sequence[TokenLoader]) -> list[Row]:
    return [tuple(row) for step in zip(*ranks, strict=True) for batch in step for row in batch.tolist()]


def _endless(windows: Windows, order: Order) -> Iterator[Row]:
    loader = TokenLoader(windows, 1, True, order, Replica(0, 1))
    while True:
        for batch in loader:
            yield tuple(batch[0].tolist())


def _check_resuming(chance: random.Random, make: Callable[[int, Replica], TokenLoader]) -> None:
    """Stop at a step, and go on with other processes and batches."""
    for _ in range(3):
        single = make(1, Replica(0, 1))
        (world, size), others = chance.choice(_WORLDS), chance.choice(_WORLDS)
        count = len(single)
        if count < max(world * size, others[0] * others[1]):
            continue
        ranks = [make(size, Replica(rank, world)) for rank in range(world)]
        epoch = chance.randrange(2)
        steps = epoch * len(ranks[0]) + chance.randrange(len(ranks[0]))
        for rank, _ in itertools.product(ranks, range(steps)):
            next(iter(rank))
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(state == states[0] for state in states)
        endless = isinstance(single, MixtureLoader)
        done = (steps if endless else steps % len(ranks[0])) * world * size
        if done % (others[0] * others[1]):
            continue  # which is refused
        resumed = [make(others[1], Replica(rank, others[0])) for rank in range(others[0])]
        for rank in resumed:
            rank.load_state_dict(convert_position(states[0], others[1], others[0]))
        ours = [tuple(row) for rank in resumed for row in next(iter(rank)).tolist()]
        skipped = done if endless else epoch * count + done
        if not endless and done + len(ours) > count:
            skipped = (epoch + 1) * count  # what is left fills no batch
        for _ in range(skipped):
            next(iter(single))
        assert ours == [tuple(next(iter(single))[0].tolist()) for _ in ours], "a resumed training sees other rows"


def _check_shares(
    rows: Sequence[Row],
    alone: Sequence[Iterator[Row]],
    phases: Sequence[tuple[int, int, Mapping[str, float]]],
    rows_per_token: Sequence[float],
) -> None:
    """Check that rows are those of two corpora in their orders, and that each has its share at any moment.

    Args:
        rows: Of the mixture.
        alone: The rows of each corpus without the other.
        phases: First row, the one after the last, and weights.
        rows_per_token: Of each corpus.
    """
    own = [list(itertools.islice(corpus, len(rows))) for corpus in alone]
    # Rows of both may be equal, so there may be several ways to have read the first of them.
    possible = {(0, 0)}  # rows of the first corpus, before this phase and in it
    for first, end, weights in phases:
        shares = [weight * rate for weight, rate in zip(weights.values(), rows_per_token, strict=True)]
        share = shares[0] / sum(shares)
        possible = {(before + within, 0) for before, within in possible}
        for number in range(first, end):
            count = number - first + 1
            steps = {(b, w + 1) for b, w in possible if own[0][b + w] == rows[number]}
            steps |= {(b, w) for b, w in possible if own[1][number - b - w] == rows[number]}
            slack = 1 + 2 * count / 65_536  # to which shares are rounded
            possible = {(b, w) for b, w in steps if abs(w - count * share) <= slack}
            assert possible, f"row {number} is of neither corpus, or against the shares"
